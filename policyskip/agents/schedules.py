"""Learning-rate schedules: each maps the finished fraction of the training to a fraction of the highest rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

ScheduleName = Literal["onecycle", "steps", "constant"]


def one_cycle(progress: float, warmup: float = 0.1) -> float:
    """Raise the rate linearly over the fraction ``warmup``, then lower it to 0 along a cosine (Smith 2018)."""
    if progress < warmup:
        return max(progress, 0.01) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


def steps(progress: float) -> float:
    """Divide the rate by 10 at half of the training and again at three quarters (He et al. 2016; Huang et al. 2018)."""
    return 1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01


def constant(progress: float) -> float:
    """Keep the highest rate."""
    return 1.0


SCHEDULES: dict[str, Callable[[float], float]] = {"onecycle": one_cycle, "steps": steps, "constant": constant}
