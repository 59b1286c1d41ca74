"""What the adapter for Stable-Baselines3 adds to a step of the environment, 256 images side by side, random actions.

    python benchmarks/adapter.py [threads] [repetitions] [device]      (default: 1 30 cpu; a minute or two)

Two environments over the same images take the same actions, one by itself and one through the adapter; in every other
repetition the adapter's environment steps first. A repetition has at least as many steps as an episode. The figures are
medians over repetitions, of the times and of their difference. The networks are those of the package; actions are numpy
arrays, as SB3's are.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from policyskip.envs.base import ImageVectorEnv
from policyskip.envs.block_selection import BlockSelectionVectorEnv
from policyskip.envs.early_exit import EarlyExitVectorEnv
from policyskip.envs.layer_skip import LayerSkipVectorEnv
from policyskip.envs.sb3 import SB3VecEnv

SIDE_BY_SIDE = 256
Make = Callable[[], ImageVectorEnv | EarlyExitVectorEnv]


def timed(step: Callable[[np.ndarray], object], action: np.ndarray, device: str) -> float:
    """Return the milliseconds that a step takes, until the device has finished its work too."""
    started = time.perf_counter()
    step(action)
    if device == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - started)


def measure(make: Make, steps: int, repetitions: int, device: str) -> tuple[float, float, float]:
    """Return the median milliseconds of a step by itself, of one through the adapter, and of their difference."""
    plain, adapter = make(), SB3VecEnv(make())
    plain.reset(seed=0)
    adapter.seed(0)
    adapter.reset()
    plain.action_space.seed(0)

    def repetition(adapter_first: bool) -> tuple[float, float]:
        alone = through = 0.0
        for _ in range(steps):
            action = plain.action_space.sample()
            if adapter_first:
                through += timed(adapter.step, action, device)
            alone += timed(plain.step, action, device)
            if not adapter_first:
                through += timed(adapter.step, action, device)
        return alone / steps, through / steps

    repetition(False)  # warms up
    pairs = [repetition(bool(i % 2)) for i in range(repetitions)]
    alone, through = zip(*pairs, strict=True)
    return (
        statistics.median(alone),
        statistics.median(through),
        statistics.median(b - a for a, b in pairs),
    )


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    repetitions = int(sys.argv[2]) if len(sys.argv) > 2 else 30
    device = sys.argv[3] if len(sys.argv) > 3 else "cpu"
    cases: list[tuple[str, Make, int]] = [
        ("BlockSelection", lambda: BlockSelectionVectorEnv(SIDE_BY_SIDE, device=device), 1),
        ("LayerSkip", lambda: LayerSkipVectorEnv(SIDE_BY_SIDE, device=device), 15),
        ("EarlyExit", lambda: EarlyExitVectorEnv(SIDE_BY_SIDE, device=device), 4),
        ("EarlyExit, cached", lambda: EarlyExitVectorEnv(SIDE_BY_SIDE, cached=True, device=device), 50),
    ]
    print("| environment | a step, ms | through the adapter, ms | added, ms | added |\n|---|---|---|---|---|")
    for name, make, steps in cases:
        alone, through, added = measure(make, steps, repetitions, device)
        print(f"| {name} | {alone:.3f} | {through:.3f} | {added:.3f} | {100 * added / alone:.1f} % |", flush=True)
