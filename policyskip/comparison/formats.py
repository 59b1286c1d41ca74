"""The tables of a comparison are written here as text: as CSV, as Markdown, and with numbers for people."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from policyskip.comparison.tables import Cells
from policyskip.rivals import PAYS
from policyskip.texts import for_csv, for_markdown


def as_csv(cells: Cells) -> str:
    """Write a table as comma-separated values with a header; None is an empty cell, and no cell is a formula."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(cells[0]) if cells else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: for_csv(cell) for key, cell in line.items()} for line in cells)
    return text.getvalue()


DISPLAYED_COLUMNS = (
    *("row", "seeds", "verdict", "margin", "rival", "of the oracle's gain", "accuracy, %"),
    *("change to its full network", "95 % over images", "MACs, share", "MACs, M", "kept"),
    *("against fixed choice, older runs", "decisions", "latency, ms", "training, s"),
)


def display_table(cells: Cells) -> tuple[list[str], list[list[str]]]:
    """Write the main table for people: in percent and points, with ± half the 95 % interval over seeds.

    Returns: the header and the lines, without those of the ``DISPLAYED_COLUMNS`` that are empty in all lines.
    """
    lines = [
        [
            f"{line['row']} (sees the label)" if line["sees_the_label"] else str(line["row"]),
            str(line["seeds"]).replace(" ", ", "),
            _verdict(line),
            _margin(line),
            str(line["rival"] or "–"),
            _or_dash(line["oracle_share"], "{:z.0%}").replace("%", " %"),
            _plus_minus(line, "accuracy", 100, "{:z.2f}"),
            _plus_minus(line, "change", 100, "{:+z.2f}"),
            _between(line["change_images_low"], line["change_images_high"]),
            _plus_minus(line, "macs_share", 1, "{:z.3f}"),
            _plus_minus(line, "macs", 1e-6, "{:z.2f}"),
            _kept(line),
            _plus_minus(line, "static_margin", 100, "{:+z.2f}") if line["margin"] is None else "–",
            _or_dash(line["decisions"], "{:.0f}"),
            _or_dash(line["latency_ms"], "{:z.2f}"),
            _or_dash(line["seconds"], "{:.0f}"),
        ]
        for line in cells
    ]
    filled = [n for n in range(len(DISPLAYED_COLUMNS)) if any(line[n] != "–" for line in lines)]
    return [DISPLAYED_COLUMNS[n] for n in filled], [[line[n] for n in filled] for line in lines]


LEAST_NEEDED_FIRST = (
    *("training, s", "decisions", "latency, ms", "MACs, M", "95 % over images", "rival", "seeds", "kept"),
    *("change to its full network", "margin", "of the oracle's gain", "verdict"),
)
"""The columns that are left out where there is no room, in this order."""


def fitting(header: list[str], lines: list[list[str]], width: int) -> tuple[list[str], list[list[str]], list[str]]:
    """Leave out columns until a table fits into a width, in letters.

    Returns: the header and the lines that are left, and the columns that were left out.
    """

    left_out = []
    for column in LEAST_NEEDED_FIRST:
        if 1 + sum(3 + least for least in least_widths(header, lines, width)) <= width:
            break
        if column in header:
            n = header.index(column)
            left_out.append(column)
            header, lines = header[:n] + header[n + 1 :], [line[:n] + line[n + 1 :] for line in lines]
    return header, lines, left_out


def least_widths(header: list[str], lines: list[list[str]], width: int) -> list[int]:
    """Return how many letters each column of a table needs.

    Words of a heading may stand below each other; of the cells only those of the first column are folded, to a third of
    the ``width``.
    """
    cells = [max((len(line[n]) for line in lines), default=0) for n in range(len(header))]
    words = [max(map(len, title.split()), default=0) for title in header]
    return [
        max(cell, word) if n else min(cell, width // 3) for n, (cell, word) in enumerate(zip(cells, words, strict=True))
    ]


def _plus_minus(line: dict[str, Any], key: str, scale: float, form: str) -> str:
    mean, half = line[key], line[f"{key}_t95"]
    if mean is None:
        return "–"
    text = form.format(scale * mean)
    return text if half is None else f"{text} ± {form.replace('+', '').format(scale * half)}"


def _verdict(line: dict[str, Any]) -> str:
    if line["verdict"] is None:
        return "–"
    return f"{line['verdict']}, own network" if line["verdict"] == PAYS and line["other_network"] else line["verdict"]


def margin_text(mean: float, ends: tuple[float, float]) -> str:
    """Write a margin in points, with the outer ends of its intervals."""
    return f"{100 * mean:+z.2f} ({_between(*ends)})"


def _margin(line: dict[str, Any]) -> str:
    mean, half, low, high = (line[f"margin{end}"] for end in ("", "_t95", "_images_low", "_images_high"))
    if mean is None:
        return "–"
    return margin_text(mean, (min(low, mean - (half or 0)), max(high, mean + (half or 0))))


def _between(low: float | None, high: float | None) -> str:
    return "–" if low is None or high is None else f"{100 * low:+z.2f} to {100 * high:+z.2f}"


def _kept(line: dict[str, Any]) -> str:
    if line["kept"] is None:
        return "–"
    if line["choice"] == "blocks":
        return f"{line['kept']:.1f} of {line['of']} blocks"
    return f"exit {line['kept']:.1f} of 0–{line['of'] - 1}"


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def as_markdown(header: Sequence[str], lines: list[list[str]]) -> str:
    """Write a table in Markdown."""
    rows = [
        list(header),
        ["---"] * len(header),
        *[[for_markdown(cell) for cell in line] for line in lines],
    ]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)
