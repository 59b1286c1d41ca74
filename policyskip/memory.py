"""Memory that is freed stays with the process, and batches are halved when a GPU is full.

glibc returns the memory of a large tensor to the system as soon as the tensor is freed. The memory of the next such
tensor is then set up page by page, which takes a fifth of the time of a small network on a CPU. So this package keeps
freed memory. Sparse execution makes tensors of many sizes, which fragment a heap that keeps everything; so long runs
release the heap's free memory from time to time.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch

from policyskip.finite import whole_number

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Names of two parameters in glibc's malloc.h."""
KEPT_BYTES = 2**30
"""Free bytes at the end of the heap that stay with the process, and the size up to which a tensor lies in the heap."""
KEPT_BYTES_OLD_GLIBC = 2**25
"""The largest such size that older versions of glibc accept."""

WORDS_OF_FULL_GPUS = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
"""What errors of CUDA and its libraries say when the GPU's memory does not suffice; torch's own have a type."""

Result = TypeVar("Result")


def keep_freed_memory() -> None:
    """Keep freed memory, up to 1 GiB, for the tensors to come; where there is no glibc, do nothing."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for threshold in (KEPT_BYTES, KEPT_BYTES_OLD_GLIBC):
            if libc.mallopt(MMAP_THRESHOLD, threshold):
                libc.mallopt(TRIM_THRESHOLD, KEPT_BYTES)
                return


def release_freed_memory() -> None:
    """Return the free memory of glibc's heap to the system; where there is no glibc, do nothing."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the memory of the GPU or of the machine does not suffice."""
    if isinstance(error, MemoryError) or is_out_of_gpu_memory(error):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def is_out_of_gpu_memory(error: BaseException) -> bool:
    """Return whether an error says that the memory of the GPU does not suffice, be it torch's own or a library's."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS_OF_FULL_GPUS)


class BatchSplitter:
    """Halves the batch when the GPU runs out of memory and warns once.

    Attributes:
        largest_batch: the number of images that is not exceeded any more; None until the memory has run out.
    """

    def __init__(self) -> None:
        self.largest_batch: int | None = None

    def __call__(self, call: Callable[[slice], Result], count: int, batch_size: int) -> list[Result]:
        """Return the results of ``call`` for consecutive slices of ``count`` images, ``batch_size`` each at most.

        Of no images there is one slice, which is empty.

        Raises:
            UserError: ``batch_size`` is no positive whole number.
            RuntimeError: a single image is too much, or whatever else went wrong in ``call``.
        """
        batch_size = whole_number("batch_size", batch_size, 1)
        results: list[Result] = []
        begin = 0
        while begin < count or not results:
            size = min(batch_size, self.largest_batch or batch_size, count - begin)
            try:
                results.append(call(slice(begin, begin + size)))
                begin += size
                continue
            except RuntimeError as error:
                if size <= 1 or not is_out_of_gpu_memory(error):
                    raise
            torch.cuda.empty_cache()  # out here, because inside "except" the failed call's tensors are not yet freed
            if self.largest_batch is None:
                print("warning: the GPU ran out of memory; batches are split from now on", file=sys.stderr)
            self.largest_batch = size // 2
        return results
