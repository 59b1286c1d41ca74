"""The sizes of the tiles that the output of a convolution is cut into, one tile a program, and which is chosen when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Tiling(NamedTuple):
    """How a convolution is cut into tiles.

    Attributes:
        pixels: output pixels of a tile, a power of two.
        channels: output channels of a tile, a power of two.
        inputs: most input channels of one step of the product, a power of two.
        warps: groups of 32 threads that share a tile.
        stages: steps whose operands are on their way at a time.
        programs: how many programs have to share the registers of a multiprocessor from compute capability 9.0 on. With
            more of them, more memory is on its way; with fewer, the compiler need not spill.
        speed: the share of the largest tile's speed that a multiprocessor reaches with this one while it has work.
    """

    pixels: int
    channels: int
    inputs: int
    warps: int
    stages: int
    programs: int
    speed: float


# Each fits into 99 KiB of shared memory, so that at least two programs share a multiprocessor of an H100 or A100.
# `speed` is reasoned from the bytes that a tile reads for each product, and not yet measured.
TILINGS: dict[str, tuple[Tiling, ...]] = {
    "half": (  # float16, bfloat16
        Tiling(128, 128, 64, 8, 3, 2, 1.0),
        Tiling(128, 64, 64, 8, 3, 3, 0.8),
        Tiling(64, 64, 64, 4, 4, 2, 0.65),
        Tiling(64, 32, 64, 4, 5, 2, 0.4),
    ),
    "tf32": (
        Tiling(128, 128, 32, 8, 3, 2, 1.0),
        Tiling(128, 64, 32, 4, 3, 2, 0.8),
        Tiling(64, 64, 32, 4, 4, 2, 0.65),
        Tiling(64, 32, 32, 4, 5, 2, 0.4),
    ),
    "ieee": (Tiling(64, 64, 32, 8, 2, 2, 1.0), Tiling(64, 32, 32, 8, 2, 2, 0.8)),  # float32 without tensor cores
}
EXPECTED_SHARE = 0.5
"""The share of the images that is expected to keep a block; only the choice of tiles depends on it."""


def choose(tilings: Sequence[Tiling], pixels: float, channels: int, multiprocessors: int) -> Tiling:
    """Choose the tiling whose slowest multiprocessor ends first.

    Tiles are dealt out evenly, so the slowest has the number of tiles divided by that of multiprocessors, rounded up.

    Args:
        pixels: output pixels of all images that are expected to keep the block.
        channels: output channels.
    """

    def time(tiling: Tiling) -> float:
        tiles = -(-pixels // tiling.pixels) * -(-channels // tiling.channels)
        return -(-tiles // multiprocessors) * tiling.pixels * tiling.channels / tiling.speed

    return min(tilings, key=time)


def step_size(inputs: int, most: int) -> int:
    """Return how many input channels a step takes: the largest power of two, from 16 to ``most``, that fills the
    steps of ``inputs`` channels best. Tensor cores need 16."""
    if inputs <= 16:
        return 16
    sizes = [size for size in (32, 64, 128) if size <= most]
    return min(sizes, key=lambda size: (-(-inputs // size) * size, -size))
