"""Many runs, one verdict: the same images, the same costs, several seeds, intervals, and the static front beside it."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape

from policyskip import __version__
from policyskip.comparison import plots, tables
from policyskip.comparison.collect import Collected, Group, Result, collect, groups_of
from policyskip.comparison.page import Section, page
from policyskip.comparison.series import styles
from policyskip.errors import UserError
from policyskip.evaluation.decisions import Decisions
from policyskip.files import reporting_write_errors
from policyskip.runs.folder import Run

MARK = "comparison.json"
"""What a folder of a comparison has, and is known by before it is overwritten."""


POOL = 240
"""Test images that galleries choose from; so many are in the page, and those that divide the agents."""


Pictures = Callable[[Result, Sequence[int]], dict[int, Any]]
"""Test images of a run by their places: uint8 (H, W, 3) each."""


@dataclass(frozen=True)
class Comparison:
    """A comparison as written: its folder, one section for each group, and every picture."""

    folder: Path
    collected: Collected
    sections: list[Section]
    pictures: list[Path]

    @property
    def tables(self) -> dict[str, tables.Cells]:
        """Every table by the name of its file, for all groups together."""
        return _tables(self.sections)


def compare(
    patterns: Iterable[str],
    output: Path,
    overwrite: bool = False,
    again: Callable[[Run], Decisions] | None = None,
    pictures: Pictures | None = None,
    command: str = "policyskip compare",
) -> Comparison:
    """Compare finished runs, and write tables, pictures and the page into a folder that appears when all is done.

    Args:
        patterns: run folders, folders with run folders in them, and glob patterns.
        again: decides again for runs that have no decisions in their folders; None: they are compared without.
        pictures: gives test images to show; None: none are shown.

    Raises:
        UserError: there are no runs, they are damaged, or the folder is there or cannot be written.
    """
    patterns = list(patterns)
    if not all(patterns):
        raise UserError("runs= names no folder; say runs=. for all runs below this one")
    check_output(output, overwrite)
    with reporting_write_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        collected = collect(patterns, again)
        sections = [_section(group, pictures) for group in groups_of(collected.results)]
        with reporting_write_errors(output):
            made = _write(beside, sections, collected, command)
            beside.chmod(0o755)
            _put(beside, output)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return Comparison(output, collected, sections, [output / path for path in made])


def _put(made: Path, output: Path) -> None:
    """Move a folder to its place; what was there is given up only when it is."""
    output = output.resolve()  # a link stays a link
    before = made.with_name(f"{made.name}-before")
    try:
        if output.exists():
            output.rename(before)
        made.rename(output)
    except BaseException:
        if before.exists():
            before.rename(output)
        raise
    shutil.rmtree(before, ignore_errors=True)


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse a folder that is there, unless it may be overwritten and holds a comparison."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{output} is there already; say overwrite=true, or another output=")
    if not (output / MARK).is_file():
        raise UserError(f"{output} holds no comparison, so it is not overwritten; say another output=")


def _section(group: Group, pictures: Pictures | None) -> Section:
    rows = tables.rows_of(group.results)
    divisive = tables.disagreements(rows)
    decided = [r for r in group.results if r.decisions is not None]
    images: dict[int, Any] = {}
    pool: list[int] = []
    why = "" if pictures else "Example images were not asked for."
    if decided and pictures:
        count = len(decided[0].decisions or ())
        pool = sorted(np.random.default_rng(0).choice(count, min(POOL, count), replace=False).tolist())
        try:
            images = pictures(decided[0], sorted({*pool, *divisive}))
        except UserError as error:
            why = f"No example images: {error}"
    return Section(
        group=group,
        rows=rows,
        cells=tables.table(rows, group.title),
        agreed=tables.agreement(rows, group.title),
        differing=tables.differences(rows, group.title),
        look=styles(rows),
        divisive=divisive,
        pool=pool,
        images=images,
        no_images=why,
    )


def _write(folder: Path, sections: list[Section], collected: Collected, command: str) -> list[Path]:
    """All files of a comparison; the pictures' paths in it."""
    for name, cells in _tables(sections).items():
        (folder / f"{name}.csv").write_text(tables.as_csv(cells), encoding="utf-8")
    made = []
    for number, s in enumerate(sections):
        place = folder / "plots" if number == 0 else folder / "plots" / f"group{number + 1}"
        made += plots.all_plots(place, s.rows, s.cells, s.agreed, s.look, s.divisive, s.images)
    (folder / "comparison.md").write_text(markdown(sections, collected), encoding="utf-8")
    (folder / "index.html").write_text(page(sections, collected, command, __version__), encoding="utf-8")
    mark: dict[str, Any] = {"version": __version__, "command": command, "runs": [r.name for r in collected.results]}
    mark |= {"left_out": [[str(f), why] for f, why in collected.left_out], "warnings": collected.warnings}
    (folder / MARK).write_text(json.dumps(mark, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return [path.relative_to(folder) for path in made]


def _tables(sections: list[Section]) -> dict[str, tables.Cells]:
    return {
        "comparison": [cell for s in sections for cell in s.cells],
        "runs": [cell for s in sections for cell in tables.run_table(s.rows, s.group.title)],
        "differences": [cell for s in sections for cell in s.differing],
        "agreement": [cell for s in sections for cell in s.agreed],
        "disagreements": [
            cell for s in sections for cell in tables.disagreement_table(s.rows, s.divisive, s.group.title)
        ],
    }


def markdown(sections: list[Section], collected: Collected) -> str:
    """The tables for a README or an issue."""
    parts: list[str] = []
    for section in sections:
        parts.append(f"### {section.group.title}\n\nRuns on {section.group.reason}.\n")
        parts.append(tables.as_markdown(*tables.shown(section.cells)))
    parts.append(
        "Means over seeds ± half the 95 % t interval over seeds; accuracy in percent, changes in points. The interval "
        "over images is a paired bootstrap against each run's full network on the same test images. The fixed choice "
        "is the best one of equal cost over the run's own network.\n"
    )
    notes: list[str] = list(collected.warnings)
    notes += [f"left out: {folder} {reason}" for folder, reason in collected.left_out]
    parts += ["".join(f"- {note}\n" for note in notes)] if notes else []
    return "\n".join(parts)


def show(made: Comparison) -> None:
    """Print every group's table, what was left out, and warnings."""
    from rich.console import Console
    from rich.table import Table

    console = Console() if sys.stdout.isatty() else Console(width=200)
    for section in made.sections:
        table = Table(title=f"Runs on {section.group.reason}")
        header, lines = tables.shown(section.cells)
        for n, column in enumerate(header):
            table.add_column(column, justify="right" if n else "left")
        for line in lines:
            table.add_row(*(escape(cell) for cell in line))
        console.print(table)
    console.print("Means over seeds ± half the 95 % t interval over seeds; 95 % over images: paired bootstrap.")
    for text in made.collected.warnings:
        print(f"warning: {text}")
    for folder, reason in made.collected.left_out:
        print(f"left out: {folder} {reason}")
