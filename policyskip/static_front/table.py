"""What is said of a static front on the screen: the best set of each range of costs, and how far it can be believed.

Shapes: F sets, N images.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from torch import Tensor

from policyskip.static_front.front import StaticFront
from policyskip.static_front.ranges import BIN
from policyskip.static_front.scoring import Keep, keep_text

HEADER = ("MACs", "blocks", "accuracy", "on other images", "evenly spread", "found by", "the blocks that run")


def describe(front: StaticFront) -> list[str]:
    """Describe a front in lines: what the search did, and a table with the best set of each range of costs.

    The table has, for each range of 0.05 of the whole network's MACs: cost and accuracy of the most accurate set; the
    accuracy that a set chosen on one half of the images has on the other half, both ways averaged, which the choice has
    not made too high; and the most accurate evenly spread set that costs as much or less.
    """
    K, full = len(front.sets[0]), max(front.macs)
    share_F = [macs / full for macs in front.macs]
    accuracy_F = front.accuracy
    ranges: dict[int, list[int]] = defaultdict(list)
    for i, share in enumerate(share_F):
        ranges[int(share / BIN - 1e-9)].append(i)
    rows = [HEADER]
    for _, inside in sorted(ranges.items()):
        best = max(inside, key=lambda i: accuracy_F[i])
        spread = [
            accuracy_F[i] for i in range(len(share_F)) if front.kinds[i] == "spread" and share_F[i] <= share_F[best]
        ]
        other = None if front.correct_FN is None else accuracy_on_other_images(front.correct_FN, inside)
        rows.append(
            (
                f"{share_F[best]:.2f}",
                str(sum(front.sets[best])),
                f"{100 * accuracy_F[best]:.2f}",
                "-" if other is None else f"{100 * other:.2f}",
                f"{100 * max(spread):.2f}" if spread else "-",
                front.kinds[best],
                keep_text(front.sets[best]),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER) - 1)]
    table = ["  ".join([*(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=False)), row[-1]]) for row in rows]
    return [_effort(front, K), *table]


def _effort(front: StaticFront, K: int) -> str:
    """Say in a line what the search did, and whether that was all that it had planned."""
    if front.tried == 2 and K > 1:
        return f"The search has found nothing: it scored only all {K} blocks and no block; raise front.budget"
    end = "its whole plan was carried out" if front.finished else "it ended before its plan was carried out"
    if front.budget == float("inf"):
        end = "every set was tried" if "all" in front.kinds else "its last rounds found nothing better"
    effort = f"{front.tried} sets tried for {front.spent:.2g} images × blocks" if front.tried else "an older version"
    return f"{len(front.sets)} fixed sets of {K} blocks, searched on {front.images} validation images: {effort}; {end}"


def accuracy_on_other_images(correct_FN: Tensor, choice: Sequence[int]) -> float | None:
    """Return how accurate the set chosen on one half of the images is on the other half, averaged both ways.

    Args:
        correct_FN: bool (F, N), whether each set is right on each image.
        choice: indices of the sets among which is chosen.

    Returns: the accuracy; None if there is only one image.
    """
    first, second = (correct_FN[list(choice), begin::2].double().mean(1) for begin in (0, 1))
    if correct_FN.shape[1] < 2:
        return None
    return (second[first.argmax()] + first[second.argmax()]).item() / 2


def set_name(keep: Keep, kind: str) -> str:
    """Name a set of blocks by its size and by how it was found: "33 evenly spread blocks"."""
    size, K = sum(keep), len(keep)
    if size in (0, K):
        return f"all {K} blocks" if size else "none of the blocks"
    words = {"spread": "evenly spread ", "stages": "stage-wise spread ", "random": "randomly drawn "}
    noun = "block" if size == 1 else "blocks"
    if kind == "policy":
        return f"{size} {noun} that the policy often chooses"
    return f"{size} {words.get(kind, 'searched ')}{noun}"
