"""Compile the tile kernels as a network launches them, with Triton's own compiler, which needs no GPU.

``python -m tests.execution.compiling resnet50 64 bfloat16 90`` prints a line of JSON for each kernel: what it is
compiled for, registers and bytes of stack a thread, bytes of shared memory a program, instructions on tensor cores,
and how many programs a multiprocessor of an H100 holds. ``exact`` behind it asks for full float32. Run it without
``TRITON_INTERPRET``: the interpreter does not compile.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from policyskip.backbones.base import Backbone
from policyskip.backbones.folding import folded
from policyskip.backbones.resnet import CifarResNet, TorchvisionResNet
from policyskip.execution import tile_kernels, tile_network
from tests.execution.residual import bottleneck, network

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.uint8: "u8"}
NETWORKS: dict[str, tuple[Callable[[], Backbone], int]] = {
    "bottlenecks": (lambda: beginning_of_resnet50(), 224),
    "resnet18": (lambda: TorchvisionResNet(18), 224),
    "resnet50": (lambda: TorchvisionResNet(50), 224),
    "cifar14": (lambda: CifarResNet(14, 10, "B", width=24), 20),
}
"""Networks, and the height and width of their images."""


def beginning_of_resnet50() -> Backbone:
    """The stem and the first two blocks of a ResNet-50."""
    made = network(bottleneck(64, 64, 256), bottleneck(256, 64, 256), channels=64, out=256)
    made.stem = nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    )
    return made.freeze()


class Recorder:
    """A stand-in for a kernel that notes how it is launched and does nothing."""

    def __init__(
        self, kernel: Any, launches: list[tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]]
    ) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: self.launches.append((self.kernel, grid, args, options))


def launches(backbone: Backbone, size: int, images: int, dtype: torch.dtype, exact: bool) -> list[Any]:
    """List the launches for images (images, 3, size, size): kernel, grid, arguments, options. Nothing is computed."""
    fast = folded(backbone.freeze()).to(dtype)
    tiled = tile_network.TileNetwork(fast, (3, size, size), exact)
    found: list[Any] = []
    names = ("normalise", "pool", "list_images", "convolve", "join")
    recorders = SimpleNamespace(**{name: Recorder(getattr(tile_kernels, name), found) for name in names})
    tiled._kernels = tiled._stem.kernels = recorders
    tiled._flags["UPCAST"] = False
    fast.to("meta")
    x = tiled.features(torch.empty(images, 3, size, size, dtype=torch.uint8, device="meta"))
    tiled.advance(x, torch.empty(images, fast.num_blocks, dtype=torch.bool, device="meta"), 0)
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
    make, size = NETWORKS[name]
    tile_network.CAPABILITY = divmod(capability, 10)
    seen = set()
    for kernel, grid, args, options in launches(make(), size, images, dtype, exact):
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
    chosen, batch, precision, compute, *options = sys.argv[1:]
    lines = report(chosen, int(batch), getattr(torch, precision), int(compute), "exact" in options)
    for line in lines:
        print(json.dumps(line))
