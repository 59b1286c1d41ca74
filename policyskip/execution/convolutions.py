"""The convolutions of a block as Triton kernels take them, and whether a block consists of such.

Shapes: C input channels, N output channels, both filled up to whole steps and tiles.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from policyskip.backbones.base import Block
from policyskip.backbones.folding import ConvReLU
from policyskip.execution.tilings import step_size


class Convolution:
    """Holds a convolution as the kernels take it.

    Args:
        layer: the folded convolution, with or without ReLU.
        inputs: most input channels of a step.
    """

    def __init__(self, layer: nn.Conv2d, inputs: int) -> None:
        self.relu = type(layer) is ConvReLU
        self.channels, self.out_channels = layer.in_channels, layer.out_channels
        self.step = step_size(self.channels, inputs)
        assert not isinstance(layer.padding, str)
        self.taps, self.stride, self.padding = layer.kernel_size, layer.stride, layer.padding
        self.weights, self.bias = packed(layer, self.step)
        self.steps = self.weights.shape[1] // self.step

    def out_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Return the output's height and width for an input's."""
        sizes = zip(size, self.taps, self.stride, self.padding, strict=True)
        return tuple((s + 2 * pad - taps) // stride + 1 for s, taps, stride, pad in sizes)

    def sizes(self, size: Sequence[int]) -> dict[str, int]:
        """Return what the kernels are compiled for, for an input of this height and width."""
        return dict(
            **dict(H=size[0], W=size[1], CHANNELS=self.channels, TAPS_Y=self.taps[0], TAPS_X=self.taps[1]),
            **dict(STRIDE_Y=self.stride[0], STRIDE_X=self.stride[1]),
            **dict(PAD_Y=self.padding[0], PAD_X=self.padding[1], BLOCK_K=self.step),
        )


def packed(layer: nn.Conv2d, step: int) -> tuple[Tensor, Tensor]:
    """Return a convolution's weights (N, steps · step), and its bias (N,), float32, with N output channels.

    A step takes ``step`` input channels at one place of the filter; it goes over the places first, and then over the
    next channels, so that the features that it reads again are in the cache. Channels are filled up with zeros to whole
    steps and tiles.
    """
    weight = layer.weight.detach()
    out, inputs, *taps = weight.shape
    most = largest_tile(out)
    weight = F.pad(weight, (0, 0, 0, 0, 0, -inputs % step, 0, -out % most))
    weight = weight.reshape(len(weight), -1, step, taps[0] * taps[1]).transpose(2, 3)
    bias = weight.new_zeros(out) if layer.bias is None else layer.bias.detach()
    return weight.reshape(len(weight), -1).contiguous(), F.pad(bias.float(), (0, -out % most))


def largest_tile(channels: int) -> int:
    """Return the most output channels that a tile has, a power of two: 128, or less if there are fewer channels."""
    return min(128, max(16, 1 << (channels - 1).bit_length()))


class TileBlock:
    """Holds a block as the kernels take it: the convolutions of its branch, and its shortcut.

    Args:
        block: the folded block.
        inputs: most input channels of a step.
    """

    def __init__(self, block: Block, inputs: int) -> None:
        self.branch = [Convolution(layer, inputs) for layer in convolutions(block.residual)]
        self.shortcut = block.shortcut
        projection = the_convolution(block.shortcut)
        self.projection = None if projection is None else Convolution(projection, inputs)


def convolutions(branch: nn.Module) -> list[nn.Conv2d]:
    """Return the convolutions of a branch in order; one with a ReLU behind it as :class:`ConvReLU`."""
    found: list[nn.Conv2d] = []
    layers = list(branch) if type(branch) is nn.Sequential else [branch]
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            found.append(layer)
        elif type(layer) is nn.ReLU:
            found[-1] = ConvReLU(found[-1])
    return found


def the_convolution(shortcut: nn.Module) -> nn.Conv2d | None:
    """Return the convolution that a shortcut consists of, if it is one plain convolution and nothing else."""
    layers = list(shortcut) if type(shortcut) is nn.Sequential else [shortcut]
    if len(layers) == 1 and type(layers[0]) is nn.Conv2d and not why_not_plain(layers[0]):
        return layers[0]
    return None


def why_not_plain(layer: nn.Conv2d) -> str:
    """Return what a convolution has that the kernels do not; empty if nothing."""
    if layer.groups != 1:
        return f"a convolution in {layer.groups} groups"
    if layer.dilation != (1, 1):
        return "a dilated convolution"
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        return "a convolution padded with something other than a number of zeros"
    return ""


def why_not_branch(branch: nn.Module) -> str:
    """Return what a block's branch has, or lacks, that keeps it from the kernels; empty if nothing."""
    layers = list(branch) if type(branch) is nn.Sequential else [branch]
    before: nn.Module | None = None
    for layer in layers:
        if type(layer) is nn.ReLU and type(before) is not nn.Conv2d:
            return "a ReLU that does not follow a convolution"
        if type(layer) not in (nn.Conv2d, ConvReLU, nn.ReLU):
            return f"a layer of type {type(layer).__name__}"
        if isinstance(layer, nn.Conv2d) and (reason := why_not_plain(layer)):
            return reason
        before = layer
    if before is None:
        return "no convolution"
    return "" if type(before) is nn.Conv2d else "a ReLU at its end"
