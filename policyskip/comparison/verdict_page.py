"""The verdicts of a group as HTML: a coloured table that needs no script, with a picture of each margin's interval."""

from __future__ import annotations

from collections.abc import Sequence

from policyskip.comparison.answers import OLDER, Answer, Margin
from policyskip.comparison.formats import margin_text
from policyskip.comparison.verdict import about_margins, counted, in_order, other_text, rival_text
from policyskip.rivals import DOES_NOT_PAY, NOT_SHOWN, PAYS
from policyskip.texts import LONGEST_LINE, for_html

COLUMNS = (
    "row",
    "deciding per image",
    "margin, points",
    "",
    "runs",
    "strongest fixed choice of equal cost",
    "remarks",
)
"""Headings; the column without one holds the pictures of the intervals."""
CLASSES = {PAYS: "pays", DOES_NOT_PAY: "loses", NOT_SHOWN: "open"}
"""The class of a verdict in ``page.css``."""
MOST_POINTS = 0.05
"""The largest distance from 0 that the pictures show, as a fraction of the images; what is farther out ends there."""
HALF, HEIGHT = 70, 14
"""Half the width and the height of a picture, in pixels."""


def verdict_html(answers: Sequence[Answer]) -> str:
    """Write the HTML of what a group's rows say of deciding per image; an empty text if no row learned."""
    if not answers:
        return ""
    ends = [abs(end) for answer in answers if answer.margin for end in answer.margin.ends]
    scale = min(max(ends, default=MOST_POINTS), MOST_POINTS) or MOST_POINTS
    head = "".join(f"<th>{for_html(column)}</th>" for column in COLUMNS)
    body = "".join(_line(answer, scale) for answer in in_order(answers))
    older = " Train runs anew that were judged by an older version." if any(map(_is_older, answers)) else ""
    return (
        f'<p class="verdict">{for_html(counted(answers), LONGEST_LINE)}</p>'
        f'<div class="scroll"><table class="verdicts"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f'<p class="note">{about_margins(answers)}{older}</p>'
    )


def _is_older(answer: Answer) -> bool:
    """Return whether runs of a row have no verdict."""
    return answer.because.endswith(OLDER)


def _line(answer: Answer, scale: float) -> str:
    """Write the line of one row."""
    margin = answer.margin
    remarks = [answer.because, other_text(answer)]
    kind = "partly" if answer.verdict == PAYS and answer.other else CLASSES[answer.verdict]
    word = f"{answer.verdict}, own network" if kind == "partly" else answer.verdict
    cells = [
        for_html(answer.row.label),
        f'<span class="answer {kind}">{word}</span>',
        for_html(margin_text(margin.mean, margin.ends)) if margin else "–",
        _picture(margin, scale, kind) if margin else "",
        str(len(answer.row.results)),
        for_html(rival_text(margin)) if margin else "–",
        for_html("; ".join(filter(None, remarks)), LONGEST_LINE),
    ]
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _picture(margin: Margin, scale: float, kind: str) -> str:
    """Draw a margin as a point on its interval, beside the line of 0; all pictures of a table have one scale."""

    def place(value: float) -> str:
        return f"{HALF + (HALF - 5) * max(-1.0, min(1.0, value / scale)):.1f}"

    (low, high), middle = map(place, margin.ends), HEIGHT // 2
    return (
        f'<svg class="interval {kind}" width="{2 * HALF}" height="{HEIGHT}" aria-hidden="true">'
        f'<line class="zero" x1="{HALF}" y1="0" x2="{HALF}" y2="{HEIGHT}"/>'
        f'<line x1="{low}" y1="{middle}" x2="{high}" y2="{middle}"/>'
        f'<circle cx="{place(margin.mean)}" cy="{middle}" r="3.5"/></svg>'
    )
