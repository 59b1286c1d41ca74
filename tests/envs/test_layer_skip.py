"""The block-by-block environment's contract: Gymnasium's checker, one episode = one forward pass, skipped = not run."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from torch import Tensor, nn

from policyskip.envs.block_selection import BlockSelectionVectorEnv
from policyskip.envs.layer_skip import LayerSkipEnv, LayerSkipVectorEnv
from policyskip.errors import UserError
from policyskip.rewards import Linear, Utilization
from tests.conftest import small_backbone, small_images

ID = "policyskip/LayerSkip-v0"
K, WIDEST = 6, 16  # stages of 4, 8 and 16 channels, two blocks each
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def make(num_envs: int = 8, **kwargs) -> LayerSkipVectorEnv:
    return LayerSkipVectorEnv(num_envs, **{"backbone": small_backbone(), "images": small_images(), **kwargs})


def single(**kwargs) -> LayerSkipEnv:
    return LayerSkipEnv(backbone=small_backbone(), images=small_images(), **kwargs)


def random_keep(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, K, generator=torch.Generator().manual_seed(seed)) < 0.5


def episode(env: LayerSkipVectorEnv, keep_BK: Tensor) -> tuple:
    """Play one episode; what the last step gave."""
    for keep_B in keep_BK.unbind(1):
        last = env.step(keep_B)
    return last


def test_gymnasium_checks_the_single_environment():
    check_env(single(), skip_render_check=True)


def test_registered_ids_make_the_environments():
    arguments = {"backbone": small_backbone(), "images": small_images()}
    env = gymnasium.make(ID, **arguments)
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation) and env.action_space == gymnasium.spaces.Discrete(2)
    vector = gymnasium.make_vec(ID, num_envs=8, **arguments)
    assert isinstance(vector, LayerSkipVectorEnv) and vector.num_envs == 8
    assert vector.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP


def test_spaces_and_types_of_a_vector_step():
    env = make()
    observation, _ = env.reset(seed=0)
    assert observation.dtype == torch.float32 and env.observation_space.shape == observation.shape == (8, WIDEST + K)
    for action in (env.action_space.sample(), torch.ones(8, dtype=torch.bool), np.ones(8, np.int8)):
        observation, reward, terminated, truncated, _ = env.step(action)
        assert reward.dtype == torch.float32 and terminated.dtype == truncated.dtype == torch.bool
        assert reward.shape == terminated.shape == truncated.shape == (8,) and not truncated.any()
        assert env.observation_space.contains(observation.numpy())


def test_an_environment_declares_what_it_is():
    env = make()
    assert (env.family, env.key, env.id, env.steps_per_episode) == ("blocks", "layer_skip", ID[11:], K)
    assert env.decisions_of(env.score(random_keep(8))) == K


def test_an_observation_is_what_enters_the_block():
    """The features that enter each block, computed here with no word of the environment, for a mixed decision."""
    backbone, images = small_backbone(shortcut="B"), small_images()
    env = make(4, backbone=backbone, images=images, order="sequential")
    observation, _ = env.reset()
    keep_BK = random_keep(4)
    with torch.no_grad():
        x = backbone.stem((images.images[:4] / 255 - backbone.mean) / backbone.std)
        for k, block in enumerate(backbone.blocks):
            channels = x.shape[1]
            assert env.block == k and channels == (4, 4, 4, 8, 8, 16)[k]
            torch.testing.assert_close(observation[:, :channels], x.mean((2, 3)), **TOLERANCE)
            assert (observation[:, channels:WIDEST] == 0).all()
            assert observation[:, WIDEST:].tolist() == [[float(k == i) for i in range(K)]] * 4
            shortcut = block.shortcut(x)
            kept = torch.relu(shortcut + block.residual(x))
            x = torch.stack([kept[b] if keep_BK[b, k] else shortcut[b] for b in range(4)])
            observation, *_ = env.step(keep_BK[:, k])


@pytest.mark.parametrize("shortcut", ["A", "pool", "B"])
def test_an_episode_is_the_network_with_those_blocks(shortcut):
    """``backbone(images, keep)`` executes densely: another path to the same numbers."""
    backbone, images = small_backbone(shortcut=shortcut), small_images()
    env = make(40, backbone=backbone, images=images, order="sequential", reward=Linear(0.3))
    for seed in range(2):
        keep_BK = random_keep(40, seed)
        keep_BK[0], keep_BK[1] = False, True
        keep_BK[:, 2] &= seed == 0  # a strided block that nobody keeps
        env.reset()
        _, reward, *_ = episode(env, keep_BK)
        with torch.no_grad():
            logits_BC = backbone(images.images, keep_BK)
        outcome = env.outcome
        torch.testing.assert_close(outcome.logits_BC, logits_BC, **TOLERANCE)
        assert torch.equal(outcome.keep_BK, keep_BK) and torch.equal(outcome.label_B, images.label_N)
        assert torch.equal(outcome.correct_B, logits_BC.argmax(1) == images.label_N)
        loss = nn.functional.cross_entropy(logits_BC, images.label_N, reduction="none")
        torch.testing.assert_close(reward, -loss - 0.3 * outcome.macs_fraction_B, **TOLERANCE)


def test_macs_by_hand():
    """12×12 images, 4-8-16 channels, 5 classes: a 3×3 convolution costs 9 · in · out · height · width."""
    env = make(3, order="sequential")
    keep_BK = torch.zeros(3, K, dtype=torch.bool)
    keep_BK[1, [0, 2]] = True
    keep_BK[2] = True
    env.reset()
    *_, info = episode(env, keep_BK)
    always = 9 * 3 * 4 * 144 + 16 * 5  # stem and head; these shortcuts have no weights
    plain = 2 * 9 * 4 * 4 * 144  # equal in every stage: twice the channels on a quarter of the pixels
    strided = plain * 3 // 4  # its first convolution has half the input channels
    assert env.outcome.macs_B.tolist() == [always, always + plain + strided, always + 4 * plain + 2 * strided]
    assert torch.equal(info["final_info"]["macs"], env.outcome.macs_B)
    assert env.outcome.full_macs == always + 4 * plain + 2 * strided
    assert info["final_info"]["kept"].tolist() == [0, 2, 6]


def test_a_skipped_block_is_not_computed_for_that_image():
    backbone = small_backbone()
    env = make(8, backbone=backbone)
    env.reset(seed=0)
    rows: list[list[int]] = [[] for _ in range(K)]
    for block, seen in zip(env.executed.blocks, rows, strict=True):
        block.residual[0].register_forward_hook(lambda module, args, output, seen=seen: seen.append(len(output)))
    keep_BK = torch.zeros(8, K, dtype=torch.bool)
    keep_BK[:, 0] = True
    keep_BK[[0, 4], 1] = True
    keep_BK[:7, 3] = True
    episode(env, keep_BK)
    assert rows == [[8], [2], [], [7], [], []]


def test_a_skipped_block_leaves_no_trace_in_the_image():
    keep_BK = torch.ones(8, K, dtype=torch.bool)
    keep_BK[:3, 2] = False
    seen = []
    for weight in (0.1, 1e3):
        backbone = small_backbone()
        nn.init.constant_(backbone.blocks[2].residual.conv1.weight, weight)
        env = make(8, backbone=backbone, reward=lambda outcome: torch.ones(len(outcome.label_B)))
        env.reset(seed=0)
        observations = []
        for k in range(K):
            observations.append(env.observation.clone())
            env.step(keep_BK[:, k])
        seen.append([*observations, env.outcome.logits_BC])
    for k, (one, other) in enumerate(zip(*seen, strict=True)):
        assert (one == other).all(1).tolist() == [True] * 3 + [k < 3] * 5


def test_the_last_step_pays_and_shows_the_next_images():
    env = make(reward=lambda outcome: 1 + outcome.kept_fraction_B)
    first, _ = env.reset(seed=0)
    keep_BK = random_keep(8)
    for _ in range(3):  # a dummy step between episodes would shift everything by one
        images = env.feed.batch
        for k in range(K):
            shown = env.observation
            assert shown[:, WIDEST:].argmax(1).tolist() == [k] * 8
            observation, reward, terminated, _, info = env.step(keep_BK[:, k])
            assert observation is env.observation
            if k < K - 1:
                assert (reward == 0).all() and not terminated.any() and info == {} and env.feed.batch is images
        torch.testing.assert_close(reward, 1 + keep_BK.float().mean(1))
        assert terminated.all() and info["_final_obs"].all() and torch.equal(info["final_obs"], shown)
        assert set(info["final_info"]) == {"correct", "macs", "kept"} and info["_final_info"].all()
        assert torch.equal(info["final_info"]["correct"], env.outcome.correct_B)
        assert torch.equal(env.outcome.label_B, images.label_B) and env.feed.batch is not images
        assert not torch.equal(observation, first)


@pytest.mark.parametrize("num_envs", [1, 7, 40])
def test_rewards_and_observations_do_not_depend_on_who_else_is_in_the_batch(num_envs):
    keep_NK = random_keep(40)

    def play(size: int) -> tuple[Tensor, Tensor]:
        env = make(size, order="sequential", reward=Linear())
        env.reset()
        seen, rewards = [], []
        for keep_BK in keep_NK.split(size):
            steps = []
            for keep_B in keep_BK.unbind(1):
                steps.append(env.observation)
                _, reward, *_ = env.step(keep_B)
            seen.append(torch.stack(steps, dim=1))
            rewards.append(reward)
        return torch.cat(seen), torch.cat(rewards)

    for together, apart in zip(play(8), play(num_envs), strict=True):
        torch.testing.assert_close(together, apart, **TOLERANCE)


def test_sequential_order_shows_each_image_once_and_the_last_batch_is_short():
    env = make(16, order="sequential")
    observation, _ = env.reset()
    seen, sizes = [], []
    while len(observation):
        seen.append(env.feed.batch.index_B)
        sizes.append(len(observation))
        observation, reward, over, *_ = episode(env, random_keep(len(observation)))
        assert len(reward) == len(over) == len(env.outcome.label_B) == sizes[-1]
    assert sizes == [16, 16, 8] and torch.cat(seen).tolist() == list(range(40))
    assert observation.shape == (0, WIDEST + K)
    assert len(env.reset()[0]) == 16 and env.feed.batch.index_B.tolist() == list(range(16))


def test_a_seed_gives_the_same_observations_and_rewards():
    def rollout(seed: int) -> list[Tensor]:
        env = make()
        seen = [env.reset(seed=seed)[0]]
        for step in range(7 * K):  # more than one pass over the 40 images
            seen += env.step(random_keep(8, step)[:, 0])[:2]
        return seen

    assert all(torch.equal(a, b) for a, b in zip(rollout(3), rollout(3), strict=True))
    assert not torch.equal(rollout(3)[0], rollout(4)[0])


def test_an_unseeded_reset_goes_on_in_a_shuffled_order_and_starts_over_in_a_sequential_one():
    env = make()
    env.reset(seed=0)
    first = env.feed.batch.index_B
    assert torch.equal(env.reset() and env.feed.batch.index_B, first)  # no step was taken
    env.step(torch.ones(8))
    env.reset()
    assert env.block == 0 and not set(env.feed.batch.index_B.tolist()) & set(first.tolist())
    env = make(order="sequential")
    env.reset()
    env.step(torch.ones(8))
    env.reset()
    assert env.block == 0 and env.feed.batch.index_B.tolist() == list(range(8))


def test_a_seeded_reset_in_the_middle_of_an_episode_starts_the_order_anew():
    env = make()
    first, _ = env.reset(seed=1)
    env.step(torch.ones(8))
    assert torch.equal(env.reset(seed=1)[0], first) and env.cursor == 0


@pytest.mark.parametrize("steps", [0, 2, K, K + 1])
def test_seek_goes_back_to_a_cursor(steps):
    env = make()
    env.reset(seed=1)
    for _ in range(steps):
        env.step(torch.ones(8))
    cursor = env.cursor
    observation, _ = env.reset()
    assert env.cursor == cursor
    other = make(seed=1)
    other.step(torch.ones(8))
    other.seek(cursor)
    assert other.block == 0 and torch.equal(other.reset()[0], observation)


def test_advance_gives_up_the_episode():
    env = make(order="sequential")
    env.reset()
    env.step(torch.ones(8))
    observation = env.advance()
    assert env.block == 0 and observation is env.observation
    assert env.feed.batch.index_B.tolist() == list(range(8, 16))
    episode(env, torch.zeros(8, K, dtype=torch.bool))
    assert not env.outcome.keep_BK.any()  # nothing is left of the episode that was given up


def test_score_asks_about_whole_decisions_without_moving_on():
    env = make(reward=Linear())
    env.reset(seed=0)
    keep_BK = random_keep(8)
    for k in range(K):
        shown = env.observation
        scored = env.score(torch.stack([keep_BK, ~keep_BK]))
        assert env.observation is shown and scored.keep_BK.shape == (16, K)
        _, reward, *_ = env.step(keep_BK[:, k])
    torch.testing.assert_close(env.outcome.logits_BC, scored.logits_BC[:8], **TOLERANCE)
    assert torch.equal(env.outcome.macs_B, scored.macs_B[:8])
    torch.testing.assert_close(reward, env.rewards(scored)[:8], **TOLERANCE)


def test_it_pays_what_block_selection_pays_for_the_same_decisions():
    step_by_step, at_once = make(), BlockSelectionVectorEnv(8, backbone=small_backbone(), images=small_images())
    step_by_step.reset(seed=2)
    at_once.reset(seed=2)
    for seed in range(6):
        keep_BK = random_keep(8, seed)
        torch.testing.assert_close(episode(step_by_step, keep_BK)[1], at_once.step(keep_BK)[1])


def test_the_single_view_agrees_with_the_vector_environment():
    view, vector = single(), make(1)
    observation, _ = view.reset(seed=5)
    shown, _ = vector.reset(seed=5)
    for action in (1, 0, 1, 1, 0, 1) * 2:
        assert np.array_equal(observation, shown[0].numpy())
        observation, reward, terminated, truncated, info = view.step(action)
        shown, reward_B, over, _, vector_info = vector.step(torch.tensor([action]))
        assert (reward, terminated, truncated) == (pytest.approx(reward_B.item()), bool(over), False)
        if terminated:
            assert info == {key: value.item() for key, value in vector_info["final_info"].items()}
            assert info["kept"] == 4
            observation, _ = view.reset()


def test_the_single_view_shows_each_image_of_a_sequential_order_once_and_starts_over():
    view, seen = LayerSkipEnv(backbone=small_backbone(), images=small_images(3), order="sequential"), []
    for _ in range(4):
        view.reset()
        seen.append(int(view.vector.feed.batch.index_B))
        assert [view.step(1)[2] for _ in range(K)] == [False] * (K - 1) + [True]
    assert seen == [0, 1, 2, 0]


def test_the_label_is_not_in_the_observation():
    """Same images with other labels: observations stay, rewards change."""
    images, other = small_images(), small_images()
    other.label_N = (other.label_N + 1) % 5
    envs = [make(40, images=i, order="sequential") for i in (images, other)]
    assert torch.equal(*(env.reset()[0] for env in envs))
    for k in range(K):
        steps = [env.step(random_keep(40)[:, k]) for env in envs]
        assert torch.equal(steps[0][0], steps[1][0])
    assert not torch.equal(steps[0][1], steps[1][1])


def test_an_observation_and_an_outcome_are_not_overwritten_by_later_steps():
    env = make()
    kept = [env.reset(seed=0)[0]]
    keep_BK = random_keep(8)
    kept += [env.step(keep_B)[0] for keep_B in keep_BK.unbind(1)]
    copies, outcome = [observation.clone() for observation in kept], env.outcome
    episode(env, ~keep_BK)
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))
    assert torch.equal(outcome.keep_BK, keep_BK)


def test_the_network_is_frozen_and_stays_as_it_was_and_a_policy_can_be_trained():
    backbone = small_backbone()
    before = backbone.content_hash()
    env = make(backbone=backbone)
    env.reset(seed=0)
    observation, reward, *_ = episode(env, random_keep(8))
    assert backbone.content_hash() == before and backbone.frozen
    assert not reward.requires_grad and not observation.requires_grad
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


@pytest.mark.parametrize("actions", [torch.ones(8, 1), torch.ones(7), np.ones((8, K))])
def test_actions_of_another_shape_are_refused(actions):
    env = make()
    with pytest.raises(ValueError, match=r"actions must be of shape \(8,\), got \("):
        env.step(actions)
    assert env.block == 0 and not env._kept_BK.any()


def test_default_reward_is_utilization():
    assert make().reward == Utilization(1.0)
