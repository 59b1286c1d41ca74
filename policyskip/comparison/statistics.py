"""Means with intervals, over seeds and over images, the Pareto front, and how far two runs agree.

Shapes: N images, K blocks or exits, B draws, P points.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit
from scipy.stats import rankdata

from policyskip.decisions import Decisions

DRAWS = 10_000
LEVEL = 0.95


def mean_and_half(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean over seeds and half the width of its 95 % interval by Student's t; None for a single seed."""
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2:
        return float(x.mean()), None
    quantile = stdtrit(len(x) - 1, 0.5 + LEVEL / 2)
    return float(x.mean()), float(quantile * x.std(ddof=1) / len(x) ** 0.5)


def bootstrap(value_N: NDArray[np.float64], draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of the mean over images, by resampling them with replacement.

    For differences between two runs on the same images pass the differences, image by image: that is what pairs them.
    How often each *value* is drawn is multinomial, and differences of answers have few values, so no image is touched.
    """
    values, counts = np.unique(np.round(value_N, 12), return_counts=True)
    drawn_BV = np.random.default_rng(seed).multinomial(len(value_N), counts / len(value_N), size=draws)
    low, high = np.quantile(drawn_BV @ values / len(value_N), [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return float(low), float(high)


def pareto(macs_P: Sequence[float], accuracy_P: Sequence[float]) -> list[int]:
    """Places of the points that no other is at least as good as in both, and better in one; the cheapest first."""
    front: list[int] = []
    for place in sorted(range(len(macs_P)), key=lambda p: (macs_P[p], -accuracy_P[p])):
        if not front or accuracy_P[place] > accuracy_P[front[-1]]:
            front.append(place)
    return front


def same_answers(a: Decisions, b: Decisions) -> float:
    """Share of the images that get the same answer, right or wrong."""
    return float((a.prediction_N == b.prediction_N).double().mean())


def same_choices(a: Decisions, b: Decisions) -> float | None:
    """Share of (image, block) pairs decided alike, or of images that leave at the same exit; None if their choices are
    not of one kind."""
    if a.kind != b.kind or a.ran_NK.shape != b.ran_NK.shape:
        return None
    if a.kind == "exits":
        return float((a.exit_N == b.exit_N).double().mean())
    return float((a.ran_NK == b.ran_NK).double().mean())


def cost_ranks(decisions: Decisions) -> NDArray[np.float64] | None:
    """Ranks of the images by cost, standardised, so that the mean product of two is Spearman's correlation; None if all
    cost the same."""
    rank_N = np.asarray(rankdata(decisions.macs_N.numpy()), dtype=np.float64)
    spread = float(rank_N.std())
    return None if spread == 0 else (rank_N - rank_N.mean()) / spread


def mean_over_pairs(values: Sequence[float | None]) -> float | None:
    """Their mean; None if any is missing or there are none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None
