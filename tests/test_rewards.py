"""Rewards against a table worked out by hand."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from policyskip.errors import UserError
from policyskip.rewards import Latency, Linear, Macs, Outcome, Utilization, reward_of

# Four decisions over K = 4 blocks: right with all, right with half, right with none, wrong with half.
OUTCOME = Outcome(
    logits_BC=torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0]]),
    label_B=torch.tensor([0, 0, 0, 1]),
    correct_B=torch.tensor([True, True, True, False]),
    keep_BK=torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 0]]).bool(),
    macs_B=torch.tensor([100.0, 60.0, 20.0, 60.0], dtype=torch.float64),
    full_macs=100.0,
)


latency = partial(Latency, "there is none.json")


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


def huge(outcome: Outcome) -> torch.Tensor:
    return torch.full((4,), -1e300, dtype=torch.float64)


NESTED = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(2)], layout=torch.jagged)
ODD = {
    "sparse": torch.zeros(4).to_sparse(),
    "meta": torch.zeros(4, device="meta"),
    "complex": torch.zeros(4, dtype=torch.complex64),
    "nested": NESTED,
    "None": None,
    "dict": {},
    "'much'": "much",
    "float32 of shape": torch.zeros(()),
    "bool of shape": torch.zeros(4, dtype=torch.bool),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_reward_is_refused_in_one_line(kind):
    with pytest.raises(UserError, match=rf"must return a float tensor of shape \(4,\), not (a )?{kind}") as error:
        reward_of(lambda outcome: ODD[kind], OUTCOME)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [1e300, float("nan"), -float("inf"), 10**400, "x", None, True])
@pytest.mark.parametrize(
    ("key", "kind"), [("penalty", Utilization), ("penalty", Macs), ("weight", Linear), ("penalty", latency)]
)
def test_a_weight_that_float32_cannot_hold_is_refused_by_its_key(key, kind, value):
    with pytest.raises(UserError, match=rf"reward\.{key} must be a number from -1e\+30 to 1e\+30, got"):
        kind(**{key: value})


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (huge, r"huge returned 4 non-finite values of 4, such as -1e\+300, which float32 cannot hold"),
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
