"""Images that belong together: named, kept together, stored, and drawn together by intervals."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from safetensors import safe_open

from policyskip.data import TensorImages, digits, from_arrays, from_dataset, groups_of, hold_out
from policyskip.data import datasets as datasets_module
from policyskip.errors import UserError
from policyskip.evaluation.decisions import load_decisions, save_decisions
from policyskip.intervals import bootstrap
from policyskip.runs.folder import Run
from tests.conftest import small_images
from tests.made_up import made_up_decisions

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
LABELS = np.arange(40) % 2
VIDEOS = np.repeat(np.arange(8), 5)
"""Eight videos of five frames each."""


def test_images_of_digits_are_grouped_by_their_source():
    data = digits(torch.device("cpu"), train=30, validation=1000, test=30)
    assert data.validation.fingerprint() == "be1fb15a74fa4b4c"  # as before there were groups
    group_N = groups_of(data.validation.plain())
    assert group_N.min() >= 0 and group_N.max() < 300 and len(group_N.unique()) > 250
    easy = data.validation.difficulty < 0.5
    one, other = (data.validation.images[easy & (group_N == group)].float() for group in group_N[easy][:2])
    assert (one[0] - one[1]).abs().mean() < 0.7 * (one[0] - other[0]).abs().mean()  # one digit, two renderings
    for group in group_N.unique():
        assert len(data.validation.label_N[group_N == group].unique()) == 1


@pytest.mark.parametrize("bytes_in_memory", [2**30, 0], ids=["in memory", "when needed"])
@pytest.mark.parametrize("named", [VIDEOS, [f"video {v}" for v in VIDEOS], torch.from_numpy(VIDEOS).int()])
def test_images_of_a_group_stay_in_one_split(named, bytes_in_memory, monkeypatch):
    monkeypatch.setattr(datasets_module, "IN_MEMORY_BYTES", bytes_in_memory)
    pairs = list(zip(PIXELS, LABELS, strict=True))
    for data in (
        from_arrays(PIXELS, LABELS, groups=named, validation=0.25, test=0.25),
        from_dataset(pairs, groups=named, validation=0.25, test=0.25),
    ):
        groups = [groups_of(data.split(split)) for split in ("train", "validation", "test")]
        assert sorted(torch.cat(groups).tolist()) == VIDEOS.tolist()  # all of them, five times
        assert [len(group_N.unique()) for group_N in groups] == [4, 2, 2]
        assert torch.equal(groups_of(data.test.plain()), groups[2])


def test_every_split_of_its_own_has_its_own_groups():
    pair = (PIXELS[:4], LABELS[:4])
    given = {"validation": pair, "test": pair}
    data = from_arrays(PIXELS, LABELS, **given, groups={"validation": None, "test": [7, 7, 2, 7]})
    assert groups_of(data.test).tolist() == [1, 1, 0, 1]
    assert groups_of(data.train) is None and groups_of(data.validation) is None


WRONG = {
    "too few": ([1, 2], "there are 40 train images and 2 groups"),
    "floats": (VIDEOS / 2, r"groups of train images must be names or whole numbers \(N,\), got an ndarray of float64"),
    "a table": (VIDEOS[None], r"groups of train images must be names or whole numbers \(N,\), got an ndarray of int64"),
    "a name": ("video", r"must be names or whole numbers \(N,\), got 'video'"),
    "two lengths": ([[1], [2, 3]], r"must be names or whole numbers \(N,\), got a list of length 2"),
    "of a share": ({"test": VIDEOS}, "groups are of splits whose images are given, train, got groups of 'test'"),
    "one group": ([3] * 40, "all 40 images are of one group, which cannot be divided among the splits"),
}


@pytest.mark.parametrize(("groups", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_groups_are_refused_in_one_line(groups, message):
    with pytest.raises(UserError, match=message) as refused:
        from_arrays(PIXELS, LABELS, groups=groups)
    assert "\n" not in str(refused.value)


def test_a_set_s_own_groups_are_checked():
    for wrong in (torch.zeros(3).long(), torch.zeros(4), [0] * 4):
        with pytest.raises(
            UserError, match=r"group_N must be a tensor of int64 \(4,\), the number of each image's group"
        ):
            TensorImages(small_images(4).images, small_images(4).label_N, group_N=wrong)

    class Own(TensorImages):
        """A set that somebody else wrote, before there were groups."""

        def __init__(self):
            super().__init__(small_images(4).images, small_images(4).label_N)
            del self.group_N

    own = Own()
    assert groups_of(own) is None
    own.group_N = torch.zeros(3).long()
    with pytest.raises(UserError, match=r"group_N must be .*, got a Tensor of int64 \(3,\)"):
        groups_of(own)


def test_without_groups_the_same_images_are_held_out_as_ever():
    held_out, kept = hold_out(10, 0.3)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    assert held_out.tolist() == sorted(order[:3].tolist()) and kept.tolist() == sorted(order[3:].tolist())
    alone = hold_out(10, 0.3, torch.arange(10))
    assert torch.equal(alone[0], held_out) and torch.equal(alone[1], kept)


def test_groups_are_drawn_together():
    """Of two groups, of one image and of three, the means of the four draws are 0, 3/4 (twice) and 1."""
    value_N, group_N = np.array([0.0, 1.0, 1.0, 1.0]), np.array([5, 2, 2, 2])
    assert bootstrap(value_N, group_N=group_N) == (0.0, 1.0)
    generator = np.random.default_rng(3)
    number_N = generator.integers(0, 40, 600)
    value_N = generator.choice([-1.0, 0.0, 1.0], 40)[number_N]  # all images of a group are alike
    means = []
    for _ in range(4000):
        drawn = np.concatenate([value_N[number_N == g] for g in generator.integers(0, 40, 40)])
        means.append(drawn.mean())
    low, high = bootstrap(value_N, group_N=number_N)
    assert (low, high) == pytest.approx(np.quantile(means, [0.025, 0.975]).tolist(), abs=0.02)
    alone = bootstrap(value_N)
    assert high - low > 3 * (alone[1] - alone[0])
    assert bootstrap(value_N, group_N=np.arange(600)) == pytest.approx(alone, abs=0.01)


def test_many_different_groups_are_drawn_in_parts(monkeypatch):
    value_N, group_N = np.random.default_rng(1).random(300), np.arange(300) // 2
    whole = bootstrap(value_N, draws=500, group_N=group_N)
    monkeypatch.setattr("policyskip.intervals.MOST_COUNTS", 7 * 150)
    assert bootstrap(value_N, draws=500, group_N=group_N) == whole


def test_a_record_keeps_its_groups_in_its_file(tmp_path):
    record = made_up_decisions(keep=[[1, 0], [1, 1], [0, 0]])
    save_decisions(dataclasses.replace(record, group_N=torch.tensor([3, 3, 1])), Run(tmp_path))
    assert load_decisions(Run(tmp_path)).group_N.tolist() == [3, 3, 1]
    (tmp_path / "none").mkdir()
    save_decisions(record, Run(tmp_path / "none"))
    with safe_open(tmp_path / "none" / "decisions.safetensors", framework="pt") as file:
        assert "group_N" not in file.keys()  # noqa: SIM118
    for wrong in (torch.tensor([1, 2]), torch.tensor([0.5, 1, 2])):
        save_decisions(dataclasses.replace(record, group_N=wrong), Run(tmp_path))
        with pytest.raises(UserError, match=r"decisions\.safetensors is damaged or not ours: its table group_N is"):
            load_decisions(Run(tmp_path))
