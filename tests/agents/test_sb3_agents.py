"""The learners of Stable-Baselines3 as agents: they learn, decide as SB3 does, and go on where they stopped."""

from __future__ import annotations

import inspect
import io

import numpy as np
import pytest
import torch
from torch import Tensor

from policyskip.agents.base import Agent
from policyskip.agents.sb3 import A2C, DQN, PPO, SB3Agent
from policyskip.backbones import ExitCosts
from policyskip.envs.block_selection import BlockSelectionVectorEnv
from policyskip.envs.early_exit import EarlyExitVectorEnv
from policyskip.envs.layer_skip import LayerSkipVectorEnv
from policyskip.errors import UserError
from policyskip.evaluation.evaluate import evaluate
from policyskip.exits.cache import CachedExits
from policyskip.policies.perceptrons import BlockPolicy, ExitPolicy, LookPolicy
from policyskip.rewards import Outcome
from policyskip.tasks.exit_policy import exits_of, outcome_of
from tests.conftest import BlackAndWhite, small_backbone, small_cache

ENVIRONMENTS = {
    "block_selection": BlockSelectionVectorEnv,
    "layer_skip": LayerSkipVectorEnv,
    "early_exit": EarlyExitVectorEnv,
}
PAIRS = [(agent, env) for agent in (PPO, A2C, DQN) for env in agent.environments]
OPTIONS = {
    PPO: dict(learning_rate=3e-3, batch_size=64),
    A2C: dict(learning_rate=1e-2, use_rms_prop=False, normalize_advantage=True),
    DQN: dict(
        learning_rate=3e-3,
        learning_starts=200,
        buffer_size=10_000,
        batch_size=64,
        gradient_steps=16,
        target_update_interval=128,
        exploration_fraction=0.5,
    ),
}


def label_reward(outcome: Outcome) -> Tensor:
    """A reward for every environment: 1 where an image of class 1 runs everything, or one of class 0 as little as it can."""
    least_K = torch.zeros_like(outcome.keep_BK)
    least_K[:, :1] = outcome.keep_BK[:, :1] & (outcome.keep_BK.shape[1] == 3)  # of three exits the first is always run
    best_BK = torch.where(outcome.label_B.bool().unsqueeze(1), True, least_K)
    return (outcome.keep_BK == best_BK).float().mean(1)


def separable_cache(count: int = 64) -> CachedExits:
    """Outputs of three exits that are right about every image, of class 0 or 1."""
    label_M = torch.arange(count) % 2
    logits_MNC = 4 * torch.nn.functional.one_hot(label_M, 2).float().unsqueeze(1).expand(-1, 3, -1).contiguous()
    return CachedExits(logits_MNC, label_M, ExitCosts(torch.tensor([3.0, 4.0, 5.0]).double(), torch.ones(3).double()))


def make(name: str, order: str = "shuffled", reward=label_reward):
    if name == "early_exit":
        return EarlyExitVectorEnv(16, network=separable_cache(), reward=reward, order=order)
    backbone = small_backbone(8)
    return ENVIRONMENTS[name](16, backbone=backbone, images=BlackAndWhite(), reward=reward, order=order)


def agent_for(kind: type[SB3Agent], env, steps: int = 60, **options) -> SB3Agent:
    return kind(env, steps, net_arch=[16], **OPTIONS[kind], **options)


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_a_small_known_problem_is_solved(kind, name):
    """The best policy earns 1; one that decides by chance, or the same for all images, earns about a half."""
    env = make(name)
    steps = 300 if kind is A2C else 60  # one step of the optimizer each
    agent = agent_for(kind, env, steps)
    for _ in range(steps):
        figures = agent.update(env)
    assert all(np.isfinite(value) for value in figures.values())
    if name == "early_exit":
        cache = separable_cache()
        reward = label_reward(outcome_of(exits_of(agent.policy, cache), cache)).mean()
    else:
        reward = evaluate(agent, make(name, "sequential")).reward_N.mean()
    assert reward > 0.95


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_the_greedy_action_is_sb3_s(kind, name):
    env = make(name)
    agent = agent_for(kind, env)
    for _ in range(3):
        agent.update(env)
        observation = agent.adapter._observe(env.observation)
        expected, _ = agent.model.predict(observation, deterministic=True)
        acted = agent.act(env.observation)
        assert acted.dtype == torch.bool and np.array_equal(acted.numpy(), expected.astype(bool))


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_state_is_saved_and_restored_to_the_bit(kind, name):
    """PPO and A2C also go on as if nothing had happened, where rollouts end with the episodes."""
    env = make(name)
    options = {"n_steps": 6} if name == "layer_skip" and kind is not DQN else {}
    agent = agent_for(kind, env, **options)
    for _ in range(3):
        agent.update(env)
    buffer = io.BytesIO()
    torch.save(agent.state_dict(), buffer)
    cursor = env.cursor
    buffer.seek(0)
    restored_env = make(name)
    restored = agent_for(kind, restored_env, seed=1, **options)
    restored.load_state_dict(torch.load(buffer, weights_only=True))
    restored_env.seek(cursor)
    before, after = agent.model.policy.state_dict(), restored.model.policy.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(agent.act(env.observation), restored.act(env.observation))
    assert restored.step == 3 and restored.model.num_timesteps == agent.model.num_timesteps
    expected, figures = agent.update(env), restored.update(restored_env)
    if kind is not DQN and name != "early_exit":
        assert figures == expected
    assert figures.keys() == expected.keys()


def test_a_replay_buffer_is_filled_anew_before_learning_goes_on():
    env = make("early_exit")
    agent = agent_for(DQN, env)
    while agent.model.num_timesteps <= agent.model.learning_starts:
        agent.update(env)
    restored_env = make("early_exit")
    restored = agent_for(DQN, restored_env)
    restored.load_state_dict(agent.state_dict())
    restored.update(restored_env)
    assert restored.model.replay_buffer.size() * 16 >= restored.model.learning_starts
    assert restored.model._n_updates == agent.model._n_updates + restored._gradient_steps


def test_the_global_generators_stay_as_they_were():
    env = make("block_selection")
    before, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()
    agent = agent_for(PPO, env)
    agent.update(env)
    assert torch.equal(torch.get_rng_state(), before) and np.array_equal(np.random.get_state()[1], numbers)


def test_one_seed_one_result():
    def learned(seed: int) -> dict[str, float]:
        env = make("block_selection")
        agent = agent_for(PPO, env, seed=seed)
        agent.update(env)
        return agent.update(env)

    assert learned(0) == learned(0) != learned(1)


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_a_policy_is_built_again_from_plain_arguments(kind, name):
    env = make(name)
    agent = agent_for(kind, env)
    agent.update(env)
    policy = agent.policy
    fresh = type(policy)(**policy.spec())
    fresh.load_state_dict(policy.state_dict())
    assert torch.equal(fresh.decide(env.observation), policy.decide(env.observation))
    assert {type(policy)} <= {LookPolicy, BlockPolicy, ExitPolicy}
    assert all(type(value) in (int, list) for value in policy.spec().values())


def test_the_best_weights_are_put_into_sb3_s_policy_as_well():
    env = make("block_selection")
    agent, other = agent_for(PPO, env, seed=0), agent_for(PPO, env, seed=1)
    agent.policy.load_state_dict(other.policy.state_dict())
    assert torch.equal(agent.model.policy.action_net.weight, other.model.policy.action_net.weight)


def test_a_fresh_policy_starts_from_a_fixed_set():
    """At probability 0.9: nine of ten blocks as the set says."""
    env = make("block_selection")
    agent = agent_for(PPO, env, start=[True, False, True], initial_keep=0.9)
    assert (agent.act(env.observation) == torch.tensor([True, False, True])).all()
    probability = agent.policy(env.observation).sigmoid()
    assert torch.allclose(probability, torch.tensor([0.9, 0.1, 0.9]), atol=0.02)


def test_the_policy_s_cost_is_counted_at_every_decision():
    env = make("layer_skip")
    agent = agent_for(PPO, env)
    assert agent.decision_macs == (env.width + 3) * 16 + 16 * 2
    result = evaluate(agent, make("layer_skip", "sequential"))
    assert result.policy_macs == 3 * agent.decision_macs
    assert torch.equal(result.macs_N, env.costs.of(result.ran_NK) + 3 * agent.decision_macs)


def test_running_block_by_block_is_the_same_as_in_the_environment():
    env = make("layer_skip", "sequential")
    agent = agent_for(DQN, make("layer_skip"))
    result = evaluate(agent, env)
    with torch.no_grad():
        logits_BC, keep_BK = agent.policy.run(env.execution, env.feed.images.images)
    assert torch.equal(keep_BK, result.ran_NK) and torch.equal(logits_BC.argmax(1), result.prediction_N)


def test_leaving_is_the_same_as_in_the_environment():
    cache = small_cache(50)
    env = EarlyExitVectorEnv(16, network=cache, order="sequential")
    agent = agent_for(A2C, EarlyExitVectorEnv(16, network=cache))
    for parameter in agent.policy.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    left = torch.full((50,), -1)
    observation, _ = env.reset()
    while len(observation):
        index_B, exit_B = env.index_B, env.exit_B
        observation, _, over_B, *_ = env.step(agent.act(observation))
        left[index_B[over_B]] = exit_B[over_B]
    assert torch.equal(left, exits_of(agent.policy, cache)) and len(left.unique()) > 1


def test_the_network_stays_as_it_was():
    env = make("block_selection")
    before = {name: value.clone() for name, value in env.backbone.state_dict().items()}
    agent = agent_for(PPO, env)
    agent.update(env)
    assert all(torch.equal(value, before[name]) for name, value in env.backbone.state_dict().items())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: PPO(make("block_selection"), 1, colour=3),
            "agent has no key colour; PPO takes batch_size, clip_range",
        ),
        (lambda: PPO(make("block_selection"), 1, device="cpu"), "agent has no key device"),
        (lambda: PPO(make("block_selection"), 1, schedule="up"), "agent.schedule must be linear or constant"),
        (lambda: PPO(make("block_selection"), 1, initial_keep=1.0), "agent.initial_keep must be above 0 and below 1"),
        (lambda: PPO(make("block_selection"), 1, channels=[]), "agent.channels must list"),
        (lambda: A2C(make("early_exit"), 1, net_arch=[0]), "agent.net_arch must list positive integers"),
        (lambda: DQN(make("block_selection"), 1), "agent=dqn cannot take actions from MultiBinary"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(build, message):
    with pytest.raises(UserError, match=message) as refused:
        build()
    assert "\n" not in str(refused.value)


def test_an_environment_of_another_kind_has_no_policy():
    env = make("block_selection")
    env.key = "mine"
    with pytest.raises(UserError, match="no policy of plain layers for BlockSelectionVectorEnv, whose key is 'mine'"):
        PPO(env, 1)


def test_an_agent_stays_with_its_environment():
    agent = agent_for(PPO, make("block_selection"))
    with pytest.raises(ValueError, match="the environment that it was made with"):
        agent.update(make("block_selection"))


def test_all_learners_are_agents_and_say_where_they_can_act():
    for kind in (PPO, A2C, DQN):
        assert issubclass(kind, Agent) and not inspect.isabstract(kind)
    assert "block_selection" not in DQN.environments
