"""Numbers that go wrong are caught before anything is learned from them, or saved."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from policyskip.errors import UserError


class NotFiniteError(UserError):
    """A NaN or an infinity where a number was needed."""


def check_finite(learner: str, update: int, **found: Tensor) -> None:
    """Stop before an update that would be made from non-finite numbers.

    Args:
        learner: its name.
        update: its number, counted from 1.
        found: float tensors of any shape, by what they are called.

    Raises:
        NotFiniteError: naming the first that is not finite, the learner and the update.
    """
    for name, values in found.items():
        bad = values.detach()[~torch.isfinite(values.detach())]
        if len(bad):
            count = f"{len(bad)} of {values.numel()} values, such as {bad[0]}" if values.dim() else f"{bad[0]}"
            raise NotFiniteError(f"{learner} stops before update {update}: its {name.replace('_', ' ')}: {count}")


def check_gradients(learner: str, update: int, optimizer: torch.optim.Optimizer) -> None:
    """The same for the gradients that an optimizer is about to follow."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    gradients = [gradient for gradient in gradients if gradient.numel()]
    # The largest magnitude of each: one number that is non-finite if any of its numbers is, and cannot overflow.
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(gradients, torch.inf)]) if gradients else None
    if norms is not None:
        check_finite(learner, update, largest_gradients=norms)


def find_nonfinite(state: Any) -> str | None:
    """Where in nested dictionaries and lists the first non-finite float tensor is, as ``a.b.c``; None: nowhere."""
    return next((place.removeprefix(".") for place, t in _tensors(state, "") if not torch.isfinite(t).all()), None)


def _tensors(state: Any, place: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(state, Tensor):
        if state.is_floating_point():
            yield place, state
    elif isinstance(state, dict | list | tuple):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from _tensors(value, f"{place}.{key}")
