"""The contract of a task: everything that one run of ``policyskip train`` consists of.

There is one task for each family (``blocks``, ``gates``, ``thresholds``, ``exit_policy``), and one for ``pretrain``.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from policyskip.agents.base import Agent
from policyskip.backbones import Network
from policyskip.build import Setup
from policyskip.config import Settings
from policyskip.errors import UserError
from policyskip.evaluation.decisions import Decisions
from policyskip.runs.folder import Run
from policyskip.runs.tracking import Tracker
from policyskip.tasks.run_rivals import RunRival, save_run_rivals
from policyskip.training import ONE_IMAGE


class Task(ABC):
    """A task says what learns, from what, how it is judged, and what it leaves in the run folder.

    Everything that can be refused is refused when a task is made, before there is a run folder.

    Attributes:
        learner, source: what learns, and the environment or feed that it learns from (see ``training.train``).
        choose_by: the validation figure by which the best weights are kept.
        names: agent, env, backbone and data, for the summary.
        greeting: the lines that are printed before training starts.
    """

    choose_by: ClassVar[str] = "reward"
    learner: Any
    source: Any
    names: dict[str, str]
    greeting: str

    def keep_what_may_go(self, run: Run) -> None:  # noqa: B027 - most tasks have nothing of the kind
        """Write what the configuration names by folders that may be gone when the run is resumed into its folder."""

    @property
    @abstractmethod
    def trained_network(self) -> Network | None:
        """Return the network of the configuration if the run trains it, or a copy of it; None where it is frozen."""

    @abstractmethod
    def validate(self) -> dict[str, Any]:
        """Return figures on the validation images."""

    @abstractmethod
    def deployable(self) -> dict[str, Tensor]:
        """Return the tensors that are to be deployed, of which :func:`~policyskip.training.train` keeps the best."""

    @abstractmethod
    def finish(self, run: Run, tracker: Tracker, seconds: float) -> dict[str, Any]:
        """Judge the best weights once on test, write the finished run, and return its summary."""

    @abstractmethod
    def show(self, summary: dict[str, Any]) -> None:
        """Print the summary as a table."""


class FamilyTask(Task):
    """A task that belongs to one family of agents; a finished run of the family can be judged again from its folder.

    Args:
        setup: what the run's configuration names.
        settings: what was typed beside it.
        others: finished runs to compare with.
    """

    setup: Setup
    learner: Agent
    others: Sequence[RunRival]

    @property
    def trained_network(self) -> Network | None:
        network: Network = self.setup.backbone
        return network if self.learner.trains_network else None

    @abstractmethod
    def __init__(self, setup: Setup, settings: Settings, others: Sequence[RunRival]) -> None: ...

    def keep_what_may_go(self, run: Run) -> None:
        save_run_rivals(run, self.others, self.setup.data.test)

    @staticmethod
    @abstractmethod
    def judge(setup: Setup, run: Run, split: str, compared: bool) -> Judgement:
        """Judge a finished run's best weights, from its folder, on a split; beside its rivals if ``compared``."""


@dataclass(frozen=True)
class Judgement:
    """Holds what a policy did on a split: the record of its decisions, and the figures of policy and references."""

    decisions: Decisions
    figures: dict[str, Any]


def names_of(setup: Setup, agent: str, env: str) -> dict[str, str]:
    """Return the names that a summary begins with."""
    return {"agent": agent, "env": env, "backbone": setup.backbone.name, "data": setup.data.name}


def check_batch(network: nn.Module, images: Tensor) -> None:
    """Refuse a batch of images, uint8 (B, 3, H, W), that is too small for a network to learn from.

    Raises:
        UserError: there is one image, and batch normalisation needs two.
    """
    if len(images) > 1:
        return
    trial = copy.deepcopy(network).train()
    try:
        with torch.no_grad():
            trial(images)
    except ValueError as error:
        raise UserError(ONE_IMAGE) from error
