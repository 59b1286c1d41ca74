"""Does leaving early save time? A run's predictions against its own network to the last exit, side by side.

    python benchmarks/stopping.py RUN [RUN …]

Batch 1 and batch 256, test images of digits, interleaved in one process; medians over repeats, and the MAC ratio beside
the time ratio.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch

import policyskip
import policyskip.deployment
from policyskip.data import digits


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


@torch.no_grad()
def compare(predictor: policyskip.deployment.ExitPredictor, images: torch.Tensor, batch: int, repeats: int) -> str:
    """Rates, time ratio and MAC ratio as the cells of a row."""
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
    rates = f"{statistics.median(full):.0f} | {statistics.median(early):.0f}"
    return f"{batch} | {rates} | {statistics.median(ratios):.3f} | {macs:.3f}"


def main() -> None:
    images = digits(torch.device("cpu"), 1, 1, 2048).test.images
    print("| run | batch | images a second, to the end | leaving early | time ratio | MAC ratio |")
    print("|---|---|---|---|---|---|")
    for run in sys.argv[1:]:
        predictor = policyskip.load(run)
        for batch, count, repeats in ((1, 256, 5), (256, 2048, 9)):
            print(f"| {run} | {compare(predictor, images[:count], batch, repeats)} |", flush=True)


if __name__ == "__main__":
    main()
