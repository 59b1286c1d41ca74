"""The static front of a network is found here: searched, and the sets that are worth keeping chosen.

Shapes: F sets, N images, K blocks.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch

from policyskip.backbones import Backbone, Costs
from policyskip.data import Images
from policyskip.errors import UserError
from policyskip.execution.ways import DEFAULT, How
from policyskip.static_front.cache import store_scores, stored_scores
from policyskip.static_front.front import StaticFront
from policyskip.static_front.racing import search
from policyskip.static_front.ranges import BIN
from policyskip.static_front.scoring import Keep, SetScorer

KEPT_IN_RANGE, KEPT_OF_SIZE = 5, 2
"""The sets that a front keeps of each range of costs, and of each number of blocks."""
STORE_EVERY = 30.0
"""Seconds after which a search under way is stored again."""


def find_front(
    backbone: Backbone,
    images: Images,
    costs: Costs,
    budget: float,
    limit: int,
    hints: Mapping[Keep, str] | None = None,
    on_progress: Callable[[int], object] | None = None,
    seconds: float | None = None,
    scores_file: Path | None = None,
    on_expected: Callable[[float], object] | None = None,
    how: How = DEFAULT,
) -> StaticFront:
    """Search the static front of a backbone on at most ``limit`` validation images.

    Args:
        costs: of the backbone's blocks.
        budget, hints, seconds: see :func:`~policyskip.static_front.racing.search`.
        on_progress: see :class:`~policyskip.static_front.scoring.SetScorer`.
        scores_file: where the scores are stored now and then and at the end. A search that was interrupted, or one with
            a larger budget, takes them from there, and finds what it would have found in one go.
        on_expected: called now and then with what will have been spent at the end, as far as that can be foreseen.
        how: in which way and precision the network is executed.

    Raises:
        UserError: ``budget`` is negative or no number, ``limit`` below 1, or there are no images.
    """
    if not budget >= 0 or limit < 1:
        raise UserError(f"front.budget must not be negative and front.images at least 1, got {budget} and {limit}")
    if not len(images):
        raise UserError("there are no validation images on which fixed sets could be searched")
    scorer = SetScorer(backbone, images, limit, on_progress=on_progress, how=how)
    if scores_file is not None:
        scorer.stored = stored_scores(scores_file, backbone.num_blocks, scorer.count)
    stored_at = time.monotonic()

    def store_now() -> None:
        if scores_file is not None and scorer.has_computed:
            with suppress(UserError):  # a cache that cannot be written costs time, nothing else
                longer = {k: s for k, s in scorer.stored.items() if len(s) > len(scorer.known.get(k, ()))}
                store_scores({**scorer.known, **longer}, scores_file)

    def after_pass(expected: float) -> None:
        nonlocal stored_at
        if on_expected is not None:
            on_expected(expected)
        if time.monotonic() - stored_at > STORE_EVERY:
            store_now()
            stored_at = time.monotonic()

    try:
        found = search(scorer, costs, budget, hints, seconds, after_pass)
    finally:
        store_now()
    sets = sets_to_keep(scorer, costs, found.kinds)
    return StaticFront(
        sets=sets,
        kinds=[found.kinds[keep] for keep in sets],
        correct_FN=torch.stack(scorer.correct(sets)),
        macs=costs.of(torch.tensor(sets)).tolist(),
        images=scorer.count,
        finished=found.finished,
        spent=scorer.spent,
        tried=len(scorer.known),
        backbone=backbone.content_hash(),
        data=images.fingerprint(),
        budget=float("inf") if found.exhausted else float(scorer.spent if found.out_of_time else budget),
    )


def sets_to_keep(scorer: SetScorer, costs: Costs, kinds: Mapping[Keep, str]) -> list[Keep]:
    """Choose the sets of a front, the smallest first, among those that were scored on all images.

    These are: all that were not chosen for what they reach (evenly spread ones, hints), and of each number of blocks
    and each range of costs the surest ones: those with the highest mean probability of the label. Of many sets, the
    most accurate one owes more to the choice of images than the surest one does (see ``Ranges.value``), so the choice
    by accuracy is left to be made among the surest.
    """
    known = sorted(keep for keep, scores in scorer.known.items() if len(scores) == scorer.count)
    sureness = {keep: scorer.known[keep].probability_n.double().mean().item() for keep in known}
    macs = dict(zip(known, costs.of(torch.tensor(known)).tolist(), strict=True))
    by_size, by_cost = defaultdict(list), defaultdict(list)
    for keep in known:
        by_size[sum(keep)].append(keep)
        by_cost[int(macs[keep] / costs.full / BIN - 1e-9)].append(keep)
    kept = {keep for keep in known if kinds[keep] in ("spread", "policy")}
    for groups, most in ((by_size, KEPT_OF_SIZE), (by_cost, KEPT_IN_RANGE)):
        for sets in groups.values():
            kept |= set(sorted(sets, key=lambda keep: -sureness[keep])[:most])
    return sorted(kept, key=lambda keep: (sum(keep), keep))
