"""A batch that does not fit into the memory of a GPU is worked on in parts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

import torch

from policyskip.errors import UserError

Result = TypeVar("Result")


class Parts:
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
