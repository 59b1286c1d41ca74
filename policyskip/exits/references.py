"""What a way of leaving early has to be compared with, and what its decisions look like.

Fixed and random exits need no look at the image; the oracles look at the label, and say how much room is left.

Shapes: M images of a set, N exits, E early exits (N - 1), C classes, P points on a curve.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from policyskip.exits.cache import CachedExits
from policyskip.exits.rules import check_thresholds, first_exit

LABEL_NATS = 0.4
"""The cross-entropy below which Distiller's example for a CIFAR ResNet-32 lets an image leave."""


def static_exits(cache: CachedExits) -> tuple[Tensor, Tensor]:
    """Accuracy and MACs of every image leaving at one exit, float64 (N,) each.

    Nothing is decided on the way, so no other head is run: this is less than leaving there costs a policy.
    """
    return cache.correct_MN.double().mean(0), cache.costs.straight_N


def static_pairs(cache: CachedExits) -> list[list[float]]:
    """MACs and accuracy of every image leaving at one exit, a pair for each exit."""
    accuracy_N, macs_N = static_exits(cache)
    return [[macs, accuracy] for macs, accuracy in zip(macs_N.tolist(), accuracy_N.tolist(), strict=True)]


def static_mix(cache: CachedExits, macs: float, validation: CachedExits) -> tuple[Tensor, float]:
    """The fixed exits of a cost that are best on validation images: one exit, or two of them mixed at random.

    Which exits, and with what probability each, is chosen on the validation images, as for every other choice. The
    accuracy on the judged images is therefore an honest one: the mixture may turn out worse there than another.

    Args:
        cache: the images to judge the mixture on.
        macs: MACs an image that the mixture may cost, not below the cheapest exit's.
        validation: the same exits' outputs for the validation images.

    Returns: the expected correctness on the images of ``cache``, float64 (M,), and mean MACs, at most ``macs``.

    Raises:
        ValueError: no exit costs as little as ``macs``.
    """
    accuracy_N, macs_N = (x.tolist() for x in static_exits(validation))
    mixes = []
    for i, j in itertools.product(range(validation.num_exits), repeat=2):
        if macs_N[i] <= macs and (i == j or macs < macs_N[j]):
            weight = 0.0 if i == j else (macs - macs_N[i]) / (macs_N[j] - macs_N[i])
            mixes.append(((1 - weight) * accuracy_N[i] + weight * accuracy_N[j], i, j, weight))
    if not mixes:
        raise ValueError(f"no exit costs as little as {macs:g} MACs")
    _, i, j, weight = max(mixes)
    right_MN = cache.correct_MN.double()
    return (1 - weight) * right_MN[:, i] + weight * right_MN[:, j], (1 - weight) * macs_N[i] + weight * macs_N[j]


def random_exits(cache: CachedExits, share_N: Tensor) -> tuple[float, float]:
    """Expected accuracy and mean MACs of leaving at exit n with probability ``share_N[n]``, whatever the image.

    The exact expectation, and no draw. As for :func:`static_exits`, no head is run but the one that answers: where
    to leave is known beforehand.

    Args:
        share_N: (N,), not negative, summing to 1; such as the :func:`exit_histogram` of the policy to compare with.
    """
    share_N = share_N.double().to(cache.label_M.device)
    if share_N.shape != (cache.num_exits,) or (share_N < 0).any() or abs(float(share_N.sum()) - 1) > 1e-6:
        raise ValueError(f"shares must be {cache.num_exits} numbers, not negative and summing to 1")
    accuracy_N, macs_N = static_exits(cache)
    return float(share_N @ accuracy_N), float(share_N @ macs_N.to(share_N.device))


def oracle_exit(correct_MN: Tensor) -> Tensor:
    """Where each image leaves if one knew the label, int64 (M,): the first exit that is right, else the first.

    No policy is more accurate, and of those that are as accurate none is cheaper: an image that some exit gets right
    costs the least that being right costs, any other image the least there is.
    """
    return torch.where(correct_MN.any(1), correct_MN.int().argmax(1), 0)


def oracle_curve(cache: CachedExits) -> tuple[Tensor, Tensor]:
    """The best that knowing the labels allows at every cost: accuracy and mean MACs, float64 (P,), P ≤ M + 1.

    It starts with all images leaving at the first exit and then sends on those that a later exit gets right, the
    cheapest gain first; it ends at :func:`oracle_exit`. Every gain is one image, so this order is the best one: no
    policy of at most a point's cost is more accurate than that point.
    """
    correct_MN, macs_N = cache.correct_MN, cache.macs_N
    exit_M = oracle_exit(correct_MN)
    extra = (macs_N[exit_M[exit_M > 0]] - macs_N[0]).sort().values
    start = torch.zeros(1, dtype=torch.float64, device=extra.device)
    accuracy_P = correct_MN[:, 0].double().mean() + torch.arange(len(extra) + 1, device=extra.device) / len(cache)
    return accuracy_P, macs_N[0] + torch.cat([start, extra.cumsum(0)]) / len(cache)


def label_oracle(cache: CachedExits, thresholds: Sequence[float]) -> Tensor:
    """Distiller's published criterion, which *looks at the label*, so an oracle and nothing to deploy; int64 (M,).

    An image leaves at the first exit whose cross-entropy with the label (nats) is below its threshold; any threshold
    up to ln 2 makes every image that leaves early right. Source: early exit in IntelLabs/distiller (archived 2023).

    Args:
        thresholds: in nats, one for each early exit.

    Raises:
        UserError: another number of thresholds.
    """
    check_thresholds(thresholds, cache.num_exits)
    early_MCE = cache.logits_MNC[:, :-1].transpose(1, 2)
    loss_ME = F.cross_entropy(early_MCE, cache.label_M.unsqueeze(1).expand(-1, len(thresholds)), reduction="none")
    return first_exit(loss_ME < torch.tensor(thresholds, device=loss_ME.device))


def exit_histogram(exit_M: Tensor, num_exits: int) -> Tensor:
    """Share of the images that left at each exit, float64 (N,), summing to 1."""
    return exit_M.bincount(minlength=num_exits).double() / len(exit_M)


def accuracy_by_exit(exit_M: Tensor, correct_M: Tensor, num_exits: int) -> Tensor:
    """Accuracy of the images that left at each exit, float64 (N,); NaN where none did.

    Args:
        exit_M: int64 (M,), where each image left.
        correct_M: bool (M,), whether it was right there.
    """
    return exit_M.bincount(correct_M.double(), num_exits) / exit_M.bincount(minlength=num_exits)
