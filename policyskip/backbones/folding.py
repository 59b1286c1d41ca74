"""Inference-only copies with batch norm folded into the convolutions' weights. Where torch has it (oneDNN, on CPUs),
the ReLU or the addition that follows a convolution is computed with it, in one pass over memory.

Shapes: B images, C channels, H W pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
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
"""The number of elements from which features no longer fit into a processor's cache, so that one pass over them is
faster than two. For smaller features the single operation takes longer to call than it saves."""


def folded(network: AnyModule) -> AnyModule:
    """Make a frozen copy that gives the same logits to rounding, with less to compute and to move through memory.

    In an ``nn.Sequential``, a batch normalisation behind a convolution is folded into the convolution's weights, and a
    ReLU behind them becomes part of the convolution; a block adds its shortcut in its last convolution. The memory
    format is channels last, which convolutions are fastest with. The copy is for executing, not for saving: its
    parameters have other names, and its hash is another.

    Raises:
        UserError: a weight is not finite. It must be found here, because oneDNN's ReLU turns NaN into 0.
    """
    if (place := find_nonfinite(network.state_dict())) is not None:
        raise UserError(f"the network cannot be used: its {place} holds numbers that are not finite")
    network = copy.deepcopy(network).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    for module in [m for m in network.modules() if type(m) is nn.Sequential]:
        layers: dict[str, nn.Module] = dict(module._modules)  # a Sequential can hold a module twice
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
    """Return whether the last layer is a convolution, which can add the shortcut itself."""
    return type(residual) is nn.Sequential and len(residual) > 0 and type(residual[-1]) is nn.Conv2d


class ConvReLU(nn.Conv2d):
    """A module that applies a convolution and the ReLU behind it."""

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
        arguments = (*_arguments(self.last), "add", 1.0, "relu", [], "")
        separate = x.data_ptr() != shortcut.data_ptr()  # one tensor if the residual is a single convolution
        if inplace and separate and shortcut.is_contiguous(memory_format=torch.channels_last):
            return torch.ops.mkldnn._convolution_pointwise_.binary(shortcut, x, *arguments)
        return torch.ops.mkldnn._convolution_pointwise.binary(x, shortcut, *arguments)


def _arguments(conv: nn.Conv2d) -> tuple[object, ...]:
    """Return a convolution's arguments in oneDNN's order."""
    return conv.weight, conv.bias, conv.padding, conv.stride, conv.dilation, conv.groups


def in_one_pass(conv: nn.Conv2d, x: Tensor) -> bool:
    """Return whether a convolution and what follows it run as one operation: for large x, on a CPU, without
    gradients."""
    if x.numel() < LARGE or x.device.type != "cpu" or torch.is_grad_enabled():
        return False
    plain = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    return plain and _has_one_pass(x.dtype)


@cache
def _has_one_pass(dtype: torch.dtype) -> bool:
    """Find out, by trying, whether this build of torch has the single operation on this processor."""
    x, weight = torch.ones(1, 1, 1, 1, dtype=dtype), torch.ones(1, 1, 1, 1, dtype=dtype)
    try:
        arguments: tuple[object, ...] = (weight, None, [0, 0], [1, 1], [1, 1], 1, "add", 1.0, "relu", [], "")
        torch.ops.mkldnn._convolution_pointwise.binary(x, x, *arguments)
        torch.ops.mkldnn._convolution_pointwise_.binary(x.clone(), x, *arguments)
    except (AttributeError, RuntimeError):
        return False
    return True


def one_pass_flops() -> dict[object, Callable[..., int]]:
    """Return the ``custom_mapping`` by which torch's flop counter counts these operations as convolutions."""

    def flops(x_shape: Any, *operands: Any, out_shape: Any, **_: Any) -> int:
        weight_shape = operands[1] if len(operands) > 9 else operands[0]  # the tensor to add comes before the weight
        return conv_flop_count(x_shape, weight_shape, out_shape)

    if not _has_one_pass(torch.float32):
        return {}
    return dict.fromkeys((torch.ops.mkldnn._convolution_pointwise, torch.ops.mkldnn._convolution_pointwise_), flops)
