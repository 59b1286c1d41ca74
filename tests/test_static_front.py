"""The static front: scored rightly, searched well, mixed and stored exactly."""

from __future__ import annotations

import itertools

import pytest
import torch

from policyskip.backbones import Costs, count_costs, sparse
from policyskip.static_front import SetScorer, StaticFront, find_front, keep_text, known_front, search
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
    scorer.accuracy([(True, True, True, False, False, False), (True, True, True, False, False, True)])
    assert scorer.spent == 10 * (3 + 1)
    scorer.accuracy([(True, True, True, False, False, True)])
    assert scorer.spent == 10 * 4


class Planted:
    """Scores sets by a formula in place of a network: 100 images, of which a fraction is right."""

    count = 100

    def __init__(self, K: int, formula) -> None:
        self.backbone = type("Backbone", (), {"num_blocks": K})
        self.formula, self.known, self.spent = formula, {}, 0

    def accuracy(self, sets) -> list[float]:
        for keep in set(sets) - set(self.known):
            self.known[keep] = torch.arange(self.count) < round(100 * self.formula(keep))
            self.spent += 1
        return [self.known[keep].double().mean().item() for keep in sets]


def greedy_trap(keep) -> float:
    """Block 0 is worth nothing among many, so elimination drops it first; among three it is worth the most."""
    return 0.2 + 0.09 * sum(keep[1:]) + (0.3 if keep[0] and sum(keep) <= 3 else 0.0)


def test_the_planted_optimum_is_found_where_elimination_misses_it():
    scorer = Planted(8, greedy_trap)
    sets, accuracy, finished = search(scorer, budget=2**9 * 100 - 1, beam=1)  # one short of trying everything
    best = {
        size: max(greedy_trap(keep) for keep in itertools.product([False, True], repeat=8) if sum(keep) == size)
        for size in range(9)
    }
    assert finished and [sum(keep) for keep in sets] == list(range(9))
    assert accuracy == pytest.approx([round(100 * best[size]) / 100 for size in range(9)])
    assert len(scorer.known) < 2**8, "the search must not have tried everything"


def test_a_keep_set_as_text():
    assert keep_text((True, True, False, True)) == keep_text(torch.tensor([1, 1, 0, 1]).tolist()) == "1101"


def test_few_sets_are_all_tried():
    scorer = Planted(6, greedy_trap)
    search(scorer, budget=2**7 * 100)
    assert len(scorer.known) == 2**6


def test_hints_are_taken_in_and_a_spent_budget_is_admitted():
    scorer = Planted(8, lambda keep: 1.0 if keep == (True, False) * 4 else 0.5)
    sets, accuracy, finished = search(scorer, budget=0, hints=[(True, False) * 4])
    assert not finished
    assert accuracy[[sum(keep) for keep in sets].index(4)] == 1.0


def make_front(points: list[tuple[float, float]]) -> StaticFront:
    sets = [tuple(k < i for k in range(4)) for i in range(len(points))]
    return StaticFront(sets, [a for _, a in points], [m for m, _ in points], 10, True, "b", "d")


def test_mixing_by_hand():
    """The third point lies under the line from the second to the fourth; the fifth costs more for less."""
    front = make_front([(10, 0.1), (20, 0.7), (30, 0.75), (40, 0.9), (50, 0.8)])
    assert front.mix_at(15) == [(0, 0.5), (1, 0.5)]
    assert front.mix_at(25) == [(1, 0.75), (3, 0.25)]
    assert front.mix_at(20) == [(1, 1.0)]
    assert front.mix_at(45) == front.mix_at(99) == [(3, 1.0)]
    assert front.mix_at(5) == [(0, 1.0)]


def test_a_front_is_found_stored_and_known_again(tmp_path):
    backbone, images = small_backbone(), small_images()
    front = find_front(backbone, images, count_costs(backbone, (3, 12, 12)), budget=1e9, limit=40)
    assert front.finished and [sum(keep) for keep in front.sets] == list(range(7))
    best = max(SetScorer(backbone, images).accuracy([keep for keep in EVERY if sum(keep) == 3]))
    assert front.accuracy[3] == best
    front.save(tmp_path / f"{front.backbone}-{front.data}.json")
    assert known_front(backbone, images, tmp_path) == front
    assert known_front(small_backbone(seed=1), images, tmp_path) is None
    assert known_front(backbone, small_images(seed=1), tmp_path) is None


def test_a_damaged_cache_is_no_front(tmp_path):
    backbone, images = small_backbone(), small_images()
    (tmp_path / f"{backbone.content_hash()}-{images.fingerprint()}.json").write_text('{"sets": ["01')
    assert known_front(backbone, images, tmp_path) is None


def rising(keep) -> float:
    """A block is worth its number; {0, 4, 6, 7} is worth more than all, and no subset of the best five blocks, {3, …, 7},
    nor a superset of the best three, {5, 6, 7}: it is one swap from the best four."""
    return 0.1 + 0.01 * sum(k for k, kept in enumerate(keep) if kept) + 0.5 * (keep_text(keep) == "10001011")


def test_elimination_goes_on_from_the_best_sets():
    """Two sets, their 8 children, and the 7 of the best of these, which lacks block 0; then the budget is spent."""
    scorer = Planted(8, rising)
    _, _, finished = search(scorer, budget=10, beam=1)
    assert not finished and scorer.spent == 2 + 8 + 7
    assert not any(keep[0] for keep in scorer.known if sum(keep) == 6)
    scorer = Planted(8, rising)  # all 2 + 8 + 7 + … + 2 sets of the elimination, and nothing is left for swaps
    assert not search(scorer, budget=36, beam=1)[2] and scorer.spent == 37


def test_a_set_that_is_one_swap_from_the_best_of_its_size_is_found():
    sets, _, finished = search(Planted(8, rising), budget=2**9 * 100 - 1, beam=1)
    assert finished and [keep_text(sets[size]) for size in (3, 4, 5)] == ["00000111", "10001011", "00011111"]


def test_no_set_is_above_the_front_s_mixtures():
    """Blocks differ in cost, so the best set of a size may be a dear one: cheaper ones of that size count, too."""
    backbone, images = small_backbone(), small_images()
    costs = Costs(1.0, torch.tensor([1.0, 9, 2, 8, 3, 7], dtype=torch.float64))
    front = find_front(backbone, images, costs, budget=1e9, limit=40)
    assert front.macs == [1 + sum(c for c, kept in zip((1, 9, 2, 8, 3, 7), keep) if kept) for keep in front.sets]
    for keep, accuracy in zip(EVERY, SetScorer(backbone, images).accuracy(EVERY), strict=True):
        mixed = sum(weight * front.accuracy[i] for i, weight in front.mix_at(costs.of(torch.tensor(keep)).item()))
        assert accuracy <= mixed + 1e-9
