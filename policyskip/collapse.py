"""Policies that have stopped deciding: one decision for all images, all blocks, none, one exit.

Shapes: N images, K blocks.
"""

from __future__ import annotations

from torch import Tensor


def block_warnings(keep_NK: Tensor) -> list[str]:
    """What a run is warned of whose learned policy decides keep, bool (N, K), for N images; nothing for one image."""
    N, K = keep_NK.shape
    if N < 2:
        return []
    if keep_NK.all():
        return [f"the policy has collapsed: all {K} blocks run for every image, which is the full network"]
    if not keep_NK.any():
        return [f"the policy has collapsed: none of the {K} blocks runs for any image"]
    if (keep_NK == keep_NK[0]).all():
        blocks = "".join("01"[kept] for kept in keep_NK[0].tolist())
        return [f"the policy has collapsed: it decides the same for every image, {blocks}, as a fixed choice would"]
    return []


def exit_warnings(exit_N: Tensor, num_exits: int) -> list[str]:
    """The same for policies that send N images to exits, int64 (N,), of which there are ``num_exits``."""
    if len(exit_N) < 2 or num_exits < 2 or not (exit_N == exit_N[0]).all():
        return []
    place = "the last exit" if int(exit_N[0]) == num_exits - 1 else f"exit {int(exit_N[0])}"
    return [f"the policy has collapsed: every image leaves at {place}"]
