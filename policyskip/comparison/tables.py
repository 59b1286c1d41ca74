"""The tables of a comparison. A row is the runs of one setting, with one seed or several.

Shapes: N images.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policyskip.comparison.agreement import cost_ranks, mean_over_pairs, same_answers, same_choices
from policyskip.comparison.collect import LONGEST_NAME, Result, distinct
from policyskip.evaluation.decisions import Decisions
from policyskip.evaluation.figures import class_figures
from policyskip.intervals import bootstrap, mean_and_half_interval
from policyskip.texts import one_line

Cells = list[dict[str, Any]]
"""A table: one dictionary for each line, with the same keys in all."""
CLASS_MEANS = ("accuracy", "full_accuracy", "macs_share")
"""The figures of a class that are means over seeds."""
MOST_KEYS, LONGEST_VALUE = 5, 40
"""How many keys a row's label has at most, and how many letters of a value."""
MEASURES = {
    "same_choices": "share of blocks that are decided alike, or of images that leave at the same exit",
    "same_answers": "share of images that get the same answer",
    "same_spending": "rank correlation of what images cost",
}
"""How alike two runs decide: the names of three measures, and what the page says of each."""


@dataclass(frozen=True)
class Row:
    """Holds the runs of one setting, in the order of their seeds; no other row of the group has the same ``label``."""

    label: str
    results: list[Result]

    @property
    def agent(self) -> str:
        return str(self.results[0].summary["agent"])

    @property
    def oracle(self) -> bool:
        """Return whether the agent sees the label of an image."""
        return bool(self.results[0].figure("sees_the_label"))

    def values(self, key: str) -> list[float]:
        """Return a test figure of every run; an empty list if any run does not have it."""
        values = [result.figure(key) for result in self.results]
        return [] if None in values else [float(value) for value in values]

    def mean(self, key: str) -> float | None:
        """Return the mean of a test figure over seeds; None if any run does not have it."""
        values = self.values(key)
        return float(np.mean(values)) if values else None

    @property
    def title(self) -> str:
        """Return the row's label, with a remark if the agent sees the label of an image."""
        return f"{self.label} (sees the label)" if self.oracle else self.label

    @cached_property
    def decisions(self) -> list[Decisions]:
        """Return the decisions of every run; an empty list if any run has none in its folder."""
        known = [result.decisions for result in self.results if result.decisions is not None]
        return known if len(known) == len(self.results) else []

    @property
    def decided(self) -> bool:
        """Return whether the decisions of all runs are known."""
        return bool(self.decisions)

    @cached_property
    def correct_N(self) -> NDArray[np.float64]:
        """Return the share of the seeds that are right on each image, float64 (N,)."""
        return self._mean_N([d.correct_N.double().numpy() for d in self.decisions])

    @cached_property
    def full_correct_N(self) -> NDArray[np.float64]:
        """Return the share of the seeds whose full network is right on each image, float64 (N,)."""
        return self._mean_N([d.full_correct_N.double().numpy() for d in self.decisions if d.full_correct_N is not None])

    @cached_property
    def share_N(self) -> NDArray[np.float64]:
        """Return the MACs of each image as a share of the full network's, float64 (N,), mean over seeds."""
        return self._mean_N([(d.macs_N / d.full_macs).numpy() for d in self.decisions])

    @cached_property
    def group_N(self) -> NDArray[np.int64] | None:
        """Return which images belong together, int64 (N,); None if each is its own group, or no run knows it."""
        known = [d.group_N for d in self.decisions if d.group_N is not None]
        return known[0].numpy() if known else None

    @staticmethod
    def _mean_N(columns: list[NDArray[np.float64]]) -> NDArray[np.float64]:
        return np.asarray(np.mean(columns, axis=0), dtype=np.float64)


def rows_of(results: Sequence[Result]) -> list[Row]:
    """Sort runs into rows, each labelled by its agent and by the settings in which rows of that agent differ."""
    by_setting: dict[tuple[Any, ...], list[Result]] = defaultdict(list)
    for result in results:
        by_setting[(result.summary["agent"], result.summary["env"], *result.setting.items())].append(result)
    members = [sorted(runs, key=lambda r: int(r.summary["seed"])) for runs in by_setting.values()]
    labels = _labels([runs[0] for runs in members])
    rows = [Row(label, runs) for label, runs in zip(labels, members, strict=True)]
    return sorted(rows, key=lambda row: (row.agent, row.mean("macs_mean") or 0, row.label))


def _labels(results: list[Result]) -> list[str]:
    """Label each setting, of which there is one run: by its agent, and by keys in which settings of that agent differ.

    The keys are those that tell most settings of the agent apart, ``MOST_KEYS`` at most; of these, a label has as many
    as tell its setting from all others.
    """
    by_agent: dict[str, list[dict[str, str]]] = defaultdict(list)
    for result in results:
        by_agent[str(result.summary["agent"])].append(_label_keys(result))
    keys_of = {agent: _telling_keys(settings) for agent, settings in by_agent.items()}
    labels = []
    for result in results:
        agent, own = str(result.summary["agent"]), _label_keys(result)
        others = [setting for setting in by_agent[agent] if setting != own]
        label_keys: list[str] = []
        for key in keys_of[agent]:
            if any(other.get(key) != own.get(key) for other in others):
                label_keys.append(key)
                others = [other for other in others if other.get(key) == own.get(key)]
        short = Counter(key.rpartition(".")[2] for key in keys_of[agent])
        words = []
        for key in label_keys:
            name = key.rpartition(".")[2] if short[key.rpartition(".")[2]] == 1 else key
            words.append(f"{name}={one_line(own.get(key, 'none'), LONGEST_VALUE)}")
        labels.append(one_line(" ".join([agent, *words]), LONGEST_NAME))
    return distinct(labels)


def _telling_keys(settings: list[dict[str, str]]) -> list[str]:
    """Choose the keys that tell most settings apart: first one, then the best beside it, and so on.

    Among keys that help alike, the first in the order of the alphabet is chosen.
    """
    keys = sorted({key for setting in settings for key in setting})
    chosen: list[str] = []
    kinds = 1
    while len(chosen) < MOST_KEYS:
        counts = {key: len({tuple(s.get(k) for k in (*chosen, key)) for s in settings}) for key in keys}
        best = max(keys, key=lambda key: counts[key], default=None)  # the first of several
        if best is None or counts[best] == kinds:
            break
        chosen.append(best)
        kinds = counts[best]
    return sorted(chosen)


def _label_keys(result: Result) -> dict[str, str]:
    """Return a run's setting in the form for labels: the environment as its id, a class as its name alone."""
    keys = {
        key.removesuffix("._target_"): value.rpartition(".")[2] if "_target_" in key else value
        for key, value in result.setting.items()
        if not key.startswith("env.")
    }
    return keys | {".env": str(result.summary["env"]).removesuffix("-v0")}  # ".env" sorts before all other keys


def table(rows: list[Row], group: str) -> Cells:
    """Make the main table: the figures of each row of a group.

    Figures are means over seeds, with half the 95 % t interval over seeds (``…_t95``); the change to the full network
    also has its paired bootstrap interval over images. Accuracies and shares are fractions.
    """
    cells = []
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
        cells.append(line)
    return cells


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
    keys = ("accuracy", "full_accuracy", "macs_mean", "macs_fraction", "kept_mean", "unique_decisions", "static_margin")
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
