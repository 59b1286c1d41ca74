"""The bookkeeping of CUDA graphs, with recordings that remember what they were asked."""

from __future__ import annotations

from contextlib import nullcontext
from unittest.mock import MagicMock

import pytest
import torch

from policyskip.execution import cuda_graphs
from policyskip.execution.cuda_graphs import MOST_GRAPHS, CudaGraph, CudaGraphs


class Recording:
    """Stands for a CUDA graph: it makes the call again."""

    made: list[int] = []  # noqa: RUF012 - of all instances; a fixture clears it
    most = 100

    def __init__(self, call, inputs, pool) -> None:
        if len(inputs[0]) > self.most:
            raise torch.OutOfMemoryError("too large")
        self.made.append(len(inputs[0]))
        self.call, self.replays = call, 0

    def replay(self, inputs):
        self.replays += 1
        return self.call(*inputs)


@pytest.fixture
def graphs(monkeypatch) -> CudaGraphs:
    monkeypatch.setattr(Recording, "made", [])
    return CudaGraphs(lambda x: (2 * x,), Recording)


def run(graphs: CudaGraphs, rows: int) -> None:
    x = torch.arange(rows).float()
    (y,) = graphs.replayed((x,))
    assert torch.equal(y, 2 * x)


def test_a_size_that_comes_again_is_recorded_once(graphs):
    for rows in (4, 4, 4, 3, 4):
        run(graphs, rows)
    assert Recording.made == [4]
    assert [graph.replays for graph in graphs.graphs.values()] == [3]
    run(graphs, 3)
    assert Recording.made == [4, 3]


def test_other_dtypes_and_shapes_are_other_graphs(graphs):
    for x in (torch.zeros(4), torch.zeros(4).double(), torch.zeros(4, 1)):
        graphs.replayed((x,))
        graphs.replayed((x,))
    assert len(graphs.graphs) == 3


def test_the_graph_that_was_not_used_for_longest_goes(graphs):
    for rows in range(1, MOST_GRAPHS + 1):
        run(graphs, rows)
        run(graphs, rows)
    run(graphs, 1)
    run(graphs, 50)
    run(graphs, 50)
    kept = [key[0][0][0] for key in graphs.graphs]
    assert len(kept) == MOST_GRAPHS and kept[-2:] == [1, 50] and 2 not in kept


def test_without_memory_for_a_graph_the_call_is_made(graphs):
    for _ in range(4):
        run(graphs, 101)
    assert not graphs.graphs and Recording.made == []
    run(graphs, 5)
    run(graphs, 5)
    assert Recording.made == [5]


def test_a_call_that_runs_out_of_memory_says_so():
    def call(x):
        raise torch.OutOfMemoryError("even without a graph")

    graphs = CudaGraphs(call, Recording)
    graphs._seen[((torch.Size([200]), torch.float32),)] = None
    with pytest.raises(torch.OutOfMemoryError, match="even without"):
        graphs.replayed((torch.zeros(200),))


def test_on_a_cpu_and_inside_another_recording_there_is_none(graphs, monkeypatch):
    for _ in range(3):
        graphs(torch.ones(4))
    monkeypatch.setattr(cuda_graphs, "_is_recording", lambda: True)

    class OnGpu(torch.Tensor):
        is_cuda = True

    for _ in range(3):
        graphs(torch.ones(4).as_subclass(OnGpu))
    assert Recording.made == []


def test_a_call_is_recorded_on_a_stream_of_its_own_gpu(monkeypatch):
    """And all calls on one stream: torch shares the memory of graphs that were recorded on one, and no other."""
    recorded = []
    for name in ("CUDAGraph", "set_stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: MagicMock(device=device))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: recorded.append(options) or nullcontext())
    for device in ("cuda:0", "cuda:1", "cuda:1"):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=device: MagicMock(device=torch.device(device)))
        CudaGraph(lambda x: (2 * x,), (torch.ones(3),), "pool")
    first, second, third = (options["stream"] for options in recorded)
    assert str(first.device) == "cuda:0" and str(second.device) == "cuda:1" and third is second
    cuda_graphs._stream.cache_clear()
