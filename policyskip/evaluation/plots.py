"""Every picture. Each function writes one PNG whose caption says what is to be seen.

Shapes: N images, K blocks, C classes.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from policyskip.data import Images
from policyskip.evaluation.decisions import Decisions

KEPT, DROPPED, FULL, STATIC = "#1b6ca8", "#e4e4e4", "#444444", "#c8701a"


def figure_of(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, caption: str, path: Path) -> Path:
    width = int(figure.get_figwidth() * 14)
    figure.supxlabel(textwrap.fill(caption, width), fontsize=9, color="#333333", x=0.02, ha="left")
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)
    figure.set_layout_engine(None)  # savefig would lay everything out again, twice, and draw it for that
    figure.savefig(path)
    return path


def learning_curves(records: list[dict[str, Any]], blocks: int | None, path: Path) -> Path:
    """Reward, accuracy and kept blocks (``blocks`` None: MACs) against updates, in training and on validation."""
    figure = figure_of(10, 3.6)
    last = ("macs_fraction", "MACs, share of all") if blocks is None else ("kept", "kept blocks")
    panels = (("reward", "reward"), ("accuracy", "accuracy"), last)
    for axes, (key, title) in zip(figure.subplots(1, 3), panels, strict=True):
        val_key = "val/kept_mean" if key == "kept" else f"val/{key}"
        for name, label, style in (
            (f"train/{key}", "training images", dict(color=KEPT, alpha=0.45, linewidth=1)),
            (val_key, "validation images", dict(color=FULL, marker="o", markersize=3, linewidth=1.5)),
        ):
            points = points_of(records, name)
            if points:
                axes.plot(*zip(*points, strict=True), label=label, **style)
        axes.set(title=title, xlabel="update")
        axes.grid(alpha=0.25)
        if key == last[0]:
            axes.set_ylim(0, 1.04 * (blocks or 1))
    if axes.lines:  # records that were damaged are left out
        axes.legend(fontsize=8)
    cost = "MACs" if blocks is None else "number of kept blocks"
    caption = f"Reward, accuracy and {cost} while the policy learned; on validation images, when it is greedy."
    return save(figure, caption, path)


def points_of(records: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """Steps and values of a figure in the records that have it."""
    return [(r["step"], r[name]) for r in records if isinstance(r.get(name), int | float)]


def accuracy_against_macs(result: Decisions, front: list[tuple[float, float]], path: Path) -> Path:
    """The policy beside the full network and the static front (pairs of MACs and test accuracy)."""
    figure = figure_of(6, 4.6)
    axes = figure.subplots()
    shown = sorted((m / result.full_macs, a) for m, a in front if a >= min(result.accuracy - 0.1, 0.8))
    if shown:
        axes.plot(*zip(*shown, strict=True), "s-", color=STATIC, markersize=4, label="best fixed keep-set of each size")
    if result.full_correct_N is not None:
        axes.plot(1, result.full_correct_N.double().mean(), "D", color=FULL, label="full network")
    axes.plot(
        result.macs_fraction,
        result.accuracy,
        "o",
        color=KEPT,
        markersize=9,
        label="oracle, sees the label" if result.sees_the_label else "policy, its own cost included",
    )
    axes.set(xlabel="MACs, share of the full network's", ylabel="test accuracy")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="lower right")
    caption = (
        "Above the line, deciding per image pays: no fixed choice of blocks that was found reaches that accuracy at "
        "that cost. The sets were chosen on validation images."
    )
    return save(figure, caption, path)


def block_use(result: Decisions, stages: tuple[int, ...], path: Path) -> Path:
    """Share of the images that keep each block."""
    figure = figure_of(8, 3.4)
    axes = figure.subplots()
    use_K = result.ran_NK.double().mean(0)
    axes.bar(range(len(use_K)), use_K.tolist(), color=KEPT)
    _mark_stages(axes, stages)
    axes.set(xlabel="block", ylabel="share of images", ylim=(0, 1.09), xlim=(-0.6, len(use_K) - 0.4))
    return save(figure, "How often each block runs on test images; dotted lines part the network's stages.", path)


def block_use_by_class(result: Decisions, classes: tuple[str, ...], stages: tuple[int, ...], path: Path) -> Path:
    """The same for each class, as a heat map (at most 40 classes)."""
    shown = classes[:40]
    figure = figure_of(8, 1.8 + 0.26 * len(shown))
    axes = figure.subplots()
    use_CK = result.block_use_CK(len(classes))[: len(shown)]
    picture = axes.imshow(use_CK.numpy(), aspect="auto", cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axes, label="share of images")
    _mark_stages(axes, stages)
    axes.set(xlabel="block", yticks=range(len(shown)))
    axes.set_yticklabels([name[:18] for name in shown])
    more = f" The first {len(shown)} of {len(classes)} classes." if len(classes) > len(shown) else ""
    return save(figure, f"How often each block runs for the test images of each class.{more}", path)


def _mark_stages(axes: Any, stages: tuple[int, ...]) -> None:
    for edge in np.cumsum(stages)[:-1]:
        axes.axvline(edge - 0.5, color="#555555", linestyle=":", linewidth=1)
    K = sum(stages)
    axes.set_xticks(range(0, K, 1 if K <= 20 else 5))


def kept_by_difficulty(result: Decisions, path: Path) -> Path:
    """Kept blocks and accuracy against the data set's own measure of difficulty."""
    assert result.difficulty_N is not None
    figure = figure_of(7, 4)
    axes = figure.subplots()
    order = result.difficulty_N.argsort()
    kept_N = result.ran_NK.sum(1).double()[order]
    bins = [slice_ for slice_ in torch.arange(len(order)).tensor_split(20) if len(slice_)]
    x = [result.difficulty_N[order][b].mean().item() for b in bins]
    low, high = ([kept_N[b].quantile(q).item() for b in bins] for q in (0.1, 0.9))
    axes.fill_between(x, low, high, color=KEPT, alpha=0.2, label="kept blocks, 10th to 90th percentile")
    axes.plot(x, [kept_N[b].mean().item() for b in bins], "o-", color=KEPT, markersize=4, label="kept blocks, mean")
    axes.set(xlabel="difficulty of the image", ylabel="kept blocks", ylim=(0, result.ran_NK.shape[1] * 1.04))
    accuracy = axes.twinx()
    accuracy.plot(
        x,
        [result.correct_N[order][b].double().mean().item() for b in bins],
        color=STATIC,
        label="accuracy of the policy",
    )
    if result.full_correct_N is not None:
        full = [result.full_correct_N[order][b].double().mean().item() for b in bins]
        accuracy.plot(x, full, "--", color=FULL, label="accuracy of the full network")
    accuracy.set(ylabel="test accuracy", ylim=(0, 1.04))
    handles = [axes.get_legend_handles_labels(), accuracy.get_legend_handles_labels()]
    figure.legend(
        handles[0][0] + handles[1][0], handles[0][1] + handles[1][1], fontsize=8, loc="outside upper left", ncols=2
    )
    caption = (
        "Test images in 20 groups from easy to hard. A policy that decides per image spends more where it is hard."
    )
    return save(figure, caption, path)


def gallery(result: Decisions, images: Images, classes: tuple[str, ...], path: Path, count: int = 8) -> Path:
    """The test images that got the fewest and the most blocks, each over the strip of blocks that ran."""
    order = result.ran_NK.sum(1).argsort(stable=True)
    count = min(count, max(1, len(order) // 2))
    rows = {"fewest": order[:count], "most": order[len(order) - count :].flip(0)}
    figure = figure_of(1.35 * count + 0.4, 5.2)
    grid = figure.subplots(4, count, squeeze=False, height_ratios=[5, 1, 5, 1])
    for place, indices in zip((0, 2), rows.values(), strict=True):
        shown = next(iter(images.stream([(indices, 0)]))).images.permute(0, 2, 3, 1).cpu().numpy()
        for column, (index, image) in enumerate(zip(indices.tolist(), shown, strict=True)):
            picture, strip = grid[place, column], grid[place + 1, column]
            picture.imshow(image)
            label, prediction = (classes[int(t[index])][:12] for t in (result.label_N, result.prediction_N))
            right = bool(result.correct_N[index])
            picture.set_title(
                label if right else f"{label}\nnot {prediction}", fontsize=9, color=FULL if right else "#b3261e"
            )
            keep = result.ran_NK[index]
            colors = [KEPT if kept else DROPPED for kept in keep.tolist()]
            strip.broken_barh([(k - 0.41, 0.82) for k in range(len(keep))], (0, 1), facecolors=colors)
            strip.set_xlabel(f"{int(keep.sum())} of {len(keep)}", fontsize=8)
            for axes in (picture, strip):
                axes.set(xticks=[], yticks=[])
                for spine in axes.spines.values():
                    spine.set_visible(False)
    caption = (
        "Test images that got the fewest blocks (above) and the most (below). Under each, its blocks from first to "
        "last: blue ran, grey was skipped. The title is the label; red where the prediction differs."
    )
    return save(figure, caption, path)


def all_plots(
    folder: Path,
    records: list[dict[str, Any]],
    result: Decisions,
    images: Images,
    classes: tuple[str, ...],
    stages: tuple[int, ...],
    front: list[tuple[float, float]],
) -> list[Path]:
    """Write every picture of a run."""
    folder.mkdir(exist_ok=True)
    pictures = [
        learning_curves(records, result.ran_NK.shape[1], folder / "learning_curves.png"),
        accuracy_against_macs(result, front, folder / "accuracy_against_macs.png"),
        block_use(result, stages, folder / "block_use.png"),
        block_use_by_class(result, classes, stages, folder / "block_use_by_class.png"),
        gallery(result, images, classes, folder / "gallery.png"),
    ]
    if result.difficulty_N is not None:
        pictures.append(kept_by_difficulty(result, folder / "kept_by_difficulty.png"))
    return pictures


def profile(content: dict[str, Any], path: Path) -> Path:
    """Each block's time at every batch size, and its share of MACs beside its share of time."""
    figure = figure_of(10, 3.8)
    left, right = figure.subplots(1, 2)
    macs = np.array(content["macs"]["blocks"])
    place = np.arange(len(macs))
    shades = np.linspace(0.9, 0.35, len(content["batches"]))
    for (batch, times), shade in zip(content["batches"].items(), shades, strict=True):
        kept = np.array(times["kept_ms"])
        left.plot(place, 1000 * kept, marker="o", markersize=3, color=KEPT, alpha=shade, label=f"batch {batch}")
        right.plot(place, kept / kept.sum(), marker="o", markersize=3, color=KEPT, alpha=shade, label=f"batch {batch}")
    right.plot(place, macs / macs.sum(), color=STATIC, linestyle="--", label="of the MACs")
    left.set(title="time of a block that runs", xlabel="block", ylabel="microseconds an image", yscale="log")
    for axis in (left.yaxis.set_major_formatter, left.yaxis.set_minor_formatter):
        axis(ScalarFormatter())
    right.set(title="share of all blocks", xlabel="block", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    caption = (
        f"{content['network']} on {content['device']}: what each block takes, and whether MACs tell. "
        "Where the lines on the right differ, skipping a block saves more or less time than it saves MACs."
    )
    return save(figure, caption, path)
