"""What came out of a comparison, in sentences: does deciding pay, who is most accurate, who is as good for less.

Nothing is called better that its intervals do not show to be better.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from policyskip.comparison.answers import OLDER, Answer, Margin
from policyskip.comparison.rows import Row
from policyskip.comparison.tables import Cells
from policyskip.rivals import DOES_NOT_PAY, NOT_SHOWN, PAYS

NAMED = 5
"""How many rows a sentence names at most."""
FEW_IMAGES = 500
"""Test images below which one image more or less is seen in an accuracy."""
SAID = {PAYS: "pays", DOES_NOT_PAY: "does not pay", NOT_SHOWN: "is not shown to pay, or not to,"}
"""The answers in sentences, in the order in which rows are counted."""
ABOUT_MARGINS = (
    "Margins are in points of accuracy over the strongest fixed choice of equal cost, with the outer ends of two 95 % "
    "intervals: over seeds, and over images and the choice."
)
"""What the numbers of the lines of answers are."""


def about_margins(answers: Sequence[Answer]) -> str:
    """Return the sentence about margins if there is one to explain; else an empty text."""
    return ABOUT_MARGINS if any(answer.margin for answer in answers) else ""


def in_order(answers: Sequence[Answer]) -> list[Answer]:
    """Sort answers: what pays comes first, what pays against its own network alone second; rows without margin last."""

    def order(answer: Answer) -> tuple[int, bool, float]:
        rank = (PAYS, NOT_SHOWN, DOES_NOT_PAY).index(answer.verdict) if answer.margin else 3
        return rank, answer.other is not None, -answer.margin.mean if answer.margin else 0.0

    return sorted(answers, key=order)


def counted(answers: Sequence[Answer]) -> str:
    """Say for how many rows deciding per image pays, and for how many not; an empty text if no row learned."""
    if not answers:
        return ""
    if len(answers) == 1:
        return f"Deciding per image {SAID[answers[0].verdict]} for {answers[0].row.label}, the one row that learned."
    beaten = sum(answer.verdict == PAYS and answer.other is not None for answer in answers)
    remark = f" ({beaten} of them beaten by a fixed choice over another network)" if beaten else ""
    counts = {verdict: sum(answer.verdict == verdict for answer in answers) for verdict in SAID}
    parts = [
        f"{said} for {counts[verdict]}{remark if verdict == PAYS else ''}"
        for verdict, said in SAID.items()
        if counts[verdict]
    ]
    rows = f"{len(answers)} rows that learned"
    if len(parts) == 1 and not beaten:
        each = "any" if answers[0].verdict == NOT_SHOWN else "all"
        return f"Deciding per image {SAID[answers[0].verdict]} for {each} of the {rows}."
    return f"Of {rows}, deciding per image {_joined(parts)}, against the strongest fixed choice of equal cost."


def answer_lines(answers: Sequence[Answer]) -> list[str]:
    """Write a line for each row that learned, those that pay first; rows of older runs share one line."""
    lines = []
    older: dict[str, list[Row]] = defaultdict(list)
    for answer in in_order(answers):
        if answer.margin is None and answer.because == OLDER:
            older[answer.because].append(answer.row)
        else:
            lines.append(f"{answer.row.label}: {said_of(answer)}")
    lines += [f"{_listed(rows)}: {NOT_SHOWN}: {because} (train anew)" for because, rows in older.items()]
    return lines


def said_of(answer: Answer) -> str:
    """Say an answer with its margin, its reason, and what another network has for the same cost."""
    text = answer.verdict
    if answer.verdict == PAYS and answer.other:
        text += " against the fixed choices of its own network"
    if answer.margin:
        low, high = (f"{100 * end:+z.2f}" for end in answer.margin.ends)
        points = f"{100 * answer.margin.mean:+z.2f} points, {low} to {high}, {seeds_text(answer.margin)}"
        text += f" ({points}, against {rival_text(answer.margin)})"
    text += f": {answer.because}" if answer.because else ""
    return f"{text}; {'but ' if answer.verdict == PAYS else ''}{other_text(answer)}" if answer.other else text


def seeds_text(margin: Margin) -> str:
    """Say how many seeds a margin is the mean of."""
    return f"{margin.seeds} seed{'s'[: margin.seeds > 1]}"


def rival_text(margin: Margin) -> str:
    """Name the rival; where seeds have different ones, say how many have this one."""
    return margin.rival if margin.rival_seeds == margin.seeds else f"{margin.rival} in {margin.rival_seeds} of them"


def other_text(answer: Answer) -> str:
    """Say that a fixed choice over another network is the better buy; an empty text if there is none."""
    other = answer.other
    if other is None:
        return ""
    better = "better" if other.more_accurate else "as accurate"
    cost = "for less" if other.cheaper else "at this cost"
    return f"a fixed choice over {other.name} is {better} {cost} ({_at_cost(other.accuracy, other.macs)})"


def _at_cost(accuracy: float, macs: float) -> str:
    """Write an accuracy and what it costs."""
    return f"{100 * accuracy:.2f} % at {macs / 1e6:.2f} M MACs"


def sentences(rows: Sequence[Row], differing: Cells) -> list[str]:
    """Name the most accurate row of a group, and the cheapest of those that are not shown to be less accurate.

    Args:
        differing: the table of differences between its rows.
    """
    rows = [row for row in rows if not row.oracle]
    if not rows:
        return []
    best = max(rows, key=lambda row: (_accuracy(row), -_macs(row)))
    if len(rows) == 1:
        return [f"{best.label}: {_figures(best)}."]
    alike = [row for row in rows if _percent(row) == _percent(best)]
    best = min(alike, key=_macs)
    sentences = [_first(alike, best, everyone=len(alike) == len(rows))]
    if (len(alike) > 1 or not best.learned) and best.decided and len(best.correct_N) < FEW_IMAGES:
        count = len(best.correct_N)
        sentences.append(f"The test images are few: one of {count} is {100 / count:.2f} points.")
    cheaper = [row for row in rows if _macs(row) < _macs(best)]
    if not cheaper:
        return sentences if len(alike) > 1 else [*sentences, "No other row is cheaper."]
    if as_good := [row for row in cheaper if _overlap(best, row, differing)]:
        cheapest = min(as_good, key=_macs)
        return [
            *sentences,
            f"That it is more accurate than {cheapest.label} ({_figures(cheapest)}) is not shown: "
            "the interval of the difference includes 0.",
        ]
    if all(row.decided for row in rows):
        return [*sentences, "Every cheaper row is less accurate, by intervals over the same images."]
    return [*sentences, "Which rows are as good for less is not known."]


def _first(alike: Sequence[Row], best: Row, everyone: bool) -> str:
    """Name the most accurate rows, and the cheapest of them; ``everyone`` says that there are no others."""
    remark = "" if best.learned else ", which learned nothing"
    if len(alike) == 1:
        return f"Most accurate is {best.label}{remark}: {_figures(best)}."
    who = f"All {len(alike)} rows are equally accurate" if everyone else f"Most accurate are {_listed(alike)}, alike"
    cost = f"{_share(best)} of its network's MACs"
    if all(_macs(row) <= _macs(best) * (1 + 1e-9) for row in alike):
        return f"{who}: {_percent(best)}; they cost the same, {cost}."
    return f"{who}: {_percent(best)}; the cheapest of them is {best.label}{remark}, at {cost}."


def _overlap(best: Row, other: Row, differing: Cells) -> bool:
    """Return whether the paired interval of two rows' difference in accuracy includes 0; False if it is not known."""
    pair = {best.label, other.label}
    return any(
        cell["images_low"] <= 0 <= cell["images_high"] for cell in differing if {cell["row"], cell["less"]} == pair
    )


def _accuracy(row: Row) -> float:
    return row.mean("accuracy") or 0.0


def _macs(row: Row) -> float:
    return row.mean("macs_mean") or 0.0


def _percent(row: Row) -> str:
    return f"{100 * _accuracy(row):.2f} %"


def _share(row: Row) -> str:
    return f"{row.mean('macs_fraction'):.3f}"


def _figures(row: Row) -> str:
    return f"{_percent(row)} at {_share(row)} of its network's MACs"


def _listed(rows: Sequence[Row]) -> str:
    """List the labels of rows; of many, the first, and how many more there are."""
    labels = [row.label for row in rows]
    if len(labels) > NAMED:
        labels = [*labels[: NAMED - 1], f"{len(labels) - NAMED + 1} more"]
    return _joined(labels)


def _joined(texts: Sequence[str]) -> str:
    """Join texts by commas and, before the last, by "and"."""
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)
