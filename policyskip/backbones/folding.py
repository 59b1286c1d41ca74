"""Networks that only answer: batch normalisation in the convolutions' weights, and what follows a convolution in one
pass over memory with it, where torch has that (oneDNN, on CPUs).

Shapes: B images, C channels, H W pixels.
"""

from __future__ import annotations

import copy
from functools import cache
from itertools import pairwise
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.flop_counter import conv_flop_count

from policyskip.backbones.base import Block
from policyskip.errors import UserError
from policyskip.finite import find_nonfinite

AnyModule = TypeVar("AnyModule", bound=nn.Module)
LARGE = 2**19
"""Numbers in features that leave a processor's cache: from there on one pass over them is faster than two, while
for smaller ones the single operation takes longer to call than it saves."""


def folded(network: AnyModule) -> AnyModule:
    """A frozen copy that gives the same logits to rounding, with less to compute and to move through memory.

    In an ``nn.Sequential`` a batch normalisation behind a convolution disappears into its weights, and a ReLU behind
    those becomes part of it; a block adds its shortcut in its last convolution. Convolutions want their channels last.
    The copy is for executing, not for saving: its names and its hash are others.

    Raises:
        UserError: a weight is not finite; oneDNN's ReLU would hide it, for it gives 0 for NaN.
    """
    if (place := find_nonfinite(network.state_dict())) is not None:
        raise UserError(f"the network cannot be used: its {place} holds numbers that are not finite")
    network = copy.deepcopy(network).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    for module in [m for m in network.modules() if type(m) is nn.Sequential]:
        layers: dict[str, Any] = dict(module._modules)  # a module can be there twice
        for name, after in pairwise(list(layers)):
            conv, norm = layers[name], layers[after]
            if type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d and norm.track_running_stats:
                layers[after] = fuse_conv_bn_eval(conv, norm)
                del layers[name]
        for name, after in pairwise(list(layers)):
            if type(conv := layers[name]) is nn.Conv2d and type(layers[after]) is nn.ReLU:
                layers[after] = ConvReLU(conv)
                del layers[name]
        module._modules = layers
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if type(child) is Block and ends_in_convolution(child.residual):
                setattr(parent, name, FoldedBlock(child.residual, child.shortcut))
    return network


def ends_in_convolution(residual: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether the last layer can take in what is added behind it."""
    return type(residual) is nn.Sequential and len(residual) > 0 and type(residual[-1]) is nn.Conv2d


class ConvReLU(nn.Conv2d):
    """A convolution and the ReLU behind it."""

    def __init__(self, conv: nn.Conv2d) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(conv.__dict__)

    def forward(self, x: Tensor) -> Tensor:
        if not in_one_pass(self, x):
            return super().forward(x).relu_()
        return torch.ops.mkldnn._convolution_pointwise(x, *_arguments(self), "relu", [], "")


class FoldedBlock(Block):
    """A block whose last convolution adds the shortcut."""

    def __init__(self, residual: nn.Sequential, shortcut: nn.Module) -> None:
        super().__init__(residual, shortcut)
        *first, last = residual
        assert isinstance(last, nn.Conv2d)
        self.first, self.last = nn.Sequential(*first), last

    def join(self, shortcut: Tensor, x: Tensor, inplace: bool = False) -> Tensor:
        x = self.first(x)
        if not in_one_pass(self.last, x):
            return self.last(x).add_(shortcut).relu_()
        how = (*_arguments(self.last), "add", 1.0, "relu", [], "")
        apart = x.data_ptr() != shortcut.data_ptr()  # they are one where the residual is a single convolution
        if inplace and apart and shortcut.is_contiguous(memory_format=torch.channels_last):
            return torch.ops.mkldnn._convolution_pointwise_.binary(shortcut, x, *how)
        return torch.ops.mkldnn._convolution_pointwise.binary(x, shortcut, *how)


def _arguments(conv: nn.Conv2d) -> tuple[object, ...]:
    return conv.weight, conv.bias, conv.padding, conv.stride, conv.dilation, conv.groups


def in_one_pass(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether a convolution and what follows it are one operation: large ones on a CPU, where no gradient is asked."""
    if x.numel() < LARGE or x.device.type != "cpu" or torch.is_grad_enabled():
        return False
    plain = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    return plain and _has_one_pass(x.dtype)


@cache
def _has_one_pass(dtype: torch.dtype) -> bool:
    """Whether this build of torch, on this processor, can; found out by trying."""
    x, weight = torch.ones(1, 1, 1, 1, dtype=dtype), torch.ones(1, 1, 1, 1, dtype=dtype)
    try:
        how: tuple[Any, ...] = (weight, None, [0, 0], [1, 1], [1, 1], 1, "add", 1.0, "relu", [], "")
        torch.ops.mkldnn._convolution_pointwise.binary(x, x, *how)
        torch.ops.mkldnn._convolution_pointwise_.binary(x.clone(), x, *how)
    except (AttributeError, RuntimeError):
        return False
    return True


def one_pass_flops() -> dict[Any, Any]:
    """How torch's flop counter is to count them, for its ``custom_mapping``."""

    def flops(x_shape: Any, *operands: Any, out_shape: Any, **_: Any) -> int:
        weight_shape = operands[1] if len(operands) > 9 else operands[0]  # behind what is added
        return conv_flop_count(x_shape, weight_shape, out_shape)

    if not _has_one_pass(torch.float32):
        return {}
    return dict.fromkeys((torch.ops.mkldnn._convolution_pointwise, torch.ops.mkldnn._convolution_pointwise_), flops)
