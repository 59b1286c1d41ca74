"""A learner whose batch several processes share: every process sees its part, and all come to the same weights.

The result is that of one process with the whole batch, to rounding: gradients are averaged by torch's
DistributedDataParallel, batch normalisation takes its statistics from the images of all processes, and random numbers
are drawn for the whole batch everywhere, each process using its part (``processes.this_process_slice``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from policyskip.errors import UserError
from policyskip.parallel import processes
from policyskip.parallel.batch_norm import WholeBatchNorm2d


def _directly(call: Callable[..., Any], *arguments: Any) -> Any:
    return call(*arguments)


class Divisible:
    """A learner that can be divided.

    Attributes:
        through: calls a function that passes a batch through what learns. Gradients of what comes out are averaged over
            the processes, if there are several.
        skips: whether a pass may leave out parts of what learns.
    """

    forward_through_ddp: Callable[..., Any] = staticmethod(_directly)
    may_skip_parameters = False

    @property
    def trainable_modules(self) -> list[nn.Module]:
        """The modules that learn."""
        raise NotImplementedError


def divide(learner: Any, source: Any) -> None:
    """Let a learner and the feed or environment that it learns from be one of several processes' parts.

    Raises:
        UserError: the batch cannot be divided evenly, or the network cannot be divided.
    """
    if processes.world() == 1:
        return
    source.divide()
    networks = nn.ModuleList(learner.trainable_modules)
    for module in networks.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = WholeBatchNorm2d  # parameters, buffers and their names stay
        elif isinstance(module, nn.modules.batchnorm._BatchNorm | nn.modules.dropout._DropoutNd):
            raise UserError(
                f"a network with {type(module).__name__} learns in one process, since its results depend on how a "
                "batch is divided; start it without torchrun"
            )
    learner.forward_through_ddp = DistributedDataParallel(
        _Pass(networks), find_unused_parameters=learner.may_skip_parameters
    )


class _Pass(nn.Module):
    """What DistributedDataParallel is given: it watches over the networks, and calls whatever passes through them."""

    def __init__(self, networks: nn.ModuleList) -> None:
        super().__init__()
        self.networks = networks

    def forward(self, call: Callable[..., Any], *arguments: Any) -> Any:
        return call(*arguments)
