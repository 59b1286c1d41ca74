"""A policy's verdict is computed here: whether deciding per image pays against fixed choices that cost as much.

A *fixed choice* ignores the image, such as one set of blocks or one exit for all. A *rival* is the strongest fixed
choice of equal cost, and a *family* holds the fixed choices of one kind. Choices are made on validation images, and
compared with the policy on the judged images. There is no network here: this module takes what was right and what it
cost.

Shapes: N judged images, V validation images, F fixed choices of a family, R families, G groups of images that belong
together, D draws of the bootstrap, I choices that cost at most as much as the policy, J that cost more (or none).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

DRAWS = 2_000
"""How often the bootstrap draws the images anew."""
TAIL = 0.025
"""The share of the draws beyond either end of an interval."""
NEAR = 0.05
"""A fixed choice is near a cost if it is cheaper by at most this share of the full network's MACs."""
AT_ONCE = 2**23
"""Numbers that the bootstrap holds in memory at once."""
FEWEST = 40
"""Images, or groups of images, below which an interval says nothing: the redrawn means vary too little."""
PAYS, DOES_NOT_PAY, NOT_SHOWN = "pays", "does not pay", "not shown"


@dataclass(frozen=True)
class Family:
    """Holds the fixed choices of one kind.

    Attributes:
        name: of the family, such as "evenly spread blocks".
        labels: the name of each choice, such as "33 evenly spread blocks".
        macs_F: float64 (F,), what each choice costs for an image.
        correct_FV: bool (F, V), whether each choice is right on each validation image; None where nothing is chosen,
            because there is one choice only.
        complete: whether these are all choices of their kind that there are, so that none nearer to a policy's cost
            was left out.
        group_V: int64 (V,), which validation images belong together; None: each stands for itself.
        slope: accuracy that one more MAC buys, where nothing is chosen and no validation image says it.
    """

    name: str
    labels: Sequence[str]
    macs_F: Tensor
    correct_FV: Tensor | None
    complete: bool = False
    group_V: Tensor | None = None
    slope: float = 0.0

    def __post_init__(self) -> None:
        F = len(self.labels)
        if not F or self.macs_F.shape != (F,) or self.macs_F.dtype != torch.float64:
            raise ValueError(f"{F} choices need as many costs, float64, got {tuple(self.macs_F.shape)}")
        if not self.macs_F.isfinite().all() or self.slope - self.slope:  # infinity less infinity is no number
            raise ValueError("what the choices cost, and the slope, must be finite numbers")
        if self.correct_FV is None and F > 1:
            raise ValueError(f"a choice among {F} needs validation images")
        if self.correct_FV is not None and (self.correct_FV.ndim != 2 or len(self.correct_FV) != F):
            raise ValueError(f"correct_FV must be ({F}, V), got {tuple(self.correct_FV.shape)}")


@dataclass(frozen=True)
class Choice:
    """Holds the choice of a family at a cost: one fixed choice, or two that are mixed at random.

    Attributes:
        parts: pairs (index in the family, probability); the probabilities sum to 1.
        name: such as "33 evenly spread blocks", or "exit 1 and exit 2, mixed".
        macs: mean cost for an image.
        slope: accuracy that one more MAC buys at this cost, on validation images.
    """

    parts: list[tuple[int, float]]
    name: str
    macs: float
    slope: float

    def mixed(self, correct_PN: Sequence[Tensor]) -> Tensor:
        """Return the expected correctness, float64 (N,), from whether each of the parts is right, (N,) each."""
        weighted = [weight * correct_N.double() for (_, weight), correct_N in zip(self.parts, correct_PN, strict=True)]
        return torch.stack(weighted).sum(0)


@dataclass(frozen=True)
class Rival:
    """Holds the choice of a family, and its expected correctness on each judged image, float64 (N,)."""

    family: Family
    choice: Choice
    correct_N: Tensor


@dataclass(frozen=True)
class Comparison:
    """Compares a policy with the rival of one family.

    Attributes:
        family, name: of the family, and of its rival.
        accuracy, macs: of the rival on the judged images.
        margin: accuracy of the policy minus that of the rival.
        low, high: the ends of its interval; None for a single image (or group of images), which has none.
    """

    family: str
    name: str
    accuracy: float
    macs: float
    margin: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Verdict:
    """Says whether deciding per image pays: "pays", "does not pay" or "not shown".

    Attributes:
        because: why, in words that follow a colon.
        rival: the comparison that the answer rests on; None if no fixed choice is as cheap as the policy.
        comparisons: one for each family that has a rival, the strongest rival first.
        finished: whether the search of the fixed choices came to its end.
    """

    answer: str
    because: str
    rival: Comparison | None
    comparisons: list[Comparison]
    finished: bool

    def figures(self) -> dict[str, Any]:
        """Return the figures for a summary, by their keys without ``test/``."""
        figures: dict[str, Any] = {"verdict": self.answer, "verdict_because": self.because}
        figures |= {"rival_finished": self.finished, "rivals": [asdict(line) for line in self.comparisons]}
        if self.rival is not None:
            figures["rival"] = self.rival.name
            figures |= {f"rival_{key}": getattr(self.rival, key) for key in ("accuracy", "macs", "margin")}
            figures |= {"rival_low": self.rival.low, "rival_high": self.rival.high}
        return figures


def choose(family: Family, macs: float) -> Choice | None:
    """Choose, on validation images, the most accurate of the fixed choices and their mixtures that cost at most
    ``macs``.

    Mixing two fixed choices at random reaches every point on the line between them, so the best lies on the upper
    concave hull over cost.

    Returns: the choice; None if every choice costs more.
    """
    pairs = _Pairs(family.macs_F, macs)
    if not len(pairs.cheap_I):
        return None
    if family.correct_FV is None:
        return Choice([(0, 1.0)], family.labels[0], family.macs_F[0].item(), family.slope)
    accuracy_F = family.correct_FV.double().mean(1)
    i, j, weight = pairs.at(int(pairs.values(accuracy_F[None]).argmax()))
    if not weight:
        return Choice([(i, 1.0)], family.labels[i], family.macs_F[i].item(), 0.0)
    slope = ((accuracy_F[j] - accuracy_F[i]) / (family.macs_F[j] - family.macs_F[i])).item()
    return Choice([(i, 1 - weight), (j, weight)], mixture_name(family.labels[i], family.labels[j]), macs, slope)


def mixture_name(first: str, second: str) -> str:
    """Name the mixture of two choices; an end that follows a number in both is said once: "33 and 34 spread blocks"."""
    if first == second:
        return f"two choices of {first}, mixed"
    words, others, tail = first.split(" "), second.split(" "), list[str]()
    while len(words) > 1 and len(others) > 1 and words[-1] == others[-1]:
        tail.insert(0, words.pop())
        others.pop()
    if words[-1].isdigit() and others[-1].isdigit():
        return " ".join([*words, "and", *others, *tail]) + ", mixed"
    return f"{first} and {second}, mixed"


def judge(
    correct_N: Tensor,
    macs_N: Tensor,
    rivals: Sequence[Rival],
    full_macs: float,
    unfinished: str = "",
    group_N: Tensor | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Verdict:
    """Compare a policy with its rivals on the judged images, and say whether deciding per image pays.

    For each rival, image i counts d_i = correct_i − rival_i − λ (macs_i − c), where c is the policy's mean cost and λ
    the slope of the family's hull there: an image on which the policy spends more than on average has to be right more
    often, too. The last term is 0 on average, and lets the interval count that the cost varies with the images.

    The bootstrap draws the judged images anew, and the validation images as well. On these it chooses again, and what
    that choice is worse by on all validation images is what the best choice may be better by than the one that was
    chosen; ``low`` lies lower by so much, draw by draw. ``high`` is one-sided over all families together, because the
    policy loses if any one rival beats it.

    Args:
        correct_N: bool (N,), whether the policy is right.
        macs_N: float64 (N,), its cost for each image, its own included.
        rivals: one for each family that has a choice at c or below (see :func:`choose`).
        unfinished: says why there may be better fixed choices than those that were found, such as that their search did
            not come to its end; empty if it did.
        group_N: int64 (N,), which images belong together and are drawn together; None: each stands for itself.

    Raises:
        ValueError: the columns are of different numbers of images, or hold numbers that are not finite.
    """
    columns = [correct_N, macs_N, *([] if group_N is None else [group_N]), *(rival.correct_N for rival in rivals)]
    if any(column_N.shape != correct_N.shape or not column_N.isfinite().all() for column_N in columns):
        raise ValueError(f"every column must hold {len(correct_N)} finite numbers, one for each judged image")
    cost = macs_N.mean().item()
    if not rivals:
        return Verdict(NOT_SHOWN, "every fixed choice costs more than the policy", None, [], not unfinished)
    difference_RN = torch.stack(
        [correct_N.double() - rival.correct_N - rival.choice.slope * (macs_N - cost) for rival in rivals]
    )
    comparisons = []
    units = len(correct_N) if group_N is None else len(group_N.unique())
    drawn_DR = redrawn_means(difference_RN, group_N, draws, seed) if units > 1 else None
    for r, rival in enumerate(rivals):
        low = high = None
        if drawn_DR is not None:
            allowance_D = allowances(rival.family, cost, draws, seed + 1 + r)
            low = _rounded((drawn_DR[:, r] - allowance_D).quantile(TAIL).item())
            high = _rounded(drawn_DR[:, r].quantile(1 - TAIL / len(rivals)).item())
        accuracy, macs = rival.correct_N.mean().item(), rival.choice.macs
        margin = correct_N.double().mean().item() - accuracy
        comparisons.append(Comparison(rival.family.name, rival.choice.name, accuracy, macs, margin, low, high))
    comparisons.sort(key=lambda line: line.margin if line.low is None else line.low)
    answer, because, named = _answer(comparisons, units, unfinished, _has_rival_near(rivals, cost, full_macs))
    return Verdict(answer, because, named, comparisons, not unfinished)


def redrawn_means(value_RN: Tensor, group_N: Tensor | None, draws: int, seed: int) -> Tensor:
    """Return the means over images that are drawn with replacement, group by group, float64 (D, R).

    Args:
        value_RN: bool or float64 (R, N); sums of bool are exact.
        group_N: int64 (N,), which images are drawn together; None: each is drawn alone.
    """
    kind = torch.float32 if value_RN.dtype == torch.bool else torch.float64
    sum_RG, size_G = value_RN.to(kind), torch.ones(value_RN.shape[1], dtype=kind)
    if group_N is not None:
        place_N = group_N.unique(return_inverse=True)[1]
        size_G = place_N.bincount().to(kind)
        sum_RG = torch.zeros(len(value_RN), len(size_G), dtype=kind).index_add_(1, place_N, sum_RG)
    G = len(size_G)
    generator = torch.Generator().manual_seed(seed)
    means = []
    for start in range(0, draws, step := max(1, AT_ONCE // G)):
        index_DG = torch.randint(G, (min(step, draws - start), G), generator=generator)
        count_DG = torch.zeros(index_DG.shape, dtype=kind).scatter_add_(
            1, index_DG, torch.ones((), dtype=kind).expand_as(index_DG)
        )
        means.append((count_DG @ sum_RG.T).double() / (count_DG @ size_G).double()[:, None])
    return torch.cat(means)


def allowances(family: Family, macs: float, draws: int, seed: int) -> Tensor:
    """Return by how much another choice is worse than the one that was made, float64 (D,), not negative.

    Each draw chooses on validation images that are drawn anew; both choices are compared on all validation images.

    Args:
        family: has at least one choice that costs at most ``macs``.
    """
    pairs, correct_FV = _Pairs(family.macs_F, macs), family.correct_FV
    if correct_FV is None or len(family.labels) == 1:
        return torch.zeros(draws, dtype=torch.float64)
    value_P = pairs.values(correct_FV.double().mean(1)[None])[0]
    accuracy_DF = redrawn_means(correct_FV.bool(), family.group_V, draws, seed)
    chosen = [pairs.values(part_DF).argmax(1) for part_DF in accuracy_DF.split(max(1, AT_ONCE // len(value_P)))]
    return value_P.max() - value_P[torch.cat(chosen)]


class _Pairs:
    """Lists all mixtures of two fixed choices that cost exactly ``macs``, and all choices that cost at most that.

    Args:
        macs_F: float64 (F,), cost of each choice.
    """

    def __init__(self, macs_F: Tensor, macs: float) -> None:
        cheap_F = macs_F <= macs * (1 + 1e-9)  # the mean of equal costs may differ from them in its last digit
        self.cheap_I, dear = cheap_F.nonzero()[:, 0], (~cheap_F).nonzero()[:, 0]
        self.dear_J = torch.cat([torch.zeros(1, dtype=torch.int64), dear])  # the first column stands for no partner
        cost_I1 = macs_F[self.cheap_I, None]
        weight_IJ = ((macs - cost_I1) / (macs_F[dear] - cost_I1)).clamp(min=0)
        self.weight_IJ = torch.cat([torch.zeros_like(cost_I1), weight_IJ], 1)

    def values(self, accuracy_DF: Tensor) -> Tensor:
        """Return the accuracy of every pair, float64 (D, I × J), from those of the choices, float64 (D, F)."""
        cheap_DI1, dear_D1J = accuracy_DF[:, self.cheap_I, None], accuracy_DF[:, None, self.dear_J]
        return torch.lerp(cheap_DI1, dear_D1J, self.weight_IJ).flatten(1)

    def at(self, place: int) -> tuple[int, int, float]:
        """Return the pair at a place of :meth:`values`: two indices, and the probability of the second."""
        i, j = divmod(place, len(self.dear_J))
        return int(self.cheap_I[i]), int(self.dear_J[j]), self.weight_IJ[i, j].item()


def _has_rival_near(rivals: Sequence[Rival], cost: float, full_macs: float) -> bool:
    """Return whether a family that is chosen from is complete, or has a choice that is hardly cheaper than a cost."""
    return any(
        rival.family.complete
        or bool(((rival.family.macs_F <= cost * (1 + 1e-9)) & (rival.family.macs_F >= cost - NEAR * full_macs)).any())
        for rival in rivals
        if rival.family.correct_FV is not None
    )


def _answer(lines: Sequence[Comparison], units: int, unfinished: str, near: bool) -> tuple[str, str, Comparison]:
    """Return the answer, why, and the comparison that it rests on.

    Args:
        lines: the comparisons, the strongest rival first.
        units: number of judged images, or of groups of them.
        unfinished: see :func:`judge`.
        near: whether there is a rival near the policy's cost.
    """
    worst = lines[0]
    if worst.low is None:
        return NOT_SHOWN, "one image, or one group of images, has no interval", worst
    if units < FEWEST:
        return NOT_SHOWN, f"there are only {units} images, or groups of images that belong together", worst
    if stronger := [line for line in lines if line.high is not None and line.high < 0]:
        return DOES_NOT_PAY, "a fixed choice of equal cost is more accurate", stronger[0]
    if worst.low <= 0:
        return NOT_SHOWN, "the interval includes 0", worst
    if unfinished:
        return NOT_SHOWN, unfinished, worst
    if not near:
        return NOT_SHOWN, "no fixed choice costs nearly as much as the policy", worst
    return PAYS, "the policy is more accurate than the strongest fixed choice of every kind", worst


def _rounded(value: float) -> float:
    """Round away the last digits, in which the sums of different numbers of threads differ."""
    return round(value, 12)
