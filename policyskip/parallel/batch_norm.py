"""Batch normalisation by the images of all processes that share a batch.

Shapes: B images in this process, C channels, H W pixels.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx


class WholeBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation whose mean and variance are those of the images in all processes.

    ``nn.SyncBatchNorm`` does the same, but not on CPUs. In training mode every process has to call the layer, with an
    empty batch if it has no images.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised features.

        Args:
            x: float (B, C, H, W); B may be 0.

        Returns: float (B, C, H, W).
        """
        if not self.training:
            return super().forward(x)
        own_count = x.new_full((1,), x.numel() / x.shape[1])
        sum_C, count = _Sum.apply(torch.cat([x.sum((0, 2, 3)), own_count])).split([x.shape[1], 1])
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
    """The autograd function that sums a tensor over the processes.

    The loss of every process depends on the sum, so its gradient is the sum of their gradients.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, own: Tensor) -> Tensor:
        total = own.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient)
