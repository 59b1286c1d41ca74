"""``policyskip calibrate`` chooses other thresholds for a finished run, or shows the curve to choose them from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table

from policyskip.build import Setup
from policyskip.config import TargetSection
from policyskip.deployment.loading import load_thresholds
from policyskip.deployment.predictors import ThresholdPredictor
from policyskip.errors import UserError
from policyskip.evaluation.tables import console
from policyskip.exits.cache import CachedExits, cache_exits
from policyskip.exits.calibration import Curve, curve_of
from policyskip.exits.targets import check_target, choose
from policyskip.files import damaged
from policyskip.runs import lifecycle
from policyskip.runs.folder import Run
from policyskip.runs.tracking import Tracker
from policyskip.tasks.run_rivals import References
from policyskip.tasks.thresholds import deploy_point


def recalibrate(setup: Setup, run: Run, target: TargetSection) -> dict[str, Any]:
    """Choose other thresholds for a finished run on validation, report them once on test, and deploy them.

    Returns: the run's new summary.

    Raises:
        UserError: the target makes no sense or cannot be met, or the run has no early exits.
    """
    predictor, validation, curve = finished(setup, run)
    check_target(**target.model_dump())
    point = choose(curve, **target.chosen)
    before = run.load_json("summary.json")
    names = ("agent", "env", "backbone", "data", "seed", "steps", "seconds")
    with damaged(run.folder / "summary.json"):
        head: dict[str, Any] = {name: before[name] for name in names}
    head |= {"execution": predictor.execution.way, "precision": setup.how.precision}
    kept = {"target": target.model_dump(), "precision": setup.how.precision}  # what a resumed run keeps to
    changed = {**lifecycle.saved_config(run), **kept}

    def write_more(new: Run) -> None:
        lifecycle.save_changed_config(new, run.command, changed)

    references = References.load(run, predictor, setup.data.test)
    chain = (setup, predictor, validation, curve, point, target.chosen, references)
    return deploy_point(*chain, run, Tracker(run, "none", {}), head, write_more)


def finished(setup: Setup, run: Run) -> tuple[ThresholdPredictor, CachedExits, Curve]:
    """Return what a run deploys (a predictor), its network's cached outputs for validation images, and their curve.

    Raises:
        UserError: it has no early exits.
    """
    predictor = load_thresholds(run, setup.device, setup.trusted, setup.how)
    if predictor.network.num_exits == 1:
        raise UserError(f"the run {run.folder} has no early exits, so there are no thresholds to choose")
    validation = cache_exits(predictor.network, setup.data.validation.plain(), setup.how)
    return predictor, validation, curve_of(validation, predictor.policy.rule.name, predictor.search)


def show_curve(setup: Setup, run: Run, rows: int = 16) -> None:
    """Print what thresholds can reach: points of the front on validation images, evenly spaced in cost.

    Test is not read, as a target is chosen from this table. What the run deploys stays as it is.
    """
    predictor, _, curve = finished(setup, run)
    front, knee = curve.front(), curve.knee()
    wanted_R = torch.linspace(float(front.macs_P[0]), float(front.macs_P[-1]), rows, dtype=torch.float64)
    table = Table(title=f"{run.folder}: thresholds chosen on validation images ({predictor.policy.rule.name})")
    columns = ("MACs, of full", "accuracy", "meets accuracy_drop", "a threshold for each exit but the last")
    for column in columns:
        table.add_column(column, justify="left" if column == columns[-1] else "right")
    places = (front.macs_P - wanted_R.unsqueeze(1)).abs().argmin(1).unique().tolist()
    deployed = tuple(predictor.policy.threshold_E.tolist())
    *threshold_texts, deployed_text = distinct_texts([*(front[place].thresholds for place in places), deployed])
    for place, thresholds in zip(places, threshold_texts, strict=True):
        point = front[place]
        table.add_row(
            f"{point.macs_fraction:.3f}",
            f"{100 * point.accuracy:.2f} %",
            f"{math.ceil(1e4 * float(front.drop_P[place])) / 1e4:.4f}",
            thresholds,
        )
    console().print(table)
    last = f"The last exit: {100 * curve.last_accuracy:.2f} % on validation."
    print(f"{last} Knee at {knee.macs_fraction:.3f} of the MACs.")
    print(f"Deployed: {deployed_text}")


def distinct_texts(points: Sequence[Sequence[float]], fewest: int = 3) -> list[str]:
    """Write thresholds with as few digits, ``fewest`` at least, as tell different points apart.

    Args:
        points: the thresholds of each point.
    """
    texts: list[str] = []
    for digits in range(fewest, 18):  # 17 digits tell any two numbers apart
        texts = [" ".join(f"{threshold:.{digits}g}" for threshold in thresholds) for thresholds in points]
        if len(set(texts)) == len(set(map(tuple, points))):
            break
    return texts
