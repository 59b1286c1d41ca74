"""Steps a second of the exit environment when it replays cached outputs, 4,096 images side by side, random actions.

    python benchmarks/early_exit_steps.py [threads]      (default: 1; seconds)

The cached outputs of 20,000 images are random numbers, which does not change the speed. The step of one image counts as
one step. Processor time is stated beside wall time, which is longer where other processes run.
"""

from __future__ import annotations

import sys
import time

import torch

from policyskip.backbones import ExitCosts
from policyskip.envs.early_exit import EarlyExitVectorEnv
from policyskip.exits.cache import CachedExits

SIDE_BY_SIDE, IMAGES, STEPS = 4096, 20000, 300


def measure(exits: int, classes: int) -> tuple[float, float]:
    """Return the environment steps in a second of wall time, and in a second of processor time."""
    costs = ExitCosts(torch.ones(exits, dtype=torch.float64), torch.ones(exits, dtype=torch.float64))
    cache = CachedExits(torch.randn(IMAGES, exits, classes), torch.randint(0, classes, (IMAGES,)), costs)
    env = EarlyExitVectorEnv(SIDE_BY_SIDE, network=cache)
    actions = torch.randint(0, 2, (16, SIDE_BY_SIDE))
    for step in range(20):
        env.step(actions[step % 16])
    wall, processor = time.perf_counter(), time.process_time()
    for step in range(STEPS):
        env.step(actions[step % 16])
    done = STEPS * SIDE_BY_SIDE
    return done / (time.perf_counter() - wall), done / (time.process_time() - processor)


if __name__ == "__main__":
    threads = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    torch.set_num_threads(threads)
    print("| exits | classes | million steps a second | a processor second |\n|---|---|---|---|")
    for exits, classes in ((3, 10), (5, 10), (7, 100)):
        wall, processor = measure(exits, classes)
        print(f"| {exits} | {classes} | {wall / 1e6:.2f} | {processor / 1e6:.2f} |")
