"""``policyskip profile``: the table of a network's times, its picture, and what a run really saves.

Shapes: B images, K blocks (segments, of a network with exits).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from policyskip.backbones import Backbone, ExitNetwork
from policyskip.build import Setup
from policyskip.deployment import profiling
from policyskip.deployment.loading import load
from policyskip.deployment.policy_files import read_policy
from policyskip.deployment.predictors import Predictor
from policyskip.errors import UserError
from policyskip.evaluation import plots
from policyskip.evaluation.tables import console
from policyskip.files import reporting_write_errors, write
from policyskip.runs.folder import Run


def of_network(
    network: Any, image_shape: tuple[int, int, int], batch_sizes: Sequence[int], repeats: int, path: Path
) -> int:
    """Measure a network, write the table to ``path`` and its picture beside it, and show it."""
    if not isinstance(network, Backbone | ExitNetwork):
        raise UserError(f"{network.name} has neither blocks nor exits to measure")
    _check(path)
    content = profiling.profile(network, image_shape, batch_sizes, repeats)
    return _finish(content, path)


@torch.no_grad()
def of_run(setup: Setup, run: Run, batch_sizes: Sequence[int], repeats: int, count: int, path: Path) -> int:
    """The same for the network of a run, and what its predictions save: expected from the table, and measured."""
    _check(path)
    run.lock()
    validation = setup.data.validation.plain()
    count = min(count, len(validation))
    if count < max(batch_sizes):
        hint = "say images= with more, or batch_sizes= with less"
        raise UserError(f"batches of {max(batch_sizes)} cannot be measured on {count} images; {hint}")
    described = read_policy(run).network
    moved = setup.config["backbone"].get("checkpoint") if "config" in described else None
    predictor = load(run.folder, moved, str(setup.device), planned=False, trust=setup.trusted)
    network = predictor.network_to_measure
    content = profiling.profile(network, setup.data.image_shape, batch_sizes, repeats)
    content["hash"] = described["hash"]
    if isinstance(predictor, Predictor):  # what it will go by from now on
        predictor.plan = {int(batch): times["break_even"] for batch, times in content["batches"].items()}
    index_N = torch.linspace(0, len(validation) - 1, count).round().long()
    images = next(iter(validation.stream([(index_N, 0)]))).images
    prediction = predictor.predict(images)
    for batch, table in content["batches"].items():
        size = int(batch)
        calls: dict[str, Callable[[], object]] = {
            "predict": partial(predictor.predict, images, size),
            "whole": partial(_whole, network, images.split(size)),
        }
        times = profiling.milliseconds(calls, repeats, setup.device)
        table["run"] = {
            "macs_ratio": float(prediction.macs_B.mean()) / predictor.costs.full,
            "expected_ratio": _expected(table, predictor.ran(prediction)),
            "time_ratio": times["predict"] / times["whole"],
            "predict_ms": times["predict"] / len(images),
        }
    largest = max(content["batches"], key=int)
    latency = {"latency_ms": content["batches"][largest]["run"]["predict_ms"], "latency_batch": int(largest)}
    latency |= {"latency_device": content["device"], "latency_threads": content["threads"]}
    run.save_json("summary.json", run.load_json("summary.json") | latency)  # which `policyskip compare` shows
    return _finish(content, path)


def _whole(network: Backbone | ExitNetwork, parts: Sequence[Tensor]) -> None:
    for part in parts:
        network(part)


def _expected(table: dict[str, Any], ran_BK: Tensor) -> float:
    """The share of the whole network's time that the blocks which ran should take; policy and gathering not counted."""
    kept_K = torch.tensor(table["kept_ms"], dtype=torch.float64)
    dropped_K = torch.tensor(table["dropped_ms"], dtype=torch.float64)
    ran_BK = ran_BK.double().cpu()
    spent_B = table["always_ms"] + ran_BK @ kept_K + (1 - ran_BK) @ dropped_K
    return float(spent_B.mean() / (table["always_ms"] + kept_K.sum()))


def _check(path: Path) -> None:
    """Refuse a place that cannot be written before minutes are spent."""
    if path.suffix == ".png":
        raise UserError(f"output={path} is where the table goes, as JSON; its picture goes beside it")
    with reporting_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        with tempfile.TemporaryFile(dir=path.parent):
            pass


def _finish(content: dict[str, Any], path: Path) -> int:
    write(path, (json.dumps(content, indent=1) + "\n").encode())
    picture = plots.profile(content, path.with_suffix(".png"))
    show(content)
    print(f"Written to {path} (reward=latency reward.table={path}); picture: {picture}")
    return 0


def show(content: dict[str, Any]) -> None:
    """Print a table's sums, and what a run saves."""
    table = Table(title=f"{content['network']} on {content['device']}, {content['threads']} threads")
    runs = any("run" in times for times in content["batches"].values())
    exits = all("break_even" not in times for times in content["batches"].values())
    columns = ["batch", "whole network, ms an image", "stem and head", "exits" if exits else "blocks"]
    columns += [] if exits else ["gather if fewer keep a block than"]
    columns += ["run: of the MACs", "time that its blocks take", "measured"] if runs else []
    for column in columns:
        table.add_column(column, justify="right")
    for batch, times in content["batches"].items():
        cells = [batch, f"{times['whole_ms']:.3f}", f"{times['always_ms']:.3f}", f"{sum(times['kept_ms']):.3f}"]
        if not exits:
            low, high = min(times["break_even"]), max(times["break_even"])
            cells.append(f"{low:.2f} to {high:.2f}")
        if runs:
            cells += [f"{times['run'][key]:.3f}" for key in ("macs_ratio", "expected_ratio", "time_ratio")]
        table.add_row(*cells)
    console().print(table)
