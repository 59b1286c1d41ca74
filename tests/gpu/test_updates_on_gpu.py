"""Updates on a GPU: they ask it for nothing between two records, and repeat, stop, go on and fail as on a CPU."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from policyskip.envs.block_selection import BlockSelectionVectorEnv
from policyskip.errors import UserError
from policyskip.parallel.deferred import Deferred, fetched
from policyskip.rewards import Budget
from policyskip.runs.folder import Run, create
from tests.learners import LEARNERS, learn

pytestmark = pytest.mark.gpu

ASKING_NOTHING = [name for name in LEARNERS if name not in ("skipnet", "pretrain a deep network in float64")]
"""SkipNet's gates decide in the middle of the network, whose blocks run for the images that keep them: that asks."""


@pytest.mark.parametrize("name", ASKING_NOTHING)
def test_updates_ask_the_gpu_for_nothing(name, gpu, learners_there, no_asking):
    learner, source, _ = LEARNERS[name](12)
    checks, window = Deferred(), list[Any]()

    def update(number: int) -> None:
        with checks.during(number):
            figures = learner.update(source)
            if isinstance(getattr(source, "reward", None), Budget):
                figures |= source.reward.adapt(figures)
        window.append(figures)

    for number in (1, 2, 3):  # compile kernels, record graphs, set libraries up
        update(number)
    with no_asking():
        for number in (4, 5, 6):
            update(number)
    figures = fetched(window)
    assert checks.first_problem() is None and all(isinstance(value, float) for value in figures[-1].values())
    if isinstance(source, BlockSelectionVectorEnv):
        assert source.execution.way == "kernel"  # type: ignore[attr-defined]


def records(run: Run) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in run.metrics()]


@pytest.mark.parametrize("name", ["blockdrop on a budget", "branchynet", "pretrain"])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(name, learners_there, tmp_path):
    whole, halved = (create(str(tmp_path / kind), "policyskip train", "") for kind in ("whole", "halved"))
    assert learn(name, whole)
    assert not learn(name, halved, stop_at=5)
    assert learn(name, halved, resume=True)
    assert records(halved) == records(whole)


def test_a_run_of_the_cpu_goes_on_on_a_gpu(gpu, monkeypatch, tmp_path):
    """With the decisions that the CPU would have drawn; the figures are the same to rounding."""
    there, here = (create(str(tmp_path / kind), "policyskip train", "") for kind in ("there", "here"))
    for run in (there, here):
        assert not learn("blockdrop", run, stop_at=4)
    monkeypatch.setattr("tests.learners.DEVICE", gpu)
    assert learn("blockdrop", there, resume=True)
    monkeypatch.setattr("tests.learners.DEVICE", torch.device("cpu"))
    assert learn("blockdrop", here, resume=True)
    for one, other in zip(records(there), records(here), strict=True):
        assert one.keys() == other.keys()
        assert one.get("train/loss", 0.0) == pytest.approx(other.get("train/loss", 0.0), abs=0.1)


def test_what_goes_wrong_is_noticed_before_anything_is_saved(gpu, learners_there, tmp_path):
    """On a GPU figures are read after update 6, as log_every is 2."""

    def spoil(learner: Any, source: Any, number: int) -> None:
        if number == 5:
            learner.policy.keep_head.bias.data.fill_(torch.nan)

    run = create(str(tmp_path / "run"), "policyskip train", "")
    expected = r"its logits held numbers that are not finite in update 5, as was found after update 6; .*, of update 3"
    with pytest.raises(UserError, match=expected):
        learn("blockdrop", run, spoil=spoil)
    assert run.load_checkpoint()["step"] == 3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs")
def test_two_gpus_come_to_the_weights_of_one(gpu, learners_there, tmp_path, monkeypatch):
    from tests.parallel.test_processes import close, learned, together

    monkeypatch.setenv("POLICYSKIP_TEST_DEVICE", "cuda")
    names = ["blockdrop", "pretrain"]
    result = together("tests.divided", str(tmp_path), *names, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for name in names:
        one = create(str(tmp_path / f"{name} by one"), "policyskip train", "")
        assert learn(name, one) and close(learned(one), learned(Run(tmp_path / name)), 1e-2)


@pytest.mark.skipif(os.name != "posix", reason="torchrun")
def test_more_processes_than_gpus_are_refused_in_one_line(gpu, tmp_path, monkeypatch):
    from tests.parallel.test_processes import ours, together

    count = torch.cuda.device_count() + 1
    words = ["policyskip", "train", "+experiment=debug", "device=cuda", "data.batch_size=60"]
    if count > 3:
        pytest.skip("there are many GPUs")
    result = together(*words, cwd=tmp_path, processes=count)
    assert result.returncode and len(ours(result.stderr)) == 1, result.stderr
    assert f"device cuda:{count - 1} is not there" in ours(result.stderr)[0]
