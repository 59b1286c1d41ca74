"""The device that a run computes on, and torch's defaults, which a user's program may have changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from policyskip.errors import UserError
from policyskip.parallel import processes


def find_device(name: str) -> torch.device:
    """Find the device of this process for a command, and let it compute the same for the same seed.

    Raises:
        UserError: no such device here.
    """
    device = device_named(name)
    if processes.world() > 1 and device.type == "cuda":
        if device.index is not None:
            raise UserError(f"{name} is one GPU, and each of {processes.world()} processes needs its own: say cuda")
        device = device_named(f"cuda:{processes.local_rank()}")
    torch.backends.cudnn.deterministic = True  # one seed, one result
    return device


def device_named(name: str) -> torch.device:
    """Return the device ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device {device} is not there: this machine has {torch.cuda.device_count()} CUDA devices; say device=cpu"
        )
    return device


@contextmanager
def usual_defaults() -> Iterator[None]:
    """Compute as if torch's default dtype and device were float32 and the CPU, whatever the user's program has set.

    It is a decorator too. Where nothing else was set, which is nearly always, it takes a few microseconds.
    """
    dtype = torch.get_default_dtype()
    if dtype is torch.float32 and torch.get_default_device().type == "cpu":
        yield
        return
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)
