"""Checks of numbers before anything is computed: a whole number, an ordinary tensor, neither NaN nor infinite."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policyskip.errors import UserError, in_one_line
from policyskip.parallel.deferred import answers_at_once, deferred_on, numbers_of
from policyskip.texts import one_line


class NotFiniteError(UserError):
    """An error that says that a number is NaN or infinite where it has to be finite."""


def plain_tensor(given: Any, name: str) -> Tensor:
    """Return numbers that a user gave as an ordinary tensor: dense, with a value for every element, and not complex.

    Args:
        given: a tensor, an array of numpy or what can be made one, a number, or a list of numbers.
        name: what the error calls it, such as "images".

    Raises:
        UserError: it is something else.
    """
    if not isinstance(given, Tensor):
        if not (isinstance(given, bool | int | float | list | tuple) or hasattr(given, "__array__")):
            raise UserError(f"{name} must be a tensor or an array of numbers, got {one_line(repr_of(given), 80)}")
        try:
            array = np.asarray(given)
            if min(array.strides, default=0) < 0:
                array = array.copy()  # torch takes no mirrored arrays
            given = torch.from_numpy(array) if array.flags.writeable else _of_read_only(array)
        except Exception as error:  # a stranger's array may raise anything
            raise UserError(f"{name} cannot be read as numbers: {one_line(in_one_line(error))}") from error
    if (kind := unusual(given)) is not None:
        raise UserError(f"{name} must be an ordinary dense tensor of real numbers, got a {kind} one")
    tensor: Tensor = given
    return tensor


def _of_read_only(array: np.ndarray) -> Tensor:
    """Return a tensor over an array that is read-only, such as a file mapped to memory; nobody may write into it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


def whole_number(name: str, given: Any, least: int, most: int | None = None) -> int:
    """Return a whole number that a user gave, of Python or numpy, as an int.

    Raises:
        UserError: it is something else, below ``least`` or above ``most``.
    """
    try:
        number = None if isinstance(given, bool | np.bool_) else operator.index(given)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        allowed = f"{least} or more" if most is None else f"from {least} to {most}"
        raise UserError(f"{name} must be a whole number, {allowed}, got {one_line(repr(given), 60)}")
    return number


def unusual(tensor: Tensor) -> str | None:
    """Return in a word what makes a tensor unusual: nested, sparse_coo, meta, quantized, complex; None if nothing."""
    kinds = {
        "nested": tensor.is_nested,
        str(tensor.layout).removeprefix("torch.").lstrip("_"): tensor.layout != torch.strided,
        "meta": tensor.is_meta,
        "quantized": tensor.is_quantized,
        "complex": tensor.is_complex(),
    }
    return next((kind for kind, applies in kinds.items() if applies), None)


def repr_of(value: Any) -> str:
    """Return a text or None as it is written, and the name of the type of any other value."""
    return repr(value) if value is None or isinstance(value, str) else type(value).__name__


def described(tensor: Tensor, of: str = "") -> str:
    """Return dtype and shape of a tensor, such as "float32 (2, 3)"; ``of`` stands between the two."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{of} {tuple(tensor.shape)}"


def check_finite(learner: str, update: int, **tensors: Tensor) -> None:
    """Stop a run before an update that would be made from NaN or infinite numbers.

    In an update on a GPU, which is not asked at once, such numbers are noted, and stop the run before it saves anything
    (see ``parallel/deferred.py``).

    Args:
        learner: its name.
        update: its number, counted from 1.
        tensors: float tensors of any shape; their keywords are the names that the error uses.

    Raises:
        NotFiniteError: a tensor holds such a number; the error names the first such tensor, the learner and the update.
    """
    device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
    if (deferred := deferred_on(device)) is not None:
        wrong = "held numbers that are not finite"
        deferred.note({f"{learner}: its {name.replace('_', ' ')} {wrong}": tensor for name, tensor in tensors.items()})
        return
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
    tensors = list(_float_tensors(state, ""))
    elsewhere = [x for _, x in tensors if x.numel() and not answers_at_once(x.device)]
    largest = torch._foreach_norm(elsewhere, torch.inf) if elsewhere else ()
    bad = {id(x) for x, norm in zip(elsewhere, numbers_of(largest)) if not math.isfinite(norm)}  # asked in one go
    for path, x in tensors:
        if id(x) in bad or (answers_at_once(x.device) and not torch.isfinite(x).all()):
            return path.removeprefix(".")
    return None


def _float_tensors(state: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the float tensors in nested dictionaries, lists and tuples, with the path to each behind ``path``."""
    if isinstance(state, Tensor):
        if state.is_floating_point():
            yield path, state
    elif isinstance(state, dict | list | tuple):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from _float_tensors(value, f"{path}.{key}")
