"""The result tables of the early-exit agents on digits, three seeds.

    python benchmarks/exits.py [agent …]      (default: msdnet branchynet cdl distiller; minutes a seed)

Runs go into runs/benchmark-<agent>-<seed>; a run that has finished there is not trained again. Writes a row for each
run to benchmarks/results/exits.csv (rows of other agents stay), and prints the table.

A row also has two figures of the run's network on the test images: ``budget_gap``, the largest difference between a
budget of ``BUDGETS`` and the cost that is reached with it, as a share of the full cost; and ``differ``, the number of
images whose exit or answer is not the same when the network really stops and when cached outputs are replayed.
"""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch

import policyskip
from policyskip.backbones import run_until
from policyskip.data import digits
from policyskip.deployment.predictors import ThresholdPredictor
from policyskip.exits.cache import cache_exits
from policyskip.exits.calibration import curve_of
from policyskip.exits.rules import exit_of
from policyskip.exits.targets import choose
from policyskip.policies.thresholds import ThresholdPolicy

RESULTS = Path(__file__).parent / "results" / "exits.csv"
SEEDS = (0, 1, 2)
BUDGETS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
FIGURES = (
    *("accuracy", "full_accuracy", "macs_fraction", "full_macs", "unique_decisions"),
    *("rival_accuracy", "rival_margin", "rival_low", "rival_high", "random_accuracy", "random_macs"),
    *("oracle_accuracy", "oracle_macs", "label_oracle_accuracy", "label_oracle_macs"),
)


def run(agent: str, seed: int) -> dict[str, str]:
    """Train one run, unless its folder is there and finished, and return its row."""
    folder = Path("runs") / f"benchmark-{agent}-{seed}"
    if not (folder / "policy.json").exists():
        arguments = [f"agent={agent}", f"seed={seed}", f"run.dir={folder}", "tracking=none"]
        subprocess.run([sys.executable, "-m", "policyskip", "train", *arguments], check=True)
    summary = json.loads((folder / "summary.json").read_text())
    row = {"agent": agent, "seed": str(seed), "steps": str(summary["steps"]), "seconds": str(summary["seconds"])}
    row |= {name: f"{summary[f'test/{name}']:.6g}" for name in FIGURES}
    row |= {f"exit_{n + 1}": f"{share:.4f}" for n, share in enumerate(summary["test/exit_share"])}
    return row | checks(folder)


@torch.no_grad()
def checks(folder: Path) -> dict[str, str]:
    """Compute ``budget_gap`` and ``differ`` of a run, and its accuracy and cost at a budget of 0.6."""
    predictor = policyskip.load(folder)
    assert isinstance(predictor, ThresholdPredictor)
    data = digits(torch.device("cpu"), train=1, validation=2000, test=4000)
    network, rule = predictor.network, predictor.policy.rule
    validation, test = cache_exits(network, data.validation), cache_exits(network, data.test)
    curve, gaps, differ, row = curve_of(validation, rule.name, predictor.search), [], 0, {}
    for budget in BUDGETS:
        point = choose(curve, macs_fraction=budget)
        exit_M = exit_of(rule, test.probability_MNC, point.thresholds)
        accuracy, macs = test.judge(exit_M)
        gaps.append(abs(macs.item() / test.costs.full - budget))
        if budget == 0.6:
            row = {"accuracy_60": f"{accuracy.item():.6g}", "macs_60": f"{macs.item() / test.costs.full:.4f}"}
        policy = ThresholdPolicy(point.rule, point.thresholds)
        results = [run_until(network, images, policy.leave) for images in data.test.images.split(256)]
        logits_MC, real_M = (torch.cat(column) for column in zip(*results, strict=True))
        answer_M = test.logits_MNC.argmax(2).gather(1, exit_M.unsqueeze(1)).squeeze(1)
        differ += int(((real_M != exit_M) | (logits_MC.argmax(1) != answer_M)).sum())
    return row | {"budget_gap": f"{max(gaps):.4f}", "differ": str(differ)}


def table(rows: list[dict[str, str]]) -> str:
    """Write the means and standard deviations over seeds for each agent in Markdown."""
    lines = [
        "| agent | its last exit | each image its own exit | MACs of that, heads included "
        "| at a budget of 0.60: accuracy, MACs | strongest rival, equal cost | margin "
        "| random exits, same rates | oracle, at its MACs | budget missed by, at most |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for agent in dict.fromkeys(row["agent"] for row in rows):
        own_rows = [row for row in rows if row["agent"] == agent]

        def mean(name: str, scale: float = 100, own_rows: list[dict[str, str]] = own_rows) -> str:
            values = [scale * float(row[name]) for row in own_rows]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            return f"{statistics.mean(values):.2f} ± {spread:.2f}"

        oracle = statistics.mean(float(row["oracle_macs"]) / float(row["full_macs"]) for row in own_rows)
        cells = [agent, mean("full_accuracy"), mean("accuracy"), mean("macs_fraction", 1)]
        cells += [f"{mean('accuracy_60')}, {mean('macs_60', 1)}", mean("rival_accuracy")]
        cells += [mean("rival_margin"), mean("random_accuracy"), f"{mean('oracle_accuracy')} at {oracle:.2f}"]
        lines.append("| " + " | ".join([*cells, f"{max(float(row['budget_gap']) for row in own_rows):.3f}"]) + " |")
    return "\n".join(lines)


def main() -> None:
    agents = sys.argv[1:] or ["msdnet", "branchynet", "cdl", "distiller"]
    known = list(csv.DictReader(RESULTS.open())) if RESULTS.exists() else []
    rows = [row for row in known if row["agent"] not in agents]
    for agent in agents:
        for seed in SEEDS:
            rows.append(run(agent, seed))
            RESULTS.parent.mkdir(exist_ok=True)
            names = list(dict.fromkeys(name for row in rows for name in row))
            with RESULTS.open("w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=names)
                writer.writeheader()
                writer.writerows(rows)
    print(table(rows))


if __name__ == "__main__":
    main()
