"""Compare finished runs: read them, sort them into groups, and write tables, pictures and one HTML page.

Runs of a group are judged on the same test images by the same costs. Runs that differ only in their seeds are one row,
with intervals; the best fixed choices stand beside the rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from policyskip import __version__
from policyskip.comparison import formats, plots, tables, verdict
from policyskip.comparison.answers import answers_of
from policyskip.comparison.collect import Collected, Result, collect
from policyskip.comparison.folder import clear_leftovers, replaced
from policyskip.comparison.groups import Group, groups_of
from policyskip.comparison.page import EXPLAINED, Section, notes, page
from policyskip.comparison.rows import rows_of
from policyskip.comparison.series import styles
from policyskip.errors import UserError
from policyskip.evaluation.decisions import Decisions
from policyskip.evaluation.tables import console
from policyskip.files import write
from policyskip.runs.folder import Run
from policyskip.runs.progress import waiting
from policyskip.texts import LONGEST_LINE, for_markdown, one_line

MARKER_FILE = "comparison.json"
"""A file that every comparison has: a folder without it is not overwritten."""
POOL_SIZE = 240
"""How many test images the page holds, from which galleries choose; those that agents disagree on come on top."""

MOST_NOTES = 8
"""How many warnings, and folders that were left out, are printed at most."""
MOST_ANSWERS = 24
"""How many rows' verdicts are printed at most; the files have them all."""
ImageLoader = Callable[[Result, Sequence[int]], dict[int, NDArray[np.uint8]]]
"""Returns test images of a run by their indices: uint8 (H, W, 3) each."""


@dataclass(frozen=True)
class Comparison:
    """A comparison that has been written.

    Attributes:
        folder: of the comparison.
        collected: the runs, and what was left out.
        sections: one for each group of runs.
        pictures: paths of all PNG files.
    """

    folder: Path
    collected: Collected
    sections: list[Section]
    pictures: list[Path]

    @property
    def tables(self) -> dict[str, tables.Cells]:
        """Return every table, with the rows of all groups, by the name of its file."""
        return _tables(self.sections)


def compare(
    patterns: Iterable[str],
    output: Path,
    overwrite: bool = False,
    decide_again: Callable[[Run], Decisions] | None = None,
    load_images: ImageLoader | None = None,
    command: str = "policyskip compare",
) -> Comparison:
    """Compare finished runs, and write tables, pictures and the page into a folder that appears when all is written.

    Args:
        patterns: run folders, folders with run folders in them, and glob patterns.
        output: the folder to write.
        overwrite: whether an older comparison there may be replaced.
        decide_again: makes the decisions of a run that has none in its folder. None: such a run is compared without.
        load_images: loads the test images that the page shows. None: it shows no images.
        command: what was typed, for the page.

    Raises:
        UserError: there are no runs, a run is damaged, or ``output`` exists already or cannot be written.
    """
    patterns = list(patterns)
    if not all(patterns):
        raise UserError("runs= names no folder; say runs=. for all runs below this one")
    clear_leftovers(output)
    check_output(output, overwrite)
    with replaced(output) as new:
        with waiting("reading the runs"):
            collected = collect(patterns, decide_again)
        with waiting("computing tables and intervals"):
            sections = [_section(group, load_images) for group in groups_of(collected.results)]
        with waiting("writing the comparison"):
            pictures = _write(new, sections, collected, command)
    return Comparison(output, collected, sections, [output / path for path in pictures])


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse a folder that exists and is not empty, unless it holds a comparison that may be overwritten.

    Raises:
        UserError: the folder is refused.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{output} is there already; say overwrite=true, or another output=")
    try:
        Run(output).load_json(MARKER_FILE)
    except UserError as error:
        raise UserError(f"{output} holds no comparison, so it is not overwritten; say another output=") from error


def _section(group: Group, load_images: ImageLoader | None) -> Section:
    """Compute everything that the page and the files say of one group."""
    rows = rows_of(group.results)
    answers = answers_of(rows)
    differing = tables.differences(rows, group.title)
    disputed = tables.disagreements(rows)
    with_decisions = [r for r in group.results if r.decisions is not None]
    images: dict[int, NDArray[np.uint8]] = {}
    pool: list[int] = []
    reason = "" if load_images else "Example images were not asked for."
    if with_decisions and load_images:
        count = len(with_decisions[0].decisions or ())
        pool = sorted(np.random.default_rng(0).choice(count, min(POOL_SIZE, count), replace=False).tolist())
        try:
            images = load_images(with_decisions[0], sorted({*pool, *disputed}))
        except UserError as error:
            reason = f"No example images: {error}"
    return Section(
        group=group,
        rows=rows,
        answers=answers,
        cells=tables.table(rows, answers, group.title),
        agreed=tables.agreement(rows, group.title),
        differing=differing,
        styles=styles(rows),
        disputed=disputed,
        pool=pool,
        images=images,
        no_images=one_line(reason),
        sentences=verdict.sentences(rows, differing),
    )


def _write(folder: Path, sections: list[Section], collected: Collected, command: str) -> list[Path]:
    """Write all files of a comparison into a folder.

    Returns: the paths of its pictures, relative to the folder.
    """
    for name, cells in _tables(sections).items():
        write(folder / f"{name}.csv", formats.as_csv(cells).encode())
    pictures = []
    for number, s in enumerate(sections):
        plot_folder = folder / "plots" if number == 0 else folder / "plots" / f"group{number + 1}"
        pictures += plots.all_plots(plot_folder, s.rows, s.cells, s.agreed, s.styles, s.disputed, s.images)
    write(folder / "comparison.md", markdown(sections, collected).encode())
    write(folder / "index.html", page(sections, collected, command, __version__).encode())
    about: dict[str, Any] = {"version": __version__, "command": command, "runs": [r.name for r in collected.results]}
    about |= {"left_out": [[str(path), reason] for path, reason in collected.left_out], "warnings": collected.warnings}
    write(folder / MARKER_FILE, (json.dumps(about, indent=2) + "\n").encode())
    return [path.relative_to(folder) for path in pictures]


def _tables(sections: list[Section]) -> dict[str, tables.Cells]:
    """Join the tables of all groups, by the names of their files."""
    return {
        "comparison": [cell for s in sections for cell in s.cells],
        "runs": [cell for s in sections for cell in tables.run_table(s.rows, s.group.title)],
        "differences": [cell for s in sections for cell in s.differing],
        "agreement": [cell for s in sections for cell in s.agreed],
        "classes": [cell for s in sections for cell in tables.class_table(s.rows, s.group.title)],
        "disagreements": [
            cell for s in sections for cell in tables.disagreement_table(s.rows, s.disputed, s.group.title)
        ],
    }


def markdown(sections: list[Section], collected: Collected) -> str:
    """Return the main table of every group in Markdown, with what was left out, for a README or an issue."""
    parts: list[str] = []
    for section in sections:
        title, reason = for_markdown(section.group.title), for_markdown(section.group.reason, LONGEST_LINE)
        parts.append(f"### {title}\n\nRuns on {reason}.\n")
        lines = verdict.answer_lines(section.answers)
        if lines:
            counted, about = verdict.counted(section.answers), verdict.about_margins(section.answers)
            parts.append(f"{for_markdown(counted, LONGEST_LINE)} {about}".rstrip() + "\n")
            parts.append("".join(f"- {for_markdown(line, LONGEST_LINE)}\n" for line in lines))
        parts.append(for_markdown(" ".join(section.sentences), LONGEST_LINE) + "\n")
        parts.append(formats.as_markdown(*formats.display_table(section.cells)))
    parts.append(EXPLAINED + "\n")
    parts += ["".join(f"- {for_markdown(note, LONGEST_LINE)}\n" for note in notes(collected))]
    return "\n".join(parts)


def _said(section: Section) -> list[str]:
    """Return what is printed above the table of a group: the verdict of each row, then the other sentences."""
    lines = verdict.answer_lines(section.answers)
    if len(lines) > MOST_ANSWERS:
        more = len(lines) - MOST_ANSWERS + 1
        lines = [*lines[: MOST_ANSWERS - 1], f"and {more} more rows, in comparison.md and index.html"]
    first, about = verdict.counted(section.answers), verdict.about_margins(section.answers)
    return [text for text in (first, *(f"  {line}" for line in lines), about, *section.sentences) if text]


def show(comparison: Comparison) -> None:
    """Print what came out of every group and its main table, then the warnings and the runs that were left out."""
    out = console(200)
    for section in comparison.sections:
        header, lines, left_out = formats.fitting(*formats.display_table(section.cells), out.width)
        table = Table(title=f"Runs on {section.group.reason}")
        for n, least in enumerate(formats.least_widths(header, lines, out.width)):
            table.add_column(header[n], justify="right" if n else "left", overflow="fold", width=least)
        for line in lines:
            table.add_row(*line)
        for sentence in _said(section):
            out.print(sentence)
        out.print(table)
        if left_out:
            out.print(f"Not shown for lack of room: {'; '.join(left_out)} (comparison.csv has them).")
    out.print("Means over seeds ± half the 95 % t interval over seeds; 95 % over images: paired bootstrap.")
    found = notes(comparison.collected)
    for note in found if len(found) <= MOST_NOTES else found[: MOST_NOTES - 1]:
        out.print(note)
    if len(found) > MOST_NOTES:
        out.print(f"and {len(found) - MOST_NOTES + 1} more warnings and folders left out, at the end of comparison.md")
