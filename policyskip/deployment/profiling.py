"""Profiles: how long each block of a network takes on this device, and when gathering images costs more than it saves.

A profile is a table in milliseconds an image, for each batch size. The rewards of ``reward=latency`` and the plan of a
deployed run are made from it.

Shapes: B images, K blocks (of a network with exits: its N segments, each with its head).
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from policyskip.backbones import Backbone, ExitNetwork, count_costs, count_exit_costs
from policyskip.backbones.base import Block
from policyskip.backbones.execution import run_block, run_most
from policyskip.backbones.exits import State
from policyskip.execution.exits import ExitExecution, execution_of
from policyskip.execution.ways import DEFAULT, Execution, How
from policyskip.runs.progress import waiting

SHARES = (0.1, 0.5, 0.75, 0.9)
"""Shares of a batch for which gathering the images that keep a block is timed."""


@torch.no_grad()
def profile(
    network: Backbone | ExitNetwork,
    image_shape: tuple[int, int, int],
    batch_sizes: Sequence[int],
    repeats: int,
    how: How = DEFAULT,
) -> dict[str, Any]:
    """Measure the time and count the MACs of each block of a network.

    Args:
        network: its folded copy is measured, on the device that the network is on.
        image_shape: (3, H, W).
        batch_sizes: numbers of images that are computed at a time.
        repeats: of each measurement; medians are kept.
        how: in which way and precision the network is executed. Blocks are measured one by one without kernels.

    Returns: a dictionary for JSON. ``batches`` holds for each batch size ``whole_ms`` (the network with all its
    blocks), ``always_ms`` (stem and head), ``kept_ms`` and ``dropped_ms`` (K numbers: a block that runs, and its
    shortcut), all in milliseconds **an image**, and for backbones ``break_even`` (K numbers, see :func:`break_even`).
    ``execution`` says in which way the network is executed and why. If by kernels, each batch size has ``ways``: for
    each way ``whole_ms`` and ``half_ms`` (half of the blocks, or of the exits, by another decision for each image).

    Raises:
        UserError: the network cannot be executed so.
    """
    execution = execution_of(network, image_shape, how)
    fast = execution.network
    measure = _measure_blocks if isinstance(fast, Backbone) else _measure_exits
    content: dict[str, Any] = {
        "network": network.name,
        "hash": network.content_hash(),
        "image_shape": list(image_shape),
        "device": device_name(fast.mean.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "macs": _macs(network, image_shape),
        "execution": {"way": execution.way, "why": execution.why, "precision": execution.precision},
        "batches": {},
    }
    with waiting("measuring the network", sum(batch_sizes)) as wait:
        for batch in batch_sizes:
            images = torch.randint(0, 256, (batch, *image_shape), dtype=torch.uint8, device=fast.mean.device)
            with execution.exactly():
                content["batches"][str(batch)] = table = measure(fast, images, repeats)  # type: ignore[arg-type]
            if execution.way == "kernel":
                table["ways"] = _measure_ways(execution, images, repeats)
            wait.advance(batch)
    return content


def device_name(device: torch.device) -> str:
    """Return the model of the processor or GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def side_by_side(calls: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Measure the seconds of each call, ``repeats`` times; the calls take turns, so that a disturbance affects all."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat:  # round 0 warms up
                seconds[name].append(time.perf_counter() - started)
    return seconds


def milliseconds(calls: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Return the median milliseconds of each call, measured :func:`side_by_side`."""
    return {name: 1000 * statistics.median(values) for name, values in side_by_side(calls, repeats, device).items()}


def break_even(whole_ms: float, share_ms: Sequence[tuple[float, float]]) -> float:
    """Return the share of a batch above which a block is faster for all images than for a gathered part of them.

    Args:
        whole_ms: milliseconds of the block for the whole batch.
        share_ms: pairs of a share of the batch that keeps the block, and the milliseconds with these images gathered.

    Returns: the share, in [0, 1], where the least-squares line through the pairs meets ``whole_ms``; 1 where gathering
    is always faster. If the line does not rise with the share: 1 where gathering is as fast as ``whole_ms`` on average,
    otherwise the lowest share of the pairs.
    """
    shares, times = [s for s, _ in share_ms], [ms for _, ms in share_ms]
    slope, level = statistics.linear_regression(shares, times)
    if slope <= 0:
        return 1.0 if statistics.mean(times) <= whole_ms else min(shares)
    return min(1.0, max(0.0, (whole_ms - level) / slope))


def _measure_blocks(network: Backbone, images: Tensor, repeats: int) -> dict[str, Any]:
    """Measure the blocks of a folded backbone on images uint8 (B, 3, H, W); see :func:`profile` for the keys."""
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
    """Return a call for every way to run one block over features x, float (B, …).

    "kept" and "dropped" run it for all images and for none, "most" for all but a tenth, and a number for that many
    images, which are gathered. The calls overwrite a copy of x, which takes as long as overwriting x itself.
    """
    B = len(x)
    gathered_rows = {str(count): torch.randperm(B, device=x.device)[:count].sort().values for count in _counts(B)}
    dropped_rows = torch.arange(B - max(1, B // 10), B, device=x.device)
    copy = x.clone()
    gathering: dict[str, Callable[[], object]] = {
        name: partial(run_block, block, copy, rows) for name, rows in gathered_rows.items()
    }
    return {
        "kept": lambda: block(copy, inplace=True),
        "dropped": lambda: block.shortcut(x),
        "most": lambda: run_most(block, copy, dropped_rows),
        **gathering,
    }


def _counts(B: int) -> list[int]:
    """Return the numbers of images, neither none nor all of B, for which gathering is timed."""
    return sorted({round(share * B) for share in SHARES} - {0, B})


def _measure_exits(network: ExitNetwork, images: Tensor, repeats: int) -> dict[str, Any]:
    """Measure the segments of a folded network with exits, each with its head; see :func:`profile` for the keys."""
    B, device = len(images), network.mean.device
    calls: dict[str, Callable[[], object]] = {"begin": lambda: network.begin(images), "whole": lambda: network(images)}
    state = network.begin(images)
    for n in range(network.num_exits):
        after = network.segment(n, state)
        calls[str(n)] = partial(_segment_and_head, network, n, state, after)
        state = after
    times = milliseconds(calls, repeats, device)
    kept = [times[str(n)] / B for n in range(network.num_exits)]
    always, whole = times["begin"] / B, times["whole"] / B
    return {"whole_ms": whole, "always_ms": always, "kept_ms": kept, "dropped_ms": [0.0] * len(kept)}


def _segment_and_head(network: ExitNetwork, n: int, before: State, after: State) -> None:
    """Compute segment n from the state before it, and the head of exit n from the state after it."""
    network.segment(n, before)
    network.head(n, after)


def _measure_ways(execution: Execution | ExitExecution, images: Tensor, repeats: int) -> dict[str, dict[str, float]]:
    """Measure the whole network, and decisions of half of it, by kernels and by the other ways side by side.

    Returns: for each way ``whole_ms`` and ``half_ms``, in milliseconds an image.
    """
    calls: dict[str, Callable[[], object]] = {}
    for way in ("kernel", "gather", "dense"):
        how = How(way, execution.precision)
        same = execution if way == execution.way else execution_of(execution.network, execution.image_shape, how)
        calls[f"{way} whole"] = partial(_run_whole, same, images)
        calls[f"{way} half"] = _half(same, images)
    for call in [*calls.values()] * 2:  # a CUDA graph is recorded at the second call
        call()
    times = milliseconds(calls, repeats, images.device)
    kinds = ("whole", "half")
    return {
        way: {f"{kind}_ms": times[f"{way} {kind}"] / len(images) for kind in kinds}
        for way in ("kernel", "gather", "dense")
    }


def _half(execution: Execution | ExitExecution, images: Tensor) -> Callable[[], object]:
    """Return what runs images uint8 (B, 3, H, W) through half of the blocks, each through its own, or up to exits drawn
    for each."""
    generator, B = torch.Generator().manual_seed(0), len(images)
    if isinstance(execution, Execution):
        keep_BK = torch.rand(B, execution.network.num_blocks, generator=generator) < 0.5
        return partial(execution.logits, images, keep_BK.to(images.device))
    exit_B = torch.randint(execution.network.num_exits, (B,), generator=generator).to(images.device)
    return partial(execution.run_until, images, lambda n, logits_BC, rows: exit_B[rows] == n, may_record=True)


def _run_whole(execution: Execution | ExitExecution, images: Tensor) -> None:
    """Run images uint8 (B, 3, H, W) through all blocks and exits."""
    if isinstance(execution, Execution):
        execution.whole(images)
    else:
        execution.every_exit(images)


def _macs(network: Backbone | ExitNetwork, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """Count the MACs of each block or segment, and of stem and head."""
    if isinstance(network, Backbone):
        costs = count_costs(network, image_shape)
        return {"always": costs.always, "blocks": costs.block_K.tolist()}
    exits = count_exit_costs(network, image_shape)
    return {"always": 0.0, "blocks": (exits.trunk_N + exits.head_N).tolist()}
