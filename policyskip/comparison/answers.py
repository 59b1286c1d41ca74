"""Whether deciding per image pays, for each row that learned: pays, does not pay or not shown, and why.

A run's summary compares its policy with the strongest fixed choice of equal cost, the *rival*. A row compares an agent,
so it needs two seeds at least, and two intervals have to agree: over seeds, and over images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from policyskip.comparison.collect import LONGEST_NAME, Result
from policyskip.comparison.fixed_lines import FixedLine, fixed_lines, network_of
from policyskip.comparison.headroom import oracle_share
from policyskip.comparison.rows import Row
from policyskip.intervals import mean_and_half_interval
from policyskip.rivals import DOES_NOT_PAY, NOT_SHOWN, PAYS
from policyskip.texts import one_line

OLDER = "judged by an older version"
"""The reason for the answer of a row whose runs have no verdict."""
UNFINISHED = "the search for fixed choices is unfinished"
"""The reason for the answer of a row whose rival may be weak, because its search was cut off."""
CLEARLY_LESS = 0.9
"""What costs less than this share of a row's MACs costs clearly less."""
KEYS = {"name": "rival", "margin": "rival_margin", "low": "rival_low", "high": "rival_high"}
"""Keys of a rival in the list ``test/rivals`` of a summary, and those of the rival that the summary names."""


@dataclass(frozen=True)
class Margin:
    """Holds the accuracy of a row minus that of a rival of equal cost, as a fraction of the images.

    Attributes:
        rival: the rival that most seeds have.
        rival_seeds: how many seeds have it.
        seeds: how many seeds there are.
        mean: over seeds.
        t95: half the 95 % interval over seeds, by Student's t; None for one seed.
        low, high: ends of the 95 % interval over images, means over seeds; they count the choice of the rival, too.
    """

    rival: str
    rival_seeds: int
    seeds: int
    mean: float
    t95: float | None
    low: float
    high: float

    @property
    def ends(self) -> tuple[float, float]:
        """Return the outer ends of both intervals, or of that over images if there is one seed."""
        half = self.t95 or 0.0
        return min(self.low, self.mean - half), max(self.high, self.mean + half)

    @property
    def above(self) -> bool:
        """Return whether both intervals lie above 0."""
        return self.t95 is not None and self.ends[0] > 0

    @property
    def below(self) -> bool:
        """Return whether both intervals lie below 0."""
        return self.t95 is not None and self.ends[1] < 0

    @property
    def open_intervals(self) -> list[str]:
        """Return over what the intervals are that include 0: "seeds", "images", both or none."""
        over_seeds = self.t95 is not None and abs(self.mean) <= self.t95
        return ["seeds"] * over_seeds + ["images"] * (self.low <= 0 <= self.high)


@dataclass(frozen=True)
class OtherNetwork:
    """Holds a fixed choice over another network of the group that is the better buy than a row.

    Attributes:
        name: of the network.
        macs, accuracy: of the choice, on the test images.
        more_accurate: whether it is clearly more accurate than the row, and costs no more; else it is as accurate, and
            costs clearly less.
        cheaper: whether it costs clearly less than the row.
    """

    name: str
    macs: float
    accuracy: float
    more_accurate: bool
    cheaper: bool


@dataclass(frozen=True)
class Answer:
    """Holds what the runs of a row say of deciding per image.

    Attributes:
        row: the row.
        verdict: ``PAYS``, ``NOT_SHOWN`` or ``DOES_NOT_PAY``.
        because: the reasons why it is not shown; "" for the other answers.
        margin: against the rival by which the answer was found; None where runs of the row have no rival.
        other: a fixed choice over another network of the group that is the better buy; None if there is none.
        oracle_share: the row's share of what an oracle over its network gains; None if it is not known.
    """

    row: Row
    verdict: str
    because: str = ""
    margin: Margin | None = None
    other: OtherNetwork | None = None
    oracle_share: float | None = None


def answers_of(rows: Sequence[Row]) -> list[Answer]:
    """Find the answer for each row of a group that learned something and does not see the label, in their order."""
    lines = fixed_lines(rows)
    answers = []
    for row in rows:
        if row.oracle or not row.learned:
            continue
        verdict, because, margin = _judged(row)
        share = oracle_share(row, margin.mean, rows) if margin else None
        other = _other_network(row, margin, lines) if margin else None
        answers.append(Answer(row, verdict, because, margin, other, share))
    return answers


def _judged(row: Row) -> tuple[str, str, Margin | None]:
    """Find a row's answer, the reasons where it is not shown, and the margin that decides.

    A row has to be above every family of rivals, and one that is above it is enough for "does not pay", if a run says
    so, too: runs of too few images never do.
    """
    older = [result for result in row.results if result.figure("verdict") is None]
    if older:
        some = "" if len(older) == len(row.results) else f"{len(older)} of {len(row.results)} runs were "
        return NOT_SHOWN, some + OLDER, None
    if any(map(_has_no_interval, row.results)):
        because = next(result.figure("verdict_because") for result in row.results if _has_no_interval(result))
        return NOT_SHOWN, one_line(because or "a run has no rival"), None
    margins = _margins(row)
    denied = any(result.figure("verdict") == DOES_NOT_PAY for result in row.results)
    for margin in margins:
        if margin.below and denied:
            return DOES_NOT_PAY, "", margin
    undecided = next((margin for margin in margins if not margin.above), None)
    reasons = ["one seed"] if len(row.results) == 1 else []
    reasons += _doubts(row)
    if undecided is not None and (over := undecided.open_intervals):
        plural = len(over) > 1
        reasons.append(f"the interval{'s'[:plural]} over {' and over '.join(over)} include{'s'[plural:]} 0")
    if undecided is not None and not reasons:
        reasons.append("the intervals over seeds and over images contradict each other")
    return NOT_SHOWN if reasons else PAYS, "; ".join(reasons), undecided or margins[0]


def _named(result: Result) -> dict[str, Any]:
    """Return the rival that a run names, in the form of a line of ``test/rivals``."""
    return {name: result.figure(key) for name, key in KEYS.items()}


def _margins(row: Row) -> list[Margin]:
    """Return a row's margins above each family of rivals, the one with the lowest end over images first.

    A family is compared with over all runs of the row. Where runs have families that others lack, the margins above the
    rival that each run names count as well.
    """
    by_family: list[dict[str, dict[str, Any]]] = [
        {
            str(line["family"]): line
            for line in reversed(result.figure("rivals") or ())
            if None not in (line["low"], line["high"])
        }
        for result in row.results
    ]  # of two runs of one name, the stronger rival counts, which is listed first
    common = [family for family in by_family[0] if all(family in known for known in by_family)]
    margins = [_margin([known[family] for known in by_family]) for family in common]
    if not common or any(len(known) > len(common) for known in by_family):
        margins.append(_margin([_named(result) for result in row.results]))
    return sorted(margins, key=lambda margin: margin.low)


def _margin(rivals: Sequence[dict[str, Any]]) -> Margin:
    """Return a row's margin above one rival of each of its runs."""
    ((name, count),) = Counter(str(rival["name"]) for rival in rivals).most_common(1)
    mean, half = mean_and_half_interval([float(rival["margin"]) for rival in rivals])
    low, high = (sum(float(rival[end]) for rival in rivals) / len(rivals) for end in ("low", "high"))
    return Margin(one_line(name, LONGEST_NAME), count, len(rivals), mean, half, low, high)


def _doubts(row: Row) -> list[str]:
    """Return why runs of a row give no answer although their intervals may: such as that a search was cut off.

    A reason that does not hold for all runs says for how many it does.
    """
    count = Counter(doubt for result in row.results if (doubt := _doubt(result)))
    runs = len(row.results)
    return [doubt if holds == runs else f"{doubt} in {holds} of {runs} runs" for doubt, holds in count.items()]


def _doubt(result: Result) -> str:
    """Return why a run's answer is open, other than that its interval includes 0; "" if there is no such reason."""
    if result.figure("rival_finished") is not True:
        return UNFINISHED
    includes_0 = result.figure("rival_low") <= 0 <= result.figure("rival_high")
    if result.figure("verdict") == NOT_SHOWN and not includes_0:
        return one_line(result.figure("verdict_because") or "a run gives no reason")
    return ""


def _has_no_interval(result: Result) -> bool:
    """Return whether a run has no rival, or no interval, as of a single test image."""
    return None in _named(result).values()


def _other_network(row: Row, margin: Margin, lines: Sequence[FixedLine]) -> OtherNetwork | None:
    """Find the best fixed choice over another network that is the better buy than a row.

    Either it costs no more and is more accurate by more than half the row's interval over images, or it is as accurate
    for less than ``CLEARLY_LESS`` of the cost. Choices that were made on the test images do not count.
    """
    accuracy, macs = row.mean("accuracy"), row.mean("macs_mean")
    assert accuracy is not None and macs is not None  # every summary has them
    own, needed = network_of(row), accuracy + max(margin.high - margin.mean, 0.0)
    found = []
    for line in lines:
        if line.network == own or not line.on_validation:
            continue
        dearest, cheapest = line.at(macs), line.reaching(accuracy)
        if dearest is not None and dearest[1] > needed:
            found.append(OtherNetwork(line.name, *dearest, True, dearest[0] < CLEARLY_LESS * macs))
        elif cheapest is not None and cheapest[0] < CLEARLY_LESS * macs:
            found.append(OtherNetwork(line.name, *cheapest, False, True))
    return max(found, key=lambda other: (other.more_accurate, other.accuracy, -other.macs), default=None)
