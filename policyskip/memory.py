"""Memory: freed memory that stays with the process, and batches that are halved when a GPU is full.

glibc gives the memory of a large tensor back to the system as soon as it is freed, and the next tensor of that size is
paid for page by page: a fifth of the time of a small network on a CPU. Sparse execution makes tensors of many sizes,
and these fragment a heap that keeps everything; so the free part of the heap is released from time to time in a run.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch

from policyskip.errors import UserError

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


HELD = 2**30
"""Bytes at the end of the heap that stay with the process, and size up to which a tensor lies there."""


OLD_MOST = 2**25
"""The largest such size in older versions of glibc, which refuse others."""


def keep_freed_memory() -> None:
    """Keep freed memory, up to 1 GiB, for the tensors to come; where there is no glibc, do nothing."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for threshold in (HELD, OLD_MOST):
            if libc.mallopt(MMAP_THRESHOLD, threshold):
                libc.mallopt(TRIM_THRESHOLD, HELD)
                return


def release_freed_memory() -> None:
    """Return what is free in glibc's heap; elsewhere, do nothing."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


Result = TypeVar("Result")


class BatchSplitter:
    """Calls something for parts of a batch: as large as asked for, until a GPU runs out of memory, then half as
    large, which is said once."""

    def __init__(self) -> None:
        self.most: int | None = None

    def __call__(self, call: Callable[[slice], Result], count: int, part: int) -> list[Result]:
        """Results of ``call`` for each part of ``count`` images, at most ``part`` at a time; one of none, if there are
        none.

        Raises:
            UserError: ``part`` is no positive whole number. torch.OutOfMemoryError: one image alone is too much.
        """
        if type(part) is not int or part < 1:
            raise UserError(f"batch_size must be a whole number, 1 at least, got {part!r}")
        results: list[Result] = []
        start = 0
        while start < count or not results:
            size = min(part, self.most or part, count - start)
            try:
                results.append(call(slice(start, start + size)))
                start += size
                continue
            except torch.OutOfMemoryError:
                if size <= 1:
                    raise
            torch.cuda.empty_cache()  # what the failed call held is free only out here
            if self.most is None:
                print("warning: the GPU ran out of memory; batches are split from now on", file=sys.stderr)
            self.most = size // 2
        return results
