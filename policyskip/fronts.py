"""Points of accuracy against cost: the concave hull, the Pareto front, and the knee.

Shapes: P points.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def concave_hull(macs: Sequence[float], accuracy: Sequence[float]) -> list[int]:
    """Places of the points on the upper concave hull, by MACs, up to the highest accuracy."""

    def slope(i: int, j: int) -> float:
        return (accuracy[j] - accuracy[i]) / (macs[j] - macs[i])

    hull: list[int] = []
    for i in sorted(range(len(macs)), key=lambda i: (macs[i], accuracy[i])):
        while hull and accuracy[i] >= accuracy[hull[-1]] and macs[i] == macs[hull[-1]]:
            hull.pop()
        while len(hull) > 1 and slope(hull[-2], hull[-1]) <= slope(hull[-2], i):
            hull.pop()
        if not hull or accuracy[i] > accuracy[hull[-1]]:
            hull.append(i)
    return hull


def pareto(accuracy_P: Tensor, macs_P: Tensor) -> Tensor:
    """Index, int64, of the points that no other beats, by rising cost: each is more accurate than all cheaper ones.

    Of points equal in both, the first.
    """
    by_accuracy = accuracy_P.argsort(descending=True, stable=True)
    order = by_accuracy[macs_P[by_accuracy].argsort(stable=True)]
    accuracy = accuracy_P[order]
    best_before = torch.cat([accuracy.new_full((1,), -torch.inf), accuracy.cummax(0).values[:-1]])
    return order[accuracy > best_before]


def knee(accuracy_P: Tensor, macs_P: Tensor) -> int:
    """The place on a front where more computing stops paying: farthest above the line between the front's two ends.

    Accuracy and cost are scaled to [0, 1] between the ends, so that the units do not matter. BranchyNet's authors chose
    it by eye; the distance to the chord is the definition of Satopää et al. 2011. The first of equals; 0 for a front of
    one or two points.
    """
    if len(macs_P) < 2:
        return 0
    accuracy, macs = ((x - x[0]) / (x[-1] - x[0]) for x in (accuracy_P, macs_P))
    return int((accuracy - macs).argmax())


def comparison_pareto(macs_P: Sequence[float], accuracy_P: Sequence[float]) -> list[int]:
    """Places of the points that no other is at least as good as in both, and better in one; the cheapest first."""
    front: list[int] = []
    for place in sorted(range(len(macs_P)), key=lambda p: (macs_P[p], -accuracy_P[p])):
        if not front or accuracy_P[place] > accuracy_P[front[-1]]:
            front.append(place)
    return front
