"""Many runs from one command: ``--multirun seed=0,1,2``. Each job has a folder that tells it apart, a log, and one line
on the screen; a job that fails does not end the others, and is named at the end.

A job may run in another process or on another machine (Hydra's launchers), so what it has to say it writes into the
sweep's folder.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
import traceback
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

from policyskip.files import refusing, shell_argument

FAILED = "failed.jsonl"
FLAGS = {"-m", "--multirun"}
"""What makes a command a sweep."""
SWEEP = "POLICYSKIP_SWEEP"
"""What a job is told in its environment: the number of jobs and the swept keys, such as "6 agent seed"."""
NAMES = {
    "train": "${hydra:runtime.choices.agent}-${hydra:runtime.choices.data}",
    "pretrain": "pretrain-${hydra:runtime.choices.backbone}-${hydra:runtime.choices.data}",
}
"""The commands that make run folders, and what a folder's name starts with."""


def prepare(command: str, arguments: list[str]) -> tuple[list[str], Path | None]:
    """What to pass to Hydra so that every job has a folder of its own, in one for the sweep, and a W&B group.

    Returns: the arguments, and the sweep's folder; None where nothing is swept or the command makes no runs.
    """
    from hydra._internal.utils import get_args_parser
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if command not in NAMES or FLAGS.isdisjoint(arguments):
        return arguments, None
    try:
        overrides = OverridesParser.create().parse_overrides(get_args_parser().parse_args(arguments).overrides)
        sweeps = [o for o in overrides if o.is_sweep_override()]
        jobs = prod(len(list(o.sweep_string_iterator())) for o in sweeps)
    except HydraException:
        return arguments, None  # Hydra says what is wrong with them
    stamp = time.strftime("%Y%m%d-%H%M%S")
    given = {o.key_or_group for o in overrides}
    runs = Path("runs").absolute() if "hydra/launcher" in given else Path("runs")  # workers start in other folders
    folder = _new_folder(runs / f"sweep-{stamp}")
    keys = [o.key_or_group for o in sweeps]
    added = [f"hydra.sweep.dir={folder}", f"+hydra.job.env_set.{SWEEP}='{' '.join([str(jobs), *keys])}'"]
    if "run.dir" not in given:
        paths = {o.key_or_group for o in sweeps if any("/" in value for value in o.sweep_string_iterator())}
        added.append(f"run.dir='{folder}/{_name(command, keys, paths)}'")
    if "tracking.group" not in given:
        added.append(f"tracking.group={folder.name}")
    return [*arguments, *added], folder


def _new_folder(wanted: Path) -> Path:
    """Make a folder that no other sweep has, with -2, -3, … behind its name if need be."""
    folder, number = wanted, 1
    with refusing(wanted):
        while True:
            try:
                folder.mkdir(parents=True)
                return folder
            except FileExistsError:
                number += 1
                folder = wanted.with_name(f"{wanted.name}-{number}")


def _name(command: str, keys: list[str], paths: set[str]) -> str:
    """A folder's name, to be filled in by each job: the command's own, and every swept key with its value; with the
    job's number for ``paths``, keys whose values would be folders of their own."""
    shown = [key for key in keys if key not in ("agent", "data", *paths)]
    groups = ("backbone", "env", "reward", "experiment")
    values = [f"${{hydra:runtime.choices.{key}}}" if key in groups else f"{key}=${{{key}}}" for key in shown]
    values += ["${hydra:job.num}"] if paths else []
    return "-".join([NAMES[command], *values])


def is_one_of_many() -> bool:
    """Whether this is a job of a sweep that :func:`prepare` prepared."""
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    return hydra.mode is not None and hydra.mode.name == "MULTIRUN" and SWEEP in (hydra.job.env_set or {})


def run_job(command: Callable[[Any], int], config: Any, refused: Callable[[Exception], bool]) -> int:
    """One job of a sweep: its output goes to a log, and one line at its start and one at its end to the screen.

    Args:
        refused: whether an error is one that the user can put right, so that its message says all.

    Returns: 0, or the exit code of the job; a failure is noted in the sweep's folder.
    """
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    jobs, *keys = str(hydra.job.env_set[SWEEP]).split()
    name = " ".join(word for word in hydra.overrides.task if word.partition("=")[0].lstrip("+~") in keys)
    number, folder = hydra.job.num + 1, Path(hydra.sweep.dir)
    label = f"[{number}/{jobs}] {name}"
    log = folder / "logs" / f"{number:03d}.txt"
    with refusing(log):
        log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{label}: started, {log}", flush=True)
    started = time.monotonic()
    problem, status = "", 0
    with log.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        try:
            status = command(config)
        except Exception as error:
            status = 2
            problem = " ".join(str(error).split())[:300] or type(error).__name__
            if not refused(error):
                problem = f"{type(error).__name__}: {problem}"
                traceback.print_exc(file=file)
    if problem:
        with (folder / FAILED).open("a") as file:
            file.write(json.dumps({"job": number, "name": name, "problem": problem}) + "\n")
        print(f"{label}: failed: {problem}", flush=True)
    elif status == 0:
        print(f"{label}: {_figures(Path(str(config.run.dir)))}{time.monotonic() - started:.0f} s", flush=True)
    else:
        print(f"{label}: stopped. {log} says how to go on with it", flush=True)
    return 0 if problem else status


def _figures(folder: Path) -> str:
    """A run's figures in a few words."""
    try:
        summary = json.loads((folder / "summary.json").read_bytes())
        share = summary.get("test/macs_fraction")
        cost = f" at {share:.3f} of the MACs" if share is not None else ""
        return f"test accuracy {100 * summary['test/accuracy']:.2f} %{cost}, "
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def forget(folder: Path) -> None:
    """Take away the folder of a sweep that Hydra refused before its first job."""
    if folder.is_dir() and {path.name for path in folder.iterdir()} <= {"multirun.yaml"}:
        (folder / "multirun.yaml").unlink(missing_ok=True)
        folder.rmdir()
        with contextlib.suppress(OSError):
            folder.parent.rmdir()


def conclude(folder: Path) -> int:
    """Say how a sweep ended, naming the jobs that failed.

    Returns: the exit code, 2 if any failed.
    """
    try:
        lines = (folder / FAILED).read_text().splitlines()
    except OSError:
        lines = []
    failed = sorted((json.loads(line) for line in lines), key=lambda job: int(job["job"]))
    if failed:
        print(
            f"{len(failed)} job{'s'[: len(failed) > 1]} failed; {folder / 'logs'} has what they said", file=sys.stderr
        )
        for job in failed:
            print(f"  [{job['job']}] {job['name']}: {job['problem']}", file=sys.stderr)
    if any(folder.rglob("summary.json")):
        print(f"Compare them:  policyskip compare {shell_argument('runs', folder)}")
    return 2 if failed else 0
