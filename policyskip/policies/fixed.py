"""Policies that do not look at the image: one set of blocks for all, or a random set for each.

Shapes: B images, K blocks, H W pixels, P numbers in an image (3·H·W).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from policyskip.errors import UserError
from policyskip.policies.base import Policy


class FixedPolicy(Policy):
    """The same blocks for every image: ``keep_K``, bool (K,)."""

    keep_K: Tensor

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.register_buffer("keep_K", torch.ones(num_blocks, dtype=torch.bool))

    def decide(self, images: Tensor) -> Tensor:
        return self.keep_K.repeat(len(images), 1)

    def spec(self) -> dict[str, Any]:
        return {"num_blocks": len(self.keep_K)}


class RandomPolicy(Policy):
    """For each image its own random set of ``blocks`` blocks (int64, a scalar).

    The draw is a hash of the image's pixels and the seed: the same image gets the same set, in whatever batch and on
    whatever device it comes, so a run's figures can be repeated and a deployed policy does what was judged.
    """

    blocks: Tensor

    def __init__(self, num_blocks: int, seed: int) -> None:
        super().__init__()
        self.num_blocks, self.seed = num_blocks, seed
        self.register_buffer("blocks", torch.tensor(num_blocks))

    def decide(self, images: Tensor) -> Tensor:
        rank_BK = image_hashes(images, self.num_blocks, self.seed).argsort(1).argsort(1)
        return rank_BK < self.blocks

    def spec(self) -> dict[str, Any]:
        return {"num_blocks": self.num_blocks, "seed": self.seed}


def image_hashes(images: Tensor, count: int, seed: int) -> Tensor:
    """``count`` numbers for each image that look random, and depend on its pixels and the seed alone.

    Args:
        images: uint8 (B, 3, H, W).

    Returns: int64 (B, count). Integer sums wrap around and do not depend on their order, so every device agrees.
    """
    generator = torch.Generator().manual_seed(seed)
    factor_P = torch.randint(-(2**62), 2**62, (images.shape[1:].numel(),), generator=generator)
    factor_K, offset_K = torch.randint(-(2**62), 2**62, (2, count), generator=generator).to(images.device)
    code_B = (images.flatten(1).long() * factor_P.to(images.device)).sum(1)
    code_BK = (code_B.unsqueeze(1) + offset_K) * (2 * factor_K + 1)
    for _ in range(2):  # the high half of a product depends on all of its factors; fold it into the low one
        code_BK = (code_BK ^ (code_BK >> 32)) * (2 * factor_K + 1)
    return code_BK


class OraclePolicy(Policy):
    """Holds the place of a policy; there is none that does without the label."""

    def decide(self, images: Tensor) -> Tensor:
        raise UserError("the oracle sees the label, so it cannot decide from images alone")

    def spec(self) -> dict[str, Any]:
        return {}
