"""Several processes that make one run, started by torchrun or Slurm: who is who, and what they have to agree on.

All communication is torch.distributed's: gloo between CPUs, NCCL between GPUs. Without such a start there is one
process, and every function here says so without waiting for anyone. How a learner and its batch
are divided among the processes: ``dividing.py``.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from policyskip.errors import UserError

T = TypeVar("T")


PATIENCE = timedelta(days=1)
"""How long the others wait for what the first process does alone: a search, a judgement, pictures."""


_LOST = ("gloo", "Connection", "connection", "Socket", "Broken pipe", "NCCL", "Timed out waiting")


_store: Any = None


_waiting: Any = None  # a gloo group of its own, with PATIENCE


@contextmanager
def joined() -> Iterator[None]:
    """Meet the processes that were started beside this one, and part from them in the end. Only the first one prints.

    Raises:
        UserError: they cannot be met.
    """
    global _store, _waiting
    try:
        store, rank, world = next(rendezvous("env://"))
        _store = PrefixStore("policyskip", store)
        if torch.cuda.is_available() and local_rank() < torch.cuda.device_count():
            torch.cuda.set_device(local_rank())
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
        _waiting = dist.new_group(timeout=PATIENCE, backend="gloo")
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the other processes cannot be met ({reason}); torchrun starts them") from error
    if not is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for as long as the process lives
    try:
        yield
    finally:
        dist.destroy_process_group()


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """Which of those on this machine it is, from 0."""
    return int(os.environ.get("LOCAL_RANK") or 0)


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def first(task: Callable[[], T]) -> T:
    """What the first process's ``task`` returns, in every process; the others wait for it."""
    if world() == 1:
        return task()
    result = [task() if is_first() else None]
    with reporting_lost_processes():
        dist.broadcast_object_list(result, src=0, group=_waiting, device=torch.device("cpu"))
    return result[0]  # type: ignore[return-value]


@contextmanager
def one_a_machine_first() -> Iterator[None]:
    """One process of each machine goes through before the others do: what it downloads, they find."""
    late = world() > 1 and local_rank() > 0
    if late:
        _meet()
    yield
    if not late:
        _meet()


def _meet() -> None:
    if world() > 1:
        with reporting_lost_processes():
            dist.barrier(group=_waiting)


def any_process(asked: bool) -> bool:
    """Whether it is so in any process."""
    if world() == 1:
        return asked
    found = torch.tensor(int(asked))
    with reporting_lost_processes():
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def average(figures: dict[str, float]) -> dict[str, float]:
    """The mean of each figure over the processes."""
    if world() == 1:
        return figures
    total = torch.tensor(list(figures.values()), dtype=torch.float64)
    with reporting_lost_processes():
        dist.all_reduce(total)
    return dict(zip(figures, (total / world()).tolist(), strict=True))


def per_process_batch_size(batch_size: int) -> int:
    """The images of a batch that each process sees.

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
    """This process's part of a tensor that has a place for each image of the whole batch along ``dim``."""
    size = per_process_batch_size(whole.shape[dim])
    return whole.narrow(dim, rank() * size, size)


def claims_error_report() -> bool:
    """Whether this process is the first to say what has ended the run: it is said once, by whoever knows it first."""
    if world() == 1:
        return True
    try:
        if _store.add("told", 1) == 1:
            return True
    except RuntimeError:  # the process that kept the store is gone
        return True
    time.sleep(1)  # torchrun stops all processes when one has ended: the one that speaks comes first
    return False


@contextmanager
def reporting_lost_processes() -> Iterator[None]:
    """Turns what torch says when another process is gone into a line for the user."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        raise UserError(lost_process_message(error)) from error


def lost_process_message(error: RuntimeError) -> str:
    """What is said of it."""
    reason = str(error).partition("\n")[0].partition(". ")[0].rpartition("] ")[2][:200]  # not where in torch it was
    return f"another process of this run has ended, and with it the run ({reason})"


def is_lost_process(error: RuntimeError) -> bool:
    """Whether an error means that another process is gone."""
    return world() > 1 and (isinstance(error, dist.DistError) or any(word in str(error) for word in _LOST))
