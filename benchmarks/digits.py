"""The result tables of README.md and docs/agents/blockdrop.md: BlockDrop on digits, three seeds, several penalties.

    python benchmarks/digits.py [penalty …]      (default: 1 4 12; about twelve minutes a penalty on two CPU cores)

Writes a row for each run to benchmarks/results/digits.csv (rows of other penalties stay), and prints the table.
"""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from verdicts import figures_of, write_rows

RESULTS = Path(__file__).parent / "results" / "digits.csv"
SEEDS = (0, 1, 2)
FIGURES = (
    *("accuracy", "full_accuracy", "kept_mean", "kept_sd", "macs_fraction", "policy_macs", "unique_decisions"),
    *("verdict", "rival", "rival_accuracy", "rival_margin", "rival_low", "rival_high"),
)


def run(penalty: str, seed: int) -> dict[str, str]:
    """Train one run in a temporary folder, and return its row."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["agent=blockdrop", f"reward.penalty={penalty}", f"seed={seed}", f"run.dir={folder}/run"]
        command = [sys.executable, "-m", "policyskip", "train", *arguments, "tracking=none"]
        subprocess.run(command, check=True)
        return row(penalty, json.loads((Path(folder) / "run" / "summary.json").read_text()))


def row(penalty: str, summary: dict[str, Any]) -> dict[str, str]:
    """Return a run's row: its settings and its test figures."""
    seed = summary["seed"]
    row = {"penalty": penalty, "seed": str(seed), "steps": str(summary["steps"]), "seconds": str(summary["seconds"])}
    row |= figures_of(summary, FIGURES)
    quarters = summary["test/kept_by_difficulty"]
    return row | {f"kept_quarter_{i + 1}": f"{kept:.3f}" for i, kept in enumerate(quarters)}


def table(rows: list[dict[str, str]]) -> str:
    """Write the means and standard deviations over seeds for each penalty in Markdown."""
    lines = [
        "| γ | full network | policy | strongest rival of equal cost | margin | pays? | blocks kept "
        "| easiest → hardest quarter | MACs, policy's own in | decisions |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = [row for row in rows if row["rival_margin"]]  # those of older versions have none
    for penalty in sorted({row["penalty"] for row in rows}, key=float):
        own_rows = [row for row in rows if row["penalty"] == penalty]

        def mean(name: str, scale: float = 1, own_rows: list[dict[str, str]] = own_rows) -> str:
            values = [scale * float(row[name]) for row in own_rows]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            return f"{statistics.mean(values):.2f} ± {spread:.2f}"

        quarters = [statistics.mean(float(row[f"kept_quarter_{i}"]) for row in own_rows) for i in (1, 4)]
        cells = [penalty, mean("full_accuracy", 100), mean("accuracy", 100), mean("rival_accuracy", 100)]
        cells += [mean("rival_margin", 100), ", ".join(row["verdict"] for row in own_rows), mean("kept_mean")]
        cells += [f"{quarters[0]:.1f} → {quarters[1]:.1f}"]
        cells += [mean("macs_fraction"), ", ".join(row["unique_decisions"] for row in own_rows)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    penalties = sys.argv[1:] or ["1", "4", "12"]
    known = list(csv.DictReader(RESULTS.open())) if RESULTS.exists() else []
    rows = [row for row in known if row["penalty"] not in penalties]
    for penalty in penalties:
        for seed in SEEDS:
            rows.append(run(penalty, seed))
            write_rows(RESULTS, rows)
    print(table(list(csv.DictReader(RESULTS.open()))))


if __name__ == "__main__":
    main()
