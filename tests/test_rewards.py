"""Rewards against a table worked out by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from functools import partial

import pytest
import torch

from policyskip.errors import UserError
from policyskip.rewards import Adaptive, Budget, Latency, Linear, Macs, Outcome, Utilization, reward_of

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


def outcome(keep: list[list[int]], correct: list[bool], macs_fraction: list[float]) -> Outcome:
    keep_BK = torch.tensor(keep, dtype=torch.bool)
    macs_B = 200.0 * torch.tensor(macs_fraction, dtype=torch.float64)
    return Outcome(
        torch.zeros(len(keep), 2),
        torch.zeros(len(keep), dtype=torch.int64),
        torch.tensor(correct),
        keep_BK,
        macs_B,
        200.0,
    )


def table(path, **changes):
    times = {"always_ms": 1.0, "kept_ms": [2.0, 4.0, 3.0], "dropped_ms": [0.0, 1.0, 0.0], "whole_ms": 10.0}
    path.write_text(json.dumps({"batches": {"1": times | changes, "64": {**times, "always_ms": 11.0}}}))
    return str(path)


def test_latency_by_hand(tmp_path):
    reward = Latency(table(tmp_path / "t.json"), penalty=5.0, batch_size=1)
    # all: 1 + 2 + 4 + 3 = 10; first and third: 1 + 2 + 1 + 3 = 7; none: 1 + 0 + 1 + 0 = 2
    keep = [[1, 1, 1], [1, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert reward.milliseconds(torch.tensor(keep, dtype=torch.bool)).tolist() == [10, 7, 2, 2]
    reward_B = reward(outcome(keep, [True, True, True, False], [1, 0.5, 0.1, 0.1]))
    assert reward_B.tolist() == pytest.approx([0, 1 - 0.49, 1 - 0.04, -5])
    assert Latency(table(tmp_path / "t.json")).always_ms == 11  # the largest batch


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "cannot be read; `policyskip profile output="),
        (lambda path: path.write_text("{}"), "is no table of `policyskip profile`"),
        (lambda path: path.write_text("[1]"), "is no table of `policyskip profile`"),
        (lambda path: table(path, kept_ms=[1.0]), "must be two lists of one length"),
        (lambda path: table(path, always_ms="slow"), "is no table of `policyskip profile`"),
        (lambda path: table(path, always_ms=-1.0), "must be finite and not negative"),
        (lambda path: table(path, always_ms=math.inf), "must be finite and not negative"),
        (lambda path: table(path, always_ms=0, kept_ms=[0, 0, 0]), "not all 0"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, write, message):
    write(tmp_path / "t.json")
    with pytest.raises(UserError, match=message):
        Latency(str(tmp_path / "t.json"), batch_size=1)


def test_a_table_of_another_number_of_blocks_or_batch_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no times for batches of 7; it has 1, 64"):
        Latency(table(tmp_path / "t.json"), batch_size=7)
    with pytest.raises(UserError, match="has 3 blocks, the network 2"):
        Latency(table(tmp_path / "t.json"))(outcome([[1, 0]], [True], [0.5]))


def test_budget_by_hand():
    reward = Budget(target=0.5, rate=0.1, gain=2.0, multiplier=0.2)
    assert isinstance(reward, Adaptive)
    batch = outcome([[1], [0], [0]], [True, True, False], [1.0, 0.25, 0.25])
    assert reward(batch).tolist() == pytest.approx([0.8, 0.95, -0.05])
    assert reward.adapt({"macs_fraction": 0.7}) == pytest.approx({"multiplier": 0.22, "price": 0.62})
    assert reward(batch).tolist() == pytest.approx([0.38, 0.845, -0.155])
    assert reward.adapt({"macs_fraction": 0.4}) == pytest.approx({"multiplier": 0.21, "price": 0.01})
    copy = Budget(0.5, rate=0.1, gain=2.0)
    copy.load_state_dict(reward.state_dict())
    assert copy.price == reward.price and copy.multiplier == reward.multiplier
    assert reward.adapt({"macs_fraction": 0.2}) == pytest.approx({"multiplier": 0.18, "price": 0.0})  # never below
    assert reward.adapt({}) == pytest.approx({"multiplier": 0.18, "price": 0.18})  # nothing has ended yet
    assert reward.selection_score({"accuracy": 0.9, "macs_fraction": 0.504}) == pytest.approx(0.9)
    for share in (0.475, 0.525):
        assert reward.selection_score({"accuracy": 0.9, "macs_fraction": share}) == pytest.approx(0.7)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(target=0),
        dict(target=1.5),
        *(dict(target=0.5, **{k: v}) for k, v in (("rate", 0), ("gain", -1), ("multiplier", -1), ("multiplier", 11))),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(arguments):
    with pytest.raises(UserError, match=r"reward\.target must be above 0 and below 1"):
        Budget(**arguments)


@pytest.mark.parametrize("key", ["target", "rate", "gain", "multiplier"])
@pytest.mark.parametrize("value", ["0.5", None, [0.5], True, torch.ones(2)], ids=str)
def test_what_a_budget_is_made_of_are_numbers(key, value):
    with pytest.raises(UserError, match=rf"reward\.{key} must be a number from .*, got"):
        Budget(**{"target": 0.5, key: value})


def test_a_target_out_of_reach_does_not_wind_the_multiplier_up():
    for target, share, end in ((0.05, 0.9, 10.0), (0.95, 0.1, 0.0)):
        reward = Budget(target)
        for _ in range(1000):
            reward.adapt({"macs_fraction": share})
        assert reward.multiplier == end


def test_a_reward_carries_no_gradient():
    logits = OUTCOME.logits_BC.clone().requires_grad_()
    reward = Linear()
    outcome = dataclasses.replace(OUTCOME, logits_BC=logits)
    assert reward(outcome).requires_grad and not reward_of(reward, outcome).requires_grad
