"""Targets that thresholds have to meet, and the point of a curve that meets one.

Shapes: P points on a curve.
"""

from __future__ import annotations

import math

from policyskip.errors import UserError
from policyskip.exits.calibration import Curve, Point

WINDOW = 0.01
"""Fraction of the full cost that a more accurate point may leave unspent of a budget."""


class UnmetError(UserError):
    """An error that says that no threshold meets the target.

    Args:
        target: the target, as text.
        nearest: the nearest target that can be met, as text.
        point: the point that meets the nearest target.

    Attributes:
        nearest: that point.
    """

    def __init__(self, target: str, nearest: str, point: Point) -> None:
        super().__init__(f"no threshold meets {target} on validation; the nearest that can be met is {nearest}")
        self.nearest = point


def check_target(accuracy_drop: float | None, macs_fraction: float | None, knee: bool) -> None:
    """Check that there is one target, and that it is in range.

    Raises:
        UserError: there are none or several, or it is out of range.
    """
    if (accuracy_drop is not None) + (macs_fraction is not None) + knee != 1:
        raise UserError(
            "give one target: target.accuracy_drop=…, target.macs_fraction=… or target.knee=true; "
            f"got accuracy_drop {accuracy_drop}, macs_fraction {macs_fraction} and knee {str(knee).lower()}"
        )
    if accuracy_drop is not None and not -1 < accuracy_drop < 1:
        raise UserError(
            f"target.accuracy_drop must be above -1 and below 1 (0.01 is one percentage point), got {accuracy_drop}"
        )
    if macs_fraction is not None and not 0 < macs_fraction <= 1:
        raise UserError(f"target.macs_fraction must be above 0 and at most 1, got {macs_fraction}")


def choose(
    curve: Curve, accuracy_drop: float | None = None, macs_fraction: float | None = None, knee: bool = False
) -> Point:
    """Choose the point of a curve that meets a target.

    Args:
        accuracy_drop: choose the cheapest point that is at most this much less accurate than the last exit (0.01 is one
            percentage point; a negative number asks for more accuracy), with ``SPARE`` standard errors to spare,
            because the best of many points on these images is a little worse on others.
        macs_fraction: choose the most accurate point that spends this fraction of the full cost, in (0, 1]: of the
            points that cost no more, only those count that cost at most ``WINDOW`` of the full cost less than the
            dearest. A user who would rather save than spend the budget gives ``accuracy_drop``.
        knee: choose the point of the front where computing more stops paying; see :func:`~policyskip.fronts.knee`.

    Raises:
        UserError: not exactly one target, or a target out of range.
        UnmetError: no threshold meets the target; the message says the nearest target that can be met.
    """
    check_target(accuracy_drop, macs_fraction, knee)
    if knee:
        return curve.knee()
    if accuracy_drop is not None:
        meets = (curve.drop_P <= accuracy_drop + 1e-9).nonzero().squeeze(1)  # sums may be rounded differently
        if not len(meets):
            best = int(curve.drop_P.argmin())
            nearest = _rounded_up(float(curve.drop_P[best]))
            raise UnmetError(f"accuracy_drop={accuracy_drop:g}", nearest, curve[best])
        cheapest = meets[curve.macs_P[meets] == curve.macs_P[meets].min()]
        return curve[int(cheapest[curve.accuracy_P[cheapest].argmax()])]
    assert macs_fraction is not None
    fraction_P = curve.macs_P / curve.full_macs
    if macs_fraction < fraction_P.min() - 1e-9:
        cheapest_point = int(fraction_P.argmin())
        nearest = _rounded_up(float(fraction_P[cheapest_point]))
        raise UnmetError(f"macs_fraction={macs_fraction:g}", nearest, curve[cheapest_point])
    spent = fraction_P[fraction_P <= macs_fraction + 1e-9].max()
    candidates = ((fraction_P <= spent) & (fraction_P >= spent - WINDOW)).nonzero().squeeze(1)
    return curve[int(candidates[curve.accuracy_P[candidates].argmax()])]


def _rounded_up(target: float) -> str:
    """Round a target up to four decimals, so that it can still be met."""
    return f"{math.ceil(target * 1e4 - 1e-6) / 1e4:.4f}"
