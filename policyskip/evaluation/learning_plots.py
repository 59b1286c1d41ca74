"""The learning curves of policies, with the update whose weights were kept, and why validation reward falls."""

from __future__ import annotations

from math import hypot, sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.axes import Axes

from policyskip.evaluation.plots import (
    FEW_POINTS,
    FULL,
    KEPT,
    STATIC,
    figure_of,
    finish,
    in_percent,
    panel_of_curves,
    points_of,
    save,
)

FEWEST_RECORDS = 4
"""Records of training, before and after the highest validation reward, from which a change of reward is judged."""


def kept_step(metrics: list[dict[str, Any]], choose_by: str, choose_after: float) -> float | None:
    """Return the update whose weights were kept: the first of those with the highest figure on validation images.

    Args:
        metrics: the records of ``metrics.jsonl``.
        choose_by: the figure.
        choose_after: the first update that counts.

    Returns: None if there is no such record.
    """
    points = [(step, value) for step, value in points_of(metrics, f"val/{choose_by}") if step >= choose_after]
    return max(points, key=lambda point: point[1])[0] if points else None


def mark_kept(axes: Axes, step: float | None) -> None:
    """Let the axis of updates begin at 0, before the first one, and mark the update whose weights were kept."""
    axes.set_xlim(left=0)
    if step is not None:
        axes.axvline(step, color=STATIC, linestyle=":", linewidth=1.5, label="weights that were kept")


def why_it_falls(metrics: list[dict[str, Any]]) -> str:
    """Say why the reward on validation images ends below its highest, as far as the records tell; "" if it does not.

    What training images say after the highest reward is compared with what they said up to it. Their rewards are noisy,
    so a change counts only if it is twice its standard error.
    """
    reward = points_of(metrics, "val/reward")
    if not reward:
        return ""
    best_step, best = max(reward, key=lambda point: point[1])
    last = reward[-1][1]
    if best - last <= 0.02 * max(1.0, abs(best)):
        return ""

    def around_best(key: str) -> tuple[list[float], list[float]]:
        """Return a training figure's values after the best step, and at most as many up to it."""
        points = points_of(metrics, f"train/{key}")
        after = [value for step, value in points if step > best_step]
        before = [value for step, value in points if step <= best_step]
        return after, before[-max(1, len(after)) :]

    reasons = {
        "price": "the price of computing rose, so the same decisions earn less",
        "free_blocks": "the curriculum let the policy decide about more blocks",
    }
    sides = {key: around_best(key) for key in ("reward", *reasons)}
    found = [reason for key, reason in reasons.items() if all(sides[key]) and sides[key][0][-1] > sides[key][1][-1]]
    after, before = sides["reward"]
    if min(len(after), len(before)) >= FEWEST_RECORDS:
        rise, clear = mean(after) - mean(before), 2 * hypot(_standard_error(after), _standard_error(before))
        if rise > clear:
            found.append("on training images it rose since, so the policy fits those better than others")
        elif rise < -clear and not found:
            found.append("on training images it fell too; a smaller learning rate may help")
    why = "; ".join(found) or "the records do not show why"
    return f" Validation reward ends below its highest ({last:.3f} after {best:.3f}): {why}."


def _standard_error(values: list[float]) -> float:
    return stdev(values) / sqrt(len(values))


def learning_curves(
    metrics: list[dict[str, Any]], blocks: int | None, path: Path, choose_after: float = 0.0
) -> Path | None:
    """Draw reward, accuracy and kept blocks (``blocks`` None: MACs) against updates, in training and on validation.

    Returns: the path; None if nothing was recorded.
    """
    cost_key, cost_title, cost = (
        ("macs_fraction", "MACs, share of all", "MACs")
        if blocks is None
        else ("kept", "kept blocks", "number of kept blocks")
    )
    training = dict(color=KEPT, alpha=0.45, linewidth=1, label="training images")
    validation = dict(color=FULL, marker="o", markersize=3, linewidth=1.5, label="validation images")
    panels = []
    for key, title in (("reward", "reward"), ("accuracy", "accuracy"), (cost_key, cost_title)):
        val_key = "val/kept_mean" if key == "kept" else f"val/{key}"
        train_points = points_of(metrics, f"train/{key}")
        marked = training | ({"marker": ".", "markersize": 4} if len(train_points) < FEW_POINTS else {})
        panels.append((title, [(train_points, marked), (points_of(metrics, val_key), validation)]))
    if not any(points for _, curves in panels for points, _ in curves):
        return None
    figure = figure_of(10, 3.6)
    kept = kept_step(metrics, "reward", choose_after)
    for axes, (title, curves) in zip(figure.subplots(1, 3), panels, strict=True):
        panel_of_curves(axes, title, curves)
        if title == "accuracy":
            in_percent(axes.yaxis)
        mark_kept(axes, kept)
    finish(axes, legend="best", ylim=(0, 1.04 * (blocks or 1)))
    caption = f"Reward, accuracy and {cost} while the policy learned; on validation images, when it is greedy."
    if kept:
        caption += f" Kept are the weights of update {kept}, which have the highest reward on validation images"
        after = f" from update {choose_after:.0f} on: before it, weights can look good by luck"
        caption += f"{after}." if choose_after > 0 else "."
    return save(figure, caption + why_it_falls(metrics), path)
