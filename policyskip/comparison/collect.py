"""Find and read finished runs, and give each a name of its own."""

from __future__ import annotations

import glob
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from policyskip.errors import UserError
from policyskip.evaluation import decisions
from policyskip.evaluation.decisions import Decisions
from policyskip.runs import lifecycle
from policyskip.runs.folder import Run
from policyskip.texts import one_line

NAMES = ("agent", "env", "backbone", "data")
"""Keys that every summary has, with names."""
NUMBERS = (
    *("seed", "seconds", "test/accuracy", "test/full_accuracy", "test/macs_mean", "test/full_macs"),
    *("test/macs_fraction", "test/unique_decisions"),
)
"""Keys that every summary has, with numbers."""
LONGEST_NAME = 100
"""Letters of the name of a run, at most."""
NOT_THE_SETTING = ("seed", "device", "execution", "run", "tracking", "front", "target")
"""Keys of a configuration in which runs of one setting may differ. (The targets of a run are in its summary.)"""


@dataclass(frozen=True)
class Result:
    """Holds the content of a finished run's folder.

    Attributes:
        name: a name that no other run of the comparison has.
        folder: the run folder.
        summary, config: the content of ``summary.json`` and ``config.yaml``.
        records: those of ``metrics.jsonl``.
        decisions: None if the folder holds none.
    """

    name: str
    folder: Path
    summary: dict[str, Any]
    config: dict[str, Any]
    records: list[dict[str, Any]]
    decisions: Decisions | None

    def figure(self, key: str) -> Any:
        """Return a figure of the test split, by its key without ``test/``; None if the summary lacks it."""
        return self.summary.get(f"test/{key}")

    @property
    def version(self) -> str:
        """Return the version of policyskip that made the run, or "unknown"."""
        return str(self.summary.get("version", "unknown"))

    @cached_property
    def setting(self) -> dict[str, str]:
        """Return the setting of the run: its configuration as flat keys and texts, without :data:`NOT_THE_SETTING`, and
        its targets. Keys that are null or false are left out. Older runs lack the precision, which was float32."""
        config = {key: value for key, value in self.config.items() if key not in NOT_THE_SETTING}
        config = {"precision": "float32"} | {key: value for key, value in config.items() if value is not None}
        summary = self.summary.items()
        targets = [(key.replace("/", "."), str(value)) for key, value in summary if key.startswith("target/")]
        return dict(sorted([*_flat(config), *targets]))


@dataclass(frozen=True)
class Collected:
    """Holds the finished runs that were found, the folders that were left out and why, and warnings."""

    results: list[Result]
    left_out: list[tuple[Path, str]]
    warnings: list[str]


def collect(patterns: Iterable[str], decide_again: Callable[[Run], Decisions] | None = None) -> Collected:
    """Read the finished runs that folders and glob patterns name.

    Args:
        patterns: run folders, folders with run folders in them, and glob patterns.
        decide_again: makes the decisions of a run that has none in its folder. None: such a run is compared without.

    A run that is not finished, or of which a file is damaged, is left out, with the reason: one such run among hundreds
    shall not keep the others from being compared.

    Raises:
        UserError: a pattern matches no folder, or no run can be compared.
    """
    patterns = list(patterns)
    left_out: list[tuple[Path, str]] = []
    results: list[Result] = []
    errors: list[UserError] = []
    for folder in _folders(patterns):
        try:
            reason = _unfinished(folder)
            if reason is None:
                results.append(_read(Run(folder), decide_again))
        except UserError as error:
            errors.append(error)
            reason = f"cannot be used: {str(error).removeprefix(f'{folder}{os.sep}')}"
        if reason is not None:
            left_out.append((folder, reason))
    results, of_other_images = _on_their_images(results)
    if not results and errors:
        raise errors[0]
    if not results:
        reasons = "".join(f"; {folder} {reason}" for folder, reason in [*left_out, *of_other_images][:3])
        raise UserError(f"no finished run in runs={','.join(patterns)}{reasons}")
    names = _distinct_names([result.folder for result in results])
    results = [replace(result, name=name) for result, name in zip(results, names, strict=True)]
    results, repeats = _without_repeats(results)
    return Collected(results, [*left_out, *of_other_images, *repeats], _warnings(results))


def _folders(patterns: list[str]) -> list[Path]:
    """Return the run folders that patterns name, each once; a folder that is no run folder stands for those in it.

    Raises:
        UserError: a pattern matches no folder.
    """
    run_folders: dict[Path, Path] = {}  # by their resolved paths
    for pattern in patterns:
        paths = sorted(map(Path, glob.glob(pattern, recursive=True))) or [Path(pattern)]
        paths = [path for path in paths if path.is_dir() or len(paths) == 1]
        for path in paths:
            if not path.is_dir():
                raise UserError(f"no run folder matches {pattern}")
            inside = [path] if Run(path).has("config.yaml") else sorted(p.parent for p in path.rglob("config.yaml"))
            runs: set[Path] = set()
            for folder in inside:  # outer folders come first: W&B keeps a config.yaml of its own inside a run folder
                if runs.isdisjoint(folder.parents):
                    runs.add(folder)
                    run_folders.setdefault(folder.resolve(), folder)
    return list(run_folders.values())


def _unfinished(folder: Path) -> str | None:
    """Return the reason why a run cannot be compared; None if it can."""
    if not Run(folder).has("summary.json"):
        return "is not finished: it has no summary.json"
    summary = Run(folder).load_json("summary.json")
    pretrained = "agent" not in summary and "command" in summary
    return "judges no agent: it is a pretrain run" if pretrained else None


def _read(run: Run, decide_again: Callable[[Run], Decisions] | None) -> Result:
    """Read and check a finished run's files.

    Raises:
        UserError: a file is damaged.
    """
    summary = run.load_json("summary.json")
    missing = [key for key in (*NAMES, *NUMBERS) if summary.get(key) is None]
    if missing:
        raise UserError(f"{run.folder / 'summary.json'} is damaged or not ours: it has no {missing[0]}")
    config = lifecycle.saved_config(run)
    own_decisions = decisions.load_decisions(run)
    if own_decisions is None and decide_again is not None:
        try:
            own_decisions = decide_again(run)
        except UserError as error:  # such as a configuration of an older version
            print(f"warning: {run.folder} cannot decide again: {error}", flush=True)
    if own_decisions is not None and abs(own_decisions.accuracy - summary["test/accuracy"]) > 1e-6:
        raise UserError(
            f"{run.folder / decisions.FILE} is of other decisions than summary.json: its accuracy is "
            f"{own_decisions.accuracy:.4f}, and that of summary.json {summary['test/accuracy']:.4f}"
        )
    return Result(run.name, run.folder, summary, config, run.metrics(), own_decisions)


def _on_their_images(results: list[Result]) -> tuple[list[Result], list[tuple[Path, str]]]:
    """Leave out runs whose labels are not those that most runs on the same test images have.

    Returns: the other runs; and the folders that were left out, with the reason for each.
    """
    by_images: dict[str, Counter[bytes]] = defaultdict(Counter)
    for result in results:
        if result.decisions is not None:
            by_images[result.decisions.images][_labels_of(result.decisions)] += 1
    usual = {images: count.most_common(1)[0][0] for images, count in by_images.items()}
    kept, left_out = [], []
    for result in results:
        decided = result.decisions
        if decided is None or _labels_of(decided) == usual[decided.images]:
            kept.append(result)
        else:
            reason = f"has a {decisions.FILE} whose labels are not those of the other runs on the same test images"
            left_out.append((result.folder, reason))
    return kept, left_out


def _labels_of(decided: Decisions) -> bytes:
    """Return the labels of a record in a form that can be counted."""
    return decided.label_N.numpy().tobytes()


def _distinct_names(folders: list[Path]) -> list[str]:
    """Name each folder by the end of its path, as long as it takes to tell the folders apart, in letters that show."""
    parts = [folder.resolve().parts for folder in folders]
    length = [1] * len(parts)
    while True:
        names = ["/".join(p[-n:]) for p, n in zip(parts, length, strict=True)]
        count = Counter(names)
        ambiguous = [i for i, name in enumerate(names) if count[name] > 1 and length[i] < len(parts[i])]
        if not ambiguous:
            return distinct([one_line(name, LONGEST_NAME) for name in names])
        for i in ambiguous:
            length[i] += 1


def distinct(names: Sequence[str]) -> list[str]:
    """Put a number behind every name that another one equals."""
    count, seen = Counter(names), Counter[str]()
    made = []
    for name in names:
        seen[name] += 1
        made.append(name if count[name] == 1 else f"{name} ({seen[name]})")
    return made


def _without_repeats(results: list[Result]) -> tuple[list[Result], list[tuple[Path, str]]]:
    """Leave out runs that repeat another run's setting and seed, because one seed counted twice narrows the interval.

    Returns: the other runs; and the folders that were left out, with the reason for each.
    """
    counted: dict[tuple[Any, ...], Result] = {}
    repeats = []
    for result in results:
        images = result.decisions.images if result.decisions else None
        key = (result.summary["agent"], result.summary["seed"], *result.setting.items(), images)
        same = counted.setdefault(key, result)
        if same is not result:
            repeats.append((result.folder, f"has the configuration and the seed of {same.name}, so it is not counted"))
    return list(counted.values()), repeats


def _warnings(results: list[Result]) -> list[str]:
    """Return what a reader of the comparison has to know about the runs."""
    warnings = []
    versions = Counter(result.version for result in results)
    if len(versions) > 1:
        counts = ", ".join(f"{version} ({count} run{'s'[: count > 1]})" for version, count in sorted(versions.items()))
        warnings.append(
            f"runs are of different versions of policyskip: {counts}; figures may have changed between them"
        )
    long_names = sorted({result.name for result in results if "/" in result.name})
    if long_names:
        listed = ", ".join(long_names[:4]) + (", …" if len(long_names) > 4 else "")
        warnings.append(f"runs in different folders have the same name; they are called {listed}")
    warnings += _warnings_of_runs(results)
    without = [result.name for result in results if result.decisions is None]
    if without:
        listed = ", ".join(without[:3]) + (", …" if len(without) > 3 else "")
        warnings.append(
            f"{len(without)} of {len(results)} runs have no {decisions.FILE} ({listed}): no paired figures for them; "
            "recompute=true makes them now"
        )
    return warnings


def _warnings_of_runs(results: list[Result]) -> list[str]:
    """Return the warnings of the runs; those that begin alike, up to a colon, are one."""
    alike: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for result in results:
        texts = list(result.summary.get("warnings") or [])
        if False in (result.figure("static_search_finished"), result.figure("rival_finished")):
            texts.append("the search for its fixed choices ran out of front.budget")
        for text in texts:
            alike[text.partition(":")[0]].append((result.name, text))
    warnings = []
    for beginning, members in alike.items():
        text = members[0][1] if len({text for _, text in members}) == 1 else beginning
        names = list(dict.fromkeys(name for name, _ in members))
        listed = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
        warnings.append(f"{names[0]}: {text}" if len(names) == 1 else f"{len(names)} runs: {text} ({listed})")
    return warnings


def _flat(node: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Yield the keys of nested dictionaries, joined by dots, and their values as texts, without None and False."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None and value is not False:
            yield f"{prefix}{key}", str(value)
