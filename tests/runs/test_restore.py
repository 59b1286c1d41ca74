"""A checkpoint whose content a run could not go on from is refused when it is read."""

from __future__ import annotations

import copy
import io
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from policyskip.agents.sb3 import PPO
from policyskip.envs.block_selection import BlockSelectionVectorEnv
from policyskip.errors import UserError
from policyskip.runs.folder import Run, create
from policyskip.runs.restore import restore
from tests.conftest import small_backbone, small_images, typed
from tests.dying import state_of
from tests.learners import learn
from tests.runs.test_stored_runs import STORED


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> dict[str, Run]:
    """Runs that stopped after the first of eight updates: one with Adam, one with SGD."""
    folder = tmp_path_factory.mktemp("stopped")
    runs = {name: create(str(folder / name), "policyskip train", "") for name in ("blockdrop", "pretrain")}
    for name, run in runs.items():
        assert not learn(name, run, stop_at=1)
    return runs


def moments(state: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's state of the first parameter."""
    return state["learner"]["optimizer"]["state"][0]


def group(state: dict[str, Any]) -> dict[str, Any]:
    return state["learner"]["optimizer"]["param_groups"][0]


WRONG: dict[str, tuple[str, Callable[[dict[str, Any]], None]]] = {
    "no window": ("blockdrop", lambda state: state.pop("window")),
    "a window of lists": ("blockdrop", lambda state: state.update(window=[[1.0]])),
    "a window of numbers by number": ("blockdrop", lambda state: state.update(window=[{1: 1.0}])),
    "a window without end": ("blockdrop", lambda state: state.update(window=[{}] * 10**5)),
    "a window of giants": ("blockdrop", lambda state: state.update(window=[{"loss": 10**400}])),
    "updates before the first": ("blockdrop", lambda state: state.update(step=-5)),
    "updates that take for ever": ("blockdrop", lambda state: state.update(step=-10**9)),
    "a whole number that is a truth": ("blockdrop", lambda state: state.update(step=True)),
    "updates without end": ("blockdrop", lambda state: state.update(step=10**30)),
    "seconds that are no number": ("blockdrop", lambda state: state.update(seconds=float("nan"))),
    "seconds before the start": ("blockdrop", lambda state: state.update(seconds=-1)),
    "a score that is no number": ("blockdrop", lambda state: state.update(best=float("nan"))),
    "a score that nothing beats": ("blockdrop", lambda state: state.update(best=float("inf"))),
    "a window of words": ("blockdrop", lambda state: state.update(window=[{"loss": "low"}])),
    "no score": ("blockdrop", lambda state: state.update(best="good")),
    "a batch before the first": ("blockdrop", lambda state: state.update(cursor=-1)),
    "a batch beyond all": ("blockdrop", lambda state: state.update(cursor=2**70)),
    "a step in words": ("blockdrop", lambda state: state["learner"].update(step="one")),
    "no step": ("blockdrop", lambda state: state["learner"].pop("step")),
    "no policy": ("blockdrop", lambda state: state["learner"].pop("policy")),
    "weights that are not finite": ("pretrain", lambda s: s["learner"]["backbone"]["blocks.0.residual.bn1.bias"].fill_(float("nan"))),
    "moments that are not finite": ("blockdrop", lambda state: moments(state)["exp_avg"].fill_(float("inf"))),
    "moments of another shape": ("blockdrop", lambda state: moments(state).update(exp_avg=torch.zeros(2, 2))),
    "moments in words": ("blockdrop", lambda state: moments(state).update(exp_avg="large")),
    "no second moments": ("blockdrop", lambda state: moments(state).pop("exp_avg_sq")),
    "momentum of another shape": ("pretrain", lambda state: moments(state).update(momentum_buffer=torch.zeros(3))),
    "a learning rate in words": ("blockdrop", lambda state: group(state).update(lr="fast")),
    "a learning rate that is no number": ("blockdrop", lambda state: group(state).update(lr=float("nan"))),
    "a weight decay without end": ("pretrain", lambda state: group(state).update(weight_decay=float("inf"))),
    "a schedule that is no number": ("pretrain", lambda state: state["learner"]["schedule"].update(base_lrs=[float("nan")])),
    "a schedule before the first step": ("pretrain", lambda state: state["learner"]["schedule"].update(last_epoch=-10**9)),
    "betas in words": ("blockdrop", lambda state: group(state).update(betas=("a", "b"))),
    "a schedule at no step": ("pretrain", lambda state: state["learner"]["schedule"].update(last_epoch="first")),
    "a schedule of words": ("pretrain", lambda state: state["learner"]["schedule"].update(base_lrs=["fast"])),
    "a schedule of more groups": ("pretrain", lambda state: state["learner"]["schedule"].update(base_lrs=[0.1, 0.1])),
    "a generator of another kind": ("blockdrop", lambda state: state["learner"].update(generator=torch.zeros(3))),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_no_run_could_go_on_from_is_refused(stopped, what, monkeypatch):
    name, spoil = WRONG[what]
    run = stopped[name]
    before = {path: path.read_bytes() for path in run.folder.iterdir()}
    state = run.load_checkpoint()
    spoil(state)
    monkeypatch.setattr(Run, "load_checkpoint", lambda self: state)
    with pytest.raises(UserError, match=r"checkpoint\.pt is damaged or not ours: ") as refused:
        learn(name, run, resume=True)
    assert len(str(refused.value).splitlines()) == 1
    assert {path: path.read_bytes() for path in run.folder.iterdir()} == before


def ppo() -> tuple[PPO, BlockSelectionVectorEnv]:
    env = BlockSelectionVectorEnv(16, backbone=small_backbone(), images=small_images(), seed=0)
    return PPO(env, 4, net_arch=[8], channels=[4], batch_size=16), env


@pytest.mark.parametrize("what", ["moments", "randomness", "numpy's generator", "means", "steps"])
def test_a_state_of_sb3_s_learner_is_checked_too(what, tmp_path):
    agent, env = ppo()
    agent.update(env)
    state = copy.deepcopy({"step": 1, "best": 0.0, "seconds": 1.0, "window": [], "cursor": env.cursor})
    state["learner"] = copy.deepcopy(agent.state_dict())
    fresh, other = ppo()
    assert restore(state, tmp_path / "checkpoint.pt", fresh, other, None).step == 1
    changes: dict[str, Callable[[dict[str, Any]], None]] = {
        "moments": lambda learner: learner["optimizer"]["state"][0].update(exp_avg=torch.zeros(7)),
        "randomness": lambda learner: learner.update(randomness={}),
        "numpy's generator": lambda learner: learner["randomness"].update(numpy=[torch.zeros(3), 1, 0, 0.0]),
        "means": lambda learner: learner.update(means={"reward": "high"}),
        "steps": lambda learner: learner.update(timesteps="many"),
    }
    changes[what](state["learner"])
    with pytest.raises(UserError, match=r"checkpoint\.pt is damaged or not ours: "):
        restore(state, tmp_path / "checkpoint.pt", *ppo(), None)


def test_a_restored_optimizer_is_left_as_it_was_saved(stopped):
    run = stopped["blockdrop"]
    states = []
    learn(
        "blockdrop",
        run,
        resume=True,
        stop_at=2,
        spoil=lambda learner, *_: states.append(copy.deepcopy(learner.state_dict())),
    )
    ours, saved = states[0]["optimizer"]["state"], run.load_checkpoint()
    assert saved["step"] == 2 and all(float(entry["step"]) == 1 for entry in ours.values())


def test_an_optimizer_that_takes_no_step_without_more_is_let_pass(stopped, tmp_path):
    class Demanding(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise RuntimeError("a closure is needed")

    class Learner:
        def __init__(self) -> None:
            self.optimizer = Demanding([torch.nn.Parameter(torch.zeros(2))], lr=0.1)

        def state_dict(self) -> dict[str, Any]:
            return {"optimizer": self.optimizer.state_dict()}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.optimizer.load_state_dict(state["optimizer"])

    class Source:
        cursor = 0

        def seek(self, cursor: int) -> None:
            self.cursor = cursor

    learner, source = Learner(), Source()
    state = {"step": 3, "best": 0.5, "seconds": 2, "window": [], "cursor": 4, "learner": learner.state_dict()}
    assert restore(state, tmp_path / "checkpoint.pt", learner, source, None).step == 3 and source.cursor == 4


# Files that are not what they seem


def nested(depth: int) -> list[Any]:
    """A list that is 2 to the ``depth`` lists when all of it is walked, and a few bytes in a file."""
    inner: list[Any] = []
    for _ in range(depth):
        inner = [inner, inner]
    return inner


def deep(depth: int) -> list[Any]:
    inner: list[Any] = []
    for _ in range(depth):
        inner = [inner]
    return inner


ODD: dict[str, Callable[[], Any]] = {
    "a tensor of which a file has one number": lambda: torch.ones(1).expand(10**6, 10**6),
    "a tensor on no device": lambda: torch.empty(10**9, device="meta"),
    "a sparse tensor": lambda: torch.eye(2).to_sparse(),
    "a tree that repeats itself": lambda: nested(40),
    "a deep tree": lambda: deep(100),
    "a giant number": lambda: 10**50,
    "a set": lambda: torch.Size([1]) and frozenset(),
}


@pytest.mark.parametrize("what", ODD)
def test_values_that_no_state_has_are_refused(what, tmp_path):
    run = create(str(tmp_path / "x"), "policyskip train", "")
    run.save_checkpoint({"step": 1, "seconds": 1.0, "cursor": 1, "learner": {"a": {"b": ODD[what]()}}})
    with pytest.raises(UserError, match=r"checkpoint\.pt is damaged or not ours: ") as refused:
        run.load_checkpoint()
    assert len(str(refused.value).splitlines()) == 1


def test_values_that_states_of_one_s_own_have_are_read(tmp_path):
    learner = {"random": np.random.default_rng(0).bit_generator.state, "never": float("inf")}
    state = {"step": 1, "seconds": 1.0, "cursor": 1, "learner": learner, "window": [{"a": float("inf"), "b": 1e30}]}
    run = create(str(tmp_path / "x"), "policyskip train", "")
    run.save_checkpoint(state)
    assert run.load_checkpoint() == state


@pytest.mark.parametrize("what", ["packed", "repeated", "sound"])
def test_an_archive_that_would_grow_is_refused_before_it_is_read(what, tmp_path, monkeypatch):
    """64 MB of zeros that are packed into 64 KB, or parts of an archive that lie on top of each other."""
    run = create(str(tmp_path / "x"), "policyskip train", "")
    run.save_checkpoint({"step": 1, "seconds": 1.0, "cursor": 1, "learner": {"a": torch.zeros(2**14)}})
    content = (run.folder / "checkpoint.pt").read_bytes()
    archive, packed = zipfile.ZipFile(io.BytesIO(content)), io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED if what == "packed" else zipfile.ZIP_STORED) as new:
        for name in archive.namelist():
            new.writestr(name, archive.read(name) if not name.endswith("data/0") or what != "packed" else bytes(2**26))
        if what == "repeated":
            large = max(new.infolist(), key=lambda part: part.file_size)
            for number in range(1000):
                twin = copy.copy(large)
                twin.filename = f"{large.filename}{number}"
                new.filelist.append(twin)
    (run.folder / "checkpoint.pt").write_bytes(packed.getvalue())
    if what == "sound":
        assert run.load_checkpoint()["step"] == 1
        return
    monkeypatch.setattr(zipfile.ZipFile, "read", pytest.fail)
    monkeypatch.setattr(zipfile.ZipFile, "open", pytest.fail)
    with pytest.raises(UserError, match="its parts are larger than the file"):
        run.load_checkpoint()


@pytest.mark.parametrize("what", ["steps", "shapes", "best", "rates"])
def test_nothing_of_a_folder_changes_before_all_of_it_was_checked(what, tmp_path):
    """Neither its configuration, nor its records, and W&B does not begin."""
    folder = Path(shutil.copytree(STORED / "branchynet-half", tmp_path / "x"))
    run = Run(folder)
    state = run.load_checkpoint()
    spoil: dict[str, Callable[[], object]] = {
        "steps": lambda: state.update(step=-5),
        "shapes": lambda: moments(state).update(exp_avg=torch.zeros(3)),
        "best": lambda: state.update(best=0.5),
        "rates": lambda: group(state).update(lr="fast"),
    }
    spoil[what]()
    torch.save(state, folder / "checkpoint.pt")
    if what == "best":
        (folder / "best.safetensors").write_bytes((STORED / "blockdrop/best.safetensors").read_bytes())
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99}\n')
    before = state_of(folder)
    result = typed("train", "run.resume=x", "train.steps=9", "tracking.mode=offline", cwd=tmp_path)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert state_of(folder) == before
