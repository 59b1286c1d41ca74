"""The rows of a comparison: runs of one setting and several seeds, their figures, and how rows differ from each other.

Shapes: N images.
"""

from __future__ import annotations

import csv
import html
import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policyskip.comparison.agreement import cost_ranks, mean_over_pairs, same_answers, same_choices
from policyskip.comparison.collect import Result
from policyskip.evaluation.decisions import Decisions
from policyskip.intervals import bootstrap, mean_and_half_interval

Cells = list[dict[str, Any]]
"""A table: one dictionary a row, with the same keys in all."""
MEASURES = {
    "same_choices": "the same choice for an image: share of blocks decided alike, or of images leaving at one exit",
    "same_answers": "the same answer for the same image",
    "same_spending": "spending on the same images: rank correlation of their cost",
}


@dataclass(frozen=True)
class Row:
    """Runs of one setting, by seed. ``label`` tells it apart from the other rows of its group."""

    label: str
    results: list[Result]

    @property
    def agent(self) -> str:
        return str(self.results[0].summary["agent"])

    @property
    def oracle(self) -> bool:
        """Whether it sees the label."""
        return bool(self.results[0].figure("sees_the_label"))

    def values(self, key: str) -> list[float]:
        """A figure on test of every run; empty if any lacks it."""
        values = [result.figure(key) for result in self.results]
        return [] if None in values else [float(value) for value in values]

    def mean(self, key: str) -> float | None:
        """Its mean over seeds; None if any run lacks it."""
        values = self.values(key)
        return float(np.mean(values)) if values else None

    @property
    def title(self) -> str:
        """The label, and whether it sees the label of an image."""
        return f"{self.label} (sees the label)" if self.oracle else self.label

    @cached_property
    def decisions(self) -> list[Decisions]:
        """What every run did with each image, by seed; empty unless all of them say."""
        found = [result.decisions for result in self.results if result.decisions is not None]
        return found if len(found) == len(self.results) else []

    @property
    def decided(self) -> bool:
        """Whether every run says what it did with each image."""
        return bool(self.decisions)

    @cached_property
    def correct_N(self) -> NDArray[np.float64]:
        """Share of the seeds that are right, image by image."""
        return self._mean_N([d.correct_N.double().numpy() for d in self.decisions])

    @cached_property
    def full_correct_N(self) -> NDArray[np.float64]:
        """The same for the full network of each run."""
        return self._mean_N([d.full_correct_N.double().numpy() for d in self.decisions])

    @cached_property
    def share_N(self) -> NDArray[np.float64]:
        """MACs of each image as a share of the full network's, mean over seeds."""
        return self._mean_N([(d.macs_N / d.full_macs).numpy() for d in self.decisions])

    @staticmethod
    def _mean_N(columns: list[NDArray[np.float64]]) -> NDArray[np.float64]:
        return np.asarray(np.mean(columns, axis=0), dtype=np.float64)


def rows_of(results: Sequence[Result]) -> list[Row]:
    """Runs of one setting together; each row named by its agent and by what sets it apart from others of that agent."""
    by_setting: dict[tuple[Any, ...], list[Result]] = defaultdict(list)
    for result in results:
        by_setting[(result.summary["agent"], result.summary["env"], *result.setting.items())].append(result)
    members = [sorted(runs, key=lambda r: int(r.summary["seed"])) for runs in by_setting.values()]
    labels = _labels([runs[0] for runs in members])
    rows = [Row(label, runs) for label, runs in zip(labels, members, strict=True)]
    return sorted(rows, key=lambda row: (row.agent, row.mean("macs_mean") or 0, row.label))


def _labels(firsts: list[Result]) -> list[str]:
    """The agent, and as many keys in which settings of that agent differ as tell them apart, three at most."""
    by_agent: dict[str, list[Result]] = defaultdict(list)
    for result in firsts:
        by_agent[str(result.summary["agent"])].append(result)
    labels = []
    for result in firsts:
        family = by_agent[str(result.summary["agent"])]
        settings = [_label_keys(member) for member in family]
        keys = {key for setting in settings for key in setting}
        differ = sorted(key for key in keys if len({setting.get(key) for setting in settings}) > 1)
        own = _label_keys(result)
        others = [setting for setting in settings if setting != own]
        keys_told: list[str] = []
        for key in differ[:3]:
            if any(other.get(key) != own.get(key) for other in others):
                keys_told.append(key)
                others = [other for other in others if other.get(key) == own.get(key)]
        told = [f"{key.rpartition('.')[2]}={own.get(key, 'none')}" for key in keys_told]
        labels.append(" ".join([str(result.summary["agent"]), *told]))
    count: dict[str, int] = defaultdict(int)
    distinct = []
    for label in labels:
        count[label] += 1
        distinct.append(label if labels.count(label) == 1 else f"{label} ({count[label]})")
    return distinct


def _label_keys(result: Result) -> dict[str, str]:
    """A setting as its label tells it: the environment by its id, classes by their last name."""
    told = {key: value for key, value in result.setting.items() if not key.startswith("env.")}
    told = {
        key.removesuffix("._target_"): value.rpartition(".")[2] if "_target_" in key else value
        for key, value in told.items()
    }
    return told | {".env": str(result.summary["env"]).removesuffix("-v0")}  # sorts before all others


def table(rows: list[Row], group: str) -> Cells:
    """The figures of each row: means over seeds, half the 95 % t interval (``…_t95``), and, for the difference to the
    full network, the paired bootstrap interval over images. Accuracies and shares are fractions."""
    cells = []
    for row in rows:
        first = row.results[0].summary
        line: dict[str, Any] = {"group": group, "row": row.label, "agent": row.agent, "env": first["env"]}
        line |= {"backbone": first["backbone"], "data": first["data"], "runs": len(row.results)}
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
        low, high = bootstrap(row.correct_N - row.full_correct_N) if row.decided else (None, None)
        line |= {"change_images_low": low, "change_images_high": high}
        line |= _ran(row)
        line |= {"decisions": row.mean("unique_decisions"), "latency_ms": _latency(row)}
        line["seconds"] = float(np.mean([float(result.summary["seconds"]) for result in row.results]))
        line["sees_the_label"] = row.oracle
        cells.append(line)
    return cells


def _latency(row: Row) -> float | None:
    """Milliseconds an image, if every run was measured, and on the same processor in the same way."""
    keys = ("latency_device", "latency_threads", "latency_batch")
    found = [result.summary for result in row.results if "latency_ms" in result.summary]
    if len(found) < len(row.results) or len({tuple(summary.get(key) for key in keys) for summary in found}) > 1:
        return None
    return float(np.mean([float(summary["latency_ms"]) for summary in found]))


def _ran(row: Row) -> dict[str, Any]:
    """Kept blocks of how many; or the mean exit, counted from 0, of how many."""
    kept, shares = row.mean("kept_mean"), row.results[0].figure("exit_share")
    if kept is not None:
        return {"kept": kept, "of": row.results[0].figure("blocks"), "choice": "blocks"}
    if isinstance(shares, list):
        means = [sum(n * share for n, share in enumerate(result.figure("exit_share"))) for result in row.results]
        return {"kept": float(np.mean(means)), "of": len(shares), "choice": "exits"}
    return {"kept": None, "of": None, "choice": None}


def run_table(rows: list[Row], group: str) -> Cells:
    """One line for each run, its figures as its summary has them."""
    keys = ("accuracy", "full_accuracy", "macs_mean", "macs_fraction", "kept_mean", "unique_decisions", "static_margin")
    return [
        {"group": group, "row": row.label, "run": result.name, "seed": result.summary["seed"]}
        | {key: result.figure(key) for key in keys}
        | {"seconds": result.summary["seconds"], "version": result.version}
        for row in rows
        for result in row.results
    ]


def differences(rows: list[Row], group: str) -> Cells:
    """Every pair of rows with decisions: accuracy of the first less that of the second on the same images, with its
    paired bootstrap interval over images, and the difference of their MACs."""
    cells = []
    known = [row for row in rows if row.decided]
    for i, first in enumerate(known):
        for second in known[i + 1 :]:
            difference_N = first.correct_N - second.correct_N
            low, high = bootstrap(difference_N)
            line = {"group": group, "row": first.label, "less": second.label, "accuracy": float(difference_N.mean())}
            macs = (first.mean("macs_mean") or 0.0) - (second.mean("macs_mean") or 0.0)
            cells.append(line | {"images_low": low, "images_high": high, "macs": macs})
    return cells


def agreement(rows: list[Row], group: str) -> Cells:
    """Every pair of rows with decisions, and each row with itself over different seeds: the three ``MEASURES``, means
    over pairs of runs. None where it cannot be said."""
    known = [row for row in rows if row.decided]
    ranks = {id(r): cost_ranks(r.decisions) for row in known for r in row.results if r.decisions}
    cells = []
    for i, first in enumerate(known):
        for second in known[i:]:
            pairs = [(a, b) for a, b in product(first.results, second.results) if a is not b]
            measured: dict[str, list[float | None]] = {name: [] for name in MEASURES}
            for a, b in pairs:
                assert a.decisions is not None and b.decisions is not None
                alike = a.summary["backbone"] == b.summary["backbone"]
                alike &= a.figure("exit_macs") == b.figure("exit_macs")  # exits of one name can be at other places
                measured["same_choices"].append(same_choices(a.decisions, b.decisions) if alike else None)
                measured["same_answers"].append(same_answers(a.decisions, b.decisions))
                rank_a, rank_b = ranks[id(a)], ranks[id(b)]
                both = rank_a is not None and rank_b is not None
                measured["same_spending"].append(float(np.mean(rank_a * rank_b)) if both else None)  # type: ignore[operator]
            line = {"group": group, "row": first.label, "with": second.label}
            cells.append(line | {name: mean_over_pairs(values) for name, values in measured.items()})
    return cells


def disagreements(rows: list[Row], count: int = 24) -> list[int]:
    """Places of the images that divide the rows most: half of them right and half wrong; then those on which some
    spend much and others little. Images on which all agree are none."""
    known = [row for row in rows if row.decided and not row.oracle]
    if len(known) < 2:
        return []
    right_N = np.mean([row.correct_N for row in known], axis=0)
    spread_N = np.std([row.share_N for row in known], axis=0)
    divided_N = right_N * (1 - right_N)
    order = sorted(range(len(right_N)), key=lambda n: (-divided_N[n], -spread_N[n]))
    return [n for n in order[:count] if divided_N[n] > 0]


def disagreement_table(rows: list[Row], places: list[int], group: str) -> Cells:
    """These images, and what each row's first run answers and spends there."""
    cells = []
    for place in places:
        for row in rows:
            if not row.decided:
                continue
            decided = row.decisions[0]
            names, answer = decided.classes, int(decided.prediction_N[place])
            line = {"group": group, "image": place, "label": names[int(decided.label_N[place])], "row": row.label}
            right, share = float(row.correct_N[place]), float(row.share_N[place])
            cells.append(line | {"answer": names[answer], "right_share_of_seeds": right, "macs_share": share})
    return cells


def as_csv(cells: Cells) -> str:
    """Comma-separated values with a header; empty where there is nothing to say."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(cells[0]) if cells else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(cells)
    return text.getvalue()


SHOWN = (
    *("row", "seeds", "accuracy, %", "change to its full network", "95 % over images", "MACs, share", "MACs, M"),
    *("kept", "against fixed choice", "decisions", "latency, ms", "training, s"),
)


def shown(cells: Cells) -> tuple[list[str], list[list[str]]]:
    """The table for people, its header and its lines: percent and points, ± half the 95 % interval over seeds. Of the
    columns ``SHOWN``, those in which there is nothing are left out."""
    lines = [
        [
            f"{line['row']} (sees the label)" if line["sees_the_label"] else str(line["row"]),
            str(line["seeds"]).replace(" ", ", "),
            _plus_minus(line, "accuracy", 100, "{:.2f}"),
            _plus_minus(line, "change", 100, "{:+.2f}"),
            _between(line["change_images_low"], line["change_images_high"]),
            _plus_minus(line, "macs_share", 1, "{:.3f}"),
            _plus_minus(line, "macs", 1e-6, "{:.2f}"),
            _kept(line),
            _plus_minus(line, "static_margin", 100, "{:+.2f}"),
            _or_dash(line["decisions"], "{:.0f}"),
            _or_dash(line["latency_ms"], "{:.2f}"),
            _or_dash(line["seconds"], "{:.0f}"),
        ]
        for line in cells
    ]
    full = [n for n in range(len(SHOWN)) if any(line[n] != "–" for line in lines)]
    return [SHOWN[n] for n in full], [[line[n] for n in full] for line in lines]


def _plus_minus(line: dict[str, Any], key: str, scale: float, form: str) -> str:
    mean, half = line[key], line[f"{key}_t95"]
    if mean is None:
        return "–"
    text = form.format(scale * mean)
    return text if half is None else f"{text} ± {form.replace('+', '').format(scale * half)}"


def _between(low: float | None, high: float | None) -> str:
    return "–" if low is None or high is None else f"{100 * low:+.2f} to {100 * high:+.2f}"


def _kept(line: dict[str, Any]) -> str:
    if line["kept"] is None:
        return "–"
    if line["choice"] == "blocks":
        return f"{line['kept']:.1f} of {line['of']} blocks"
    return f"exit {line['kept']:.1f} of 0–{line['of'] - 1}"


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def as_markdown(header: Sequence[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    rows = [
        list(header),
        ["---"] * len(header),
        *[[html.escape(cell, False).replace("|", "\\|") for cell in line] for line in lines],
    ]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)
