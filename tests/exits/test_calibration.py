"""Curves against every choice run on its own, fronts and knees by hand, and targets met and not met."""

from __future__ import annotations

import math

import pytest
import torch

from policyskip.backbones import ExitCosts
from policyskip.errors import UserError
from policyskip.exits import calibration
from policyskip.exits.cache import CachedExits
from policyskip.exits.calibration import (
    BRANCHYNET_NATS,
    Curve,
    check_search,
    common_curve,
    curve_of,
    grid_curve,
    quota_curve,
)
from policyskip.exits.rules import CONFIDENCE, ENTROPY, RULES, exit_of, exit_shares, q_for_budget, rule_named
from policyskip.exits.targets import UnmetError, choose
from policyskip.fronts import knee, pareto
from tests.conftest import small_cache

SEARCHES = [("confidence", "quota"), ("entropy", "quota"), ("confidence", "grid"), ("entropy", "grid")]
SEARCHES += [("delta", "grid"), ("delta", "common"), ("confidence", "common"), ("entropy", "common")]


def hand_made(top_MN: list[list[float]], right_MN: list[list[int]]) -> CachedExits:
    """Two classes; ``top`` is the probability of the top class, which is the label where ``right`` is 1. Exits cost
    1, 2, 4, … MACs in all."""
    top, right = torch.tensor(top_MN), torch.tensor(right_MN)
    zero = torch.where(right == 1, top, 1 - top)  # the label is always class 0
    macs_N = torch.cat([torch.zeros(1), 2.0 ** torch.arange(top.shape[1])]).double()
    macs_N[0] = 0
    costs = ExitCosts(macs_N.diff(), torch.zeros(top.shape[1]).double())
    return CachedExits(torch.stack([zero, 1 - zero], dim=2).log(), torch.zeros(len(top), dtype=torch.int64), costs)


FOUR = hand_made([[0.9, 0.9], [0.8, 0.9], [0.7, 0.9], [0.6, 0.9]], [[1, 1], [1, 1], [0, 1], [0, 0]])
"""Four images, two exits of 1 and 2 MACs; exit 0 is right about the two images of which it is surest."""


def test_a_cache_judges_policies():
    accuracy, macs = FOUR.judge(torch.tensor([0, 0, 1, 0]))
    assert (accuracy.item(), macs.item()) == (0.75, 1.25)
    accuracy_P, macs_P = FOUR.judge(torch.tensor([[0, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]))
    assert accuracy_P.tolist() == [0.75, 0.75, 0.5] and macs_P.tolist() == [1.25, 2, 1]


def test_quotas_of_four_images_by_hand():
    """At budgets 1, 1.25, … 2 the surest 4, 3, … 0 images leave early."""
    curve = quota_curve(CONFIDENCE, FOUR, points=5)
    assert curve.macs_P.tolist() == [1, 1, 1.25, 1.5, 1.75, 2, 2]
    assert curve.accuracy_P.tolist() == [0.5, 0.5, 0.5, 0.75, 0.75, 0.75, 0.75]
    torch.testing.assert_close(
        curve.threshold_PE.squeeze(1), torch.tensor([0, 0, 0.65, 0.75, 0.85, math.inf, math.inf]).double()
    )
    assert (curve.last_accuracy, curve.full_macs) == (0.75, 2)


@pytest.mark.parametrize("rule", RULES.values())
@pytest.mark.parametrize("at_once", [2**24, 50])
def test_the_grid_is_every_combination_run_on_its_own(rule, at_once, monkeypatch):
    monkeypatch.setattr(calibration, "NUMBERS_AT_ONCE", at_once)
    cache = small_cache(exits=4)
    threshold_EG = torch.tensor([[0.3, 0.5, 0.9], [0.2, 0.6, 0.8], [0.4, 0.7, math.inf]], dtype=torch.float64)
    curve = grid_curve(rule, cache, threshold_EG)
    assert len(curve) == 27 and len(curve.threshold_PE.unique(dim=0)) == 27
    assert (curve.macs_P.diff() >= 0).all()
    for i in range(27):
        point = curve[i]
        accuracy, macs = cache.judge(exit_of(rule, cache.probability_MNC, point.thresholds))
        assert point.accuracy == pytest.approx(accuracy.item()) and point.macs == pytest.approx(macs.item())
        assert point.macs_fraction == pytest.approx(macs.item() / cache.costs.full)


def test_a_grid_is_as_fine_as_its_combinations_allow():
    """4³ combinations are 64, though the cube root of 64 is 3.9999…; 63 leave three thresholds at each exit."""
    cache = small_cache(exits=4)
    assert [len(grid_curve(CONFIDENCE, cache, combinations=most)) for most in (64, 63)] == [64, 27]


def test_the_grid_that_branchynet_screened():
    curve = grid_curve(ENTROPY, small_cache(), torch.tensor([BRANCHYNET_NATS] * 2))
    assert len(curve) == 17**2
    assert curve.macs_P[[0, -1]].tolist() == pytest.approx(small_cache().macs_N[[0, -1]].tolist())


@pytest.mark.parametrize("rule", RULES.values())
@pytest.mark.parametrize("at_once", [2**24, 50])
def test_common_thresholds_are_run_at_every_exit(rule, at_once, monkeypatch):
    monkeypatch.setattr(calibration, "NUMBERS_AT_ONCE", at_once)
    cache = small_cache()
    curve = common_curve(rule, cache, points=20)
    assert len(curve) == 20
    for i in range(20):
        point = curve[i]
        assert len(set(point.thresholds)) == 1 and len(point.thresholds) == 2
        accuracy, macs = cache.judge(exit_of(rule, cache.probability_MNC, point.thresholds))
        assert (point.accuracy, point.macs) == (pytest.approx(accuracy.item()), pytest.approx(macs.item()))


@pytest.mark.parametrize(("rule", "search"), SEARCHES)
def test_the_figures_of_curves_are_those_of_their_thresholds(rule, search):
    """Judge every threshold on its own; and the ends: all images go to the last exit, or leave at the first."""
    cache = small_cache(200)
    curve = curve_of(cache, rule, search)
    for i in range(0, len(curve), 1 + len(curve) // 20):
        accuracy, macs = cache.judge(exit_of(rule_named(rule), cache.probability_MNC, curve[i].thresholds))
        assert (curve[i].accuracy, curve[i].macs) == (pytest.approx(accuracy.item()), pytest.approx(macs.item()))
    assert curve.macs_P[-1] == pytest.approx(cache.costs.full) and curve.accuracy_P[-1] == curve.last_accuracy
    if rule != "delta":
        assert curve.macs_P[0] == pytest.approx(float(cache.macs_N[0]))


@pytest.mark.parametrize("rule", [CONFIDENCE, ENTROPY])
def test_quotas_spend_their_budget(rule):
    """Without ties every quota is met to the image, so the cost differs from the budget by a few images' worth."""
    cache = small_cache(1000)
    curve = quota_curve(rule, cache, points=21)
    for budget in torch.linspace(float(cache.macs_N[0]), float(cache.macs_N[-1]), 21):
        assert (curve.macs_P - budget).abs().min() < 0.003 * cache.costs.full


def test_the_front_by_hand():
    macs_P = torch.tensor([1.0, 2, 2, 3, 4, 4, 5])
    accuracy_P = torch.tensor([0.5, 0.6, 0.7, 0.7, 0.8, 0.8, 0.75])
    assert pareto(macs_P.tolist(), accuracy_P.tolist()) == [0, 2, 4]
    shuffled = torch.tensor([6, 3, 0, 5, 4, 2, 1])
    front = pareto(macs_P[shuffled].tolist(), accuracy_P[shuffled].tolist())
    assert macs_P[shuffled][front].tolist() == [1, 2, 4]


def test_the_front_of_random_points_is_what_nothing_dominates():
    accuracy_P, macs_P = torch.randint(0, 10, (2, 60), generator=torch.Generator().manual_seed(0)).double()
    front = pareto(macs_P.tolist(), accuracy_P.tolist())
    points = {(a, m) for a, m in zip(accuracy_P.tolist(), macs_P.tolist())}
    best = {(a, m) for a, m in points if not any((b >= a and n <= m) and (b, n) != (a, m) for b, n in points)}
    assert {(float(accuracy_P[i]), float(macs_P[i])) for i in front} == best and len(front) == len(best)


def test_the_knee_by_hand():
    """Scaled: MACs 0, 1/4, 1/2, 1; accuracy 0, 3/4, 7/8, 1. Above the chord by 0, 1/2, 3/8, 0."""
    accuracy, macs = [0.5, 0.8, 0.85, 0.9], [10.0, 20, 30, 50]
    assert knee(macs, accuracy) == 1
    assert knee([1e6 * m for m in macs], [100 * a for a in accuracy]) == 1  # whatever the units
    assert knee([1.0], [0.5]) == 0
    curve = Curve(
        "entropy",
        torch.zeros(5, 1),
        torch.tensor([0.5, 0.8, 0.85, 0.6, 0.9]),
        torch.zeros(5),
        torch.tensor([10.0, 20, 30, 40, 50]),
        0.9,
        50,
    )
    assert curve.knee().macs == 20 and len(curve.front()) == 4


def made_curve(accuracy: list[float], macs: list[float], error: float = 0.0) -> Curve:
    threshold_PE = torch.arange(len(macs)).double().unsqueeze(1)
    figures = (torch.tensor(x, dtype=torch.float64) for x in (accuracy, [error] * len(macs), macs))
    return Curve("confidence", threshold_PE, *figures, last_accuracy=0.9, full_macs=100.0)


CURVE = made_curve([0.5, 0.7, 0.88, 0.92, 0.92, 0.91, 0.9], [20, 30, 49.5, 50, 60, 99.5, 100])


@pytest.mark.parametrize(
    ("target", "index"),
    [
        ({"accuracy_drop": 0.0}, 3),  # the cheapest that is as accurate as the last exit
        ({"accuracy_drop": 0.02}, 2),
        ({"accuracy_drop": 0.3}, 1),
        ({"accuracy_drop": 0.9}, 0),
        ({"accuracy_drop": -0.02}, 3),  # more accurate than the last exit
        ({"macs_fraction": 0.2}, 0),
        ({"macs_fraction": 0.29}, 0),
        ({"macs_fraction": 0.5}, 3),
        ({"macs_fraction": 0.499}, 2),
        ({"macs_fraction": 0.7}, 4),
        ({"knee": True}, 1),  # of the front 20, 30, 49.5, 50; scaled: (10/30, 0.2/0.42), above the chord by 0.143
        ({"macs_fraction": 1.0}, 5),  # half a point cheaper than the dearest, and more accurate
    ],
)
def test_a_target_chooses_by_hand(target, index):
    assert choose(CURVE, **target) == CURVE[index]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({}, "give one target"),
        ({"accuracy_drop": 0.1, "macs_fraction": 0.5}, "give one target"),
        ({"accuracy_drop": 0.1, "knee": True}, "give one target"),
        ({"macs_fraction": 0.1}, r"macs_fraction=0.1 on validation; the nearest that can be met is 0.2000"),
        ({"accuracy_drop": -0.05}, r"accuracy_drop=-0.05 on validation; .* be met is -0.0200"),
        ({"macs_fraction": 0}, "above 0 and at most 1, got 0"),
        ({"macs_fraction": 1.2}, "above 0 and at most 1, got 1.2"),
        ({"macs_fraction": math.nan}, "above 0 and at most 1"),
        ({"accuracy_drop": 1}, "above -1 and below 1"),
        ({"accuracy_drop": math.nan}, "above -1 and below 1"),
    ],
)
def test_a_target_that_cannot_be_met_is_refused(target, message):
    with pytest.raises(UserError, match=message):
        choose(CURVE, **target)


def test_of_equally_cheap_points_the_most_accurate_is_chosen():
    assert choose(made_curve([0.89, 0.9, 0.88, 0.95], [50, 50, 50, 60]), accuracy_drop=0.02).accuracy == 0.9


def test_an_accuracy_is_met_with_a_standard_error_to_spare():
    curve = made_curve([0.86, 0.88, 0.9, 0.91], [10, 20, 30, 40], error=0.015)
    assert choose(curve, accuracy_drop=0.02).macs == 30 and choose(curve, accuracy_drop=0.035).macs == 20
    assert choose(curve, knee=True).macs == 30 and choose(curve, macs_fraction=0.2).macs == 20
    with pytest.raises(UnmetError, match=r"be met is 0\.0050"):
        choose(curve, accuracy_drop=0)


@pytest.mark.parametrize(("rule", "search"), SEARCHES)
def test_the_standard_error_is_that_of_the_paired_difference(rule, search):
    cache = small_cache(200)
    curve = curve_of(cache, rule, search)
    for i in range(0, len(curve), 1 + len(curve) // 20):
        exit_M = exit_of(rule_named(rule), cache.probability_MNC, curve[i].thresholds)
        right_M = cache.correct_MN.gather(1, exit_M.unsqueeze(1)).squeeze(1).double()
        expected = (right_M - cache.correct_MN[:, -1].double()).std(correction=0) / 200**0.5
        assert curve.error_P[i].item() == pytest.approx(expected.item(), abs=1e-9)


def test_the_nearest_that_a_refusal_names_can_be_met():
    curve = made_curve([0.5, 0.9 + 1 / 3e3], [100 / 3, 70])
    for target, value in (("macs_fraction", 0.3), ("accuracy_drop", -0.5)):
        with pytest.raises(UnmetError) as refusal:
            choose(curve, **{target: value})
        assert refusal.value.nearest == curve[int(target == "accuracy_drop")]
        choose(curve, **{target: float(str(refusal.value).split()[-1])})


@pytest.mark.parametrize(("rule", "search"), SEARCHES)
def test_a_budget_met_on_validation_is_spent_on_test(rule, search):
    validation, test = small_cache(2000, exits=4, seed=1), small_cache(4000, exits=4, seed=2)
    curve = curve_of(validation, rule, search)
    for fraction in (0.35, 0.5, 0.7, 0.9):
        point = choose(curve, macs_fraction=fraction)
        assert fraction - 0.02 < point.macs_fraction <= fraction + 1e-9
        _, macs = test.judge(exit_of(rule_named(rule), test.probability_MNC, point.thresholds))
        assert macs.item() / test.costs.full == pytest.approx(fraction, abs=0.03)


@pytest.mark.parametrize(("rule", "search"), SEARCHES)
def test_an_accuracy_target_is_met_on_validation_at_the_least_cost(rule, search):
    cache = small_cache(500)
    curve = curve_of(cache, rule, search)
    point = choose(curve, accuracy_drop=0.02)
    assert point.accuracy >= curve.last_accuracy - 0.02 - 1e-9 and point.macs_fraction < 0.9
    lower_P = curve.accuracy_P - curve.error_P
    assert not ((lower_P >= curve.last_accuracy - 0.02) & (curve.macs_P < point.macs)).any()


def test_quotas_do_at_least_as_well_as_random_exits():
    cache = small_cache(2000, exits=4)
    point = choose(curve_of(cache), macs_fraction=0.5)
    quota_N = exit_shares(q_for_budget(point.macs, cache.macs_N), 4)
    assert point.accuracy > float(quota_N @ cache.correct_MN.double().mean(0)) + 0.05


@pytest.mark.parametrize(
    ("cache", "arguments", "message"),
    [
        (FOUR, ("certainty", "quota"), "the exit rule must be one of confidence, entropy, delta, got 'certainty'"),
        (FOUR, ("entropy", "random"), "search must be one of quota, grid, common, got 'random'"),
        (
            FOUR,
            ("delta", "quota"),
            "agent.search=quota needs a rule that orders images, confidence or entropy; delta does not",
        ),
    ],
)
def test_searches_that_do_not_exist_are_refused(cache, arguments, message):
    with pytest.raises(UserError, match=message):
        curve_of(cache, *arguments)


@pytest.mark.parametrize(("rule", "search"), SEARCHES)
def test_a_network_with_one_exit_has_one_point(rule, search):
    cache = small_cache(exits=1)
    curve = curve_of(cache, rule, search)
    assert len(curve) == 1 and curve.threshold_PE.shape == (1, 0)
    assert choose(curve, accuracy_drop=0) == choose(curve, knee=True) == curve[0]
    assert curve[0].macs == cache.costs.full and curve[0].accuracy == curve.last_accuracy


def test_a_grid_has_two_thresholds_to_try_at_every_exit():
    check_search("entropy", "grid", 15)
    check_search("entropy", "quota", 30)
    with pytest.raises(UserError, match="agent.search=grid goes up to 15 exits, the network has 16"):
        check_search("entropy", "grid", 16)
