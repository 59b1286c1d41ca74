"""The static front: scored rightly, searched well, mixed and stored exactly."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from policyskip.backbones import Costs, count_costs, sparse
from policyskip.errors import UserError
from policyskip.static_front import (
    Keep,
    SetScorer,
    StaticFront,
    find_front,
    keep_text,
    known_front,
    least_budget,
    racing,
    remember,
    search,
    spread_set,
)
from policyskip.static_front.cache import store_scores, stored_scores
from policyskip.static_front.finding import sets_to_keep
from policyskip.static_front.proposals import neighbours, random_set, random_stage_wise, spread_sets, stage_wise
from policyskip.static_front.ranges import Ranges
from policyskip.static_front.scoring import Scores
from policyskip.static_front.surrogate import Surrogate
from policyskip.static_front.table import accuracy_on_other_images, describe
from tests.conftest import small_backbone, small_images

EVERY = list(itertools.product([False, True], repeat=6))


@pytest.mark.parametrize("shortcut", ["pool", "B"])
def test_scores_along_the_tree_are_those_of_plain_forwards(shortcut):
    """Strided convolutions give negative features, on which a ReLU behind a skipped block would be seen."""
    backbone, images = small_backbone(shortcut=shortcut), small_images()
    scorer = SetScorer(backbone, images, limit=30, batch_size=7)
    chosen = [EVERY[i] for i in (0, 63, 5, 40, 41, 5)]
    index_N = torch.linspace(0, 39, 30).round().long()  # spread over all 40, as folders are sorted by class
    for keep, correct_N in zip(chosen, scorer.correct(chosen), strict=True):
        keep_BK = torch.tensor(keep).expand(30, -1)
        with torch.no_grad():
            expected = sparse(backbone, images.images[index_N], keep_BK).argmax(1) == images.label_N[index_N]
        assert torch.equal(correct_N, expected)


def test_common_beginnings_are_computed_once():
    scorer = SetScorer(small_backbone(), small_images(), limit=10)
    two = [(True, True, True, False, False, False), (True, True, True, False, False, True)]
    assert scorer.price(two) == 10 * (3 + 1) and scorer.price(two, 4) == 4 * (3 + 1)
    scorer.accuracy(two)
    assert scorer.spent == 10 * (3 + 1) and scorer.price(two) == 0
    scorer.accuracy(two)
    assert scorer.spent == 10 * 4


def test_more_images_cost_only_what_is_new_and_give_the_same_scores():
    scorer, whole = (SetScorer(small_backbone(), small_images(), batch_size=7) for _ in range(2))
    scorer.score(EVERY[:20], 9)
    assert {len(scores) for scores in scorer.known.values()} == {9}
    scorer.score(EVERY[10:30], 25)
    scorer.score(EVERY[:30])
    assert scorer.count == 40
    for one, other in zip(scorer.correct(EVERY[:30]), whole.correct(EVERY[:30]), strict=True):
        assert torch.equal(one, other)
    ends = [scorer.known[EVERY[3]].probability_n, whole.known[EVERY[3]].probability_n]
    torch.testing.assert_close(*ends, atol=1e-3, rtol=0)


class Planted(SetScorer):
    """Scores sets by a formula in place of a network: a set's share of the images, in a fixed order, is right."""

    def __init__(self, K: int, formula, count: int = 100) -> None:
        self.backbone = SimpleNamespace(num_blocks=K, stages=(K // 2, K - K // 2))
        self.formula, self.known, self.stored, self.spent, self.count = formula, {}, {}, 0, count
        self.has_computed, self._order_N, self.on_progress = False, torch.arange(count), lambda spent: None
        self.costs = Costs(0.1 * K, torch.ones(K, dtype=torch.float64))

    def _computed(self, sets, first: int, last: int) -> dict[Keep, Scores]:
        self.has_computed = True
        rank_n = torch.arange(first, last) * 37 % self.count / self.count  # any part of the images is a fair sample
        return {
            keep: Scores(rank_n < self.formula(keep), torch.full_like(rank_n, self.formula(keep)).half())
            for keep in sets
        }

    def best(self, size: int) -> float:
        """The value of the best set of so many blocks that was scored on all images."""
        return max(self.formula(keep) for keep, s in self.known.items() if sum(keep) == size and len(s) == self.count)


def additive(keep) -> float:
    """The blocks differ in worth: the best m are known without a search."""
    worth = [(k * 7 % len(keep) + 1) for k in range(len(keep))]
    return 0.9 * sum(w for w, kept in zip(worth, keep, strict=True) if kept) / sum(worth)


def pairs(keep) -> float:
    """A block is worth something only beside its partner, the next one: single moves from most sets win nothing."""
    both = sum(a and b for a, b in zip(keep[::2], keep[1::2], strict=True))
    return 0.1 + 0.8 * both / (len(keep) // 2) + 0.001 * sum(keep)


def test_the_best_sets_of_additive_blocks_are_found_without_trying_all():
    scorer = Planted(16, additive)
    found = search(scorer, scorer.costs, 2e5)
    assert found.finished and len(scorer.known) < 2**16 / 10
    assert {len(scores) for scores in scorer.known.values()} == {100}
    for size in (5, 8, 11):
        worths = sorted((k * 7 % 16 + 1 for k in range(16)), reverse=True)
        assert scorer.best(size) >= 0.98 * 0.9 * sum(worths[:size]) / sum(worths)


def test_blocks_that_need_each_other_are_found():
    scorer = Planted(12, pairs)
    search(scorer, scorer.costs, 1e5)
    assert scorer.best(6) >= 0.1 + 0.8 * 3 / 6


@cache
def whole_search() -> Planted:
    scorer = Planted(14, additive, count=600)
    search(scorer, scorer.costs, 2e5)
    return scorer


@pytest.mark.parametrize("part", ["climb", "promote"])
def test_without_a_part_of_it_the_search_finds_less(part, monkeypatch):
    """The climbs on the surrogate, and the races that end on all images, each add to what is found."""
    whole = whole_search()
    if part == "climb":
        monkeypatch.setattr(Ranges, "climb", lambda *arguments: None)
    else:
        monkeypatch.setattr(racing, "FINALISTS", 0)
    less = Planted(14, additive, count=600)
    search(less, less.costs, 2e5)
    assert sum(map(whole.best, range(3, 12))) > sum(map(less.best, range(3, 12))) + 0.03


def test_evenly_spread_sets_are_always_tried():
    """Where only even distances help, no surrogate is needed: the sets are there, of every size, named as such."""
    scorer = Planted(12, lambda keep: 0.9 if keep == spread_set(12, sum(keep)) else 0.1)
    found = search(scorer, scorer.costs, 5e4)
    assert [found.kinds[spread_set(12, m)] for m in range(13)] == ["spread"] * 13
    assert all(scorer.best(m) == 0.9 for m in range(13))


@pytest.mark.parametrize("K", [1, 2, 5, 18, 54, 100])
def test_the_axis_of_costs_is_covered_at_any_depth(K, monkeypatch):
    """With the stated budget the whole plan is carried out, and no gap is wider than a block or 0.05."""
    if K > 5:  # fewer proposals, which take most of the time here, and nothing beyond the plan
        for name, value in (("ROUNDS", 1), ("PROPOSALS", 1), ("PATIENCE", 0)):
            monkeypatch.setattr(racing, name, value)
    scorer = Planted(K, lambda keep: 0.1 + 0.8 * sum(keep) / K, count=20)
    found = search(scorer, scorer.costs, least_budget(K, 20))
    assert found.finished and scorer.spent <= least_budget(K, 20)
    sets = sets_to_keep(scorer, scorer.costs, found.kinds)
    shares = sorted(scorer.costs.of(torch.tensor(sets)).div(scorer.costs.full).tolist())
    assert max(b - a for a, b in itertools.pairwise(shares)) <= max(0.05, 1 / (1.1 * K)) + 1e-9
    assert len(sets) <= 300


def test_few_sets_are_all_tried():
    scorer = Planted(6, additive)
    found = search(scorer, scorer.costs, budget=2**7 * 100)
    assert len(scorer.known) == 2**6 and found.exhausted and set(found.kinds.values()) == {"spread", "all"}


def test_where_all_sets_are_tried_a_front_keeps_the_evenly_spread_ones_however_bad_they_are():
    spread = {spread_set(6, m) for m in range(7)}
    scorer = Planted(6, lambda keep: 0.1 if keep in spread else 0.9)
    found = search(scorer, scorer.costs, budget=2**7 * 100)
    assert spread <= set(sets_to_keep(scorer, scorer.costs, found.kinds)) and found.exhausted


def test_hints_are_taken_in_and_a_spent_budget_is_admitted():
    scorer = Planted(8, lambda keep: 1.0 if keep == (True, False) * 4 else 0.5)
    found = search(scorer, scorer.costs, budget=0, hints={(True, False) * 4: "policy"})
    assert not found.finished and scorer.best(4) == 1.0 and found.kinds[(True, False) * 4] == "policy"
    assert len(scorer.known) == 3


def test_a_search_that_is_out_of_time_says_so():
    scorer = Planted(16, additive)
    found = search(scorer, scorer.costs, 1e9, seconds=0)
    assert found.out_of_time and not found.finished and len(scorer.known) == 2


def test_a_search_foresees_that_its_time_is_over(monkeypatch):
    seconds = itertools.count()
    monkeypatch.setattr(racing, "time", SimpleNamespace(monotonic=lambda: next(seconds)))  # a second a pass
    scorer, foreseen = Planted(16, additive), list[float]()
    assert search(scorer, scorer.costs, 1e5, seconds=10, on_pass=foreseen.append).out_of_time
    assert len(foreseen) == 10 and foreseen[0] < 1e5 and foreseen[-1] == scorer.spent


def test_a_search_foresees_when_it_ends_and_not_when_its_budget_would():
    scorer, foreseen = Planted(8, additive, count=200), list[tuple[int, float]]()
    found = search(scorer, scorer.costs, 1e5, on_pass=lambda expected: foreseen.append((scorer.spent, expected)))
    assert found.exhausted and scorer.spent < 0.7e5 and all(expected <= 1e5 for _, expected in foreseen)
    late = [expected for spent, expected in foreseen if spent > 0.7 * scorer.spent]
    assert late and all(abs(expected / scorer.spent - 1) < 0.25 for expected in late)


def test_the_surrogate_recovers_additive_values_from_few_noisy_scores():
    draw = torch.Generator().manual_seed(0)
    keep_FK = torch.rand(120, 20, generator=draw) < 0.6
    value_F = torch.tensor([additive(keep) for keep in keep_FK.tolist()])
    noisy_F = value_F + 0.03 * torch.randn(120, generator=draw)
    surrogate = Surrogate(keep_FK[:100], noisy_F[:100], torch.full((100,), 0.03**2), (10, 10))
    error = (surrogate.predict(keep_FK[100:]) - value_F[100:]).square().mean().sqrt()
    assert error < 0.02 < value_F[100:].std() / 2
    on_scored = (surrogate.predict(keep_FK[:100]) - value_F[:100]).square().mean().sqrt()
    assert on_scored < 0.02  # nearer to the truth than the scores themselves


def test_sets_of_rules_by_hand():
    assert keep_text(spread_set(10, 4)) == "1010010100"  # at ⌊i·10/4⌋ = 0, 2, 5, 7
    assert keep_text(stage_wise((4, 4), (2, 1))) == "10101000"
    assert keep_text(stage_wise((4, 4), (2, 1), phase=0.5)) == "01010010"
    draw = random.Random(0)
    for count in range(13):
        assert sum(random_stage_wise((3, 4, 5), count, draw)) == sum(random_set([0.2, 1.0] * 6, count, draw)) == count
    near = {keep_text(keep) for keep in neighbours(torch.tensor([True, False, True])).tolist()}
    assert near == {"001", "111", "100", "011", "110"}
    assert keep_text(spread_sets(6)[0]) == "111111" and {sum(keep) for keep in spread_sets(6)} == set(range(7))


def test_a_keep_set_as_text():
    assert keep_text((True, True, False, True)) == keep_text(torch.tensor([1, 1, 0, 1]).tolist()) == "1101"


def make_front(points: list[tuple[float, float]]) -> StaticFront:
    sets = [tuple(k < i for k in range(4)) for i in range(len(points))]
    correct_FN = torch.stack([torch.arange(100) < round(100 * accuracy) for _, accuracy in points])
    kinds = ["spread", *["moves"] * (len(points) - 1)]
    return StaticFront(sets, kinds, correct_FN, [macs for macs, _ in points], 100, True, 7, 9, "b", "d", 1e6)


def test_the_hull_by_hand():
    """The third point lies under the line from the second to the fourth; the fifth costs more for less."""
    assert make_front([(10, 0.1), (20, 0.7), (30, 0.75), (40, 0.9), (50, 0.8)]).hull == [0, 1, 3]


def test_a_front_is_found_stored_and_known_again(tmp_path):
    backbone, images = small_backbone(), small_images()
    front = find_front(backbone, images, count_costs(backbone, (3, 12, 12)), budget=1e9, limit=40)
    assert front.finished and {sum(keep) for keep in front.sets} == set(range(7)) and front.tried == 64
    for keep, correct_N in zip(front.sets, front.correct_FN, strict=True):
        with torch.no_grad():
            logits = sparse(backbone, images.images, torch.tensor(keep).expand(40, -1))
        assert torch.equal(correct_N, logits.argmax(1) == images.label_N)  # in the images' own order
    remember(front, tmp_path)
    assert known_front(backbone, images, tmp_path) == front
    assert known_front(small_backbone(seed=1), images, tmp_path) is None
    assert known_front(backbone, small_images(seed=1), tmp_path) is None


def test_a_front_is_known_to_those_who_ask_for_no_more(tmp_path):
    backbone, images = small_backbone(), small_images()
    costs = count_costs(backbone, (3, 12, 12))
    short = find_front(backbone, images, costs, budget=1, limit=30)
    assert not short.finished and short.budget == 1
    remember(short, tmp_path)
    assert known_front(backbone, images, tmp_path, 30, 1) == short
    assert known_front(backbone, images, tmp_path, 30, 2) is None
    assert known_front(backbone, images, tmp_path, 31, 1) is None  # on too few images
    whole = find_front(backbone, images, costs, budget=1e9, limit=30)
    remember(whole, tmp_path)
    assert known_front(backbone, images, tmp_path, 30, 1e12) == whole  # nothing was left to try
    hint = (True, False) * 3
    own = find_front(backbone, images, costs, budget=1, limit=40, hints={hint: "policy"})
    remember(own, tmp_path, [hint])
    assert known_front(backbone, images, tmp_path, 40, 1) is None
    assert known_front(backbone, images, tmp_path, 40, 1, [hint]) == own
    assert known_front(backbone, images, tmp_path, 40, 1, [(True,) * 6]) is None


class Killed(BaseException):
    """What ends a search from outside."""


@pytest.mark.parametrize("killed_after", [200, 700])
def test_an_interrupted_search_goes_on_and_ends_as_one_without_interruption(killed_after, tmp_path):
    backbone, images = small_backbone(), small_images()
    costs, file = count_costs(backbone, (3, 12, 12)), tmp_path / "a.scores"
    budget = 1700  # less than all sets take
    one_go = find_front(backbone, images, costs, budget, 30)

    def kill(spent: int) -> None:
        if spent > killed_after:
            raise Killed

    with pytest.raises(Killed):
        find_front(backbone, images, costs, budget, 30, on_progress=kill, scores_file=file)
    kept = stored_scores(file, 6, 30)
    assert kept and find_front(backbone, images, costs, budget, 30, scores_file=file) == one_go
    assert len(stored_scores(file, 6, 30)) > len(kept)
    more = find_front(backbone, images, costs, 1e9, 30, scores_file=file)
    assert more == find_front(backbone, images, costs, 1e9, 30)


def every_change(content: bytes) -> Iterator[bytes]:
    """The content with each of its bytes changed in turn, and at last without its last bytes."""
    for place in range(len(content)):
        yield content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    yield content[:-3]


def test_scores_of_another_search_or_damaged_ones_are_not_read(tmp_path):
    file = tmp_path / "a.scores"
    store_scores(
        {(True, False): Scores(torch.tensor([True, False, True]), torch.tensor([0.5, 0.25, 1.0]).half())}, file
    )
    (scores,) = stored_scores(file, 2, 3).values()
    assert scores.right_n.tolist() == [True, False, True] and scores.probability_n.tolist() == [0.5, 0.25, 1.0]
    assert stored_scores(file, 3, 3) == stored_scores(file, 2, 2) == stored_scores(tmp_path / "none", 2, 3) == {}
    for content in every_change(file.read_bytes()):
        file.write_bytes(content)
        (kept,) = stored_scores(file, 2, 3).values() or [scores]
        assert torch.equal(kept.right_n, scores.right_n) and torch.equal(kept.probability_n, scores.probability_n)
    assert stored_scores(file, 2, 3) == {}  # cut short


def test_a_front_of_which_a_letter_is_damaged_is_not_used(tmp_path):
    backbone, images = small_backbone(), small_images()
    front = find_front(backbone, images, count_costs(backbone, (3, 12, 12)), budget=1, limit=8)
    remember(front, tmp_path)
    (file,) = tmp_path.iterdir()
    assert StaticFront.load(file) == front
    for content in itertools.islice(every_change(file.read_bytes()), 0, None, 7):
        file.write_bytes(content)
        with suppress(ValueError):
            assert StaticFront.load(file) == front


def test_a_front_says_how_strong_it_is():
    """Two sets of one range of costs: the one is right on the even images, the other on the odd ones. The choice on
    one half is always wrong on the other; if one of the sets is right on all images, it is not."""
    even, odd = torch.arange(100) % 2 == 0, torch.arange(100) % 2 == 1
    assert accuracy_on_other_images(torch.stack([even, odd]), [0, 1]) == 0.0
    assert accuracy_on_other_images(torch.stack([even | odd, even]), [0, 1]) == 1.0
    lines = describe(make_front([(10, 0.1), (20, 0.7), (30, 0.75), (40, 0.9)]))
    assert "4 fixed sets of 4 blocks, searched on 100 validation images: 9 sets tried" in lines[0]
    assert lines[-1].split() == ["1.00", "3", "90.00", "90.00", "10.00", "moves", "1110"] and len(lines) == 6
    nothing = replace(make_front([(10, 0.1), (20, 0.7)]), tried=2, finished=False)
    assert "has found nothing" in describe(nothing)[0]
    both = replace(make_front([(10, 0.1), (20, 0.7)]), sets=[(False,), (True,)], tried=2, budget=math.inf)
    assert "2 fixed sets of 1 blocks" in describe(both)[0]  # there are no others


def test_a_search_without_a_budget_or_images_is_refused():
    """No sum is larger than NaN, so such a budget would never be spent."""
    backbone = small_backbone()
    costs = count_costs(backbone, (3, 12, 12))
    with pytest.raises(UserError, match="front.budget must not be negative"):
        find_front(backbone, small_images(), costs, budget=math.nan, limit=40)
    with pytest.raises(UserError, match="no validation images"):
        find_front(backbone, small_images(0), costs, budget=1e4, limit=40)


DAMAGED: dict[str, Any] = {
    "a set of another length": {"sets": ["000000", "11"]},
    "sets of no network of ours": {"sets": ["0", "1"]},
    "a letter in a set": {"sets": ["00000x", "111111"]},
    "no set": {"sets": [], "macs": [], "accuracy": []},
    "an accuracy too few": {"accuracy": [0.5]},
    "an accuracy of 7": {"accuracy": [0.5, 7.0]},
    "an accuracy of text": {"accuracy": [0.5, "0.9"]},
    "an accuracy that is no number": {"accuracy": [0.5, math.nan]},
    "costs below 0": {"macs": [-1e300, 2.0]},
    "no costs": {"macs": [0.0, 0.0]},
    "infinite costs": {"macs": [1.0, math.inf]},
    "true for a number": {"images": True},
    "images below 1": {"images": -3},
    "text for a truth": {"finished": "yes"},
    "another network": {"backbone": "someone's"},
    "a key too many": {"more": 1},
    "a letter that is no digit": {"correct": ["a8", "fg"]},
    "answers on too many images": {"correct": ["a80", "fc0"]},
    "a set without answers": {"correct": ["a8"]},
    "a set of no kind": {"kinds": ["spread"]},
    "a budget below 0": {"budget": -1.0},
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_cache_with_a_wrong_value_is_no_front(damage, tmp_path):
    backbone, images = small_backbone(), small_images()
    searched_on = {"backbone": backbone.content_hash(), "data": images.fingerprint()}
    good: dict[str, Any] = {"sets": ["000000", "111111"], "accuracy": [0.5, 1.0], "macs": [1.0, 2.0], "images": 6}
    good |= {"finished": True, "correct": ["a8", "fc"], "kinds": ["spread"] * 2, "budget": 7.0, **searched_on}
    path = tmp_path / f"{'-'.join(searched_on.values())}-6.json"
    path.write_text(json.dumps(good))
    assert known_front(backbone, images, tmp_path) is not None
    path.write_text(json.dumps(good | DAMAGED[damage]))
    assert known_front(backbone, images, tmp_path) is None


@pytest.mark.parametrize("content", ["", '{"sets": ["01', "[1]", "[" * 10**6, "\x00", "9" * 10**5, None])
def test_a_cache_that_is_no_file_of_ours_is_no_front(content, tmp_path):
    backbone, images = small_backbone(), small_images()
    path = tmp_path / f"{backbone.content_hash()}-{images.fingerprint()}-40.json"
    if content is None:
        os.mkfifo(path)  # it would be read for ever
    else:
        path.write_text(content)
    assert known_front(backbone, images, tmp_path) is None


def test_a_file_too_large_for_a_front_is_not_read(tmp_path):
    with (tmp_path / "front.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="a file of its kind has at most"):
        StaticFront.load(tmp_path / "front.json")
