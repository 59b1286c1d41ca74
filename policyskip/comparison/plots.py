"""The pictures of a comparison. Each function writes one PNG whose caption says what is to be seen.

Shapes: K blocks or exits.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.lines import Line2D

from policyskip.comparison.fixed_lines import BEST_FIXED, FIXED, MANY_POINTS, about_lines, best_of_lines, fixed_lines
from policyskip.comparison.rows import Row
from policyskip.comparison.series import (
    CURVES,
    Style,
    curves_of,
    front_of,
    lowest_shown,
    matrix,
    oracles,
    rows_using,
)
from policyskip.comparison.tables import MEASURES, Cells
from policyskip.evaluation.plots import (
    FULL,
    STATIC,
    draw_image,
    figure_of,
    finish,
    in_percent,
    panel_of_curves,
    save,
    shorten,
    write_pictures,
)
from policyskip.texts import for_matplotlib

Images = dict[int, Any]
"""Test images by their index in the set: uint8 (H, W, 3)."""


LONGEST_LABEL = 44
"""Letters of a row's label in a picture; the middle of a longer one is left out."""


def _shown(label: str) -> str:
    """Return a row's label as pictures show it."""
    return for_matplotlib(label, LONGEST_LABEL)


def pareto_front(rows: Sequence[Row], cells: Cells, styles: dict[str, Style], path: Path) -> Path:
    """Draw accuracy against MACs of every row and run, with intervals, the front, the fixed choices and the oracle."""
    figure = figure_of(9.6, 5.6)
    axes = figure.subplots()
    lines, front = fixed_lines(rows), front_of(cells)
    for n, line in enumerate(lines):
        points = [(macs / 1e6, 100 * accuracy) for macs, accuracy in line.points]
        marker, label = "s" if len(points) <= MANY_POINTS else "", FIXED if n == 0 else None
        axes.plot(*zip(*points, strict=True), color=STATIC, marker=marker, markersize=3, linewidth=1, label=label)
    if len(lines) > 1:
        best = [(macs / 1e6, 100 * accuracy) for macs, accuracy, _ in best_of_lines(lines)]
        axes.plot(*zip(*best, strict=True), ":", color=STATIC, linewidth=1, label=BEST_FIXED)
    axes.step(
        *([cells[n]["macs"] / 1e6 for n in front], [100 * cells[n]["accuracy"] for n in front]),
        *("--",),
        where="post",
        color="#888888",
        linewidth=1,
        label="Pareto front of the agents",
    )
    for row, cell in zip(rows, cells, strict=True):
        style = styles[row.label]
        runs = zip(row.values("macs_mean"), row.values("accuracy"), strict=True)
        if len(row.results) > 1:
            axes.plot(*zip(*((m / 1e6, 100 * a) for m, a in runs), strict=True), ".", color=style.colour, alpha=0.45)
        half = {"xerr": cell["macs_t95"], "yerr": cell["accuracy_t95"]}
        axes.errorbar(
            *(cell["macs"] / 1e6, 100 * cell["accuracy"]),
            xerr=None if half["xerr"] is None else half["xerr"] / 1e6,
            yerr=None if half["yerr"] is None else 100 * half["yerr"],
            fmt="*" if row.oracle else style.marker,
            color=style.colour,
            elinewidth=0.8,
            markersize=10 if row.oracle else 7,
            label=_shown(row.title),
        )
    oracle_points = [(macs, accuracy) for macs, accuracy, _ in oracles(rows)]
    if oracle_points:
        x, y = [macs / 1e6 for macs, _ in oracle_points], [100 * accuracy for _, accuracy in oracle_points]
        axes.plot(x, y, "*", color="none", markeredgecolor=FULL, markersize=11, label="oracles, which see the label")
    highest = max(100 * line["accuracy"] for line in cells)
    low = lowest_shown(cells)
    top = min(100.3, max(highest, *(100 * a for _, a in oracle_points), low + 2) + 1)
    finish(axes, xlabel="MACs an image, millions, own cost included", ylabel="test accuracy, %", ylim=(low, top))
    axes.set_xlim(left=0)
    figure.legend(fontsize=8, loc="outside right upper")
    caption = (
        "Each marker is the mean over seeds, small dots are the runs, bars the 95 % intervals over seeds. To the left "
        f"and above is better; what is far below is cut off. {about_lines(lines)}"
    )
    return save(figure, caption, path)


def learning_curves(rows: Sequence[Row], styles: dict[str, Style], path: Path) -> Path | None:
    """Draw validation accuracy and MACs against updates, with bands from the lowest to the highest seed."""
    panels = curves_of(rows)
    if not panels:
        return None
    figure = figure_of(11, 4.4)
    handles: dict[str, Line2D] = {}
    for axes, (key, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        drawn = []
        for row, curve in curves:
            colour, marker = styles[row.label].colour, styles[row.label].marker if len(curve.step_T) < 40 else None
            points = list(zip(curve.step_T, curve.mean_T, strict=True))
            drawn.append((points, dict(color=colour, marker=marker, markersize=3, linewidth=1.2)))
            axes.fill_between(curve.step_T, curve.low_T, curve.high_T, color=colour, alpha=0.15, linewidth=0)
        lines = panel_of_curves(axes, CURVES[key], drawn)
        handles |= {_shown(row.label): line for (row, _), line in zip(curves, lines, strict=True)}
    figure.legend(handles.values(), handles.keys(), fontsize=8, loc="outside right upper")
    caption = (
        "Mean over seeds; the band goes from the lowest seed to the highest. Agents that set thresholds do so after "
        "training: until then accuracy and cost are those of the last exit."
    )
    return save(figure, caption, path)


def block_use(rows: Sequence[Row], path: Path) -> Path | None:
    """Draw the share of the images that keep each block, row by row; None if no run skips blocks."""
    used = rows_using(rows, "blocks")
    if not used:
        return None
    figure = figure_of(6.5 + 0.07 * max(len(_shown(row.label)) for row, _ in used), 1.9 + 0.34 * len(used))
    axes = figure.subplots()
    width = max(len(share) for _, share in used)
    grid = np.full((len(used), width), np.nan)
    for n, (_, share) in enumerate(used):
        grid[n, : len(share)] = share
    picture = axes.imshow(grid, aspect="auto", cmap="Blues", vmin=0, vmax=1)
    in_percent(figure.colorbar(picture, ax=axes, label="share of images").ax.yaxis, 0)
    axes.set(xlabel="block", yticks=range(len(used)), xticks=range(0, width, 1 if width <= 20 else 5))
    axes.set_yticklabels([_shown(row.label) for row, _ in used], fontsize=8)
    return save(figure, "How often each block runs on test images, mean over seeds.", path)


def exit_use(rows: Sequence[Row], styles: dict[str, Style], path: Path) -> Path | None:
    """Draw the share of the images that leave at each exit, row by row; None if no run leaves early."""
    used = rows_using(rows, "exits")
    if not used:
        return None
    columns = min(4, len(used))
    lines = -(-len(used) // columns)
    figure = figure_of(2.7 * columns + 0.6, 1.1 + 1.9 * lines)
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for axes, (row, share) in zip(grid.flat, used, strict=False):
        axes.bar(range(len(share)), share, color=styles[row.label].colour)
        axes.set_title(for_matplotlib(row.label, 34), fontsize=8)
        axes.set(xticks=range(len(share)), ylim=(0, 1))
        in_percent(axes.yaxis, 0)
    for axes in grid.flat[len(used) :]:
        axes.set_visible(False)
    return save(figure, "Share of the test images that leave at each exit, mean over seeds.", path)


NOT_KNOWN = {
    "same_choices": "no two runs choose among the same blocks or exits",
    "same_answers": "no row has two runs",
    "same_spending": "all images cost the same in some run of each pair",
}
"""Why a measure of agreement is known of no pair of rows."""


def _sentence_case(name: str) -> str:
    """Return the name of a measure as a title begins."""
    return name.replace("_", " ").capitalize()


def agreement(rows: Sequence[Row], cells: Cells, path: Path) -> Path | None:
    """Draw the three measures of agreement between rows, as heat maps."""
    known = [row for row in rows if row.decided]
    if len(known) < 2:
        return None
    labels = [_shown(row.label) for row in known]
    side, room = 1.6 + 0.34 * len(known), 0.06 * max(map(len, labels))
    figure = figure_of(3 * side + 1.5 + room, side + 1.6 + room)
    for n, (axes, key) in enumerate(zip(figure.subplots(1, len(MEASURES)), MEASURES, strict=True)):
        grid = np.array(matrix(known, cells, key), dtype=np.float64)
        picture = axes.imshow(grid, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        axes.set_title(_sentence_case(key), fontsize=10)
        axes.set(xticks=range(len(labels)), yticks=range(len(labels)))
        axes.set_xticklabels(labels, rotation=90, fontsize=7)
        axes.set_yticklabels(labels if n == 0 else [], fontsize=7)
        if np.isnan(grid).all():
            text = textwrap.fill(f"not known: {NOT_KNOWN[key]}", 28)
            axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=8, transform=axes.transAxes)
        elif len(labels) <= 12:
            for (y, x), value in np.ndenumerate(grid):
                if value == value:
                    colour = "white" if value < 0.6 else "black"
                    axes.text(x, y, f"{value:z.2f}", ha="center", va="center", fontsize=6, color=colour)
    figure.colorbar(picture, ax=figure.axes, shrink=0.8)
    meanings = ". ".join(f"{_sentence_case(key)}: {meaning}" for key, meaning in MEASURES.items())
    caption = (
        "How alike two rows decide on the same images, mean over pairs of runs; on the diagonal, seeds of one row. "
        f"{meanings}. Empty where it cannot be said."
    )
    return save(figure, caption, path)


def disagreement(
    rows: Sequence[Row], indices: Sequence[int], images: Images, path: Path, count: int = 12
) -> Path | None:
    """Draw the images on which the rows differ most, and show which rows are right on each."""
    shown = [index for index in indices if index in images][:count]
    known = [row for row in rows if row.decided]
    if not shown:
        return None
    height, room = 0.2 * len(known), 0.06 * max(len(_shown(row.label)) for row in known)
    figure = figure_of(1.05 * len(shown) + 1.2 + room, 2.4 + height)
    top, bottom = figure.subplots(2, len(shown), squeeze=False, height_ratios=[1.0, max(height, 0.4)])
    decided = known[0].decisions[0]
    for n, (above, below, index) in enumerate(zip(top, bottom, shown, strict=True)):
        draw_image(above, images[index], shorten(decided.classes[int(decided.label_N[index])]), "black")
        right = np.array([[row.correct_N[index]] for row in known])
        below.imshow(right, cmap="RdYlGn", vmin=-0.15, vmax=1.15, aspect="auto")
        for edge in range(1, len(known)):
            below.axhline(edge - 0.5, color="white", linewidth=1.5)
        below.set(xticks=[], yticks=range(len(known)) if n == 0 else [])
        if n == 0:
            below.set_yticklabels([_shown(row.label) for row in known], fontsize=7)
        below.set_xlabel(f"image {index}", fontsize=7)
    several = any(len(row.results) > 1 for row in known)
    meanings = "right in all seeds; yellow or orange, right in some seeds" if several else "right"
    caption = (
        "Test images that divide the agents most, each under its label. Below each image is a field for every row: "
        f"green, {meanings}; red, wrong."
    )
    return save(figure, caption, path)


def all_plots(
    folder: Path,
    rows: Sequence[Row],
    cells: Cells,
    agreed: Cells,
    styles: dict[str, Style],
    indices: Sequence[int],
    images: Images,
) -> list[Path]:
    """Write every picture of a group of runs that has something to show.

    Args:
        agreed: the measures of agreement between two rows.
        indices: of the images that divide the rows most.

    Returns: the paths.
    """
    return write_pictures(
        folder,
        {
            "pareto_front": lambda path: pareto_front(rows, cells, styles, path),
            "learning_curves": lambda path: learning_curves(rows, styles, path),
            "block_use": lambda path: block_use(rows, path),
            "exit_use": lambda path: exit_use(rows, styles, path),
            "agreement": lambda path: agreement(rows, agreed, path),
            "disagreement": lambda path: disagreement(rows, indices, images, path),
        },
    )
