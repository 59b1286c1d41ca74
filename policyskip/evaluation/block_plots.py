"""The pictures of policies that skip blocks. Each function writes one PNG whose caption says what is to be seen.

Shapes: K blocks, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

from policyskip.data import Images
from policyskip.evaluation.decisions import Decisions
from policyskip.evaluation.learning_plots import learning_curves
from policyskip.evaluation.plots import (
    DROPPED,
    FULL,
    KEPT,
    STATIC,
    figure_of,
    finish,
    gallery,
    groups_by_difficulty,
    in_percent,
    order_among_ties,
    save,
    shorten,
    write_pictures,
)


def accuracy_against_macs(decisions: Decisions, path: Path, figures: Mapping[str, Any] | None = None) -> Path:
    """Draw the policy beside the full network, fixed choices, and the rival that the run's table compares it with.

    Args:
        figures: those of the summary.
    """
    figure = figure_of(6, 4.8)
    axes = figure.subplots()
    mixed = sorted((macs / decisions.full_macs, accuracy) for macs, accuracy in decisions.static_F2.tolist())
    if mixed:
        axes.plot(*zip(*mixed, strict=True), "s-", color=STATIC, markersize=4, label="fixed choices, and two mixed")
    rivals = [(decisions.macs_fraction, decisions.accuracy)]
    if figures and "rival" in figures:
        rivals.append((figures["rival_macs"] / decisions.full_macs, figures["rival_accuracy"]))
        label = f"rival: {shorten(figures['rival'], 60)}"
        axes.plot(*rivals[-1], "X", color=STATIC, markeredgecolor="white", markersize=10, label=label)
    if decisions.full_correct_N is not None:
        rivals.append((1.0, decisions.full_correct_N.double().mean().item()))
        axes.plot(*rivals[-1], "D", color=FULL, label="full network")
    label = "oracle, sees the label" if decisions.sees_the_label else "policy, its own cost included"
    axes.plot(*rivals[0], "o", color=KEPT, markersize=9, label=label)
    low, high = min(accuracy for _, accuracy in rivals), max(accuracy for _, accuracy in rivals)
    room = max(0.25 * (high - low), 0.02)
    left, right = max(0.0, min(macs for macs, _ in rivals) - 0.15), 1.04 * max(macs for macs, _ in rivals)
    if mixed and mixed[-1][0] < right:
        label = "the best of these, if more is spent"
        axes.plot([mixed[-1][0], right], [mixed[-1][1]] * 2, ":", color=STATIC, linewidth=1, label=label)
    limits: dict[str, Any] = {"xlim": (left, right), "ylim": (low - room, min(high + room, 1.01))}
    finish(axes, xlabel="MACs, share of the full network's", ylabel="test accuracy", **limits)
    in_percent(axes.yaxis)
    figure.legend(fontsize=8, loc="outside upper left", ncols=2)
    caption = (
        "The squares are fixed sets of blocks that were the best of their cost on validation images, judged here on "
        "test images; two of them can be mixed to cost what the policy costs. The rival is the strongest fixed choice "
        "of the policy's cost, of any kind. What is far below is cut off."
    )
    return save(figure, caption, path)


def block_use(decisions: Decisions, stages: tuple[int, ...], path: Path) -> Path:
    """Draw the share of the images that keep each block."""
    figure = figure_of(8, 3.4)
    axes = figure.subplots()
    use_K = decisions.ran_NK.double().mean(0)
    axes.bar(range(len(use_K)), use_K.tolist(), color=KEPT)
    _mark_stages(axes, stages)
    axes.set(xlabel="block", ylabel="share of images", ylim=(0, 1.09), xlim=(-0.6, len(use_K) - 0.4))
    in_percent(axes.yaxis, 0)
    return save(figure, "How often each block runs on test images; dotted lines part the network's stages.", path)


def block_use_by_class(decisions: Decisions, stages: tuple[int, ...], path: Path) -> Path:
    """Draw the share of each class's images that keep each block, as a heat map of at most 40 classes."""
    classes = decisions.classes
    shown = classes[:40]
    figure = figure_of(8, 1.8 + 0.26 * len(shown))
    axes = figure.subplots()
    use_CK = decisions.block_use_CK(len(classes))[: len(shown)]
    picture = axes.imshow(use_CK.numpy(), aspect="auto", cmap="Blues", vmin=0, vmax=1)
    in_percent(figure.colorbar(picture, ax=axes, label="share of images").ax.yaxis, 0)
    _mark_stages(axes, stages)
    axes.set(xlabel="block", ylabel="class of the image", yticks=range(len(shown)))
    axes.set_yticklabels([shorten(name, 18) for name in shown])
    more = f" The first {len(shown)} of {len(classes)} classes." if len(classes) > len(shown) else ""
    return save(figure, f"How often each block runs for the test images of each class.{more}", path)


def _mark_stages(axes: Axes, stages: tuple[int, ...]) -> None:
    for edge in np.cumsum(stages)[:-1]:
        axes.axvline(edge - 0.5, color="#555555", linestyle=":", linewidth=1)
    K = sum(stages)
    axes.set_xticks(range(0, K, 1 if K <= 20 else 5))


def kept_by_difficulty(decisions: Decisions, path: Path) -> Path | None:
    """Draw kept blocks and accuracy against the data set's measure of difficulty; None if there is no measure."""
    if decisions.difficulty_N is None:
        return None
    figure = figure_of(7, 4)
    axes = figure.subplots()
    groups = groups_by_difficulty(decisions.difficulty_N)

    def means(value_N: Tensor) -> list[float]:
        return [value_N[group].mean().item() for group in groups]

    x, kept_N = means(decisions.difficulty_N), decisions.ran_NK.sum(1).double()
    low, high = ([kept_N[group].quantile(q).item() for group in groups] for q in (0.1, 0.9))
    axes.fill_between(x, low, high, color=KEPT, alpha=0.2, label="kept blocks, 10th to 90th percentile")
    axes.plot(x, means(kept_N), "o-", color=KEPT, markersize=4, label="kept blocks, mean")
    axes.set(xlabel="difficulty of the image", ylabel="kept blocks", ylim=(0, decisions.ran_NK.shape[1] * 1.04))
    accuracy = axes.twinx()
    accuracy.plot(x, means(decisions.correct_N.double()), color=STATIC, label="accuracy of the policy")
    if decisions.full_correct_N is not None:
        full = means(decisions.full_correct_N.double())
        accuracy.plot(x, full, "--", color=FULL, label="accuracy of the full network")
    accuracy.set(ylabel="test accuracy", ylim=(0, 1.04))
    in_percent(accuracy.yaxis, 0)
    figure.legend(fontsize=8, loc="outside upper left", ncols=2)
    caption = (
        "Test images in 20 groups from easy to hard. A policy that decides per image spends more where it is hard."
    )
    return save(figure, caption, path)


def block_gallery(decisions: Decisions, images: Images, path: Path) -> Path:
    """Draw the test images that got the fewest and the most blocks, each over the strip of blocks that ran."""
    kept_N = decisions.ran_NK.sum(1)
    K = decisions.ran_NK.shape[1]

    def strip(axes: Axes, index: int) -> None:
        colours = [KEPT if kept else DROPPED for kept in decisions.ran_NK[index].tolist()]
        axes.broken_barh([(k - 0.41, 0.82) for k in range(K)], (0, 1), facecolors=colours)

    shown = "Test images that got the fewest blocks (above) and the most (below), drawn at random among equals."
    if kept_N.min() == kept_N.max():
        shown = f"All test images got {int(kept_N[0])} of {K} blocks, none fewer or more: these are drawn at random."
    caption = (
        f"{shown} Under each, its blocks from first to "
        "last: blue ran, grey was skipped. The title is the label; red where the prediction differs."
    )
    return gallery(
        decisions,
        images,
        order_among_ties(kept_N),
        path,
        caption=caption,
        height=5.2,
        before_prediction="not",
        text_below=lambda index: f"{int(kept_N[index])} of {K}",
        strip=strip,
    )


def block_pictures(
    folder: Path,
    metrics: list[dict[str, Any]],
    decisions: Decisions,
    images: Images,
    stages: tuple[int, ...],
    figures: Mapping[str, Any] | None = None,
    choose_after: float = 0.0,
) -> list[Path]:
    """Write every picture of a run that skips blocks.

    Args:
        metrics: the records of ``metrics.jsonl``.
        decisions: the record of the test images, with static front and classes.
        images: the test images.
        stages: number of blocks in each stage of the network.
        figures: see :func:`accuracy_against_macs`.
        choose_after: the first update whose weights may have been kept.

    Returns: the paths.
    """
    return write_pictures(
        folder,
        {
            "learning_curves": lambda path: learning_curves(metrics, decisions.ran_NK.shape[1], path, choose_after),
            "accuracy_against_macs": lambda path: accuracy_against_macs(decisions, path, figures),
            "block_use": lambda path: block_use(decisions, stages, path),
            "block_use_by_class": lambda path: block_use_by_class(decisions, stages, path),
            "gallery": lambda path: block_gallery(decisions, images, path),
            "kept_by_difficulty": lambda path: kept_by_difficulty(decisions, path),
        },
    )
