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
from policyskip.data import digits


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


@torch.no_grad()
def main() -> None:
    images = digits(torch.device("cpu"), 1, 1, 2048).test.images
    print("| run | batch | images a second, to the end | leaving early | time ratio | MAC ratio |")
    print("|---|---|---|---|---|---|")
    for run in sys.argv[1:]:
        predictor = policyskip.load(run)
        network = predictor.network

        def whole(part: torch.Tensor, network: torch.nn.Module = network) -> torch.Tensor:
            return network(part)

        for batch, count, repeats in ((1, 256, 5), (256, 2048, 9)):
            parts = images[:count].split(batch)
            macs = float(predictor.predict(images[:count]).macs_B.mean()) / predictor.costs.full
            times: dict[str, list[float]] = {"full": [], "early": []}
            for repeat in range(repeats + 1):
                full = seconds(lambda: [whole(part) for part in parts])
                early = seconds(lambda: [predictor.predict(part) for part in parts])
                if repeat:  # the first warms up
                    times["full"].append(full)
                    times["early"].append(early)
            ratio = statistics.median(early / full for early, full in zip(times["early"], times["full"]))
            rates = [count / statistics.median(times[name]) for name in ("full", "early")]
            print(f"| {run} | {batch} | {rates[0]:.0f} | {rates[1]:.0f} | {ratio:.3f} | {macs:.3f} |", flush=True)


if __name__ == "__main__":
    main()
