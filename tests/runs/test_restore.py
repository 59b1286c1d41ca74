"""A checkpoint whose content a run could not go on from is refused when it is read."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from policyskip.agents.sb3 import PPO
from policyskip.envs.block_selection import BlockSelectionVectorEnv
from policyskip.errors import UserError
from policyskip.runs.folder import Run, create
from policyskip.runs.restore import restore
from tests.conftest import small_backbone, small_images
from tests.learners import learn


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
