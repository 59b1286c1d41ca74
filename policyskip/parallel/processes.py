"""Several processes that make one run, started by torchrun or Slurm: their numbers, and what they tell each other.

All communication is done by torch.distributed: gloo between CPUs, NCCL between GPUs. In a run of one process every
function here returns at once, and nothing is sent. ``data_parallel.py`` divides a learner and its batch among the
processes.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import DistError
from torch.distributed.constants import default_pg_timeout
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from policyskip.errors import UserError, in_one_line
from policyskip.parallel.deferred import Figure, sent
from policyskip.runs import progress
from policyskip.texts import one_line

T = TypeVar("T")

WAIT = "POLICYSKIP_WAIT"
"""The variable in the environment that says how many seconds a process waits for the others to start."""
SECONDS_TO_WAIT, SECONDS_OF_SILENCE = 600.0, 5.0
"""How long it waits without that variable, and how long before it says so."""
PATIENCE = timedelta(days=1)
"""How long the other processes wait for what the first one does alone, such as a search or the pictures."""
_WORDS_OF_LOST_CONNECTIONS = ("gloo", "Connection", "connection", "Socket", "Broken pipe", "NCCL", "Timed out waiting")

_store: PrefixStore | None = None
"""The key-value store that all processes of the run share."""
_patient_group: dist.ProcessGroup | None = None
"""All processes again, connected by gloo; its operations wait for PATIENCE."""


@contextmanager
def joined() -> Iterator[None]:
    """Connect this process with the others of its run, and disconnect it in the end. Only the first process prints.

    Raises:
        UserError: the other processes cannot be reached.
    """
    global _store, _patient_group
    try:
        store, rank, world = _meet()
        _store = PrefixStore("policyskip", store)
        if torch.cuda.is_available() and local_rank() < torch.cuda.device_count():
            torch.cuda.set_device(local_rank())
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
        _patient_group = dist.new_group(timeout=PATIENCE, backend="gloo")  # type: ignore[assignment]  # all are in it
    except UserError:
        raise
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the other processes cannot be met ({in_one_line(error)}); torchrun starts them") from error
    if not is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for as long as the process lives
        progress.hide()
    try:
        yield
    finally:
        dist.destroy_process_group()


def _meet() -> tuple[Store, int, int]:
    """Wait until all processes of the run are there, and say so if it takes long.

    Returns: their common store, the number of this process, and how many there are.

    Raises:
        UserError: they are not there in time, or the time to wait is no number of seconds.
    """
    try:
        seconds = float(os.environ.get(WAIT) or SECONDS_TO_WAIT)
        limit = timedelta(seconds=max(1.0, seconds))
    except (ValueError, OverflowError) as error:
        raise UserError(f"{WAIT} must be a number of seconds, got {one_line(os.environ[WAIT])}") from error
    get = os.environ.get
    number, count = one_line(get("RANK", "?")), one_line(get("WORLD_SIZE", "?"))
    here = one_line(f"{get('MASTER_ADDR', '?')}:{get('MASTER_PORT', '?')}")
    waiting = f"this is process {number} of {count} (WORLD_SIZE), which meet at {here}"
    notice = f"{waiting}; waiting for the others, {seconds:g} s at most ({WAIT}=SECONDS changes that)"
    timer = threading.Timer(SECONDS_OF_SILENCE, lambda: print(notice, file=sys.stderr, flush=True))
    timer.daemon = True
    at_interrupt = signal.getsignal(signal.SIGINT)
    with suppress(ValueError):  # outside the main thread
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # torch waits in C++, and would not see an exception
    timer.start()
    try:
        _wait_for_address(time.monotonic() + limit.total_seconds())
        store, rank, world = next(rendezvous("env://", timeout=limit))
        store.set_timeout(default_pg_timeout)
        return store, rank, world
    except (DistError, TimeoutError) as error:
        raise UserError(f"{waiting}; the others did not come in {seconds:g} s. torchrun starts them all") from error
    finally:
        timer.cancel()
        with suppress(ValueError, TypeError):
            signal.signal(signal.SIGINT, at_interrupt)


def _wait_for_address(deadline: float) -> None:
    """Wait until the process that keeps the store can be reached; torch would print its stack if it cannot.

    Raises:
        TimeoutError: the deadline has passed.
    """
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if os.environ.get("RANK", "0") == "0" or not address or not port.isdecimal():
        return  # this process keeps it, or torch says which variable is missing
    while True:
        with suppress(OSError, OverflowError), socket.create_connection((address, int(port)), timeout=2):
            return
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.2)


def world() -> int:
    """Return the number of processes in the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process among those of the run, counted from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """Return the number of this process among those on its machine, counted from 0."""
    return int(os.environ.get("LOCAL_RANK") or 0)


def is_first() -> bool:
    """Return whether this is the process that writes files and prints."""
    return rank() == 0


def first(task: Callable[[], T]) -> T:
    """Call ``task`` in the first process only, and return its result in every process.

    Raises:
        UserError: another process has died meanwhile.
    """
    if world() == 1:
        return task()
    result = [task() if is_first() else None]
    with reporting_lost_processes():
        dist.broadcast_object_list(result, src=0, group=_patient_group, device=torch.device("cpu"))
    return result[0]  # type: ignore[return-value]


@contextmanager
def one_a_machine_first() -> Iterator[None]:
    """Let one process of each machine run the block before the others do, which then find what it has downloaded.

    Raises:
        UserError: another process has died meanwhile.
    """
    runs_later = world() > 1 and local_rank() > 0
    if runs_later:
        _wait_for_all()
    yield
    if not runs_later:
        _wait_for_all()


def _wait_for_all() -> None:
    """Wait until every process has called this function."""
    if world() > 1:
        with reporting_lost_processes():
            dist.barrier(group=_patient_group)


def any_process(flag: bool) -> bool:
    """Return whether ``flag`` is true in any process. Every process has to call this.

    Raises:
        UserError: another process has died.
    """
    if world() == 1:
        return flag
    largest = torch.tensor(int(flag))
    with reporting_lost_processes():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return bool(largest)


def average(figures: Mapping[str, Figure]) -> Mapping[str, Figure]:
    """Return the mean of each figure over the processes, which all have to call this with the same keys.

    Where a figure is still on a device, all means are tensors there, and nothing waits for the device.

    Raises:
        UserError: another process has died.
    """
    if world() == 1:
        return figures
    device = next((value.device for value in figures.values() if isinstance(value, Tensor)), None)
    if device is None:
        total = torch.tensor(list(figures.values()), dtype=torch.float64)
    else:
        numbers = [sent(torch.as_tensor(value, dtype=torch.float64), device) for value in figures.values()]
        total = torch.stack(numbers)
    with reporting_lost_processes():
        dist.all_reduce(total)
    means = total / world()
    return dict(zip(figures, means.tolist() if device is None else means.unbind(), strict=True))


def per_process_batch_size(batch_size: int) -> int:
    """Return how many images of a batch each process computes.

    Args:
        batch_size: images of the whole batch.

    Raises:
        UserError: a batch of that size cannot be divided evenly.
    """
    if batch_size % world():
        raise UserError(
            f"data.batch_size is the images of all processes together, so it must be a multiple of their number, "
            f"{world()}; got {batch_size}"
        )
    return batch_size // world()


def this_process_slice(whole: Tensor, dim: int = 0) -> Tensor:
    """Return this process's slice of a tensor whose dimension ``dim`` is the images of the whole batch.

    Raises:
        UserError: that dimension cannot be divided evenly.
    """
    size = per_process_batch_size(whole.shape[dim])
    return whole.narrow(dim, rank() * size, size)


def claims_error_report() -> bool:
    """Return whether this process has to print the error that ended the run: true in the first process that asks."""
    if world() == 1 or _store is None:
        return True
    try:
        if _store.add("errors reported", 1) == 1:
            return True
    except RuntimeError:  # the process that keeps the store has died
        return True
    time.sleep(1)  # torchrun stops all processes once one has ended, so the one that prints has to end first
    return False


@contextmanager
def reporting_lost_processes() -> Iterator[None]:
    """Turn torch's error about a process that has died into one line for the user.

    Raises:
        UserError: instead of that error; other errors pass.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        raise UserError(lost_process_message(error)) from error


def lost_process_message(error: RuntimeError) -> str:
    """Return the line that is printed when another process of the run has died."""
    reason = str(error).partition("\n")[0].partition(". ")[0].rpartition("] ")[2][:200]  # without torch's file and line
    return f"another process of this run has ended, and with it the run ({reason})"


def is_lost_process(error: RuntimeError) -> bool:
    """Return whether an error of torch means that another process has died."""
    speaks_of_connections = any(word in str(error) for word in _WORDS_OF_LOST_CONNECTIONS)
    return world() > 1 and (isinstance(error, dist.DistError) or speaks_of_connections)
