"""Data that pictures and page both show: points, fronts, learning curves, use of blocks and exits, example images.

Shapes: K blocks or exits, T validations.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from policyskip.comparison.collect import Result
from policyskip.comparison.rows import Row
from policyskip.comparison.tables import Cells
from policyskip.fronts import pareto
from policyskip.runs.schemas import is_number
from policyskip.static_front import keep_text

COLOURS = ("#3b82c4", "#d9822b", "#2f9e6e", "#c14f7f", "#8a63c9", "#9a8a1f", "#3fa3ad", "#c2543b", "#64748b", "#6b8e23")
"""The colours of agents, readable on white and on black."""
MARKERS = (
    *(("o", "circle"), ("s", "square"), ("^", "triangle-up"), ("D", "diamond"), ("v", "triangle-down")),
    *(("P", "cross"), ("X", "x"), ("<", "triangle-left"), (">", "triangle-right"), ("p", "pentagon")),
)
"""The markers of the rows of one colour, as matplotlib and as Plotly call them."""
DASHES = ("solid", "dash", "dot", "dashdot")


@dataclass(frozen=True)
class Style:
    """Holds a row's colour, its marker in matplotlib and in Plotly, and its line in Plotly."""

    colour: str
    marker: str
    symbol: str
    dash: str


def styles(rows: Sequence[Row]) -> dict[str, Style]:
    """Choose each row's style, by its label. Rows of one agent share a colour; rows of one colour differ in marker."""
    agents: dict[str, int] = {}
    members: dict[str, int] = defaultdict(int)
    by_label = {}
    for row in rows:
        colour = COLOURS[agents.setdefault(row.agent, len(agents)) % len(COLOURS)]
        number = members[colour]
        marker, symbol = MARKERS[number % len(MARKERS)]
        members[colour] += 1
        by_label[row.label] = Style(colour, marker, symbol, DASHES[number % len(DASHES)])
    return by_label


def front_of(cells: Cells) -> list[int]:
    """Return the indices of the rows on the Pareto front over mean MACs and accuracy; oracles are left out."""
    honest = [n for n, line in enumerate(cells) if not line["sees_the_label"]]
    return [honest[n] for n in pareto([cells[n]["macs"] for n in honest], [cells[n]["accuracy"] for n in honest])]


def lowest_shown(cells: Cells) -> float:
    """Return the lowest accuracy in percent that a figure shows: agents far below the others are cut off."""
    accuracies = [100 * float(cell["accuracy"]) for cell in cells]
    low = min(accuracy for accuracy in accuracies if accuracy >= float(np.median(accuracies)) - 8)
    return max(0.0, low - 0.15 * (max(accuracies) - low) - 1)


def oracles(rows: Sequence[Row]) -> list[tuple[float, float, str]]:
    """Return what oracles, which see the label, reach over the rows' networks: MACs, accuracy, and a name."""
    points = []
    for row in rows:
        macs, accuracy = row.mean("oracle_macs"), row.mean("oracle_accuracy")
        if macs is not None and accuracy is not None:
            points.append((macs, accuracy, f"the first right exit of {row.label}'s network"))
        if row.oracle:
            points.append((row.mean("macs_mean") or 0.0, row.mean("accuracy") or 0.0, "the best blocks for each image"))
    return points


@dataclass(frozen=True)
class Band:
    """Holds a learning curve: the mean over seeds at each step, and the lowest and highest seed."""

    step_T: list[float]
    mean_T: list[float]
    low_T: list[float]
    high_T: list[float]


CURVES = {
    "val/accuracy": "accuracy on validation images, %",
    "val/macs_fraction": "MACs, share of the full network's",
}


FEW_STEPS = 40
"""A curve of fewer steps is drawn with a marker at each."""


def band(row: Row, key: str) -> Band | None:
    """Return a row's curve of one metric, at the steps that all its seeds have; None if there is no such step.

    Accuracy is in percent.
    """
    curves = [
        {r["step"]: r[key] for r in result.records if is_number(r.get(key)) and is_number(r.get("step"))}
        for result in row.results
    ]
    steps = sorted(set.intersection(*map(set, curves)))
    if not steps:
        return None
    value_RT = np.array([[curve[step] for step in steps] for curve in curves], dtype=np.float64)
    value_RT *= 100 if key == "val/accuracy" else 1
    summary = (value_RT.mean(0), value_RT.min(0), value_RT.max(0))
    return Band([float(step) for step in steps], *(column.tolist() for column in summary))


def curves_of(rows: Sequence[Row]) -> dict[str, list[tuple[Row, Band]]]:
    """Return the learning curves of all rows by metric, a key of ``CURVES``.

    A metric of which no row has two steps is left out: there is nothing to be seen of learning.
    """
    curves = {key: [(row, curve) for row in rows if (curve := band(row, key))] for key in CURVES}
    return {key: bands for key, bands in curves.items() if any(len(curve.step_T) > 1 for _, curve in bands)}


def rows_using(rows: Sequence[Row], kind: str) -> list[tuple[Row, list[float]]]:
    """Return the rows of a kind, "blocks" or "exits", and the share of images that use each (see :func:`use`)."""
    known = ((row, use(row)) for row in rows)
    return [(row, used[1]) for row, used in known if used and used[0] == kind]


def use(row: Row) -> tuple[str, list[float]] | None:
    """Count how often a row uses each block or each exit; None if that is not known.

    Returns: "blocks" and the share of the images that keep each, or "exits" and the share that leaves at each, as means
        over seeds.
    """
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
    """Choose example images of a run among the indices ``pool``: the cheapest, the dearest, and some wrong answers.

    Every example has the index of the image, label, answer, whether that is right, what ran, and MACs as a share of the
    full network's.
    """
    decided = result.decisions
    if decided is None or not pool:
        return []
    among_ties = np.random.default_rng(0).permutation(len(decided))  # and not in the order of the files
    order = sorted(pool, key=lambda n: (float(decided.macs_N[n]), among_ties[n]))
    wrong = [n for n in order if not bool(decided.correct_N[n])]
    groups = (
        ("least computed", order[:count]),
        ("most computed", order[-count:][::-1]),
        ("wrong", wrong[-count:][::-1]),
    )
    return [{"title": title, "items": [_example(result, n) for n in indices]} for title, indices in groups if indices]


def _example(result: Result, index: int) -> dict[str, Any]:
    decided = result.decisions
    assert decided is not None
    answer, label = int(decided.prediction_N[index]), int(decided.label_N[index])
    ran = keep_text(decided.ran_NK[index].tolist())
    example: dict[str, Any] = {"image": index, "label": decided.classes[label], "right": answer == label, "ran": ran}
    example |= {"answer": decided.classes[answer], "share": round(float(decided.macs_N[index]) / decided.full_macs, 3)}
    return example if decided.kind == "blocks" else example | {"exit": int(decided.exit_N[index])}


def matrix(rows: Sequence[Row], cells: Cells, key: str) -> list[list[float | None]]:
    """Make the symmetric matrix of a measure of agreement between all rows; None where the measure is not known."""
    known = {(line["row"], line["with"]): line[key] for line in cells}
    labels = [row.label for row in rows]
    return [[known.get((a, b), known.get((b, a))) for b in labels] for a in labels]
