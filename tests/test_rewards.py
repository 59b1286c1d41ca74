"""Rewards against a table worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from policyskip.errors import UserError
from policyskip.rewards import Linear, Macs, Outcome, Utilization, reward_of

# Four decisions over K = 4 blocks: right with all, right with half, right with none, wrong with half.
OUTCOME = Outcome(
    logits_BC=torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0]]),
    label_B=torch.tensor([0, 0, 0, 1]),
    correct_B=torch.tensor([True, True, True, False]),
    keep_BK=torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 0]]).bool(),
    macs_B=torch.tensor([100.0, 60.0, 20.0, 60.0], dtype=torch.float64),
    full_macs=100.0,
)


def test_utilization():
    assert reward_of(Utilization(penalty=5.0), OUTCOME).tolist() == [0.0, 0.75, 1.0, -5.0]


def test_macs():
    expected = torch.tensor([0.0, 1 - 0.36, 1 - 0.04, -2.0])
    torch.testing.assert_close(reward_of(Macs(penalty=2.0), OUTCOME), expected)


def test_linear():
    right, wrong = -math.log(1 + math.exp(-2)), -math.log(1 + math.exp(2))
    expected = torch.tensor([right - 0.5, right - 0.3, right - 0.1, wrong - 0.3])
    torch.testing.assert_close(reward_of(Linear(weight=0.5), OUTCOME), expected)


def test_fractions():
    assert OUTCOME.kept_fraction_B.tolist() == [1.0, 0.5, 0.0, 0.5]
    torch.testing.assert_close(OUTCOME.macs_fraction_B, torch.tensor([1.0, 0.6, 0.2, 0.6]))


def misshapen(outcome: Outcome) -> torch.Tensor:
    return torch.zeros(4, 1)


def integers(outcome: Outcome) -> torch.Tensor:
    return torch.zeros(4, dtype=torch.int64)


def not_a_number(outcome: Outcome) -> torch.Tensor:
    return torch.tensor([0.0, float("nan"), 0.0, 0.0])


def raising(outcome: Outcome) -> torch.Tensor:
    raise KeyError("beta")


def a_list(outcome: Outcome) -> list[float]:
    return [0.0] * 4


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (misshapen, r"misshapen must return a float tensor of shape \(4,\), not float32 of shape \(4, 1\)"),
        (integers, r"integers must return .* not int64"),
        (not_a_number, "not_a_number returned 1 non-finite values of 4, such as nan"),
        (raising, "raising raised KeyError: 'beta'"),
        (a_list, "a_list must return .* not list"),
    ],
)
def test_a_bad_reward_is_refused_by_name(reward, message):
    with pytest.raises(UserError, match=message):
        reward_of(reward, OUTCOME)
