"""Is skipping really faster on a GPU? Kernels beside gathering, masking, and the fastest whole networks there are.

    python benchmarks/gpu_execution.py --no-compile        (an NVIDIA GPU; minutes)
    python benchmarks/gpu_execution.py                     (with torch.compile, which takes minutes for every network)
    python benchmarks/gpu_execution.py --parts tables      (some of: limits tables latency updates job predict tilings)
    TRITON_INTERPRET=1 python benchmarks/gpu_execution.py --tiny --device cpu    (tries the script without a GPU)

All figures are medians of interleaved repeats in milliseconds a batch. Decisions are random for each image and keep
31 % of the blocks (half of a ResNet-50's). The ways to run a batch:

- masked: as published, every block for every image, then blended by multiplication, in float32;
- graph: the whole folded network, all blocks, in one CUDA graph; graph_last: with features channels last;
- compiled: the same by ``torch.compile(mode="max-autotune")``;
- gather: a block runs on copies of the images that keep it;
- kernel: a skipped block is a branch that is not taken; kernel_all: the same kernels, all blocks kept.

For each network, precision and batch size it prints ``speedup``, the fastest whole network (graph, graph_last,
compiled or kernel_all) over ``kernel``, and ``ideal``, the share that this is of the ideal by MACs. Limits of the
device (products a second, bytes a second) are measured, not read from a data sheet. Writes
benchmarks/results/gpu-<device>.json after every part, so that what was measured stays if the time runs out.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from execution import MaskedEnv, published, random_images

import policyskip
from policyskip.agents.blockdrop import BlockDrop
from policyskip.backbones import Backbone, cifar_resnet, count_costs, load
from policyskip.backbones.folding import folded
from policyskip.backbones.resnet import TorchvisionResNet
from policyskip.data import TensorImages, digits
from policyskip.deployment.profiling import device_name, milliseconds
from policyskip.envs.block_selection import BlockSelectionVectorEnv
from policyskip.execution.stage_network import StageNetwork
from policyskip.execution.stage_tilings import Tiling
from policyskip.execution.ways import Execution

Calls = dict[str, Callable[[], object]]
Figures = dict[str, Any]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PEAK_SIZE = 8192
"""Rows of the square matrices whose product measures the limit of the arithmetic."""


class Case:
    """Holds a network of the table, the size of its images, the share of its blocks kept, and its batch sizes."""

    def __init__(self, name: str, network: Backbone, size: int, kept: float, batches: tuple[int, ...]) -> None:
        self.name, self.size, self.kept, self.batches = name, size, kept, batches
        self.network = network.freeze()
        self.shape = (3, size, size)


def cases(device: torch.device, tiny: bool) -> list[Case]:
    """List the networks of the table; weights do not matter here."""
    if tiny:
        return [Case("resnet8", cifar_resnet(10, 8, checkpoint="random", width=4).to(device), 8, 0.5, (1, 3))]
    small = (1, 8, 64, 256, 2048, 8192)
    return [
        Case("resnet110", cifar_resnet(10, 110, checkpoint="random").to(device), 32, 0.31, small),
        Case("digits_resnet32", load("resnet32_digits").to(device), 20, 0.31, small),
        Case("resnet50", TorchvisionResNet(50).to(device), 224, 0.5, (1, 8, 64, 256)),
    ]


def captured(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Return a call that replays what ``call`` does from a CUDA graph; on other devices, ``call``."""
    if device.type != "cuda":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def guarded(calls: Calls, name: str, make: Callable[[], Callable[[], object]]) -> None:
    """Add a call, unless it cannot be made here: then say so, and go on without it."""
    try:
        call = make()
        call()
        calls[name] = call
    except Exception as error:
        print(f"  without {name}: {str(error).splitlines()[0][:160] if str(error) else type(error).__name__}")


@torch.no_grad()
def table(case: Case, precision: str, batch: int, repeats: int, compiled: bool) -> Figures:
    """Measure every way to run a batch of one network, in milliseconds."""
    device, K = case.network.mean.device, case.network.num_blocks
    images = random_images(batch, device, case.size)
    keep_BK = torch.rand(batch, K, device=device) < case.kept
    all_BK = torch.ones_like(keep_BK)
    whole = folded(case.network).to(DTYPES[precision])
    calls: Calls = {}
    if precision == "float32":
        guarded(calls, "masked", lambda: lambda: published(case.network, images, keep_BK))
    guarded(calls, "graph", lambda: captured(lambda: whole(images), device))
    channels_last = copy.deepcopy(whole).to(memory_format=torch.channels_last)
    guarded(calls, "graph_last", lambda: captured(lambda: channels_last(images), device))
    if compiled:

        def compile_whole() -> Callable[[], object]:
            torch._dynamo.reset()  # else it gives up after eight networks
            fast = torch.compile(whole, mode="max-autotune", dynamic=False)
            fast(images)
            return lambda: fast(images)

        guarded(calls, "compiled", compile_whole)
    for way in ("gather", "kernel"):
        execution = Execution(case.network, case.shape, way=way, precision=precision)
        guarded(calls, way, lambda execution=execution: lambda: execution.logits(images, keep_BK))  # type: ignore[misc]
        if way == "kernel":
            guarded(calls, "kernel_all", lambda kernels=execution: lambda: kernels.logits(images, all_BK))  # type: ignore[misc]
    figures: Figures = dict(milliseconds(calls, repeats, device))
    costs = count_costs(case.network, case.shape)
    figures["share"] = float(costs.of(keep_BK.cpu()).mean()) / costs.full
    wholes = [figures[name] for name in ("graph", "graph_last", "compiled", "kernel_all") if name in figures]
    if "kernel" in figures and wholes:
        figures["speedup"] = min(wholes) / figures["kernel"]
        figures["ideal"] = figures["speedup"] * figures["share"]
        figures["speedup_over_graph"] = figures["graph"] / figures["kernel"]
        figures["tera_operations"] = 2e-9 * costs.full * figures["share"] * batch / figures["kernel"]
    if "kernel" in figures and "masked" in figures:
        figures["speedup_over_masked"] = figures["masked"] / figures["kernel"]
    return figures


def limits(device: torch.device, tiny: bool) -> Figures:
    """Measure the products and the bytes that the device manages at most: a large matrix product, and a copy."""
    n = 64 if tiny else PEAK_SIZE
    figures: Figures = {}
    torch.backends.cuda.matmul.allow_tf32 = True
    for precision, dtype in DTYPES.items():
        a = torch.randn(n, n, device=device, dtype=dtype)
        figures[f"tera_operations_{precision}"] = (
            2e-9 * n**3 / milliseconds({"product": lambda a=a: a @ a}, 5, device)["product"]  # type: ignore[misc]
        )
    source = torch.empty(n * n * 8, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_ms = milliseconds({"copy": lambda: target.copy_(source)}, 5, device)["copy"]
    figures["giga_bytes_a_second"] = 2e-6 * source.numel() / copy_ms
    return figures


@torch.no_grad()
def latency(case: Case, precision: str, rounds: int) -> Figures:
    """Measure single images one after the other, with and without the time to copy each to the device."""
    device = case.network.mean.device
    on_host = random_images(rounds, torch.device("cpu"), case.size)
    on_host = on_host.pin_memory() if device.type == "cuda" else on_host
    on_device = on_host.to(device)
    keep_RK = torch.rand(rounds, case.network.num_blocks, device=device) < case.kept
    kernel = Execution(case.network, case.shape, way="kernel", precision=precision)
    whole = folded(case.network).to(DTYPES[precision])
    static = on_device[:1].clone()
    replay = captured(lambda: whole(static), device)

    def each(call: Callable[[int], object]) -> Callable[[], object]:
        def all_rounds() -> None:
            for n in range(rounds):
                call(n)
                if device.type == "cuda":
                    torch.cuda.synchronize()

        return all_rounds

    def whole_there(n: int) -> None:
        static.copy_(on_device[n : n + 1])
        replay()

    def whole_copied(n: int) -> None:
        static.copy_(on_host[n : n + 1], non_blocking=True)
        replay()

    calls: Calls = {
        "kernel": each(lambda n: kernel.logits(on_device[n : n + 1], keep_RK[n : n + 1])),
        "kernel_copied": each(
            lambda n: kernel.logits(on_host[n : n + 1].to(device, non_blocking=True), keep_RK[n : n + 1])
        ),
        "graph": each(whole_there),
        "graph_copied": each(whole_copied),
    }
    return {name: ms / rounds for name, ms in milliseconds(calls, 5, device).items()}


class MaskedTwice(MaskedEnv):
    """An environment that masks as published."""


def updates(case: Case, batch: int, repeats: int) -> Figures:
    """Measure BlockDrop updates whose greedy decisions are random and keep 31 %: kernels, gathering, and masking."""
    device, K = case.network.mean.device, case.network.num_blocks
    images = TensorImages(
        random_images(2 * batch, device, case.size), torch.randint(0, 10, (2 * batch,), device=device)
    )
    decided_BK = torch.where(torch.rand(batch, K, device=device) < case.kept, 10.0, -10.0)
    calls: Calls = {}
    for name in ("kernel", "gather", "masked"):

        def make(name: str = name) -> Callable[[], object]:
            way = {} if name == "masked" else {"execution": name}
            kind = MaskedTwice if name == "masked" else BlockSelectionVectorEnv
            env = kind(batch, backbone=case.network, images=images, **way)
            agent = BlockDrop(env, 10**6, alpha=0.95, alpha_end=0.95, lr=1e-9, curriculum=0.0)
            agent.policy.keep_head.register_forward_hook(lambda module, inputs, logits: logits + decided_BK)
            return lambda: agent.update(env)

        guarded(calls, name, make)
    figures: Figures = dict(milliseconds(calls, repeats, device))
    if {"kernel", "masked"} <= figures.keys():
        figures["speedup_over_masked"] = figures["masked"] / figures["kernel"]
    return figures


@torch.no_grad()
def predict(run: Path, repeats: int, device: torch.device, tiny: bool) -> Figures:
    """Measure a run's ``predict`` on digits against its whole network in a CUDA graph: time over MACs."""
    predictor = policyskip.load(run, device=str(device))
    test = digits(device).test
    figures: Figures = {}
    for batch in (1, 4) if tiny else (1, 256):
        images = test.stream([(torch.arange(batch), 0)]).__next__().images
        whole = captured(lambda images=images: predictor.network_to_measure(images), device)  # type: ignore[misc]
        calls: Calls = {"predict": lambda images=images: predictor.predict(images), "whole": whole}  # type: ignore[misc]
        times = milliseconds(calls, repeats, device)
        macs = float(predictor.predict(images).macs_B.mean()) / predictor.costs.full
        figures[str(batch)] = times | {"macs": macs, "time_over_macs": times["predict"] / times["whole"] / macs}
    return figures


WAYS_TO_TILE = (
    Tiling(warps=(16,), ahead=True, one_launch=True),
    Tiling(warps=(8, 8, 4), resident=2),
    Tiling(warps=(8, 4, 4)),
    Tiling(warps=(8,), one_launch=True),
    Tiling(warps=(4, 4, 4), resident=2),
    Tiling(warps=(8, 8, 8), ahead=True),
)
"""Ways in which the stage kernels may divide the work of an image; the first two are those of ``stage_tilings.py``."""


@torch.no_grad()
def tilings(case: Case, precision: str, batches: tuple[int, ...], repeats: int, until: float) -> Figures:
    """Measure the stage kernels with every tiling, patch and number of entries, until the time is over.

    First every tiling with the network's own patch and entries; then the first two tilings with others.
    """
    device, fast = case.network.mean.device, folded(case.network).to(DTYPES[precision])
    images = {batch: random_images(batch, device, case.size) for batch in batches}
    keep = {batch: torch.rand(1, batch, case.network.num_blocks, device=device) < case.kept for batch in batches}
    figures: Figures = {}

    def measure(tiling: Tiling, patch: int | None, entries: int | None) -> None:
        name = (
            f"warps {tiling.warps} ahead {tiling.ahead} one_launch {tiling.one_launch} patch {patch} entries {entries}"
        )
        if time.monotonic() > until:
            return
        started, times = time.monotonic(), {}
        try:
            network = StageNetwork(fast, case.shape, tilings=((math.inf, tiling),), patch=patch, entries=entries)
            network.logits(images[batches[0]], keep[batches[0]])
            times["compile_s"] = time.monotonic() - started
            for batch in batches:
                call = captured(lambda batch=batch: network.logits(images[batch], keep[batch]), device)  # type: ignore[misc]
                times[str(batch)] = milliseconds({"kernel": call}, repeats, device)["kernel"]
            figures[name] = times
        except Exception as error:
            figures[name] = {"error": str(error).splitlines()[0][:200]}
        print(f"  {precision} {name}: {figures[name]}", flush=True)

    for tiling in WAYS_TO_TILE:
        measure(tiling, None, None)
    for patch, entries in ((1, None), (1, 64), (1, 256), (2, 64), (2, 256)):
        for tiling in WAYS_TO_TILE[:2]:
            measure(tiling, patch, entries)
    return figures


def job(folder: Path) -> Figures:
    """Measure the wall time of ``policyskip train agent=blockdrop``, with the search of its static front."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "policyskip", "train", "agent=blockdrop", "tracking=none", f"run.dir={folder}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return {"seconds": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--parts", nargs="+", default=["limits", "tables", "latency", "updates", "job", "predict"])
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes minutes")
    parser.add_argument("--seconds", type=float, default=120, help="of the part tilings, at most")
    parser.add_argument("--networks", nargs="+", help="some of resnet110 digits_resnet32 resnet50")
    parser.add_argument("--precisions", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--batches", nargs="+", type=int, help="of the part tables, some of each network's")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--tiny", action="store_true", help="a tiny network: tries the script, measures nothing")
    options = parser.parse_args()
    device, tiny = torch.device(options.device), options.tiny
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; benchmarks/execution.py measures CPUs")
    torch.manual_seed(0)
    content: Figures = {"device": device_name(device), "torch": torch.__version__}
    path = options.results / f"gpu-{'tiny' if tiny else content['device'].replace(' ', '-')}.json"

    def keep(part: str, figures: Figures) -> None:
        content.setdefault(part.split("/")[0], {})[part.partition("/")[2] or "all"] = figures
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(
            part,
            " ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items()),
            flush=True,
        )

    networks = [c for c in cases(device, tiny) if options.networks is None or c.name in options.networks]
    if "limits" in options.parts:
        keep("limits", limits(device, tiny))
    if "tables" in options.parts:
        for case in networks:
            for precision in options.precisions:
                for batch in [b for b in case.batches if options.batches is None or b in options.batches]:
                    compiled = not options.no_compile and device.type == "cuda" and batch in (1, 64, 2048)
                    keep(
                        f"tables/{case.name} {precision} {batch}",
                        table(case, precision, batch, options.repeats, compiled),
                    )
    if "latency" in options.parts:
        for case in networks:
            for precision in options.precisions:
                keep(f"latency/{case.name} {precision}", latency(case, precision, 2 if tiny else 100))
    if "updates" in options.parts:
        for case in networks[:1]:
            for batch in (4,) if tiny else (256, 2048):
                keep(f"updates/{case.name} {batch}", updates(case, batch, options.repeats))
    if "tilings" in options.parts:
        until = time.monotonic() + options.seconds
        for precision in reversed(options.precisions):
            figures = tilings(networks[0], precision, (2, 3) if tiny else (1, 64, 256, 2048), 5, until)
            keep(f"tilings/{networks[0].name} {precision}", figures)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        if "job" in options.parts and not tiny:
            keep("job", job(run))
            if "predict" in options.parts:
                keep("predict", predict(run, options.repeats, device, tiny))


if __name__ == "__main__":
    main()
