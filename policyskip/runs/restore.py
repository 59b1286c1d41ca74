"""What a checkpoint holds is put back into a run here, and checked as far as torch itself does not check it.

A checkpoint that was damaged is found by its checksums. One that was written by somebody else can hold anything, and
torch accepts an optimizer's state of any shape: it would fail only in the first update.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from policyskip.files import damaged
from policyskip.finite import find_nonfinite
from policyskip.runs.archives import check_state
from policyskip.runs.schemas import is_number


@dataclass
class Progress:
    """Holds how far a run has come.

    Attributes:
        step: updates done.
        best: the highest validation score so far, by which weights were kept.
        seconds: seconds of training so far.
        window: figures of the updates since the last record of ``metrics.jsonl``.
    """

    step: int = 0
    best: float = float("-inf")
    seconds: float = 0.0
    window: list[dict[str, float]] = field(default_factory=list)


def restore(state: dict[str, Any], path: Path, learner: Any, source: Any, reward: Any) -> Progress:
    """Put a checkpoint's state into a learner, into what it learns from, and into a reward that adapts.

    Args:
        state: what ``training.train`` saved, read from ``path``.
        reward: an ``Adaptive`` reward; None if the reward does not change.

    Raises:
        UserError: a part of the state is missing, or does not fit what this run learns.
    """
    with damaged(path):
        check_state(state)
        window = [{key: float(value) for key, value in figures.items()} for figures in state["window"]]
        progress = Progress(state["step"], float(state["best"]), float(state["seconds"]), window)
        _restore_learner(learner, state["learner"])
        if reward is not None:
            reward.load_state_dict(state["reward"])
    source.seek(state["cursor"])
    return progress


def _restore_learner(learner: Any, state: dict[str, Any]) -> None:
    """Load a learner's state.

    Raises:
        ValueError: the learner could not go on from it. Other exceptions: those of ``load_state_dict``.
    """
    if (name := find_nonfinite(state)) is not None:
        raise ValueError(f"{name} holds numbers that are not finite")
    _check_numbers(learner.state_dict(), state, "")
    learner.load_state_dict(state)
    for attribute in vars(learner).values():
        if isinstance(attribute, Optimizer):
            _check_optimizer(attribute)
        elif isinstance(attribute, LRScheduler):
            _check_schedule(attribute)


def _check_numbers(own: Any, saved: Any, path: str) -> None:
    """Check that wherever a learner's own state has a finite number, a saved state has one too.

    Raises:
        ValueError: it has something else there, or nothing.
    """
    if type(own) in (int, float) and is_number(own):
        if not is_number(saved):
            raise ValueError(f"{path} is {saved!r:.80}, not a number")
    elif isinstance(own, dict) and isinstance(saved, dict):
        for key, value in own.items():
            _check_numbers(value, saved.get(key), f"{path}.{key}".removeprefix("."))
    elif isinstance(own, list | tuple) and isinstance(saved, list | tuple):
        for number, (value, stored) in enumerate(zip(own, saved)):
            _check_numbers(value, stored, f"{path}.{number}")


def _check_optimizer(optimizer: Optimizer) -> None:
    """Let a copy of an optimizer take a step on copies of its parameters, with gradients of zero.

    Raises:
        ValueError: its state has a number that is not finite.
        Exception: of any type, as the optimizer stumbles over its state; an optimizer that takes no such step without
            a state and with its default settings either is let pass.
    """
    numbers = [value for entry in optimizer.state.values() for value in entry.values() if type(value) in (int, float)]
    if not all(map(is_number, numbers)):
        raise ValueError("the optimizer's state has a number that is not finite")
    trial = copy.deepcopy(optimizer)
    for group in trial.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    try:
        trial.step()
    except Exception:
        trial.state.clear()
        for group in trial.param_groups:
            group.update(trial.defaults)
        if _takes_a_step(trial):
            raise


def _takes_a_step(optimizer: Optimizer) -> bool:
    """Return whether an optimizer takes a step without an exception."""
    try:
        optimizer.step()
    except Exception:
        return False
    return True


def _check_schedule(schedule: LRScheduler) -> None:
    """Check the numbers that a learning rate's schedule goes on from.

    Raises:
        ValueError: they are not numbers, or not one for each of the optimizer's groups.
    """
    rates = getattr(schedule, "base_lrs", [group["lr"] for group in schedule.optimizer.param_groups])
    if not isinstance(rates, list) or len(rates) != len(schedule.optimizer.param_groups):
        raise ValueError("the schedule of the learning rate has other groups than the optimizer")
    if type(schedule.last_epoch) is not int or schedule.last_epoch < 0 or not all(map(is_number, rates)):
        raise ValueError("the schedule of the learning rate holds something that is not a number")
