"""Which task a configuration asks for, and whether its agent can act in its environment."""

from __future__ import annotations

import inspect
from typing import Any

from policyskip.build import Setup, class_of
from policyskip.config import Settings, group_of
from policyskip.errors import UserError
from policyskip.evaluation.decisions import Decisions
from policyskip.parallel import processes
from policyskip.parallel.data_parallel import Divisible
from policyskip.runs.folder import Run
from policyskip.tasks import blocks
from policyskip.tasks import exit_policy as leaving
from policyskip.tasks import gates as layers
from policyskip.tasks import thresholds as exits
from policyskip.tasks.base import Task, check_agent, environment_of, sets_thresholds


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
    if processes.world() > 1 and not (inspect.isclass(agent) and issubclass(agent, Divisible)):
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
