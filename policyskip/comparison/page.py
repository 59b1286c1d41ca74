"""The page of a comparison is one HTML file with tables, interactive figures and images, which loads no other file."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from policyskip.comparison import figures
from policyskip.comparison.answers import Answer
from policyskip.comparison.collect import Collected
from policyskip.comparison.figures import Figure
from policyskip.comparison.formats import display_table
from policyskip.comparison.groups import Group
from policyskip.comparison.rows import Row
from policyskip.comparison.series import Style, front_of, gallery
from policyskip.comparison.tables import Cells
from policyskip.comparison.verdict_page import verdict_html
from policyskip.texts import LONGEST_LINE, for_html

EXPLAINED = (
    "Means over seeds ± half the 95 % t interval over seeds; accuracy in percent, changes and margins in points. The "
    "interval over images is a paired bootstrap against each run's full network on the same test images. The rival is "
    "the strongest fixed choice of equal cost, chosen on validation images. The margin is the accuracy above it, with "
    "the outer ends of the intervals over seeds and over images. The oracle sees the label: a policy cannot, and part "
    "of the oracle's gain is luck."
)
"""What stands below a main table."""
SIDE = 48
"""The largest width and height of an example image, in pixels."""


@dataclass(frozen=True)
class Section:
    """Holds everything that the page and the files say of one group of runs.

    Attributes:
        group: the runs.
        rows: the runs of each setting.
        answers: whether deciding per image pays, for the rows that learned.
        cells, agreed, differing: the tables of figures, of agreement and of differences.
        styles: of the rows, by label.
        disputed: indices of the test images on which rows disagree most.
        pool: indices of the test images from which galleries choose.
        images: test images by index, uint8 (H, W, 3); ``disputed`` and ``pool``, or none.
        no_images: why there are none, or "".
        sentences: what else came out.
    """

    group: Group
    rows: list[Row]
    answers: list[Answer]
    cells: Cells
    agreed: Cells
    differing: Cells
    styles: dict[str, Style]
    disputed: list[int]
    pool: list[int]
    images: dict[int, NDArray[np.uint8]]
    no_images: str
    sentences: list[str]


def page(sections: Sequence[Section], collected: Collected, command: str, version: str) -> str:
    """Write the page, which holds Plotly, figures and images; a content security policy in it forbids all requests."""
    from plotly.offline import get_plotlyjs

    groups, body, thumbnails = [], [], {}
    for n, section in enumerate(sections):
        name = f"g{n}"
        drawings = _figures(section, name)
        thumbnails[name] = {index: _data_uri(image) for index, image in section.images.items()}
        galleries = {r.name: gallery(r, section.pool) for row in section.rows for r in row.results}
        front = front_of(section.cells)
        opened_run = section.rows[front[-1]].results[0].name if front else None
        groups.append(
            {"id": name, "figures": drawings, "galleries": galleries, "images": name, "first": opened_run}
            | ({"no_gallery": section.no_images} if section.no_images else {})
        )
        body.append(_section(section, name, drawings, thumbnails[name]))
    content = json.dumps(
        {"groups": groups, "images": thumbnails}, ensure_ascii=True, allow_nan=False, separators=(",", ":")
    )
    policy = "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    count = len(collected.results)
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">',
            f"<title>policyskip: {count} runs compared</title><style>{_asset('page.css')}</style></head><body>",
            f"<h1>{count} run{'s'[: count > 1]} compared</h1>",
            f'<p class="faint">policyskip {for_html(version)} · <code>{for_html(command, LONGEST_LINE)}</code></p>',
            _summary_of_notes(collected),
            *body,
            _notes(collected),
            f'<script type="application/json" id="content">{_safe(content)}</script>',
            f"<script>{get_plotlyjs()}</script><script>{_asset('page.js')}</script></body></html>\n",
        ]
    )


def _figures(section: Section, name: str) -> list[Figure]:
    """Draw the figures of a group, each with an id on the page; those without data are left out."""
    drawings = [
        figures.pareto_front(section.rows, section.cells, section.styles),
        figures.differences(section.rows, section.differing),
        figures.learning_curves(section.rows, section.styles),
        figures.block_use(section.rows),
        figures.exit_use(section.rows, section.styles),
        figures.agreement(section.rows, section.agreed),
    ]
    return [figure | {"id": f"{name}-{n}"} for n, figure in enumerate(f for f in drawings if f is not None)]


def _section(section: Section, name: str, drawings: Sequence[Figure], images: dict[int, str]) -> str:
    """Write the HTML of one group; ``images`` are data URIs by index."""
    title, reason = for_html(section.group.title), for_html(section.group.reason, LONGEST_LINE)
    parts = [f"<h2>{title}</h2>", f'<p class="note">Runs on {reason}.</p>']
    parts.append(verdict_html(section.answers))
    parts.append(f'<p class="said">{for_html(" ".join(section.sentences), LONGEST_LINE)}</p>')
    parts.append(_table(section.cells))
    parts.append(f'<p class="note">{EXPLAINED} In bold: the Pareto front. Click a heading to sort.</p>')
    for n, figure in enumerate(drawings):
        parts.append(
            f'<h3>{for_html(figure["title"])}</h3><p class="note">{for_html(figure["note"], LONGEST_LINE)}</p>'
        )
        parts.append(f'<div class="plot" id="{figure["id"]}"></div>')
        if n == 0:
            parts.append(f'<div class="gallery" id="{name}-gallery"></div>')
    parts.append(_disputed(section, images))
    return "\n".join(parts)


def _table(cells: Cells) -> str:
    """Write the HTML of the main table, with the rows on the Pareto front marked."""
    header, lines = display_table(cells)
    head = "".join(f"<th>{for_html(column)}</th>" for column in header)
    front = {cells[n]["row"] for n in front_of(cells)}
    body = []
    for cell, line in zip(cells, lines, strict=True):
        mark = ' class="front"' if cell["row"] in front else ""
        body.append(f"<tr{mark}>{''.join(f'<td>{for_html(text)}</td>' for text in line)}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _disputed(section: Section, images: dict[int, str]) -> str:
    """Write the HTML of the images on which rows disagree most, with the rows that are right and wrong on each."""
    decided = [row for row in section.rows if row.decided]
    cards = []
    for index in section.disputed:
        if index not in images:
            continue
        decisions = decided[0].decisions[0]
        parts = _right_and_wrong(decided, index)
        title = "; ".join(f"{kind}: {', '.join(labels)}" for kind, labels in parts.items())
        text = "<br>".join(
            f'<span class="{kind.replace(" ", "-")}">{len(labels)} {kind}</span>: {for_html(_few(labels))}'
            for kind, labels in parts.items()
        )
        label = for_html(decisions.classes[int(decisions.label_N[index])])
        picture = f'<img src="{images[index]}" alt="test image {index}">'
        cards.append(
            f'<div class="card wide" title="{for_html(title)}">{picture}<b>{label}</b> (image {index})<br>{text}</div>'
        )
    if not cards:
        return ""
    note = "First the images on which about half of the rows are right; then those on which rows spend differently."
    if any(len(row.results) > 1 for row in decided):
        note += " A row is right, or wrong, where all its seeds are."
    return f'<h3>Images they disagree on</h3><p class="note">{note}</p><div class="cards">{"".join(cards)}</div>'


def _right_and_wrong(rows: Sequence[Row], index: int) -> dict[str, list[str]]:
    """Sort the labels of rows by whether all seeds, some or none are right on an image; no list is empty."""
    found: dict[str, list[str]] = {"right": [], "right in some seeds": [], "wrong": []}
    for row in rows:
        share = row.correct_N[index]
        found["right" if share == 1 else "right in some seeds" if share > 0 else "wrong"].append(row.label)
    return {kind: labels for kind, labels in found.items() if labels}


def _few(labels: list[str], count: int = 3) -> str:
    """Join the first ``count`` labels, and say how many more there are."""
    return ", ".join(labels[:count]) + (f" and {len(labels) - count} more" if len(labels) > count else "")


def notes(collected: Collected) -> list[str]:
    """Return the warnings of a comparison, and which folders were left out and why, a line each."""
    warnings = [f"warning: {text}" for text in collected.warnings]
    return [*warnings, *(f"left out: {folder} {reason}" for folder, reason in collected.left_out)]


def _summary_of_notes(collected: Collected) -> str:
    """Write the HTML of a line that says how many notes stand at the end of the page."""
    warnings, left_out = len(collected.warnings), len(collected.left_out)
    texts = [f"{warnings} warning{'s'[: warnings > 1]}"] if warnings else []
    texts += [f"{left_out} folder{'s'[: left_out > 1]} left out"] if left_out else []
    return f'<p class="faint">{" and ".join(texts)}: see the end of the page.</p>' if texts else ""


def _notes(collected: Collected) -> str:
    """Write the HTML of warnings, and of runs that were left out."""
    lines = [f"<li>{for_html(note, LONGEST_LINE)}</li>" for note in notes(collected)]
    return f'<h2>Warnings and what was left out</h2><ul class="notes">{"".join(lines)}</ul>' if lines else ""


def _data_uri(image: NDArray[np.uint8]) -> str:
    """Write an image, uint8 (H, W, 3), as the data URI of a small PNG."""
    picture = Image.fromarray(image)
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _safe(text: str) -> str:
    """Escape JSON so that an HTML script element can hold it, whatever the names of runs are."""
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _asset(name: str) -> str:
    """Read one of this folder's own files, ``page.css`` or ``page.js``."""
    return files("policyskip.comparison").joinpath(name).read_text(encoding="utf-8")
