"""How much time tracking in Weights & Biases (offline) adds to a training run: the same command with and without it.

    python benchmarks/tracking.py [repeats] [argument …]      (default: 3; eight minutes on two idle cores)

Arguments are those of ``policyskip train``. The two commands take turns. Prints medians of the ratios of their times:
of the seconds spent learning, and of the whole command, which at its end waits for W&B to write pictures, tables and
files.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def train(tracking: list[str], arguments: list[str]) -> tuple[float, float]:
    """Train one run, and return the seconds spent learning and those of the whole command."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "policyskip", "train", "agent=blockdrop", *arguments, f"run.dir={folder}/run"]
        started = time.perf_counter()
        subprocess.run([*command, *tracking], check=True, stdout=subprocess.DEVNULL)
        whole = time.perf_counter() - started
        return json.loads((Path(folder) / "run" / "summary.json").read_text())["seconds"], whole


def main() -> None:
    repeats, arguments = int((sys.argv[1:] or ["3"])[0]), sys.argv[2:]
    learning, whole = [], []
    for repeat in range(repeats):
        ways = {"none": ["tracking=none"], "offline": ["tracking.mode=offline"]}
        turns = list(ways) if repeat % 2 else list(reversed(ways))
        seconds = {way: train(ways[way], arguments) for way in turns}
        learning.append(seconds["offline"][0] / seconds["none"][0] - 1)
        whole.append(seconds["offline"][1] / seconds["none"][1] - 1)
        print(f"{seconds['none'][1]:.1f} s without, {seconds['offline'][1]:.1f} s with", flush=True)
    print(f"learning {statistics.median(learning):+.1%}, the whole command {statistics.median(whole):+.1%}")


if __name__ == "__main__":
    main()
