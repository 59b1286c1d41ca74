"""Compile the tile kernels as a network launches them, with Triton's own compiler, which needs no GPU.

``python -m tests.execution.compiling resnet50 64 bfloat16 90`` prints a line of JSON for each kernel: what it is
compiled for, registers and bytes of stack a thread, bytes of shared memory a program, instructions on tensor cores,
and how many programs a multiprocessor of an H100 holds. ``exact`` behind it asks for full float32, a number for the
first so many kernels only. Run it without ``TRITON_INTERPRET``: the interpreter does not compile.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from policyskip.backbones.base import Backbone
from policyskip.backbones.folding import folded
from policyskip.backbones.resnet import CifarResNet, TorchvisionResNet
from policyskip.execution import tile_kernels
from policyskip.execution.tile_network import TileNetwork

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.uint8: "u8"}
NETWORKS: dict[str, tuple[Any, tuple[int, int, int]]] = {
    "resnet18": (lambda: TorchvisionResNet(18), (64, 56, 56)),
    "resnet50": (lambda: TorchvisionResNet(50), (64, 56, 56)),
    "cifar14": (lambda: CifarResNet(14, 10, "B", width=24), (24, 20, 20)),
}
"""Networks, and the features that enter their first block."""


class Recorder:
    """A stand-in for a kernel that notes how it is launched and does nothing."""

    def __init__(
        self, kernel: Any, launches: list[tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]]
    ) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: self.launches.append((self.kernel, grid, args, options))


def launches(network: Backbone, shape: tuple[int, int, int], images: int, dtype: torch.dtype, exact: bool) -> list[Any]:
    """List the launches of all blocks for features (images, *shape): kernel, grid, arguments, options."""
    network = folded(network.freeze()).to(dtype)
    tiled = TileNetwork(network, (3, 0, 0), exact)
    found: list[Any] = []
    names = ("list_images", "convolve", "join")
    tiled._kernels = SimpleNamespace(**{name: Recorder(getattr(tile_kernels, name), found) for name in names})
    tiled._flags["UPCAST"] = False
    x = torch.empty(images, *shape, dtype=dtype, device="meta")
    tiled.advance(x, torch.empty(images, network.num_blocks, dtype=torch.bool, device="meta"), 0)
    return found


def compiled(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], capability: int) -> Any:
    """Compile a kernel as it would be for these arguments on a GPU of this compute capability."""
    sizes = {name: value for name, value in options.items() if name.isupper()}
    names = kernel.arg_names[: len(args)]
    types = {
        n: f"*{TYPES[arg.dtype]}" if isinstance(arg, Tensor) else "i32" for n, arg in zip(names, args, strict=True)
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, arg in enumerate(args) if isinstance(arg, Tensor)}
    signature = types | dict.fromkeys(sizes, "constexpr")
    source = ASTSource(fn=kernel, signature=signature, constexprs=sizes, attrs=aligned)
    choices = {name: value for name, value in options.items() if not name.isupper()}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=choices)


def usage(cubin: bytes) -> dict[str, int]:
    """Read the registers and the bytes of stack and local memory a thread from a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", said.stdout)}


def report(name: str, images: int, dtype: torch.dtype, capability: int, exact: bool) -> Iterator[dict[str, Any]]:
    """Compile each kernel of a network once, and yield what it needs."""
    make, shape = NETWORKS[name]
    seen = set()
    for kernel, grid, args, options in launches(make(), shape, images, dtype, exact):
        key = (kernel.__name__, *sorted(options.items()))
        if key not in seen:
            seen.add(key)
            made = compiled(kernel, args, options, capability)
            tensor_cores = len(re.findall(r"wgmma\.mma_async|mma\.sync", made.asm["ptx"]))
            needs = dict(shared=made.metadata.shared, tensor_cores=tensor_cores, **usage(made.asm["cubin"]))
            needs["held"] = held(needs["REG"], options.get("num_warps", 4), needs["shared"])
            yield dict(kernel=kernel.__name__, grid=grid[0], **options, **needs)


def held(registers: int, warps: int, shared: int) -> int:
    """Return how many programs a multiprocessor of an H100 holds at a time."""
    threads = 32 * warps
    by_registers = 65536 // (-(-registers // 8) * 8 * threads)
    return min(by_registers, 2048 // threads, 228 * 1024 // (shared + 1024))


if __name__ == "__main__":
    network, batch, precision, compute, *rest = sys.argv[1:]
    most = next((int(word) for word in rest if word.isdigit()), None)
    lines = report(network, int(batch), getattr(torch, precision), int(compute), "exact" in rest)
    for line in islice(lines, most):
        print(json.dumps(line))
