"""How much of what an oracle gains over fixed choices a policy gains. An oracle sees the label; a policy does not."""

from __future__ import annotations

from collections.abc import Sequence

from policyskip.comparison.fixed_lines import network_of
from policyskip.comparison.rows import Row


def oracle_share(row: Row, margin: float, rows: Sequence[Row]) -> float | None:
    """Return the share of the oracle's gain over the rival that a row has: (policy - rival) / (oracle - rival).

    The oracle is that of the row's own network: the first right exit, which runs that leave early state, or the most
    accurate row of the group that sees the label. It has to cost no more than the row does.

    Args:
        margin: of the row above its rival, as a fraction of the images.
        rows: of the group.

    Returns: a share, below 0 where the rival is better than the row; None if no such oracle is known, or if it is no
        better than the rival.
    """
    accuracy, macs = row.mean("accuracy"), row.mean("macs_mean")
    assert accuracy is not None and macs is not None  # every summary has them
    best = max((oracle for oracle, cost in _oracles_of(row, rows) if cost <= macs), default=None)
    if best is None or best <= accuracy - margin:
        return None
    return margin / (best - (accuracy - margin))


def _oracles_of(row: Row, rows: Sequence[Row]) -> list[tuple[float, float]]:
    """Return accuracy and mean MACs of the oracles over a row's own network."""
    sources = [(row.mean("oracle_accuracy"), row.mean("oracle_macs"))]
    sources += [
        (other.mean("accuracy"), other.mean("macs_mean"))
        for other in rows
        if other.oracle and network_of(other) == network_of(row)
    ]
    return [(accuracy, macs) for accuracy, macs in sources if accuracy is not None and macs is not None]
