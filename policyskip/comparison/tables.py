"""The tables of a comparison. A row is the runs of one setting, with one seed or several."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

from policyskip.comparison.agreement import cost_ranks, mean_over_pairs, same_answers, same_choices
from policyskip.comparison.answers import Answer
from policyskip.comparison.rows import Row
from policyskip.evaluation.figures import class_figures
from policyskip.intervals import bootstrap, mean_and_half_interval

Cells = list[dict[str, Any]]
"""A table: one dictionary for each line, with the same keys in all."""
CLASS_MEANS = ("accuracy", "full_accuracy", "macs_share")
"""The figures of a class that are means over seeds."""
MEASURES = {
    "same_choices": "share of blocks that are decided alike, or of images that leave at the same exit",
    "same_answers": "share of images that get the same answer",
    "same_spending": "rank correlation of what images cost",
}
"""How alike two runs decide: the names of three measures, and what the page says of each."""


def table(rows: list[Row], answers: Sequence[Answer], group: str) -> Cells:
    """Make the main table: the figures of each row of a group.

    Figures are means over seeds, with half the 95 % t interval over seeds (``…_t95``); the change to the full network
    and the margin also have their intervals over images. Accuracies and shares are fractions.

    Args:
        answers: whether deciding per image pays, for the rows that learned.
    """
    cells = []
    by_label = {answer.row.label: answer for answer in answers}
    for row in rows:
        summary = row.results[0].summary
        line: dict[str, Any] = {"group": group, "row": row.label, "agent": row.agent, "env": summary["env"]}
        line |= {"backbone": summary["backbone"], "data": summary["data"], "runs": len(row.results)}
        line["seeds"] = " ".join(str(result.summary["seed"]) for result in row.results)
        for name, values in (
            ("accuracy", row.values("accuracy")),
            ("full_accuracy", row.values("full_accuracy")),
            ("change", [a - f for a, f in zip(row.values("accuracy"), row.values("full_accuracy"), strict=True)]),
            ("macs_share", row.values("macs_fraction")),
            ("macs", row.values("macs_mean")),
            ("static_margin", row.values("static_margin")),
        ):
            line[name], line[f"{name}_t95"] = mean_and_half_interval(values) if values else (None, None)
        low, high = bootstrap(row.correct_N - row.full_correct_N, group_N=row.group_N) if row.decided else (None, None)
        line |= {"change_images_low": low, "change_images_high": high}
        line |= _kept_or_exit(row)
        line |= {"decisions": row.mean("unique_decisions"), "latency_ms": _latency(row)}
        line["seconds"] = float(np.mean([float(result.summary["seconds"]) for result in row.results]))
        line["sees_the_label"] = row.oracle
        cells.append(line | _answer_cells(by_label.get(row.label)))
    return cells


def _answer_cells(answer: Answer | None) -> dict[str, Any]:
    """Return the cells that say whether deciding per image pays; they are empty for a row that learned nothing."""
    margin, other = (answer.margin, answer.other) if answer else (None, None)
    cells: dict[str, Any] = {
        "verdict": answer and answer.verdict,
        "verdict_because": (answer and answer.because) or None,
    }
    cells |= {"margin": margin and margin.mean, "margin_t95": margin and margin.t95}
    cells |= {"margin_images_low": margin and margin.low, "margin_images_high": margin and margin.high}
    cells |= {"rival": margin and margin.rival, "rival_seeds": margin and margin.rival_seeds}
    cells |= {"other_network": other and other.name, "other_accuracy": other and other.accuracy}
    return cells | {"other_macs": other and other.macs, "oracle_share": answer and answer.oracle_share}


def _latency(row: Row) -> float | None:
    """Return the mean milliseconds an image; None unless all runs were measured, on one processor and in one way."""
    keys = ("latency_device", "latency_threads", "latency_batch")
    measured = [result.summary for result in row.results if "latency_ms" in result.summary]
    if len(measured) < len(row.results) or len({tuple(summary.get(key) for key in keys) for summary in measured}) > 1:
        return None
    return float(np.mean([float(summary["latency_ms"]) for summary in measured]))


def _kept_or_exit(row: Row) -> dict[str, Any]:
    """Return how many blocks are kept on average, or the mean exit, counted from 0; and how many blocks or exits there
    are."""
    kept, shares = row.mean("kept_mean"), row.results[0].figure("exit_share")
    if kept is not None:
        return {"kept": kept, "of": row.results[0].figure("blocks"), "choice": "blocks"}
    if isinstance(shares, list):
        means = [sum(n * share for n, share in enumerate(result.figure("exit_share"))) for result in row.results]
        return {"kept": float(np.mean(means)), "of": len(shares), "choice": "exits"}
    return {"kept": None, "of": None, "choice": None}


def run_table(rows: list[Row], group: str) -> Cells:
    """Make the table of runs: a line for each, with the figures of its summary."""
    keys = (
        *("accuracy", "full_accuracy", "macs_mean", "macs_fraction", "kept_mean", "unique_decisions", "static_margin"),
        *("verdict", "verdict_because", "rival", "rival_accuracy", "rival_macs", "rival_margin", "rival_low"),
        *("rival_high", "rival_finished"),
    )
    return [
        {"group": group, "row": row.label, "run": result.name, "seed": result.summary["seed"]}
        | {key: result.figure(key) for key in keys}
        | {"seconds": result.summary["seconds"], "version": result.version}
        for row in rows
        for result in row.results
    ]


def differences(rows: list[Row], group: str) -> Cells:
    """Make the table of differences: a line for each pair of rows whose decisions are known.

    It has the accuracy of one row less that of the other on the same images, with its paired bootstrap interval over
    images, and the difference of their MACs.
    """
    cells = []
    decided = [row for row in rows if row.decided]
    for i, row in enumerate(decided):
        for other in decided[i + 1 :]:
            difference_N = row.correct_N - other.correct_N
            group_N = row.group_N if row.group_N is not None else other.group_N  # an earlier version wrote no groups
            low, high = bootstrap(difference_N, group_N=group_N)
            line = {"group": group, "row": row.label, "less": other.label, "accuracy": float(difference_N.mean())}
            macs = (row.mean("macs_mean") or 0.0) - (other.mean("macs_mean") or 0.0)
            cells.append(line | {"images_low": low, "images_high": high, "macs": macs})
    return cells


def agreement(rows: list[Row], group: str) -> Cells:
    """Make the table of agreement: a line for each pair of rows whose decisions are known, also of a row with itself.

    It has the three ``MEASURES``, as means over pairs of runs (within a row, over pairs of different seeds). A measure
    is None where it does not apply.
    """
    decided = [row for row in rows if row.decided]
    ranks = {id(r): cost_ranks(r.decisions) for row in decided for r in row.results if r.decisions}
    cells = []
    for i, row in enumerate(decided):
        for other in decided[i:]:
            pairs = [(a, b) for a, b in product(row.results, other.results) if a is not b]
            measured: dict[str, list[float | None]] = {name: [] for name in MEASURES}
            for a, b in pairs:
                assert a.decisions is not None and b.decisions is not None
                same_network = a.summary["backbone"] == b.summary["backbone"]
                same_network &= a.figure("exit_macs") == b.figure("exit_macs")  # two networks of one name can differ
                measured["same_choices"].append(same_choices(a.decisions, b.decisions) if same_network else None)
                measured["same_answers"].append(same_answers(a.decisions, b.decisions))
                rank_a, rank_b = ranks[id(a)], ranks[id(b)]
                ranked = rank_a is not None and rank_b is not None
                measured["same_spending"].append(float(np.mean(rank_a * rank_b)) if ranked else None)  # type: ignore[operator]
            line = {"group": group, "row": row.label, "with": other.label}
            cells.append(line | {name: mean_over_pairs(values) for name, values in measured.items()})
    return cells


def class_table(rows: list[Row], group: str) -> Cells:
    """Make the table of classes: a line for each class and each row whose decisions are known, means over seeds."""
    cells = []
    for row in rows:
        for lines in zip(*map(class_figures, row.decisions), strict=True):
            line = {"group": group, "row": row.label, "class": lines[0]["class"], "images": lines[0]["images"]}
            cells.append(line | {key: float(np.mean([line[key] for line in lines])) for key in CLASS_MEANS})
    return cells


def disagreements(rows: list[Row], count: int = 24) -> list[int]:
    """Return the indices of the images on which rows disagree most, ``count`` at most.

    The order is by how near the rows are to half of them right and half wrong; among equals, images on which some spend
    much and others little come first. Images on which all rows are right, or all wrong, are left out, and so are
    oracles.
    """
    agents = [row for row in rows if row.decided and not row.oracle]
    if len(agents) < 2:
        return []
    right_N = np.mean([row.correct_N for row in agents], axis=0)
    spread_N = np.std([row.share_N for row in agents], axis=0)
    variance_N = right_N * (1 - right_N)
    order = sorted(range(len(right_N)), key=lambda n: (-variance_N[n], -spread_N[n]))
    return [n for n in order[:count] if variance_N[n] > 0]


def disagreement_table(rows: list[Row], indices: list[int], group: str) -> Cells:
    """Make the table of disagreements: a line for each of these images and each row whose decisions are known.

    The answer is that of the row's first seed; the MACs and the share of right answers are means over seeds.
    """
    cells = []
    for index in indices:
        for row in rows:
            if not row.decided:
                continue
            decisions = row.decisions[0]
            names, answer = decisions.classes, int(decisions.prediction_N[index])
            line = {"group": group, "image": index, "label": names[int(decisions.label_N[index])], "row": row.label}
            right, share = float(row.correct_N[index]), float(row.share_N[index])
            cells.append(line | {"answer": names[answer], "right_share_of_seeds": right, "macs_share": share})
    return cells
