"""The contract of a policy: from an observation to a decision.

Shapes: B images, K blocks, C classes, H W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from policyskip.backbones import Backbone, sparse


class Policy(nn.Module, ABC):
    """From what is observed to decisions; what is deployed."""

    @abstractmethod
    def decide(self, observation: Tensor) -> Tensor:
        """The greedy decision for what the environment shows; for images uint8 (B, 3, H, W), bool (B, K)."""

    def run(
        self, backbone: Backbone, images: Tensor, break_even_K: Sequence[float] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Decide for images and classify them: logits (B, C) and which blocks ran, bool (B, K).

        ``break_even_K``: see :func:`~policyskip.backbones.execution.sparse`.
        """
        keep_BK = self.decide(images)
        return sparse(backbone, images, keep_BK, break_even_K), keep_BK

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """Plain arguments from which the policy can be built again."""
