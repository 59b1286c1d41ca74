"""SkipNet's gates: small networks that decide, from the features that enter a block, whether the block runs.

Wang, Yu, Dou, Darrell, Gonzalez, "SkipNet: Learning Dynamic Routing in Convolutional Networks", ECCV 2018, section 3.
The layers have the sizes of the published code.

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
"""The state that a gate passes to the next gate: the LSTM's hidden and cell state, float (B, 10) each, or nothing."""


class Gates(nn.Module, ABC):
    """The base class of the G gates of a network, which compute from features whether a block runs."""

    @abstractmethod
    def logit(self, g: int, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Compute gate g's logit for the features (B, C, H, W) that enter block g + 1.

        Args:
            memory: what the gate before returned; None for the first gate.

        Returns: the logit, float (B,): the block should run where ``sigmoid(logit) > 1/2``; and the memory for the next
        gate.
        """

    @torch.no_grad()
    def macs(self, shapes: Sequence[Shape]) -> list[float]:
        """Count the MACs of each gate for one image, given the shapes (C, H, W) of the features that the gates see."""
        memory, macs = None, []
        device = next(self.parameters()).device
        with evaluation_mode(self):
            for g, shape in enumerate(shapes):
                cost, (_, memory) = counted(self.logit, g, torch.zeros(1, *shape, device=device), memory)
                macs.append(cost)
        return macs


class RNNGates(Gates):
    """RNNGate: each gate averages over the pixels and has its own linear layer to 10; all share one LSTM (10, 10).

    Args:
        shapes: (C, H, W) of the features that each gate sees.
        initial_keep: approximate probability with which an untrained gate keeps its block.

    Raises:
        UserError: ``initial_keep`` is not between 0 and 1.
    """

    size = 10

    def __init__(self, shapes: Sequence[Shape], initial_keep: float) -> None:
        super().__init__()
        self.reads = nn.ModuleList(nn.Linear(shape[0], self.size) for shape in shapes)
        # A cell and not nn.LSTM: one gate is one step, and the flop counter does not see into the fused LSTM.
        self.cell = nn.LSTMCell(self.size, self.size)
        self.answer = nn.Linear(self.size, 1)
        nn.init.constant_(self.answer.bias, _logit(initial_keep))

    def logit(self, g: int, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        hidden, cell = self.cell(self.reads[g](x.mean((2, 3))), memory)
        return self.answer(hidden).squeeze(1), (hidden, cell)


class FFGates(Gates):
    """Feed-forward gates, each of which has its own weights and no memory.

    Args:
        layers: from a number of channels to the layers before the average over the pixels.
        shapes, initial_keep: as for :class:`RNNGates`.

    Raises:
        UserError: ``initial_keep`` is not between 0 and 1.
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

    def logit(self, g: int, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        skip_B, keep_B = self.answers[g](self.features[g](x)).unbind(1)
        return keep_B - skip_B, None  # softmax over two is the sigmoid of their difference


def ffgate1(shapes: Sequence[Shape], initial_keep: float) -> FFGates:
    """Build FFGate-I: 2×2 max pooling, conv3×3, conv3×3 with stride 2, averages over the pixels, a linear layer to 2.
    A gate costs 16 % of a basic block.

    Raises:
        UserError: features are smaller than 2×2, or ``initial_keep`` is not between 0 and 1.
    """
    if any(min(shape[1:]) < 2 for shape in shapes):
        raise UserError(
            f"agent.gate=ff1 needs features of at least 2×2, there are {min(shapes, key=lambda s: s[1])[1:]}"
        )
    return FFGates(lambda C: [nn.MaxPool2d(2), *_conv(C, 1), *_conv(C, 2)], shapes, initial_keep)


def ffgate2(shapes: Sequence[Shape], initial_keep: float) -> FFGates:
    """Build FFGate-II: conv3×3 with stride 2, averages over the pixels, a linear layer to 2. A gate costs 12.5 % of a
    basic block.

    Raises:
        UserError: ``initial_keep`` is not between 0 and 1.
    """
    return FFGates(lambda C: _conv(C, 2), shapes, initial_keep)


GATES: dict[str, Callable[[Sequence[Shape], float], Gates]] = {"rnn": RNNGates, "ff1": ffgate1, "ff2": ffgate2}
"""The functions that build gates from the shapes of the features and ``initial_keep``, by name."""


def straight_through(kept: Tensor, skipped: Tensor, probability_B: Tensor) -> Tensor:
    """Compute ``g · kept + (1 − g) · skipped`` with hard g = [p > ½], where dg/dp is taken to be 1 (section 3.3).

    Args:
        kept, skipped: float (B, C, H, W), a block's output if it runs and if it is skipped.
        probability_B: float (B,), p.

    Returns: float (B, C, H, W). The gradient of p is ``Σ grad · (kept − skipped)`` over an image's features; of
    ``kept`` and ``skipped``, only the chosen one gets a gradient.

    Raises:
        ValueError: the shapes do not match.
    """
    if kept.shape != skipped.shape or probability_B.shape != kept.shape[:1]:
        shapes = [tuple(t.shape) for t in (kept, skipped, probability_B)]
        raise ValueError(f"expected kept and skipped (B, …) and probability (B,); got {shapes}")
    return _StraightThrough.apply(kept, skipped, probability_B)


class _StraightThrough(torch.autograd.Function):
    """The autograd function that computes :func:`straight_through`. It chooses with ``torch.where``; the usual ``g + p
    − p.detach()`` would multiply, and a NaN in a skipped block would reach the output."""

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
    """Build conv3×3 – BN – ReLU."""
    convolution = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(channels), nn.ReLU()]


def _logit(probability: float) -> float:
    """Return the logit of a probability.

    Raises:
        UserError: it is not between 0 and 1.
    """
    if not 0 < probability < 1:
        raise UserError(f"agent.initial_keep must be above 0 and below 1, got {probability}")
    return math.log(probability / (1 - probability))
