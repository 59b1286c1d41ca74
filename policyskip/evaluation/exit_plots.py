"""Pictures of networks that leave early. Each function writes one PNG whose caption says what is to be seen.

Shapes: M images of a set, N exits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from policyskip.data import Images
from policyskip.evaluation import plots
from policyskip.evaluation.plots import DROPPED, FULL, KEPT, STATIC, figure_of, points_of, save
from policyskip.exits.cache import CachedExits
from policyskip.exits.references import accuracy_by_exit, exit_histogram, oracle_curve

Pairs = list[list[float]]
"""Points of a curve: MACs and accuracy."""


def learning_curves(records: list[dict[str, Any]], num_exits: int, path: Path) -> Path:
    """The loss, and every exit's accuracy on validation images, against updates."""
    figure = figure_of(9, 3.6)
    left, right = figure.subplots(1, 2)
    loss = points_of(records, "train/loss")
    if loss:
        left.plot(*zip(*loss, strict=True), ".-", color=KEPT, linewidth=1, markersize=2)
    left.set(title="training loss", xlabel="update", yscale="log")
    for n in range(num_exits):
        points = points_of(records, f"val/accuracy_exit{n}")
        if points:
            shade = 0.25 + 0.75 * n / max(1, num_exits - 1)
            right.plot(*zip(*points, strict=True), "o-", color=KEPT, alpha=shade, markersize=3, label=f"exit {n}")
    right.set(title="validation accuracy", xlabel="update")
    if right.lines:  # records that were damaged are left out
        right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.25)
    return save(figure, "The joint loss, and how well each exit alone answers, while the network learned.", path)


def accuracy_against_macs(
    cache: CachedExits, exit_M: Tensor, anytime: Pairs, budgeted: Pairs, path: Path, policy_macs: float = 0.0
) -> Path:
    """Anytime (each exit for all images) and budgeted decisions, what was chosen, and the oracle.

    Without ``budgeted`` a learned policy decided, whose own cost is ``policy_macs`` an image.
    """
    figure = figure_of(6.4, 4.8)
    axes = figure.subplots()
    full = cache.costs.full
    oracle_P, oracle_macs_P = oracle_curve(cache)
    axes.plot(
        (oracle_macs_P / full).tolist(), oracle_P.tolist(), "--", color="#888888", label="oracle (sees the label)"
    )
    if budgeted:
        axes.plot(*_shares(budgeted, full), "-", color=KEPT, label="budgeted: each image its own exit")
    axes.plot(*_shares(anytime, full), "s-", color=STATIC, markersize=4, label="anytime: one exit for all images")
    accuracy, macs = cache.judge(exit_M.to(cache.label_M.device))
    chosen = "the chosen thresholds" if budgeted else "the policy"
    axes.plot((macs.item() + policy_macs) / full, accuracy.item(), "o", color=KEPT, markersize=9, label=chosen)
    low = min(accuracy for _, accuracy in anytime)
    axes.set(xlabel="MACs, share of going to the last exit", ylabel="test accuracy", ylim=(max(0, low - 0.03), 1.01))
    axes.grid(alpha=0.25)
    figure.legend(fontsize=8, loc="outside upper left", ncols=2)
    caption = (
        "Above the squares, leaving early where it is safe pays. Everything was chosen on validation images; "
        "the oracle leaves at the first exit that is right and shows the room that is left."
    )
    return save(figure, caption, path)


def _shares(pairs: Pairs, full: float) -> tuple[list[float], list[float]]:
    return [macs / full for macs, _ in pairs], [accuracy for _, accuracy in pairs]


def exit_use(cache: CachedExits, exit_M: Tensor, path: Path) -> Path:
    """The share of the images that leave at each exit, and how many of those are right."""
    N = cache.num_exits
    figure = figure_of(7, 3.8)
    axes = figure.subplots()
    correct_M = cache.correct_MN.gather(1, exit_M.unsqueeze(1)).squeeze(1)
    share_N, right_N = exit_histogram(exit_M, N).tolist(), accuracy_by_exit(exit_M, correct_M, N).tolist()
    axes.bar(range(N), share_N, color=DROPPED, label="share of images that leave here")
    places = [n for n in range(N) if right_N[n] == right_N[n]]
    axes.plot(places, [right_N[n] for n in places], "o", color=KEPT, label="accuracy of those that leave here")
    alone_N = cache.correct_MN.double().mean(0).tolist()
    axes.plot(range(N), alone_N, "_", color=FULL, markersize=18, label="accuracy here if all left here")
    labels = [f"exit {n}\n{macs / 1e6:.2f} M" for n, macs in enumerate(cache.macs_N.tolist())]
    axes.set(xticks=range(N), xticklabels=labels, ylim=(0, 1.06), ylabel="share of test images; accuracy")
    figure.legend(fontsize=8, loc="outside upper left", ncols=3)
    return save(
        figure, "Where test images leave, and how often they are right; under each exit what leaving costs.", path
    )


def exit_by_difficulty(cache: CachedExits, exit_M: Tensor, difficulty_M: Tensor, path: Path) -> Path:
    """MACs spent against the data set's own measure of difficulty."""
    figure = figure_of(7, 3.8)
    axes = figure.subplots()
    order = difficulty_M.argsort()
    share_M = (cache.macs_N[exit_M] / cache.costs.full)[order]
    groups = [group for group in torch.arange(len(order)).tensor_split(20) if len(group)]
    x = [difficulty_M[order][group].mean().item() for group in groups]
    axes.plot(x, [share_M[group].mean().item() for group in groups], "o-", color=KEPT, markersize=4)
    axes.set(xlabel="difficulty of the image", ylabel="MACs, share of going to the end", ylim=(0, 1.04))
    axes.grid(alpha=0.25)
    return save(figure, "Test images in 20 groups from easy to hard, and what was spent on them.", path)


def gallery(
    cache: CachedExits, exit_M: Tensor, images: Images, classes: tuple[str, ...], path: Path, count: int = 8
) -> Path:
    """The test images that left first, most surely, and those that went furthest."""
    top_M = cache.probability_MNC.amax(-1).gather(1, exit_M.unsqueeze(1)).squeeze(1)
    order = (exit_M - top_M).argsort(stable=True)
    count = min(count, max(1, len(order) // 2))
    figure = figure_of(1.35 * count + 0.4, 4.4)
    grid = figure.subplots(2, count, squeeze=False)
    prediction_M = cache.logits_MNC.argmax(-1).gather(1, exit_M.unsqueeze(1)).squeeze(1)
    for row, index_B in zip(grid, (order[:count], order[len(order) - count :].flip(0)), strict=True):
        shown = next(iter(images.stream([(index_B, 0)]))).images.permute(0, 2, 3, 1).cpu().numpy()
        for axes, index, image in zip(row, index_B.tolist(), shown, strict=True):
            axes.imshow(image)
            label, prediction = (shorten(classes[int(t[index])]) for t in (cache.label_M, prediction_M))
            right = label == prediction
            axes.set_title(
                label if right else f"{label}\nanswer {prediction}", fontsize=9, color=FULL if right else "#b3261e"
            )
            axes.set_xlabel(f"exit {int(exit_M[index])}, {top_M[index]:.2f}", fontsize=8)
            axes.set(xticks=[], yticks=[])
    caption = (
        "Test images that left first, or most surely (above), and last (below); under each the exit and how probable "
        "its answer was there. The title is the label; red where the answer differs."
    )
    return save(figure, caption, path)


def shorten(name: str, length: int = 12) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def all_plots(
    folder: Path,
    records: list[dict[str, Any]],
    cache: CachedExits,
    exit_M: Tensor,
    anytime: Pairs,
    budgeted: Pairs,
    images: Images,
    classes: tuple[str, ...],
    policy_macs: float = 0.0,
) -> list[Path]:
    """Write every picture of a run that leaves early.

    Args:
        exit_M: int64 (M,), where each test image left.
        budgeted: empty where a learned policy decided, at ``policy_macs`` an image.
    """
    folder.mkdir(exist_ok=True)
    curves, against = folder / "learning_curves.png", folder / "accuracy_against_macs.png"
    pictures = [
        learning_curves(records, cache.num_exits, curves) if budgeted else plots.learning_curves(records, None, curves),
        accuracy_against_macs(cache, exit_M, anytime, budgeted, against, policy_macs),
        exit_use(cache, exit_M, folder / "exit_use.png"),
        gallery(cache, exit_M, images, classes, folder / "gallery.png"),
    ]
    if images.difficulty is not None:
        pictures.append(exit_by_difficulty(cache, exit_M, images.difficulty, folder / "exit_by_difficulty.png"))
    return pictures
