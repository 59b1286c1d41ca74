"""The contract of an agent: a policy and the way it learns.

Shapes: B images, K blocks, H W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from policyskip.envs.block_selection import BlockSelectionVectorEnv


class Policy(nn.Module, ABC):
    """From images to decisions; what is deployed."""

    @abstractmethod
    def decide(self, images: Tensor) -> Tensor:
        """The greedy decision, bool (B, K), for images uint8 (B, 3, H, W)."""

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """Plain arguments from which the policy can be built again."""


class Agent(ABC):
    """A policy that learns.

    Attributes:
        policy: what decides, and what is deployed.
        decision_macs: MACs that one decision costs.
        sees_the_label: whether it decides with the label in view: an oracle, which is no policy to deploy.
    """

    policy: Policy
    decision_macs: float
    sees_the_label = False

    @property
    def name(self) -> str:
        """What it is called in summaries."""
        return type(self).__name__.lower()

    @abstractmethod
    def update(self, env: BlockSelectionVectorEnv) -> dict[str, float]:
        """One learning step on the images that the environment shows; the one place with ``backward()``."""

    @abstractmethod
    def act(self, observation: Tensor) -> Tensor:
        """The greedy action (B, …) for an observation (B, …); no gradient, evaluation mode."""

    def decide(self, env: BlockSelectionVectorEnv) -> Tensor:
        """The greedy action (B, …) for what an environment shows: that of :meth:`act`, but for an oracle."""
        return self.act(env.observation)

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on learning: tensors, numbers, strings, lists and dicts only."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
