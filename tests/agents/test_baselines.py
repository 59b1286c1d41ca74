"""The four baselines: by hand, unbiased by enumeration, and their variance on a small problem, exactly."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from policyskip.agents.baselines import (
    ValueHead,
    greedy_advantage,
    leave_one_out_advantage,
    value_advantage,
    value_loss,
)
from policyskip.agents.blockdrop import BlockDrop, bounded, reinforce_loss
from policyskip.envs.block_selection import BlockSelectionVectorEnv
from policyskip.errors import UserError
from tests.conftest import small_backbone, small_images

ALPHA, K, S = 0.8, 3, 2
EVERY = torch.tensor(list(itertools.product([False, True], repeat=K)))  # all 8 decisions
PAIRS = torch.tensor(list(itertools.product(range(8), repeat=S)))  # all 64 pairs of them
FREE = torch.ones(K, dtype=torch.bool)
LOGITS = torch.tensor([0.4, -0.3, 1.2], dtype=torch.float64)
REWARD = torch.tensor([1.0, 3.4, 1.0, 3.6, 3.7, 3.5, 3.9, 3.1], dtype=torch.float64)  # of each decision


def advantages(baseline: str, reward_SB: Tensor) -> Tensor:
    """The advantages (S, B) that a baseline makes of rewards (S, B), in the small problem."""
    B = reward_SB.shape[1]
    if baseline == "greedy":
        greedy = (LOGITS >= 0).int() @ torch.tensor([4, 2, 1], dtype=torch.int32)
        return greedy_advantage(reward_SB, REWARD[greedy].expand(B))
    if baseline == "leave_one_out":
        return leave_one_out_advantage(reward_SB)
    if baseline == "value":
        return value_advantage(reward_SB, expected_reward(LOGITS).expand(B))
    return reward_SB


def probabilities(logits_K: Tensor) -> Tensor:
    """The probability of each of the 8 decisions, (8,)."""
    s_K = bounded(logits_K.sigmoid(), ALPHA)
    return torch.where(EVERY, s_K, 1 - s_K).prod(1)


def expected_reward(logits_K: Tensor) -> Tensor:
    return (probabilities(logits_K) * REWARD).sum()


def estimates(baseline: str) -> tuple[Tensor, Tensor]:
    """The gradient (64, K) that each pair of decisions gives, and the probability (64,) of that pair."""
    advantage_SB = advantages(baseline, REWARD[PAIRS].T)
    gradients = []
    for pair, advantage_S in zip(PAIRS, advantage_SB.T, strict=True):
        logits_1K = LOGITS.unsqueeze(0).requires_grad_()
        loss = reinforce_loss(logits_1K, EVERY[pair].unsqueeze(1), advantage_S.unsqueeze(1), FREE, ALPHA, beta=0.0)
        gradients.append(torch.autograd.grad(loss, logits_1K)[0][0])
    return torch.stack(gradients), probabilities(LOGITS)[PAIRS].prod(1)


def variance(baseline: str) -> float:
    gradient_RK, weight_R = estimates(baseline)
    mean_K = weight_R @ gradient_RK
    return float(weight_R @ (gradient_RK - mean_K).square().sum(1))


def test_advantages_by_hand():
    reward_SB = torch.tensor([[1.0, 0.0], [2.0, -3.0], [6.0, 0.0]])
    torch.testing.assert_close(
        leave_one_out_advantage(reward_SB), torch.tensor([[1 - 4, 0 + 1.5], [2 - 3.5, -3.0], [6 - 1.5, 1.5]])
    )
    other_B = torch.tensor([2.0, -1.0])
    by_hand = torch.tensor([[-1.0, 1.0], [0.0, -2.0], [4.0, 1.0]])
    torch.testing.assert_close(greedy_advantage(reward_SB, other_B), by_hand)
    torch.testing.assert_close(value_advantage(reward_SB, other_B), by_hand)
    torch.testing.assert_close(value_loss(other_B, reward_SB), torch.tensor((1 + 0 + 16 + 1 + 4 + 1) / 6))


@pytest.mark.parametrize("baseline", ["greedy", "leave_one_out", "value", "none"])
def test_every_estimator_is_unbiased(baseline):
    """Enumerate all 64 pairs of decisions: E[gradient] = -∇E[R]."""
    gradient_RK, weight_R = estimates(baseline)
    logits = LOGITS.clone().requires_grad_()
    expected = torch.autograd.grad(-expected_reward(logits), logits)[0]
    torch.testing.assert_close(weight_R @ gradient_RK, expected)
    assert expected.abs().min() > 1e-3


def test_a_sample_in_its_own_baseline_would_be_biased():
    """With the mean of all samples, its own included, as the baseline, the gradient is (S−1)/S of the right one."""
    gradient_RK, weight_R = estimates("leave_one_out")
    logits = LOGITS.clone().requires_grad_()
    expected = torch.autograd.grad(-expected_reward(logits), logits)[0]
    reward_SR = REWARD[PAIRS].T
    naive_SR = reward_SR - reward_SR.mean(0)
    torch.testing.assert_close(naive_SR, leave_one_out_advantage(reward_SR) * (S - 1) / S)
    torch.testing.assert_close(weight_R @ (gradient_RK * (S - 1) / S), expected / 2)


def test_variances_on_the_small_problem(monkeypatch):
    """Exactly, over all pairs: with rewards far from 0, every baseline helps, and the expected reward helps most. A
    constant added to every reward changes nothing but the variance without a baseline."""
    variances = {baseline: variance(baseline) for baseline in ("greedy", "leave_one_out", "value", "none")}
    assert variances["value"] < variances["greedy"] < variances["leave_one_out"] < variances["none"]
    monkeypatch.setitem(globals(), "REWARD", REWARD - 3)
    for baseline in ("greedy", "leave_one_out", "value"):
        assert variance(baseline) == pytest.approx(variances[baseline])
    assert variance("none") < variances["none"] / 5


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: greedy_advantage(torch.zeros(2, 3), torch.zeros(2)),
        lambda: greedy_advantage(torch.zeros(2, 3), torch.zeros(2, 3)),
        lambda: leave_one_out_advantage(torch.zeros(1, 3)),
        lambda: leave_one_out_advantage(torch.zeros(3)),
        lambda: value_advantage(torch.zeros(2, 3), torch.zeros(3, 1)),
        lambda: value_loss(torch.zeros(3, 1), torch.zeros(2, 3)),
    ],
)
def test_other_shapes_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        wrong()


def make_env(**kwargs) -> BlockSelectionVectorEnv:
    return BlockSelectionVectorEnv(16, backbone=small_backbone(), images=small_images(), **kwargs)


def make_agent(env: BlockSelectionVectorEnv, total_steps: int = 10, **kwargs) -> BlockDrop:
    return BlockDrop(env, total_steps, **{"width": 4, "curriculum": 0.0, "samples": 3, **kwargs})


@pytest.mark.parametrize(("baseline", "decisions"), [("greedy", 4), ("leave_one_out", 3), ("value", 3), ("none", 3)])
def test_an_update_scores_what_its_baseline_needs(baseline, decisions, monkeypatch):
    env = make_env()
    agent, scored, score = make_agent(env, baseline=baseline), [], env.score
    monkeypatch.setattr(env, "score", lambda keep: scored.append(keep) or score(keep))
    metrics = agent.update(env)
    assert [len(keep) for keep in scored] == [decisions]
    assert ("reward" in metrics) == (baseline == "greedy") and ("value_loss" in metrics) == (baseline == "value")


@pytest.mark.parametrize("policy", ["cifar", "constant"])
def test_the_value_head_learns_and_leaves_the_policy_alone(policy):
    """If the reward is the same for every decision, the policy has nothing to learn, and the head learns the reward."""
    env = make_env(reward=lambda outcome: torch.full_like(outcome.kept_fraction_B, 3.0))
    agent = make_agent(env, total_steps=120, baseline="value", beta=0.0, lr=0.01, policy=policy)
    losses = [agent.update(env)["value_loss"] for _ in range(120)]
    assert losses[0] == pytest.approx(9.0) and losses[-1] < 0.1
    assert not any("value" in name for name in agent.policy.state_dict())
    assert agent.decision_macs == make_agent(env, policy=policy).decision_macs


def test_the_value_loss_sends_no_gradient_into_the_features():
    features = torch.randn(4, 5, requires_grad=True)
    head = ValueHead(5)
    value_loss(head(features), torch.randn(3, 4)).backward()
    assert features.grad is None and head.weight_D.grad is not None


def test_impossible_choices_are_one_line():
    with pytest.raises(UserError, match="agent.samples must be at least 2, got 1"):
        make_agent(make_env(), baseline="leave_one_out", samples=1)
    with pytest.raises(UserError, match="agent.baseline must be one of greedy, leave_one_out, value, none, got 'best'"):
        make_agent(make_env(), baseline="best")


def test_no_gradient_flows_from_the_advantage_into_the_value_or_from_its_loss_into_the_reward():
    value, reward = torch.zeros(3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    assert not value_advantage(torch.ones(2, 3), value).requires_grad
    value_loss(value, reward).backward()
    assert reward.grad is None
    torch.testing.assert_close(value.grad, torch.full((3,), -2 / 3))  # 2 (V − R) / 3 images


def test_the_value_head_learns_ten_times_as_fast():
    agent = make_agent(make_env(), baseline="value", lr=0.01)
    assert [group["lr"] for group in agent.optimizer.param_groups] == pytest.approx([0.01, 0.1])
