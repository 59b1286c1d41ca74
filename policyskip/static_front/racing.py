"""Fixed keep-sets are searched here: the best that can be done without looking at the image, at every cost.

A policy that decides per image has to beat the best *fixed* choice of equal cost, so this search must be strong. Few
sets can be scored on all validation images in the time there is. So sets race: many are scored on few images, the best
of them on more, and the best of these on all.

Shapes: F sets, K blocks.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from policyskip.backbones import Costs
from policyskip.static_front.proposals import random_set, random_stage_wise, spread_sets
from policyskip.static_front.ranges import BIN, Ranges
from policyskip.static_front.scoring import Keep, SetScorer

FEW, SOME = 125, 500
"""The images of the first two heats of a race; the third has all."""
ROUNDS = 4
"""The rounds of proposals that a whole search has at least."""
PATIENCE = 3
"""The rounds without a better set after which there is nothing left to find."""
PROPOSALS, PROMOTED, FINALISTS = 6, 2, 1
"""In each round and range of costs: new sets, and how many are scored on some images and on all."""
MOST_SETS_TRIED = 2**16
"""Every set is tried only where there are at most so many, because what each does on each image is held in memory."""
CHUNK = 16
"""Sets that are scored in one pass: between two passes, a search can be stopped."""


@dataclass
class Found:
    """Holds what a search found.

    Attributes:
        kinds: how each set was found, for every set that was scored; see
            :class:`~policyskip.static_front.front.StaticFront`.
        finished: whether the whole plan was carried out.
        exhausted: whether the search ended because nothing was left to try.
        out_of_time: whether it ended because its seconds were over.
    """

    kinds: dict[Keep, str] = field(default_factory=dict)
    finished: bool = False
    exhausted: bool = False
    out_of_time: bool = False


class _StoppedError(Exception):
    """The budget or the time is spent."""


def samples(K: int) -> int:
    """Return the number of sets that are drawn at random before any is predicted."""
    return min(200, 3 * K + 20)


def least_budget(K: int, count: int) -> int:
    """Return the images × blocks that suffice for the whole plan of a search over K blocks on ``count`` images.

    A search over small networks, or in which fewer sets are promoted, takes less.
    """
    spread = count * sum(map(sum, spread_sets(K)))
    drawn = samples(K) * min(FEW, count) * 0.6 * K
    return int(min(spread + drawn + ROUNDS * round_cost(K, count), 2 ** (K + 1) * count))


def round_cost(K: int, count: int) -> float:
    """Return the images × blocks that a round takes at most, in a search over K blocks on ``count`` images."""
    few, some = min(FEW, count), min(SOME, count)
    return (PROPOSALS * few + PROMOTED * (some - few) + FINALISTS * (count - some)) * K / BIN / 2


def tries_every_set(K: int, count: int, budget: float) -> bool:
    """Return whether :func:`search` can afford all 2^K sets on ``count`` images."""
    return 2**K <= MOST_SETS_TRIED and 2 ** (K + 1) * count <= budget


def search(
    scorer: SetScorer,
    costs: Costs,
    budget: float,
    hints: Mapping[Keep, str] | None = None,
    seconds: float | None = None,
    on_pass: Callable[[float], object] | None = None,
) -> Found:
    """Search the best fixed keep-sets of every cost.

    Every set is tried if that fits the budget. Otherwise:

    1. all blocks, no block, the hints and evenly spread sets of every size are scored on all images;
    2. sets drawn at random, and sets that are evenly spread within each stage, are scored on few images;
    3. in each round, a surrogate is fitted to all scores; it proposes sets for every range of costs, by moves and swaps
       from the best sets so far, from evenly spread and from random ones; these race on few images, some and all;
    4. when the plan's rounds are over, rounds go on until the budget is spent, or none has found anything better for a
       while.

    Args:
        scorer: scores sets on validation images; what it knows already costs nothing.
        costs: of the network's blocks.
        budget: bound on ``scorer.spent``. All blocks, no block and the hints are scored even if it is too small.
        hints: sets found elsewhere, and how each was found.
        seconds: end after so many seconds; what is found then depends on the machine. None: no bound.
        on_pass: called now and then, between two passes, with what ``scorer.spent`` will be at the end, as far as that
            can be foreseen: if no round after those of the plan finds anything better.

    Returns: what was found; the scores are in ``scorer.known``.
    """
    return _Search(scorer, costs, budget, seconds, on_pass or (lambda expected: None)).run(dict(hints or {}))


class _Search:
    """A search that is under way, with what it has found so far; see :func:`search`.

    Attributes:
        expected: what will have been spent at the end, as far as that can be foreseen and the budget allows it.
        rounds_left: the rounds that are still to come if those after the plan find nothing better.
    """

    def __init__(
        self, scorer: SetScorer, costs: Costs, budget: float, seconds: float | None, on_pass: Callable[[float], object]
    ) -> None:
        self.scorer, self.costs, self.budget, self.on_pass = scorer, costs, budget, on_pass
        self.seconds, self.began = seconds, time.monotonic()
        self.K, self.stages = scorer.backbone.num_blocks, scorer.backbone.stages
        self.full: Keep = (True,) * self.K
        self.few, self.some = (min(images, scorer.count) for images in (FEW, SOME))
        self.found = Found()
        self.draw = random.Random(0)
        self.ranges = Ranges(scorer, costs, self.draw)
        self.rounds_left, self.round_cost = ROUNDS + PATIENCE, round_cost(self.K, scorer.count)
        self.expected = least_budget(self.K, scorer.count) + PATIENCE * self.round_cost

    def run(self, hints: dict[Keep, str]) -> Found:
        ends = {self.full: "spread", (False,) * self.K: "spread"}
        self.found.kinds |= hints | ends
        self.scorer.score([*ends, *hints])
        if len(self.scorer.known) == 2**self.K:
            self.found.finished = self.found.exhausted = True
            return self.found
        try:
            if tries_every_set(self.K, self.scorer.count, self.budget):
                self._try_every_set()
                self.found.finished = self.found.exhausted = True
                return self.found
            for keep in spread_sets(self.K):
                self._score([keep], "spread")
            self._draw_sets()
            while self.rounds_left > PATIENCE:
                self._round()
                self.rounds_left -= 1
            self.found.finished = True
            while self.rounds_left:
                self.rounds_left = PATIENCE if self._round() else self.rounds_left - 1
            self.found.exhausted = True
        except _StoppedError:
            pass
        return self.found

    def _score(self, sets: Sequence[Keep], kind: str, images: int | None = None) -> None:
        """Score sets, a few at a time.

        Raises:
            _StoppedError: the budget or the time does not allow it.
        """
        sets = sorted(sets)
        for begin in range(0, len(sets), CHUNK):
            for keep in sets[begin : begin + CHUNK]:
                self.found.kinds.setdefault(keep, kind)
            self._pass(sets[begin : begin + CHUNK], images)

    def _pass(self, sets: Sequence[Keep], images: int | None) -> None:
        """Score sets in one pass.

        Raises:
            _StoppedError: the budget or the time does not allow it.
        """
        elapsed = time.monotonic() - self.began
        if self.seconds is not None and elapsed > self.seconds:
            self.found.out_of_time = True
            raise _StoppedError
        if self.scorer.spent + self.scorer.price(sets, images) > self.budget:
            raise _StoppedError
        self.scorer.score(sets, images)
        in_time = self.budget if self.seconds is None else self.scorer.spent * self.seconds / max(elapsed, 1e-9)
        self.on_pass(min(self.expected, self.budget, in_time))

    def _try_every_set(self) -> None:
        """Score all 2^K sets on all images."""
        self.expected = (2**self.K - 1) * self.scorer.count
        self.found.kinds |= {keep: "spread" for keep in spread_sets(self.K)}
        for code in range(2**self.K):
            self.found.kinds.setdefault(tuple(bool(code >> k & 1) for k in range(self.K)), "all")
        every = sorted(self.found.kinds)  # sets that begin alike stand side by side, and share what they compute
        size = max(CHUNK, len(every) // 64)
        for begin in range(0, len(every), size):
            self._pass(every[begin : begin + size], None)

    def _draw_sets(self) -> None:
        """Score sets drawn at random on few images: half of them evenly spread within each stage."""
        kinds: dict[str, set[Keep]] = {"random": set(), "stages": set()}
        total = samples(self.K)
        for i in range(total):
            count = max(1, round(self.K * (0.1 + 0.85 * (i + 0.5) / total)))
            if i % 2:
                kinds["stages"].add(random_stage_wise(self.stages, count, self.draw))
            else:
                kinds["random"].add(random_set([1.0] * self.K, count, self.draw))
        for kind, sets in kinds.items():
            self._score(sorted(sets - set(self.scorer.known)), kind, self.few)

    def _round(self) -> bool:
        """Propose sets and let them race; return whether any range of costs has a better set than before."""
        before, begin = self.ranges.champions(), self.scorer.spent
        self.expected = begin + self.rounds_left * self.round_cost
        for kind, sets in self._proposals().items():
            self._score(sorted(sets), kind, self.few)
        self._promote(self.few, self.some, PROMOTED, margin=0.003)
        self._promote(self.some, self.scorer.count, FINALISTS, margin=0.0)
        self.round_cost = self.scorer.spent - begin
        return self.ranges.champions() != before

    def _promote(self, heat: int, images: int, most: int, margin: float) -> None:
        """Score on ``images`` images the best predicted sets of each range, of those scored on ``heat`` at least.

        Only sets are scored that are predicted to be better than the range's best, or worse by at most ``margin``.
        """
        if heat == images:
            return
        champions, promoted = self.ranges.champions(), []
        for number in self.ranges.numbers():
            surrogate, ranked = self.ranges.fit(number)
            entrants = [keep for keep in ranked if heat <= len(self.scorer.known[keep]) < images]
            if number in champions and entrants:
                predicted = surrogate.predict(self.ranges.stacked([champions[number], *entrants])).tolist()
                entrants = [
                    k for k, value in zip(entrants, predicted[1:], strict=True) if value > predicted[0] - margin
                ]
            promoted += entrants[:most]
        self._score(promoted, "", images)

    def _proposals(self) -> dict[str, set[Keep]]:
        """Return new sets for every range of costs, by how each was found."""
        found: dict[str, set[Keep]] = {"moves": set(), "surrogate": set()}
        for number in self.ranges.numbers():
            whole, ranked = self.ranges.fit(number)
            part, _ = self.ranges.fit(number, 0.7)  # another opinion, which makes the proposals differ
            for i in range(PROPOSALS):
                surrogate = whole if i < PROPOSALS / 2 else part
                taken = {*found["moves"], *found["surrogate"]}
                low, high = number * BIN, (number + 1) * BIN
                start = self._start(i, ranked, (low + high) / 2)
                a_third = low + i % 3 / 3 * BIN, low + (i % 3 + 1) / 3 * BIN  # so that all costs are covered
                new = self.ranges.climb(surrogate, start, *a_third, taken)
                new = new or self.ranges.climb(surrogate, start, low, high, taken)
                if new is not None:
                    is_near = any(sum(a != b for a, b in zip(new, keep, strict=True)) <= 2 for keep in ranked[:3])
                    found["moves" if is_near else "surrogate"].add(new)
        return found

    def _start(self, i: int, ranked: Sequence[Keep], share: float) -> Keep:
        """Return the set that proposal ``i`` of a range of costs starts from: one of the best so far, or one drawn with
        the blocks that these keep."""
        if i < 2 and len(ranked) > i:
            return ranked[i]
        use_K = self.ranges.stacked(ranked[:8] or [self.full]).double().mean(0)
        return random_set((use_K + 0.2).tolist(), max(1, round(share * self.K)), self.draw)
