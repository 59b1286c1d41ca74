"""Torch's defaults, which a program of the user's may have set, are put aside while a policy is loaded or used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch


def on_cpu_by_default() -> Any:
    """Return a context in which tensors are made on the CPU where no device is said, whatever the default device is."""
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


@contextmanager
def usual_defaults() -> Iterator[None]:
    """Make tensors and layers on the CPU and in float32 inside, where nothing else is said."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with on_cpu_by_default():
            yield
    finally:
        torch.set_default_dtype(dtype)
