"""Kernels in plain torch, which behave as the contract of a kernel network says, for tests on any machine."""

from __future__ import annotations

import torch
from torch import Tensor

from policyskip.execution.kernel_network import KernelNetwork


class PlainKernels(KernelNetwork):
    """Computes every block for all images, chooses on the device, and overwrites what it was given."""

    calls: list[tuple[str, int]] = []  # noqa: RUF012 - of all instances; a test clears it

    @classmethod
    def why_not(cls, folded, image_shape) -> str:
        return "" if folded.num_blocks < 10 else "it has ten blocks"

    def features(self, images: Tensor) -> Tensor:
        self.calls.append(("features", len(images)))
        return self.folded.features(images).contiguous(memory_format=torch.channels_last)

    def advance(self, x: Tensor, keep_BM: Tensor, first: int) -> Tensor:
        assert keep_BM.dtype == torch.bool and keep_BM.shape[0] == len(x)
        self.calls.append(("advance", len(x)))
        y = x
        for block, keep_B in zip(self.folded.blocks[first:], keep_BM.unbind(1), strict=False):
            shortcut = block.shortcut(y)
            kept = torch.relu(shortcut + block.residual(y))
            y = torch.where(keep_B.view(-1, 1, 1, 1), kept, shortcut)
        if y is not x:
            x.fill_(torch.nan)  # whoever still needs it has given away what was not the caller's own
        return y.clone()

    def head(self, x: Tensor) -> Tensor:
        return self.folded.head(x)


class ImpossibleKernels(PlainKernels):
    """Fit no network."""

    @classmethod
    def why_not(cls, folded, image_shape) -> str:
        return "nothing fits it"
