"""Batch normalisation of a batch that several processes share: its images are normalised together.

Shapes: B images in this process, C channels, H W pixels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class WholeBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation by the images of all processes (``nn.SyncBatchNorm`` refuses CPUs).

    In training mode every process has to pass, if with no images.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, x: Tensor) -> Tensor:
        """Features float (B, C, H, W), B of 0 allowed, to the same shape."""
        if not self.training:
            return super().forward(x)
        pixels = x.new_tensor([x.numel() / x.shape[1]])
        sum_C, count = _Sum.apply(torch.cat([x.sum((0, 2, 3)), pixels])).split([x.shape[1], 1])
        mean_C = sum_C / count
        centred = x - mean_C.view(1, -1, 1, 1)
        variance_C = _Sum.apply(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean_C, self.momentum)
            self.running_var.lerp_(variance_C * count / (count - 1), self.momentum)
        scale_C = self.weight * torch.rsqrt(variance_C + self.eps)
        return centred * scale_C.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


class _Sum(torch.autograd.Function):
    """The sum over processes. Every process's loss depends on it, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor) -> Tensor:
        total = mine.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient)
