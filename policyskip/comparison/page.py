"""One HTML file that holds a whole comparison: tables, interactive figures, example images, and no link to anywhere."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

from PIL import Image

from policyskip.comparison import figures
from policyskip.comparison.collect import Collected, Group
from policyskip.comparison.figures import Figure
from policyskip.comparison.series import Style, front_of, gallery
from policyskip.comparison.tables import Cells, Row, shown

SIDE = 48
"""Pixels of an example image's longer side, at most."""


@dataclass(frozen=True)
class Section:
    """What the page says of one group. ``images`` are test images by their place, uint8 (H, W, 3); ``no_images`` says
    why there are none."""

    group: Group
    rows: list[Row]
    cells: Cells
    agreed: Cells
    differing: Cells
    look: dict[str, Style]
    divisive: list[int]
    pool: list[int]
    images: dict[int, Any]
    no_images: str


def page(sections: Sequence[Section], collected: Collected, command: str, version: str) -> str:
    """The page. Everything is in it: Plotly, figures and images; a policy in its head forbids requests."""
    from plotly.offline import get_plotlyjs

    groups, body, thumbnails = [], [], {}
    for n, section in enumerate(sections):
        name = f"g{n}"
        drawn = _figures(section, name)
        thumbnails[name] = {place: _data_uri(image) for place, image in section.images.items()}
        galleries = {r.name: gallery(r, section.pool) for row in section.rows for r in row.results}
        first = section.rows[front_of(section.cells)[-1]].results[0].name if front_of(section.cells) else None
        groups.append(
            {"id": name, "figures": drawn, "galleries": galleries, "images": name, "first": first}
            | ({"no_gallery": section.no_images} if section.no_images else {})
        )
        body.append(_section(section, name, drawn, thumbnails[name]))
    content = json.dumps(
        {"groups": groups, "images": thumbnails}, ensure_ascii=False, allow_nan=False, separators=(",", ":")
    )
    policy = "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    count = len(collected.results)
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">',
            f"<title>policyskip: {count} runs compared</title><style>{_ours('page.css')}</style></head><body>",
            f"<h1>{count} run{'s'[: count > 1]} compared</h1>",
            f'<p class="faint">policyskip {escape(version)} · <code>{escape(command)}</code></p>',
            _told(collected),
            *body,
            f'<script type="application/json" id="content">{_safe(content)}</script>',
            f"<script>{get_plotlyjs()}</script><script>{_ours('page.js')}</script></body></html>\n",
        ]
    )


def _figures(section: Section, name: str) -> list[Figure]:
    drawn = [
        figures.pareto_front(section.rows, section.cells, section.look),
        figures.differences(section.rows, section.differing),
        figures.learning_curves(section.rows, section.look),
        figures.block_use(section.rows),
        figures.exit_use(section.rows, section.look),
        figures.agreement(section.rows, section.agreed),
    ]
    return [figure | {"id": f"{name}-{n}"} for n, figure in enumerate(f for f in drawn if f is not None)]


def _section(section: Section, name: str, drawn: Sequence[Figure], images: dict[int, str]) -> str:
    parts = [f"<h2>{escape(section.group.title)}</h2>", f'<p class="note">Runs on {escape(section.group.reason)}.</p>']
    parts.append(_table(section.cells))
    parts.append(
        '<p class="note">Means over seeds ± half the 95 % t interval over seeds; the change to the full network also '
        "with its paired bootstrap interval over images. The fixed choice is the best one of equal cost over the run's "
        "own network. In bold: the Pareto front. Click a heading to sort.</p>"
    )
    for n, figure in enumerate(drawn):
        parts.append(f'<h3>{escape(figure["title"])}</h3><p class="note">{escape(figure["note"])}</p>')
        parts.append(f'<div class="plot" id="{figure["id"]}"></div>')
        if n == 0:
            parts.append(f'<div class="gallery" id="{name}-gallery"></div>')
    parts.append(_divisive(section, images))
    return "\n".join(parts)


def _table(cells: Cells) -> str:
    header, told = shown(cells)
    head = "".join(f"<th>{escape(column)}</th>" for column in header)
    front = {cells[n]["row"] for n in front_of(cells)}
    lines = []
    for cell, line in zip(cells, told, strict=True):
        mark = ' class="front"' if cell["row"] in front else ""
        lines.append(f"<tr{mark}>{''.join(f'<td>{escape(text)}</td>' for text in line)}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _divisive(section: Section, images: dict[int, str]) -> str:
    """The images that divide the rows most, and who is right on each."""
    known = [row for row in section.rows if row.decided]
    cards = []
    for place in section.divisive:
        if place not in images:
            continue
        decided = known[0].results[0].decisions
        assert decided is not None
        right = [row.label for row in known if row.correct_N[place] >= 0.5]
        wrong = [row.label for row in known if row.correct_N[place] < 0.5]
        title = f"right: {', '.join(right) or 'none'}; wrong: {', '.join(wrong) or 'none'}"
        told = f'<span class="right">{len(right)} right</span>: {escape(_few(right))}<br>'
        told += f'<span class="wrong">{len(wrong)} wrong</span>: {escape(_few(wrong))}'
        label = escape(decided.classes[int(decided.label_N[place])])
        picture = f'<img src="{images[place]}" alt="test image {place}">'
        cards.append(
            f'<div class="card wide" title="{escape(title)}">{picture}<b>{label}</b> (image {place})<br>{told}</div>'
        )
    if not cards:
        return ""
    note = "Those on which about half are right; then those on which some spend much and others little."
    return f'<h3>Images they disagree on</h3><p class="note">{note}</p><div class="cards">{"".join(cards)}</div>'


def _few(labels: list[str], count: int = 3) -> str:
    return ", ".join(labels[:count]) + (", …" if len(labels) > count else "")


def _told(collected: Collected) -> str:
    lines = [f'<li class="warning">{escape(text)}</li>' for text in collected.warnings]
    lines += [f"<li>left out: {escape(str(folder))} {escape(reason)}</li>" for folder, reason in collected.left_out]
    return f'<ul class="told">{"".join(lines)}</ul>' if lines else ""


def _data_uri(image: Any) -> str:
    """A small PNG of an image, uint8 (H, W, 3)."""
    picture = Image.fromarray(image)
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _safe(text: str) -> str:
    """JSON that a script element can hold, whatever the runs are called."""
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _ours(name: str) -> str:
    return files("policyskip.comparison").joinpath(name).read_text(encoding="utf-8")
