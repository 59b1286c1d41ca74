"""What a reward is compared with: four baselines for REINFORCE.

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
    """``A_s = R(u_s) − R(ũ)``, ũ the image's greedy decision (Rennie et al. 2017, self-critical; Wu et al. 2018).

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
    """``A_s = R_s − 1/(S−1) Σ_{j≠s} R_j`` (Kool et al. 2019; RLOO). A sample's own reward is not in its baseline.

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
    """``A_s = R_s − V(x)``, V(x) the reward expected of the image before a decision is drawn (Williams 1992).

    Args:
        reward_SB: float (S, B).
        value_B: float (B,); no gradient flows into it from here.

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
    """``(V(x) − R_s)²``, mean over decisions and images: what makes V(x) the expected reward.

    Args:
        value_B: float (B,).
        reward_SB: float (S, B), no gradient flows into it.

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
    """``V(x)``: one linear layer on the policy's features, which it does not change. It starts at 0.

    It belongs to the learner, not to the policy: nothing of it is deployed, and it costs no decision anything.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight_D = nn.Parameter(torch.zeros(features))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, features_BD: Tensor) -> Tensor:
        """Values float (B,) of features float (B, D)."""
        return features_BD.detach() @ self.weight_D + self.bias
