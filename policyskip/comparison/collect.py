"""Finished runs: found, read, named so that they can be told apart, and sorted into groups that can be compared."""

from __future__ import annotations

import glob
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from policyskip.errors import UserError
from policyskip.evaluation import decisions
from policyskip.evaluation.decisions import Decisions
from policyskip.runs.folder import Run

NAMES = ("agent", "env", "backbone", "data")
NUMBERS = (
    *("seed", "seconds", "test/accuracy", "test/full_accuracy", "test/macs_mean", "test/full_macs"),
    *("test/macs_fraction", "test/unique_decisions"),
)
"""What a summary must have."""
MAYBE = (
    *("test/kept_mean", "test/blocks", "test/static_margin", "test/oracle_macs", "test/oracle_accuracy"),
    "latency_ms",
)
"""What it may have, or null; numbers too."""
NOT_THE_SETTING = ("seed", "device", "run", "tracking", "front", "target")
"""Keys of a configuration in which runs of one setting may differ. What a run aimed at stands in its summary."""


@dataclass(frozen=True)
class Result:
    """A finished run. ``name`` tells it apart from all others; ``decisions`` is None if its folder holds none."""

    name: str
    folder: Path
    summary: dict[str, Any]
    config: dict[str, Any]
    records: list[dict[str, Any]]
    decisions: Decisions | None

    def figure(self, key: str) -> Any:
        """A figure on test; None if the summary has none."""
        return self.summary.get(f"test/{key}")

    @property
    def version(self) -> str:
        """The package's version that made it, as far as it says."""
        return str(self.summary.get("version", "unknown"))

    @cached_property
    def setting(self) -> dict[str, str]:
        """The configuration, flat, less what may differ between runs of one setting and what is switched off."""
        own = {key: value for key, value in self.config.items() if key not in NOT_THE_SETTING}
        aim = [(key.replace("/", "."), str(value)) for key, value in self.summary.items() if key.startswith("target/")]
        return dict(sorted([*_flat(own), *aim]))


@dataclass(frozen=True)
class Collected:
    """What was found: finished runs, those left out with the reason, and what to be warned of."""

    results: list[Result]
    left_out: list[tuple[Path, str]]
    warnings: list[str]


@dataclass(frozen=True)
class Group:
    """Runs that can be compared; ``reason`` says what they have in common that others have not."""

    title: str
    reason: str
    results: list[Result]


def collect(patterns: Iterable[str], again: Callable[[Run], Decisions] | None = None) -> Collected:
    """Read the runs that folders and glob patterns name.

    Args:
        again: what decides again for a run that has no decisions in its folder; None: it is compared without.

    Raises:
        UserError: nothing is there, or a run's files are damaged.
    """
    patterns = list(patterns)
    left_out: list[tuple[Path, str]] = []
    runs: list[Run] = []
    for folder in _folders(patterns):
        reason = _unfinished(folder)
        if reason:
            left_out.append((folder, reason))
        else:
            runs.append(Run(folder))
    if not runs:
        found = "".join(f"; {folder} {reason}" for folder, reason in left_out[:3])
        raise UserError(f"no finished run in runs={','.join(patterns)}{found}")
    names = _distinct([run.folder for run in runs])
    results = [_read(run, name, again) for run, name in zip(runs, names, strict=True)]
    results, twice = _once(results)
    return Collected(results, [*left_out, *twice], _warnings(results))


def _folders(patterns: list[str]) -> list[Path]:
    """The run folders that patterns name, each once; a folder that is no run stands for all runs in it."""
    found: dict[Path, Path] = {}
    for pattern in patterns:
        paths = sorted(map(Path, glob.glob(pattern, recursive=True))) or [Path(pattern)]
        paths = [path for path in paths if path.is_dir() or len(paths) == 1]
        for path in paths:
            if not path.is_dir():
                raise UserError(f"no run folder matches {pattern}")
            inside = [path] if (path / "config.yaml").is_file() else sorted(p.parent for p in path.rglob("config.yaml"))
            runs: set[Path] = set()
            for folder in inside:  # outer folders first: W&B keeps files of that name in a run's folder
                if runs.isdisjoint(folder.parents):
                    runs.add(folder)
                    found.setdefault(folder.resolve(), folder)
    return list(found.values())


def _unfinished(folder: Path) -> str | None:
    """Why a run cannot be compared, if it cannot."""
    if not (folder / "summary.json").is_file():
        return "is not finished: it has no summary.json"
    summary = Run(folder).load_json("summary.json")
    pretrained = "agent" not in summary and "command" in summary
    return "judges no agent: it is a pretrain run" if pretrained else None


def _read(run: Run, name: str, again: Callable[[Run], Decisions] | None) -> Result:
    summary = run.load_json("summary.json")
    missing = [key for key in (*NAMES, *NUMBERS) if key not in summary]
    if missing:
        raise UserError(f"{run.folder / 'summary.json'} is damaged or not ours: it has no {missing[0]}")
    for key in NAMES:
        if not isinstance(summary[key], str):
            raise UserError(f"{run.folder / 'summary.json'} is damaged: {key} is {summary[key]!r:.80}, not a name")
    for key in (*NUMBERS, *(key for key in MAYBE if summary.get(key) is not None)):
        if not is_number(summary[key]):
            raise UserError(f"{run.folder / 'summary.json'} is damaged: {key} is {summary[key]!r:.80}, not a number")
    try:
        config: Any = OmegaConf.to_container(OmegaConf.load(run.folder / "config.yaml"), resolve=True)
        if not isinstance(config, dict):
            raise ValueError("it must hold keys and values")
    except Exception as error:  # damaged files raise whatever the reader stumbles over
        raise UserError(f"{run.folder / 'config.yaml'} is damaged: {' '.join(str(error).split())[:200]}") from error
    decided = decisions.load_decisions(run)
    if decided is None and again is not None:
        try:
            decided = again(run)
        except UserError as error:  # such as a configuration of an older version
            print(f"warning: {run.folder} cannot decide again: {error}", flush=True)
    return Result(name, run.folder, summary, config, run.metrics(), decided)


def is_number(value: Any) -> bool:
    """Whether it is a finite number, and one that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _distinct(folders: list[Path]) -> list[str]:
    """The shortest ends of paths that tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    length = [1] * len(parts)
    while True:
        names = ["/".join(p[-n:]) for p, n in zip(parts, length, strict=True)]
        count = Counter(names)
        clash = [i for i, name in enumerate(names) if count[name] > 1 and length[i] < len(parts[i])]
        if not clash:
            return names
        for i in clash:
            length[i] += 1


def _once(results: list[Result]) -> tuple[list[Result], list[tuple[Path, str]]]:
    """Runs less those that repeat another's setting and seed: counted twice, one seed would narrow the interval."""
    kept: dict[tuple[Any, ...], Result] = {}
    twice = []
    for result in results:
        images = result.decisions.images if result.decisions else None
        key = (result.summary["agent"], result.summary["seed"], *result.setting.items(), images)
        first = kept.setdefault(key, result)
        if first is not result:
            twice.append((result.folder, f"has the configuration and the seed of {first.name}, so it is not counted"))
    return list(kept.values()), twice


def _warnings(results: list[Result]) -> list[str]:
    warnings = []
    versions = Counter(result.version for result in results)
    if len(versions) > 1:
        told = ", ".join(f"{version} ({count} run{'s'[: count > 1]})" for version, count in sorted(versions.items()))
        warnings.append(f"runs are of different versions of policyskip: {told}; figures may have changed between them")
    shared = sorted({result.name for result in results if "/" in result.name})
    if shared:
        told = ", ".join(shared[:4]) + (", …" if len(shared) > 4 else "")
        warnings.append(f"runs in different folders have the same name; they are called {told}")
    for result in results:
        warnings += [f"{result.name}: {text}" for text in result.summary.get("warnings") or []]
        if result.figure("static_search_finished") is False:
            warnings.append(f"{result.name}: the search for its fixed choices ran out of front.budget")
    without = [result.name for result in results if result.decisions is None]
    if without:
        told = ", ".join(without[:3]) + (", …" if len(without) > 3 else "")
        warnings.append(
            f"{len(without)} of {len(results)} runs have no {decisions.FILE} ({told}): no paired figures for them; "
            "recompute=true makes them now"
        )
    return warnings


def groups_of(results: list[Result]) -> list[Group]:
    """Sort runs into those judged on the same test images, over the same frozen weights where they were frozen.

    Runs on other images are a group of their own. Of frozen networks of one name with different weights, the one that
    most runs use stays with the rest, and each of the others is a group of its own: what differs there are not the
    agents. Runs that trained their network, and networks of other names, are compared as whole systems.
    """
    by_images: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in results:
        by_images[(str(result.summary["data"]), _images(result))].append(result)
    sets_of = Counter(data for data, _ in by_images)
    groups = []
    for (data, images), members in sorted(by_images.items(), key=lambda item: -len(item[1])):
        which = f"test images {images}" if sets_of[data] > 1 else "the same test images"
        weights = {
            name: Counter(_frozen(r) for r in members if _name(r) == name and _frozen(r)) for name in _names(members)
        }
        usual = {name: count.most_common(1)[0][0] for name, count in weights.items() if count}
        main = [r for r in members if not _frozen(r) or _frozen(r) == usual[_name(r)]]
        groups.append(Group(data, f"{data}, {which}", main))
        for name, count in weights.items():
            for hash_ in [h for h in count if h != usual[name]]:
                other = [r for r in members if _name(r) == name and _frozen(r) == hash_]
                reason = f"{data}, over {name} with other weights ({hash_[:8]}, not {usual[name][:8]})"
                groups.append(Group(f"{data}, other {name}", reason, other))
    return groups


def _images(result: Result) -> str:
    """What identifies a run's test images; without its decisions, the configuration that made them."""
    known = result.summary.get("test_images") or (result.decisions.images if result.decisions else None)
    if known:
        return str(known)
    data = {key: value for key, value in result.setting.items() if key.startswith("data.") and "batch_size" not in key}
    return ", ".join(f"{key.removeprefix('data.')}={value}" for key, value in data.items() if key != "data._target_")


def _frozen(result: Result) -> str:
    known = result.summary.get("frozen_network")
    return str(known or (result.decisions.network if result.decisions else "") or "")


def _name(result: Result) -> str:
    return str(result.summary["backbone"])


def _names(results: list[Result]) -> list[str]:
    return sorted({_name(result) for result in results})


def _flat(node: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None and value is not False:
            yield f"{prefix}{key}", str(value)
