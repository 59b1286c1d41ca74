"""The stem of a network, with Triton kernels where torch passes over large features more often than it has to.

Shapes: B images, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policyskip.backbones.base import Backbone, Network
from policyskip.backbones.folding import ConvReLU
from policyskip.execution.convolutions import largest_tile, why_not_plain

LENGTH = 1024
"""How many numbers of an image a program normalises."""


class Stem:
    """Computes the features that enter block 0, with a network's own stem.

    Images are normalised in one pass, and put channels last in it. A stem that is a convolution, a ReLU and a pooling,
    as torchvision's are, adds the convolution's bias and clips in the pass that pools. Everything else is torch's.

    Args:
        folded: the folded network.
        kernels: the module of the kernels.
    """

    def __init__(self, folded: Backbone, kernels: Any) -> None:
        self.folded, self.kernels = folded, kernels
        kind = type(folded)
        self.is_usual = kind.features is Backbone.features and kind.normalise is Network.normalise

    def __call__(self, images: Tensor) -> Tensor:
        """Compute the features (B, C, H, W), channels last, of images (B, 3, H, W), uint8 or float."""
        if self.is_usual and len(images):
            x = self._run(self._normalised(images.contiguous()))
        else:
            x = self.folded.features(images)
        return x.contiguous(memory_format=torch.channels_last)

    def _normalised(self, images: Tensor) -> Tensor:
        """Normalise images as :meth:`~policyskip.backbones.base.Network.normalise` does, channels last."""
        B, C, H, W = images.shape
        mean, std = self.folded.mean, self.folded.std
        out = torch.empty((B, C, H, W), dtype=mean.dtype, device=mean.device, memory_format=torch.channels_last)
        most = 1 if images.is_floating_point() else 255
        with on(images):
            self.kernels.normalise[(B * -(-C * H * W // LENGTH),)](
                *(images, mean, std, out), PIXELS=H * W, CHANNELS=C, MOST=most, LENGTH=LENGTH
            )
        return out

    def _run(self, x: Tensor) -> Tensor:
        """Run the stem on normalised images."""
        stem: Any = self.folded.stem
        layers = list(stem) if type(stem) is nn.Sequential else []
        if [type(layer) for layer in layers] != [ConvReLU, nn.MaxPool2d]:
            return stem(x)
        conv: Any = layers[0]
        pool: Any = layers[1]
        usual = pair(pool.dilation) == (1, 1) and not pool.ceil_mode and not pool.return_indices
        if conv.bias is None or why_not_plain(conv) or not usual:
            return stem(x)
        x = F.conv2d(x, conv.weight, None, conv.stride, conv.padding).contiguous(memory_format=torch.channels_last)
        sizes = zip(x.shape[2:], pair(pool.kernel_size), pair(pool.stride), pair(pool.padding), strict=True)
        out = empty(x, x.shape[1], [(size + 2 * pad - window) // stride + 1 for size, window, stride, pad in sizes])
        B, C, out_h, out_w = out.shape
        pixels, channels = B * out_h * out_w, largest_tile(C)
        with on(x):
            self.kernels.pool[(-(-pixels // 32), -(-C // channels))](
                *(x, conv.bias, out, pixels),
                **dict(H=x.shape[2], W=x.shape[3], CHANNELS=C, OUT_H=out_h, OUT_W=out_w),
                **both("SIZE", pool.kernel_size),
                **both("STRIDE", pool.stride),
                **both("PAD", pool.padding),
                **dict(BLOCK_M=32, BLOCK_N=channels, num_warps=8),
            )
        return out


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return a layer's size as height and width."""
    return (size, size) if isinstance(size, int) else size


def both(name: str, size: int | tuple[int, int]) -> dict[str, int]:
    """Return a layer's size by the names that kernels have for its height and width."""
    return dict(zip((f"{name}_Y", f"{name}_X"), pair(size), strict=True))


def on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make a tensor's GPU the current one, which Triton launches on; nothing for a tensor on a CPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def empty(like: Tensor, channels: int, size: Sequence[int]) -> Tensor:
    """Make features (B, C, H, W), channels last, with nothing in them yet, for as many images as ``like`` has."""
    shape = (len(like), channels, *size)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
