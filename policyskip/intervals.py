"""The 95 % intervals of means are computed here: by Student's t over seeds, or by bootstrap over images.

Shapes: N images, V different values, D draws of the bootstrap.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

LEVEL = 0.95
"""How often an interval holds the mean that it is an interval of."""
DRAWS = 10_000
"""How often the bootstrap draws the images anew."""


def mean_and_half_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean over seeds, and half the width of its 95 % interval by Student's t.

    Args:
        values: one number for each seed.

    Returns: two floats; the second is None for a single seed, which has no interval.
    """
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2:
        return float(x.mean()), None
    quantile = stdtrit(len(x) - 1, 0.5 + LEVEL / 2)
    return float(x.mean()), float(quantile * x.std(ddof=1) / len(x) ** 0.5)


def bootstrap(value_N: NDArray[np.float64], draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """Return the ends of the 95 % percentile interval of a mean over images, which are drawn with replacement.

    For a difference between two runs on the same images, pass the differences image by image: this pairs the images.
    Few different values occur among such differences, so it is counted how often each *value* is drawn, which is
    multinomial; the images themselves are not drawn.

    Args:
        value_N: float64 (N,), one number for each image.
        draws: how often the N images are drawn.
        seed: of the draws.
    """
    value_V, count_V = np.unique(np.round(value_N, 12), return_counts=True)
    count_DV = np.random.default_rng(seed).multinomial(len(value_N), count_V / len(value_N), size=draws)
    low, high = np.quantile(count_DV @ value_V / len(value_N), [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return float(low), float(high)
