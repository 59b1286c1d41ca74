"""Exit rules and quotas, with numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from policyskip.errors import UserError
from policyskip.exits.rules import (
    CONFIDENCE,
    ENTROPY,
    RULES,
    Delta,
    between,
    decisions_at,
    entropy,
    exit_of,
    exit_shares,
    first_exit,
    q_for_budget,
    quota_thresholds,
    rule_named,
    spread,
    top_probability,
)

THIRDS = torch.full((3,), 1 / 3)


def random_probability(*shape: int, seed: int = 0) -> Tensor:
    return (2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).softmax(-1)


def test_entropy_of_known_distributions():
    probability = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.5, 0.25, 0.25, 0], [0.25, 0.25, 0.25, 0.25]])
    expected = torch.tensor([0, math.log(2), 1.5 * math.log(2), math.log(4)])
    torch.testing.assert_close(entropy(probability), expected)
    assert top_probability(probability).tolist() == [1, 0.5, 0.5, 0.25]
    for C in range(2, 300):
        assert entropy(torch.full((C,), 1 / C)) <= torch.tensor(math.log(C))


@pytest.mark.parametrize(
    ("probability", "delta", "leaves"),
    [
        ([0.6, 0.3, 0.1], 0.5, True),
        ([0.6, 0.3, 0.1], 0.7, False),  # nothing reaches it
        ([0.45, 0.4, 0.15], 0.5, False),
        ([0.45, 0.4, 0.15], 0.42, True),  # only the first reaches it
        ([0.45, 0.4, 0.15], 0.35, False),  # two reach it
        ([0.5, 0.25, 0.25], 0.5, True),  # reaching is enough for the first,
        ([0.5, 0.25, 0.25], 0.25, False),  # and too much for the second
    ],
)
def test_the_delta_rule(probability, delta, leaves):
    assert bool(Delta().leaves(torch.tensor(probability), delta)) is leaves


def test_over_half_the_delta_rule_is_that_of_the_top_probability():
    probability = random_probability(1000, 4)
    for delta in (0.51, 0.7, 0.95):
        assert torch.equal(Delta().leaves(probability, delta), CONFIDENCE.leaves(probability, delta))
    assert not torch.equal(Delta().leaves(probability, 0.3), CONFIDENCE.leaves(probability, 0.3))


def test_confidence_leaves_at_the_threshold_and_entropy_stays():
    certain, half = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])
    assert CONFIDENCE.leaves(half, 0.5) and not CONFIDENCE.leaves(half, 0.5001)
    assert not ENTROPY.leaves(certain, 0.0) and ENTROPY.leaves(certain, 1e-6)
    assert not ENTROPY.leaves(half, float(entropy(half))) and ENTROPY.leaves(half, 0.6932)


@pytest.mark.parametrize("rule", [CONFIDENCE, ENTROPY])
def test_the_extremes_of_a_measure(rule):
    certain_and_not = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    assert not rule.leaves(certain_and_not, rule.never).any() and rule.leaves(certain_and_not, rule.always).all()


@pytest.mark.parametrize("rule", RULES.values())
def test_a_threshold_is_the_same_as_a_number_and_as_a_tensor(rule):
    probability = random_probability(500, 4)
    for value in rule.turning_points(probability)[:20].double():
        as_tensor = rule.leaves(probability, value.view(1))
        assert torch.equal(rule.leaves(probability, float(value)), as_tensor)


def test_a_threshold_is_rounded_like_what_it_is_compared_with():
    """0.7 in 32 bits is below 0.7 in 64."""
    for threshold in (0.7, torch.tensor([0.7], dtype=torch.float64)):
        assert CONFIDENCE.leaves(torch.tensor([[0.7, 0.3]]), threshold)


def test_the_first_exit_that_lets_an_image_go():
    leave = torch.tensor([[1, 1], [1, 0], [0, 1], [0, 0]]).bool()
    assert first_exit(leave).tolist() == [0, 0, 1, 2]
    assert first_exit(torch.zeros(3, 0).bool()).tolist() == [0, 0, 0]


def test_no_decision_is_made_at_the_last_exit():
    assert decisions_at(torch.tensor([0, 1, 2, 3]), 4).tolist() == [1, 2, 3, 3]


def test_exits_under_each_rule():
    """Two classes, three exits; the top probabilities of the two images are 0.9, 0.6, 0.5 and 0.6, 0.8, 1."""
    top_MN = torch.tensor([[0.9, 0.6, 0.5], [0.6, 0.8, 1.0]])
    probability_MNC = torch.stack([top_MN, 1 - top_MN], dim=2)
    assert exit_of(CONFIDENCE, probability_MNC, [0.85, 0.7]).tolist() == [0, 1]
    assert exit_of(CONFIDENCE, probability_MNC, [0.95, 0.85]).tolist() == [2, 2]
    # Entropies: 0.325, 0.673, 0.693 and 0.673, 0.500, 0.
    assert exit_of(ENTROPY, probability_MNC, [0.4, 0.6]).tolist() == [0, 1]
    assert exit_of(ENTROPY, probability_MNC, [0.3, 0.68]).tolist() == [1, 1]
    assert exit_of(Delta(), probability_MNC, [0.3, 0.3]).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        ([0.5], "a network with 3 exits takes 2 thresholds .* got 1"),
        ([0.5, 0.5, 0.5], "got 3"),
        ([0.5, math.nan], "thresholds must be numbers"),
    ],
)
def test_thresholds_that_do_not_fit_are_refused(thresholds, message):
    with pytest.raises(UserError, match=message):
        exit_of(CONFIDENCE, torch.ones(4, 3, 2), thresholds)


def test_rules_by_name():
    assert rule_named("entropy") is ENTROPY
    with pytest.raises(UserError, match="must be one of confidence, entropy, delta, got 'label'"):
        rule_named("label")


def test_shares_by_hand():
    torch.testing.assert_close(exit_shares(0.5, 3), torch.tensor([4, 2, 1]).double() / 7)
    torch.testing.assert_close(exit_shares(-1, 3), torch.tensor([1, 2, 4]).double() / 7)  # the code's p = 2
    torch.testing.assert_close(exit_shares(0, 4), torch.full((4,), 0.25).double())
    torch.testing.assert_close(exit_shares(1e-9, 4), exit_shares(0, 4))


@pytest.mark.parametrize("q", [0.01, 0.3, 0.95, -0.5, -0.95])
def test_shares_are_the_papers_and_the_codes(q):
    k = torch.arange(1, 6).double()
    code = (1 - q) ** k
    torch.testing.assert_close(exit_shares(q, 5), code / code.sum())
    paper = (1 - q) ** (k - 1) * q
    torch.testing.assert_close(exit_shares(q, 5), paper / paper.sum())
    assert (exit_shares(q, 5) > 0).all() and exit_shares(q, 5).sum() == pytest.approx(1)


@pytest.mark.parametrize("q", [1, 1.5, math.nan, -math.inf])
def test_shares_need_q_below_one(q):
    with pytest.raises(UserError, match="q must be a number below 1"):
        exit_shares(q, 3)


def test_the_q_of_a_budget():
    macs_N = torch.tensor([1.0, 2, 4])
    assert q_for_budget(7 / 3, macs_N) == pytest.approx(0, abs=1e-9)
    assert q_for_budget(12 / 7, macs_N) == pytest.approx(0.5)  # shares 4/7, 2/7, 1/7
    assert q_for_budget(3, macs_N) == pytest.approx(-1)
    for beyond, exit in ((0.5, 0), (5.0, 2)):
        assert exit_shares(q_for_budget(beyond, macs_N), 3)[exit] == pytest.approx(1)


FIRST = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
SECOND = torch.tensor([0.3, 0.95, 0.2, 0.85, 0.75, 0.65])


@pytest.mark.parametrize(
    ("first", "share", "expected"),
    [
        # Two leave at exit 0; of the others, images 3 and 4 are the surest at exit 1 (0.95 has left).
        (FIRST, THIRDS, [0.75, 0.7]),
        # 0.3 images are none: exit 0 is closed, and by exit 1 three are to have left.
        (FIRST, torch.tensor([0.05, 0.475, 0.475]), [math.inf, 0.7]),
        # Three are tied for the second place. They stay, and their place passes on: three leave at exit 1.
        (torch.tensor([0.9, 0.8, 0.8, 0.8, 0.5, 0.4]), THIRDS, [0.85, 0.7]),
        # Four places, and the tied fit in.
        (torch.tensor([0.9, 0.8, 0.8, 0.8, 0.5, 0.4]), torch.tensor([4, 1, 1]) / 6, [0.65, 0.7]),
        # All are tied, and more than the quota.
        (torch.ones(6), torch.tensor([0.5, 0.0, 0.5]), [math.inf, 0.7]),
        (FIRST, torch.tensor([1.0, 0, 0]), [0.0, math.inf]),
        (FIRST, torch.tensor([0.0, 0, 1]), [math.inf, math.inf]),
        (FIRST, torch.tensor([0.5, 0.5, 0]), [0.65, 0.0]),
    ],
)
def test_quotas_by_hand(first, share, expected):
    value_ME = torch.stack([first, SECOND], dim=1)
    torch.testing.assert_close(quota_thresholds(CONFIDENCE, value_ME, share), torch.tensor(expected).double())


def test_quotas_of_entropy_go_from_low_to_high():
    value_ME = torch.stack([1 - FIRST, 1 - SECOND], dim=1)
    torch.testing.assert_close(quota_thresholds(ENTROPY, value_ME, THIRDS), torch.tensor([0.25, 0.3]).double())
    closed = quota_thresholds(ENTROPY, torch.zeros(6, 2), THIRDS)
    assert closed.tolist() == [0, 0]
    assert quota_thresholds(ENTROPY, value_ME, torch.tensor([1.0, 0, 0])).tolist() == [math.inf, 0]


@pytest.mark.parametrize("rule", [CONFIDENCE, ENTROPY])
@pytest.mark.parametrize("places", [1, 2, 6])
def test_no_exit_lets_out_more_than_is_due_and_without_ties_none_lets_out_less(rule, places):
    """Values rounded to few places are full of ties."""
    value_ME = random_probability(200, 4, seed=1)[:, :3]
    value_ME = (value_ME * 10**places).round() / 10**places
    for q in (0.7, 0.2, 0.0, -0.5):
        share_N = exit_shares(q, 4)
        exits = first_exit(rule.passes(value_ME, quota_thresholds(rule, value_ME, share_N)))
        left = exits.bincount(minlength=4).cumsum(0)
        due = (share_N.cumsum(0) * 200).round()
        assert (left <= due).all()
        if places == 6:
            assert torch.equal(left, due.long())


def test_a_threshold_between_neighbouring_numbers_parts_them():
    one = torch.tensor(1.0)
    below = torch.nextafter(one, torch.tensor(0.0))
    above = torch.nextafter(one, torch.tensor(2.0))
    assert (between(below, one), between(one, above)) == (1.0, float(above))  # half-way is rounded up, and down
    assert between(torch.tensor(0.25), torch.tensor(0.5)) == 0.375


def test_candidates_part_the_images_in_every_way():
    probability = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.9, 0.1], [0.9, 0.1]])
    cuts = spread(CONFIDENCE, probability, 5)
    torch.testing.assert_close(cuts, torch.tensor([0.65, 0.8, 0.9, math.inf, 0]).double())
    assert CONFIDENCE.leaves(probability, cuts.unsqueeze(1)).sum(1).tolist() == [3, 2, 2, 0, 4]
    # Of the four cuts between five images, two are taken from the middles of the halves: the second and the last.
    top_M = torch.tensor([0.5, 0.6, 0.7, 0.8, 0.9])
    few = spread(CONFIDENCE, torch.stack([top_M, 1 - top_M], 1), 4)
    torch.testing.assert_close(few, torch.tensor([0.65, 0.85, math.inf, 0]).double())
    assert [len(spread(rule, probability, n)) for rule in RULES.values() for n in (2, 3, 30)] == [2, 3, 30] * 3
    assert spread(Delta(), probability[:1], 2).tolist() == pytest.approx([0.5, math.inf])
