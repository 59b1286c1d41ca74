"""A Triton kernel that finds in which order images are computed, so that no multiprocessor is left with a long one.

Shapes: R rows (an image under one decision), N of them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _costs(
    keep: tl.tensor,
    costs: tl.tensor,
    row_N: tl.tensor,
    rows: tl.tensor,
    keep_row: tl.tensor,
    keep_block: tl.tensor,
    blocks: tl.tensor,
) -> tl.tensor:
    """Compute the sums of the costs of the blocks that rows keep, int32 (N,)."""
    total = row_N * 0
    for start in range(0, blocks, 64):
        k = start + tl.arange(0, 64)
        at = row_N.to(tl.int64)[:, None] * keep_row + k[None, :] * keep_block
        kept = tl.load(keep + at, mask=(row_N < rows)[:, None] & (k < blocks)[None, :], other=0) != 0
        total += tl.sum(tl.where(kept, tl.load(costs + k, mask=k < blocks, other=0)[None, :], 0), 1)
    return total


@triton.jit(
    do_not_specialize=["rows", "keep_row", "keep_block", "blocks", "together", "turns"],
    do_not_specialize_on_alignment=["keep", "costs"],
)
def longest_first(
    order: tl.tensor,
    keep: tl.tensor,
    costs: tl.tensor,
    rows: tl.tensor,
    keep_row: tl.tensor,
    keep_block: tl.tensor,
    blocks: tl.tensor,
    together: tl.tensor,
    turns: tl.tensor,
    MINE: tl.constexpr,
    OTHERS: tl.constexpr,
) -> None:
    """Write the rows in the order in which programs compute them, the costliest first: int32 order (rows,).

    A multiprocessor that is free takes the next row, so that all end at about the same time. Where a multiprocessor
    runs several programs at once, its second one begins with the first: then every other group of ``together`` rows
    of the first ``turns`` groups is turned round, and the costliest row shares with the cheapest.

    Args:
        keep: uint8 (rows, blocks) with these strides.
        costs: int32 (blocks,).
    """
    mine = tl.program_id(0) * MINE + tl.arange(0, MINE)
    cost = _costs(keep, costs, mine, rows, keep_row, keep_block, blocks)
    rank = mine * 0
    for start in range(0, rows, OTHERS):
        other = start + tl.arange(0, OTHERS)
        theirs = _costs(keep, costs, other, rows, keep_row, keep_block, blocks)
        same = (theirs[None, :] == cost[:, None]) & (other[None, :] < mine[:, None])
        before = ((theirs[None, :] > cost[:, None]) | same) & (other < rows)[None, :]
        rank += tl.sum(before.to(tl.int32), 1)
    group = rank // together
    size = tl.minimum(together, rows - group * together)
    turned = group * together + size - 1 - rank % together
    at = tl.where((group % 2 == 1) & (group < turns), turned, rank)
    tl.store(order + at, mine, mask=mine < rows)
