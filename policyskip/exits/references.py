"""References for policies that leave early (fixed exits, random exits, oracles), and statistics of where images leave.

Fixed and random exits ignore the image. Oracles see the label, and show how much better a policy could become.

Shapes: M images of a set, N exits, E early exits (N - 1), C classes, P points on a curve.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from policyskip.exits.cache import CachedExits
from policyskip.exits.rules import check_thresholds, first_exit

LABEL_NATS = 0.4
"""The threshold of Distiller's example for a CIFAR ResNet-32: an image leaves if its cross-entropy is below it."""


def static_exits(cache: CachedExits) -> tuple[Tensor, Tensor]:
    """Return accuracy and MACs of each exit if all images leave there, float64 (N,) each.

    No other head runs on the way, as nothing is decided there: a policy pays more for leaving at the same exit.
    """
    return cache.correct_MN.double().mean(0), cache.costs.straight_N


def static_pairs(cache: CachedExits) -> list[list[float]]:
    """Return pairs of MACs and accuracy, one for each exit, as :func:`static_exits` computes them."""
    accuracy_N, macs_N = static_exits(cache)
    return [[macs, accuracy] for macs, accuracy in zip(macs_N.tolist(), accuracy_N.tolist(), strict=True)]


def random_exits(cache: CachedExits, share_N: Tensor) -> tuple[float, float]:
    """Compute expected accuracy and mean MACs of leaving at exit n with probability ``share_N[n]``, whatever the image.

    Nothing is drawn: this is the exact expectation. As for :func:`static_exits`, only the head that answers runs,
    because the exit is known beforehand.

    Args:
        share_N: (N,), not negative, summing to 1; such as the :func:`exit_histogram` of the policy to compare with.

    Raises:
        ValueError: ``share_N`` is not that.
    """
    share_N = share_N.double().to(cache.label_M.device)
    if share_N.shape != (cache.num_exits,) or (share_N < 0).any() or abs(float(share_N.sum()) - 1) > 1e-6:
        raise ValueError(f"shares must be {cache.num_exits} numbers, not negative and summing to 1")
    accuracy_N, macs_N = static_exits(cache)
    return float(share_N @ accuracy_N), float(share_N @ macs_N.to(share_N.device))


def oracle_exit(correct_MN: Tensor) -> Tensor:
    """Find the exit at which an oracle, which sees the label, lets each image leave, int64 (M,).

    An image leaves at its first correct exit; if none is correct, at the first exit. No policy is more accurate, and
    none of the same accuracy is cheaper.

    Args:
        correct_MN: bool (M, N), whether each exit is right.
    """
    return torch.where(correct_MN.any(1), correct_MN.int().argmax(1), 0)


def oracle_curve(cache: CachedExits) -> tuple[Tensor, Tensor]:
    """Compute the best accuracy that an oracle, which sees the label, reaches at every cost.

    The curve starts with all images at the first exit. Then the images that a later exit gets right go on to it, the
    cheapest gain before dearer ones, until all have: that is :func:`oracle_exit`. Each gain is one image, so no order
    is better: no policy that costs at most what a point costs is more accurate than that point.

    Returns: accuracy and mean MACs, float64 (P,) each, P ≤ M + 1.
    """
    correct_MN, macs_N = cache.correct_MN, cache.macs_N
    exit_M = oracle_exit(correct_MN)
    extra = (macs_N[exit_M[exit_M > 0]] - macs_N[0]).sort().values
    start = torch.zeros(1, dtype=torch.float64, device=extra.device)
    accuracy_P = correct_MN[:, 0].double().mean() + torch.arange(len(extra) + 1, device=extra.device) / len(cache)
    return accuracy_P, macs_N[0] + torch.cat([start, extra.cumsum(0)]) / len(cache)


def label_oracle(cache: CachedExits, thresholds: Sequence[float]) -> Tensor:
    """Find the exit of each image by Distiller's published criterion, int64 (M,), which sees the label.

    So it is an oracle, and cannot be deployed. An image leaves at the first exit whose cross-entropy with the label is
    below the threshold of that exit. With thresholds up to ln 2 every image that leaves early is right. Source: early
    exit in IntelLabs/distiller (archived 2023).

    Args:
        thresholds: in nats, one for each early exit.

    Raises:
        UserError: the number of thresholds is another one, or a threshold is NaN.
    """
    check_thresholds(thresholds, cache.num_exits)
    early_MCE = cache.logits_MNC[:, :-1].transpose(1, 2)
    loss_ME = F.cross_entropy(early_MCE, cache.label_M.unsqueeze(1).expand(-1, len(thresholds)), reduction="none")
    return first_exit(loss_ME < torch.tensor(thresholds, device=loss_ME.device))


def exit_histogram(exit_M: Tensor, num_exits: int) -> Tensor:
    """Return the share of the images that left at each exit, float64 (N,), summing to 1, from exits int64 (M,)."""
    return exit_M.bincount(minlength=num_exits).double() / len(exit_M)


def accuracy_by_exit(exit_M: Tensor, correct_M: Tensor, num_exits: int) -> Tensor:
    """Return the accuracy of the images that left at each exit, float64 (N,); NaN for an exit where none left.

    Args:
        exit_M: int64 (M,), the exit of each image.
        correct_M: bool (M,), whether the answer there is right.
    """
    return exit_M.bincount(correct_M.double(), num_exits) / exit_M.bincount(minlength=num_exits)
