"""Does leaving early save time? ``predict`` against the same network to its last exit, side by side.

    python benchmarks/stopping.py [RUN …]      (default: the runs of benchmarks/exits.py with seed 0)

For each run its deployed thresholds and a budget of half the cost, at batch 1 and batch 256, on test images of digits.
The two are interleaved in one process; medians over repeats of the ratio of their times, with the ratio of their MACs
beside it. Both are executed alike: folded, channels last. Writes benchmarks/results/stopping.csv.
"""

from __future__ import annotations

import csv
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import policyskip
from policyskip.agents.early_exit import ThresholdPolicy
from policyskip.data import digits
from policyskip.deployment import ExitPredictor
from policyskip.exits.cache import cache_exits
from policyskip.exits.calibration import choose, curve_of

RESULTS = Path(__file__).parent / "results" / "stopping.csv"
RUNS = [f"runs/benchmark-{agent}-0" for agent in ("msdnet", "branchynet", "cdl", "distiller")]
SIZES = ((1, 300, 9), (256, 2048, 15))
"""Batch size, images, and repeats."""


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


@torch.no_grad()
def compare(predictor: ExitPredictor, images: torch.Tensor, batch: int, repeats: int) -> dict[str, str]:
    """Rates, time ratio and MAC ratio."""
    parts = images.split(batch)
    full, early, ratios = [], [], []
    for repeat in range(repeats + 1):
        to_the_end = seconds(lambda: [predictor.network(part) for part in parts])
        leaving = seconds(lambda: [predictor.predict(part) for part in parts])
        if repeat:  # the first warms up
            full.append(len(images) / to_the_end)
            early.append(len(images) / leaving)
            ratios.append(leaving / to_the_end)
    macs = float(predictor.predict(images).macs_B.mean()) / predictor.costs.full
    time_ratio = statistics.median(ratios)
    return {
        "batch": str(batch),
        "images_per_second_to_the_end": f"{statistics.median(full):.0f}",
        "images_per_second_leaving_early": f"{statistics.median(early):.0f}",
        "time_ratio": f"{time_ratio:.3f}",
        "mac_ratio": f"{macs:.3f}",
        "time_over_macs": f"{time_ratio / macs:.3f}",
        "repeats": " ".join(f"{ratio:.3f}" for ratio in ratios),
    }


def main() -> None:
    data = digits(torch.device("cpu"), train=1, validation=2000, test=2048)
    rows = []
    for run in sys.argv[1:] or RUNS:
        predictor = policyskip.load(run)
        assert isinstance(predictor, ExitPredictor)
        curve = curve_of(cache_exits(predictor.network, data.validation), predictor.policy.rule.name, predictor.search)
        half = choose(curve, macs_fraction=0.5)
        for name, policy in (("deployed", predictor.policy), ("0.5", ThresholdPolicy(half.rule, half.thresholds))):
            predictor.policy = policy
            for batch, count, repeats in SIZES:
                found = compare(predictor, data.test.images[:count], batch, repeats)
                rows.append({"run": Path(run).name, "thresholds": name} | found)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*rows[0], "machine"])
        writer.writeheader()
        writer.writerows(row | {"machine": machine} for row in rows)
    columns = [column for column in rows[0] if column != "repeats"]
    print("| " + " | ".join(columns).replace("_", " ") + " |\n" + "|---" * len(columns) + "|")
    for row in rows:
        print("| " + " | ".join(row[column] for column in columns) + " |")


if __name__ == "__main__":
    main()
