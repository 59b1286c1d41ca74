"""``policyskip profile`` shows the table of a network's times, its picture, and how much time a run really saves.

Shapes: B images, K blocks (segments, of a network with exits).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from policyskip.backbones import Backbone, ExitNetwork, Network
from policyskip.build import Setup
from policyskip.data import batch_at, spread_indices
from policyskip.deployment import profiling
from policyskip.deployment.loading import load, own_precision
from policyskip.deployment.policy_files import read_policy
from policyskip.deployment.predictors import ExitPredictor, GatedPredictor, Predictor
from policyskip.errors import UserError
from policyskip.evaluation import plots
from policyskip.evaluation.tables import console
from policyskip.execution.ways import DEFAULT, How
from policyskip.files import reporting_write_errors, write
from policyskip.runs.folder import Run
from policyskip.runs.progress import waiting
from policyskip.texts import one_line

MEASURED = 1000
"""The number of batches that are measured one by one, about, for the percentiles of their times."""


def of_network(
    network: Network,
    image_shape: tuple[int, int, int],
    batch_sizes: Sequence[int],
    repeats: int,
    path: Path,
    how: How = DEFAULT,
) -> int:
    """Measure a network, write the table and its picture, and print the table.

    Args:
        network, image_shape, batch_sizes, repeats, how: as for :func:`policyskip.deployment.profiling.profile`.
        path: of the table; the picture goes beside it.

    Returns: 0, the exit code.

    Raises:
        UserError: the network has neither blocks nor exits, or ``path`` cannot be written.
    """
    if not isinstance(network, Backbone | ExitNetwork):
        raise UserError(f"{network.name} has neither blocks nor exits to measure")
    _check_output(path)
    content = profiling.profile(network, image_shape, batch_sizes, repeats, how)
    _write(content, path)
    return _say(content, path)


def of_run(setup: Setup, run: Run, batch_sizes: Sequence[int], repeats: int, count: int, path: Path | None) -> int:
    """Measure the network of a run, and how much time the run's predictions save; otherwise as :func:`of_network`.

    The latency also goes into the run's summary, where ``policyskip compare`` finds it; but not that of a trial, in
    which another way or precision was typed than the run is deployed in: its table stays out of the run's folder.

    Args:
        setup: what the run's configuration names, with what was typed.
        run: its folder, which is locked from then on.
        count: how many validation images to predict; no more than there are.
        path: of the table; None: the run's ``profile.json``, or of a trial, a file in the current folder.

    Raises:
        UserError: there are fewer images than the largest batch, the run cannot be loaded, or ``path`` not written.
    """
    way, precision = setup.how
    is_trial = (way, precision) != ("auto", own_precision(run))
    if path is None:
        trial = Path(f"profile-{run.folder.resolve().name}-{way}-{precision}.json")
        path = trial if is_trial else run.folder / "profile.json"
    _check_output(path)
    run.lock()
    validation = setup.data.validation.plain()
    index_N = spread_indices(count, len(validation))
    if len(index_N) < (largest := max(batch_sizes)):
        hint = f"say batch_sizes= with {len(index_N)} at most"
        if len(validation) >= largest:
            hint = f"say images={largest} or more, or batch_sizes= with less"
        raise UserError(f"batches of {largest} cannot be measured on {len(index_N)} images; {hint}")
    described = read_policy(run).network
    checkpoint = setup.config["backbone"].get("checkpoint") if "config" in described else None
    given = (run.folder, checkpoint, str(setup.device), precision)
    predictor = load(*given, planned=False, trust=setup.trusted, execution=way)
    content = profiling.profile(predictor.network_to_measure, setup.data.image_shape, batch_sizes, repeats, setup.how)
    content["hash"] = described["hash"]
    images = batch_at(validation, index_N).images
    with waiting("measuring predictions"):
        _measure_predictions(predictor, images, content["batches"], repeats)
    if is_trial:
        _write(content, path)
        return _say(content, path)
    latency = {
        "latency_ms": content["batches"][str(largest)]["run"]["predict_ms"],
        "latency_batch": largest,
        "latency_device": content["device"],
        "latency_threads": content["threads"],
    }
    with run.generation() as new:
        new.save_json("summary.json", run.load_json("summary.json") | latency)
        _write(content, new.folder / path.name if path.parent.resolve() == run.folder.resolve() else path)
    return _say(content, path)


@torch.no_grad()
def _measure_predictions(
    predictor: Predictor | GatedPredictor | ExitPredictor, images: Tensor, tables: dict[str, Any], repeats: int
) -> None:
    """Measure predictions beside the whole network, and add the figures, ``run``, to the table of each batch size.

    Args:
        images: uint8 (N, 3, H, W), which are predicted.
        tables: those of a profile, by batch size.
    """
    if isinstance(predictor, Predictor):  # measured with the plan that the new profile gives it
        predictor.plan = {int(batch): table["break_even"] for batch, table in tables.items()}
    network = predictor.network_to_measure
    prediction = predictor.predict(images)
    for batch, table in tables.items():
        calls: dict[str, Callable[[], object]] = {
            "predict": partial(predictor.predict, images, int(batch)),
            "whole": partial(_run_whole, predictor, images.split(int(batch))),
        }
        times = profiling.milliseconds(calls, repeats, network.mean.device)
        table["run"] = {
            "macs_ratio": float(prediction.macs_B.mean()) / predictor.costs.full,
            "expected_ratio": _expected_ratio(table, predictor.ran(prediction)),
            "time_ratio": times["predict"] / times["whole"],
            "predict_ms": times["predict"] / len(images),
            "batch_ms": _batch_times(predictor, images, int(batch), repeats),
        }


def _batch_times(
    predictor: Predictor | GatedPredictor | ExitPredictor, images: Tensor, batch: int, repeats: int
) -> dict[str, float]:
    """Measure how long single batches of ``batch`` images take: median and 99th percentile, in milliseconds a batch.

    Batches of different images take differently long. Of many batches, some hundreds are measured.
    """
    chunks = [chunk for chunk in images.split(batch) if len(chunk) == batch][: max(1, MEASURED // repeats)]
    calls: dict[str, Callable[[], object]] = {
        str(number): partial(predictor.predict, chunk, batch) for number, chunk in enumerate(chunks)
    }
    seconds = profiling.side_by_side(calls, repeats, predictor.network_to_measure.mean.device)
    values = 1000 * np.concatenate([np.array(numbers) for numbers in seconds.values()])
    median, percentile_99 = np.quantile(values, [0.5, 0.99])
    return {"median": float(median), "percentile_99": float(percentile_99), "count": len(values)}


def _run_whole(predictor: Predictor | GatedPredictor | ExitPredictor, batches: Sequence[Tensor]) -> None:
    """Run all blocks of a predictor's network for batches of images, uint8 (B, 3, H, W), in its way of execution."""
    execution = predictor.execution
    for images in batches:
        execution.every_exit(images) if isinstance(predictor, ExitPredictor) else execution.whole(images)


def _expected_ratio(table: dict[str, Any], ran_BK: Tensor) -> float:
    """Return the time that the blocks which ran should take, as a share of the whole network's time.

    The times of the policy and of gathering images are not counted.

    Args:
        table: of one batch size.
        ran_BK: bool (B, K), the blocks that ran for each image.
    """
    kept_K = torch.tensor(table["kept_ms"], dtype=torch.float64)
    dropped_K = torch.tensor(table["dropped_ms"], dtype=torch.float64)
    ran_BK = ran_BK.double().cpu()
    spent_B = table["always_ms"] + ran_BK @ kept_K + (1 - ran_BK) @ dropped_K
    return float(spent_B.mean() / (table["always_ms"] + kept_K.sum()))


def _check_output(path: Path) -> None:
    """Refuse a path that cannot be written, before minutes are spent on measurements.

    Raises:
        UserError: the path is refused.
    """
    if path.suffix == ".png":
        raise UserError(f"output={path} is where the table goes, as JSON; its picture goes beside it")
    with reporting_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        with tempfile.TemporaryFile(dir=path.parent):
            pass


def _write(content: dict[str, Any], path: Path) -> None:
    """Write a table and, beside it, its picture."""
    write(path, (json.dumps(content, indent=1) + "\n").encode())
    plots.profile(content, path.with_suffix(".png"))


def _say(content: dict[str, Any], path: Path) -> int:
    """Print a table that has been written, and return 0, the exit code."""
    show(content)
    file, picture = one_line(path), one_line(path.with_suffix(".png"))
    print(f"Written to {file} (reward=latency reward.table={file}); picture: {picture}")
    return 0


def show(content: dict[str, Any]) -> None:
    """Print the sums of a profile for each batch size, and how much time a run saves: one table for each unit."""
    batches: dict[str, Any] = content["batches"]
    exits = all("break_even" not in times for times in batches.values())
    title = f"{content['network']} on {content['device']}, {content['threads']} threads"
    milliseconds: Columns = {
        "whole network": lambda times: f"{times['whole_ms']:.3f}",
        "stem and head": lambda times: f"{times['always_ms']:.3f}",
        "exits" if exits else "blocks": lambda times: f"{sum(times['kept_ms']):.3f}",
    }
    executed = content.get("execution")  # in tables of older versions there is none
    if executed:
        print(f"Executed by {executed['way']} in {executed['precision']}: {executed['why']}.")
    console().print(_table(f"{title}: milliseconds an image", batches, milliseconds))
    if all("ways" in times for times in batches.values()):
        ways: Columns = {
            f"{way}, {kind}": lambda times, way=way, kind=kind: f"{times['ways'][way][f'{kind}_ms']:.4f}"  # type: ignore[misc]
            for kind in ("whole", "half")
            for way in ("kernel", "gather", "dense")
        }
        console().print(_table("ways of execution, all blocks and half of them: milliseconds an image", batches, ways))
    if not exits:
        shares: Columns = {
            "gather if fewer keep a block than": lambda times: (
                f"{min(times['break_even']):.2f} to {max(times['break_even']):.2f}"
            )
        }
        console().print(_table("shares of a batch", batches, shares))
    if not all("run" in times for times in batches.values()):
        return
    latencies: Columns = {
        "median": lambda times: f"{times['run']['batch_ms']['median']:.3f}",
        "99th percentile": lambda times: f"{times['run']['batch_ms']['percentile_99']:.3f}",
        "of batches": lambda times: str(times["run"]["batch_ms"]["count"]),
    }
    console().print(_table("the run's predictions: milliseconds a batch", batches, latencies))
    saved: Columns = {
        "MACs": lambda times: f"{times['run']['macs_ratio']:.3f}",
        "time that its blocks take": lambda times: f"{times['run']['expected_ratio']:.3f}",
        "time measured": lambda times: f"{times['run']['time_ratio']:.3f}",
    }
    console().print(_table("the run's predictions: shares of the whole network", batches, saved))
    for batch, times in batches.items():
        share, macs = times["run"]["time_ratio"], times["run"]["macs_ratio"]
        said = f"At batch {batch}, predictions take {share:.2f} of the whole network's time (× {1 / share:.2f}),"
        console().print(f"{said} all that decides included, for {macs:.2f} of its MACs.", highlight=False)


Columns = dict[str, Callable[[dict[str, Any]], str]]
"""A table's columns by their titles: what a cell says of the times of one batch size."""


def _table(title: str, batches: dict[str, Any], columns: Columns) -> Table:
    """Make a table with a line for each batch size."""
    table = Table(title=title)
    for column in ("batch", *columns):
        table.add_column(column, justify="right")
    for batch, times in batches.items():
        table.add_row(batch, *(cell(times) for cell in columns.values()))
    return table
