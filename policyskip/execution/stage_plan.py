"""What the stage kernels need to know of a network: its stages' shapes, and its weights in the order they are read in.

Shapes: C classes or channels (CP: padded to a power of two), H W pixels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from policyskip.backbones.resnet import PoolShortcut, SubsampleShortcut

MOST_CHANNELS = 256
"""From here on, an image's own copy of the weights in its multiprocessor would take longer to load than to use."""
MOST_PIXELS = 128 * 128
"""Features of larger images would not stay in the cache of one multiprocessor."""
PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)


class Stage(NamedTuple):
    """A stage as the kernels are compiled for it; they read the fields by number, in this order.

    Of these, h to c_padded are the shape of its features, and h_in to shift say how its first block changes the shape
    (kind is empty if it does not). The blocks from ``start`` have the identity as their shortcut. Weights and biases
    are places in the packed tensors, with the step from one block to the next. A tile has m patches, of patch × patch
    pixels; in the first block m_change pixels. A product has at most ``entries`` entries. What the first block gives
    is written to ``out`` of the scratch memory, or to the launch's output if that is negative.
    """

    h: int
    w: int
    c: int
    c_padded: int
    h_in: int
    w_in: int
    c_in: int
    c_in_padded: int
    stride: int
    kind: str
    shift: int
    start: int
    blocks: int
    weights: int
    weights_step: int
    bias: int
    bias_step: int
    change_weights: int
    change_bias: int
    m: int
    patch: int
    m_change: int
    entries: int
    ahead: bool
    out: int


class Launch(NamedTuple):
    """One launch of ``run_image``: blocks first … last - 1, what the kernel is compiled for, and its programs' warps.

    ``out_shape`` is the shape of what a row of it gives; empty if it only changes the features that it is given.
    """

    first: int
    last: int
    constants: dict[str, Any]
    warps: int
    out_shape: tuple[int, ...]


def padded(channels: int) -> int:
    """Return the smallest power of two that is at least ``channels`` and at least 16, which products need."""
    return max(16, 1 << (channels - 1).bit_length())


def convolution(layers: nn.Module, number: int) -> nn.Conv2d:
    """Return the layer of this number, which is a convolution."""
    layer = list(layers.children())[number]
    assert isinstance(layer, nn.Conv2d)
    return layer


def is_plain(conv: nn.Module, size: int) -> bool:
    """Return whether this is a convolution of size × size pixels with zero padding, without groups or dilation."""
    if not isinstance(conv, nn.Conv2d) or conv.padding_mode != "zeros":
        return False
    same = conv.kernel_size == (size, size) and conv.padding == (size // 2, size // 2) and conv.groups == 1
    return same and conv.dilation == (1, 1) and conv.stride in ((1, 1), (2, 2))


def kind_of(shortcut: nn.Module) -> str:
    """Return "identity", "A", "pool" or "B", or an empty text for another shortcut."""
    if type(shortcut) is nn.Identity:
        return "identity"
    if type(shortcut) is SubsampleShortcut:
        return "A"
    if type(shortcut) is PoolShortcut:
        return "pool"
    layers = list(shortcut.children()) if type(shortcut) is nn.Sequential else []
    return "B" if len(layers) == 1 and type(layers[0]) is nn.Conv2d and is_plain(layers[0], 1) else ""


def stride_of(shortcut: nn.Module) -> int:
    """Return the stride of a shortcut of one of the kinds above."""
    if isinstance(shortcut, nn.Sequential):
        shortcut = next(iter(shortcut.children()))
    stride = getattr(shortcut, "stride", 1)
    return int(stride[0] if isinstance(stride, tuple) else stride)
