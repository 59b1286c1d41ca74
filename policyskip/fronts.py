"""Points of cost (MACs) and accuracy are compared here: which of them are worth having.

All functions take P costs and the P accuracies that belong to them.
"""

from __future__ import annotations

from collections.abc import Sequence


def pareto(macs: Sequence[float], accuracy: Sequence[float]) -> list[int]:
    """Return the indices of the points on the Pareto front, the cheapest first.

    A point is on the front if it is more accurate than every cheaper one and than every other of its cost; of points
    equal in both, the first is.
    """
    front: list[int] = []
    for i in sorted(range(len(macs)), key=lambda i: (macs[i], -accuracy[i])):
        if not front or accuracy[i] > accuracy[front[-1]]:
            front.append(i)
    return front


def concave_hull(macs: Sequence[float], accuracy: Sequence[float]) -> list[int]:
    """Return the indices of the points on the upper concave hull, the cheapest first, up to the highest accuracy."""

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


def knee(macs: Sequence[float], accuracy: Sequence[float]) -> int:
    """Return the index of the point of a Pareto front where computing more stops paying.

    That is the point farthest above the line between the front's two ends, with accuracy and cost scaled to [0, 1]
    between these ends, so that the units do not matter (Satopää et al. 2011; BranchyNet's authors chose the knee by
    eye). Of several, the cheapest; 0 for a front of one or two points.

    Args:
        macs, accuracy: of a front as :func:`pareto` orders it, both rising.
    """
    if len(macs) < 2:
        return 0

    def height(i: int) -> float:
        accuracy_gained = (accuracy[i] - accuracy[0]) / (accuracy[-1] - accuracy[0])
        return accuracy_gained - (macs[i] - macs[0]) / (macs[-1] - macs[0])

    return max(range(len(macs)), key=height)
