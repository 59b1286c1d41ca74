"""Runs commands of policyskip side by side, for benchmarks of many runs: each in a process of its own, with a log.

A process is forked from this one, which has torch and the decoded images already, so that a run needs neither the
seconds in which torch is imported nor those in which thousands of files are decoded.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a process that has used CUDA cannot be forked
import torch

from policyskip import cli, commands  # noqa: F401 - imported here, so that no run has to
from policyskip.data import folders

torch.set_num_threads(1)  # a forked process cannot use the threads of its parent


@dataclass(frozen=True)
class Job:
    """Holds one run.

    Attributes:
        name: of the run, and of its log.
        commands: makes the arguments of the commands to run, one after the other, until one fails.
        after: the name of a job that has to end first, if it is to be run at all; None: none.
        needs_it: whether that job has to succeed.
        done: called when all commands have succeeded.
    """

    name: str
    commands: Callable[[], list[list[str]]]
    after: str | None = None
    needs_it: bool = False
    done: Callable[[], None] = field(default=lambda: None)


def decode_once() -> None:
    """Let this process and those forked from it decode the images of a folder once."""
    decode, known = folders._decode, {}

    def remembering(files: list[Path], size: int, scale_to: int | None) -> torch.Tensor:
        key = (tuple(files), size, scale_to)
        if key not in known:
            known[key] = decode(files, size, scale_to)
        return known[key]

    folders._decode = remembering


def run_all(jobs: list[Job], at_once: int, logs: Path, seconds: float | None = None) -> list[str]:
    """Run jobs in their order, ``at_once`` of them side by side, and print a line for each that begins or ends.

    Args:
        logs: the folder of the logs; a job's has its name.
        seconds: no job goes on for longer: what has not ended then is stopped, and can be resumed. None: no limit.

    Returns: the names of jobs that failed or were not finished.
    """
    fork = multiprocessing.get_context("fork")
    logs.mkdir(parents=True, exist_ok=True)
    threads = max(1, len(os.sched_getaffinity(0)) // at_once)
    waiting, ended, unfinished, begun = list(jobs), set(), [], time.monotonic()
    running: dict[str, tuple[Job, BaseProcess]] = {}
    names = {job.name for job in jobs}

    def is_ready(job: Job) -> bool:
        return job.after not in names or job.after in ended

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begun:6.0f} s] {text}", flush=True)

    while waiting or running:
        for name, (job, process) in list(running.items()):
            if process.is_alive():
                continue
            del running[name]
            ended.add(name)
            if process.exitcode == 0:
                job.done()
                say(f"{name} is done; {len(waiting)} wait, {len(running)} run")
            else:
                unfinished.append(name)
                say(f"{name} FAILED: {logs / name}.log ends with {last_line(logs / f'{name}.log')}")
        while len(running) < at_once and (job := next(filter(is_ready, waiting), None)) is not None:
            waiting.remove(job)
            if job.needs_it and job.after in unfinished:
                unfinished.append(job.name)
                continue
            process = fork.Process(target=_run, args=(job, logs / f"{job.name}.log", threads))
            process.start()
            running[job.name] = job, process
        if seconds is not None and time.monotonic() - begun > seconds:
            say(f"time is over: {len(running)} runs are stopped, {len(waiting)} were not begun")
            for _, process in running.values():
                process.terminate()  # it saves what it has
            for _, process in running.values():
                process.join(20)
            return [*unfinished, *running, *(job.name for job in waiting)]
        time.sleep(0.05)
    return unfinished


def last_line(log: Path) -> str:
    """Return the last line of a log."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return repr(lines[-1][:300]) if lines else "nothing"


def _run(job: Job, log: Path, threads: int) -> None:
    """Run a job's commands in this process, which was forked for it; all that they print goes into the log."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    torch.set_num_threads(threads)
    for arguments in job.commands():
        sys.argv = ["policyskip", *arguments]
        print("$ policyskip", *arguments, flush=True)
        try:
            cli.main()
        except SystemExit as end:
            if end.code:
                raise
