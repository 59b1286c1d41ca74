"""What came out of a comparison, in sentences: who is most accurate, who is as good for less, does deciding pay.

Nothing is called better that its intervals do not show to be better.
"""

from __future__ import annotations

from collections.abc import Sequence

from policyskip.comparison.tables import Cells, Row
from policyskip.intervals import mean_and_half_interval

NAMED = 3
"""How many rows a sentence names."""


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
    sentence = f"Most accurate is {best.label}: {_figures(best)}."
    as_good = [row for row in rows if row is not best and _macs(row) < _macs(best) and _overlap(best, row, differing)]
    if as_good:
        cheapest = min(as_good, key=_macs)
        return [
            sentence,
            f"That it is more accurate than {cheapest.label} ({_figures(cheapest)}) is not shown: "
            "the interval of the difference includes 0.",
        ]
    cheaper = any(_macs(row) < _macs(best) for row in rows)
    known = all(row.decided for row in rows)
    if not cheaper:
        return [sentence, "No other row is cheaper."]
    end = "every cheaper row is less accurate" if known else "which rows are as good for less is not known"
    return [sentence, f"{end[0].upper()}{end[1:]}{', by intervals over the same images' if known else ''}."]


def _overlap(best: Row, other: Row, differing: Cells) -> bool:
    """Return whether the paired interval of two rows' difference in accuracy includes 0; False if it is not known."""
    pair = {best.label, other.label}
    return any(
        cell["images_low"] <= 0 <= cell["images_high"] for cell in differing if {cell["row"], cell["less"]} == pair
    )


def _deciding(rows: Sequence[Row]) -> list[str]:
    """Say of how many rows deciding per image is shown to be better, or worse, than the best fixed choice."""
    found: dict[str, list[str]] = {"better": [], "worse": [], "open": []}
    for row in rows:
        if row.results[0].summary.get("steps") != 0 and (answer := against_fixed(row)):  # 0: it learns nothing
            found[answer].append(row.label)
    count = sum(map(len, found.values()))
    if not count:
        return []
    texts = {"better": "better", "worse": "worse", "open": "not shown to be better or worse"}
    parts = [f"{texts[name]} for {len(labels)}{_named(labels)}" for name, labels in found.items() if labels]
    of = f" of {count} rows that learned" if count > 1 else ""
    return [f"Against the best fixed choice of equal cost, deciding per image is {', '.join(parts)}{of}."]


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


def _figures(row: Row) -> str:
    share = row.mean("macs_fraction")
    return f"{100 * _accuracy(row):.2f} % at {share:.3f} of its network's MACs"


def _named(labels: Sequence[str]) -> str:
    """Return the first labels in brackets."""
    return f" ({', '.join(labels[:NAMED])}{', …' if len(labels) > NAMED else ''})"
