"""Freed memory: kept by the process for the next tensor, given back to the system from time to time in a run.

glibc gives the memory of a large tensor back as soon as it is freed, and the next tensor of that size is paid for page
by page: a fifth of the time of a small network on a CPU. Sparse execution makes tensors of ever other sizes, which on
the other hand fragment a heap that keeps everything.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
HELD = 2**30
"""Bytes at the end of the heap that stay with the process, and size up to which a tensor lies there."""
OLD_MOST = 2**25
"""The largest such size in older versions of glibc, which refuse others."""


def hold() -> None:
    """Keep freed memory, up to 1 GiB, for the tensors to come; where there is no glibc, do nothing."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for threshold in (HELD, OLD_MOST):
            if libc.mallopt(MMAP_THRESHOLD, threshold):
                libc.mallopt(TRIM_THRESHOLD, HELD)
                return


def give_back() -> None:
    """Return what is free in glibc's heap; elsewhere, do nothing."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
