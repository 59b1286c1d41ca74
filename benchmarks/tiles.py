"""How fast is each kernel that runs a residual network tile by tile, and which tiles are the fastest?

    python benchmarks/tiles.py [--depth 50] [--batch 64] [--precision bfloat16] [--kept 0.5] [--compiled]    (4 minutes)

For an NVIDIA GPU. For each kernel of one of torchvision's ResNets at 224 pixels, and for each way to cut it into tiles:
its time in microseconds, if the share ``--kept`` of the images keeps its block; that of the tiles which are chosen by
``policyskip/execution/tilings.py``; and the shares of the GPU's products and bandwidth that the fastest reaches. Then
the whole network in one CUDA graph: by these kernels with some blocks and with all, in two halves of the batch side by
side, a part of the batch at a time, by cuDNN, and with ``--compiled`` by ``torch.compile(mode="max-autotune")``.

Prints tables and writes nothing.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from policyskip.backbones.folding import folded
from policyskip.backbones.resnet import TorchvisionResNet
from policyskip.deployment.profiling import device_name
from policyskip.execution.tile_network import TileNetwork
from policyskip.execution.tilings import TILINGS, Tiling

PRODUCTS = {"bfloat16": 989e12, "float16": 989e12, "float32": 495e12}
"""Floating-point operations a second of an H100 or H200, without sparsity; those of float32 in TF32."""
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12}
"""Bytes a second."""

Launch = tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]
"""A kernel, its grid, its arguments, and the sizes it is compiled for."""


class Watched:
    """A kernel that notes how it is launched, and runs."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            self.launches.append((self.kernel, grid, args, options))
            self.kernel[grid](*args, **options)

        return launch


def watch(network: TileNetwork, x: Tensor, keep_BK: Tensor) -> list[Launch]:
    """Run all blocks, and list the launches of convolutions."""
    launches: list[Launch] = []
    kernels = network._kernels
    watched = {name: Watched(getattr(kernels, name), launches) for name in ("convolve", "join")}
    network._kernels = SimpleNamespace(list_images=kernels.list_images, **watched)
    network.advance(x, keep_BK, 0)
    network._kernels = kernels
    return launches


def microseconds(call: Callable[[], object]) -> float:
    """Return the time of a call in a CUDA graph."""
    from triton.testing import do_bench_cudagraph

    return 1e3 * float(do_bench_cudagraph(call, rep=10))


def work(launch: Launch, images: float) -> tuple[float, float]:
    """Return the floating-point operations and the bytes of a launch whose block this many images keep, if each number
    is read or written once. Those of other images, and of a shortcut's convolution, are not counted."""
    _, _, args, sizes = launch
    pixels = sizes["OUT_H"] * sizes["OUT_W"]
    taps = sizes["TAPS_Y"] * sizes["TAPS_X"]
    operations = 2 * images * pixels * taps * sizes["CHANNELS"] * sizes["OUT_CHANNELS"]
    joins = sizes.get("IS_LAST", True)
    moved = sizes["H"] * sizes["W"] * sizes["CHANNELS"] + (1 + joins) * pixels * sizes["OUT_CHANNELS"]
    weights = taps * sizes["CHANNELS"] * sizes["OUT_CHANNELS"]
    return operations, args[0].element_size() * (images * moved + weights)


def described(launch: Launch) -> str:
    """Return what a launch computes, in a few words."""
    kernel, _, _, s = launch
    return (
        f"{kernel.__name__} {s['TAPS_Y']}x{s['TAPS_X']} /{s['STRIDE_Y']} "
        f"{s['H']}² {s['CHANNELS']} → {s['OUT_H']}² {s['OUT_CHANNELS']}"
    )


def name_of(tiling: Tiling) -> str:
    """Return a tiling in a few characters."""
    return f"{tiling.pixels}x{tiling.channels} w{tiling.warps} s{tiling.stages}"


def other_tilings(kind: str) -> tuple[Tiling, ...]:
    """Return the tilings of the table, one with more pixels, and the two largest with other numbers of stages: with
    one, operands pass through the multiprocessor's cache, which a filter of three by three reads nine times."""
    large, second = TILINGS[kind][:2]
    others = [tiling._replace(stages=stages) for tiling in (large, second) for stages in (1, 2, 4)]
    return (*TILINGS[kind], second._replace(pixels=256, warps=8, programs=2), *others)


def each_kernel(backbone: Any, features: Tensor, keep_BK: Tensor, arguments: argparse.Namespace) -> None:
    """Print the table of kernels."""
    kind = "half" if features.element_size() == 2 else "tf32"
    shape = (3, 224, 224)
    chosen = watch(TileNetwork(backbone, shape), features.clone(), keep_BK)
    times: list[dict[str, float]] = [{"chosen": 0.0} for _ in chosen]
    known: dict[Any, float] = {}
    tables: dict[str, Any] = {"chosen": TILINGS} | {name_of(t): {kind: (t,)} for t in other_tilings(kind)}
    for name, table in tables.items():
        network = TileNetwork(backbone, shape, tilings=table)
        try:
            launches = watch(network, features.clone(), keep_BK)
        except Exception as error:  # more shared memory or registers than there are
            print(f"{name}: {type(error).__name__}")
            continue
        for i, (kernel, grid, args, options) in enumerate(launches):
            key = (kernel.__name__, grid, *sorted(options.items()))
            if key not in known:
                known[key] = microseconds(partial(kernel[grid], *args, **options))
            times[i][name] = known[key]
    gpu = next((bandwidth for name, bandwidth in BANDWIDTH.items() if name in device_name(features.device)), None)
    print("\n| kernel | chosen µs | fastest µs | tiles | of products | of bandwidth |\n|---|---|---|---|---|---|")
    for launch, row in zip(chosen, times, strict=True):
        best = min(row, key=lambda name: row[name])
        operations, moved = work(launch, int(keep_BK[:, 0].sum()))
        seconds = row[best] / 1e6
        shares = f"{operations / seconds / PRODUCTS[arguments.precision]:.2f} | "
        shares += f"{moved / seconds / gpu:.2f}" if gpu else "–"
        print(f"| {described(launch)} | {row['chosen']:.1f} | {row[best]:.1f} | {best} | {shares} |")
    print(
        f"\nsum: {sum(r['chosen'] for r in times):.0f} µs as chosen, {sum(min(r.values()) for r in times):.0f} fastest"
    )


def whole(backbone: Any, images: Tensor, keep_BK: Tensor, arguments: argparse.Namespace) -> None:
    """Print the times of the whole network."""
    network, half = TileNetwork(backbone, (3, 224, 224)), len(images) // 2
    last = copy.deepcopy(backbone).to(memory_format=torch.channels_last)
    every, side = keep_BK.new_ones(1, *keep_BK.shape), torch.cuda.Stream()

    def halves() -> None:
        now = torch.cuda.current_stream()
        side.wait_stream(now)
        network.logits(images[:half], keep_BK[None, :half])
        with torch.cuda.stream(side):
            network.logits(images[half:], keep_BK[None, half:])
        now.wait_stream(side)

    def parts() -> None:
        """The first stage for a part of the images at a time: what its blocks hand on stays in the L2 cache."""
        x, first = network.features(images), backbone.stages[0]
        parts = zip(x.split(16), keep_BK[:, :first].split(16), strict=True)
        done = torch.cat([network.advance(part, keep, 0) for part, keep in parts])
        network.head(network.advance(done, keep_BK[:, first:], first))

    calls: dict[str, Callable[[], object]] = {
        f"kernels, {arguments.kept:.0%} kept": lambda: network.logits(images, keep_BK[None]),
        "kernels, all kept": lambda: network.logits(images, every),
        "kernels, halves side by side": halves,
        "kernels, first stage in parts": parts,
        "kernels, stem alone": lambda: network.features(images),
        "cuDNN, whole": lambda: backbone(images),
        "cuDNN, whole, channels last": lambda: last(images),
        "cuDNN, stem alone": lambda: backbone.features(images),
    }
    if arguments.compiled:
        compiled: Any = torch.compile(backbone, mode="max-autotune-no-cudagraphs")
        calls["torch.compile, whole"] = lambda: compiled(images)
    times = {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        times[name] = microseconds(call)
        print(f"{name}: {times[name]:.0f} µs")
    first = next(iter(times.values()))
    fastest = min(time for name, time in times.items() if name.startswith("cuDNN, whole"))
    print(f"against the whole network in cuDNN's CUDA graph: × {fastest / first:.2f}")


@torch.no_grad()
def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--depth", type=int, default=50)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--precision", choices=PRODUCTS, default="bfloat16")
    parser.add_argument("--kept", type=float, default=0.5, help="the share of the blocks that is kept")
    parser.add_argument("--compiled", action="store_true", help="measure torch.compile as well (minutes)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here")
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = True
    device = torch.device("cuda")
    backbone = folded(TorchvisionResNet(arguments.depth).to(device).freeze()).to(getattr(torch, arguments.precision))
    images = torch.randint(0, 256, (arguments.batch, 3, 224, 224), dtype=torch.uint8, device=device)
    order_BK = torch.rand(arguments.batch, backbone.num_blocks, device=device).argsort(0).argsort(0)
    keep_BK = order_BK < round(arguments.kept * arguments.batch)  # as many images at every block
    print(f"{device_name(device)}, torch {torch.__version__}, batch {arguments.batch}, {arguments.precision}")
    network = TileNetwork(backbone, (3, 224, 224))
    got = network.logits(images, keep_BK[None])[0].float()
    expected = backbone(images, keep_BK).float()
    print(
        f"largest difference from dense: {(got - expected).abs().max():.4f} of logits up to {expected.abs().max():.2f}"
    )
    whole(backbone, images, keep_BK, arguments)
    each_kernel(backbone, network.features(images), keep_BK, arguments)


if __name__ == "__main__":
    main()
