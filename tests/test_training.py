"""Runs repeat, stop, go on and are kept whole."""

from __future__ import annotations

import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch

from policyskip.agents.blockdrop import BlockDrop
from policyskip.envs.block_selection import BlockSelectionVectorEnv
from policyskip.errors import UserError
from policyskip.evaluation.evaluate import evaluate
from policyskip.evaluation.figures import block_figures
from policyskip.files import write
from policyskip.runs.folder import Run, create, open_run
from policyskip.runs.tracking import Tracker
from policyskip.training import train
from tests.conftest import small_backbone, small_images


def learn(run: Run, steps: int = 8, stop_at: int | None = None, resume: bool = False, seed: int = 0) -> bool:
    """A small run; ``stop_at`` sends this process a Ctrl-C during that update."""
    backbone = small_backbone()
    env = BlockSelectionVectorEnv(16, backbone=backbone, images=small_images(), seed=seed)
    validation = BlockSelectionVectorEnv(16, backbone=backbone, images=small_images(20, seed=1), order="sequential")
    agent = BlockDrop(env, steps, seed=seed, width=4, samples=2)
    update = agent.update

    def update_and_perhaps_stop(env):
        if agent.step + 1 == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return update(env)

    agent.update = update_and_perhaps_stop
    return train(
        agent,
        env,
        lambda: block_figures(evaluate(agent, validation, full=False)),
        agent.policy.state_dict,
        run,
        Tracker(run, "none", {}),
        steps=steps,
        validate_every=3,
        log_every=2,
        resume=resume,
    )


def without_times(run: Run) -> list[dict]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in run.metrics()]


def final_weights(run: Run) -> dict[str, torch.Tensor]:
    return run.load_checkpoint()["learner"]["policy"]


def test_two_runs_with_one_seed_are_equal(tmp_path):
    runs = [create(str(tmp_path / name), "policyskip train", "") for name in ("a", "b", "c")]
    for run, seed in zip(runs, (0, 0, 1), strict=True):
        torch.rand(7)  # the state of torch's own generator has no say
        assert learn(run, seed=seed)
    a, b, c = (without_times(run) for run in runs)
    assert a == b != c
    assert (runs[0].folder / "best.safetensors").read_bytes() == (runs[1].folder / "best.safetensors").read_bytes()


@pytest.mark.parametrize("stop_at", [1, 4, 6])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(stop_at, tmp_path):
    whole, halved = (
        create(str(tmp_path / "whole"), "policyskip train", ""),
        create(str(tmp_path / "halved"), "policyskip train", ""),
    )
    assert learn(whole)
    assert not learn(halved, stop_at=stop_at)
    assert halved.load_checkpoint()["step"] == stop_at
    assert learn(halved, resume=True)
    assert without_times(halved) == without_times(whole)
    for name, value in final_weights(whole).items():
        assert torch.equal(value, final_weights(halved)[name])


def test_records_after_the_checkpoint_are_forgotten_on_resume(tmp_path):
    run = create(str(tmp_path / "run"), "policyskip train", "")
    assert not learn(run, stop_at=4)
    run.append_metrics({"step": 6, "train/reward": 99.0})
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "train/rew')  # as a kill leaves it
    assert learn(run, resume=True)
    steps = [record["step"] for record in run.metrics()]
    assert steps == sorted(steps) and 99.0 not in [r.get("train/reward") for r in run.metrics()]


def test_the_best_weights_are_those_of_the_best_validation_reward(tmp_path):
    run = create(str(tmp_path / "run"), "policyskip train", "")
    learn(run)
    rewards = [record["val/reward"] for record in run.metrics() if "val/reward" in record]
    assert run.load_checkpoint()["best"] == max(rewards)
    agent, validation = judges()
    agent.policy.load_state_dict(run.load_best())
    assert block_figures(evaluate(agent, validation, full=False))["reward"] == max(rewards)


def judges() -> tuple[BlockDrop, BlockSelectionVectorEnv]:
    """A fresh agent like that of :func:`learn`, and its validation environment."""
    env = BlockSelectionVectorEnv(16, backbone=small_backbone(), images=small_images(20, seed=1), order="sequential")
    return BlockDrop(env, 8, width=4, samples=2), env


def test_a_full_disk_stops_the_run_with_what_it_saved(tmp_path, monkeypatch):
    run = create(str(tmp_path / "run"), "policyskip train", "")
    assert not learn(run, stop_at=4)
    before = (run.folder / "checkpoint.pt").read_bytes()

    def full_disk(self, *arguments, **keywords):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"cannot write .*metrics.jsonl: No space left"):
        patch.setattr(type(tmp_path), "open", full_disk)
        run.append_metrics({"step": 5})
    assert (run.folder / "checkpoint.pt").read_bytes() == before


def test_ctrl_c_is_ours_only_while_training(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    learn(create(str(tmp_path / "run"), "policyskip train", ""), stop_at=2)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("wrong", ["steps", "validate_every", "log_every"])
def test_schedules_below_one_are_refused(wrong, tmp_path):
    numbers = {"steps": 1, "validate_every": 1, "log_every": 1, wrong: 0}
    with pytest.raises(UserError, match=f"train.{wrong}"):
        train(None, None, None, None, None, None, **numbers)


def test_a_used_folder_is_left_alone(tmp_path):
    first = create(str(tmp_path / "run"), "policyskip train", "a: 1\n")
    second = create(str(tmp_path / "run"), "policyskip train", "a: 2\n")
    assert (first.name, second.name) == ("run", "run-2")
    assert (first.folder / "config.yaml").read_text() == "# policyskip train\na: 1\n"
    assert first.command == "policyskip train"


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write(path, b"old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match=r"cannot write .*file: No space left on device"):
        write(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        open_run(str(tmp_path))
    with pytest.raises(UserError, match="does not exist"):
        open_run(str(tmp_path / "nothing"))


def test_damaged_files_are_named(tmp_path):
    run = create(str(tmp_path / "run"), "policyskip train", "")
    with pytest.raises(UserError, match="there is no"):
        run.load_checkpoint()
    for name, load in (("checkpoint.pt", run.load_checkpoint), ("best.safetensors", run.load_best)):
        (run.folder / name).write_bytes(b"\x80\x04 not a file of ours")
        with pytest.raises(UserError, match=f"{name} is damaged"):
            load()
    (run.folder / "summary.json").write_text(json.dumps([1]))
    with pytest.raises(UserError, match="summary.json is damaged"):
        run.load_json("summary.json")


class Changing:
    """A learner whose figures change from update to update: the loss is 1, 3, 5 and 7, and odd updates have a ``reward``."""

    step = 0

    def update(self, source: SimpleNamespace) -> dict[str, float]:
        self.step += 1
        return {"loss": 2.0 * self.step - 1} | ({"reward": float(self.step)} if self.step % 2 else {})

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}


def test_only_figures_that_every_update_has_are_averaged(tmp_path):
    """Over two updates each, the loss is 2 and 6 on average; a mean of the rewards of some would be one of the others."""
    run, weight = create(str(tmp_path / "run"), "policyskip train", ""), {"weight": torch.zeros(1)}
    source, options = SimpleNamespace(cursor=0), {"steps": 4, "validate_every": 4, "log_every": 2}
    train(Changing(), source, lambda: {"reward": 0.0}, lambda: weight, run, Tracker(run, "none", {}), **options)
    records = [{k: v for k, v in record.items() if k.startswith("train/")} for record in run.metrics()]
    assert [record for record in records if record] == [{"train/loss": 2.0}, {"train/loss": 6.0}]
