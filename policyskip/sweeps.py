"""One command makes many runs: ``--multirun seed=0,1,2``. Each job has a folder of its own, a log, and two lines on the
screen; a job that fails does not end the others, and is named at the end.

A job may run in another process or on another machine (Hydra's launchers), so it reports its failure in a file of the
sweep's folder. This module must not import torch, which takes seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from policyskip.errors import (
    in_one_line,
    named,
    place_in_users_code,
    traceback_wanted,
    users_class_failed,
    users_problem,
)
from policyskip.files import open_log, reporting_write_errors, shell_argument
from policyskip.texts import one_line

FAILED = "failed.jsonl"
"""The file of a sweep's folder that names the jobs that failed, one a line."""
FLAGS = {"-m", "--multirun"}
"""The arguments that make a command a sweep."""
SWEEP = "POLICYSKIP_SWEEP"
"""The variable in a job's environment that holds the number of jobs and the swept keys, such as "6 agent seed"."""
NAMES = {
    "train": "${chosen:agent}-${chosen:data}",
    "pretrain": "pretrain-${chosen:backbone}-${chosen:data}",
}
"""The commands that make run folders, and the start of a folder's name."""


def _chosen(group: str, *, _root_: Any) -> str:
    """Return the option of a group that was chosen, or the name of the user's own class that takes its place."""
    option, target = str(HydraConfig.get().runtime.choices[group]), str(_root_[group].get("_target_"))
    return option if target.startswith("policyskip.") else re.sub(r"[^\w.-]+", "-", target)


OmegaConf.register_new_resolver("chosen", _chosen, replace=True)


def prepare(command: str, arguments: list[str]) -> tuple[list[str], Path | None]:
    """Make a sweep's folder, and add to the arguments a folder inside it for every job, and a W&B group.

    Returns: the arguments for Hydra, and the sweep's folder; None if nothing is swept or the command makes no runs.
    """
    if command not in NAMES or FLAGS.isdisjoint(arguments):
        return arguments, None
    try:
        overrides = OverridesParser.create().parse_overrides(get_args_parser().parse_args(arguments).overrides)
        sweeps = [o for o in overrides if o.is_sweep_override()]
        jobs = prod(len(list(o.sweep_string_iterator())) for o in sweeps)
    except HydraException:
        return arguments, None  # when Hydra reads them, it says what is wrong
    stamp = time.strftime("%Y%m%d-%H%M%S")
    typed = {o.key_or_group for o in overrides}
    runs = Path("runs").absolute() if "hydra/launcher" in typed else Path("runs")  # workers start in other folders
    folder = _new_folder(runs / f"sweep-{stamp}")
    keys = [o.key_or_group for o in sweeps]
    added = [f"hydra.sweep.dir={folder}", f"+hydra.job.env_set.{SWEEP}='{' '.join([str(jobs), *keys])}'"]
    if "run.dir" not in typed:
        odd = {o.key_or_group for o in sweeps if not all(map(_is_plain, o.sweep_string_iterator()))}
        added.append(f"run.dir='{folder}/{_name(command, keys, odd)}'")
    if "tracking.group" not in typed and not os.environ.get("WANDB_RUN_GROUP"):
        added.append(f"tracking.group={folder.name}")
    return [*arguments, *added], folder


def _new_folder(path: Path) -> Path:
    """Make a folder that no other sweep has, with -2, -3, … behind its name if need be."""
    folder, number = path, 1
    with reporting_write_errors(path):
        while True:
            try:
                folder.mkdir(parents=True)
                return folder
            except FileExistsError:
                number += 1
                folder = path.with_name(f"{path.name}-{number}")


def _is_plain(value: str) -> bool:
    """Return whether a value can be part of a folder's name that neither a shell nor Hydra wants in quotes."""
    return re.fullmatch(r"[\w.+-]+", value, re.ASCII) is not None


def _name(command: str, keys: list[str], odd: set[str]) -> str:
    """Return the pattern of a run folder's name, which Hydra fills in for each job.

    The name is the command's own, followed by every swept key with its value; the job's number stands for ``odd``, the
    keys with values that cannot be part of a folder's name.
    """
    named = [key for key in keys if key not in ("agent", "data", *odd)]
    groups = ("backbone", "env", "reward", "experiment")
    values = [f"${{hydra:runtime.choices.{key}}}" if key in groups else f"{key}-${{{key}}}" for key in named]
    values += ["${hydra:job.num}"] if odd else []
    return "-".join([NAMES[command], *values])


def is_one_of_many() -> bool:
    """Return whether this is a job of a sweep that :func:`prepare` prepared."""
    hydra = HydraConfig.get()
    return hydra.mode is not None and hydra.mode.name == "MULTIRUN" and SWEEP in (hydra.job.env_set or {})


def run_job(command: Callable[[DictConfig], int], config: DictConfig, is_refusal: Callable[[Exception], bool]) -> int:
    """Run one job of a sweep: its output goes to a log, and one line at its start and one at its end to the screen.

    Args:
        is_refusal: returns whether an error is one that the user can put right, so that its message says all.

    Returns: 0, or the exit code of a job that was stopped; a failure is noted in the sweep's folder.
    """
    hydra = HydraConfig.get()
    jobs, *keys = str(hydra.job.env_set[SWEEP]).split()
    name = " ".join(word for word in hydra.overrides.task if word.partition("=")[0].lstrip("+~") in keys)
    number, folder = hydra.job.num + 1, Path(hydra.sweep.dir)
    label = f"[{number}/{jobs}] {name}"
    log = folder / "logs" / f"{number:03d}.txt"
    with reporting_write_errors(log):
        log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{label}: started, {log}", flush=True)
    started = time.monotonic()
    problem, status = "", 0
    with reporting_write_errors(log):
        file = open_log(log)
    with file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            status = command(config)
        except Exception as error:
            status = 2
            refusal = is_refusal(error)
            text = in_one_line(error, most=300)
            problem = text if refusal else users_problem(error) or named(error)
            problem += place_in_users_code(error)
            if not refusal or users_class_failed(error) or traceback_wanted():
                traceback.print_exc(file=file)
    if problem:
        with open_log(folder / FAILED, append=True) as file:
            file.write(json.dumps({"job": number, "name": name, "problem": problem}) + "\n")
        print(f"{label}: failed: {problem}", flush=True)
    elif status == 0:
        run = Path(str(config.run.dir))
        print(f"{label}: {_figures(run)}{time.monotonic() - started:.0f} s, {one_line(run)}", flush=True)
    else:
        print(f"{label}: stopped. {log} says how to go on with it", flush=True)
    return 0 if problem else status


def _figures(folder: Path) -> str:
    """Return a finished run's accuracy and cost in a few words; "" if it has none."""
    try:
        summary = json.loads((folder / "summary.json").read_bytes())
        fraction = summary.get("test/macs_fraction")
        cost = f" at {fraction:.3f} of the MACs" if fraction is not None else ""
        return f"test accuracy {100 * summary['test/accuracy']:.2f} %{cost}, "
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def forget(folder: Path) -> None:
    """Delete the folder of a sweep that Hydra refused before its first job."""
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
