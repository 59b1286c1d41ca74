"""The one table of how the stage kernels divide the work of an image, by the number of images and the GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tiling:
    """How the kernels divide the work of an image; a benchmark finds out which way is fastest.

    All give the same bits, because none changes the order of sums.

    Args:
        warps: warps of a program, for the first, second, third … stage, the last for all that follow. In one launch,
            the first of them.
        sums: float32 sums that a thread holds in registers: with the warps, they say how many pixels a tile has.
        ahead: whether the next product's operands are loaded into registers while one is computed.
        one_launch: whether the whole network is one launch, or each stage its own.
        resident: programs that a multiprocessor runs at once (by registers and shared memory), for their order.
    """

    warps: tuple[int, ...]
    sums: int = 32
    ahead: bool = False
    one_launch: bool = False
    resident: int = 1


# What a measurement has to decide: up to how many rows a multiprocessor, an image has a whole multiprocessor, whose
# registers 16 warps fill. That is in one launch: with a launch a stage, each would wait for its longest image, which is
# about as long as the others only if there are many. With many, programs of 8 and 4 warps use the pauses of each other.
TILINGS = (
    (4.0, Tiling(warps=(16,), ahead=True, one_launch=True)),
    (float("inf"), Tiling(warps=(8, 8, 4), resident=2)),
)
# Before compute capability 9.0, products take their operands from registers, of which less are left for sums.
OLDER = (
    (4.0, Tiling(warps=(8,), sums=16, one_launch=True)),
    (float("inf"), Tiling(warps=(8,), sums=16, resident=2)),
)
EXACT = ((float("inf"), Tiling(warps=(8,), sums=8, resident=2)),)
"""Without tensor cores, a thread needs its registers for the entries of products."""


def tilings_for(device: torch.device, exact: bool) -> tuple[tuple[float, Tiling], ...]:
    """Return how many rows a multiprocessor, at most, are computed in which way on a device."""
    if exact:
        return EXACT
    older = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] not in (9, 10)
    return OLDER if older else TILINGS
