"""Curves of accuracy against cost, which are made by searching thresholds on the cached outputs of *validation* images.

There are three ways to search; ``targets.py`` picks a point of the curve:

- ``quota`` (MSDNet): a fraction of the images for each exit, with one parameter, which is hard to overfit;
- ``grid`` (BranchyNet's screening): every combination of some thresholds for each exit;
- ``common`` (CDL): one threshold for all exits.

Shapes: M images of a set, N exits, E early exits (N - 1), P points on a curve, G thresholds tried at an exit,
A combinations of thresholds at the exits before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from policyskip.errors import UserError, check_choice
from policyskip.exits.cache import CachedExits
from policyskip.exits.rules import (
    Measured,
    Rule,
    exit_shares,
    first_exit,
    q_for_budget,
    quota_thresholds,
    rule_named,
    spread,
)
from policyskip.fronts import knee, pareto
from policyskip.runs.progress import waiting

BRANCHYNET_NATS = (1e-4, 5e-4, 1e-3, 5e-3, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.0, 3.0, 5.0, 10.0)
"""Entropies that BranchyNet's authors screened for each exit of B-LeNet and B-ResNet (the code of arXiv 1709.01686)."""


SPARE = 1.0
"""Standard errors by which an accuracy target must be met."""

COMBINATIONS = 2**14
"""Combinations of thresholds that a grid tries, at most."""

NUMBERS_AT_ONCE = 2**24
"""Numbers computed at once when many choices of thresholds are judged, so that they fit into memory."""


@dataclass(frozen=True)
class Point:
    """Holds a threshold for each early exit, and accuracy and cost on the images that the thresholds were fitted to.

    Attributes:
        rule: name of the rule that the thresholds are for.
        thresholds: E of them.
        accuracy: fraction of the images classified rightly, in [0, 1].
        macs: mean MACs per image.
        macs_fraction: mean MACs per image, as a fraction of the cost of going to the last exit.
    """

    rule: str
    thresholds: tuple[float, ...]
    accuracy: float
    macs: float
    macs_fraction: float


@dataclass(frozen=True)
class Curve:
    """Holds P choices of thresholds, the cheapest first, with accuracy and cost on the images that they were fitted to.

    Attributes:
        rule: name of the rule.
        threshold_PE: float64 (P, E).
        accuracy_P: float64 (P,), in [0, 1].
        error_P: float64 (P,), standard error of the difference between a choice's accuracy and that of the last exit.
        macs_P: float64 (P,), mean MACs per image.
        last_accuracy, full_macs: accuracy and MACs of sending every image to the last exit, past all other heads.
    """

    rule: str
    threshold_PE: Tensor
    accuracy_P: Tensor
    error_P: Tensor
    macs_P: Tensor
    last_accuracy: float
    full_macs: float

    def __len__(self) -> int:
        return len(self.macs_P)

    def __getitem__(self, index: int) -> Point:
        macs = float(self.macs_P[index])
        thresholds = tuple(self.threshold_PE[index].tolist())
        return Point(self.rule, thresholds, float(self.accuracy_P[index]), macs, macs / self.full_macs)

    def __iter__(self) -> Iterator[Point]:
        return (self[index] for index in range(len(self)))

    def front(self) -> Curve:
        """Return the points on the Pareto front: see :func:`~policyskip.fronts.pareto`."""
        index = pareto(self.macs_P.tolist(), self.accuracy_P.tolist())
        return Curve(
            self.rule,
            self.threshold_PE[index],
            self.accuracy_P[index],
            self.error_P[index],
            self.macs_P[index],
            self.last_accuracy,
            self.full_macs,
        )

    @property
    def drop_P(self) -> Tensor:
        """Return the smallest target ``accuracy_drop`` that each point meets, float64 (P,): the point's loss of
        accuracy, plus ``SPARE`` standard errors."""
        return self.last_accuracy - self.accuracy_P + SPARE * self.error_P

    def knee(self) -> Point:
        """Return the point of the front where computing more stops paying: see :func:`~policyskip.fronts.knee`."""
        front = self.front()
        return front[knee(front.macs_P.tolist(), front.accuracy_P.tolist())]


def quota_curve(rule: Rule, cache: CachedExits, points: int = 201) -> Curve:
    """Make MSDNet's curve: for each of ``points`` budgets, the quotas ``q_k`` that cost it, and their thresholds.

    The budgets are evenly spaced from the cost of the first exit to that of the last (the authors' code tries 39
    ratios of quotas instead, which leaves gaps in cost). Source: Huang et al. 2018 (arXiv 1703.09844).

    Args:
        rule: a :class:`~policyskip.exits.rules.Measured` rule, which puts images in order; not the delta rule.
        cache: outputs for validation images.
    """
    assert isinstance(rule, Measured)
    value_ME = rule.measure(cache.probability_MNC[:, :-1])
    macs_N, N = cache.macs_N.cpu(), cache.num_exits
    thresholds = [torch.full((N - 1,), extreme, dtype=torch.float64) for extreme in rule.extremes]
    for budget in torch.linspace(float(macs_N[0]), float(macs_N[-1]), points, dtype=torch.float64).tolist():
        quota_N = exit_shares(q_for_budget(budget, macs_N), N)
        thresholds.append(quota_thresholds(rule, value_ME, quota_N))
    threshold_PE = torch.stack(thresholds)
    exit_PM = torch.stack([first_exit(rule.passes(value_ME, threshold_E)) for threshold_E in threshold_PE])
    return _curve(rule, cache, threshold_PE, *_judge(cache, exit_PM))


def grid_curve(
    rule: Rule, cache: CachedExits, threshold_EG: Tensor | None = None, combinations: int = COMBINATIONS
) -> Curve:
    """Make BranchyNet's screening: every combination of G thresholds at each early exit.

    No combination is run on its own: accuracy and cost are sums over the exits e of the change that going on from e to
    e + 1 brings, over the images that go so far.

    Args:
        cache: outputs for validation images.
        threshold_EG: float (E, G), the thresholds to try at each exit, such as ``BRANCHYNET_NATS`` for every exit. None
            spreads thresholds over the images, as many as keep the number of combinations under ``combinations``: with
            up to three or four exits that is fine-grained, with ten it is "never" or "always" and little else.
        combinations: see ``threshold_EG``.
    """
    M, N = cache.correct_MN.shape
    if threshold_EG is None:
        # A billionth more, or the cube root of 8 is 1.999….
        tried = int(combinations ** (1 / (N - 1)) * (1 + 1e-9))
        threshold_EG = torch.stack([spread(rule, cache.probability_MNC[:, e], tried) for e in range(N - 1)])
    total_QP = torch.zeros(3, 1, dtype=torch.float64)
    rows = max(1, NUMBERS_AT_ONCE // threshold_EG.shape[1] ** (N - 2))
    for index_R in torch.arange(M, device=cache.label_M.device).split(rows):
        total_QP = total_QP + _screen(rule, cache, threshold_EG, index_R)
    return _curve(rule, cache, torch.cartesian_prod(*threshold_EG).view(-1, N - 1), *total_QP / M)


def _screen(rule: Rule, cache: CachedExits, threshold_EG: Tensor, index_R: Tensor) -> Tensor:
    """Add up three quantities over R of the images, int64 (R,), for all P = G^E combinations of thresholds.

    Returns: float64 (3, P): the number of images that are right; the number of images that are right where they leave
        or at the last exit, but not at both; and the MACs.
    """
    correct_RN = cache.correct_MN[index_R]
    macs_RN = cache.macs_N.expand_as(correct_RN)
    value_QRN = torch.stack([correct_RN, correct_RN != correct_RN[:, -1:], macs_RN / cache.costs.full]).float()
    total_QA = value_QRN[:, :, :1].sum(1).double()
    inside_AR = torch.ones(1, len(index_R), device=index_R.device)
    for e, threshold_G in enumerate(threshold_EG.to(index_R.device)):
        stays_GR = (~rule.leaves(cache.probability_MNC[index_R, e], threshold_G.unsqueeze(1))).float()
        change_QR = value_QRN[:, :, e + 1] - value_QRN[:, :, e]
        change_QAG = torch.stack([(inside_AR * change_R) @ stays_GR.T for change_R in change_QR])
        total_QA = (total_QA.unsqueeze(2) + change_QAG).flatten(1)
        if e + 1 < len(threshold_EG):
            inside_AR = (inside_AR.unsqueeze(1) * stays_GR).flatten(0, 1)
    return (total_QA * total_QA.new_tensor([[1], [1], [cache.costs.full]])).cpu()


def common_curve(rule: Rule, cache: CachedExits, points: int = 1001) -> Curve:
    """Make the curve of ``points`` thresholds, each of them for all exits, as the δ of Conditional Deep Learning is."""
    early_MEC = cache.probability_MNC[:, :-1]
    threshold_P = spread(rule, early_MEC, points)
    rows = max(1, NUMBERS_AT_ONCE // early_MEC[..., 0].numel())
    parts = []
    for threshold_G in threshold_P.to(early_MEC.device).split(rows):
        exit_GM = first_exit(rule.leaves(early_MEC, threshold_G.view(-1, 1, 1)))
        parts.append(torch.stack(_judge(cache, exit_GM)))
    return _curve(rule, cache, threshold_P.unsqueeze(1).expand(-1, early_MEC.shape[1]), *torch.cat(parts, dim=1))


def _judge(cache: CachedExits, exit_PM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Judge P choices of exits, int64 (P, M), for :func:`_curve`.

    Returns: three tensors float64 (P,): accuracy, the fraction of images that are right where they leave or at the last
        exit but not at both, and mean MACs.
    """
    accuracy_P, macs_P = cache.judge(exit_PM)
    differ_MN = cache.correct_MN != cache.correct_MN[:, -1:]
    return accuracy_P, differ_MN.T.gather(0, exit_PM).double().mean(1), macs_P


def _curve(
    rule: Rule, cache: CachedExits, threshold_PE: Tensor, accuracy_P: Tensor, differ_P: Tensor, macs_P: Tensor
) -> Curve:
    """Make a curve of P choices of thresholds, judged as :func:`_judge` does, in the order of their cost."""
    order = macs_P.cpu().argsort(stable=True)
    last_accuracy = float(cache.correct_MN[:, -1].double().mean())
    error_P = ((differ_P - (accuracy_P - last_accuracy) ** 2).clamp(min=0) / len(cache)).sqrt()
    figures = (accuracy_P.cpu()[order], error_P.cpu()[order], macs_P.cpu()[order], last_accuracy, cache.costs.full)
    return Curve(rule.name, threshold_PE[order], *figures)


SEARCHES: dict[str, Callable[[Rule, CachedExits], Curve]] = {
    "quota": quota_curve,
    "grid": grid_curve,
    "common": common_curve,
}


def check_search(rule: str, search: str, num_exits: int) -> None:
    """Check that a rule and a search exist and go together, and that a grid has two thresholds to try at every exit.

    Raises:
        UserError: they do not.
    """
    check_choice("agent.search", search, SEARCHES)
    if search == "quota" and not isinstance(rule_named(rule), Measured):
        raise UserError(
            f"agent.search=quota needs a rule that orders images, confidence or entropy; {rule} does not: say "
            "agent.search=common, or make a rule of your own a Measured"
        )
    most = COMBINATIONS.bit_length()  # exits, of which all but the last have a threshold
    if search == "grid" and num_exits > most:
        raise UserError(f"agent.search=grid goes up to {most} exits, the network has {num_exits}; say quota or common")


def curve_of(cache: CachedExits, rule: str = "confidence", search: str = "quota") -> Curve:
    """Make the curve that :func:`choose` takes a point from; for a network with one exit, the curve has one point.

    Args:
        cache: outputs for validation images.
        rule: confidence, entropy, delta, or the name of a rule of the user's own; see :func:`rule_named`.
        search: quota, grid or common; quota is for rules that are :class:`Measured`, not for delta.

    Raises:
        UserError: see :func:`check_search`.
    """
    check_search(rule, search, cache.num_exits)
    if cache.num_exits == 1:
        return _curve(rule_named(rule), cache, torch.empty(1, 0), *_judge(cache, torch.zeros_like(cache.label_M)[None]))
    with waiting("searching thresholds"):
        return SEARCHES[search](rule_named(rule), cache)
