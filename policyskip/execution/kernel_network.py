"""The base class of networks whose blocks run in Triton kernels.

Shapes: S decisions per image, B images, K blocks, M consecutive blocks, C channels or classes, H W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from policyskip.backbones.base import Backbone


class KernelNetwork(ABC):
    """A frozen, folded backbone whose blocks run in Triton kernels, where a skipped block is a branch that is not
    taken.

    Args:
        folded: made by :func:`policyskip.backbones.folding.folded`, on its device and in its precision.
        image_shape: of the images, (3, H, W).
        exact: whether products of float32 are computed in full float32, and not in TF32.
    """

    def __init__(self, folded: Backbone, image_shape: tuple[int, int, int], exact: bool = False) -> None:
        self.folded = folded
        self.image_shape = image_shape
        self.exact = exact

    @classmethod
    @abstractmethod
    def why_not(cls, folded: Backbone, image_shape: tuple[int, int, int]) -> str:
        """Return why a network cannot run so, as one clause; empty if it can."""

    def features(self, images: Tensor) -> Tensor:
        """Compute the features (B, C, H, W), channels last, that enter block 0."""
        return self.folded.features(images).contiguous(memory_format=torch.channels_last)

    @abstractmethod
    def advance(self, x: Tensor, keep_BM: Tensor, first: int) -> Tensor:
        """Compute the features after M blocks from features (B, C, H, W), channels last, that enter block ``first``."""

    def head(self, x: Tensor) -> Tensor:
        """Compute logits (B, C) from the last features."""
        logits: Tensor = self.folded.head(x)
        return logits

    def logits(self, images: Tensor, keep_SBK: Tensor) -> Tensor:
        """Compute logits (S, B, C) of S decisions for each image, bool (S, B, K)."""
        S, B, K = keep_SBK.shape
        x = self.features(images).repeat(S, 1, 1, 1).contiguous(memory_format=torch.channels_last)
        return self.head(self.advance(x, keep_SBK.reshape(S * B, K), 0)).unflatten(0, (S, B))
