"""All agents on digits in one table: three seeds each, on test images, beside the strongest rival of equal cost.

    python benchmarks/agents.py [name …]      (default: all of them; hours on two cores)

Runs go into runs/benchmark-<name>-<seed>, ``--jobs`` of them side by side; a finished run is not made again, and one
that was stopped goes on. Writes a row for each run to benchmarks/results/agents.csv (rows of other runs stay). Then
``policyskip compare`` judges all runs that are there, into runs/results, and the table is printed.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from functools import partial
from pathlib import Path

from side_by_side import Job, run_all
from verdicts import figures_of, verdict_table, write_rows

RESULTS = Path(__file__).parent / "results" / "agents.csv"
SEEDS = (0, 1, 2)
AGENTS = (
    *("blockdrop", "ppo", "a2c", "skipnet", "ppo_layer_skip", "dqn_layer_skip", "ppo_early_exit", "a2c_early_exit"),
    *("dqn_early_exit", "branchynet", "msdnet", "cdl", "distiller"),
    *("random", "full", "first", "distributed", "best_static", "oracle"),
)
"""Rows of the table; each is what ``policyskip train +experiment=digits_<name>`` trains."""
DETERMINISTIC = ("full", "first", "distributed", "best_static", "oracle")
"""Agents that draw no random numbers, so that one run is enough."""
FIGURES = (
    *("accuracy", "full_accuracy", "macs_fraction", "policy_macs", "full_macs", "unique_decisions"),
    *("verdict", "verdict_because", "rival", "rival_accuracy", "rival_macs", "rival_margin", "rival_low", "rival_high"),
)


def folder_of(name: str, seed: int) -> Path:
    return Path("runs") / f"benchmark-{name}-{seed}"


def is_finished(folder: Path) -> bool:
    return all((folder / name).exists() for name in ("summary.json", "policy.json"))


def commands(name: str, seed: int) -> list[list[str]]:
    """Return the command that makes a run, or goes on with it."""
    folder = folder_of(name, seed)
    if (folder / "config.yaml").exists():
        return [["train", f"run.resume={folder}"]]
    shutil.rmtree(folder, ignore_errors=True)
    return [["train", f"+experiment=digits_{name}", f"seed={seed}", f"run.dir={folder}", "tracking=none"]]


def write_row(name: str, seed: int) -> None:
    """Write the figures of a finished run into the CSV file."""
    summary = json.loads((folder_of(name, seed) / "summary.json").read_text())
    row = {"name": name, "env": summary["env"], "seed": str(seed), "steps": str(summary["steps"])}
    row |= {"seconds": str(summary["seconds"])} | figures_of(summary, FIGURES)
    known = list(csv.DictReader(RESULTS.open())) if RESULTS.exists() else []
    write_rows(RESULTS, [other for other in known if (other["name"], other["seed"]) != (name, str(seed))] + [row])


def table(comparison: Path) -> str:
    """Write the figures of every agent in Markdown."""
    rows = []
    for name in AGENTS:
        agent = name.removesuffix("_layer_skip").removesuffix("_early_exit")
        runs = [folder_of(name, seed) for seed in SEEDS]
        envs = [
            json.loads((run / "summary.json").read_text())["env"] for run in runs if (run / "summary.json").exists()
        ]
        rows += [((agent, envs[0]), [run.name for run in runs])] if envs else []
    return verdict_table(comparison, ("agent", "environment"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"out of {', '.join(AGENTS)}")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    options = parser.parse_args()
    names = options.names or list(AGENTS)
    if unknown := [name for name in names if name not in AGENTS]:
        parser.error(f"there is no agent {unknown[0]} here; there are {', '.join(AGENTS)}")
    runs = [(name, seed) for name in names for seed in ((0,) if name in DETERMINISTIC else SEEDS)]
    for name, seed in runs:
        if is_finished(folder_of(name, seed)):
            write_row(name, seed)
    jobs = [
        Job(folder_of(name, seed).name, partial(commands, name, seed), done=partial(write_row, name, seed))
        for name, seed in runs
        if not is_finished(folder_of(name, seed))
    ]
    failed = run_all(jobs, options.jobs, Path("runs/logs"))
    comparison = Path("runs/results")
    command = ["compare", "runs=[runs/benchmark-*]", f"output={comparison}", "overwrite=true", "tracking=none"]
    failed += run_all([Job("compare", lambda: [command])], 1, Path("runs/logs"))
    print(table(comparison))
    if failed:
        raise SystemExit(f"not finished: {', '.join(failed)}; the same command goes on")


if __name__ == "__main__":
    main()
