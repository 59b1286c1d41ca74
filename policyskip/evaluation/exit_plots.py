"""The pictures of networks with exits. Each function writes one PNG whose caption says what is to be seen.

Shapes: M images of a set, N exits.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from policyskip.data import Images
from policyskip.evaluation import learning_plots, plots
from policyskip.evaluation.decisions import Decisions
from policyskip.evaluation.learning_plots import kept_step, mark_kept
from policyskip.evaluation.plots import (
    DROPPED,
    FULL,
    KEPT,
    STATIC,
    figure_of,
    finish,
    groups_by_difficulty,
    in_percent,
    logarithmic_if_wide,
    order_among_ties,
    panel_of_curves,
    points_of,
    save,
    shorten,
    write_pictures,
)
from policyskip.exits.cache import CachedExits
from policyskip.exits.references import accuracy_by_exit, exit_histogram, oracle_curve

Pairs = list[list[float]]
"""Points of a curve: MACs and accuracy."""


def learning_curves(
    metrics: list[dict[str, Any]], num_exits: int, path: Path, choose_after: float = 0.0
) -> Path | None:
    """Draw the loss, and every exit's accuracy on validation images, against updates; None if nothing was recorded."""
    loss = points_of(metrics, "train/loss")
    loss_style = dict(color=KEPT, marker=".", linewidth=1, markersize=2)
    curves = []
    for n in range(num_exits):
        shade = 0.25 + 0.75 * n / max(1, num_exits - 1)
        style = dict(color=KEPT, alpha=shade, marker="o", markersize=3, label=f"exit {n}")
        curves.append((points_of(metrics, f"val/accuracy_exit{n}"), style))
    if not loss and not any(points for points, _ in curves):
        return None
    figure = figure_of(9, 3.6)
    left, right = figure.subplots(1, 2)
    panel_of_curves(left, "training loss", [(loss, loss_style)])
    logarithmic_if_wide(left, [value for _, value in loss])
    panel_of_curves(right, "validation accuracy", curves)
    in_percent(right.yaxis)
    for axes in (left, right):
        mark_kept(axes, kept_step(metrics, "mean_accuracy", choose_after))
    finish(right, legend="best")
    caption = (
        "The joint loss, and how well each exit alone answers, while the network learned. The weights that were kept "
        "have the highest mean accuracy of all exits on validation images."
    )
    return save(figure, caption, path)


def accuracy_against_macs(
    decisions: Decisions,
    cache: CachedExits,
    budgeted: Pairs,
    path: Path,
    figures: Mapping[str, Any] | None = None,
) -> Path:
    """Draw anytime decisions (each exit for all images) and budgeted ones, the chosen point, its rival, and the oracle.

    Without ``budgeted`` a learned policy decided. The rival is the fixed choice of the run's table, in ``figures``.
    """
    figure = figure_of(6.4, 4.8)
    axes = figure.subplots()
    full, anytime = decisions.full_macs, decisions.static_F2.tolist()
    oracle_P, oracle_macs_P = oracle_curve(cache)
    oracle = ((oracle_macs_P / full).tolist(), oracle_P.tolist())
    axes.plot(*oracle, "--", color="#888888", label="oracle (sees the label)")
    if budgeted:
        axes.plot(*_fractions(budgeted, full), "-", color=KEPT, label="budgeted: each image its own exit")
    axes.plot(*_fractions(anytime, full), "s-", color=STATIC, markersize=4, label="anytime: one exit for all images")
    lowest = min(decisions.accuracy, *(accuracy for _, accuracy in anytime))
    if figures and "rival" in figures:
        rival = (figures["rival_macs"] / full, figures["rival_accuracy"])
        label = f"rival: {shorten(figures['rival'], 60)}"
        axes.plot(*rival, "X", color=STATIC, markeredgecolor="white", markersize=10, label=label)
        lowest = min(lowest, rival[1])
    label = "the chosen thresholds" if budgeted else "the policy"
    axes.plot(decisions.macs_fraction, decisions.accuracy, "o", color=KEPT, markersize=9, label=label)
    limits = (max(-0.02, lowest - 0.03), 1.01)
    finish(axes, xlabel="MACs, share of going to the last exit", ylabel="test accuracy", ylim=limits)
    in_percent(axes.yaxis)
    figure.legend(fontsize=8, loc="outside upper left", ncols=2)
    caption = (
        "Everything was chosen on validation images. The rival is the strongest fixed choice of the policy's cost, of "
        "any kind: exits, blocks, or two of them mixed. The oracle leaves at the first exit that is right and shows "
        "the room that is left."
    )
    return save(figure, caption, path)


def _fractions(pairs: Pairs, full: float) -> tuple[list[float], list[float]]:
    """Return the MACs of pairs as fractions of the whole network's, and the accuracies."""
    return [macs / full for macs, _ in pairs], [accuracy for _, accuracy in pairs]


def exit_use(decisions: Decisions, cache: CachedExits, path: Path) -> Path:
    """Draw the share of the images that leave at each exit, and how many of those are right."""
    N = cache.num_exits
    figure = figure_of(7, 3.8)
    axes = figure.subplots()
    share_N = exit_histogram(decisions.exit_N, N).tolist()
    right_N = accuracy_by_exit(decisions.exit_N, decisions.correct_N, N).tolist()
    axes.bar(range(N), share_N, color=DROPPED, label="share of images that leave here")
    used = [n for n in range(N) if share_N[n]]
    axes.plot(used, [right_N[n] for n in used], "o", color=KEPT, label="accuracy of those that leave here")
    alone_N = cache.correct_MN.double().mean(0).tolist()
    axes.plot(range(N), alone_N, "_", color=FULL, markersize=18, label="accuracy here if all left here")
    labels = [f"exit {n}\n{macs / 1e6:.2f} M" for n, macs in enumerate(cache.macs_N.tolist())]
    axes.set(xticks=range(N), xticklabels=labels, ylim=(0, 1.06), ylabel="share of test images; accuracy")
    in_percent(axes.yaxis, 0)
    figure.legend(fontsize=8, loc="outside upper left", ncols=3)
    return save(
        figure, "Where test images leave, and how often they are right; under each exit what leaving costs.", path
    )


def exit_by_difficulty(decisions: Decisions, cache: CachedExits, path: Path) -> Path | None:
    """Draw the MACs spent on the network against the data set's measure of difficulty; None if there is no measure."""
    if decisions.difficulty_N is None:
        return None
    figure = figure_of(7, 3.8)
    axes = figure.subplots()
    fraction_M = cache.macs_N.cpu()[decisions.exit_N] / decisions.full_macs
    groups = groups_by_difficulty(decisions.difficulty_N)
    x, y = ([value_M[group].mean().item() for group in groups] for value_M in (decisions.difficulty_N, fraction_M))
    axes.plot(x, y, "o-", color=KEPT, markersize=4)
    finish(axes, xlabel="difficulty of the image", ylabel="MACs, share of going to the end", ylim=(0, 1.04))
    return save(figure, "Test images in 20 groups from easy to hard, and what was spent on them.", path)


def exit_gallery(decisions: Decisions, cache: CachedExits, images: Images, path: Path) -> Path:
    """Draw the test images that left first, most surely, and those that went furthest."""
    exit_M = decisions.exit_N
    top_M = cache.probability_MNC.amax(-1).cpu().gather(1, exit_M.unsqueeze(1)).squeeze(1)
    shown = "Test images that left first, or most surely (above), and last (below)"
    if exit_M.min() == exit_M.max():
        shown = f"All test images left at exit {int(exit_M[0])}: the surest of them (above) and the least sure (below)"
    caption = (
        f"{shown}, drawn at random among equals; under each the exit and how probable its answer was there. "
        "The title is the label; red where the answer differs."
    )
    return plots.gallery(
        decisions,
        images,
        order_among_ties(exit_M - top_M),
        path,
        caption=caption,
        height=4.4,
        before_prediction="answer",
        text_below=lambda index: f"exit {int(exit_M[index])}, {100 * top_M[index]:.0f} %",
    )


def exit_pictures(
    folder: Path,
    metrics: list[dict[str, Any]],
    decisions: Decisions,
    cache: CachedExits,
    budgeted: Pairs,
    images: Images,
    figures: Mapping[str, Any] | None = None,
    choose_after: float = 0.0,
) -> list[Path]:
    """Write every picture of a run over a network with exits.

    Args:
        metrics: the records of ``metrics.jsonl``.
        decisions: the record of the test images, with classes, and in ``static_F2`` each exit for all images.
        cache: outputs of all exits for the test images.
        budgeted: MACs and test accuracy of thresholds for every budget; empty where a learned policy decided.
        images: the test images.
        figures: those of the summary.
        choose_after: the first update whose weights may have been kept.

    Returns: the paths.
    """

    def curves(path: Path) -> Path | None:
        if budgeted:
            return learning_curves(metrics, cache.num_exits, path, choose_after)
        return learning_plots.learning_curves(metrics, None, path, choose_after)

    return write_pictures(
        folder,
        {
            "learning_curves": curves,
            "accuracy_against_macs": lambda path: accuracy_against_macs(decisions, cache, budgeted, path, figures),
            "exit_use": lambda path: exit_use(decisions, cache, path),
            "gallery": lambda path: exit_gallery(decisions, cache, images, path),
            "exit_by_difficulty": lambda path: exit_by_difficulty(decisions, cache, path),
        },
    )
