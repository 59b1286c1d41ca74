"""The rows of a comparison: the runs of one setting, with one seed or several, and a label that tells them apart.

Shapes: N images.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policyskip.comparison.collect import LONGEST_NAME, Result, distinct
from policyskip.evaluation.decisions import Decisions
from policyskip.texts import one_line

MOST_KEYS, LONGEST_VALUE = 5, 40
"""How many keys a row's label has at most, and how many letters of a value."""


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

    @property
    def learned(self) -> bool:
        """Return whether the agent learned anything; a fixed or a random choice of blocks does not."""
        return self.results[0].summary.get("steps") != 0

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

    Among keys that help alike, one whose values need not be shortened is chosen, and then the first in the order of the
    alphabet.
    """
    keys = sorted({key for setting in settings for key in setting})
    is_short = {key: all(len(setting.get(key, "")) <= LONGEST_VALUE for setting in settings) for key in keys}
    chosen: list[str] = []
    kinds = 1
    while len(chosen) < MOST_KEYS:
        counts = {key: len({tuple(s.get(k) for k in (*chosen, key)) for s in settings}) for key in keys}
        best = max(keys, key=lambda key: (counts[key], is_short[key]), default=None)  # the first of several
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
