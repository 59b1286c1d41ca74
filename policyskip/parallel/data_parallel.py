"""Data-parallel learning: several processes share a batch, and all of them come to the same weights.

The result is that of one process with the whole batch, to rounding: torch's DistributedDataParallel averages the
gradients, batch normalisation takes its statistics from the images of all processes, and every process draws the random
numbers of the whole batch and uses its slice of them (``processes.this_process_slice``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from policyskip.errors import UserError
from policyskip.parallel import processes
from policyskip.parallel.batch_norm import WholeBatchNorm2d


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function returns for the arguments: the forward pass in a run of one process."""
    return function(*arguments)


class Divisible:
    """A learner that can learn in several processes.

    Attributes:
        forward_through_ddp: calls a function with arguments and returns its result. A learner makes its forward pass
            through it; in a run of several processes the gradients of that result are then averaged over them.
        may_skip_parameters: whether a forward pass may leave out some of the learner's parameters.
    """

    forward_through_ddp: Callable[..., Any] = staticmethod(_call)
    may_skip_parameters = False

    @property
    def trainable_modules(self) -> list[nn.Module]:
        """Return the modules whose parameters the learner updates."""
        raise NotImplementedError


def divide(learner: Any, source: Any) -> None:
    """Make a learner and its source of images work on this process's slice of every batch.

    In a run of one process nothing changes.

    Args:
        learner: a :class:`Divisible`; in a run of one process any learner.
        source: the feed or environment that it learns from.

    Raises:
        UserError: the batch cannot be divided evenly, or the network has a layer whose results would change.
    """
    if processes.world() == 1:
        return
    source.divide()
    networks = nn.ModuleList(learner.trainable_modules)
    for module in networks.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = WholeBatchNorm2d  # keeps parameters, buffers and their names
        elif isinstance(module, nn.modules.batchnorm._BatchNorm | nn.modules.dropout._DropoutNd):
            raise UserError(
                f"a network with {type(module).__name__} learns in one process, since its results depend on how a "
                "batch is divided; start it without torchrun"
            )
    learner.forward_through_ddp = DistributedDataParallel(
        _Pass(networks), find_unused_parameters=learner.may_skip_parameters
    )


class _Pass(nn.Module):
    """The module that DistributedDataParallel wraps: its parameters are the networks', its forward calls a function."""

    def __init__(self, networks: nn.ModuleList) -> None:
        super().__init__()
        self.networks = networks

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)
