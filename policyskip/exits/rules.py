"""Rules that decide at an exit whether an image leaves, and thresholds that send given shares of the images out.

All of it is arithmetic on the exits' probabilities; labels play no part here, nor do files or networks.
A network with N exits takes N - 1 thresholds: an image that comes to the last exit leaves there.

Rules see probabilities (``logits.softmax(-1)``), because these are what an observation of the environment
holds: a decision in the environment and the same decision in a deployed network are then the same numbers.

Shapes: B images side by side, M images of a set, N exits, E early exits (N - 1), C classes.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from policyskip import registry
from policyskip.errors import UserError
from policyskip.texts import a_type


def top_probability(probability: Tensor) -> Tensor:
    """Return the probability of the likeliest class, (…,) in [1/C, 1], of probabilities (…, C)."""
    return probability.amax(-1)


def entropy(probability: Tensor) -> Tensor:
    """Compute ``-Σ p ln p`` in nats, (…,) in [0, ln C], of probabilities (…, C); ``0 ln 0`` is 0."""
    # Rounding must not lift a uniform distribution over its bound.
    return torch.special.entr(probability).sum(-1).clamp(max=math.log(probability.shape[-1]))


def top_two(probability: Tensor) -> Tensor:
    """Return the two largest probabilities, (…, 2), of probabilities (…, C)."""
    return probability.topk(2, dim=-1).values


class Rule(Protocol):
    """A rule says when an image leaves at an exit, given a threshold for that exit.

    A rule of the user's own needs no ``name``: see :func:`rule_named`.

    Attributes:
        name: the name under which the rule is chosen and stored.
        extremes: the threshold at which no image leaves, and, if there is one, that at which every image leaves.
    """

    @property
    def name(self) -> str: ...

    @property
    def extremes(self) -> tuple[float, ...]: ...

    def leaves(self, probability: Tensor, threshold: Tensor | float) -> Tensor:
        """Return whether an image with ``probability`` (…, C) leaves, bool (…,); ``threshold`` broadcasts to (…,)."""
        ...

    def turning_points(self, probability: Tensor) -> Tensor:
        """Return the thresholds, float (any number,), at which the decision about an image, (…, C), changes."""
        ...


def _as(value: Tensor, threshold: Tensor | float) -> Tensor | float:
    """Convert thresholds to the precision of the values that they are compared with, as torch does plain numbers."""
    return threshold.to(value) if isinstance(threshold, Tensor) else threshold


@dataclass(frozen=True)
class Measured:
    """A rule by which an image leaves if one measure of how sure the exit is passes the threshold.

    Attributes:
        name: as in :class:`Rule`.
        measure: the function from probabilities (…, C) to the measure (…,).
        high_is_sure: True: an image leaves if its measure is at least the threshold; False: if it is below.
        never, always: the threshold at which no image leaves, and that at which every image leaves.
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
        """Return whether an image whose measure is ``value`` (…,) leaves: bool (…,)."""
        threshold = _as(value, threshold)
        return value >= threshold if self.high_is_sure else value < threshold

    def leaves(self, probability: Tensor, threshold: Tensor | float) -> Tensor:
        return self.passes(self.measure(probability), threshold)

    def turning_points(self, probability: Tensor) -> Tensor:
        return self.measure(probability).flatten()


@dataclass(frozen=True)
class Delta:
    """A rule by which an image leaves if exactly one class reaches the threshold: ``top >= δ`` and ``second < δ``.

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
"""The package's own rules, by name."""


@dataclass(frozen=True)
class Named:
    """A rule of the user's own that carries the name by which it was chosen."""

    name: str
    rule: Rule

    @property
    def extremes(self) -> tuple[float, ...]:
        return tuple(self.rule.extremes)

    def leaves(self, probability: Tensor, threshold: Tensor | float) -> Tensor:
        return self.rule.leaves(probability, threshold)

    def turning_points(self, probability: Tensor) -> Tensor:
        return self.rule.turning_points(probability)


def rule_named(name: str) -> Rule:
    """Return the package's own rule of that name, or the user's own.

    Args:
        name: confidence, entropy or delta; or the name of a rule of the user's own, ``package.module.Name`` or that of
            an installed entry point. It may name a rule, or a class or function without arguments that gives one.

    Returns: the rule; its ``name`` is the one given here, whatever a rule of the user's own says.

    Raises:
        UserError: there is no such rule, it may not be imported, or it does not do what :class:`Rule` asks for.
    """
    if name in RULES:
        return RULES[name]
    if "." not in name and name not in (known := registry.installed("rule")):
        installed = ", ".join(sorted(known)) or "none is installed"
        raise UserError(
            f"the exit rule must be one of {', '.join(RULES)}, got {name!r}, which is not installed here either "
            f"({installed})"
        )
    found = registry.find("rule", name)
    with registry.naming_failures(f"the exit rule {name}"):
        rule: Any = found() if inspect.isclass(found) or inspect.isfunction(found) else found
        _check_rule(name, rule)
    return replace(rule, name=name) if isinstance(rule, Measured) else Named(name, rule)


def _check_rule(name: str, rule: Any) -> None:
    """Check that an object has what :class:`Rule` asks for, and that no image leaves at the first of its extremes."""
    missing = [attribute for attribute in ("extremes", "leaves", "turning_points") if not hasattr(rule, attribute)]
    if missing:
        raise UserError(f"the exit rule {name} is {a_type(rule)} without {missing[0]}; a rule needs it")
    extremes = tuple(rule.extremes)
    if not extremes or not all(isinstance(extreme, int | float) for extreme in extremes):
        raise UserError(f"extremes of the exit rule {name} must be a tuple of one or two numbers, got {extremes}")
    probability_BC = torch.tensor([[0.5, 0.3, 0.2], [0.8, 0.1, 0.1]])
    leave_GB = rule.leaves(probability_BC, torch.full((3, 1), float(extremes[0]), dtype=torch.float64))
    if not isinstance(leave_GB, Tensor) or leave_GB.dtype != torch.bool or leave_GB.shape != (3, 2):
        raise UserError(
            f"leaves of the exit rule {name} must return bool (…,) for probabilities (…, C), got {_kind(leave_GB)}"
        )
    if leave_GB.any():
        raise UserError(f"at {extremes[0]}, the first of its extremes, no image may leave by the exit rule {name}")
    points = rule.turning_points(probability_BC)
    if not isinstance(points, Tensor) or not points.is_floating_point() or points.dim() != 1:
        raise UserError(
            f"turning_points of the exit rule {name} must return floats in one dimension, got {_kind(points)}"
        )


def _kind(value: Any) -> str:
    """Return the class of a value, and of a tensor its type and shape."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def check_thresholds(thresholds: Sequence[float] | Tensor, num_exits: int) -> None:
    """Raise UserError unless each of ``num_exits`` exits but the last has one threshold, (E,), and none is NaN."""
    values = [float(value) for value in thresholds]
    if len(values) != num_exits - 1:
        raise UserError(
            f"a network with {num_exits} exits takes {num_exits - 1} thresholds (the last exit needs none), "
            f"got {len(values)}"
        )
    if any(math.isnan(value) for value in values):
        raise UserError(f"thresholds must be numbers, got {values}")


def first_exit(leave_E: Tensor) -> Tensor:
    """Find the first exit at which an image leaves, int64 (…,), from whether it would at each early exit, bool (…, E).

    An image that leaves at no early exit leaves at the last one, E."""
    return (~leave_E).cumprod(-1).sum(-1)


def decisions_at(exit_B: Tensor, num_exits: int) -> Tensor:
    """Count the decisions that a policy made on images that left at exits int64 (B,): none is made at the last exit."""
    return (exit_B + 1).clamp(max=num_exits - 1)


def exit_of(rule: Rule, probability_MNC: Tensor, thresholds: Sequence[float] | Tensor) -> Tensor:
    """Find the exit at which each image leaves, int64 (M,), when every exit's probabilities (M, N, C) are known.

    Args:
        rule: the rule by which images leave.
        probability_MNC: float (M, N, C).
        thresholds: one for each early exit.

    Raises:
        UserError: another number of thresholds.
    """
    check_thresholds(thresholds, probability_MNC.shape[1])
    threshold_E = torch.as_tensor(thresholds, dtype=torch.float64, device=probability_MNC.device)
    return first_exit(rule.leaves(probability_MNC[:, :-1], threshold_E))


def exit_shares(q: float, num_exits: int) -> Tensor:
    """Compute each exit's share of the images, float64 (N,), summing to 1: ``q_k = z (1-q)^(k-1) q``, k = 1…N.

    In the paper, a share ``0 < q < 1`` of the images that reach an exit leave there. The authors' code writes the same
    as ``f_k ∝ p^k`` with ``p = 1 - q``, and allows p above 1, which favours late exits: here ``q < 0``. The limit
    ``q → 0`` is uniform. Source: Huang et al. 2018 (arXiv 1703.09844), budgeted batch classification.

    Raises:
        UserError: ``q`` is not below 1.
    """
    if not (math.isfinite(q) and q < 1):
        raise UserError(f"q must be a number below 1, got {q}")
    return (torch.arange(num_exits, dtype=torch.float64) * math.log1p(-q)).softmax(0)


STEEPEST = 30.0
"""``q_for_budget`` tries shares whose logarithms fall or rise by up to this much from exit to exit."""


def q_for_budget(macs: float, macs_N: Tensor) -> float:
    """Find the q whose shares cost ``macs`` on average: ``Σ q_k C_k = macs``; the mean cost falls as q rises.

    Args:
        macs: mean MACs of an image; below the first exit's cost or above the last one's, the q of that end is found.
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
    """Return a threshold in (low, high], two scalars: half-way between them, so that rounding changes no decision."""
    middle = low + (high - low) / 2
    return float(middle if middle > low else high)


def quota_thresholds(rule: Measured, value_ME: Tensor, share_N: Tensor) -> Tensor:
    """Find thresholds that send a given share of the images out at each exit (Huang et al. 2018), float64 (E,).

    At each exit, the surest of the remaining images leave, as many as the exit's quota. Quotas are cumulative: by exit
    k, ``M · (share_1 + … + share_k)`` images, rounded, are to have left. Two cases depend on chance in the authors'
    code, and not here:

    - **an empty quota** closes the exit (threshold ``rule.never``);
    - **tied images** leave together or not at all. A tied group that is larger than the quota stays, and the quota is
      added to the next exit's: by no exit have more images left than the shares say.

    Args:
        rule: the rule that the thresholds are for.
        value_ME: the rule's measure of each image at each early exit, (M, E).
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
    """Choose ``count`` thresholds to try at exits with ``probability`` (…, C), float64 (count,); some may repeat.

    They are the rule's extremes, and values half-way between neighbouring turning points. These are spread evenly over
    the images and not over the scale: where many images lie, thresholds are close.
    """
    point = rule.turning_points(probability).sort().values
    low, high = point[:-1], point[1:]
    middle = low + (high - low) / 2
    cut = torch.where(middle > low, middle, high).double().cpu()
    extremes = torch.tensor(rule.extremes, dtype=torch.float64)
    remaining = count - len(extremes)
    if remaining < 1 or not len(cut):
        return extremes.repeat(-(-count // len(extremes)))[:count]
    rank = ((torch.arange(remaining) + 0.5) * len(cut) / remaining).long()
    return torch.cat([cut[rank], extremes])
