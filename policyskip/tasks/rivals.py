"""A policy is compared here with fixed blocks, fixed exits, both, itself without a look at the image, and other runs.

What is compared with what, and how an answer comes of it: ``policyskip/rivals.py``.

Shapes: N judged images, V validation images, F fixed choices of a family, K blocks, B images side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from policyskip import rivals
from policyskip.backbones import Backbone, count_costs
from policyskip.backbones.exits import ExitNetwork
from policyskip.backbones.resnet_exits import ResNetExits
from policyskip.build import Setup
from policyskip.config import FrontSection
from policyskip.data import Images, groups_of, sequential, spread_indices
from policyskip.errors import UserError
from policyskip.evaluation.decisions import Decisions
from policyskip.execution.ways import DEFAULT, Execution, How
from policyskip.exits.cache import CachedExits
from policyskip.exits.references import exit_histogram, random_exits, static_exits
from policyskip.rivals import Choice, Family, Rival, choose
from policyskip.runs.progress import waiting
from policyskip.static_front import Keep, SetScorer, StaticFront, spread_set
from policyskip.static_front.table import set_name
from policyskip.tasks.fronts import static_front, with_block_selection
from policyskip.tasks.run_rivals import RunRival

VALIDATION_IMAGES = 2_000
"""Validation images, at most, on which sets are scored that no search has scored."""
FREQUENT, SIZES = 8, 5
"""The policy's most frequent decisions that are tried as fixed sets; and sizes of sets that are tried besides."""
WORK = 1_500_000
"""Images times blocks that are computed for what is not needed to the last digit: pictures, decisions dealt again."""
MOST_POINTS, FEWEST_POINTS, MOST_DEALS = 20, 6, 8
"""Sets of the static front that pictures show; and how often the policy's decisions are dealt at random, at most."""
SPENT = "the search of fixed blocks ended before its plan was carried out; raise front.budget"
NOT_SEARCHED = "the blocks of the network were not searched for fixed choices"
OLDER = "fixed blocks were searched by an older version, which found weaker ones; train anew"


@dataclass(frozen=True)
class Candidates:
    """Holds a family of fixed sets of blocks, and for each of its F choices the number of a network and its set."""

    family: Family
    sets: list[tuple[int, Keep]]


def block_verdict(
    setup: Setup, decisions: Decisions, keep_VK: Tensor | None, front: StaticFront, others: Sequence[RunRival] | None
) -> tuple[dict[str, Any], list[tuple[float, float]]]:
    """Judge a policy that decides which blocks run on the test images, against every family of rivals.

    Args:
        setup: names the network and its data.
        decisions: what the policy decided for the test images.
        keep_VK: bool (V, K), what it decides for the validation images; None if it sees their labels.
        front: the static front of the network.
        others: finished runs to compare with; None: with nothing, so that there are no figures.

    Returns: the figures of the verdict, and MACs and accuracy, on test images, of sets on the front's hull.
    """
    images, cost = setup.data.test.plain(), decisions.macs_N.mean().item()
    candidates = searched_families(setup, front) if others is not None else []
    if keep_VK is not None:
        candidates.append(own_family(setup, keep_VK))
    full, full_correct_N = (0, (True,) * setup.backbone.num_blocks), decisions.full_correct_N
    known = {} if full_correct_N is None else {full: full_correct_N}
    more = [(0, front.sets[i]) for i in points_of(front, len(images))]
    found, correct = _chosen([setup.backbone], candidates, cost, images, more, known, setup.how)
    scored = [i for i in front.hull if (0, front.sets[i]) in correct]  # also those that the policy is compared with
    pairs = [(front.macs[i], correct[0, front.sets[i]].double().mean().item()) for i in scored]
    if others is None:
        return {}, pairs
    found.append(dealt_blocks(setup, decisions, images))
    return _verdict(setup, decisions, found, others, _unfinished(front)), pairs


def exit_verdict(
    setup: Setup,
    network: ExitNetwork,
    decisions: Decisions,
    cache: CachedExits,
    validation: CachedExits,
    front: StaticFront | None,
    others: Sequence[RunRival],
) -> dict[str, Any]:
    """Judge a policy that decides where images leave on the test images, against every family of rivals.

    Args:
        setup: names the data.
        network: the network with its exits.
        decisions: what the policy decided for the test images.
        cache, validation: outputs of all exits for the test images and the validation images.
        front: the static front of the blocks that the exits follow; None if there are none, or no search was made.
        others: finished runs to compare with.

    Returns: the figures of the verdict.
    """
    cost, has_blocks = decisions.macs_N.mean().item(), isinstance(network, ResNetExits)
    labels, straight_F = [f"exit {n}" for n in range(cache.num_exits)], validation.costs.straight_N
    correct_FV, group_V = validation.correct_MN.T.cpu(), _groups(setup.data.validation)
    fixed = Family("fixed exits", labels, straight_F, correct_FV, not has_blocks, group_V)
    found = []
    if (choice := choose(fixed, cost)) is not None:
        found.append(Rival(fixed, choice, choice.mixed([cache.correct_MN[:, n].cpu() for n, _ in choice.parts])))
    found.append(dealt_exits(decisions, cache))
    unfinished = _unfinished(front) if has_blocks else ""
    if isinstance(network, ResNetExits) and front is not None:
        parts = [network.up_to(n).eval() for n in range(network.num_exits)]
        trunk = replace(setup, backbone=parts[-1])
        candidates = [
            replace(c, sets=[(len(parts) - 1, keep) for _, keep in c.sets]) for c in searched_families(trunk, front)
        ]
        candidates.append(exits_and_blocks(setup, parts))
        found += _chosen(parts, candidates, cost, setup.data.test.plain(), how=setup.how)[0]
    return _verdict(setup, decisions, found, others, unfinished)


def front_of_trunk(setup: Setup, network: ExitNetwork, settings: FrontSection | None) -> StaticFront | None:
    """Return the static front of the blocks that a network's exits follow, searched now unless it is known.

    The network is given as it was trained: a copy with folded batch norm has another hash, by which no front is known.

    Returns: None if the network has no such blocks, or there are no settings, as in runs of older versions.
    """
    if settings is None or not isinstance(network, ResNetExits):
        return None
    return static_front(with_block_selection(replace(setup, backbone=network.backbone.eval(), reward=None)), settings)


def _unfinished(front: StaticFront | None) -> str:
    """Say why a front may lack the best fixed sets; an empty text if its search came to its end."""
    if front is None:
        return NOT_SEARCHED
    if front.correct_FN is None:
        return OLDER
    return "" if front.finished else SPENT


def _verdict(
    setup: Setup, decisions: Decisions, found: list[Rival], others: Sequence[RunRival], unfinished: str
) -> dict[str, Any]:
    """Return the figures of the verdict on a policy, from its rivals of every family and from other runs."""
    cost = decisions.macs_N.mean().item()
    near = [other for other in others if not other.is_dearer(cost)]
    verdict = rivals.judge(
        decisions.correct_N,
        decisions.macs_N,
        [*found, *(other.rival() for other in near)],
        decisions.full_macs,
        unfinished,
        _groups(setup.data.test),
    )
    dearer = [other.name for other in others if other.is_dearer(cost)]
    return verdict.figures() | ({"rivals_dearer": dearer} if dearer else {})


def _chosen(
    networks: Sequence[Backbone],
    candidates: Sequence[Candidates],
    cost: float,
    images: Images,
    more: Iterable[tuple[int, Keep]] = (),
    known: Mapping[tuple[int, Keep], Tensor] | None = None,
    how: How = DEFAULT,
) -> tuple[list[Rival], dict[tuple[int, Keep], Tensor]]:
    """Choose from every family on validation images, and score what was chosen, and no other set, on ``images``.

    Args:
        networks: those that the candidates number.
        more: sets that are scored in the same pass.
        known: sets that have been scored on ``images`` before.
        how: in which way and precision networks are executed.

    Returns: a rival of each family that has a choice of the cost, and whether each image is right, bool (N,), by set.
    """
    choices = [(c, choice) for c in candidates if (choice := choose(c.family, cost)) is not None]
    wanted = {*more, *(c.sets[i] for c, choice in choices for i, _ in choice.parts)}
    correct = dict(known or {})
    for n, network in enumerate(networks):
        if sets := sorted(keep for number, keep in wanted - correct.keys() if number == n):
            scorer = SetScorer(network, images, how=how)
            with waiting("judging fixed choices", scorer.count) as wait:
                scorer.on_batch = wait.advance
                correct |= {(n, keep): right_N for keep, right_N in zip(sets, scorer.correct(sets), strict=True)}
    found = [
        Rival(c.family, choice, choice.mixed([correct[c.sets[i]] for i, _ in choice.parts])) for c, choice in choices
    ]
    return found, correct


def searched_families(setup: Setup, front: StaticFront) -> list[Candidates]:
    """Return the families of all sets of a static front, and of those that are spread evenly over the blocks.

    Raises:
        UserError: the front is of other validation images than there are.
    """
    images = setup.data.validation.plain()
    correct_FV, kinds = front.correct_FN, front.kinds
    if correct_FV is None:  # a front of an older version
        scorer = SetScorer(setup.backbone, images, front.images, how=setup.how)
        with waiting("scoring fixed choices on validation images", scorer.count) as wait:
            scorer.on_batch = wait.advance
            correct_FV = torch.stack(scorer.correct(front.sets))
    elif front.data != images.fingerprint() or correct_FV.shape[1] > len(images):
        raise UserError(f"the static front is of other validation images than those of {setup.data.name}")
    group_V, macs_F = _groups(images, correct_FV.shape[1]), torch.tensor(front.macs, dtype=torch.float64)
    is_even = [keep == spread_set(len(keep), sum(keep)) for keep in front.sets]  # whatever found it
    labels = [set_name(front.sets[i], "spread" if is_even[i] else kind) for i, kind in enumerate(kinds)]
    complete = "all" in kinds
    families = []
    for name, rows in (
        ("searched blocks", list(range(len(front.sets)))),
        ("evenly spread blocks", [i for i, even in enumerate(is_even) if even]),
    ):
        if rows:  # evenly spread sets of every size are all that there are
            whole = complete or (name != "searched blocks" and len(rows) == setup.backbone.num_blocks + 1)
            chosen = (macs_F[rows], correct_FV[rows], whole, group_V)
            sets = [(0, front.sets[i]) for i in rows]
            families.append(Candidates(Family(name, [labels[i] for i in rows], *chosen), sets))
    return families


def own_family(setup: Setup, keep_VK: Tensor) -> Candidates:
    """Return the family of what a policy does, fixed: its most frequent decisions, and the blocks that it keeps most
    often.

    Args:
        keep_VK: bool (V, K), what the policy decides for the validation images.
    """
    K = keep_VK.shape[1]
    sets_SK, images_S = keep_VK.unique(dim=0, return_counts=True)
    frequent_SK = sets_SK[images_S.argsort(descending=True, stable=True)[:FREQUENT]]
    names = {keep: set_name(keep, "policy") for keep in map(tuple, frequent_SK.tolist())}
    order_K = keep_VK.double().mean(0).argsort(descending=True, stable=True).tolist()
    middle, step = round(keep_VK.sum(1).double().mean().item()), max(1, round(0.1 * K))
    for size in [middle + step * (n - SIZES // 2) for n in range(SIZES)]:
        if 0 < size <= K:
            keep = tuple(k in order_K[:size] for k in range(K))
            names.setdefault(keep, f"the {size} blocks that the policy keeps most often")
    return _scored(
        "the policy's own blocks, fixed", setup, [setup.backbone], {(0, keep): names[keep] for keep in names}
    )


def exits_and_blocks(setup: Setup, parts: Sequence[Backbone]) -> Candidates:
    """Return the family of one exit for all images, with evenly spread blocks on the way to it.

    Args:
        parts: for each exit, the network that ends there.
    """
    names = {}
    for n, part in enumerate(parts):
        K = part.num_blocks
        for size in sorted({round(K * step / SIZES) for step in range(1, SIZES + 1)} - {0}):
            way = f"with {size} of its {K} blocks" if size < K else "with all of its blocks"
            names[n, spread_set(K, size)] = f"exit {n} {way}"
    return _scored("exits and blocks", setup, parts, names)


def _scored(name: str, setup: Setup, networks: Sequence[Backbone], names: dict[tuple[int, Keep], str]) -> Candidates:
    """Return a family of sets, given with their names, which are scored on validation images here."""
    images, shape = setup.data.validation.plain(), setup.data.image_shape
    correct: dict[tuple[int, Keep], Tensor] = {}
    macs: dict[tuple[int, Keep], float] = {}
    for n, network in enumerate(networks):
        sets = [keep for number, keep in names if number == n]
        scorer = SetScorer(network, images, VALIDATION_IMAGES, how=setup.how)
        with waiting("scoring fixed choices on validation images", scorer.count) as wait:
            scorer.on_batch = wait.advance
            correct |= {(n, keep): right_V for keep, right_V in zip(sets, scorer.correct(sets), strict=True)}
        macs |= {(n, keep): m for keep, m in zip(sets, count_costs(network, shape).of(torch.tensor(sets)).tolist())}
    macs_F = torch.tensor([macs[place] for place in names], dtype=torch.float64)
    correct_FV = torch.stack([correct[place] for place in names])
    family = Family(name, list(names.values()), macs_F, correct_FV, group_V=_groups(images, correct_FV.shape[1]))
    return Candidates(family, list(names))


@torch.no_grad()
def dealt_blocks(setup: Setup, decisions: Decisions, images: Images) -> Rival:
    """Return the policy's decisions, dealt at random to the images that they were made for: as dear, without a look.

    They are dealt several times where that is cheap, and the expected correctness of an image is its mean over these.
    """
    N, kept = len(images), decisions.ran_NK.double().sum(1).mean().item()
    if (decisions.ran_NK == decisions.ran_NK[0]).all():  # whatever is dealt, each image gets the same
        return _dealt(decisions.macs_N.mean().item() - decisions.policy_macs, 0.0, decisions.correct_N.double())
    deals = int(min(MOST_DEALS, max(1, WORK // max(1.0, N * kept))))
    generator = torch.Generator().manual_seed(0)
    order_PN = torch.stack([torch.randperm(N, generator=generator) for _ in range(deals)])
    execution, rows = Execution(setup.backbone, setup.data.image_shape, *setup.how), []
    with waiting("judging the policy's decisions, dealt at random", N) as wait:
        for batch in images.stream(sequential(N, setup.batch_size)):
            keep_PBK = decisions.ran_NK[order_PN[:, batch.index_B.cpu()]].to(batch.label_B.device)
            answers = [execution.logits(batch.images, keep_BK).argmax(1) == batch.label_B for keep_BK in keep_PBK]
            rows.append(torch.stack(answers).cpu())
            wait.advance(len(batch))
    correct_PN = torch.cat(rows, 1).double()
    macs_N = decisions.macs_N - decisions.policy_macs
    slope = _slope(macs_N[order_PN].flatten(), correct_PN.flatten())
    return _dealt(macs_N.mean().item(), slope, correct_PN.mean(0))


def dealt_exits(decisions: Decisions, cache: CachedExits) -> Rival:
    """Return random exits at the policy's rates; nothing is drawn, as their expectation is known image by image."""
    share_N = exit_histogram(decisions.exit_N, cache.num_exits)
    accuracy_N, macs_N = (values_N.cpu() for values_N in static_exits(cache))
    slope = _slope(macs_N, accuracy_N, share_N)
    return _dealt(random_exits(cache, share_N)[1], slope, (cache.correct_MN.double().cpu() * share_N).sum(1))


def _dealt(macs: float, slope: float, correct_N: Tensor) -> Rival:
    name = "the policy's decisions, dealt at random"
    family = Family(name, [name], torch.tensor([macs], dtype=torch.float64), None, slope=slope)
    return Rival(family, Choice([(0, 1.0)], name, macs, slope), correct_N)


def _slope(macs_N: Tensor, correct_N: Tensor, weight_N: Tensor | None = None) -> float:
    """Return the slope of the least-squares line of correctness over cost, 0 if all costs are the same."""
    weight_N = torch.ones_like(macs_N) if weight_N is None else weight_N
    offset_N = macs_N - (weight_N @ macs_N) / weight_N.sum()
    spread = weight_N @ offset_N.square()
    return ((weight_N * offset_N) @ correct_N / spread).item() if spread > 0 else 0.0


def points_of(front: StaticFront, images: int) -> list[int]:
    """Return the indices of sets on a front's hull, spread over the cost, as many as are quickly scored on so many
    images, the cheapest and the dearest among them."""
    hull = front.hull
    count = max(FEWEST_POINTS, min(MOST_POINTS, 2 * WORK // max(1, images * len(front.sets[0]))))
    macs_H = torch.tensor([front.macs[i] for i in hull], dtype=torch.float64)
    wanted_P = torch.linspace(0, 1, count, dtype=torch.float64) * (macs_H[-1] - macs_H[0]) + macs_H[0]
    return [hull[place] for place in (macs_H - wanted_P[:, None]).abs().argmin(1).unique().tolist()]


def _groups(images: Images, count: int | None = None) -> Tensor | None:
    """Return which images of a set belong together, int64 (N,), or those of ``count`` images spread over the set."""
    group_N = groups_of(images)
    if group_N is None or count is None:
        return group_N
    return group_N[spread_indices(count, len(group_N))]
