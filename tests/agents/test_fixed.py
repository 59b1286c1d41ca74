"""Agents with nothing to train: their decisions by hand, the oracle against enumeration, and whole runs."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import policyskip
from policyskip.agents import fixed
from policyskip.agents.base import Agent
from policyskip.agents.blockdrop import BlockDrop
from policyskip.agents.fixed import first_blocks
from policyskip.agents.oracle import Oracle, best_of
from policyskip.data import digits
from policyskip.envs.block_selection import BlockSelectionVectorEnv
from policyskip.errors import UserError
from policyskip.evaluation.evaluate import evaluate
from policyskip.evaluation.figures import block_figures
from policyskip.policies.fixed import RandomPolicy, image_hashes
from policyskip.rewards import Linear, Macs, Utilization
from policyskip.static_front import StaticFront, spread_set
from tests.conftest import small_backbone, small_images, typed

K = 6
EVERY = torch.tensor(list(itertools.product([False, True], repeat=K)))


def make_env(reward=None, count: int = 40) -> BlockSelectionVectorEnv:
    return BlockSelectionVectorEnv(
        16, backbone=small_backbone(), images=small_images(count), order="sequential", reward=reward
    )


def make_front() -> StaticFront:
    """Two sets of three blocks, of which the second is better, and one of every other size but two."""
    sets = ["000000", "100000", "111000", "010101", "111100", "111110", "111111"]
    accuracy = [0.2, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9]
    return StaticFront(
        sets=[tuple(mark == "1" for mark in keep) for keep in sets],
        kinds=["moves"] * 7,
        correct_FN=None,
        macs=list(range(7)),
        images=40,
        finished=False,
        spent=0,
        tried=7,
        backbone="backbone",
        data="data",
        stated_accuracy=accuracy,
    )


def decision(agent: Agent) -> str:
    """The keep-set as text of an agent that keeps the same blocks for every image."""
    (keep,) = agent.act(small_images(5).images).unique(dim=0).int().tolist()
    return "".join(map(str, keep))


def test_fixed_decisions_by_hand():
    env, best = make_env(), (False, True, True, False, False, False)
    assert decision(fixed.full(env)) == "111111"
    assert decision(fixed.first(env, blocks=2)) == "110000"
    assert decision(fixed.first(env, best=best)) == "110000"
    assert decision(fixed.distributed(env, blocks=3)) == "101010"
    assert decision(fixed.distributed(env, best=best)) == "100100"
    assert decision(fixed.best_static(env, best=best, front=make_front())) == "011000"
    assert decision(fixed.best_static(env, blocks=3, best=best, front=make_front())) == "010101"
    assert decision(fixed.first(env, blocks=0)) == "000000"


def test_even_distances_by_hand():
    assert [k for k, kept in enumerate(spread_set(15, 4)) if kept] == [0, 3, 7, 11]
    for m in range(16):
        assert sum(spread_set(15, m)) == sum(first_blocks(15, m)) == m


def test_random_blocks_have_the_number_that_is_set_and_are_evenly_used():
    images = small_images(4000, size=4).images
    keep_BK = fixed.random(make_env(), blocks=2).policy.decide(images)
    assert (keep_BK.sum(1) == 2).all()
    torch.testing.assert_close(keep_BK.double().mean(0), torch.full((K,), 2 / 6).double(), atol=0.03, rtol=0)
    sets, count = keep_BK.unique(dim=0, return_counts=True)
    assert len(sets) == 15 and count.min() > 200 and count.max() < 335  # 267 ± 16 if even


def test_random_blocks_depend_on_the_image_and_the_seed_alone():
    images = small_images(50).images
    policy, other = RandomPolicy(K, seed=1), RandomPolicy(K, seed=2)
    for random_policy in (policy, other):
        random_policy.blocks.fill_(3)
    together, alone = policy.decide(images), torch.cat([policy.decide(image[None]) for image in images])
    assert torch.equal(together, alone) and not torch.equal(together, other.decide(images))
    changed = images[:1].clone()
    changed[0, 0, 0, 0] += 1
    assert not torch.equal(image_hashes(images[:1], K, 1), image_hashes(changed, K, 1))
    assert policy.decide(images[:0]).shape == (0, K)


def test_the_oracle_is_never_below_any_policy():
    """If the front holds all 2^K sets, no decision earns more for any image. An image that is right costs as little as
    it can, so that no policy of equal cost is right more often."""
    for reward in (Macs(2.0), Utilization(2.0), Linear(0.5)):
        env = make_env(reward)
        rising = [n / 2**K for n in range(2**K)]
        every = dict(sets=[tuple(keep) for keep in EVERY.tolist()], macs=rising, stated_accuracy=rising)
        oracle = Oracle(env, replace(make_front(), **every))
        keep_BK = oracle.decide(env)
        every_SBK = EVERY.unsqueeze(1).expand(-1, len(keep_BK), -1)
        everything, chosen = env.score(every_SBK), env.score(keep_BK)
        reward_SB = env.rewards(everything).view(2**K, -1)
        torch.testing.assert_close(env.rewards(chosen), reward_SB.amax(0))
        if isinstance(reward, Macs):
            correct_SB, macs_SB = everything.correct_B.view(2**K, -1), everything.macs_B.view(2**K, -1)
            assert torch.equal(chosen.correct_B, correct_SB.any(0))
            cheapest_B = torch.where(correct_SB, macs_SB, torch.inf).amin(0)
            torch.testing.assert_close(chosen.macs_B, cheapest_B.where(correct_SB.any(0), macs_SB.amin(0)))


def test_the_oracle_tries_sets_that_are_better_than_every_cheaper_one_and_both_ends():
    front = replace(make_front(), macs=[0, 2, 1, 1, 4, 3, 6], stated_accuracy=[0.5, 0.6, 0.6, 0.7, 0.7, 0.9, 0.8])
    tried = ["".join("01"[kept] for kept in keep) for keep in Oracle(make_env(), front).sets_FK.tolist()]
    assert tried == ["000000", "111111", "010101", "111110"]


def test_the_oracle_s_search_starts_from_the_front_and_flips_single_blocks():
    """Under a reward that counts the blocks on which a decision and a hidden keep-set agree, the search finds that set."""
    hidden = torch.tensor([1, 0, 1, 1, 0, 1]).bool()

    def matching(outcome) -> Tensor:
        return (outcome.keep_BK == hidden).float().sum(1)

    env = make_env(matching)
    for front in (None, make_front()):
        assert torch.equal(Oracle(env, front).decide(env), hidden.expand(16, -1))


@pytest.mark.parametrize("reward", [Utilization(1.0), Macs(3.0), Linear(0.3)])
def test_the_oracle_beats_every_set_of_the_front_and_a_policy_in_reward(reward):
    front = make_front()
    oracle = evaluate(Oracle(make_env(reward), front), make_env(reward))
    for keep in front.sets:
        same = evaluate(fixed.best_static(make_env(reward), best=keep), make_env(reward))
        assert (oracle.reward_N >= same.reward_N).all()
    assert block_figures(oracle)["sees_the_label"] is True and oracle.policy_macs == 0.0
    learner = evaluate(BlockDrop(make_env(reward), 1, width=4), make_env(reward))
    assert oracle.reward_N.mean() >= learner.reward_N.mean() and "sees_the_label" not in block_figures(learner)


def test_of_equal_rewards_the_cheapest_is_taken():
    env = make_env(lambda outcome: torch.zeros(len(outcome.label_B)))
    choice = best_of(env, EVERY.flip(0).unsqueeze(1).expand(-1, 16, -1))
    assert not choice.any()


def test_impossible_settings_are_refused_in_one_line():
    env = make_env()
    with pytest.raises(UserError, match="agent.blocks must be from 0 to 6, the network's blocks, got 7"):
        fixed.random(env, blocks=7)
    with pytest.raises(UserError, match="no set of 2 blocks: its search ran out of front.budget"):
        fixed.best_static(env, blocks=2, front=make_front())
    with pytest.raises(UserError, match="agent=full has nothing to learn"):
        fixed.full(env).update(env)
    with pytest.raises(UserError, match="cannot decide from images alone"):
        Oracle(env).act(env.observation)


SMALL = [
    *("data.train=64", "data.validation=40", "data.test=36", "data.batch_size=32", "device=cpu", "tracking=none"),
    *(
        "backbone=resnet20",
        "backbone.checkpoint=random",
        "front.budget=2e4",
        "front.images=20",
    ),
]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("workshop")


@pytest.mark.parametrize("agent", ["full", "first", "distributed", "random", "best_static", "oracle"])
def test_a_run_from_end_to_end(agent, workshop, monkeypatch):
    run = workshop / "runs" / agent
    blocks = [] if agent in ("full", "oracle", "best_static") else ["agent.blocks=4"]
    steps = ["train.steps=30"] if agent in ("best_static", "random") else []  # as one of a sweep's agents
    words = ["train", f"agent={agent}", *SMALL, *blocks, *steps, f"run.dir={run}"]
    trained = typed(*words, cwd=workshop, drawn=agent == "oracle")
    assert trained.returncode == 0, trained.stderr
    assert ("has nothing to learn, so train.steps=30 is ignored" in trained.stdout) == bool(steps)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["agent"] == agent and summary["steps"] == 0 and summary["test/policy_macs"] == 0
    assert len(list((run / "plots").iterdir())) == 6
    if blocks:
        assert (summary["test/kept_mean"], summary["test/kept_sd"]) == (4, 0)
    assert (summary["test/unique_decisions"] == 1) == (agent not in ("random", "oracle"))

    evaluated = typed("evaluate", f"run={run}", "device=cpu", cwd=workshop)
    assert "Every figure is that of summary.json." in evaluated.stdout, evaluated.stderr
    finished = typed("train", f"run.resume={run}", cwd=workshop)
    assert finished.returncode == 0, finished.stderr
    assert json.loads((run / "summary.json").read_text()) == summary

    monkeypatch.chdir(workshop)
    if agent == "oracle":
        assert summary["test/sees_the_label"] is True and "oracle (sees the label)" in trained.stdout
        with pytest.raises(UserError, match=r"is an oracle's, which sees the label"):
            policyskip.load(run)
        return
    assert "sees_the_label" not in json.dumps(summary)
    test = digits(torch.device("cpu"), 1, 1, 36).test
    result = policyskip.load(run).predict(test.images, batch_size=7)
    if agent == "best_static":
        front = StaticFront.load(run / "front.json")
        assert {tuple(keep) for keep in result.keep_BK.tolist()} <= set(front.sets)
    assert result.macs_B.mean().item() == pytest.approx(summary["test/macs_mean"])
    assert (result.label_B == test.label_N).double().mean().item() == pytest.approx(summary["test/accuracy"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["agent=blockdrop", "train.steps=0"], "train.steps must be at least 1, got 0"),
        (["agent=random", "agent.blocks=10"], "agent.blocks must be from 0 to 9, the network's blocks, got 10"),
        (["agent=first", "agent.blocks=some"], "agent.blocks: input should be a valid integer, got 'some'"),
        (["agent=full", "agent.blocks=3"], "Could not override 'agent.blocks'"),
    ],
)
def test_bad_input_is_one_line(arguments, message, workshop):
    refused = typed("train", *arguments, *SMALL, cwd=workshop)
    assert refused.returncode == 2 and message in refused.stderr and refused.stderr.count("\n") == 1, refused.stderr
