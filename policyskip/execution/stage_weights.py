"""The weights of a residual network in the order in which the stage kernels read them.

Shapes: O output and I input channels, OP and IP padded to powers of two, P patch, S = P + 2 its window's side.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from policyskip.backbones.base import Backbone, Block
from policyskip.execution.stage_plan import convolution, kind_of, padded


class Packed:
    """Two flat tensors that hold all weights, and all biases in float32, and the places where each part begins.

    Args:
        folded: a network that ``StageNetwork.why_not`` accepts.
        patch: the side of the patches in which blocks of 16 channels are convolved.
    """

    def __init__(self, folded: Backbone, patch: int) -> None:
        self._weights: list[Tensor] = []
        self._biases: list[Tensor] = []
        stem = convolution(folded.stem, 0)
        self.stem = self._place()
        rows = torch.zeros(padded(stem.out_channels), 32)
        rows[: stem.out_channels, :27] = stem.weight.detach().float().cpu().reshape(-1, 27)
        mean, std = folded.mean.float().flatten().cpu(), folded.std.float().flatten().cpu()
        self._add(rows, _bias(stem), torch.cat([1 / std, torch.ones(1), -mean / std, torch.zeros(1)]))
        self.blocks: list[tuple[int, int]] = []
        for block in folded.blocks:
            self.blocks.append(self._place())
            self._add_block(block, patch)
        self.head = self._place()
        linear = list(folded.head.children())[-1]
        assert isinstance(linear, nn.Linear)
        classes = -(-linear.out_features // 16) * 16
        rows = torch.zeros(classes, padded(linear.in_features))
        rows[: linear.out_features, : linear.in_features] = linear.weight.detach().float().cpu()
        bias = torch.zeros(classes)
        if linear.bias is not None:
            bias[: linear.out_features] = linear.bias.detach().float().cpu()
        self._add(rows, bias)
        self.weights = torch.cat(self._weights).to(folded.mean.device, stem.weight.dtype)
        self.bias = torch.cat(self._biases).to(folded.mean.device)
        del self._weights, self._biases

    def _place(self) -> tuple[int, int]:
        """Return where the next weights and the next biases begin."""
        return sum(map(len, self._weights)), sum(map(len, self._biases))

    def _add(self, weights: Tensor, *biases: Tensor) -> None:
        self._weights.append(weights.flatten())
        self._biases += biases

    def _add_block(self, block: Block, patch: int) -> None:
        """Append a block's two convolutions, and the one of its shortcut if that is a projection."""
        kind = kind_of(block.shortcut)
        same = kind == "identity" and padded(convolution(block.residual, 0).out_channels) == 16
        for conv in (convolution(block.residual, 0), convolution(block.residual, 1)):
            self._add(spread(conv.weight.detach().float().cpu(), patch if same else 1), _bias(conv))
        if kind == "B":
            conv = convolution(block.shortcut, 0)
            rows = torch.zeros(padded(conv.out_channels), padded(conv.in_channels))
            rows[: conv.out_channels, : conv.in_channels] = conv.weight.detach().float().cpu().flatten(1)
            self._add(rows, _bias(conv))


def _bias(conv: nn.Conv2d) -> Tensor:
    """Return the bias of a convolution, padded, float32 (OP,); zeros if it has none."""
    bias = torch.zeros(padded(conv.out_channels))
    if conv.bias is not None:
        bias[: conv.out_channels] = conv.bias.detach().float().cpu()
    return bias


def spread(weight: Tensor, patch: int) -> Tensor:
    """Return the weights (O, I, 3, 3) of a convolution, arranged for patches: (P, P, OP, S, S, IP).

    An output pixel of a patch does not depend on all pixels of the patch's window; those weights are zero.
    """
    outputs, inputs = weight.shape[:2]
    rows = torch.zeros(patch, patch, padded(outputs), patch + 2, patch + 2, padded(inputs))
    for y in range(patch):
        for x in range(patch):
            rows[y, x, :outputs, y : y + 3, x : x + 3, :inputs] = weight.permute(0, 2, 3, 1)
    return rows
