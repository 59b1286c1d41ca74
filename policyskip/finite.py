"""Checks that stop a run when numbers are NaN or infinite, before it learns from them or saves them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from policyskip.errors import UserError


class NotFiniteError(UserError):
    """An error that says that a number is NaN or infinite where it has to be finite."""


def check_finite(learner: str, update: int, **tensors: Tensor) -> None:
    """Stop a run before an update that would be made from NaN or infinite numbers.

    Args:
        learner: its name.
        update: its number, counted from 1.
        tensors: float tensors of any shape; their keywords are the names that the error uses.

    Raises:
        NotFiniteError: a tensor holds such a number; the error names the first such tensor, the learner and the update.
    """
    for name, tensor in tensors.items():
        values = tensor.detach()
        bad = values[~torch.isfinite(values)]
        if len(bad):
            count = f"{len(bad)} of {values.numel()} values, such as {bad[0]}" if values.dim() else f"{bad[0]}"
            raise NotFiniteError(f"{learner} stops before update {update}: its {name.replace('_', ' ')}: {count}")


def check_gradients(learner: str, update: int, optimizer: torch.optim.Optimizer) -> None:
    """Stop a run before an optimizer follows gradients that are NaN or infinite.

    Args:
        learner, update: as in :func:`check_finite`.
        optimizer: its parameters' gradients are checked; those that are None are left out.

    Raises:
        NotFiniteError: a gradient holds such a number.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    gradients = [gradient for gradient in gradients if gradient.numel()]
    # The largest magnitude in each gradient: it is NaN or infinite if any number in it is, and it cannot overflow.
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(gradients, torch.inf)]) if gradients else None
    if norms is not None:
        check_finite(learner, update, largest_gradients=norms)


def find_nonfinite(state: Any) -> str | None:
    """Return the path of the first float tensor that holds a NaN or an infinity; None if there is none.

    Args:
        state: nested dictionaries, lists and tuples, such as a state dict.

    Returns: keys and indices with dots between them, such as ``policy.0.weight``.
    """
    return next((path.removeprefix(".") for path, x in _float_tensors(state, "") if not torch.isfinite(x).all()), None)


def _float_tensors(state: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the float tensors in nested dictionaries, lists and tuples, with the path to each behind ``path``."""
    if isinstance(state, Tensor):
        if state.is_floating_point():
            yield path, state
    elif isinstance(state, dict | list | tuple):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from _float_tensors(value, f"{path}.{key}")
