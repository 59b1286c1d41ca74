"""The static front: scored rightly, searched well, mixed and stored exactly."""

from __future__ import annotations

import itertools
import json
import math
import os
from typing import Any

import pytest
import torch

from policyskip.backbones import count_costs, sparse
from policyskip.static_front import SetScorer, StaticFront, find_front, keep_text, known_front, remember, search
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


def test_a_search_that_ran_out_of_its_budget_is_known_to_one_of_the_same_settings_only(tmp_path):
    backbone, images = small_backbone(), small_images()
    costs = count_costs(backbone, (3, 12, 12))
    short = find_front(backbone, images, costs, budget=1, limit=30)
    assert not short.finished
    remember(short, tmp_path, "brief")
    assert known_front(backbone, images, tmp_path, 30, "brief") == short
    assert known_front(backbone, images, tmp_path, 30, "long") is None
    assert known_front(backbone, images, tmp_path, 31, "brief") is None  # on too few images
    whole = find_front(backbone, images, costs, budget=1e9, limit=30)
    remember(whole, tmp_path, "long")
    for key in ("brief", "long", "another"):
        assert known_front(backbone, images, tmp_path, 30, key) == whole


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
    "infinite costs": {"macs": [1.0, math.inf]},
    "true for a number": {"images": True},
    "images below 1": {"images": -3},
    "text for a truth": {"finished": "yes"},
    "another network": {"backbone": "someone's"},
    "a key too many": {"more": 1},
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_cache_with_a_wrong_value_is_no_front(damage, tmp_path):
    backbone, images = small_backbone(), small_images()
    searched_on = {"backbone": backbone.content_hash(), "data": images.fingerprint()}
    good: dict[str, Any] = {"sets": ["000000", "111111"], "accuracy": [0.5, 1.0], "macs": [1.0, 2.0], "images": 40}
    good |= {"finished": True, **searched_on}
    path = tmp_path / f"{'-'.join(searched_on.values())}.json"
    path.write_text(json.dumps(good))
    assert known_front(backbone, images, tmp_path) is not None
    path.write_text(json.dumps(good | DAMAGED[damage]))
    assert known_front(backbone, images, tmp_path) is None


@pytest.mark.parametrize("content", ["", '{"sets": ["01', "[1]", "[" * 10**6, "\x00", "9" * 10**5, None])
def test_a_cache_that_is_no_file_of_ours_is_no_front(content, tmp_path):
    backbone, images = small_backbone(), small_images()
    path = tmp_path / f"{backbone.content_hash()}-{images.fingerprint()}.json"
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
