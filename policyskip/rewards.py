"""Rewards: small pure callables from what came of an action to what it is worth.

A reward is any callable ``(Outcome) -> float tensor (B,)``. To use your own, put a class in a file
of the current folder and say ``reward._target_=my_rewards.Mine``; nothing here needs to change.

Shapes: B decisions (one for each image, or S for each image laid end to end), K blocks, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from policyskip.errors import UserError


@dataclass(frozen=True)
class Outcome:
    """What came of B decisions.

    Attributes:
        logits_BC: float (B, C), the network's answer with only the kept blocks run.
        label_B: int64 (B,), the truth.
        correct_B: bool (B,), whether the top class is the label.
        keep_BK: bool (B, K), the blocks that ran.
        macs_B: float64 (B,), multiply-accumulates the network spent (a policy's own cost is not in it).
        full_macs: multiply-accumulates of the whole network.
    """

    logits_BC: Tensor
    label_B: Tensor
    correct_B: Tensor
    keep_BK: Tensor
    macs_B: Tensor
    full_macs: float

    @property
    def kept_fraction_B(self) -> Tensor:
        """Share of the K blocks that ran, float32 (B,) in [0, 1]."""
        return self.keep_BK.float().mean(1)

    @property
    def macs_fraction_B(self) -> Tensor:
        """Share of the whole network's MACs that was spent, float32 (B,) in [0, 1]."""
        return (self.macs_B / self.full_macs).float()


Reward = Callable[[Outcome], Tensor]


@dataclass(frozen=True)
class Utilization:
    """BlockDrop's reward (Wu et al. 2018): ``1 - (|u|/K)²`` when correct, ``-penalty`` when not."""

    penalty: float = 1.0

    def __call__(self, outcome: Outcome) -> Tensor:
        used = outcome.kept_fraction_B
        return torch.where(outcome.correct_B, 1 - used**2, torch.full_like(used, -self.penalty))


@dataclass(frozen=True)
class Macs:
    """Utilization with the share of MACs spent in place of the share of blocks."""

    penalty: float = 1.0

    def __call__(self, outcome: Outcome) -> Tensor:
        used = outcome.macs_fraction_B
        return torch.where(outcome.correct_B, 1 - used**2, torch.full_like(used, -self.penalty))


@dataclass(frozen=True)
class Linear:
    """Minus the cross-entropy (nats), minus ``weight`` times the share of MACs spent: SkipNet's trade-off."""

    weight: float = 0.5

    def __call__(self, outcome: Outcome) -> Tensor:
        loss = F.cross_entropy(outcome.logits_BC, outcome.label_B, reduction="none")
        return -loss - self.weight * outcome.macs_fraction_B


def reward_of(reward: Reward, outcome: Outcome) -> Tensor:
    """``reward(outcome)``, refused unless it is a finite float tensor (B,).

    Raises:
        UserError: naming the reward and what it returned.
    """
    name = getattr(reward, "__name__", type(reward).__name__)
    try:
        reward_B = reward(outcome)
    except Exception as error:
        raise UserError(f"the reward {name} raised {type(error).__name__}: {error}") from error
    expected = tuple(outcome.correct_B.shape)
    if not isinstance(reward_B, Tensor):
        raise UserError(
            f"the reward {name} must return a float tensor of shape {expected}, not {type(reward_B).__name__}"
        )
    if tuple(reward_B.shape) != expected or not reward_B.is_floating_point():
        found = f"{str(reward_B.dtype).removeprefix('torch.')} of shape {tuple(reward_B.shape)}"
        raise UserError(f"the reward {name} must return a float tensor of shape {expected}, not {found}")
    finite = torch.isfinite(reward_B)
    if not finite.all():
        bad = reward_B[~finite]
        raise UserError(f"the reward {name} returned {len(bad)} non-finite values of {len(reward_B)}, such as {bad[0]}")
    return reward_B.detach().float().to(outcome.keep_BK.device)
