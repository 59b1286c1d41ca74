"""Compile the stage kernels for GPUs that need not be there, and print what they take: a program of its own, because a
process in which Triton interprets does not compile.

``python -m tests.execution.stage_compiling float32 90 0 few`` prints a line of JSON for each launch of a ResNet-110 at 32×32.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from policyskip.backbones.folding import folded
from policyskip.backbones.resnet import CifarResNet
from policyskip.execution.order_kernels import longest_first
from policyskip.execution.stage_kernels import run_image
from policyskip.execution.stage_network import StageNetwork
from policyskip.execution.stage_tilings import EXACT, OLDER, TILINGS

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


def resources(function: Any, signature: dict[str, str], constants: dict[str, Any], capability: int, warps: int) -> dict:
    """Compile a kernel, and say how many registers, bytes of shared memory and bytes of spilled registers it takes."""
    names = function.arg_names
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name, kind in signature.items() if kind[0] == "*"}
    # Up to Triton 3.7, a tuple is one constant, and its parts are plain values: what compiles so compiles with 3.8 too.
    own = {name: tl.constexpr(value) if isinstance(value, tuple) else value for name, value in constants.items()}
    source = ASTSource(function, signature | dict.fromkeys(constants, "constexpr"), own, aligned)
    options = {"num_warps": warps, "num_stages": 1}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL"))
    products = len(re.findall(r"wgmma\.mma_async|mma\.sync", kernel.asm["ptx"]))
    return dict(
        warps=warps, registers=registers, spilled=stack + local, shared=kernel.metadata.shared, products=products
    )


def main(dtype_name: str, capability: str, exact: str, how: str, most: int) -> None:
    """Compile the launches of a ResNet-110, and the order; at most so many of them."""
    dtype = getattr(torch, dtype_name)
    network = StageNetwork(folded(CifarResNet(110, 10).freeze()).to(dtype), (3, 32, 32), exact=exact == "exact")
    network.precision = "ieee" if network.exact else "tf32"
    tilings = EXACT if network.exact else TILINGS if capability == "90" else OLDER
    tiling = tilings[0 if how == "few" else -1][1]
    pointer = POINTERS[dtype]
    for launch in network.launches(0, 54, True, True, tiling)[:most]:
        constants = launch.constants
        kinds = ["*u8" if constants["STEM"] else pointer, pointer, pointer, "*u8", "*i32", pointer, "*fp32"]
        signature = dict(zip(run_image.arg_names, [*kinds, *["i32"] * 6], strict=False))
        print(json.dumps(resources(run_image, signature, constants, int(capability), launch.warps)), flush=True)
    kinds = ["*i32", "*u8", "*i32", *["i32"] * 6]
    signature = dict(zip(longest_first.arg_names, kinds, strict=False))
    print(json.dumps(resources(longest_first, signature, {"MINE": 32, "OTHERS": 128}, int(capability), 8)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:5], most=int(sys.argv[5]) if len(sys.argv) > 5 else 9)
