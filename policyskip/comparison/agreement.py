"""How far two runs agree: the same answers, the same choices, the same spending.

Shapes: N images, K blocks or exits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from policyskip.evaluation.decisions import Decisions


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
