"""The device that a run computes on."""

from __future__ import annotations

import torch

from policyskip.errors import UserError
from policyskip.parallel import processes


def find_device(name: str) -> torch.device:
    """Find the device ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``cuda:N``.

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
    if processes.world() > 1 and device.type == "cuda":
        if device.index is not None:
            raise UserError(f"{name} is one GPU, and each of {processes.world()} processes needs its own: say cuda")
        device = torch.device("cuda", processes.local_rank())
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device {device} is not there: this machine has {torch.cuda.device_count()} CUDA devices; say device=cpu"
        )
    torch.backends.cudnn.deterministic = True  # one seed, one result
    return device
