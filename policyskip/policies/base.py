"""The contract of a policy, which decides from an observation.

Shapes: B images, K blocks, C classes, H W pixels.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Self

from torch import Tensor, nn

from policyskip.errors import UserError
from policyskip.execution.ways import Execution


class Policy(nn.Module, ABC):
    """A policy decides from an observation; it is what a run deploys.

    A subclass defines :meth:`decide`. A deployed policy is built again from its constructor's arguments, which
    :meth:`spec` returns.
    """

    _constructed_with: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        policy = super().__new__(cls)
        object.__setattr__(policy, "_constructed_with", (args, kwargs))  # before nn.Module's own attributes are there
        return policy

    @abstractmethod
    def decide(self, observation: Tensor) -> Tensor:
        """Decide greedily for an environment's observation: for images uint8 (B, 3, H, W), bool (B, K)."""

    def run(
        self, execution: Execution, images: Tensor, break_even_K: Sequence[float] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Decide for images and classify them.

        Args:
            execution: executes the network.
            images: uint8 (B, 3, H, W).
            break_even_K: see :func:`~policyskip.backbones.execution.sparse`.

        Returns: logits float (B, C), and which blocks ran, bool (B, K).
        """
        keep_BK = self.decide(images)
        return execution.logits(images, keep_BK, break_even_K), keep_BK

    def spec(self) -> dict[str, Any]:
        """Return the arguments that build the policy again, by default its constructor's. JSON must be able to hold
        them."""
        args, kwargs = self._constructed_with
        parameters = list(inspect.signature(type(self).__init__).parameters)[1:]
        return {**dict(zip(parameters, args)), **kwargs}


def taken_by(policy: Policy, execution: Execution) -> Any:
    """Return what a policy's ``run`` takes first: an execution, or, if it calls it ``backbone``, as before there were
    executions, the network, whose images it gathers by itself.

    Raises:
        UserError: it takes the network, and kernels or ``dense`` were asked for.
    """
    if "backbone" not in inspect.signature(policy.run).parameters:
        return execution
    if execution.asked_way in ("kernel", "dense"):
        name, way = type(policy).__name__, execution.asked_way
        raise UserError(f"{name}.run takes a backbone and no execution, so execution={way} has no effect; leave it out")
    return execution.network
