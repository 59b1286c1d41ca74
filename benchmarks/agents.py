"""All agents on digits in one table: five seeds each, on test images, beside the strongest rival of equal cost.

    python benchmarks/agents.py [name …]      (default: all of them; two hours on two cores)

Runs go into runs/benchmark-<name>-<seed>; a run that has finished there is not trained again. Writes a row for each run
to benchmarks/results/agents.csv (rows of other runs stay). Then ``policyskip compare`` judges all runs that are there,
into runs/results, and the table is printed.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

from verdicts import figures_of, verdict_table, write_rows

RESULTS = Path(__file__).parent / "results" / "agents.csv"
SEEDS = (0, 1, 2, 3, 4)
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


def run(name: str, seed: int) -> dict[str, str]:
    """Train one run, unless its folder is there and finished, and return its row."""
    folder = folder_of(name, seed)
    if not (folder / "policy.json").exists():
        arguments = [f"+experiment=digits_{name}", f"seed={seed}", f"run.dir={folder}", "tracking=none"]
        subprocess.run([sys.executable, "-m", "policyskip", "train", *arguments], check=True)
    summary = json.loads((folder / "summary.json").read_text())
    row = {"name": name, "env": summary["env"], "seed": str(seed), "steps": str(summary["steps"])}
    row["seconds"] = str(summary["seconds"])
    return row | figures_of(summary, FIGURES)


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
    names = sys.argv[1:] or list(AGENTS)
    unknown = [name for name in names if name not in AGENTS]
    if unknown:
        sys.exit(f"there is no agent {unknown[0]} here; there are {', '.join(AGENTS)}")
    for name in names:
        for seed in (0,) if name in DETERMINISTIC else SEEDS:
            row = run(name, seed)
            known = list(csv.DictReader(RESULTS.open())) if RESULTS.exists() else []
            rows = [other for other in known if (other["name"], other["seed"]) != (name, str(seed))] + [row]
            write_rows(RESULTS, rows)
    comparison = Path("runs/results")
    command = ["compare", "runs=[runs/benchmark-*]", f"output={comparison}", "overwrite=true", "tracking=none"]
    subprocess.run([sys.executable, "-m", "policyskip", *command], check=True)
    print(table(comparison))


if __name__ == "__main__":
    main()
