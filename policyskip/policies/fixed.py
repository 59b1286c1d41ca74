"""Policies that ignore what an image shows: they keep one set of blocks for all images, or a random set for each.

Shapes: B images, K blocks, H W pixels, P numbers in an image (3·H·W).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from policyskip.errors import UserError
from policyskip.policies.base import Policy


class FixedPolicy(Policy):
    """A policy that keeps the same blocks for every image.

    Attributes:
        keep_K: bool (K,), the keep-set; every block in a fresh policy.
    """

    keep_K: Tensor

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.register_buffer("keep_K", torch.ones(num_blocks, dtype=torch.bool))

    def decide(self, images: Tensor) -> Tensor:
        return self.keep_K.repeat(len(images), 1)

    def spec(self) -> dict[str, Any]:
        return {"num_blocks": len(self.keep_K)}


class RandomPolicy(Policy):
    """A policy that keeps a random set of blocks for each image.

    The set follows from a hash of the image's pixels and the seed. The same image gets the same set in every batch and
    on every device, so a run's figures can be repeated, and the deployed policy decides as the judged one did.

    Attributes:
        blocks: int64, a scalar: the number of blocks that are kept; K in a fresh policy.
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
    """Compute ``count`` numbers for each image that look random and depend only on its pixels and the seed.

    Integer sums wrap around and do not depend on their order, so all devices compute the same numbers.

    Args:
        images: uint8 (B, 3, H, W).

    Returns: int64 (B, count).
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
    """The stand-in for the oracle's policy, which does not exist: the oracle cannot decide without the label."""

    def decide(self, images: Tensor) -> Tensor:
        """Refuse to decide about images.

        Raises:
            UserError: always.
        """
        raise UserError("the oracle sees the label, so it cannot decide from images alone")

    def spec(self) -> dict[str, Any]:
        return {}
