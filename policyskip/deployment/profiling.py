"""Where the time of a network goes on this device, and from which share of kept images on gathering them pays.

The result is a table in milliseconds an image, for each batch size: what the rewards of ``reward=latency`` and the plan
of a deployed run are made of.

Shapes: B images, K blocks (of a network with exits: its N segments, each with its head).
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from policyskip.backbones import Backbone, ExitNetwork, count_costs, count_exit_costs
from policyskip.backbones.base import Block, Network
from policyskip.backbones.execution import run_block, run_most
from policyskip.backbones.folding import folded

SHARES = (0.1, 0.5, 0.75, 0.9)
"""Shares of the batch that keep a block, at which gathering them is timed."""


@torch.no_grad()
def profile(
    network: Backbone | ExitNetwork, image_shape: tuple[int, int, int], batch_sizes: Sequence[int], repeats: int
) -> dict[str, Any]:
    """Time and MACs of each block.

    Args:
        image_shape: (3, H, W).
        batch_sizes: images at a time.
        repeats: of each measurement; medians are kept.

    Returns: plain keys, ready for JSON. ``batches`` holds for each batch size ``whole_ms`` (the network with all its
    blocks), ``always_ms`` (stem and head), ``kept_ms`` and ``dropped_ms`` (K numbers: a block that runs, and its
    shortcut), all in milliseconds **an image**, and for backbones ``break_even`` (K numbers, see :func:`break_even`).
    """
    fast = folded(network)
    measure = _measure_blocks if isinstance(fast, Backbone) else _measure_exits
    content: dict[str, Any] = {
        "network": network.name,
        "hash": network.content_hash(),
        "image_shape": list(image_shape),
        "device": device_name(fast.mean.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "macs": _macs(network, image_shape),
        "batches": {},
    }
    for batch in batch_sizes:
        images = torch.randint(0, 256, (batch, *image_shape), dtype=torch.uint8, device=fast.mean.device)
        content["batches"][str(batch)] = measure(fast, images, repeats)  # type: ignore[arg-type]
    return content


def device_name(device: torch.device) -> str:
    """The processor's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def side_by_side(calls: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each call, ``repeats`` times; the calls take turns, so that what disturbs one disturbs all."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat:  # the first warms up
                seconds[name].append(time.perf_counter() - started)
    return seconds


def milliseconds(calls: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Medians of what each call takes, measured :func:`side_by_side`."""
    return {name: 1000 * statistics.median(values) for name, values in side_by_side(calls, repeats, device).items()}


def break_even(whole_ms: float, share_ms: Sequence[tuple[float, float]]) -> float:
    """The share of a batch from which running a block for all is faster than gathering those that keep it.

    Args:
        whole_ms: of the block for the whole batch.
        share_ms: shares, and what gathering took at each.

    Returns: where the line through them (least squares) meets ``whole_ms``, in [0, 1]; 1: gathering always wins. Where
    the share makes no difference, 1, or the lowest share where that is slower than for all.
    """
    shares, times = [s for s, _ in share_ms], [ms for _, ms in share_ms]
    slope, level = statistics.linear_regression(shares, times)
    if slope <= 0:
        return 1.0 if statistics.mean(times) <= whole_ms else min(shares)
    return min(1.0, max(0.0, (whole_ms - level) / slope))


def _measure_blocks(network: Backbone, images: Tensor, repeats: int) -> dict[str, Any]:
    B, device = len(images), network.mean.device
    x = network.features(images)
    kept, dropped, even = [], [], []
    for block in network.blocks:
        times = milliseconds(_ways(block, x), repeats, device)
        kept.append(times["kept"] / B)
        dropped.append(times["dropped"] / B)
        gathered = [(count / B, times[str(count)]) for count in _counts(B)]
        even.append(break_even(times["most"], gathered) if len(gathered) > 1 else 1.0)
        x = block(x)
    ends = {"stem": lambda: network.features(images), "head": lambda: network.head(x), "whole": lambda: network(images)}
    times = milliseconds(ends, repeats, device)
    return {
        "whole_ms": times["whole"] / B,
        "always_ms": (times["stem"] + times["head"]) / B,
        "kept_ms": kept,
        "dropped_ms": dropped,
        "break_even": even,
    }


def _ways(block: Block, x: Tensor) -> dict[str, Callable[[], object]]:
    """One block over a batch, in every way it can be run. A copy of x is written over, which takes no other time."""
    B = len(x)
    some = {str(count): torch.randperm(B, device=x.device)[:count].sort().values for count in _counts(B)}
    rest = torch.arange(B - max(1, B // 10), B, device=x.device)
    mine = x.clone()
    return {
        "kept": lambda: block(mine, inplace=True),
        "dropped": lambda: block.shortcut(x),
        "most": lambda: run_most(block, mine, rest),
        **{name: lambda rows=rows: run_block(block, mine, rows) for name, rows in some.items()},  # type: ignore[misc]
    }


def _counts(B: int) -> list[int]:
    """How many images keep a block where gathering is timed: some, and not all."""
    return sorted({round(share * B) for share in SHARES} - {0, B})


def _measure_exits(network: ExitNetwork, images: Tensor, repeats: int) -> dict[str, Any]:
    B, device = len(images), network.mean.device
    calls: dict[str, Callable[[], object]] = {"begin": lambda: network.begin(images), "whole": lambda: network(images)}
    state = network.begin(images)
    for n in range(network.num_exits):
        after = network.segment(n, state)
        calls[str(n)] = lambda n=n, before=state, after=after: (network.segment(n, before), network.head(n, after))  # type: ignore[misc]
        state = after
    times = milliseconds(calls, repeats, device)
    kept = [times[str(n)] / B for n in range(network.num_exits)]
    always, whole = times["begin"] / B, times["whole"] / B
    return {"whole_ms": whole, "always_ms": always, "kept_ms": kept, "dropped_ms": [0.0] * len(kept)}


def _macs(network: Network, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    if isinstance(network, Backbone):
        costs = count_costs(network, image_shape)
        return {"always": costs.always, "blocks": costs.block_K.tolist()}
    assert isinstance(network, ExitNetwork)
    exits = count_exit_costs(network, image_shape)
    return {"always": 0.0, "blocks": (exits.trunk_N + exits.head_N).tolist()}
