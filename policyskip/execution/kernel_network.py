"""The contract of a network whose blocks run in Triton kernels, where a skipped block is a branch that is not taken.

Shapes: B images, S decisions for each image, K blocks, M of them in a row, C channels or classes, H W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from policyskip.backbones.base import Backbone

NO_GRADIENTS = "kernels give no gradients: call under torch.no_grad(), or say execution=gather or execution=dense"


class KernelNetwork(ABC):
    """A frozen, folded backbone whose blocks run in Triton kernels: a skipped block is a branch that is not taken.

    Args:
        folded: made by :func:`~policyskip.backbones.folding.folded`, on its device and in its precision (float32,
            bfloat16 or float16).
        image_shape: (3, H, W) of the images.
        exact: whether products of float32 are computed in full float32; otherwise in TF32 where the GPU has it.
    """

    def __init__(self, folded: Backbone, image_shape: tuple[int, int, int], exact: bool = False) -> None:
        self.folded, self.image_shape, self.exact = folded, image_shape, exact

    @classmethod
    @abstractmethod
    def why_not(cls, folded: Backbone, image_shape: tuple[int, int, int]) -> str:
        """Return in one clause why a network cannot run in these kernels; an empty text if it can."""

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Compute the features (B, C, H, W) that enter block 0, channels last, of images (B, 3, H, W), uint8 in 0..255
        or float in [0, 1]."""

    @abstractmethod
    def advance(self, x: Tensor, keep_BM: Tensor, first: int) -> Tensor:
        """Run the M blocks from ``first`` on, each for the images that keep it, and ask nothing of the host.

        A NaN in a skipped block's branch never reaches the output, and row i of the result depends on row i alone.

        Args:
            x: features (B, C, H, W) that enter the first of them, channels last; the caller's own, and overwritten.
            keep_BM: bool (B, M), on the device.

        Returns: the features (B, C, H, W) after them, channels last.
        """

    @abstractmethod
    def head(self, x: Tensor) -> Tensor:
        """Compute logits (B, C), in the network's dtype, from the features (B, C, H, W) after the last block."""

    @torch.no_grad()
    def logits(self, images: Tensor, keep_SBK: Tensor) -> Tensor:
        """Compute logits (S, B, C) of S decisions for each image, bool (S, B, K), one after the other in one batch."""
        S, B, _ = keep_SBK.shape
        x = self.features(images)
        if S > 1:  # by way of (B, H, W, C), so that the copies are channels last
            x = x.permute(0, 2, 3, 1).repeat(S, 1, 1, 1).permute(0, 3, 1, 2)
        return self.head(self.advance(x, keep_SBK.flatten(0, 1), 0)).unflatten(0, (S, B))


def refuse_gradients(network: torch.nn.Module, *inputs: Tensor) -> None:
    """Refuse a call from which gradients are wanted.

    Raises:
        ValueError: gradients are enabled, and an input or a parameter of the network needs one.
    """
    wanted = (*inputs, *network.parameters()) if torch.is_grad_enabled() else ()
    if any(tensor.requires_grad for tensor in wanted):
        raise ValueError(NO_GRADIENTS)
