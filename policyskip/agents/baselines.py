"""Four baselines for REINFORCE: numbers that are subtracted from a decision's reward.

The gradient of E[R] is E[(R − b) ∇log π(u)] for every b that does not depend on u (Williams 1992), so none of the four
changes what is learned in expectation. They change its variance: docs/variance.md.

Shapes: B images, S sampled decisions for each image, D features.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Baseline = Literal["greedy", "leave_one_out", "value", "none"]


def greedy_advantage(reward_SB: Tensor, greedy_B: Tensor) -> Tensor:
    """Compute ``A_s = R(u_s) − R(ũ)``, ũ the image's greedy decision.

    Sources: Rennie et al. 2017 (self-critical), Wu et al. 2018.

    Args:
        reward_SB: float (S, B), of each sampled decision.
        greedy_B: float (B,), of the greedy decision.

    Returns: float (S, B).

    Raises:
        ValueError: another shape.
    """
    if reward_SB.dim() != 2 or greedy_B.shape != reward_SB.shape[1:]:
        raise ValueError(f"expected rewards (S, B) and (B,), got {tuple(reward_SB.shape)} and {tuple(greedy_B.shape)}")
    return reward_SB - greedy_B


def leave_one_out_advantage(reward_SB: Tensor) -> Tensor:
    """Compute ``A_s = R_s − 1/(S−1) Σ_{j≠s} R_j`` (Kool et al. 2019; RLOO): a sample's own reward is not in its
    baseline.

    Args:
        reward_SB: float (S, B) with S of at least 2.

    Returns: float (S, B); its sum over S is 0.

    Raises:
        ValueError: another rank, or a single sample.
    """
    if reward_SB.dim() != 2 or len(reward_SB) < 2:
        raise ValueError(f"expected rewards (S, B) with S of at least 2, got {tuple(reward_SB.shape)}")
    return reward_SB - (reward_SB.sum(0) - reward_SB) / (len(reward_SB) - 1)


def value_advantage(reward_SB: Tensor, value_B: Tensor) -> Tensor:
    """Compute ``A_s = R_s − V(x)``, V(x) the reward expected of the image before a decision is drawn (Williams 1992).

    Args:
        reward_SB: float (S, B).
        value_B: float (B,), V(x); no gradient flows into it.

    Returns: float (S, B).

    Raises:
        ValueError: another shape.
    """
    if reward_SB.dim() != 2 or value_B.shape != reward_SB.shape[1:]:
        raise ValueError(
            f"expected rewards (S, B) and values (B,), got {tuple(reward_SB.shape)}, {tuple(value_B.shape)}"
        )
    return reward_SB - value_B.detach()


def value_loss(value_B: Tensor, reward_SB: Tensor) -> Tensor:
    """Compute ``(V(x) − R_s)²``, mean over decisions and images: V(x) at its minimum is the expected reward.

    Args:
        value_B: float (B,), V(x).
        reward_SB: float (S, B); no gradient flows into it.

    Returns: a scalar.

    Raises:
        ValueError: another shape.
    """
    if reward_SB.dim() != 2 or value_B.shape != reward_SB.shape[1:]:
        raise ValueError(
            f"expected values (B,) and rewards (S, B), got {tuple(value_B.shape)}, {tuple(reward_SB.shape)}"
        )
    return (value_B - reward_SB.detach()).square().mean()


class ValueHead(nn.Module):
    """A head that computes ``V(x)`` by one linear layer on the policy's features. Its weights start at 0.

    No gradient flows from the head into the features. It is not deployed, and is no part of a decision's cost.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight_D = nn.Parameter(torch.zeros(features))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, features_BD: Tensor) -> Tensor:
        """Return V(x), float (B,), of features float (B, D)."""
        return features_BD.detach() @ self.weight_D + self.bias
