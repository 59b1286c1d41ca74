"""Processes that decode images for a set, batch by batch, each over two pipes of its own.

A pipe ends when its process does. So a process that is killed is noticed at once, even in the middle of an answer, and
the processes of a program that is killed end, too. Nothing lies in /dev/shm, which is small in containers.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from policyskip.errors import UserError, in_one_line, named

MOST_WORKERS = 512
"""The most processes that ``data.workers`` may ask for; of these, four a CPU are used at most."""


def check_workers(workers: Any) -> int:
    """Return the number of processes to use: what is asked for, but four a CPU at most, with a warning.

    Raises:
        UserError: it is no whole number from 0 to ``MOST_WORKERS``.
    """
    if type(workers) is not int or not 0 <= workers <= MOST_WORKERS:
        raise UserError(f"data.workers must be a whole number from 0 to {MOST_WORKERS}, got {workers!r:.80}")
    most = 4 * (os.cpu_count() or 1)
    if workers > most:
        print(f"warning: data.workers={workers} is more than four a CPU; {most} processes decode images", flush=True)
    return min(workers, most)


def answers(answer: Callable[[Any], Any], requests: Iterable[Any], workers: int) -> Iterator[Any]:
    """Yield ``answer(request)`` for each request, in order, computed ahead by ``workers`` processes; 0: in this one.

    Raises:
        UserError: a process was killed. Other exceptions: those of ``answer``.
    """
    team = _started(answer, workers) if workers else []
    if not team:
        yield from map(answer, requests)
        return
    left, idle, busy = iter(requests), deque(team), deque[_Worker]()
    try:
        while True:
            # A process gets its next request before its answer to the last one is used, and not before that is read.
            while idle and (request := next(left, None)) is not None:
                busy.append(idle.popleft())
                busy[-1].requests.send(request)
            if not busy:
                return
            result = busy[0].answers.recv()
            idle.append(busy.popleft())
            if isinstance(result, Exception):
                raise result
            if (request := next(left, None)) is not None:
                busy.append(idle.popleft())
                busy[-1].requests.send(request)
            yield result
    except (EOFError, OSError) as error:
        raise UserError(
            "a process that decodes images was killed, perhaps for want of memory; data.workers=0 decodes in the main "
            "process"
        ) from error
    finally:
        for worker in team:
            worker.end()


@dataclass(frozen=True)
class _Worker:
    """Holds a process, and this process's ends of its pipes."""

    process: BaseProcess
    requests: Connection
    answers: Connection

    def end(self) -> None:
        """End the process, and forget it."""
        self.process.terminate()
        self.requests.close()
        self.answers.close()
        self.process.join()


def _started(answer: Callable[[Any], Any], count: int) -> list[_Worker]:
    """Start ``count`` processes; none, with a warning, where the system does not give so many."""
    team: list[_Worker] = []
    try:
        for _ in range(count):
            request_end, requests = multiprocessing.Pipe(duplex=False)
            answers_, answer_end = multiprocessing.Pipe(duplex=False)
            ends = request_end, answer_end, requests, answers_
            process = multiprocessing.Process(target=_work, args=(answer, *ends), daemon=True)
            process.start()
            team.append(_Worker(process, requests, answers_))
            request_end.close()  # a pipe ends when nobody holds its other end any more
            answer_end.close()
    except (OSError, AssertionError) as error:  # no more processes or open files; or in a process that may have none
        for worker in team:
            worker.end()
        print(f"warning: no processes to decode images ({in_one_line(error)}); the main one does", flush=True)
        return []
    return team


def _work(answer: Callable[[Any], Any], requests: Connection, answers_: Connection, *others: Connection) -> None:
    """Run in a process: answer requests until the pipe ends. ``others`` are the main process's ends."""
    for end in others:
        end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    with suppress(EOFError, OSError):
        while True:
            request = requests.recv()
            result: Any
            try:
                result = answer(request)
            except UserError as error:
                result = error
            except Exception as error:  # which may be one that cannot be pickled
                result = RuntimeError(named(error))
            answers_.send(result)
