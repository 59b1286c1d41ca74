"""A run that was stopped goes on to the bit, whatever learns in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from policyskip.errors import UserError
from policyskip.runs.folder import Run, create
from tests.learners import LEARNERS, learn


def without_times(run: Run) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in run.metrics()]


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Run]:
    """A run of every learner that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    runs = {name: create(str(folder / name), "policyskip train", "") for name in LEARNERS}
    for name, run in runs.items():
        torch.rand(7)  # the state of torch's own generator has no say
        assert learn(name, run)
    return runs


@pytest.mark.parametrize("stop_at", [1, 4, 7])
@pytest.mark.parametrize("name", LEARNERS)
def test_every_learner_goes_on_to_the_bit(name, stop_at, whole, tmp_path):
    run = create(str(tmp_path / "run"), "policyskip train", "")
    assert not learn(name, run, stop_at=stop_at)
    assert run.load_checkpoint()["step"] == stop_at
    torch.rand(11)
    assert learn(name, run, resume=True)
    assert without_times(run) == without_times(whole[name])
    ours, theirs = run.load_checkpoint(), whole[name].load_checkpoint()
    assert all(same(ours[key], theirs[key]) for key in theirs if key != "seconds")
    assert (run.folder / "best-so-far.safetensors").read_bytes() == (
        whole[name].folder / "best-so-far.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("name", ["blockdrop", "msdnet"])
def test_a_run_goes_on_beyond_its_first_number_of_steps(name, tmp_path):
    run = create(str(tmp_path / "run"), "policyskip train", "")
    assert learn(name, run, steps=4)
    assert learn(name, run, steps=9, resume=True)
    assert run.load_checkpoint()["step"] == 9 and run.metrics()[-1]["step"] == 9


def test_fewer_steps_than_were_done_are_refused_and_nothing_is_lost(tmp_path):
    run = create(str(tmp_path / "run"), "policyskip train", "")
    assert learn("blockdrop", run, steps=6)
    before = {path: path.read_bytes() for path in run.folder.iterdir()}
    with pytest.raises(UserError, match="has done 6 updates already; train.steps=5 is below that"):
        learn("blockdrop", run, steps=5, resume=True)
    assert {path: path.read_bytes() for path in run.folder.iterdir()} == before
