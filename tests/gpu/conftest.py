"""What the tests on a GPU share; `make gpu` runs them.

Without a GPU they are skipped; with ``POLICYSKIP_GPU_TESTS_ON_CPU=1`` those that can be tried on a CPU run there, with
the kernels in Triton's interpreter. That is a trial of the tests, not of the GPU.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch

from policyskip.parallel.devices import find_device
from tests import learners

ON_CPU = os.environ.get("POLICYSKIP_GPU_TESTS_ON_CPU", "") == "1"


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    """A GPU. Everything on it is deterministic, as in a command."""
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    deterministic = torch.backends.cudnn.deterministic
    yield find_device("cuda:0")
    torch.backends.cudnn.deterministic = deterministic


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """A GPU, or the CPU in its place."""
    if not torch.cuda.is_available() and ON_CPU:
        return torch.device("cpu")
    found: torch.device = request.getfixturevalue("gpu")
    return found


@pytest.fixture
def learners_there(device, monkeypatch) -> torch.device:
    """The device, on which the learners of ``learners.py`` are made."""
    monkeypatch.setattr(learners, "DEVICE", device)
    return device


@pytest.fixture
def no_asking(gpu) -> Callable[[], AbstractContextManager[None]]:
    """A function that makes a context in which torch raises an error where the host waits for the GPU."""

    @contextmanager
    def checked() -> Iterator[None]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this is a prototype
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return checked


@pytest.fixture
def little_memory(gpu) -> Iterator[torch.device]:
    """A GPU on which 160 MB are free, as far as torch is concerned."""
    gc.collect()  # of tests before
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 160e6) / torch.cuda.mem_get_info()[1])
    yield gpu
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()
