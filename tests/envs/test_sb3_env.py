"""The adapter for Stable-Baselines3: its checker, the vector environment step by step, images found by their numbers."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, MultiBinary
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.torch_layers import FlattenExtractor, NatureCNN
from torch import Tensor

from policyskip.backbones import ResNetExits
from policyskip.data import Batch, TensorImages, crop_and_flip
from policyskip.envs.base import ImageVectorEnv
from policyskip.envs.block_selection import BlockSelectionEnv, BlockSelectionVectorEnv
from policyskip.envs.early_exit import EarlyExitEnv, EarlyExitVectorEnv
from policyskip.envs.layer_skip import LayerSkipEnv, LayerSkipVectorEnv
from policyskip.envs.sb3 import EXACT, ImageNumbers, LookUp, RecentImages, SB3VecEnv, SmallConv
from policyskip.errors import UserError
from policyskip.rewards import Linear
from tests.conftest import BlackAndWhite, small_backbone, small_images

B, K = 8, 6


def network(kind: str, size: int = 12) -> dict:
    if kind == "early_exit":
        with torch.random.fork_rng(devices=[]):  # the same heads every time
            torch.manual_seed(0)
            return {"network": ResNetExits(small_backbone(), [1, 3], image_shape=(3, size, size))}
    return {"backbone": small_backbone()}


VECTOR = {
    "block_selection": BlockSelectionVectorEnv,
    "layer_skip": LayerSkipVectorEnv,
    "early_exit": EarlyExitVectorEnv,
}
SINGLE = {"block_selection": BlockSelectionEnv, "layer_skip": LayerSkipEnv, "early_exit": EarlyExitEnv}


def make(kind: str, **kwargs) -> ImageVectorEnv | EarlyExitVectorEnv:
    return VECTOR[kind](B, **{"images": small_images(), "reward": Linear(), **network(kind), **kwargs})


def augmented(count: int = 40) -> TensorImages:
    images = small_images(count)
    images.augment = crop_and_flip
    return images


def actions_for(env: ImageVectorEnv | EarlyExitVectorEnv, steps: int) -> list[np.ndarray]:
    env.action_space.seed(0)
    return [env.action_space.sample() for _ in range(steps)]


@pytest.mark.parametrize("kind", SINGLE)
def test_sb3_checks_the_single_environment(kind):
    """36×36 images: SB3 warns of smaller ones, and warnings are errors here."""
    check_env(SINGLE[kind](images=small_images(size=36), **network(kind, 36)))


@pytest.mark.parametrize(
    ("kind", "arguments"), [*((kind, {}) for kind in VECTOR), ("early_exit", {"cached": True})], ids=str
)
def test_the_adapter_gives_what_the_vector_environment_gives(kind, arguments):
    plain, adapter = make(kind, **arguments), SB3VecEnv(make(kind, **arguments))
    assert adapter.num_envs == B and adapter.action_space == plain.single_action_space
    adapter.seed(3)
    shown, observation = adapter.reset(), plain.reset(seed=3)[0]
    ended = 0
    for action in actions_for(plain, 20):  # more than one pass over the 40 images
        assert isinstance(shown, np.ndarray) and adapter.observation_space.contains(shown[0])
        seen = adapter.observation_space.find(torch.from_numpy(shown)) if kind == "block_selection" else shown
        assert np.array_equal(seen, observation)
        observation, reward, terminated, _, info = plain.step(action)
        before, (shown, rewards, over, infos) = shown, adapter.step(action)
        assert rewards.dtype == np.float32 and np.array_equal(rewards, reward)
        assert over.dtype == np.bool_ and np.array_equal(over, terminated)
        assert len(infos) == B and len({id(one) for one in infos}) == B
        for b, one in enumerate(infos):
            if not over[b]:
                assert one == {}
                continue
            ended += 1
            assert np.array_equal(one["terminal_observation"], before[b])
            assert one["TimeLimit.truncated"] is False
            assert one["is_success"] == bool(info["final_info"]["correct"][b])
            assert one["macs"] == info["final_info"]["macs"][b].item()
    assert ended >= 3 * B


def test_only_where_an_image_left_there_is_a_terminal_observation():
    adapter = SB3VecEnv(make("early_exit"))
    first = adapter.reset()
    second, rewards, over, infos = adapter.step(np.array([1, 0, 0, 0, 0, 1, 0, 0]))
    assert over.tolist() == [True, False, False, False, False, True, False, False]
    assert [sorted(info) for info in infos] == [
        ["TimeLimit.truncated", "is_success", "macs", "terminal_observation"] if one else [] for one in over
    ]
    assert (rewards[~over] == 0).all() and (rewards[over] != 0).all()
    assert np.array_equal(infos[5]["terminal_observation"], first[5])
    assert not np.array_equal(infos[5]["terminal_observation"], second[5])


def test_an_episode_cut_short_says_so():
    """None of the three does this; whoever adds a limit in a subclass gets what SB3 bootstraps from."""

    class Limited(EarlyExitVectorEnv):
        def step(self, actions):
            observation, reward, over, _, info = super().step(actions)
            truncated = over & (torch.arange(len(over)) == 1)
            return observation, reward, over & ~truncated, truncated, info

    adapter = SB3VecEnv(Limited(B, images=small_images(), **network("early_exit")))
    adapter.reset()
    _, _, over, infos = adapter.step(np.array([1, 1, 0, 0, 0, 0, 0, 0]))
    assert over.tolist() == [True, True] + [False] * 6
    assert [info.get("TimeLimit.truncated") for info in infos] == [False, True] + [None] * 6


def test_seeding():
    adapter = SB3VecEnv(make("block_selection"))

    def rollout(seed: int | None) -> np.ndarray:
        if seed is not None:
            assert adapter.seed(seed)[0] == seed
        seen = [adapter.reset()]
        seen += [adapter.step(np.ones((B, K)))[0] for _ in range(3)]
        return np.concatenate(seen)

    first = rollout(3)
    assert np.array_equal(first, rollout(3)) and not np.array_equal(first, rollout(4))
    assert np.array_equal(rollout(3), first) and not np.array_equal(rollout(None), first)  # a seed is used once


def test_attributes_and_methods_are_those_of_the_environment():
    adapter = SB3VecEnv(make("layer_skip"))
    assert adapter.get_attr("num_blocks") == [K] * B and adapter.get_attr("num_blocks", [0, 3]) == [K] * 2
    assert adapter.has_attr("num_blocks") and not adapter.has_attr("nothing")
    adapter.set_attr("reward", None)
    assert adapter.env.reward is None
    adapter.reset()
    assert torch.equal(adapter.env_method("advance", indices=0)[0], adapter.env.observation)
    assert adapter.env_is_wrapped(object) == [False] * B
    adapter.close()


def test_a_set_on_the_device_is_not_copied():
    images = small_images()
    adapter = SB3VecEnv(make("block_selection", images=images))
    assert adapter.observation_space.image_index.images is images.images
    shown = adapter.reset()
    assert shown.shape == (B, 1) and shown.dtype == np.int64
    assert np.array_equal(shown[:, 0], adapter.env.feed.batch.index_B)


def test_augmented_images_are_found_as_they_were_shown():
    adapter = SB3VecEnv(make("block_selection", images=augmented()), remember=4 * B)
    adapter.seed(0)
    numbers, seen = [adapter.reset()], [adapter.env.observation]
    for _ in range(3):
        numbers.append(adapter.step(np.ones((B, K)))[0])
        seen.append(adapter.env.observation)
    found = adapter.observation_space.find(torch.from_numpy(np.concatenate(numbers)).float())  # SB3 hands over floats
    assert torch.equal(found, torch.cat(seen))
    index = [int(i) for i in adapter.env.feed.batch.index_B]
    assert not torch.equal(seen[-1], small_images().images[index])  # or the test could not tell


def test_a_forgotten_image_is_refused_and_not_mistaken_for_another():
    adapter = SB3VecEnv(make("block_selection", images=augmented()), remember=2 * B)
    first = torch.from_numpy(adapter.reset())
    adapter.step(np.ones((B, K)))
    adapter.observation_space.find(first)
    adapter.step(np.ones((B, K)))
    with pytest.raises(UserError, match="shown 24 images ago is looked up, and 16 are remembered"):
        adapter.observation_space.find(first)


def test_numbers_start_anew_where_float32_ends():
    def batch(value: int) -> Batch:
        return Batch(torch.full((3, 3, 2, 2), value, dtype=torch.uint8), torch.zeros(3), torch.zeros(3))

    shown = RecentImages(batch(0), remember=6)
    assert shown.capacity == 8
    shown.count = EXACT - 4
    numbers = [shown.number(batch(value)) for value in (1, 2)]
    assert torch.cat(numbers).tolist() == [EXACT - 4, EXACT - 3, EXACT - 2, EXACT - 1, 0, 1]
    assert all(number.float().long().tolist() == number.tolist() for number in numbers)
    assert shown.find(torch.cat(numbers))[:, 0, 0, 0].tolist() == [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SB3VecEnv(make("block_selection", order="sequential")), "say order=shuffled"),
        (lambda: SB3VecEnv(make("early_exit", order="sequential")), "say order=shuffled"),
        (lambda: SB3VecEnv(make("block_selection", images=augmented())), "remember=… must say how many"),
        (lambda: SB3VecEnv(make("block_selection", images=augmented()), remember=0), "got 0"),
        (lambda: PPO("MlpPolicy", SB3VecEnv(make("block_selection")), device="cpu"), "image numbers are no features"),
        (lambda: LookUp(SB3VecEnv(make("layer_skip")).observation_space), "features already: leave it out"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(build, message):
    with pytest.raises(UserError, match=message) as refused:
        build()
    assert "\n" not in str(refused.value)


def test_augmented_images_need_no_memory_where_features_are_observed():
    adapter = SB3VecEnv(make("layer_skip", images=augmented()))
    assert adapter.reset().shape == adapter.env.observation.shape


@pytest.mark.parametrize(("extractor", "size"), [(SmallConv, 12), (NatureCNN, 36), (FlattenExtractor, 12)])
def test_looked_up_features_are_those_of_the_images(extractor, size):
    adapter = SB3VecEnv(make("block_selection", images=small_images(size=size)))
    lookup = LookUp(adapter.observation_space, extractor)
    shown = adapter.reset()
    with torch.no_grad():
        expected = lookup.extractor(adapter.env.observation / 255)
        assert torch.equal(lookup(torch.from_numpy(shown).float()), expected)
    assert expected.shape == (B, lookup.features_dim)


LOOK_UP = {"features_extractor_class": LookUp}


@pytest.mark.parametrize("images", [small_images, augmented])
@pytest.mark.parametrize("learner", [PPO, A2C])
def test_images_teach_a_policy(learner, images):
    adapter = SB3VecEnv(make("block_selection", images=images()), remember=9 * B)
    model = learner("MlpPolicy", adapter, n_steps=8, policy_kwargs=LOOK_UP, seed=0, device="cpu")
    before = [p.clone() for p in model.policy.features_extractor.parameters()]
    model.learn(8 * B)
    assert model.rollout_buffer.observations.nbytes == 8 * B * 8
    after = list(model.policy.features_extractor.parameters())
    assert len(after) == 6 and not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert len(model.ep_success_buffer) == 8 * B
    action, _ = model.predict(adapter.reset(), deterministic=True)
    assert action.shape == (B, K)


@pytest.mark.parametrize("kind", ["layer_skip", "early_exit"])
@pytest.mark.parametrize("learner", [PPO, DQN])
def test_features_teach_a_policy(learner, kind):
    adapter = SB3VecEnv(make(kind))
    arguments = {"n_steps": 8} if learner is PPO else {"learning_starts": B, "buffer_size": 40 * B}
    model = learner("MlpPolicy", adapter, seed=0, device="cpu", **arguments)
    before = [p.clone() for p in model.policy.parameters()]
    model.learn(8 * B)
    assert not all(torch.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))


def test_ppo_solves_a_problem_that_only_the_images_give_away():
    """White images should run every block, black ones none: 1 for what is right, 0.5 by chance."""

    def reward(outcome) -> Tensor:
        return (outcome.keep_BK == outcome.label_B.bool().unsqueeze(1)).float().mean(1)

    env = BlockSelectionVectorEnv(64, backbone=small_backbone(8), images=BlackAndWhite(), reward=reward)
    adapter = SB3VecEnv(env)
    model = PPO(
        "MlpPolicy", adapter, 3e-3, n_steps=4, batch_size=64, policy_kwargs=LOOK_UP, gamma=0.0, seed=0, device="cpu"
    )
    model.learn(64 * 4 * 10)
    _, rewards, *_ = adapter.step(model.predict(adapter.reset(), deterministic=True)[0])
    assert rewards.mean() > 0.95


def test_a_saved_model_holds_no_images_and_is_loaded_with_those_of_an_environment(tmp_path):
    adapter = SB3VecEnv(make("block_selection"))
    model = PPO("MlpPolicy", adapter, n_steps=8, policy_kwargs=LOOK_UP, seed=0, device="cpu")
    space = pickle.loads(pickle.dumps(adapter.observation_space))
    assert isinstance(space, ImageNumbers) and space.image_index is None and space == adapter.observation_space
    with pytest.raises(UserError, match="the images of a saved observation space are not saved with it"):
        space.find(torch.zeros(1, 1))
    assert len(pickle.dumps(adapter.observation_space)) < 20_000 < small_images(100, size=64).images.nbytes
    shown = adapter.reset()
    expected = model.predict(shown, deterministic=True)[0]
    model.save(tmp_path / "model.zip")
    loaded = PPO.load(
        tmp_path / "model.zip", device="cpu", custom_objects={"observation_space": adapter.observation_space}
    )
    assert np.array_equal(loaded.predict(shown, deterministic=True)[0], expected)
    fresh = PPO("MlpPolicy", adapter, n_steps=8, policy_kwargs=LOOK_UP, seed=1, device="cpu")
    fresh.set_parameters(tmp_path / "model.zip")  # which unpickles nothing
    assert np.array_equal(fresh.predict(shown, deterministic=True)[0], expected)


def test_the_space_of_numbers():
    adapter = SB3VecEnv(make("block_selection"))
    assert isinstance(adapter.observation_space, Box) and adapter.action_space == MultiBinary(K)
    assert adapter.observation_space.image_space.shape == (3, 12, 12)
