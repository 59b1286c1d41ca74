"""The result tables of the early-exit agents on digits, three seeds.

    python benchmarks/exits.py [agent …]      (default: msdnet branchynet cdl distiller; minutes each)

Writes a row for each run to benchmarks/results/exits.csv (rows of other agents stay), and prints the table.
"""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "exits.csv"
SEEDS = (0, 1, 2)
FIGURES = ("accuracy", "full_accuracy", "macs_fraction", "full_macs", "random_accuracy", "oracle_accuracy")
EXTRA = {"msdnet": ["data.train=60000"], "cdl": ["backbone.heads=linear", "backbone.exits=[3,5,7,9,11]"]}
"""What the table's runs ask for beyond the defaults."""


def run(agent: str, seed: int) -> dict[str, str]:
    """Train once; the run's row."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [f"agent={agent}", f"seed={seed}", f"run.dir={folder}/run", "tracking=none", *EXTRA.get(agent, [])]
        subprocess.run([sys.executable, "-m", "policyskip", "train", *arguments], check=True)
        summary = json.loads((Path(folder) / "run" / "summary.json").read_text())
    row = {"agent": agent, "seed": str(seed), "steps": str(summary["steps"]), "seconds": str(summary["seconds"])}
    row |= {name: f"{summary[f'test/{name}']:.6g}" for name in FIGURES}
    random_share = summary["test/random_macs"] / summary["test/full_macs"]
    oracle_share = summary["test/oracle_macs"] / summary["test/full_macs"]
    return row | {"random_share": f"{random_share:.4f}", "oracle_share": f"{oracle_share:.4f}"}


def table(rows: list[dict[str, str]]) -> str:
    """Mean and standard deviation over seeds for each agent, in Markdown."""
    lines = [
        "| agent | own last exit | each image its own exit | MACs of that, heads included "
        "| random exits, same rates | oracle |",
        "|---|---|---|---|---|---|",
    ]
    for agent in dict.fromkeys(row["agent"] for row in rows):
        mine = [row for row in rows if row["agent"] == agent]

        def mean(name: str, scale: float = 100, mine: list[dict[str, str]] = mine) -> str:
            values = [scale * float(row[name]) for row in mine]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            return f"{statistics.mean(values):.2f} ± {spread:.2f}"

        oracle = f"{mean('oracle_accuracy')} at {mean('oracle_share', 1)}"
        cells = [agent, mean("full_accuracy"), mean("accuracy"), mean("macs_fraction", 1)]
        lines.append("| " + " | ".join([*cells, mean("random_accuracy"), oracle]) + " |")
    return "\n".join(lines)


def main() -> None:
    agents = sys.argv[1:] or ["msdnet", "branchynet", "cdl", "distiller"]
    known = list(csv.DictReader(RESULTS.open())) if RESULTS.exists() else []
    rows = [row for row in known if row["agent"] not in agents]
    for agent in agents:
        for seed in SEEDS:
            rows.append(run(agent, seed))
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=list(rows[-1]))
                writer.writeheader()
                writer.writerows(rows)
    print(table(rows))


if __name__ == "__main__":
    main()
