"""Rules that decide at an exit whether to leave, and thresholds that send given shares of the images out.

All of it is arithmetic on what the exits say; labels play no part here, nor do files or networks.
A network with N exits takes N - 1 thresholds: whoever comes to the last exit leaves there.

Rules see probabilities (``logits.softmax(-1)``), because these are what an observation of the environment
holds: a decision in the environment and the same decision in a deployed network are then the same numbers.

Shapes: B images side by side, M images of a set, N exits, E early exits (N - 1), C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from policyskip.errors import UserError


def top_probability(probability: Tensor) -> Tensor:
    """The probability of the likeliest class, (…,) in [1/C, 1], of probabilities (…, C)."""
    return probability.amax(-1)


def entropy(probability: Tensor) -> Tensor:
    """``-Σ p ln p`` in nats, (…,) in [0, ln C], of probabilities (…, C); ``0 ln 0`` is 0."""
    # Rounding must not lift a uniform distribution over its bound.
    return torch.special.entr(probability).sum(-1).clamp(max=math.log(probability.shape[-1]))


def top_two(probability: Tensor) -> Tensor:
    """The two largest probabilities, (…, 2), of probabilities (…, C)."""
    return probability.topk(2, dim=-1).values


class Rule(Protocol):
    """When an image leaves at an exit, given a threshold for that exit.

    Attributes:
        name: under which :data:`RULES` holds it.
        extremes: thresholds at which no image leaves, and, where there is one, at which every image does.
    """

    @property
    def name(self) -> str: ...

    @property
    def extremes(self) -> tuple[float, ...]: ...

    def leaves(self, probability: Tensor, threshold: Tensor | float) -> Tensor:
        """Whether an image with ``probability`` (…, C) leaves: bool (…,). ``threshold`` must broadcast to (…,)."""
        ...

    def turning_points(self, probability: Tensor) -> Tensor:
        """The thresholds, a flat tensor, at which the decision about one of these images changes."""
        ...


def _as(value: Tensor, threshold: Tensor | float) -> Tensor | float:
    """Thresholds in the precision of what they are compared with, as torch takes plain numbers."""
    return threshold.to(value) if isinstance(threshold, Tensor) else threshold


@dataclass(frozen=True)
class Measured:
    """Leave by one measure of how sure the exit is.

    Attributes:
        measure: probabilities (…, C) to a number (…,).
        high_is_sure: leave if the measure is at least the threshold; otherwise, if it is below the threshold.
        never, always: thresholds at which no image leaves, and every image.
    """

    name: str
    measure: Callable[[Tensor], Tensor]
    high_is_sure: bool
    never: float
    always: float

    @property
    def extremes(self) -> tuple[float, float]:
        return self.never, self.always

    def passes(self, value: Tensor, threshold: Tensor | float) -> Tensor:
        """Whether an image whose measure is ``value`` (…,) leaves: bool (…,)."""
        threshold = _as(value, threshold)
        return value >= threshold if self.high_is_sure else value < threshold

    def leaves(self, probability: Tensor, threshold: Tensor | float) -> Tensor:
        return self.passes(self.measure(probability), threshold)

    def turning_points(self, probability: Tensor) -> Tensor:
        return self.measure(probability).flatten()


@dataclass(frozen=True)
class Delta:
    """Leave if exactly one class reaches the threshold: ``top >= δ`` and ``second < δ``.

    The activation module of Conditional Deep Learning (Panda, Sengupta, Roy 2016, arXiv 1509.08971) as we read it. Over
    half, δ is the rule of the top probability; below, an image with two likely classes goes on.
    """

    name: ClassVar[str] = "delta"
    extremes: ClassVar[tuple[float, ...]] = (math.inf,)

    def leaves(self, probability: Tensor, threshold: Tensor | float) -> Tensor:
        top, second = top_two(probability).unbind(-1)
        threshold = _as(top, threshold)
        return (top >= threshold) & (second < threshold)

    def turning_points(self, probability: Tensor) -> Tensor:
        return top_two(probability).flatten()


CONFIDENCE = Measured("confidence", top_probability, high_is_sure=True, never=math.inf, always=0.0)
"""MSDNet's rule (Huang et al. 2018, arXiv 1703.09844): leave if the top probability is at least the threshold."""
ENTROPY = Measured("entropy", entropy, high_is_sure=False, never=0.0, always=math.inf)
"""BranchyNet's rule (Teerapittayanon et al. 2016, arXiv 1709.01686): leave if the entropy (nats) is below it."""
RULES: dict[str, Rule] = {rule.name: rule for rule in (CONFIDENCE, ENTROPY, Delta())}


def rule_named(name: str) -> Rule:
    """The rule of that name; UserError if there is none."""
    if name not in RULES:
        raise UserError(f"the exit rule must be one of {', '.join(RULES)}, got {name!r}")
    return RULES[name]


def check_thresholds(thresholds: Sequence[float] | Tensor, num_exits: int) -> None:
    """UserError unless there is one threshold for each of ``num_exits`` exits but the last, and none is NaN."""
    values = [float(value) for value in thresholds]
    if len(values) != num_exits - 1:
        raise UserError(
            f"a network with {num_exits} exits takes {num_exits - 1} thresholds (the last exit needs none), "
            f"got {len(values)}"
        )
    if any(math.isnan(value) for value in values):
        raise UserError(f"thresholds must be numbers, got {values}")


def first_exit(leave_E: Tensor) -> Tensor:
    """The first exit at which an image leaves, int64 (…,): ``leave_E`` is bool (…, E), and the last exit is E."""
    return (~leave_E).cumprod(-1).sum(-1)


def decisions_at(exit_B: Tensor, num_exits: int) -> Tensor:
    """How often a policy was asked about images that left at exits int64 (B,): at the last exit it is not."""
    return (exit_B + 1).clamp(max=num_exits - 1)


def exit_of(rule: Rule, probability_MNC: Tensor, thresholds: Sequence[float] | Tensor) -> Tensor:
    """Where each image leaves, int64 (M,), when every exit's probabilities (M, N, C) are known.

    Args:
        thresholds: one for each early exit.

    Raises:
        UserError: another number of thresholds.
    """
    check_thresholds(thresholds, probability_MNC.shape[1])
    threshold_E = torch.as_tensor(thresholds, dtype=torch.float64, device=probability_MNC.device)
    return first_exit(rule.leaves(probability_MNC[:, :-1], threshold_E))


def exit_shares(q: float, num_exits: int) -> Tensor:
    """Shares of the images that leave at each exit, float64 (N,): ``q_k = z (1-q)^(k-1) q``, k = 1…N, summing to 1.

    The paper's exits each let go of a share ``0 < q < 1`` of what reaches them. The authors' code writes the same as
    ``f_k ∝ p^k`` with ``p = 1 - q`` and takes p over 1 as well, which favours late exits: here ``q < 0``. The
    limit ``q → 0`` is uniform. Source: Huang et al. 2018 (arXiv 1703.09844), budgeted batch classification.

    Raises:
        UserError: ``q`` is not below 1.
    """
    if not (math.isfinite(q) and q < 1):
        raise UserError(f"q must be a number below 1, got {q}")
    return (torch.arange(num_exits, dtype=torch.float64) * math.log1p(-q)).softmax(0)


STEEPEST = 30.0
"""``q_for_budget`` looks at shares whose logarithms fall or rise by up to this much from exit to exit."""


def q_for_budget(macs: float, macs_N: Tensor) -> float:
    """The q whose shares cost ``macs`` on average: ``Σ q_k C_k = macs``; the mean cost falls as q rises.

    Args:
        macs: MACs an image; outside of the exits' costs, the q of the nearest end.
        macs_N: float64 (N,), MACs of leaving at each exit, rising.
    """
    macs_N = macs_N.double().cpu()
    low, high = -STEEPEST, STEEPEST  # of ln(1 - q)
    for _ in range(60):
        middle = (low + high) / 2
        if float(exit_shares(-math.expm1(middle), len(macs_N)) @ macs_N) <= macs:
            low = middle
        else:
            high = middle
    return -math.expm1(low)


def between(low: Tensor, high: Tensor) -> float:
    """A threshold over ``low`` and not over ``high``: half-way, so that rounding moves neither to the other side."""
    middle = low + (high - low) / 2
    return float(middle if middle > low else high)


def quota_thresholds(rule: Measured, value_ME: Tensor, share_N: Tensor) -> Tensor:
    """Thresholds that send a given share of these images out at each exit (Huang et al. 2018), float64 (E,).

    At each exit the surest of the images that are still there leave, as many as its quota. Quotas are cumulative:
    by exit k, ``M · (share_1 + … + share_k)`` images, rounded, are to have left. Two things the authors' code leaves
    to chance are settled here:

    - **an empty quota** closes the exit (threshold ``rule.never``);
    - **ties** leave together or not at all. A group that does not fit into the quota stays, and its places pass to
      the next exit: no exit ever lets out more than was asked for by then.

    Args:
        value_ME: the rule's measure at each early exit, of the images the thresholds are fitted to (M, E).
        share_N: shares (N,), not negative, summing to 1; see :func:`exit_shares`.
    """
    count, exits = value_ME.shape
    if share_N.shape != (exits + 1,):
        raise ValueError(f"{exits} early exits take {exits + 1} shares, got {tuple(share_N.shape)}")
    due_E = (share_N.double().cumsum(0)[:-1] * count).round().long().tolist()
    inside = torch.arange(count, device=value_ME.device)
    thresholds = []
    for e, due in enumerate(due_E):
        value, order = value_ME[inside, e].sort(descending=rule.high_is_sure)
        quota = due - (count - len(inside))
        if 0 < quota < len(value):
            quota = int((value[:quota] != value[quota]).sum())
        if quota <= 0:
            thresholds.append(rule.never)
            continue
        if quota == len(value):
            thresholds.append(rule.always)
        else:
            thresholds.append(between(*value[quota - 1 : quota + 1].sort().values))
        inside = inside[order[quota:]]
    return torch.tensor(thresholds, dtype=torch.float64)


def spread(rule: Rule, probability: Tensor, count: int) -> Tensor:
    """``count`` thresholds for exits that said ``probability`` (…, C), float64 (count,), repeated where few differ.

    The rule's extremes, and cuts half-way between turning points, evenly spread over the images and not over the
    scale: where many images are, thresholds are close.
    """
    point = rule.turning_points(probability).sort().values
    low, high = point[:-1], point[1:]
    middle = low + (high - low) / 2
    cut = torch.where(middle > low, middle, high).double().cpu()
    extremes = torch.tensor(rule.extremes, dtype=torch.float64)
    room = count - len(extremes)
    if room < 1 or not len(cut):
        return extremes.repeat(-(-count // len(extremes)))[:count]
    rank = ((torch.arange(room) + 0.5) * len(cut) / room).long()
    return torch.cat([cut[rank], extremes])
