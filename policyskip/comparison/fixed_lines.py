"""The fixed choices over each network of a group: what they cost, and how accurate they are on the test images."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from policyskip.comparison.collect import LONGEST_NAME, Result
from policyskip.comparison.groups import frozen_hash, network_name
from policyskip.comparison.rows import Row
from policyskip.fronts import concave_hull
from policyskip.texts import one_line

FIXED = "fixed choices, a line for each network"
"""What the legends of pictures call the lines."""
BEST_FIXED = "the best of these lines at each cost, mixed"
"""What the legends of pictures call the hull of all lines."""
MANY_POINTS = 24
"""A line of more points is drawn without a marker for each."""
Point = tuple[float, float]
"""MACs and test accuracy."""


@dataclass(frozen=True)
class FixedLine:
    """Holds the fixed choices over one network, the cheapest first; between neighbours lie the mixtures of two.

    Attributes:
        network: a key of the network (see :func:`network_of`).
        name: the network's name, for people; no other line of the group has it.
        points: MACs and test accuracy of each choice.
        on_validation: whether the choices were made on validation images. Those of older runs are the best on the test
            images themselves.
    """

    network: tuple[str, ...]
    name: str
    points: list[Point]
    on_validation: bool

    def at(self, macs: float) -> Point | None:
        """Return the choice that costs ``macs``, or the dearest if all are cheaper; None if all are dearer."""
        cheapest, dearest = self.points[0][0], self.points[-1][0]
        if macs < cheapest:
            return None
        return min(macs, dearest), _accuracies_at([macs], self.points)[0]

    def reaching(self, accuracy: float) -> Point | None:
        """Return the cheapest choice that is as accurate as ``accuracy``; None if none is."""
        if self.points[0][1] >= accuracy:
            return self.points[0]
        for (low, before), (high, after) in pairwise(self.points):
            if before < accuracy <= after:
                return low + (high - low) * (accuracy - before) / (after - before), accuracy
        return None


def network_of(row: Row) -> tuple[str, ...]:
    """Return a key of a row's network: its name and its weights' hash, or its name and the row that trained it."""
    name, hashes = network_name(row.results[0]), {frozen_hash(result) for result in row.results} - {""}
    return (name, min(hashes)) if hashes else (name, "", row.label)


def fixed_lines(rows: Sequence[Row]) -> list[FixedLine]:
    """Return a line for each network of which a run holds fixed choices, sorted by name.

    The choices of runs with a verdict were made on validation images. Where there are none, the line joins the best
    choices on the test images themselves, of the luckiest seed.
    """
    by_network: dict[tuple[str, ...], list[Result]] = defaultdict(list)
    for row in rows:
        by_network[network_of(row)] += [result for result in row.results if _choices_of(result)]
    by_network = {network: results for network, results in by_network.items() if results}
    names = Counter(network[0] for network in by_network)
    lines = []
    for network, results in sorted(by_network.items()):
        name = network[0] if names[network[0]] == 1 or network[1] else f"{network[0]} as {network[2]} trained it"
        judged = [_choices_of(result) for result in results if result.figure("verdict") is not None]
        points = _mean_line(judged) if judged else _hull([point for result in results for point in _choices_of(result)])
        lines.append(FixedLine(network, one_line(name, LONGEST_NAME), points, bool(judged)))
    return lines


def best_of_lines(lines: Sequence[FixedLine]) -> list[tuple[float, float, str]]:
    """Return the best fixed choices over any of the networks: MACs, test accuracy, and the network's name.

    Between neighbours lie the mixtures of two. Which network is best at a cost is seen on the test images themselves.
    """
    points = sorted((*point, line.name) for line in lines for point in line.points)
    return [points[n] for n in concave_hull([p[0] for p in points], [p[1] for p in points])]


def about_lines(lines: Sequence[FixedLine]) -> str:
    """Say in sentences what the lines of a picture are."""
    if not lines:
        return ""
    older = [line for line in lines if not line.on_validation]
    text = "A line of squares joins the fixed choices over one network as they turn out on these test images. "
    if len(older) < len(lines):
        text += "They were chosen on validation images, or are all exits. "
    if older:
        of = " of older runs" if len(older) < len(lines) else ""
        text += f"Those{of} are the best on the test images themselves, which nobody can know before. "
    if len(lines) > 1:
        text += "The dotted line takes the best of the networks at each cost. "
    return text + "Whether deciding per image pays is said by the verdicts, which have intervals."


def _choices_of(result: Result) -> list[Point]:
    """Return the fixed choices that a run holds, the cheapest first; those of exits also without its decisions."""
    points: list[Point] = []
    if result.decisions is not None:
        points = [(macs, accuracy) for macs, accuracy in result.decisions.static_F2.tolist()]
    elif result.figure("exit_alone_macs"):
        points = list(zip(result.figure("exit_alone_macs"), result.figure("exit_alone_accuracy"), strict=True))
    return sorted(points)


def _hull(points: Sequence[Point]) -> list[Point]:
    """Return the points on the upper concave hull, the cheapest first."""
    ordered = sorted(points)
    return [ordered[n] for n in concave_hull([p[0] for p in ordered], [p[1] for p in ordered])]


def _mean_line(lines: Sequence[Sequence[Point]]) -> list[Point]:
    """Return the mean accuracy of lines at all costs that each of them has; runs over one network have one line."""
    distinct = sorted({tuple(line) for line in lines})
    low, high = max(line[0][0] for line in distinct), min(line[-1][0] for line in distinct)
    costs = sorted({macs for line in distinct for macs, _ in line if low <= macs <= high})
    if len(distinct) == 1 or not costs:
        return list(distinct[0])
    means = np.mean([_accuracies_at(costs, line) for line in distinct], axis=0)
    return list(zip(costs, means.tolist(), strict=True))


def _accuracies_at(costs: Sequence[float], points: Sequence[Point]) -> list[float]:
    """Return the accuracies of a line at costs; beyond its ends, those of its ends."""
    macs, accuracy = zip(*points, strict=True)
    return np.interp(np.array(costs), np.array(macs), np.array(accuracy)).tolist()
