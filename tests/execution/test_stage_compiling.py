"""The stage kernels compile for GPUs of compute capability 8.0 and 9.0, and fit them; this needs the compiler, no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED = 99 * 1024
"""Bytes of shared memory that a program may have on the smallest of these GPUs, of compute capability 8.6."""


def compiled(*arguments: object) -> list[dict[str, int]]:
    """What the kernels of a ResNet-110 take, launch by launch, and at last what finding the order takes."""
    spec = find_spec("triton")
    if spec is None or not (Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "ptxas").is_file():
        pytest.skip("there is no compiler of NVIDIA's in this Triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.execution.stage_compiling", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def check(found: list[dict[str, int]], spilled: int = 0) -> None:
    for kernel in found:
        assert kernel["shared"] < SHARED and kernel["spilled"] <= spilled, found
        assert kernel["registers"] * kernel["warps"] * 32 <= 65536, found


def test_the_first_stage_compiles_and_fits():
    stage, order = compiled("bfloat16", 90, "fast", "many", 1)
    check([stage, order])
    assert stage["products"] > 0, "no tensor cores are used"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("how", ["few", "many"])
def test_every_launch_compiles_and_fits(dtype, capability, how):
    found = compiled(dtype, capability, "fast", how)
    assert len(found) == (2 if how == "few" else 4)
    # In float32, a few addresses find no place among the 128 registers that a thread of 16 warps has, or one of 8.0.
    check(found, spilled=128 if dtype == "float32" and (how == "few" or capability == 80) else 0)
    assert all(kernel["products"] for kernel in found[:-1])


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_exact_products_compile_and_fit(capability):
    found = compiled("float32", capability, "exact", "many")
    assert len(found) == 4 and all(kernel["shared"] < SHARED for kernel in found)
    assert not any(kernel["products"] for kernel in found), "tensor cores have no exact products"
