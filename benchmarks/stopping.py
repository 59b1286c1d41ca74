"""Does leaving early save time? ``predict`` against the same network run to its last exit, side by side.

    python benchmarks/stopping.py [RUN …]      (default: the runs of benchmarks/exits.py with seed 0)

Each run is measured on its own test images, with its deployed thresholds and with a budget of half the cost, at batch
sizes 1 and 256. ``predict`` and the whole network take turns in one process, and both are folded and channels last. The
figures are medians over repeats of the ratio of their times (time_ratio), and beside it the ratio of their MACs
(mac_ratio). A MAC does not take the same time everywhere in a network, so there is a third ratio (parts_ratio): the
share of the whole network's time that is spent in the segments and heads that the images go through, as measured on the
way to the last exit. If the time ratio is above it, the difference is the price of leaving. Writes
benchmarks/results/stopping.csv.
"""

from __future__ import annotations

import csv
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

import policyskip
from policyskip.backbones import ExitNetwork
from policyskip.build import build_data
from policyskip.data import batch_at
from policyskip.deployment.predictors import ThresholdPredictor
from policyskip.exits.cache import cache_exits
from policyskip.exits.calibration import curve_of
from policyskip.exits.targets import choose
from policyskip.policies.thresholds import ThresholdPolicy

RESULTS = Path(__file__).parent / "results" / "stopping.csv"
RUNS = [f"runs/benchmark-{agent}-0" for agent in ("msdnet", "branchynet", "cdl", "distiller")]
SIZES = ((1, 300, 9), (256, 2048, 15))
"""Batch size, images, and repeats."""


def to_the_end(network: ExitNetwork, batches: Sequence[torch.Tensor]) -> list[float]:
    """Run the network to its last exit, and return the seconds of each segment and its head for all images."""
    seconds = [0.0] * network.num_exits
    for images in batches:
        before = time.perf_counter()
        state = network.begin(images)
        for n in range(network.num_exits):
            state = network.segment(n, state)
            network.head(n, state)
            now = time.perf_counter()
            seconds[n] += now - before
            before = now
    return seconds


def leaving(predictor: ThresholdPredictor, batches: Sequence[torch.Tensor]) -> float:
    """Return the seconds that all images take when each leaves where the policy lets it."""
    started = time.perf_counter()
    for images in batches:
        predictor.predict(images)
    return time.perf_counter() - started


@torch.no_grad()
def compare(predictor: ThresholdPredictor, images: torch.Tensor, batch: int, repeats: int) -> dict[str, str]:
    """Measure one predictor at one batch size, and return the figures of its row."""
    batches = images.split(batch)
    prediction = predictor.predict(images)
    reached = [float((prediction.exit_B >= n).double().mean()) for n in range(predictor.network.num_exits)]
    full, early, ratios, expected = [], [], [], []
    for repeat in range(repeats + 1):
        seconds, spent = to_the_end(predictor.network, batches), leaving(predictor, batches)
        if repeat:  # round 0 warms up
            full.append(len(images) / sum(seconds))
            early.append(len(images) / spent)
            ratios.append(spent / sum(seconds))
            expected.append(sum(share * s for share, s in zip(reached, seconds, strict=True)) / sum(seconds))
    macs, ratio = float(prediction.macs_B.mean()) / predictor.costs.full, statistics.median(ratios)
    parts_ratio = statistics.median(expected)
    return {
        "batch": str(batch),
        "images_per_second_to_the_end": f"{statistics.median(full):.0f}",
        "images_per_second_leaving_early": f"{statistics.median(early):.0f}",
        "time_ratio": f"{ratio:.3f}",
        "mac_ratio": f"{macs:.3f}",
        "time_over_macs": f"{ratio / macs:.3f}",
        "parts_ratio": f"{parts_ratio:.3f}",
        "time_over_parts": f"{ratio / parts_ratio:.3f}",
        "repeats": " ".join(f"{ratio:.3f}" for ratio in ratios),
    }


def main() -> None:
    rows = []
    for run in sys.argv[1:] or RUNS:
        saved = yaml.safe_load((Path(run) / "config.yaml").read_text())
        data, _ = build_data(saved["data"], torch.device("cpu"))
        predictor = policyskip.load(run)
        assert isinstance(predictor, ThresholdPredictor)
        curve = curve_of(
            cache_exits(predictor.network, data.validation.plain()), predictor.policy.rule.name, predictor.search
        )
        images = batch_at(data.test.plain(), torch.arange(2048)).images
        half = choose(curve, macs_fraction=0.5)
        for name, policy in (("deployed", predictor.policy), ("0.5", ThresholdPolicy(half.rule, half.thresholds))):
            predictor.policy = policy
            for batch, count, repeats in SIZES:
                figures = compare(predictor, images[:count], batch, repeats)
                rows.append({"run": Path(run).name, "thresholds": name} | figures)
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
