"""What a run of ``policyskip train`` consists of, for each environment: learner, images, judgement, report."""

from __future__ import annotations

import inspect
from typing import Any, Protocol

from torch import Tensor

from policyskip import distributed
from policyskip.backbones import Network
from policyskip.config import Settings, Setup, class_of, group_of
from policyskip.decisions import Decisions
from policyskip.dividing import Divisible
from policyskip.errors import UserError
from policyskip.runs import Run
from policyskip.tasks import blocks, exits, layers, leaving
from policyskip.tasks.environments import check_agent, environment_of, sets_thresholds
from policyskip.tracking import Tracker


class Task(Protocol):
    """Everything that can be refused is refused when a task is made, before there is a run folder.

    Attributes:
        learner, source: what learns, and from what (see ``training.train``).
        choose_by: the validation figure by which the best weights are kept.
        names: agent, env, backbone and data, for the summary.
        greeting: what is said before training starts.
    """

    learner: Any
    source: Any
    choose_by: str
    names: dict[str, str]
    greeting: str

    @property
    def trains(self) -> Network | None:
        """The network, as it is before training, of a run that trains it; None where it is frozen."""
        ...

    def validate(self) -> dict[str, Any]:
        """Figures on the validation images."""
        ...

    def deployable(self) -> dict[str, Tensor]:
        """The tensors of which the best are kept."""
        ...

    def finish(self, run: Run, tracker: Tracker, seconds: float) -> dict[str, Any]:
        """Judge the best weights once on test, and write what is deployed, the summary and the pictures."""
        ...

    def show(self, summary: dict[str, Any]) -> None:
        """Print the summary as a table."""
        ...


def has_gates(config: dict[str, Any]) -> bool:
    """Whether a configuration's agent is SkipNet, which learns from labelled images and in no environment."""
    return str(group_of(config, "agent").get("_target_")).endswith(".SkipNet")


def learns(config: dict[str, Any]) -> bool:
    """Whether a configuration's agent has something to learn; fixed choices of blocks and the oracle have not."""
    module = str(group_of(config, "agent").get("_target_")).rpartition(".")[0]
    return module not in ("policyskip.agents.fixed", "policyskip.agents.oracle")


def start(setup: Setup, settings: Settings) -> Task:
    """The task of a ``train`` configuration."""
    steps = settings.train.steps
    if learns(setup.config) and not steps:
        raise UserError("train.steps must be at least 1, got 0")
    if steps and not learns(setup.config):
        raise UserError(f"this agent has nothing to learn, so train.steps must be 0, got {steps}")
    agent = class_of(setup.config, "agent", setup.trusted)
    if distributed.world() > 1 and not (inspect.isclass(agent) and issubclass(agent, Divisible)):
        raise UserError(f"the agent {agent.__name__} learns in one process; start it without torchrun")
    if has_gates(setup.config):
        if settings.front is None:
            raise UserError("the configuration has no front, and skipping blocks needs one")
        return layers.LayerTask(setup, settings.front)
    check_agent(setup)
    if sets_thresholds(setup):
        if settings.target is None:
            raise UserError("the configuration has no target, and leaving early needs one")
        return exits.ExitTask(setup, settings.target)
    if environment_of(setup) == "early_exit":
        if settings.target is not None and settings.target.given:
            raise UserError("target is for thresholds; a learned policy has none, and follows reward.penalty")
        return leaving.LeavingTask(setup)
    if settings.front is None:
        raise UserError("the configuration has no front, and skipping blocks needs one")
    return blocks.BlockTask(setup, settings.front)


def judge_again(setup: Setup, run: Run, split: str) -> dict[str, Any]:
    """A finished run's figures on a split, from its folder."""
    return _module_of(setup).again(setup, run, split)


def decide_again(setup: Setup, run: Run) -> Decisions:
    """A finished run's decisions on test images, from its folder."""
    return _module_of(setup).decide_again(setup, run)


def _module_of(setup: Setup) -> Any:
    if has_gates(setup.config):
        return layers
    if sets_thresholds(setup):
        return exits
    return leaving if environment_of(setup) == "early_exit" else blocks
