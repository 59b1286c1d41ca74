"""The table of docs/results.md: what ``policyskip compare`` says of runs, a line for each row of a benchmark."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

HEADER = (
    *("accuracy", "MACs, its own in", "strongest rival of equal cost", "margin (its interval)", "pays?"),
    "of the oracle's gain",
)


def verdict_table(comparison: Path, header: Sequence[str], rows: Iterable[tuple[Sequence[str], Sequence[str]]]) -> str:
    """Write a table in Markdown, from the CSV files of a comparison.

    Args:
        comparison: the folder that ``policyskip compare`` wrote.
        header: of the first columns.
        rows: for each row, the cells of the first columns, and the names of its run folders. A row of which the
            comparison has no run is left out.
    """
    labels = {line["run"]: (line["group"], line["row"]) for line in _read(comparison / "runs.csv")}
    figures = {(line["group"], line["row"]): line for line in _read(comparison / "comparison.csv")}
    lines = [[*header, *HEADER], ["---"] * (len(header) + len(HEADER))]
    for cells, runs in rows:
        label = next((labels[run] for run in runs if run in labels), None)
        if label is not None:
            lines.append([*cells, *_cells(figures[label])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(line: dict[str, str]) -> list[str]:
    """Return the cells below ``HEADER`` of a line of comparison.csv."""
    accuracy = _with_interval(line, "accuracy", 100) + (" (sees the label)" if line["sees_the_label"] == "True" else "")
    margin = "–"
    if line["margin"]:
        low, high = margin_ends(line)
        margin = f"{100 * float(line['margin']):+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"
    because = f": {line['verdict_because']}" if line["verdict_because"] else ""
    verdict = f"{line['verdict']}{because}" if line["verdict"] else "–"
    share = f"{100 * float(line['oracle_share']):.0f} %" if line["oracle_share"] else "–"
    return [accuracy, _with_interval(line, "macs_share", 1), line["rival"] or "–", margin, verdict, share]


def _with_interval(line: dict[str, str], key: str, scale: float) -> str:
    """Write a mean over seeds, with half its 95 % interval where there are several seeds."""
    half = line[f"{key}_t95"]
    return f"{scale * float(line[key]):.2f}" + (f" ± {scale * float(half):.2f}" if half else "")


def margin_ends(line: dict[str, str]) -> tuple[float, float]:
    """Return the outer ends of a margin's two intervals, over seeds and over images."""
    mean, half = float(line["margin"]), float(line["margin_t95"] or 0)
    return min(mean - half, float(line["margin_images_low"])), max(mean + half, float(line["margin_images_high"]))


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def figures_of(summary: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Return figures ``test/…`` of a summary as text for a CSV file; "" for one that the summary lacks."""

    def text(value: Any) -> str:
        return f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)

    return {name: text(summary.get(f"test/{name}")) for name in names}


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Write rows as a CSV file; a figure that a row lacks is left empty, as rows of older versions lack some."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for row in reversed(rows) for name in row))  # the newest rows first
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(rows)
