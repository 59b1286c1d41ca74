"""The search for passes: what it computes from cached answers is what the passes then do, and it finds what pays."""

from __future__ import annotations

import pytest
import torch

from policyskip.agents.passes import Passes
from policyskip.backbones import Costs, PassNetwork
from policyskip.data import batch_at
from policyskip.errors import UserError
from policyskip.exits.cache import cache_exits
from policyskip.exits.pass_search import (
    Answers,
    Runner,
    find_answers,
    joined,
    pairs,
    search_passes,
    stage_patterns,
    thirds,
)
from policyskip.exits.rules import first_exit
from tests.conftest import small_backbone, small_images

IMAGES = small_images(60)


@pytest.fixture(scope="module")
def answers() -> Answers:
    return find_answers(small_backbone(), IMAGES, candidates=8, limit=60, seed=0)


def test_candidates_are_products_of_stages_and_end_with_the_whole_network(answers):
    halves = {keep[2 * stage : 2 * stage + 2] for keep in answers.sets for stage in range(3)}
    assert len(answers.sets) == len(set(answers.sets)) == 8 and answers.sets[-1] == (True,) * 6
    assert all(any(half) for half in halves)


def test_a_block_is_dropped_first_if_the_labels_are_likeliest_without_it():
    backbone, runner = small_backbone(), Runner(small_backbone(), [batch_at(IMAGES, torch.arange(60))])
    for stage, chain in enumerate(stage_patterns(runner, 4)):
        loss = {}
        for half in ((True, False), (False, True)):
            keep = torch.tensor((True,) * 2 * stage + half + (True,) * 2 * (2 - stage)).expand(60, -1)
            logits_BC = backbone(IMAGES.images, keep)
            loss[half] = torch.nn.functional.cross_entropy(logits_BC, IMAGES.label_N).item()
        assert chain == [(True, True), min(loss, key=loss.__getitem__)]


def test_choices_are_judged_as_the_network_does_it(answers):
    """Every pair and every third, for some numbers of images that go on, against the deployed network."""
    tried = torch.arange(len(answers.sets))
    found = joined([pairs(answers, tried)])
    three = thirds(answers, tried, 1, 5)
    for choices, exits in ((found, 2), (three, 3)):
        for index in range(0, len(choices.curve), len(choices.curve) // 12):
            sets = [answers.sets[s] for s in choices.passes_PN[index].tolist()]
            cache = cache_exits(PassNetwork(small_backbone(), sets), IMAGES)
            sure_MN = cache.probability_MNC[:, :-1].amax(-1)
            threshold_PE = torch.cartesian_prod(*map(_between, sure_MN.T)).view(-1, exits - 1)
            accuracy_P, macs_P = cache.judge(first_exit(sure_MN >= threshold_PE.unsqueeze(1)))
            alike_P = (macs_P - choices.curve.macs_P[index]).abs() < 1
            assert (accuracy_P[alike_P] - choices.curve.accuracy_P[index]).abs().min() < 1e-9, sets


def _between(sure_M: torch.Tensor) -> torch.Tensor:
    """A threshold between every two neighbours, and one above all."""
    ordered = sure_M.double().sort().values
    return torch.cat([(ordered[1:] + ordered[:-1]) / 2, torch.tensor([2.0])])


def planted() -> Answers:
    """40 images, 2 classes, 4 blocks of 10 MACs and nothing else. One block answers 30 images rightly and surely, the
    other 10 wrongly and unsurely; a set of it and one more block answers these 10 rightly, too; the whole network answers
    35 rightly. A dearer set that shares nothing is as good as the one that shares."""
    sets = [(True, False, False, False), (True, False, False, True), (False, True, True, True), (True,) * 4]
    right_SM = torch.ones(4, 40, dtype=torch.bool)
    right_SM[0, 30:] = right_SM[3, 35:] = False
    right_SM[1:3, 0] = False
    chance_SM = torch.full((4, 40), 0.99)
    chance_SM[0, 30:] = 0.6
    chance_SM = torch.where(right_SM, chance_SM, 1 - chance_SM)
    log_probability_SMC = torch.stack([chance_SM, 1 - chance_SM], dim=2).log()
    macs_SS = torch.tensor([[0, 10, 30, 30], [0, 0, 30, 20], [10, 20, 0, 40], [0, 10, 30, 0]]).double()
    costs = Costs(0.0, torch.full((4,), 10.0, dtype=torch.float64))
    return Answers(sets, log_probability_SMC, torch.zeros(40, dtype=torch.int64), costs, macs_SS)


@pytest.mark.parametrize("target", [{"macs_fraction": 0.33}, {"accuracy_drop": 0.0}, {"knee": True}])
def test_a_planted_world_where_the_second_pass_pays_is_found(target):
    found = search_passes(planted(), 2, target)
    assert found == [(True, False, False, False), (True, False, False, True)]
    points = pairs(planted(), torch.arange(4)).curve
    assert float(points.accuracy_P.max()) == 1 and float(points.macs_P[points.accuracy_P == 1].min()) == 12.5


def test_a_target_that_no_passes_meet_is_refused():
    with pytest.raises(UserError, match="no threshold meets macs_fraction=0.2 on validation; the nearest .* is 0.25"):
        search_passes(planted(), 2, {"macs_fraction": 0.2})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"passes": 4}, "agent.passes must be 2 or 3"),
        ({"candidates": 1}, "agent.candidates at least 2"),
        ({"rule": "delta"}, "agent.search=quota needs a rule"),
        ({"network": PassNetwork(small_backbone(), [(1,) * 6])}, "without exits .* has exits"),
    ],
)
def test_bad_settings_are_named(changed, message):
    given = dict(network=small_backbone(), images=IMAGES, target={"knee": True}, seed=0) | changed
    with pytest.raises(UserError, match=message):
        Passes(**given)


@pytest.mark.parametrize("passes", [2, 3])
def test_a_network_of_three_blocks_has_passes_too(passes):
    given = dict(network=small_backbone(8), images=IMAGES, target={"macs_fraction": 0.9}, seed=0, passes=passes)
    assert Passes(**given).network.num_exits == passes


def test_too_few_blocks_are_refused(monkeypatch):
    whole = Answers([(True,)], torch.zeros(1, 1, 2), torch.zeros(1).long(), planted().costs, torch.zeros(1, 1).double())
    monkeypatch.setattr("policyskip.agents.passes.find_answers", lambda *given: whole)
    with pytest.raises(UserError, match="too few for 2 different passes"):
        Passes(small_backbone(8), IMAGES, {"knee": True}, 0)


def test_a_network_that_answers_nothing_without_a_block_is_refused(monkeypatch):
    world = planted()
    world.log_probability_SMC[:3] = world.log_probability_SMC[:3].flip(2)
    world.log_probability_SMC[:3, 30:] = -1.0
    monkeypatch.setattr("policyskip.agents.passes.find_answers", lambda *given: world)
    with pytest.raises(UserError, match="does not tolerate skipping: the best of 3 sets of fewer blocks answers"):
        Passes(small_backbone(), IMAGES, {"knee": True}, 0)
