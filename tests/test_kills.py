"""Runs that are killed at any moment: their folders load, go on, and end at the figures of a run that nobody killed.

``make kills`` (minutes). SIGKILL cannot be caught, so nothing here depends on what a process does at its end. A third of
the moments are anywhere in the run, a third while some file is being written, and a third just after a checkpoint.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import policyskip
from policyskip.errors import UserError
from policyskip.files import is_hidden_name
from policyskip.runs.folder import Run
from tests.runs.test_resume import same, without_times

KILLS = int(os.environ.get("KILLS", "30"))
DATA = ["data.batch_size=32", "data.train=256", "data.validation=64", "data.test=64", "device=cpu", "tracking=none"]
STEPS = ["train.steps=30", "train.validate_every=2", "train.log_every=1", "run.dir=x"]
COMMANDS = {
    "blockdrop": ["train", *DATA, *STEPS, "front.budget=2e4", "front.images=32"],
    "branchynet": ["train", "agent=branchynet", *DATA, *STEPS, "target.macs_fraction=0.9"],
    "pretrain": ["pretrain", "backbone=resnet20", *DATA, *STEPS],
}
MOMENTS = ("anywhere", "while writing", "after a checkpoint")


def command(folder: str, arguments: list[str]) -> None:
    """``policyskip`` with these arguments, in a process of its own."""
    os.chdir(folder)
    os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["policyskip", *arguments]
    from policyskip import cli

    cli.main()


@pytest.fixture(scope="module")
def processes() -> Any:
    """Processes that have imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.test_kills", "policyskip.tasks.dispatch", "policyskip.pretraining", "policyskip.evaluation.plots"]
    )
    return context


def run(processes: Any, folder: Path, arguments: list[str]) -> None:
    """A command to its end."""
    process = processes.Process(target=command, args=(str(folder), arguments))
    process.start()
    process.join(300)
    assert process.exitcode == 0, (folder / "output.txt").read_text()[-2000:]


def wait_for(moment: str, run_folder: Path, seconds: float, chance: random.Random) -> Iterator[bool]:
    """False until the moment has come."""
    started, end = time.monotonic(), chance.uniform(0, seconds)
    count, seen, last = chance.randint(1, 12), 0, 0
    while seen < count:
        if moment == "anywhere":
            seen = count if time.monotonic() - started > end else 0
        elif moment == "while writing":
            there = run_folder.is_dir() and any(map(is_hidden_name, os.listdir(run_folder)))
            seen, last = seen + (there and not last), there
        else:
            path = run_folder / "checkpoint.pt"
            changed = path.stat().st_mtime_ns if path.exists() else 0
            seen, last = seen + (changed != last), changed
        yield False
    time.sleep(chance.uniform(0, 0.002))
    yield True


def check_loads(folder: Path, name: str) -> str:
    """Check that the files of a killed run can be read, and return how far the run had come."""
    if not (folder / "config.yaml").exists():
        return "nothing"
    run = Run(folder)
    run.metrics()
    for path in folder.glob("*.json"):
        json.loads(path.read_text())
    if name != "pretrain":
        try:
            policyskip.load(folder)
        except UserError as error:
            assert "the run did not get that far" in str(error), error
    if run.has(run.best_so_far):
        run.load_best_so_far()
    return f"update {run.load_checkpoint()['step']}" if (folder / "checkpoint.pt").exists() else "its configuration"


def outcome(folder: Path) -> dict[str, Any]:
    """Return all results of a run, without the seconds that it took."""
    run = Run(folder)
    state = {key: value for key, value in run.load_checkpoint().items() if key != "seconds"}
    files = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    files["summary.json"].pop("seconds")
    tensors = {path.name: path.read_bytes() for path in folder.glob("best.safetensors")}
    return {"metrics": without_times(run), "state": state, "files": files, "tensors": tensors}


@pytest.fixture(scope="module")
def whole(processes, tmp_path_factory) -> dict[str, tuple[dict[str, Any], float]]:
    """The outcome of each command when it is not killed, and how long it takes once its static front is known."""
    results = {}
    for name, arguments in COMMANDS.items():
        folder = tmp_path_factory.mktemp(name)
        run(processes, folder, arguments)
        started = time.monotonic()
        shutil.rmtree(folder / "x")
        run(processes, folder, arguments)
        results[name] = outcome(folder / "x"), time.monotonic() - started
    return results


@pytest.mark.slow
@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_run_ends_at_the_same_figures(number, whole, processes, tmp_path):
    chance = random.Random(number)
    name, moment = list(COMMANDS)[number % 3], MOMENTS[number // 3 % 3]
    expected, seconds = whole[name]
    process = processes.Process(target=command, args=(str(tmp_path), COMMANDS[name]))
    process.start()
    for now in wait_for(moment, tmp_path / "x", seconds, chance):
        if now or not process.is_alive():
            process.kill()
    process.join()
    left = [path.name for path in tmp_path.glob("x/.*")]
    came = check_loads(tmp_path / "x", name)
    print(f"{name} killed {moment}: it had {came}{', and was writing' if left else ''}")
    begun = (tmp_path / "x/config.yaml").exists()
    run(processes, tmp_path, [COMMANDS[name][0], "run.resume=x"] if begun else COMMANDS[name])
    assert same(outcome(tmp_path / "x"), expected)
    assert not list(tmp_path.glob("x-2")) and not list(tmp_path.glob("x/.*"))
