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
MOST_COUNTS = 10_000_000
"""The most numbers of a table of draws and values that is in memory at once."""


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


def bootstrap(
    value_N: NDArray[np.float64],
    draws: int = DRAWS,
    seed: int = 0,
    group_N: NDArray[np.int64] | None = None,
) -> tuple[float, float]:
    """Return the ends of the 95 % percentile interval of a mean over images, which are drawn with replacement.

    For a difference between two runs on the same images, pass the differences image by image: this pairs the images.
    Groups are drawn instead of images where images belong together, and the mean is over the images of those drawn.

    Few different values occur among such differences, so it is counted how often each *value* is drawn, which is
    multinomial; the images themselves are not drawn. Of groups, a value is the sum and the number of its images.

    Args:
        value_N: float64 (N,), one number for each image.
        draws: how often the N images, or their groups, are drawn.
        seed: of the draws.
        group_N: int64 (N,), which images belong together; None: every image is its own group.
    """
    rng = np.random.default_rng(seed)
    value_N = np.round(value_N, 12)
    if group_N is None:
        value_V, count_V = np.unique(value_N, return_counts=True)
        count_DV = rng.multinomial(len(value_N), count_V / len(value_N), size=draws)
        mean_D = count_DV @ value_V / len(value_N)
    else:
        group_N = np.unique(group_N, return_inverse=True)[1]
        sum_G, images_G = np.bincount(group_N, value_N), np.bincount(group_N)
        pair_V2, count_V = np.unique(np.stack([np.round(sum_G, 10), images_G], 1), axis=0, return_counts=True)
        chance_V, rows = count_V / len(sum_G), max(1, MOST_COUNTS // len(count_V))
        counts = (rng.multinomial(len(sum_G), chance_V, size=min(rows, draws - d)) for d in range(0, draws, rows))
        sum_D2 = np.concatenate([count_DV @ pair_V2 for count_DV in counts])
        mean_D = sum_D2[:, 0] / sum_D2[:, 1]
    low, high = np.quantile(mean_D, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return float(low), float(high)
