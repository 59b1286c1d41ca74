"""Keep-sets to try are proposed here by rules that know the network's stages and nothing of the images.

Shapes: K blocks, P sets.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from policyskip.static_front.scoring import Keep

MOST_SPREAD_SIZES = 60
"""Evenly spread sets of every size are tried up to so many blocks; of deeper networks, as many sizes."""


def spread_set(K: int, count: int) -> Keep:
    """Return the keep-set of ``count`` of K blocks at even distances: those at ⌊i·K/count⌋, from the first on."""
    kept = {i * K // count for i in range(count)}
    return tuple(k in kept for k in range(K))


def spread_sets(K: int) -> list[Keep]:
    """Return evenly spread sets from no block to all K, in an order in which the first few already cover all sizes."""
    sizes = sorted({round(i * K / min(K, MOST_SPREAD_SIZES)) for i in range(min(K, MOST_SPREAD_SIZES) + 1)})
    ordered, step = [K, 0], 1
    while step < len(sizes):
        step *= 2
        ordered += [sizes[i * (len(sizes) - 1) // step] for i in range(1, step, 2)]
    return [spread_set(K, size) for size in dict.fromkeys([*ordered, *sizes])]


def stage_wise(stages: Sequence[int], counts: Sequence[int], phase: float = 0.0) -> Keep:
    """Return the set that keeps ``counts`` blocks of each stage, evenly spread within it.

    Args:
        stages: number of blocks in each stage.
        counts: number of blocks to keep of each stage.
        phase: in [0, 1); 0 keeps the first block of each stage of which any block is kept.
    """
    keep: list[bool] = []
    for size, count in zip(stages, counts, strict=True):
        kept = {int((i + phase) * size / count) for i in range(count)}
        keep += [k in kept for k in range(size)]
    return tuple(keep)


def random_stage_wise(stages: Sequence[int], count: int, draw: random.Random) -> Keep:
    """Draw a set of ``count`` blocks that is evenly spread within each stage; the stages' shares are drawn."""
    weights = [size * draw.uniform(0.4, 1.6) for size in stages]
    counts = [min(size, int(count * weight / sum(weights))) for size, weight in zip(stages, weights, strict=True)]
    while sum(counts) < count:
        open_stages = [i for i, size in enumerate(stages) if counts[i] < size]
        counts[draw.choice(open_stages)] += 1
    return stage_wise(stages, counts, draw.choice([0.0, 0.0, draw.random()]))


def random_set(weight_K: Sequence[float], count: int, draw: random.Random) -> Keep:
    """Draw a set of ``count`` of K blocks; a block of a larger weight (above 0) is drawn more often."""
    K = len(weight_K)
    ranked = sorted(range(K), key=lambda k: draw.random() ** (1 / weight_K[k]), reverse=True)
    kept = set(ranked[:count])
    return tuple(k in kept for k in range(K))


def neighbours(keep_K: Tensor) -> Tensor:
    """Return all sets, bool (P, K), that keep one block more than ``keep_K``, one less, or another in place of one."""
    K = len(keep_K)
    flip_KK = torch.eye(K, dtype=torch.bool)
    kept, dropped = keep_K.nonzero().squeeze(1), (~keep_K).nonzero().squeeze(1)
    swap_PK = (flip_KK[kept].unsqueeze(1) | flip_KK[dropped]).view(-1, K)
    return keep_K ^ torch.cat([flip_KK, swap_PK])
