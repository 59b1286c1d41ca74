"""Drawing functions that all pictures share, and the pictures of policies that skip blocks and of a network's profile.

Each function that is given a path writes one PNG whose caption says what is to be seen.

Shapes: N images of a set, B images shown, K blocks, C classes.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import ScalarFormatter
from numpy.typing import NDArray
from torch import Tensor

from policyskip.data import Images
from policyskip.evaluation.decisions import Decisions, pixels

KEPT, DROPPED, FULL, STATIC, WRONG = "#1b6ca8", "#e4e4e4", "#444444", "#c8701a", "#b3261e"

Points = Sequence[tuple[float, float]]
"""Points of a curve, x and y."""


# What all pictures share


def figure_of(width: float, height: float) -> Figure:
    """Make an empty figure of a size in inches."""
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, caption: str, path: Path) -> Path:
    """Write a figure with its caption below.

    Returns: the path.
    """
    width = int(figure.get_figwidth() * 14)
    figure.supxlabel(textwrap.fill(caption, width), fontsize=9, color="#333333", x=0.02, ha="left")
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)
    figure.set_layout_engine(None)  # savefig would lay everything out again, twice, and draw it for that
    figure.savefig(path)
    return path


def write_pictures(folder: Path, pictures: Mapping[str, Callable[[Path], Path | None]]) -> list[Path]:
    """Write pictures into a folder, which is made if need be.

    Args:
        pictures: by name, the functions that write them; a function returns None if it has nothing to show.

    Returns: the paths of the pictures that there are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [write(folder / f"{name}.png") for name, write in pictures.items()]
    return [path for path in paths if path is not None]


def finish(axes: Axes, legend: Literal["best", "lower right"] | None = None, **settings: Any) -> None:
    """Set labels and limits, draw the grid, and the legend at ``legend`` if anything has a label."""
    axes.set(**settings)
    axes.grid(alpha=0.25)
    if legend is not None and axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, loc=legend)


def panel_of_curves(axes: Axes, title: str, curves: Iterable[tuple[Points, dict[str, Any]]]) -> list[Line2D]:
    """Draw values against updates: for each curve its points and its style. Curves without points are left out."""
    lines = [line for points, style in curves if points for line in axes.plot(*zip(*points, strict=True), **style)]
    finish(axes, title=title, xlabel="update")
    return lines


def points_of(records: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """Return the steps and values of a figure in the records that have it; damaged records lack it."""
    return [(r["step"], r[name]) for r in records if isinstance(r.get(name), int | float)]


def groups_by_difficulty(difficulty_N: Tensor, count: int = 20) -> list[Tensor]:
    """Return the indices, int64, of the images in ``count`` groups from easy to hard; few images make fewer groups."""
    return [group for group in difficulty_N.argsort().tensor_split(count) if len(group)]


def shorten(name: str, length: int = 12) -> str:
    """Cut a name to a length, for print only: different names may be cut to the same text."""
    return name if len(name) <= length else name[: length - 1] + "…"


def title_of(decisions: Decisions, index: int, before_prediction: str) -> tuple[str, str]:
    """Return an image's title and its colour: the label, and in red also the prediction if that is another class."""
    label, prediction = (
        decisions.classes[int(class_N[index])] for class_N in (decisions.label_N, decisions.prediction_N)
    )
    if bool(decisions.correct_N[index]):
        return shorten(label), FULL
    texts = [shorten(label), shorten(prediction)]
    if texts[0] == texts[1]:  # the names begin alike, so their ends tell them apart
        texts = [f"…{name[-11:]}" for name in (label, prediction)]
    return f"{texts[0]}\n{before_prediction} {texts[1]}", WRONG


def draw_image(axes: Axes, image: NDArray[np.uint8], title: str, colour: str) -> None:
    """Draw an image, uint8 (H, W, 3), under its title and without an axis."""
    axes.imshow(image)
    axes.set_title(title, fontsize=9, color=colour)
    axes.set(xticks=[], yticks=[])


def gallery(
    decisions: Decisions,
    images: Images,
    order_N: Tensor,
    path: Path,
    *,
    caption: str,
    height: float,
    before_prediction: str,
    text_below: Callable[[int], str],
    strip: Callable[[Axes, int], None] | None = None,
    count: int = 8,
) -> Path:
    """Draw the first images in an order, above, and the last, below, each under its title.

    Args:
        order_N: int64 (N,), indices of the images.
        height: of the picture, in inches.
        before_prediction: the word in a title between the label and a wrong prediction.
        text_below: the text below the image of an index.
        strip: draws a strip between the image of an index and its text.
        count: number of images in a row, at most.
    """
    count = min(count, max(1, len(order_N) // 2))
    figure = figure_of(1.35 * count + 0.4, height)
    ratios = [1, 1] if strip is None else [5, 1, 5, 1]
    grid = figure.subplots(len(ratios), count, squeeze=False, height_ratios=ratios)
    step = len(ratios) // 2
    ends = (order_N[:count], order_N[len(order_N) - count :].flip(0))
    for pictures, lowest, index_B in zip(grid[::step], grid[step - 1 :: step], ends, strict=True):
        shown = zip(pictures, lowest, index_B.tolist(), pixels(images, index_B), strict=True)
        for picture, below, index, image in shown:
            draw_image(picture, image, *title_of(decisions, index, before_prediction))
            if strip is not None:
                strip(below, index)
                below.set(xticks=[], yticks=[])
                for spine in (*picture.spines.values(), *below.spines.values()):
                    spine.set_visible(False)
            below.set_xlabel(text_below(index), fontsize=8)
    return save(figure, caption, path)


# Policies that skip blocks


def learning_curves(metrics: list[dict[str, Any]], blocks: int | None, path: Path) -> Path:
    """Draw reward, accuracy and kept blocks (``blocks`` None: MACs) against updates, in training and on validation."""
    figure = figure_of(10, 3.6)
    cost_key, cost_title, cost = (
        ("macs_fraction", "MACs, share of all", "MACs")
        if blocks is None
        else ("kept", "kept blocks", "number of kept blocks")
    )
    training = dict(color=KEPT, alpha=0.45, linewidth=1, label="training images")
    validation = dict(color=FULL, marker="o", markersize=3, linewidth=1.5, label="validation images")
    panels = (("reward", "reward"), ("accuracy", "accuracy"), (cost_key, cost_title))
    for axes, (key, title) in zip(figure.subplots(1, 3), panels, strict=True):
        val_key = "val/kept_mean" if key == "kept" else f"val/{key}"
        curves = [(points_of(metrics, f"train/{key}"), training), (points_of(metrics, val_key), validation)]
        panel_of_curves(axes, title, curves)
    finish(axes, legend="best", ylim=(0, 1.04 * (blocks or 1)))
    caption = f"Reward, accuracy and {cost} while the policy learned; on validation images, when it is greedy."
    return save(figure, caption, path)


def accuracy_against_macs(decisions: Decisions, path: Path) -> Path:
    """Draw the policy beside the full network and the static front."""
    figure = figure_of(6, 4.6)
    axes = figure.subplots()
    lowest = min(decisions.accuracy - 0.1, 0.8)
    front = sorted((macs / decisions.full_macs, a) for macs, a in decisions.static_F2.tolist() if a >= lowest)
    if front:
        axes.plot(*zip(*front, strict=True), "s-", color=STATIC, markersize=4, label="best fixed keep-set of each size")
    if decisions.full_correct_N is not None:
        axes.plot(1, decisions.full_correct_N.double().mean(), "D", color=FULL, label="full network")
    label = "oracle, sees the label" if decisions.sees_the_label else "policy, its own cost included"
    axes.plot(decisions.macs_fraction, decisions.accuracy, "o", color=KEPT, markersize=9, label=label)
    finish(axes, legend="lower right", xlabel="MACs, share of the full network's", ylabel="test accuracy")
    caption = (
        "Above the line, deciding per image pays: no fixed choice of blocks that was found reaches that accuracy at "
        "that cost. The sets were chosen on validation images."
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
    return save(figure, "How often each block runs on test images; dotted lines part the network's stages.", path)


def block_use_by_class(decisions: Decisions, stages: tuple[int, ...], path: Path) -> Path:
    """Draw the share of each class's images that keep each block, as a heat map of at most 40 classes."""
    classes = decisions.classes
    shown = classes[:40]
    figure = figure_of(8, 1.8 + 0.26 * len(shown))
    axes = figure.subplots()
    use_CK = decisions.block_use_CK(len(classes))[: len(shown)]
    picture = axes.imshow(use_CK.numpy(), aspect="auto", cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axes, label="share of images")
    _mark_stages(axes, stages)
    axes.set(xlabel="block", yticks=range(len(shown)))
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

    caption = (
        "Test images that got the fewest blocks (above) and the most (below). Under each, its blocks from first to "
        "last: blue ran, grey was skipped. The title is the label; red where the prediction differs."
    )
    return gallery(
        decisions,
        images,
        kept_N.argsort(stable=True),
        path,
        caption=caption,
        height=5.2,
        before_prediction="not",
        text_below=lambda index: f"{int(kept_N[index])} of {K}",
        strip=strip,
    )


def block_pictures(
    folder: Path, metrics: list[dict[str, Any]], decisions: Decisions, images: Images, stages: tuple[int, ...]
) -> list[Path]:
    """Write every picture of a run that skips blocks.

    Args:
        metrics: the records of ``metrics.jsonl``.
        decisions: the record of the test images, with static front and classes.
        images: the test images.
        stages: number of blocks in each stage of the network.

    Returns: the paths.
    """
    return write_pictures(
        folder,
        {
            "learning_curves": lambda path: learning_curves(metrics, decisions.ran_NK.shape[1], path),
            "accuracy_against_macs": lambda path: accuracy_against_macs(decisions, path),
            "block_use": lambda path: block_use(decisions, stages, path),
            "block_use_by_class": lambda path: block_use_by_class(decisions, stages, path),
            "gallery": lambda path: block_gallery(decisions, images, path),
            "kept_by_difficulty": lambda path: kept_by_difficulty(decisions, path),
        },
    )


# A network's profile


def profile(content: dict[str, Any], path: Path) -> Path:
    """Draw each block's time at every batch size, and its share of MACs beside its share of time."""
    figure = figure_of(10, 3.8)
    left, right = figure.subplots(1, 2)
    macs_K = np.array(content["macs"]["blocks"])
    block_K = np.arange(len(macs_K))
    shades = np.linspace(0.9, 0.35, len(content["batches"]))
    for (batch, times), shade in zip(content["batches"].items(), shades, strict=True):
        kept_K = np.array(times["kept_ms"])
        style = dict(marker="o", markersize=3, color=KEPT, alpha=shade, label=f"batch {batch}")
        left.plot(block_K, 1000 * kept_K, **style)
        right.plot(block_K, kept_K / kept_K.sum(), **style)
    right.plot(block_K, macs_K / macs_K.sum(), color=STATIC, linestyle="--", label="of the MACs")
    microseconds = dict(xlabel="block", ylabel="microseconds an image", yscale="log")
    finish(left, legend="best", title="time of a block that runs", **microseconds)
    for set_formatter in (left.yaxis.set_major_formatter, left.yaxis.set_minor_formatter):
        set_formatter(ScalarFormatter())
    finish(right, legend="best", title="share of all blocks", xlabel="block", ylim=(0, None))
    caption = (
        f"{content['network']} on {content['device']}: what each block takes, and whether MACs tell. "
        "Where the lines on the right differ, skipping a block saves more or less time than it saves MACs."
    )
    return save(figure, caption, path)
