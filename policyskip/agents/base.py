"""The contract of an agent: a policy and the way it learns.

Shapes: B images, K blocks, C classes, H W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from policyskip.policies.base import Policy


class Agent(ABC):
    """A policy that learns.

    Attributes:
        environments: those it can act in, by the names of ``env=``.
        policy: what decides, and what is deployed.
        decision_macs: MACs that one decision costs.
        sees_the_label: whether it decides with the label in view: an oracle, which is no policy to deploy.
    """

    environments: ClassVar[tuple[str, ...]] = ("block_selection",)
    policy: Policy
    decision_macs: float
    sees_the_label = False

    @property
    def name(self) -> str:
        """What it is called in summaries."""
        return type(self).__name__.lower()

    @abstractmethod
    def update(self, env: Any) -> dict[str, float]:
        """One learning step on the images that the environment shows; the one place with ``backward()``."""

    @abstractmethod
    def act(self, observation: Tensor) -> Tensor:
        """The greedy action (B, …) for an observation (B, …); no gradient, evaluation mode."""

    def decide(self, env: Any) -> Tensor:
        """The greedy action (B, …) for what an environment shows: that of :meth:`act`, but for an oracle."""
        return self.act(env.observation)

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on learning: tensors, numbers, strings, lists and dicts only."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
