"""Drawing functions that all pictures share, and the picture of a network's profile.

Each function that is given a path writes one PNG whose caption says what is to be seen.

Shapes: N images of a set, B images shown, K blocks, C classes.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter, ScalarFormatter
from numpy.typing import NDArray
from torch import Tensor

from policyskip.data import Images
from policyskip.evaluation.decisions import Decisions, pixels
from policyskip.files import write
from policyskip.texts import LONGEST_LINE, for_matplotlib, one_line

KEPT, DROPPED, FULL, STATIC, WRONG = "#1b6ca8", "#e4e4e4", "#444444", "#c8701a", "#b3261e"

FEW_POINTS = 40
"""A curve of fewer points is drawn with a marker at each."""

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
    lines = textwrap.fill(one_line(caption, LONGEST_LINE), width).replace("$", r"\$")
    figure.supxlabel(lines, fontsize=9, color="#333333", x=0.02, ha="left")
    engine = figure.get_layout_engine()
    assert engine is not None
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing|constrained_layout not applied", UserWarning)
        engine.execute(figure)
        figure.set_layout_engine(None)  # savefig would lay everything out again, twice, and draw it for that
        figure.savefig(buffer, format="png")
    write(path, buffer.getvalue())
    return path


def write_pictures(folder: Path, pictures: Mapping[str, Callable[[Path], Path | None]]) -> list[Path]:
    """Write pictures into a folder, which is made if need be.

    Args:
        pictures: by name, the functions that write them; a function returns None if it has nothing to show.

    Returns: the paths of the pictures that there are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [draw(folder / f"{name}.png") for name, draw in pictures.items()]
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
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    finish(axes, title=title, xlabel="update")
    return lines


def in_percent(axis: Axis, decimals: int | None = None) -> None:
    """Write the shares along an axis as percentages; matplotlib chooses the decimals if None are given."""
    axis.set_major_formatter(PercentFormatter(1, decimals, " %"))


def logarithmic_if_wide(axes: Axes, values: Sequence[float]) -> None:
    """Let the vertical axis be logarithmic if the values that are drawn need it, with few labels, which stand apart."""
    if not values or min(values) <= 0 or max(values) < 5 * min(values):
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 1000 * min(values) else (1,)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_locator(NullLocator())


def points_of(records: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """Return the steps and values of a figure in the records that have it; damaged records lack it."""
    return [(r["step"], r[name]) for r in records if isinstance(r.get(name), int | float)]


def groups_by_difficulty(difficulty_N: Tensor, count: int = 20) -> list[Tensor]:
    """Return the indices, int64, of the images in ``count`` groups from easy to hard; few images make fewer groups."""
    return [group for group in difficulty_N.argsort().tensor_split(count) if len(group)]


def shorten(name: str, length: int = 12, end: bool = False) -> str:
    """Cut a name to a length, to its start or its ``end``, for print only: different names may become one text."""
    line = one_line(name)
    if len(line) > length:
        line = f"…{line[1 - length :]}" if end else f"{line[: length - 1]}…"
    return for_matplotlib(line)


def title_of(decisions: Decisions, index: int, before_prediction: str) -> tuple[str, str]:
    """Return an image's title and its colour: the label, and in red also the prediction if that is another class."""
    names = [decisions.classes[int(class_N[index])] for class_N in (decisions.label_N, decisions.prediction_N)]
    if bool(decisions.correct_N[index]):
        return shorten(names[0]), FULL
    texts = [shorten(name) for name in names]
    if texts[0] == texts[1]:  # the names begin alike, so their ends tell them apart
        texts = [shorten(name, end=True) for name in names]
    return f"{texts[0]}\n{before_prediction} {texts[1]}", WRONG


def order_among_ties(value_N: Tensor) -> Tensor:
    """Return the indices, int64, of the images in the order of a value; those of equal value in a random order.

    Otherwise the order of the files would decide, and in a sorted folder that is one class.
    """
    order_N = torch.randperm(len(value_N), generator=torch.Generator().manual_seed(0))
    return order_N[value_N[order_N].argsort(stable=True)]


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
    logarithmic_if_wide(left, [1000 * time for times in content["batches"].values() for time in times["kept_ms"]])
    finish(left, legend="best", title="time of a block that runs", xlabel="block", ylabel="microseconds an image")
    in_percent(right.yaxis)
    finish(right, legend="best", title="share of all blocks", xlabel="block", ylim=(0, None))
    caption = (
        f"{content['network']} on {content['device']}: what each block takes, and whether MACs tell. "
        "Where the lines on the right differ, skipping a block saves more or less time than it saves MACs."
    )
    return save(figure, caption, path)
