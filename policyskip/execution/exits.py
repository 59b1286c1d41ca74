"""Networks with exits are executed here: an image that has left is a branch that is not taken.

Shapes: B images, N exits, C classes, M blocks of a segment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from policyskip.backbones.base import Backbone
from policyskip.backbones.exits import ExitNetwork, Leave, check_leaves, run_until
from policyskip.backbones.resnet_exits import ResNetExits
from policyskip.execution.cuda_graphs import Tensors
from policyskip.execution.ways import Execution, How, NetworkExecution

Visit = Callable[[int, Tensor, Tensor], Tensor]
"""``visit(n, logits_BC, inside_B)``: which images go on after exit n, bool (B,), from their logits there, float (B, C),
and from which of them came so far, bool (B,)."""


class ExitExecution(NetworkExecution):
    """Executes a network with exits. For the arguments see :class:`~policyskip.execution.ways.NetworkExecution`.

    Kernels run the blocks of a backbone with exits. Other networks, such as MSDNet, are executed by gathering.
    """

    network: ExitNetwork

    def _backbone(self, network: Any) -> Backbone | None:
        own = [getattr(type(network), name, None) for name in ("begin", "segment")]
        return network.backbone if own == [ResNetExits.begin, ResNetExits.segment] else None

    def _every_exit(self, images: Tensor) -> Tensors:
        """Compute the logits of every exit, (B, N, C), by kernels."""
        logits: list[Tensor] = []

        def visit(n: int, logits_BC: Tensor, inside_B: Tensor) -> Tensor:
            logits.append(logits_BC)
            return inside_B

        self._walk(images, visit)
        return (torch.stack(logits, 1),)

    def _walk(self, images: Tensor, visit: Visit) -> None:
        """Take images (B, 3, H, W) from exit to exit; segments run for those that went on, and nothing asks the
        host."""
        network = self.network
        assert self.kernels is not None and isinstance(network, ResNetExits)
        x, first = self.kernels.features(images), 0
        inside_B = torch.ones(len(images), dtype=torch.bool, device=images.device)
        for n, last in enumerate((*network.exits, network.backbone.num_blocks - 1)):
            keep_BM = inside_B.unsqueeze(1).repeat(1, last + 1 - first)
            x, first = self.kernels.advance(x, keep_BM, first), last + 1
            inside_B = visit(n, network.head(n, {"x": x}), inside_B)

    def every_exit(self, images: Tensor) -> Tensor:
        """Compute the logits (B, N, C) of every exit for images (B, 3, H, W).

        Raises:
            ValueError: gradients are wanted of kernels.
        """
        if (found := self.by_kernels("exits", self._every_exit, images)) is not None:
            return found[0]
        with self.exactly():
            return self.network(images)

    def run_until(self, images: Tensor, leave: Leave, may_record: bool = False) -> tuple[Tensor, Tensor]:
        """Compute each image up to the exit where it leaves, as :func:`~policyskip.backbones.exits.run_until` does.

        With kernels, ``leave`` is asked about all images at every exit: about those that have left, with the logits
        with which they left. With ``dense``, every exit is computed for every image, and then one is chosen.

        Args:
            images: uint8 or float (B, 3, H, W); B may be 0.
            may_record: whether ``leave`` does the same on tensors each time, so that a CUDA graph can hold it.

        Returns: the logits (B, C) at the exit where each image left, and that exit, int64 (B,).

        Raises:
            ValueError: ``leave`` returned something other than bool, one for each image, or gradients are wanted.
        """

        def by_kernels(images: Tensor) -> Tensors:
            leaving = _Leaving(self.network.num_exits, leave)
            self._walk(images, leaving.visit)
            return leaving.logits_BC, leaving.exit_B

        if (found := self.by_kernels(leave if may_record else None, by_kernels, images)) is not None:
            logits_BC, exit_B = found
            return logits_BC, exit_B
        with self.exactly():
            if self.way != "dense" or not len(images):
                return run_until(self.network, images, leave)
            leaving, inside_B = _Leaving(self.network.num_exits, leave), images.new_ones(len(images), dtype=torch.bool)
            for n, logits_BC in enumerate(self.network(images).unbind(1)):
                inside_B = leaving.visit(n, logits_BC, inside_B)
            return leaving.logits_BC, leaving.exit_B


class _Leaving:
    """Keeps for each image the logits (B, C) at the exit where it left, and that exit, int64 (B,), on the device."""

    logits_BC: Tensor
    exit_B: Tensor

    def __init__(self, num_exits: int, leave: Leave) -> None:
        self.num_exits, self.leave = num_exits, leave

    def visit(self, n: int, logits_BC: Tensor, inside_B: Tensor) -> Tensor:
        """Let images leave at exit n; see :data:`Visit`."""
        if n == 0:
            self.logits_BC, self.exit_B = logits_BC, torch.full_like(inside_B, self.num_exits - 1, dtype=torch.int64)
        else:
            self.logits_BC = torch.where(inside_B.unsqueeze(1), logits_BC, self.logits_BC)
        if n == self.num_exits - 1:
            return inside_B
        rows = torch.arange(len(inside_B), device=inside_B.device)
        leaves_B = self.leave(n, self.logits_BC, rows)
        check_leaves(leaves_B, rows)
        self.exit_B = torch.where(inside_B & leaves_B, n, self.exit_B)
        return inside_B & ~leaves_B


def execution_of(
    network: Backbone | ExitNetwork, image_shape: tuple[int, int, int], how: How
) -> Execution | ExitExecution:
    """Make what executes a network with blocks or with exits.

    Raises:
        UserError: the network cannot be executed so.
    """
    kind = ExitExecution if isinstance(network, ExitNetwork) else Execution
    return kind(network, image_shape, *how)


def check_kernels(network: Backbone | ExitNetwork, image_shape: tuple[int, int, int], how: How) -> None:
    """Refuse kernels that were asked for where there can be none, before anything is learned or searched.

    Raises:
        UserError: saying why there can be none.
    """
    if how.way == "kernel":
        execution_of(network, image_shape, how)
