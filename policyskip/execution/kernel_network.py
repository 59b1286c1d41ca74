"""The base class of networks that run in Triton kernels, where a skipped block is a branch that is not taken.

Shapes: B images, K blocks, M of them in a row, S decisions per image, C classes or channels, H W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from policyskip.backbones.base import Backbone


class KernelNetwork(ABC):
    """A frozen, folded backbone whose blocks run in Triton kernels; a skipped block is a branch that is not taken.

    Args:
        folded: made by ``backbones.folding.folded``, already on its device and in its precision (float32, bfloat16,
            float16).
        image_shape: (3, H, W).
        exact: whether products of float32 are computed in full float32, and not in TF32.
    """

    def __init__(self, folded: Backbone, image_shape: tuple[int, int, int], exact: bool = False) -> None:
        self.folded, self.image_shape, self.exact = folded, image_shape, exact

    @classmethod
    @abstractmethod
    def why_not(cls, folded: Backbone, image_shape: tuple[int, int, int]) -> str:
        """Say in one plain clause why this network cannot run so; empty if it can."""

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Compute the features (B, C, H, W) that enter block 0, channels last, of images (B, 3, H, W)."""

    @abstractmethod
    def advance(self, x: Tensor, keep_BM: Tensor, first: int) -> Tensor:
        """Run blocks first … first + M - 1 on features x (B, C, H, W), channels last, which may be overwritten.

        Row i of the result depends on row i alone, to the bit, and nothing asks the host.
        """

    @abstractmethod
    def head(self, x: Tensor) -> Tensor:
        """Compute logits (B, C) of the last block's features, in the network's precision."""

    def logits(self, images: Tensor, keep_SBK: Tensor) -> Tensor:
        """Compute logits (S, B, C) of S decisions for each image, bool (S, B, K)."""
        S, B, K = keep_SBK.shape
        x = self.features(images).repeat(S, 1, 1, 1).contiguous(memory_format=torch.channels_last)
        return self.head(self.advance(x, keep_SBK.reshape(S * B, K), 0)).view(S, B, -1)
