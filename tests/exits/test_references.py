"""References and oracles, against enumeration of every policy of a few images."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from policyskip.backbones import ExitCosts
from policyskip.errors import UserError
from policyskip.exits.cache import CachedExits
from policyskip.exits.references import (
    accuracy_by_exit,
    exit_histogram,
    label_oracle,
    oracle_curve,
    oracle_exit,
    random_exits,
    static_exits,
    static_pairs,
)
from tests.conftest import small_cache

M, N = 4, 3


def answers(correct_MN: torch.Tensor) -> CachedExits:
    """Outputs of three exits for images of label 0 of two classes, right where ``correct_MN`` (M, 3) is 1.

    Trunk 2, 3, 4 and heads 1, 2, 1: exits cost 3, 8, 13, straight 3, 7, 10."""
    logits_MNC = torch.stack([correct_MN.float(), 1 - correct_MN.float()], dim=2)
    costs = ExitCosts(torch.tensor([2.0, 3, 4]).double(), torch.tensor([1.0, 2, 1]).double())
    return CachedExits(logits_MNC, torch.zeros(len(correct_MN), dtype=torch.int64), costs)


def test_static_exits_run_no_other_head():
    cache = answers(torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 1], [1, 0, 1]]))
    accuracy_N, macs_N = static_exits(cache)
    assert accuracy_N.tolist() == [0.5, 0.5, 1] and macs_N.tolist() == [3, 7, 10]
    assert static_pairs(cache) == [[3, 0.5], [7, 0.5], [10, 1]]


def test_a_policy_pays_for_every_head_on_the_way():
    cache = answers(torch.ones(4, 3))
    assert cache.judge(torch.tensor([0, 1, 2, 2]))[1].item() == (3 + 8 + 13 + 13) / 4


def test_random_exits_are_the_expectation_over_every_draw():
    cache = answers(torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 1], [1, 0, 0]]))
    share_N = torch.tensor([0.5, 0.3, 0.2])
    straight_N = torch.tensor([3.0, 7, 10])
    accuracy = macs = 0.0
    for policy in itertools.product(range(N), repeat=M):
        chance = math.prod(float(share_N[n]) for n in policy)
        accuracy += chance * cache.judge(torch.tensor(policy))[0].item()
        macs += chance * straight_N[list(policy)].mean().item()
    assert random_exits(cache, share_N) == (pytest.approx(accuracy), pytest.approx(macs))


@pytest.mark.parametrize("shares", [[0.5, 0.5], [0.5, 0.5, 0.5], [1.5, -0.5, 0]])
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(ValueError, match="shares must be 3 numbers"):
        random_exits(answers(torch.ones(M, N)), torch.tensor(shares))


def test_the_oracle_by_hand():
    correct_MN = torch.tensor([[1, 0, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0]]).bool()
    assert oracle_exit(correct_MN).tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("seed", range(6))
def test_no_policy_is_above_the_oracle_at_equal_or_lower_cost(seed):
    """All 81 policies of four images: none is more accurate than the oracle, none as accurate is cheaper, and at every
    cost none is above the curve."""
    cache = answers(torch.rand(M, N, generator=torch.Generator().manual_seed(seed)) < 0.5)
    accuracy, macs = cache.judge(oracle_exit(cache.correct_MN))
    accuracy_P, macs_P = oracle_curve(cache)
    assert (accuracy_P.diff() > 0).all() and (macs_P.diff() > 0).all()
    assert accuracy_P[-1].item() == pytest.approx(accuracy.item()) and macs_P[-1].item() == pytest.approx(macs.item())
    reached = set()
    for policy in itertools.product(range(N), repeat=M):
        a, m = (x.item() for x in cache.judge(torch.tensor(policy)))
        assert a <= accuracy + 1e-9 and (a < accuracy - 1e-9 or m >= macs - 1e-9)
        best = accuracy_P[macs_P <= m + 1e-9].max().item()
        assert a <= best + 1e-9
        reached.add((round(a, 6), round(m, 6)))
    assert {(round(a, 6), round(m, 6)) for a, m in zip(accuracy_P.tolist(), macs_P.tolist())} <= reached


def test_distillers_criterion_looks_at_the_label():
    """Probabilities of the label 0.7, 0.4 | 0.6, 0.9 | 0.2, 0.3 at exits 0 and 1; a loss below t is p over e^-t."""
    p = torch.tensor([[0.7, 0.4, 0.5], [0.6, 0.9, 0.5], [0.2, 0.3, 0.5]])
    logits_MNC = torch.stack([p, 1 - p], dim=2).log()
    cache = CachedExits(logits_MNC, torch.zeros(3, dtype=torch.int64), answers(torch.ones(3, 3)).costs)
    assert label_oracle(cache, [0.4, 0.4]).tolist() == [0, 1, 2]  # e^-0.4 is 0.670
    assert label_oracle(cache, [0.9, 0.9]).tolist() == [0, 0, 2]  # 0.407
    assert label_oracle(cache, [0.1, 1.3]).tolist() == [1, 1, 1]  # 0.905 and 0.273
    other = CachedExits(logits_MNC, torch.ones(3, dtype=torch.int64), cache.costs)
    assert label_oracle(other, [0.4, 0.4]).tolist() == [2, 2, 0]
    with pytest.raises(UserError, match="takes 2 thresholds"):
        label_oracle(cache, [0.4])


def test_up_to_ln_2_distillers_criterion_makes_every_early_exit_right():
    cache = small_cache(300)
    exit_M = label_oracle(cache, [math.log(2), 0.5])
    early = exit_M < 2
    assert 0 < early.sum() < 300 and cache.correct_MN[early, exit_M[early]].all()
    undecided = CachedExits(torch.zeros(1, 3, 2), torch.ones(1, dtype=torch.int64), cache.costs)
    assert label_oracle(undecided, [math.log(2)] * 2).tolist() == [2]  # ln 2 is not below ln 2


def test_who_left_where_and_was_right():
    exit_M, correct_M = torch.tensor([0, 0, 2, 2, 2]), torch.tensor([1, 0, 1, 1, 0]).bool()
    assert exit_histogram(exit_M, 4).tolist() == pytest.approx([0.4, 0, 0.6, 0])
    accuracy_N = accuracy_by_exit(exit_M, correct_M, 4)
    torch.testing.assert_close(accuracy_N, torch.tensor([0.5, math.nan, 2 / 3, math.nan]).double(), equal_nan=True)
