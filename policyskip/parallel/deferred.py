"""In an update on a GPU nothing is asked of the GPU: figures and checks stay there until several updates are done.

A program that asks a GPU for a number waits until the GPU has done everything that it was given before, and meanwhile
the GPU is given nothing more to do. So the training loop lets updates keep their figures as tensors, and reads those of
many updates at once. On a CPU, and outside the training loop, everything is asked at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

Figure = float | Tensor
"""A number, or a tensor of one number, of shape (), which is still on the device."""

MOST_UPDATES = 100
"""The most updates whose figures and checks stay on the device: each is a small piece of the device's memory."""


class Deferred:
    """Holds what was to be checked in the updates since :meth:`first_problem` was last asked.

    Attributes:
        update: the number of the update under way, counted from 1.
    """

    def __init__(self) -> None:
        self.update = 0
        self._noted: list[tuple[str, Tensor]] = []

    @contextmanager
    def during(self, update: int) -> Iterator[None]:
        """Let checks and figures of the body, the update of this number, stay on a GPU."""
        self.update = update
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def note(self, tensors: Mapping[str, Tensor]) -> None:
        """Note the largest magnitude in each float tensor of any shape, by what is wrong if it is not finite."""
        values = {problem: tensor.detach() for problem, tensor in tensors.items() if tensor.numel()}
        if values:  # a largest magnitude is NaN or infinite if any number is, and it cannot overflow
            largest = torch._foreach_norm(list(values.values()), torch.inf)
            self._noted += [(f"{problem} in update {self.update}", norm) for problem, norm in zip(values, largest)]

    def first_problem(self) -> str | None:
        """Return what was wrong first since the last call, and in which update; None if nothing was."""
        noted, self._noted = self._noted, []
        numbers = numbers_of([norm for _, norm in noted])
        return next((problem for (problem, _), number in zip(noted, numbers) if not math.isfinite(number)), None)


_current: ContextVar[Deferred | None] = ContextVar("deferred", default=None)
"""Where the update under way notes its checks; None outside the training loop."""


def answers_at_once(device: torch.device) -> bool:
    """Return whether a number of a tensor on this device can be read without waiting for other work: on a CPU."""
    return device.type == "cpu"


def deferred_on(device: torch.device) -> Deferred | None:
    """Return where checks of tensors on this device are noted; None where they are to be made at once."""
    return None if answers_at_once(device) else _current.get()


def figure(value: Tensor) -> Figure:
    """Return a tensor of one number, of shape (), as a number, or as it is where a device is not asked at once."""
    number = value.detach()
    return number.item() if deferred_on(number.device) is None else number


def numbers_of(tensors: Sequence[Tensor]) -> list[float]:
    """Read tensors of one number each, of shape () and of any real dtype, from their device in one transfer.

    Returns: exactly the numbers that ``item()`` of each would give, as floats.
    """
    kinds: dict[torch.device, dict[torch.dtype, list[int]]] = {}
    for place, tensor in enumerate(tensors):
        kinds.setdefault(tensor.device, {}).setdefault(tensor.dtype, []).append(place)
    numbers = [0.0] * len(tensors)
    for by_dtype in kinds.values():
        places = [place for group in by_dtype.values() for place in group]
        parts = [torch.stack([tensors[place] for place in group]).double() for group in by_dtype.values()]
        for place, number in zip(places, torch.cat(parts).tolist(), strict=True):
            numbers[place] = number
    return numbers


def fetched(window: Sequence[Mapping[str, Figure]]) -> list[dict[str, float]]:
    """Read the figures of several updates from the device in one transfer; those that are numbers stay."""
    waiting = [value for figures in window for value in figures.values() if isinstance(value, Tensor)]
    numbers = iter(numbers_of(waiting))
    return [
        {key: next(numbers) if isinstance(value, Tensor) else value for key, value in figures.items()}
        for figures in window
    ]


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on another device; a GPU gets one of the CPU in its turn, and nothing waits for that."""
    if device.type != "cuda" or tensor.device.type != "cpu" or not tensor.numel():
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # a copy from other memory would wait for the GPU
