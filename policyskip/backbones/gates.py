"""SkipNet's gates: before each block but the first, a small network that sees what enters the block.

Wang, Yu, Dou, Darrell, Gonzalez, "SkipNet: Learning Dynamic Routing in Convolutional Networks", ECCV 2018, section 3.
Shapes of the layers are those of the published code.

Shapes: B images, K blocks, G gates (K - 1: the first block always runs), C channels, H W pixels.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from policyskip.backbones.base import evaluation_mode, he_init
from policyskip.backbones.costs import counted
from policyskip.errors import UserError

Shape = tuple[int, int, int]
Memory = tuple[Tensor, Tensor] | None
"""What a gate hands on to the next: the LSTM's hidden and cell state, float (B, 10) each, or nothing."""


class Gates(nn.Module, ABC):
    """The G gates of a network."""

    @abstractmethod
    def ask(self, g: int, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Gate g's answer to the features (B, C, H, W) that enter block g + 1.

        Returns: its logit, float (B,): the block should run where ``sigmoid(logit) > 1/2``; and what it remembers.
        """

    @torch.no_grad()
    def macs(self, shapes: Sequence[Shape]) -> list[float]:
        """MACs of each gate for one image, given the shape (C, H, W) of what it sees."""
        memory, macs = None, []
        device = next(self.parameters()).device
        with evaluation_mode(self):
            for g, shape in enumerate(shapes):
                cost, (_, memory) = counted(self.ask, g, torch.zeros(1, *shape, device=device), memory)
                macs.append(cost)
        return macs


class RNNGates(Gates):
    """RNNGate: averages over pixels, a linear layer to 10 for each gate, and one LSTM (10, 10) that all share.

    Args:
        shapes: (C, H, W) of the features that each gate sees.
        initial_keep: probability with which a fresh gate keeps its block, about.
    """

    size = 10

    def __init__(self, shapes: Sequence[Shape], initial_keep: float) -> None:
        super().__init__()
        self.reads = nn.ModuleList(nn.Linear(shape[0], self.size) for shape in shapes)
        # A cell and not nn.LSTM: one gate is one step, and the flop counter does not see into the fused LSTM.
        self.cell = nn.LSTMCell(self.size, self.size)
        self.answer = nn.Linear(self.size, 1)
        nn.init.constant_(self.answer.bias, _logit(initial_keep))

    def ask(self, g: int, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        hidden, cell = self.cell(self.reads[g](x.mean((2, 3))), memory)
        return self.answer(hidden).squeeze(1), (hidden, cell)


class FFGates(Gates):
    """Feed-forward gates, each with its own weights; nothing is handed on. Arguments as for :class:`RNNGates`.

    Raises:
        UserError: features that are smaller than a gate can read.
    """

    def __init__(self, layers: Callable[[int], list[nn.Module]], shapes: Sequence[Shape], initial_keep: float) -> None:
        super().__init__()
        self.features = nn.ModuleList(
            nn.Sequential(*layers(shape[0]), nn.AdaptiveAvgPool2d(1), nn.Flatten()) for shape in shapes
        )
        he_init(self.features)
        answers = [nn.Linear(shape[0], 2) for shape in shapes]
        for answer in answers:
            nn.init.constant_(answer.bias[0], -_logit(initial_keep) / 2)
            nn.init.constant_(answer.bias[1], _logit(initial_keep) / 2)
        self.answers = nn.ModuleList(answers)

    def ask(self, g: int, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        skip_B, keep_B = self.answers[g](self.features[g](x)).unbind(1)
        return keep_B - skip_B, None  # softmax over two is the sigmoid of their difference


def ffgate1(shapes: Sequence[Shape], initial_keep: float) -> FFGates:
    """FFGate-I: 2×2 maxima, conv3×3, conv3×3 with stride 2, averages, a linear layer to 2. 16 % of a basic block."""
    if any(min(shape[1:]) < 2 for shape in shapes):
        raise UserError(
            f"agent.gate=ff1 needs features of at least 2×2, there are {min(shapes, key=lambda s: s[1])[1:]}"
        )
    return FFGates(lambda C: [nn.MaxPool2d(2), *_conv(C, 1), *_conv(C, 2)], shapes, initial_keep)


def ffgate2(shapes: Sequence[Shape], initial_keep: float) -> FFGates:
    """FFGate-II: conv3×3 with stride 2, averages, a linear layer to 2. 12.5 % of a basic block."""
    return FFGates(lambda C: _conv(C, 2), shapes, initial_keep)


GATES: dict[str, Callable[[Sequence[Shape], float], Gates]] = {"rnn": RNNGates, "ff1": ffgate1, "ff2": ffgate2}
"""Gates by name: what builds them from the shapes of the features and the first keep probability."""


def straight_through(kept: Tensor, skipped: Tensor, probability_B: Tensor) -> Tensor:
    """``g · kept + (1 − g) · skipped`` with hard g = [p > ½], and dg/dp taken to be 1 (paper, section 3.3).

    Args:
        kept, skipped: float (B, C, H, W), a block's output where it runs and where it does not.
        probability_B: float (B,), p.

    Returns: float (B, C, H, W). The gradient of p is ``Σ grad · (kept − skipped)`` over an image's features; that of
    ``kept`` and ``skipped`` goes to the one that was chosen.
    """
    if kept.shape != skipped.shape or probability_B.shape != kept.shape[:1]:
        shapes = [tuple(t.shape) for t in (kept, skipped, probability_B)]
        raise ValueError(f"expected kept and skipped (B, …) and probability (B,); got {shapes}")
    return _StraightThrough.apply(kept, skipped, probability_B)


class _StraightThrough(torch.autograd.Function):
    """Chooses with ``torch.where`` where ``g + p − p.detach()`` would multiply, so that a NaN in a skipped block does
    not reach the output."""

    @staticmethod
    def forward(ctx: Any, kept: Tensor, skipped: Tensor, probability_B: Tensor) -> Tensor:
        keep = (probability_B > 0.5).view(-1, *[1] * (kept.dim() - 1))
        ctx.save_for_backward(kept, skipped, keep)
        return torch.where(keep, kept, skipped)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kept, skipped, keep = ctx.saved_tensors
        return grad * keep, grad * ~keep, (grad * (kept - skipped)).flatten(1).sum(1)


def _conv(channels: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(channels), nn.ReLU()]


def _logit(probability: float) -> float:
    if not 0 < probability < 1:
        raise UserError(f"agent.initial_keep must be between 0 and 1, got {probability}")
    return math.log(probability / (1 - probability))
