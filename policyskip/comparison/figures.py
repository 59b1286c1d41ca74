"""The interactive figures of the page, which are Plotly's plain data: lists of traces and a layout.

The page sets the colours of text and grid, as it knows whether it is light or dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from policyskip.comparison.fixed_lines import BEST_FIXED, FIXED, MANY_POINTS, about_lines, best_of_lines, fixed_lines
from policyskip.comparison.rows import Row
from policyskip.comparison.series import (
    CURVES,
    FEW_STEPS,
    Style,
    curves_of,
    front_of,
    lowest_shown,
    matrix,
    oracles,
    rows_using,
)
from policyskip.comparison.tables import MEASURES, Cells
from policyskip.evaluation.plots import STATIC
from policyskip.texts import for_plotly

Figure = dict[str, Any]
"""``title``, ``note``, ``data`` (traces) and ``layout``; perhaps ``choices``, the values that a heat map can show."""
DIVERGING = [[0, "#c2412f"], [0.5, "#88888820"], [1, "#1b6ca8"]]
"""A colour scale from worse over alike to better, readable on white and on black."""
FIRST_ROW_ON_TOP = {"autorange": "reversed", "showgrid": False}
"""Settings of the vertical axis of a heat map."""
FEW = 14
"""A heat map of at most this many rows has its numbers written in."""


def pareto_front(rows: Sequence[Row], cells: Cells, styles: dict[str, Style]) -> Figure:
    """Draw accuracy against MACs; a point's ``customdata`` is the run whose gallery it opens."""
    data: list[dict[str, Any]] = []
    lines = fixed_lines(rows)
    for n, line in enumerate(lines):
        points = [(*point, line.name) for point in line.points]
        marker = {"symbol": "square", "size": 4 if len(points) <= MANY_POINTS else 1}
        trace = _trace(FIXED, points, STATIC, "lines+markers", marker)
        data.append(trace | {"legendgroup": "fixed choices", "showlegend": n == 0})
    if len(lines) > 1:
        best = _trace(BEST_FIXED, best_of_lines(lines), STATIC, "lines", {})
        data.append(best | {"line": {"color": STATIC, "width": 1, "dash": "dot"}})
    front = [(cells[n]["macs"], cells[n]["accuracy"], cells[n]["row"]) for n in front_of(cells)]
    steps = _trace("Pareto front of the agents", front, "#888888", "lines", {})
    data.append(steps | {"line": {"dash": "dash", "shape": "hv", "width": 1, "color": "#888888"}, "hoverinfo": "skip"})
    for row, cell in zip(rows, cells, strict=True):
        style = styles[row.label]
        name = for_plotly(row.title)
        if len(row.results) > 1:
            data.append(_runs(row, style))
        names = [result.name for result in row.results]
        hover = f"<b>{name}</b><br>%{{y:.2f}} % at %{{x:.2f}} M MACs ({cell['macs_share']:.3f} of full)<br>"
        listed = for_plotly(", ".join(names[:5])) + (", …" if len(names) > 5 else "")
        kind = f"mean of {len(names)} runs: {listed}" if len(names) > 1 else f"run {listed}"
        mean: dict[str, Any] = {"type": "scatter", "mode": "markers", "name": name, "legendgroup": row.label}
        mean |= {"x": [cell["macs"] / 1e6], "y": [100 * cell["accuracy"]], "customdata": [names[0]]}
        mean["marker"] = {"color": style.colour, "symbol": "star" if row.oracle else style.symbol, "size": 12}
        for axis, half, scale in (("x", cell["macs_t95"], 1e-6), ("y", cell["accuracy_t95"], 100)):
            if half is not None:
                mean[f"error_{axis}"] = {"array": [half * scale], "color": style.colour, "thickness": 1, "width": 3}
        data.append(mean | {"hovertemplate": f"{hover}{kind}<extra></extra>"})
    oracle_points = oracles(rows)
    if oracle_points:
        marker = {"symbol": "star-open", "size": 12}
        data.append(_trace("oracles, which see the label", oracle_points, "#888888", "markers", marker))
    layout = {
        "xaxis": {"title": {"text": "MACs an image, millions, own cost included"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": "test accuracy, %"}, "range": [lowest_shown(cells), 100.5]},
        "height": 520,
        "hovermode": "closest",
    }
    note = (
        "Large points are means over seeds with 95 % intervals over seeds, small points are runs. Hover for the run; "
        f"click for example images; double-click to see all. To the left and above is better. {about_lines(lines)}"
    )
    return {"title": "Accuracy against cost", "note": note, "data": data, "layout": layout}


def _runs(row: Row, style: Style) -> dict[str, Any]:
    x, y = row.values("macs_mean"), row.values("accuracy")
    names = [result.name for result in row.results]
    texts = [f"<b>{for_plotly(result.name)}</b>, seed {result.summary['seed']}" for result in row.results]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": for_plotly(f"{row.label}, runs"),
        "legendgroup": row.label,
        "showlegend": False,
        "x": [m / 1e6 for m in x],
        "y": [100 * a for a in y],
        "customdata": names,
        "text": texts,
        "marker": {"color": style.colour, "size": 6, "opacity": 0.55},
        "hovertemplate": "%{text}<br>%{y:.2f} % at %{x:.2f} M MACs<extra></extra>",
    }


def _trace(
    name: str, points: Sequence[tuple[float, float, str]], colour: str, mode: str, marker: dict[str, Any]
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": mode,
        "name": name,
        "text": [for_plotly(text) for _, _, text in points],
        "x": [macs / 1e6 for macs, _, _ in points],
        "y": [100 * accuracy for _, accuracy, _ in points],
        "marker": {"color": colour, **marker},
        "line": {"color": colour, "width": 1},
        "hovertemplate": f"{name}<br>%{{text}}: %{{y:.2f}} % at %{{x:.2f}} M MACs<extra></extra>",
    }


def learning_curves(rows: Sequence[Row], styles: dict[str, Style]) -> Figure | None:
    """Draw validation accuracy and MACs against updates, with bands from the lowest to the highest seed."""
    panels = curves_of(rows)
    if not panels:
        return None
    data: list[dict[str, Any]] = []
    layout: dict[str, Any] = {"height": 380, "hovermode": "closest", "annotations": []}
    in_legend: set[str] = set()
    for n, (key, curves) in enumerate(panels.items()):
        suffix = "" if n == 0 else str(n + 1)
        left, right = n / len(panels) + (0.03 if n else 0), (n + 1) / len(panels) - 0.02
        layout[f"xaxis{suffix}"] = {"domain": [left, right], "title": {"text": "update"}, "anchor": f"y{suffix}"}
        layout[f"yaxis{suffix}"] = {"anchor": f"x{suffix}"}
        centre = {"x": (left + right) / 2, "y": 1.07, "xref": "paper", "yref": "paper", "showarrow": False}
        layout["annotations"].append({"text": CURVES[key], **centre})
        for row, curve in curves:
            colour, axes = styles[row.label].colour, {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}
            common = {"type": "scatter", "legendgroup": row.label, "name": for_plotly(row.label), **axes}
            if len(row.results) > 1:
                outline = {"x": [*curve.step_T, *curve.step_T[::-1]], "y": [*curve.high_T, *curve.low_T[::-1]]}
                fill = {"fill": "toself", "fillcolor": f"{colour}28", "line": {"width": 0}, "mode": "lines"}
                data.append({**common, **outline, **fill, "hoverinfo": "skip", "showlegend": False})
            line = {
                "x": curve.step_T,
                "y": curve.mean_T,
                "mode": "lines+markers" if len(curve.step_T) < FEW_STEPS else "lines",
                "marker": {"color": colour, "size": 5, "symbol": styles[row.label].symbol},
                "line": {"color": colour, "width": 1.6, "dash": styles[row.label].dash},
            }
            hover = f"<b>{for_plotly(row.label)}</b><br>update %{{x}}: %{{y:.4g}}<extra></extra>"
            data.append({**common, **line, "hovertemplate": hover, "showlegend": row.label not in in_legend})
            in_legend.add(row.label)
    note = (
        "Mean over seeds; bands go from the lowest seed to the highest. Agents that set thresholds do so after "
        "training: until then accuracy and cost are those of the last exit."
    )
    return {"title": "Learning", "note": note, "data": data, "layout": layout}


def block_use(rows: Sequence[Row]) -> Figure | None:
    """Draw the share of the images that keep each block; None if no run skips blocks."""
    used = rows_using(rows, "blocks")
    if not used:
        return None
    width = max(len(share) for _, share in used)
    z = [[*share, *[None] * (width - len(share))] for _, share in used]
    heat = _heat(
        [for_plotly(row.label) for row, _ in used], list(range(width)), z, "%{y}<br>block %{x}: %{z:.3f} of the images"
    )
    heat |= {"colorscale": [[0, "#1b6ca80c"], [1, "#1b6ca8"]], "zmin": 0, "zmax": 1}
    layout = {
        "height": 130 + 30 * len(used),
        "yaxis": FIRST_ROW_ON_TOP,
        "xaxis": {"title": {"text": "block"}, "dtick": 1 if width <= 20 else 5},
    }
    note = "How often each block runs on test images, mean over seeds."
    return {"title": "Which blocks run", "note": note, "data": [heat], "layout": layout}


def exit_use(rows: Sequence[Row], styles: dict[str, Style]) -> Figure | None:
    """Draw the share of the images that leave at each exit; None if no run leaves early."""
    used = rows_using(rows, "exits")
    if not used:
        return None
    data = [
        {
            "type": "bar",
            "name": for_plotly(row.label),
            "x": list(range(len(share))),
            "y": [100 * part for part in share],
            "marker": {"color": styles[row.label].colour},
            "hovertemplate": f"<b>{for_plotly(row.label)}</b><br>exit %{{x}}: %{{y:.1f}} % of images<extra></extra>",
        }
        for row, share in used
    ]
    layout = {"height": 340, "xaxis": {"title": {"text": "exit"}, "dtick": 1}}
    layout["yaxis"] = {"title": {"text": "share of images, %"}, "rangemode": "tozero"}
    note = "Share of the test images that leave at each exit, mean over seeds."
    return {"title": "Where images leave", "note": note, "data": data, "layout": layout}


def agreement(rows: Sequence[Row], cells: Cells) -> Figure | None:
    """Draw how alike two rows decide on the same images, by a measure that the page lets one choose."""
    known = [row for row in rows if row.decided]
    if len(known) < 2:
        return None
    labels = [for_plotly(row.label) for row in known]
    choices = [{"name": meaning, "z": matrix(known, cells, key)} for key, meaning in MEASURES.items()]
    heat = _heat(labels, labels, choices[2]["z"], "%{y}<br>%{x}<br>%{z:.3f}")
    heat |= {"colorscale": "Viridis", "zmin": 0, "zmax": 1}
    heat |= {"texttemplate": "%{z:.2f}"} if len(known) <= FEW else {}
    layout = {"height": 220 + 26 * len(known), "yaxis": FIRST_ROW_ON_TOP, "xaxis": {"tickangle": 40, "showgrid": False}}
    note = "Mean over pairs of runs; on the diagonal, seeds of one row. Empty where it cannot be said."
    figure = {"title": "Who decides alike", "note": note, "data": [heat], "layout": layout}
    return figure | {"choices": choices, "chosen": 2}


def differences(rows: Sequence[Row], cells: Cells) -> Figure | None:
    """Draw each row's accuracy less every other row's on the same images, with paired bootstrap intervals."""
    if not cells:
        return None
    labels = [row.label for row in rows if row.decided]
    z: list[list[float | None]] = [[None] * len(labels) for _ in labels]
    text = [[""] * len(labels) for _ in labels]
    for cell in cells:
        i, j = labels.index(cell["row"]), labels.index(cell["less"])
        low, high = 100 * cell["images_low"], 100 * cell["images_high"]
        for a, b, sign, ends in ((i, j, 1, (low, high)), (j, i, -1, (-high, -low))):
            z[a][b] = round(sign * 100 * cell["accuracy"], 2) + 0.0  # and never -0
            clear = "" if ends[0] <= 0 <= ends[1] else ", a clear difference"
            text[a][b] = f"{z[a][b]:+z.2f} points (95 % over images: {ends[0]:+z.2f} to {ends[1]:+z.2f}){clear}"
    shown = list(map(for_plotly, labels))
    heat = _heat(shown, shown, z, "%{y}<br>less %{x}<br>%{text}")
    largest = max(1.0, max(abs(value) for line in z for value in line if value is not None))
    heat |= {"text": text, "colorscale": DIVERGING, "zmin": -largest, "zmax": largest}
    heat |= {"texttemplate": "%{z:+.2f}"} if len(labels) <= FEW else {}
    layout = {
        "height": 220 + 26 * len(labels),
        "yaxis": FIRST_ROW_ON_TOP,
        "xaxis": {"tickangle": 40, "showgrid": False},
    }
    note = (
        "Accuracy of the row less that of the column on the same images, in points; blue: the row is better. Costs "
        "differ too, so read it beside the first figure. Intervals are paired bootstrap intervals over images."
    )
    return {"title": "Who is better, image by image", "note": note, "data": [heat], "layout": layout}


def _heat(y: list[str], x: list[Any], z: Any, hover: str) -> dict[str, Any]:
    bar = {"thickness": 10, "outlinewidth": 0}
    return {
        "type": "heatmap",
        "x": x,
        "y": y,
        "z": z,
        "xgap": 1,
        "ygap": 1,
        "colorbar": bar,
        "hoverongaps": False,
        "hovertemplate": f"{hover}<extra></extra>",
    }
