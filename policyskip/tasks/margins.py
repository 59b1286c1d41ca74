"""By how much deciding per image is better than a fixed choice, and whether that is more than chance.

Shapes: N images.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def half_interval(difference_N: Tensor) -> float | None:
    """Half of the 95 % interval of a mean over N images (normal approximation); None for one image, which has none."""
    N = len(difference_N)
    return 1.96 * difference_N.std().item() / N**0.5 if N > 1 else None


def verdict_on(summary: dict[str, Any]) -> tuple[str, str]:
    """Whether deciding per image pays against a fixed choice, and by how many points, as text."""
    margin, half = 100 * summary["test/static_margin"], summary["test/static_margin_ci95"]
    if half is None:
        return "cannot be judged by one image", f"{margin:+.2f} ± –"
    half *= 100
    verdict = "pays" if margin > half else "does not pay" if margin < -half else "makes no clear difference"
    return verdict, f"{margin:+.2f} ± {half:.2f}"
