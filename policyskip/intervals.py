"""Intervals of means: by the normal approximation, by Student's t over seeds, and by the bootstrap over images.

Shapes: N images, B draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit
from torch import Tensor


def half_interval(difference_N: Tensor) -> float | None:
    """Half of the 95 % interval of a mean over N images (normal approximation); None for one image, which has none."""
    N = len(difference_N)
    return 1.96 * difference_N.std().item() / N**0.5 if N > 1 else None


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
