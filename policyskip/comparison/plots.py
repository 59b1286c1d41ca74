"""The pictures of a comparison. Each function writes one PNG whose caption says what is to be seen.

Shapes: K blocks or exits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from policyskip.comparison.series import CURVES, Style, band, front_of, lowest_shown, matrix, oracles, static_front, use
from policyskip.comparison.tables import MEASURES, Cells, Row
from policyskip.evaluation.plots import FULL, STATIC, figure_of, save

Images = dict[int, Any]
"""Test images by their place: uint8 (H, W, 3)."""


def pareto_front(rows: Sequence[Row], cells: Cells, look: dict[str, Style], path: Path) -> Path:
    """Accuracy against MACs of every row and run, with intervals, the front, the fixed choices and the oracle."""
    figure = figure_of(9.6, 5.6)
    axes = figure.subplots()
    static, front = static_front(rows), front_of(cells)
    if static:
        x, y = [macs / 1e6 for macs, _, _ in static], [100 * accuracy for _, accuracy, _ in static]
        axes.plot(x, y, "s-", color=STATIC, markersize=3, linewidth=1, label="best fixed choices, mixed, any network")
    axes.step(
        *([cells[n]["macs"] / 1e6 for n in front], [100 * cells[n]["accuracy"] for n in front]),
        *("--",),
        where="post",
        color="#888888",
        linewidth=1,
        label="Pareto front of the agents",
    )
    for row, line in zip(rows, cells, strict=True):
        style = look[row.label]
        runs = zip(row.values("macs_mean"), row.values("accuracy"), strict=True)
        if len(row.results) > 1:
            axes.plot(*zip(*((m / 1e6, 100 * a) for m, a in runs), strict=True), ".", color=style.colour, alpha=0.45)
        half = {"xerr": line["macs_t95"], "yerr": line["accuracy_t95"]}
        axes.errorbar(
            *(line["macs"] / 1e6, 100 * line["accuracy"]),
            xerr=None if half["xerr"] is None else half["xerr"] / 1e6,
            yerr=None if half["yerr"] is None else 100 * half["yerr"],
            fmt="*" if row.oracle else style.marker,
            color=style.colour,
            elinewidth=0.8,
            markersize=10 if row.oracle else 7,
            label=row.title,
        )
    seen = [(macs, accuracy) for macs, accuracy, _ in oracles(rows)]
    if seen:
        x, y = [macs / 1e6 for macs, _ in seen], [100 * accuracy for _, accuracy in seen]
        axes.plot(x, y, "*", color="none", markeredgecolor=FULL, markersize=11, label="oracles, which see the label")
    highest = max(100 * line["accuracy"] for line in cells)
    low = lowest_shown(cells)
    axes.set(xlabel="MACs an image, millions, own cost included", ylabel="test accuracy, %")
    axes.set_ylim(low, min(100.3, max(highest, *(100 * a for _, a in seen), low + 2) + 1))
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    figure.legend(fontsize=8, loc="outside right upper")
    caption = (
        "Each marker is the mean over seeds, small dots are the runs, bars the 95 % intervals over seeds. Above the "
        "line of squares, deciding per image pays; to the left and above is better. What is far below is cut off."
    )
    return save(figure, caption, path)


def learning_curves(rows: Sequence[Row], look: dict[str, Style], path: Path) -> Path | None:
    """Validation accuracy and MACs against updates, with bands from the lowest to the highest seed."""
    panels = {key: [(row, curve) for row in rows if (curve := band(row, key))] for key in CURVES}
    panels = {key: curves for key, curves in panels.items() if curves}
    if not panels:
        return None
    figure = figure_of(11, 4.4)
    handles: dict[str, Any] = {}
    for axes, (key, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for row, curve in curves:
            style = look[row.label]
            marker = style.marker if len(curve.step_T) < 40 else None
            (handles[row.label],) = axes.plot(
                *(curve.step_T, curve.mean_T), color=style.colour, marker=marker, markersize=3, linewidth=1.2
            )
            axes.fill_between(curve.step_T, curve.low_T, curve.high_T, color=style.colour, alpha=0.15, linewidth=0)
        axes.set(title=CURVES[key], xlabel="update")
        axes.grid(alpha=0.25)
    figure.legend(handles.values(), handles.keys(), fontsize=8, loc="outside right upper")
    caption = (
        "Mean over seeds; the band goes from the lowest seed to the highest. Agents that set thresholds do so after "
        "training: until then accuracy and cost are those of the last exit."
    )
    return save(figure, caption, path)


def block_use(rows: Sequence[Row], path: Path) -> Path | None:
    """Share of the images that keep each block, row by row."""
    shown = [(row.label, found[1]) for row in rows if (found := use(row)) and found[0] == "blocks"]
    if not shown:
        return None
    figure = figure_of(9, 1.9 + 0.34 * len(shown))
    axes = figure.subplots()
    width = max(len(share) for _, share in shown)
    grid = np.full((len(shown), width), np.nan)
    for n, (_, share) in enumerate(shown):
        grid[n, : len(share)] = share
    picture = axes.imshow(grid, aspect="auto", cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axes, label="share of images")
    axes.set(xlabel="block", yticks=range(len(shown)), xticks=range(0, width, 1 if width <= 20 else 5))
    axes.set_yticklabels([label for label, _ in shown], fontsize=8)
    return save(figure, "How often each block runs on test images, mean over seeds.", path)


def exit_use(rows: Sequence[Row], look: dict[str, Style], path: Path) -> Path | None:
    """Share of the images that leave at each exit, row by row."""
    shown = [(row, found[1]) for row in rows if (found := use(row)) and found[0] == "exits"]
    if not shown:
        return None
    columns = min(4, len(shown))
    lines = -(-len(shown) // columns)
    figure = figure_of(2.7 * columns + 0.6, 1.1 + 1.9 * lines)
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for axes, (row, share) in zip(grid.flat, shown, strict=False):
        axes.bar(range(len(share)), share, color=look[row.label].colour)
        axes.set_title(row.label if len(row.label) < 34 else f"{row.label[:33]}…", fontsize=8)
        axes.set(xticks=range(len(share)), ylim=(0, 1))
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    return save(figure, "Share of the test images that leave at each exit, mean over seeds.", path)


def agreement(rows: Sequence[Row], cells: Cells, path: Path) -> Path | None:
    """The three measures of agreement between rows, as heat maps."""
    known = [row for row in rows if row.decided]
    if len(known) < 2:
        return None
    side = 1.6 + 0.34 * len(known)
    figure = figure_of(3 * side + 1.5, side + 1.6)
    labels = [row.label for row in known]
    for n, (axes, key) in enumerate(zip(figure.subplots(1, len(MEASURES)), MEASURES, strict=True)):
        grid = np.array(matrix(known, cells, key), dtype=np.float64)
        picture = axes.imshow(grid, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        axes.set_title(key.replace("_", " "), fontsize=10)
        axes.set(xticks=range(len(labels)), yticks=range(len(labels)))
        axes.set_xticklabels(labels, rotation=90, fontsize=7)
        axes.set_yticklabels(labels if n == 0 else [], fontsize=7)
        if len(labels) <= 12:
            for (y, x), value in np.ndenumerate(grid):
                if value == value:
                    colour = "white" if value < 0.6 else "black"
                    axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=6, color=colour)
    figure.colorbar(picture, ax=figure.axes, shrink=0.8)
    caption = (
        "How alike two rows decide on the same images, mean over pairs of runs; on the diagonal, seeds of one row. "
        + "; ".join(f"{key.replace('_', ' ')}: {meaning}" for key, meaning in MEASURES.items())
        + ". Empty where it cannot be said."
    )
    return save(figure, caption, path)


def disagreement(
    rows: Sequence[Row], places: Sequence[int], images: Images, path: Path, count: int = 12
) -> Path | None:
    """The images that divide the rows most, and who is right on each."""
    shown = [place for place in places if place in images][:count]
    known = [row for row in rows if row.decided]
    if not shown:
        return None
    height = 0.2 * len(known)
    figure = figure_of(1.05 * len(shown) + 2.4, 2.4 + height)
    top, bottom = figure.subplots(2, len(shown), squeeze=False, height_ratios=[1.0, max(height, 0.4)])
    decided = known[0].decisions[0]
    for n, (above, below, place) in enumerate(zip(top, bottom, shown, strict=True)):
        above.imshow(images[place])
        above.set_title(decided.classes[int(decided.label_N[place])][:12], fontsize=9)
        right = np.array([[row.correct_N[place]] for row in known])
        below.imshow(right, cmap="RdYlGn", vmin=-0.15, vmax=1.15, aspect="auto")
        below.set(xticks=[], yticks=range(len(known)) if n == 0 else [])
        if n == 0:
            below.set_yticklabels([row.label for row in known], fontsize=7)
        above.set(xticks=[], yticks=[])
        below.set_xlabel(f"image {place}", fontsize=7)
    caption = "Test images that divide the agents most. Under each, who is right: green all seeds, red none."
    return save(figure, caption, path)


def all_plots(
    folder: Path,
    rows: Sequence[Row],
    cells: Cells,
    agreed: Cells,
    look: dict[str, Style],
    places: Sequence[int],
    images: Images,
) -> list[Path]:
    """Write every picture of a group that there is something to show on."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [
        pareto_front(rows, cells, look, folder / "pareto_front.png"),
        learning_curves(rows, look, folder / "learning_curves.png"),
        block_use(rows, folder / "block_use.png"),
        exit_use(rows, look, folder / "exit_use.png"),
        agreement(rows, agreed, folder / "agreement.png"),
        disagreement(rows, places, images, folder / "disagreement.png"),
    ]
    return [picture for picture in pictures if picture is not None]
