"""The tile kernels through Triton's own compiler, which needs no GPU: what they take of a multiprocessor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
pytestmark = pytest.mark.skipif(not (TOOLS / "ptxas").exists(), reason="this Triton comes without NVIDIA's assembler")

MOST_SHARED = 99 * 1024  # bytes a program may have on every GPU from compute capability 8.0
MOST_SPILLED = 16  # bytes a thread
ROOT = Path(__file__).parents[2]


def compile_in_another_process(folder: Path, *words: object) -> list[dict[str, Any]]:
    """The lines of ``tests/execution/compiling.py``, which is run without Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.execution.compiling", *map(str, words)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(kernels: list[dict[str, Any]], on_tensor_cores: bool = True) -> None:
    """Check that no kernel spills more than a pointer or two, and that two programs share a multiprocessor."""
    for kernel in kernels:
        assert kernel["STACK"] <= MOST_SPILLED and kernel["LOCAL"] == 0, kernel
        assert kernel["shared"] <= MOST_SHARED and kernel["held"] >= 2, kernel
        assert (kernel["tensor_cores"] > 0) == (on_tensor_cores and kernel["kernel"] in ("convolve", "join")), kernel


def test_kernels_of_a_bottleneck_compile(tmp_path):
    kernels = compile_in_another_process(tmp_path, "bottlenecks", 64, "bfloat16", 90)
    names = ["normalise", "pool", "list_images", *["convolve"] * 2, "join", *["convolve"] * 2]
    assert [kernel["kernel"] for kernel in kernels] == names
    check(kernels)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float32", "float32 exact"])
@pytest.mark.parametrize("network", ["resnet18", "resnet50", "cifar14"])
def test_all_kernels_compile(network, precision, capability, tmp_path):
    dtype, *exact = precision.split()
    for batch in (1, 64):
        kernels = compile_in_another_process(tmp_path, network, batch, dtype, capability, *exact)
        assert len(kernels) > 5
        check(kernels, on_tensor_cores=not exact)
