"""All agents on digits in one table: five seeds each, on test images, beside the best fixed choice of equal cost.

    python benchmarks/agents.py [name …]      (default: all of them; two hours on two cores)

Runs go into runs/benchmark-<name>-<seed>; a run that has finished there is not trained again. Writes a row for each run
to benchmarks/results/agents.csv (rows of other runs stay), and prints the table.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from policyskip.intervals import mean_and_half_interval

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
    *("static_accuracy", "static_margin", "static_margin_ci95"),
)


def run(name: str, seed: int) -> dict[str, str]:
    """Train one run, unless its folder is there and finished, and return its row."""
    folder = Path("runs") / f"benchmark-{name}-{seed}"
    if not (folder / "policy.json").exists():
        arguments = [f"+experiment=digits_{name}", f"seed={seed}", f"run.dir={folder}", "tracking=none"]
        subprocess.run([sys.executable, "-m", "policyskip", "train", *arguments], check=True)
    summary = json.loads((folder / "summary.json").read_text())
    row = {"name": name, "env": summary["env"], "seed": str(seed), "steps": str(summary["steps"])}
    row["seconds"] = str(summary["seconds"])
    return row | {figure: f"{summary[f'test/{figure}']:.6g}" for figure in FIGURES}


def cell(rows: list[dict[str, str]], figure: str, scale: float = 1, digits: int = 2, sign: str = "") -> str:
    """Write the mean over seeds, with ± half its 95 % interval (Student's t) where there are several seeds."""
    mean, half = mean_and_half_interval([scale * float(row[figure]) for row in rows])
    return f"{mean:{sign}.{digits}f}" if half is None else f"{mean:{sign}.{digits}f} ± {half:.{digits}f}"


def table(rows: list[dict[str, str]]) -> str:
    """Write the figures of every agent in Markdown."""
    lines = [
        "| agent | environment | its network, whole | accuracy | MACs, its own in | best fixed choice, equal cost "
        "| margin | distinct decisions | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in AGENTS:
        own_rows: list[dict[str, Any]] = [row for row in rows if row["name"] == name]
        if own_rows:
            agent = name.removesuffix("_layer_skip").removesuffix("_early_exit")
            cells = [agent + (" (sees the label)" if name == "oracle" else ""), own_rows[0]["env"]]
            cells += [
                cell(own_rows, "full_accuracy", 100),
                cell(own_rows, "accuracy", 100),
                cell(own_rows, "macs_fraction"),
            ]
            cells += [cell(own_rows, "static_accuracy", 100), cell(own_rows, "static_margin", 100, sign="+")]
            cells += [
                ", ".join(row["unique_decisions"] for row in own_rows),
                cell(own_rows, "seconds", digits=0).split(" ±")[0],
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


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
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=list(row))
                writer.writeheader()
                writer.writerows(rows)
    print(table(list(csv.DictReader(RESULTS.open()))))


if __name__ == "__main__":
    main()
