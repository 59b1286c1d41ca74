"""Measures of how far two runs agree on the same images: in their answers, in their choices, and in what they spend.

Shapes: N images, K blocks or exits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from policyskip.evaluation.decisions import Decisions


def same_answers(a: Decisions, b: Decisions) -> float:
    """Return the share of the images that get the same answer from both runs, right or wrong."""
    return float((a.prediction_N == b.prediction_N).double().mean())


def same_choices(a: Decisions, b: Decisions) -> float | None:
    """Return the share of (image, block) pairs for which both runs decide alike.

    Where images leave at exits, it is the share of the images that leave at the same exit in both runs.

    Returns: a share in [0, 1]; None if one run chooses blocks and the other exits, or not the same number of them.
    """
    if a.kind != b.kind or a.ran_NK.shape != b.ran_NK.shape:
        return None
    if a.kind == "exits":
        return float((a.exit_N == b.exit_N).double().mean())
    return float((a.ran_NK == b.ran_NK).double().mean())


def cost_ranks(decisions: Decisions) -> NDArray[np.float64] | None:
    """Rank the images by cost, with mean 0 and variance 1 over the images.

    The mean product of two runs' ranks is Spearman's correlation of their costs.

    Returns: float64 (N,); None if all images cost the same.
    """
    rank_N = np.asarray(rankdata(decisions.macs_N.numpy()), dtype=np.float64)
    spread = float(rank_N.std())
    return None if spread == 0 else (rank_N - rank_N.mean()) / spread


def mean_over_pairs(values: Sequence[float | None]) -> float | None:
    """Return the mean of one value for each pair of runs; None if any value is None, or there are no pairs."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None
