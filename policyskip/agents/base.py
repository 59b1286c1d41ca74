"""The contract that every agent keeps: its policy, how it learns, and what a run must know of it beforehand.

Shapes: B images.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from policyskip.parallel.deferred import Figure
from policyskip.policies.base import Policy


class Agent(ABC):
    """An agent is a policy and the way it learns.

    A subclass that learns defines :meth:`update`, :meth:`state_dict` and :meth:`load_state_dict`, and sets ``policy``
    and ``decision_macs`` in its ``__init__``. One without learning is a :class:`~policyskip.agents.fixed.FixedAgent`.
    The first five attributes are set on the class, because a run reads them before it makes the agent.

    Attributes:
        family: what is decided, and so how a run is judged and deployed: "blocks", "gates", "thresholds" or
            "exit_policy". None: the environment's family.
        learns: whether it takes updates; one that does not runs with ``train.steps=0``.
        trains_network: whether its updates change the network that classifies, so that the run's own weights of the
            network are deployed.
        environments: names (as in ``env=``) of the environments it can act in.
        sees_the_label: whether it decides with the label in view; such an agent, an oracle, cannot be deployed.
        policy: maps observations to decisions, and is what is deployed; the families gates and thresholds deploy their
            ``network``.
        decision_macs: MACs that one decision costs.
    """

    family: ClassVar[str | None] = None
    learns: ClassVar[bool] = True
    trains_network: ClassVar[bool] = False
    environments: ClassVar[tuple[str, ...]] = ("block_selection",)
    sees_the_label: ClassVar[bool] = False
    policy: Policy
    decision_macs: float

    @property
    def name(self) -> str:
        """Return the agent's name in summaries; by default its class's name in lower case."""
        return type(self).__name__.lower()

    @abstractmethod
    def update(self, source: Any) -> Mapping[str, Figure]:
        """Take one learning step on the images that ``source`` shows, and let it show the next ones.

        Args:
            source: what the run learns from: the environment, or a :class:`~policyskip.data.Feed` of labelled images
                for the families gates and thresholds.

        Returns: figures of this step by name, a dictionary; they are averaged and logged as ``train/<name>``. A figure
        may be a tensor of shape () that nobody changes any more, which the training loop brings over when it logs: an
        update that asks a GPU for nothing (no ``item()``) does not wait for it.
        :func:`~policyskip.parallel.deferred.figure` makes figures.
        """

    @torch.no_grad()
    def act(self, observation: Tensor) -> Tensor:
        """Decide greedily: the action (B, …) for an observation (B, …), without gradients, in evaluation mode."""
        return self.policy.eval().decide(observation)

    def decide(self, env: Any) -> Tensor:
        """Decide greedily for what an environment shows, (B, …): as :meth:`act`, except that an oracle sees the
        label."""
        return self.act(env.observation)

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to go on learning: tensors, numbers, strings, lists and dictionaries only."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
