"""What came out of a comparison, in sentences: who is most accurate, who is as good for less, does deciding pay.

Nothing is called better that its intervals do not show to be better.
"""

from __future__ import annotations

from collections.abc import Sequence

from policyskip.comparison.tables import Cells, Row
from policyskip.intervals import mean_and_half_interval

NAMED = 5
"""How many rows a sentence names at most."""
FEW_IMAGES = 500
"""Test images below which one image more or less is seen in an accuracy."""


def verdict(rows: Sequence[Row], differing: Cells) -> list[str]:
    """Say in sentences what came out of a group.

    Args:
        differing: the table of differences between its rows.
    """
    honest = [row for row in rows if not row.oracle]
    return [*_most_accurate(honest, differing), *_deciding(honest)]


def _most_accurate(rows: Sequence[Row], differing: Cells) -> list[str]:
    """Name the most accurate row, and the cheapest of those that are not shown to be less accurate."""
    if not rows:
        return []
    best = max(rows, key=lambda row: (_accuracy(row), -_macs(row)))
    if len(rows) == 1:
        return [f"{best.label}: {_figures(best)}."]
    alike = [row for row in rows if _percent(row) == _percent(best)]
    best = min(alike, key=_macs)
    sentences = [_first(alike, best, everyone=len(alike) == len(rows))]
    if (len(alike) > 1 or not _learned(best)) and best.decided and len(best.correct_N) < FEW_IMAGES:
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
    remark = "" if _learned(best) else ", which learned nothing"
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


def _deciding(rows: Sequence[Row]) -> list[str]:
    """Say of which rows deciding per image is shown to be better, or worse, than the best fixed choice."""
    learned = [row for row in rows if _learned(row)]
    answers = [(row, answer) for row in learned if (answer := against_fixed(row))]
    if not answers:
        return []
    known = "learned" if len(answers) == len(learned) else "learned and were compared with it"
    texts = {"better": "better", "worse": "worse", "open": "not shown to be better or worse"}
    found = {answer: [row for row, its in answers if its == answer] for answer in texts}
    parts = [f"{texts[answer]} for {len(its)} ({_listed(its)})" for answer, its in found.items() if its]
    if len(answers) == 1:
        ((row, answer),) = answers
        said = f"{texts[answer]} for {row.label}, the one row that {known.replace('were', 'was')}"
    elif len(parts) > 1:
        said = f"{', '.join(parts)} of {len(answers)} rows that {known}"
    else:
        answer = answers[0][1]
        each = "any of the" if answer == "open" else "all"
        said = f"{texts[answer]} for {each} {len(answers)} rows that {known}"
    return [f"Against the best fixed choice of equal cost, deciding per image is {said}."]


def _learned(row: Row) -> bool:
    return row.results[0].summary.get("steps") != 0


def against_fixed(row: Row) -> str | None:
    """Compare a row with the best fixed choice of its cost: "better", "worse" or "open"; None if that is not known.

    Both intervals have to confirm it: over seeds, if there are several, and over images, where the runs state it.
    """
    margins, halves = row.values("static_margin"), row.values("static_margin_ci95")
    if not margins:
        return None
    mean, over_seeds = mean_and_half_interval(margins)
    known = [half for half in (over_seeds, sum(halves) / len(halves) if halves else None) if half is not None]
    if not known or abs(mean) <= max(known):
        return "open"
    return "better" if mean > 0 else "worse"


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
    return " and ".join([", ".join(labels[:-1]), labels[-1]] if len(labels) > 1 else labels)
