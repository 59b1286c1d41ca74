"""The environment's contract: Gymnasium's checker, seeding, SAME_STEP, and independence of the batch."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from policyskip.envs.block_selection import BlockSelectionEnv, BlockSelectionVectorEnv
from policyskip.errors import UserError
from policyskip.rewards import Utilization
from tests.conftest import small_backbone, small_images

ID = "policyskip/BlockSelection-v0"


def make(num_envs: int = 8, **kwargs) -> BlockSelectionVectorEnv:
    return BlockSelectionVectorEnv(num_envs, backbone=small_backbone(), images=small_images(), **kwargs)


def single(**kwargs) -> BlockSelectionEnv:
    return BlockSelectionEnv(backbone=small_backbone(), images=small_images(), **kwargs)


def test_gymnasium_checks_the_single_environment():
    check_env(single(), skip_render_check=True)


def test_registered_ids_make_the_environments():
    arguments = {"backbone": small_backbone(), "images": small_images()}
    env = gymnasium.make(ID, **arguments)
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation) and env.action_space.n == 6
    vector = gymnasium.make_vec(ID, num_envs=8, **arguments)
    assert isinstance(vector, BlockSelectionVectorEnv) and vector.num_envs == 8
    assert vector.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP


def test_spaces_and_types_of_a_vector_step():
    env = make()
    observation, _ = env.reset(seed=0)
    assert observation.dtype == torch.uint8 and env.observation_space.shape == observation.shape == (8, 3, 12, 12)
    assert env.action_space.shape == (8, 6) and env.single_action_space == gymnasium.spaces.MultiBinary(6)
    for action in (env.action_space.sample(), torch.ones(8, 6, dtype=torch.bool)):
        shown = env.observation
        observation, reward, terminated, truncated, info = env.step(action)
        assert reward.dtype == torch.float32 and reward.shape == terminated.shape == truncated.shape == (8,)
        assert terminated.all() and not truncated.any()
        assert torch.equal(info["final_obs"], shown) and info["_final_obs"].all()
        assert not torch.equal(observation, shown)
        assert set(info["final_info"]) == {"correct", "macs", "kept"}


def test_an_environment_declares_what_it_is():
    env = make()
    assert (env.family, env.key, env.id, env.steps_per_episode) == ("blocks", "block_selection", ID[11:], 1)
    assert env.decisions_of(env.score(torch.ones(8, 6, dtype=torch.bool))) == 1


def test_every_step_is_scored():
    """With NEXT_STEP autoreset every second reward of one-step episodes would be a dummy 0."""
    env = make(reward=lambda outcome: torch.ones(len(outcome.label_B)))
    env.reset(seed=0)
    assert all((env.step(env.action_space.sample())[1] == 1).all() for _ in range(4))


def test_a_seed_gives_the_same_images_and_rewards():
    def rollout(seed: int) -> list[torch.Tensor]:
        env = make()
        observation, _ = env.reset(seed=seed)
        seen = [observation]
        for _ in range(7):  # more than one pass over the 40 images
            observation, reward, *_ = env.step(torch.ones(8, 6))
            seen += [observation, reward]
        return seen

    assert all(torch.equal(a, b) for a, b in zip(rollout(3), rollout(3), strict=True))
    assert not torch.equal(rollout(3)[0], rollout(4)[0])


def test_an_unseeded_reset_goes_on_in_a_shuffled_order_and_starts_over_in_a_sequential_one():
    env = make()
    first, _ = env.reset(seed=0)
    env.step(torch.ones(8, 6))
    assert not torch.equal(env.reset()[0], first)
    env = make(order="sequential")
    first, _ = env.reset()
    env.step(torch.ones(8, 6))
    assert torch.equal(env.reset()[0], first)


def test_sequential_order_shows_each_image_once():
    env = make(num_envs=16, order="sequential")
    observation, _ = env.reset()
    seen, sizes = [], []
    while len(observation):
        seen.append(env.feed.batch.index_B)
        sizes.append(len(observation))
        observation, *_ = env.step(torch.ones(len(observation), 6))
    assert sizes == [16, 16, 8]
    assert torch.cat(seen).tolist() == list(range(40))


@pytest.mark.parametrize("num_envs", [1, 7, 40])
def test_rewards_do_not_depend_on_who_else_is_in_the_batch(num_envs):
    keep_NK = torch.rand(40, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    rewards = []
    for size in (8, num_envs):
        env = make(num_envs=size, order="sequential")
        env.reset()
        parts = []
        for keep_BK in keep_NK.split(size):
            parts.append(env.step(keep_BK)[1])
        rewards.append(torch.cat(parts))
    torch.testing.assert_close(*rewards)


def test_score_asks_without_moving_on():
    env = make()
    env.reset(seed=0)
    keep_SBK = torch.rand(3, 8, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    shown = env.observation
    outcome = env.score(keep_SBK)
    assert torch.equal(env.observation, shown)
    assert outcome.keep_BK.shape == (24, 6) and outcome.label_B.shape == (24,)
    for s in range(3):
        one = env.score(keep_SBK[s])
        torch.testing.assert_close(outcome.logits_BC.view(3, 8, -1)[s], one.logits_BC)
        assert torch.equal(outcome.macs_B.view(3, 8)[s], one.macs_B)
    reward = env.rewards(env.score(keep_SBK[2]))
    assert torch.equal(env.step(keep_SBK[2])[1], reward)


def test_the_single_view_agrees_with_the_vector_environment():
    view, vector = single(), make(num_envs=1)
    observation, _ = view.reset(seed=5)
    shown, _ = vector.reset(seed=5)
    for _ in range(3):
        assert np.array_equal(observation, shown[0].numpy())
        action = np.array([1, 0, 1, 1, 0, 1], dtype=np.int8)
        _, reward, terminated, truncated, info = view.step(action)
        shown, reward_B, *_, vector_info = vector.step(action[None])
        assert (reward, terminated, truncated) == (pytest.approx(reward_B.item()), True, False)
        assert info["macs"] == vector_info["final_info"]["macs"].item() and info["kept"] == 4
        observation, _ = view.reset()


def test_the_single_view_keeps_an_image_until_it_is_reset():
    view = single()
    observation, _ = view.reset(seed=5)
    all_blocks, no_blocks = np.ones(6, np.int8), np.zeros(6, np.int8)
    shown = [view.step(action)[0] for action in (all_blocks, no_blocks)]
    assert all(np.array_equal(observation, again) for again in shown)
    assert view.step(all_blocks)[4] == view.step(all_blocks)[4]
    assert not np.array_equal(view.reset()[0], observation)
    types = {key: type(value) for key, value in view.step(all_blocks)[4].items()}
    assert types == {"correct": bool, "macs": float, "kept": int}


def test_the_label_is_not_in_the_observation():
    """Same images with other labels: observations stay, rewards change."""
    images = small_images()
    other = small_images()
    other.label_N = (other.label_N + 1) % 5
    envs = [
        BlockSelectionVectorEnv(40, backbone=small_backbone(), images=i, order="sequential") for i in (images, other)
    ]
    assert torch.equal(*(env.reset()[0] for env in envs))
    rewards = [env.step(torch.ones(40, 6))[1] for env in envs]
    assert not torch.equal(*rewards)


def test_a_step_leaves_no_gradient_but_its_images_can_train_a_policy():
    env = make()
    observation, _ = env.reset(seed=0)
    observation, reward, *_ = env.step(torch.ones(8, 6))
    assert not reward.requires_grad
    weight = torch.ones(1, requires_grad=True)
    (observation * weight).sum().backward()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"order": "random"}, "order must be one of shuffled, sequential"),
        ({"num_envs": 0}, "num_envs must be a whole number, from 1 to 1048576, got 0"),
    ],
)
def test_bad_arguments_are_named(wrong, message):
    with pytest.raises(UserError, match=message):
        make(**wrong)


def test_default_reward_is_utilization():
    assert make().reward == Utilization(1.0)
