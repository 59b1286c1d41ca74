"""What the pictures and the page both show: points, fronts, learning curves, use of blocks and exits, example images.

Shapes: K blocks or exits, T validations.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from policyskip.comparison.collect import Result, is_number
from policyskip.comparison.tables import Cells, Row
from policyskip.fronts import concave_hull, pareto
from policyskip.static_front import keep_text

COLOURS = ("#3b82c4", "#d9822b", "#2f9e6e", "#c14f7f", "#8a63c9", "#9a8a1f", "#3fa3ad", "#c2543b", "#64748b", "#6b8e23")
"""One for each agent; readable on white and on black."""
MARKERS = (
    *(("o", "circle"), ("s", "square"), ("^", "triangle-up"), ("D", "diamond"), ("v", "triangle-down")),
    *(("P", "cross"), ("X", "x"), ("<", "triangle-left"), (">", "triangle-right"), ("p", "pentagon")),
)
"""One for each row of a colour, as matplotlib and as Plotly call it."""
DASHES = ("solid", "dash", "dot", "dashdot")


@dataclass(frozen=True)
class Style:
    """A row's colour, its marker in matplotlib and in Plotly, and its line in Plotly."""

    colour: str
    marker: str
    symbol: str
    dash: str


def styles(rows: Sequence[Row]) -> dict[str, Style]:
    """By label: rows of one agent share a colour, and rows of one colour differ in marker."""
    agents: dict[str, int] = {}
    members: dict[str, int] = defaultdict(int)
    found = {}
    for row in rows:
        colour = COLOURS[agents.setdefault(row.agent, len(agents)) % len(COLOURS)]
        number = members[colour]
        marker, symbol = MARKERS[number % len(MARKERS)]
        members[colour] += 1
        found[row.label] = Style(colour, marker, symbol, DASHES[number % len(DASHES)])
    return found


def front_of(cells: Cells) -> list[int]:
    """Places in the table of the rows on the Pareto front over mean MACs and accuracy; who sees the label is not."""
    able = [n for n, line in enumerate(cells) if not line["sees_the_label"]]
    return [able[n] for n in pareto([cells[n]["macs"] for n in able], [cells[n]["accuracy"] for n in able])]


def static_front(rows: Sequence[Row]) -> list[tuple[float, float, str]]:
    """The corners of what fixed choices, and mixtures of two, reach over any of the rows' networks, the luckiest seed's
    where there are several: MACs, test accuracy, and of which network.

    Of rows without decisions, the exits alone, as their summaries have them.
    """
    points: set[tuple[float, float, str]] = set()
    for row in rows:
        for result in row.results:
            name = str(result.summary["backbone"])
            if result.decisions is not None:
                points |= {(macs, accuracy, name) for macs, accuracy in result.decisions.static_F2.tolist()}
            elif result.figure("exit_alone_macs"):
                alone = zip(result.figure("exit_alone_macs"), result.figure("exit_alone_accuracy"), strict=True)
                points |= {(macs, accuracy, name) for macs, accuracy in alone}
    ordered = sorted(points)
    return [ordered[n] for n in concave_hull([p[0] for p in ordered], [p[1] for p in ordered])]


def lowest_shown(cells: Cells) -> float:
    """The accuracy, in percent, from which on a figure shows the agents: what is far below the rest is cut off."""
    accuracies = [100 * float(cell["accuracy"]) for cell in cells]
    low = min(accuracy for accuracy in accuracies if accuracy >= float(np.median(accuracies)) - 8)
    return max(0.0, low - 0.15 * (max(accuracies) - low) - 1)


def oracles(rows: Sequence[Row]) -> list[tuple[float, float, str]]:
    """What seeing the label would reach over the rows' networks: MACs, accuracy, and of which."""
    found = []
    for row in rows:
        macs, accuracy = row.mean("oracle_macs"), row.mean("oracle_accuracy")
        if macs is not None and accuracy is not None:
            found.append((macs, accuracy, f"the first right exit of {row.label}'s network"))
        if row.oracle:
            found.append((row.mean("macs_mean") or 0.0, row.mean("accuracy") or 0.0, "the best blocks for each image"))
    return found


@dataclass(frozen=True)
class Band:
    """A learning curve: mean over seeds at each step, and the lowest and highest seed."""

    step_T: list[float]
    mean_T: list[float]
    low_T: list[float]
    high_T: list[float]


CURVES = {
    "val/accuracy": "accuracy on validation images",
    "val/macs_fraction": "MACs, share of the full network's",
}


def band(row: Row, key: str) -> Band | None:
    """A row's curve of one metric, at the steps that all its seeds have; None if there is none."""
    curves = [
        {r["step"]: r[key] for r in result.records if is_number(r.get(key)) and is_number(r.get("step"))}
        for result in row.results
    ]
    steps = sorted(set.intersection(*map(set, curves)))
    if not steps:
        return None
    value_RT = np.array([[curve[step] for step in steps] for curve in curves], dtype=np.float64)
    summary = (value_RT.mean(0), value_RT.min(0), value_RT.max(0))
    return Band([float(step) for step in steps], *(column.tolist() for column in summary))


def use(row: Row) -> tuple[str, list[float]] | None:
    """What is decided on, "blocks" or "exits", and the share of images (mean over seeds) that keep each block, or
    leave at each exit; None if it is not known."""
    shares = [_use(result) for result in row.results]
    known = [share for share in shares if share is not None]
    if len(known) < len(shares) or len({(kind, len(share)) for kind, share in known}) > 1:
        return None  # CDL drops heads, so seeds may differ in their exits
    return known[0][0], np.mean([share for _, share in known], axis=0).tolist()


def _use(result: Result) -> tuple[str, list[float]] | None:
    decided = result.decisions
    if decided is None:
        share = result.figure("exit_share")
        return ("exits", share) if isinstance(share, list) else None
    share_K = decided.ran_NK.double().mean(0).tolist()
    if decided.kind == "blocks":
        return "blocks", share_K
    return "exits", [this - after for this, after in pairwise([*share_K, 0.0])]


def gallery(result: Result, pool: Sequence[int], count: int = 6) -> list[dict[str, Any]]:
    """Example images of a run among ``pool``: the cheapest, the dearest, and some it gets wrong.

    Each is the image's place, label, answer, whether that is right, what ran and the MACs as a share.
    """
    decided = result.decisions
    if decided is None or not pool:
        return []
    order = sorted(pool, key=lambda n: (float(decided.macs_N[n]), n))
    wrong = [n for n in order if not bool(decided.correct_N[n])]
    parts = (
        ("least computed", order[:count]),
        ("most computed", order[-count:][::-1]),
        ("wrong", wrong[-count:][::-1]),
    )
    return [{"title": title, "items": [_example(result, n) for n in places]} for title, places in parts if places]


def _example(result: Result, place: int) -> dict[str, Any]:
    decided = result.decisions
    assert decided is not None
    answer, label = int(decided.prediction_N[place]), int(decided.label_N[place])
    ran = keep_text(decided.ran_NK[place].tolist())
    example: dict[str, Any] = {"image": place, "label": decided.classes[label], "right": answer == label, "ran": ran}
    example |= {"answer": decided.classes[answer], "share": round(float(decided.macs_N[place]) / decided.full_macs, 3)}
    return example if decided.kind == "blocks" else example | {"exit": int(decided.exit_N[place])}


def matrix(rows: Sequence[Row], cells: Cells, key: str) -> list[list[float | None]]:
    """A measure of ``agreement`` between all rows, symmetric; None where it is not known."""
    known = {(line["row"], line["with"]): line[key] for line in cells}
    labels = [row.label for row in rows]
    return [[known.get((a, b), known.get((b, a))) for b in labels] for a in labels]
