"""The cost of each block is counted here, in multiply-accumulates (MACs) of convolutions and linear layers.

Shapes: B images, K blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from policyskip.backbones.base import Backbone, evaluation_mode
from policyskip.backbones.folding import one_pass_flops
from policyskip.parallel.deferred import sent


@dataclass(frozen=True)
class Costs:
    """Holds the MACs of one image: ``always`` for stem, shortcuts and head, and ``block_K``, float64 (K,), for the
    residual branch of each block."""

    always: float
    block_K: Tensor

    @property
    def full(self) -> float:
        """Return the MACs of the whole network."""
        return self.always + float(self.block_K.sum())

    def of(self, keep: Tensor) -> Tensor:
        """Return the MACs, float64 (…), of keep decisions, bool (…, K)."""
        return self.always + (keep * sent(self.block_K, keep.device)).sum(-1)  # for one image much faster than ``@``


def counted(call: Callable[..., Any], *inputs: Any) -> tuple[float, Any]:
    """Count the MACs of one call without gradients, by torch's flop counter, which counts two operations per MAC.

    Returns: the MACs, and the result of the call.
    """
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=one_pass_flops()) as counter:
        result = call(*inputs)
    return counter.get_total_flops() / 2, result


def count_macs(module: nn.Module, *inputs: Tensor) -> float:
    """Count the MACs of one call of a module."""
    return counted(module, *inputs)[0]


def count_costs(backbone: Backbone, image_shape: tuple[int, int, int]) -> Costs:
    """Count the MACs of each block of ``backbone`` for one image of shape (3, H, W)."""
    device = backbone.mean.device
    with evaluation_mode(backbone), torch.no_grad():
        images = torch.zeros(1, *image_shape, device=device, dtype=backbone.mean.dtype)
        always = count_macs(backbone.stem, images)
        x = backbone.features(images)
        block_macs = []
        for block in backbone.blocks:
            block_macs.append(count_macs(block.residual, x))
            always += count_macs(block.shortcut, x)
            x = block(x)
        always += count_macs(backbone.head, x)
    return Costs(always, torch.tensor(block_macs, dtype=torch.float64))
