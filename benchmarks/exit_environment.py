"""Steps a second of the cached exit environment.

    python benchmarks/exit_environment.py [seconds]

4,096 images side by side, random actions, torch's default threads; the median of five stretches.
"""

from __future__ import annotations

import statistics
import sys
import time

import gymnasium
import torch

import policyskip  # noqa: F401 - registers the environment

B = 4096


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 2.0
    env = gymnasium.make_vec("policyskip/EarlyExit-v0", num_envs=B, cached=True, split="validation")
    env.reset(seed=0)
    actions = [torch.rand(B) < 0.3 for _ in range(16)]
    rates = []
    for _ in range(5):
        started, count = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            env.step(actions[count % len(actions)])
            count += 1
        rates.append(B * count / (time.perf_counter() - started))
    print(f"{statistics.median(rates) / 1e6:.2f} million steps a second ({torch.get_num_threads()} threads)")


if __name__ == "__main__":
    main()
