"""Calls whose kernels are launched together: one CUDA graph for each size of batch that comes more than once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from policyskip.errors import in_one_line
from policyskip.execution.choosing import say_once

MOST_GRAPHS = 8
"""The graphs that are kept; the one that was not used for longest goes first. They share their working memory."""

Tensors = tuple[Tensor, ...]
Call = Callable[..., Tensors]
"""Computes tensors from tensors, always by the same kernels for the same shapes, and without asking the host."""


class CudaGraph:
    """A recorded call, which is replayed on other numbers of the same shapes.

    Args:
        call: what is recorded; it has run on inputs of these shapes before, so that all kernels are compiled.
        inputs: tensors on the GPU.
        pool: the memory that graphs share (see ``torch.cuda.graph_pool_handle``).

    Raises:
        RuntimeError: the GPU's memory does not suffice, or the call cannot be recorded.
    """

    def __init__(self, call: Call, inputs: Tensors, pool: Any) -> None:
        self.inputs = tuple(tensor.clone() for tensor in inputs)
        main = torch.cuda.current_stream()
        side = _stream(main.device)
        side.wait_stream(main)
        with torch.cuda.stream(side):  # what libraries set up at a first call on a stream is not for the recording
            call(*self.inputs)
        main.wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        try:  # other threads, which load images, may use the GPU meanwhile
            with torch.cuda.graph(self.graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                self.outputs = call(*self.inputs)
        finally:  # torch stays on its own stream if a recording fails
            torch.cuda.set_stream(main)

    def replay(self, inputs: Tensors) -> Tensors:
        """Return the call's results for these inputs, in memory of their own."""
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        self.graph.replay()
        return tuple(tensor.clone() for tensor in self.outputs)


class CudaGraphs:
    """Makes calls by CUDA graphs: a graph is recorded when shapes come for the second time, and replayed from then on.

    Shapes that come once, such as that of the last batch, are not worth a recording. Where the memory does not suffice
    for one, or it fails otherwise, calls of these shapes are made directly.

    Args:
        call: see :data:`Call`.
        record: makes a graph; its arguments are those of :class:`CudaGraph`.

    Attributes:
        graphs: the graphs by the shapes and dtypes of their inputs, the one used last at the end.
    """

    def __init__(self, call: Call, record: Callable[[Call, Tensors, Any], CudaGraph] = CudaGraph) -> None:
        self.call, self.record = call, record
        self.graphs: OrderedDict[Any, CudaGraph] = OrderedDict()
        self._seen: OrderedDict[Any, None] = OrderedDict()
        self._without: set[Any] = set()
        self._pool: Any = None

    def __call__(self, *inputs: Tensor) -> Tensors:
        """Return the call's results for these inputs, all of them on one device.

        On a CPU, inside another recording, and for inputs without a row, the call is made directly.

        Raises:
            torch.OutOfMemoryError: the memory does not suffice for the call; all graphs are given up before.
        """
        if not inputs[0].is_cuda or not all(len(tensor) for tensor in inputs) or _is_recording():
            return self.call(*inputs)
        try:
            return self.replayed(inputs)
        except torch.OutOfMemoryError:
            self.graphs.clear()
            raise

    def replayed(self, inputs: Tensors) -> Tensors:
        """Return the call's results by the graph for inputs of these shapes, if there is or may be one now."""
        key = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        if key in self.graphs:
            self.graphs.move_to_end(key)
            return self.graphs[key].replay(inputs)
        if key in self._without or not self._came_before(key):
            return self.call(*inputs)
        while len(self.graphs) >= MOST_GRAPHS:
            self.graphs.popitem(last=False)
        try:
            self.graphs[key] = self._recorded(inputs)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError):
                say_once(f"no CUDA graph could be recorded, so kernels are launched one by one: {in_one_line(error)}")
            self._without.add(key)
        if key in self._without:  # out here, because inside "except" the failed recording's tensors are not yet freed
            return self.call(*inputs)
        return self.graphs[key].replay(inputs)

    def _recorded(self, inputs: Tensors) -> CudaGraph:
        if self._pool is None and inputs[0].is_cuda:
            self._pool = torch.cuda.graph_pool_handle()
        return self.record(self.call, inputs, self._pool)

    def _came_before(self, key: Any) -> bool:
        """Return whether these shapes came before, among the last few that had no graph."""
        came = key in self._seen
        self._seen[key] = None
        self._seen.move_to_end(key)
        while len(self._seen) > 8 * MOST_GRAPHS:
            self._seen.popitem(last=False)
        return came


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream that calls on a GPU are recorded on.

    Torch's own is on the GPU that recorded first, and makes that the current one: nothing on another would be recorded.
    Graphs share memory only if they are recorded on one stream.
    """
    return torch.cuda.Stream(device)


def _is_recording() -> bool:
    return torch.cuda.is_current_stream_capturing()
