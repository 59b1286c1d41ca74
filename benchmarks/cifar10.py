"""All agents on real images in one table: CIFAR-10 (JPEG) over a ResNet-32 and a ResNet-110, or Fashion-MNIST.

    python benchmarks/cifar10.py --data FOLDER --networks FOLDER       (hours on two cores; minutes on a GPU)
    python benchmarks/cifar10.py --task fashion_mnist --networks FOLDER

``--networks`` names the folder of the trained networks, ``resnet32_cifar10jpeg.safetensors`` and
``resnet110_cifar10jpeg.safetensors``, or ``resnet20_fashion_mnist.safetensors``; ``policyskip pretrain`` makes such
files. A network whose file is not there is left out.

Runs go into ``runs/<task>/<network>-<row>-<seed>``. A finished run is not made again, and one that was stopped goes on.
After every run, its figures are written to benchmarks/results/<task>.csv; at the end ``policyskip compare`` is run, and
the table of docs/results.md is printed. ``--rows blockdrop cdl`` takes only rows whose names begin so; arguments behind
``--`` go to every run, as in ``-- front.budget=600``.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from pathlib import Path

import side_by_side
import torch
from side_by_side import Job
from verdicts import figures_of, verdict_table, write_rows

from policyskip.data import imagefolder

RESULTS = Path(__file__).parent / "results"
FIGURES = (
    *("accuracy", "full_accuracy", "macs_fraction", "policy_macs", "full_macs", "kept_mean", "unique_decisions"),
    *("verdict", "verdict_because", "rival", "rival_accuracy", "rival_macs", "rival_margin", "rival_low", "rival_high"),
    *("rival_finished", "oracle_accuracy", "oracle_macs"),
)
"""What a row of the CSV file has of a summary's ``test/…``; empty where a summary lacks it."""
BUDGETS = (0.4, 0.6)
"""Shares of the MACs for which thresholds are chosen; a network whose first exit costs more has no row for it."""


@dataclass(frozen=True)
class Task:
    """Holds a data set, where it lies by default, and the networks over it: depth and name of the weights' file."""

    arguments: tuple[str, ...]
    root: str
    networks: dict[int, str]


TASKS = {
    "cifar10": Task(
        ("data=imagefolder",),
        "data/cifar10",
        {110: "resnet110_cifar10jpeg.safetensors", 32: "resnet32_cifar10jpeg.safetensors"},
    ),
    "fashion_mnist": Task(
        ("data=fashion_mnist",), "/usr/share/datasets/fashion-mnist", {20: "resnet20_fashion_mnist.safetensors"}
    ),
}


@dataclass(frozen=True)
class Row:
    """Holds one row of the table.

    Attributes:
        arguments: what ``policyskip train`` is given, beside data, seed and folder.
        learns: whether seeds make a difference; a row that draws no random numbers has one run.
        base: the row whose trained network this row takes with other thresholds, for ``budget``; "" trains its own.
        budget: share of the MACs.
        network: the name of the row's network where that is not the one that all rows share.
    """

    name: str
    arguments: tuple[str, ...] = ()
    learns: bool = True
    base: str = ""
    budget: float = 0.0
    network: str = ""


def rows_of(depth: int, checkpoint: str) -> list[Row]:
    """List the rows over a CIFAR ResNet, those that say most first."""
    blocks = (depth - 2) // 2
    deep = blocks > 20
    skipping = ("backbone=cifar_resnet", f"backbone.depth={depth}", f"backbone.checkpoint={checkpoint}")
    leaving = (f"backbone.depth={depth}", f"backbone.checkpoint={checkpoint}")
    three, four, five = (f"backbone.exits={[blocks * i // (n + 1) for i in range(1, n + 1)]}" for n in (3, 4, 5))

    def train(name: str, agent: str, *arguments: str, steps: int = 0, learns: bool = True) -> Row:
        schedule = (f"train.steps={steps}", f"train.validate_every={max(1, steps // 6)}") if steps else ()
        return Row(name, (f"agent={agent}", *arguments, *schedule), learns)

    def calibrated(base: str) -> list[Row]:
        return [Row(f"{base}_{budget}", base=base, budget=budget) for budget in BUDGETS]

    updates = 400 if deep else 600
    rows = [
        train(f"blockdrop_{penalty}", "blockdrop", *skipping, f"reward.penalty={penalty}", steps=updates)
        for penalty in (1, 2, 4, 8, 16)
    ]
    rows += [train("cdl", "cdl", *leaving, five, steps=500), *calibrated("cdl")]
    fixed = ("full", "first", "distributed", "best_static", "oracle")
    rows += [train(name, name, *skipping, "reward.penalty=4", learns=False) for name in fixed]
    rows += [train("random", "random", *skipping, "reward.penalty=4")]
    rows += [
        train(f"skipnet_frozen_{alpha}", "skipnet", *skipping, "agent.frozen=true", f"agent.alpha={alpha}", steps=400)
        for alpha in (0.1, 0.3)
    ]
    rows += [train("branchynet", "branchynet", *leaving, four, steps=500), *calibrated("branchynet")]
    rows += [train("ppo", "ppo", *skipping, "reward.penalty=4", steps=updates)]
    rows += [train("distiller", "distiller", *leaving, three, steps=500), *calibrated("distiller")]
    rows += [train("skipnet", "skipnet", *skipping, steps=updates)]
    rows += [
        train(f"{agent}_layer_skip", agent, "env=layer_skip", *skipping, "reward.penalty=4", *more, steps=updates // 2)
        for agent, more in (("ppo", ()), ("dqn", ("agent.buffer_size=300000",) if deep else ()))
    ]
    rows += [train("a2c", "a2c", *skipping, "reward.penalty=4", steps=updates)]
    if depth == 32:  # a network that it trains itself: one row is enough beside both of the others
        own = [train("msdnet", "msdnet", "backbone=msdnet_cifar", "data.batch_size=128", steps=4200)]
        rows += [replace(row, network="msdnet") for row in [*own, *calibrated("msdnet")]]
    return rows


@dataclass(frozen=True)
class Place:
    """Holds one run of a row: its folder, and what the commands have to be told about this machine."""

    row: Row
    network: str
    seed: int
    runs: Path
    moved: tuple[str, ...]  # keys of data that also a run that goes on may be given
    data: tuple[str, ...]

    def folder_of(self, row: str) -> Path:
        return self.runs / f"{self.network}-{row}-{self.seed}"

    @property
    def folder(self) -> Path:
        return self.folder_of(self.row.name)

    @property
    def after(self) -> str | None:
        """Return the run that has to be there first: it has the network, or the static front that others find then."""
        if self.row.base:
            return self.folder_of(self.row.base).name
        front = f"{self.network}-best_static-0"
        return front if "backbone=cifar_resnet" in self.row.arguments and front != self.folder.name else None

    @property
    def finished(self) -> bool:
        return all((self.folder / name).exists() for name in ("summary.json", "policy.json"))

    def commands(self) -> list[list[str]]:
        """Return the commands that make the run, or go on with it."""
        if self.row.base:
            return [["calibrate", f"run={self._copied()}", f"target.macs_fraction={self.row.budget}", *self.moved]]
        if (self.folder / "config.yaml").exists():
            return [["train", f"run.resume={self.folder}", *self.moved]]
        shutil.rmtree(self.folder, ignore_errors=True)
        new = (f"seed={self.seed}", f"run.dir={self.folder}", "tracking=none")
        return [["train", *self.row.arguments, *self.data, *self.moved, *new]]

    def _copied(self) -> Path:
        """Copy the run whose thresholds are to be chosen anew, under a name that no finished run has."""
        copy = self.folder.with_name(f"{self.folder.name}.part")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.folder_of(self.row.base), copy)
        return copy

    def done(self) -> None:
        """Give a run that was made from another its name."""
        if self.row.base:
            self.folder.with_name(f"{self.folder.name}.part").rename(self.folder)

    def line(self) -> dict[str, str]:
        """Return the run's line of the CSV file."""
        summary = json.loads((self.folder / "summary.json").read_text())
        line = {"network": self.network, "row": self.row.name, "seed": str(self.seed), "env": summary["env"]}
        line |= {"steps": str(summary["steps"]), "seconds": str(summary["seconds"])}
        return line | figures_of(summary, FIGURES)


def write_csv(path: Path, places: list[Place]) -> None:
    """Write the figures of the runs that are finished; the file's lines of other runs stay."""
    known = list(csv.DictReader(path.open())) if path.exists() else []
    key = itemgetter("network", "row", "seed")
    lines = list({key(line): line for line in [*known, *(p.line() for p in places if p.finished)]}.values())
    if lines:
        write_rows(path, lines)


def table(comparison: Path, places: list[Place]) -> str:
    """Write what ``policyskip compare`` found for every row in Markdown, in the order of the rows."""
    runs: dict[tuple[str, str], list[str]] = {}
    for place in places:
        runs.setdefault((place.network, place.row.name.replace("_", " ")), []).append(place.folder.name)
    return verdict_table(comparison, ("network", "agent"), runs.items())


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(TASKS), default="cifar10")
    parser.add_argument("--data", help="the folder of the images")
    parser.add_argument("--networks", type=Path, default=Path("data/networks"), help="the folder of the weights")
    parser.add_argument("--depths", type=int, nargs="+", help="of the networks, such as 110; default: all")
    parser.add_argument("--rows", nargs="+", default=[""], help="how the names of the rows begin; default: all rows")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--runs", type=Path, help="the folder of the runs; default: runs/<task>")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of <task>.csv")
    parser.add_argument("--seconds", type=float, help="stop after so long; the same command goes on later")
    parser.add_argument("--runs-only", action="store_true", help="make no comparison and no table at the end")
    parser.add_argument("more", nargs="*", help="arguments for every run, behind --")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    task, runs = TASKS[options.task], options.runs or Path("runs") / options.task
    root = options.data or task.root
    moved = (f"device={options.device}", f"data.root={root}")
    networks = {depth: options.networks / name for depth, name in task.networks.items()}
    missing = [str(path) for path in networks.values() if not path.exists()]
    networks = {d: p for d, p in networks.items() if p.exists() and (options.depths is None or d in options.depths)}
    if missing:
        print(f"not there, so left out: {', '.join(missing)}", flush=True)
    everything = [
        Place(row, row.network or f"resnet{depth}", seed, runs, moved, (*task.arguments, *options.more))
        for depth, path in networks.items()
        for row in rows_of(depth, str(path))
        for seed in (options.seeds if row.learns else options.seeds[:1])
    ]
    names = list(dict.fromkeys(place.row.name for place in everything))
    everything.sort(key=lambda place: names.index(place.row.name))  # each row over all networks, then the next row
    wanted = [p for p in everything if not p.finished and any(map(p.row.name.startswith, options.rows))]
    if "data=imagefolder" in task.arguments and wanted:
        side_by_side.decode_once()
        imagefolder(torch.device("cpu"), root)  # decodes every image
    path = options.results / f"{options.task}.csv"

    def done(place: Place) -> None:
        place.done()
        write_csv(path, everything)

    jobs = [
        Job(place.folder.name, place.commands, place.after, bool(place.row.base), partial(done, place))
        for place in wanted
    ]
    failed = side_by_side.run_all(jobs, options.jobs, runs / "logs", options.seconds)
    write_csv(path, everything)
    finished = [place for place in everything if place.finished]
    if finished and not options.runs_only:
        folders = ",".join(str(place.folder) for place in finished)
        command = ["compare", f"runs=[{folders}]", f"output={runs}/comparison", "overwrite=true", "tracking=none"]
        failed += side_by_side.run_all([Job("compare", lambda: [[*command, "images=false"]])], 1, runs / "logs")
        print(table(runs / "comparison", everything))
    if failed:
        raise SystemExit(f"not finished: {', '.join(failed)}; the same command goes on")


if __name__ == "__main__":
    main()
