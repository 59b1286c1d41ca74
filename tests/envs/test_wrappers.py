"""Every wrapper of Gymnasium's and SB3's vector environments is tried: it works, or one line says why not."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import pytest
import stable_baselines3.common.vec_env as vec_env
import torch
from gymnasium.vector import SyncVectorEnv
from gymnasium.wrappers import vector as wrappers
from stable_baselines3 import PPO

from policyskip.envs.sb3 import LookUp, SB3VecEnv
from policyskip.errors import UserError
from policyskip.rewards import Linear
from tests.conftest import small_images
from tests.envs.test_arguments import SINGLE, VECTOR, make

K = 3
vec_env.VecVideoRecorder.recorded_frames = []  # a recorder that was refused asks for them when it is collected
SAME_STEP = (ValueError, "Expected autoreset_mode to be NEXT_STEP or DISABLED, got AutoresetMode.SAME_STEP")
NO_BOX = (TypeError, "requires a Box action space")
WORKS = None
GYMNASIUM: dict[str, tuple[dict[str, Any], Any]] = {
    "RecordEpisodeStatistics": ({}, WORKS),
    "NormalizeReward": ({}, WORKS),
    "ClipReward": ({"min_reward": 0.0, "max_reward": 0.5}, WORKS),
    "TransformReward": ({"func": lambda reward: 2 * reward}, WORKS),
    "VectorizeTransformReward": (
        {"wrapper": gymnasium.wrappers.TransformReward, "func": lambda reward: 2 * reward},
        WORKS,
    ),
    "TransformAction": ({"func": lambda action: 1 - action}, WORKS),
    "VectorizeTransformAction": (
        {"wrapper": gymnasium.wrappers.TransformAction, "func": lambda action: 1 - action, "action_space": None},
        WORKS,
    ),
    "ClipAction": ({}, NO_BOX),
    "RescaleAction": ({"min_action": 0.0, "max_action": 1.0}, NO_BOX),
    "TransformObservation": ({"func": lambda observation: observation}, SAME_STEP),
    "VectorizeTransformObservation": (
        {
            "wrapper": gymnasium.wrappers.TransformObservation,
            "func": lambda observation: observation,
            "observation_space": None,
        },
        SAME_STEP,
    ),
    "FilterObservation": ({"filter_keys": ["a"]}, SAME_STEP),
    "FlattenObservation": ({}, SAME_STEP),
    "GrayscaleObservation": ({}, SAME_STEP),
    "ResizeObservation": ({"shape": (8, 8)}, SAME_STEP),
    "ReshapeObservation": ({"shape": (3, 144)}, SAME_STEP),
    "RescaleObservation": ({"min_obs": 0.0, "max_obs": 1.0}, SAME_STEP),
    "DtypeObservation": ({"dtype": np.float32}, SAME_STEP),
    "NormalizeObservation": ({}, SAME_STEP),
    "DictInfoToList": ({}, (AssertionError, None)),  # its infos must be arrays, and ours are tensors on the device
    "RecordVideo": ({"video_folder": "."}, (ValueError, "Render mode is None")),
    "HumanRendering": ({}, (ValueError, "Expected env.render_mode to be one of")),
}
CONVERSIONS = {"ArrayConversion", "JaxToNumpy", "JaxToTorch", "NumpyToTorch"}
"""They need packages that are not installed with Gymnasium, and convert what is a tensor already."""


def tried(
    wrap: Callable[[], Any], play: Callable[[Any], None], refusal: tuple[type[Exception], str | None] | None
) -> None:
    """Wrap and play; or be refused."""
    if refusal is None:
        play(wrap())
        return
    with pytest.raises(refusal[0], match=refusal[1]) as error:
        play(wrap())
    assert "\n" not in str(error.value) or not isinstance(error.value, UserError)


def episodes(env: Any, steps: int = 2 * K) -> None:
    env.action_space.seed(0)
    env.reset(seed=0)
    for _ in range(steps):
        env.step(env.action_space.sample())


@pytest.mark.parametrize("name", wrappers.__all__)
@pytest.mark.parametrize("kind", VECTOR)
def test_every_wrapper_of_gymnasium(kind, name):
    if name in CONVERSIONS:
        return
    arguments, refusal = GYMNASIUM[name]  # a new wrapper has no line there
    if name == "DictInfoToList" and kind is VECTOR[1]:
        episodes(wrappers.DictInfoToList(make(kind)), K - 1)  # it has no infos before the last block
    tried(partial(getattr(wrappers, name), make(kind), **arguments), episodes, refusal)


OTHER_OBSERVATIONS = {"FilterObservation", "GrayscaleObservation", "ResizeObservation"}
"""They are for dictionaries, and for images whose channels come last."""
VIEWS = {"ReshapeObservation": SINGLE[0], "RescaleObservation": SINGLE[2]}
"""The view that has observations of the shape and the bounds that a wrapper needs; for the others, it is any."""


@pytest.mark.filterwarnings("ignore:.*precision lowered")
@pytest.mark.parametrize("name", [name for name, (_, no) in GYMNASIUM.items() if no in (SAME_STEP, WORKS)])
def test_over_single_views_side_by_side_the_wrappers_of_observations_work(name):
    """Gymnasium's own vector environment, with another autoreset, makes them one."""
    if name in OTHER_OBSERVATIONS:
        return
    env = SyncVectorEnv([partial(make, VIEWS.get(name, SINGLE[1]))] * 2)
    episodes(getattr(wrappers, name)(env, **GYMNASIUM[name][0]))


@pytest.mark.parametrize(("kind", "lengths"), list(zip(VECTOR, ({1}, {K}, {1, 2, 3}), strict=True)))
def test_lengths_and_returns_of_episodes_are_right(kind, lengths):
    plain = make(kind, reward=Linear())
    env = wrappers.RecordEpisodeStatistics(make(kind, reward=Linear()), buffer_length=1000)
    generator = torch.Generator().manual_seed(0)
    plain.reset(seed=0)
    env.reset(seed=0)
    paid, seen = np.zeros(4), set()
    for _ in range(4 * K):
        actions = torch.randint(0, 2, env.action_space.shape, generator=generator)
        _, reward, *_ = plain.step(actions)
        *_, terminated, _, info = env.step(actions)
        paid += reward.numpy()
        if not terminated.any():
            assert "episode" not in info
            continue
        over = info["_episode"]
        assert np.array_equal(over, terminated)
        np.testing.assert_allclose(info["episode"]["r"][over], paid[over], rtol=1e-6)
        seen |= set(info["episode"]["l"][over].tolist())
        paid[over] = 0
    assert seen == lengths and set(env.length_queue) == lengths


@pytest.mark.parametrize("kind", VECTOR)
def test_normalized_rewards_are_rewards_over_their_deviation(kind):
    plain, env = make(kind, reward=Linear()), wrappers.NormalizeReward(make(kind, reward=Linear()), gamma=1.0)
    plain.reset(seed=0)
    env.reset(seed=0)
    returns = []
    for _ in range(2 * K):
        actions = np.ones(env.action_space.shape)
        (_, reward, over, *_), (_, scaled, *_) = plain.step(actions), env.step(actions)
        returns.append(reward.numpy())
        expected = reward / np.sqrt(env.return_rms.var + 1e-8)
        torch.testing.assert_close(scaled, expected.to(scaled.dtype), check_dtype=False)
    assert (scaled != 0).any() or kind is VECTOR[1]
    assert over.any() and np.concatenate(returns).any()


def test_what_a_step_gives_is_for_torch_and_numpy():
    env = make(VECTOR[2])
    env.reset(seed=0)
    _, reward, terminated, truncated, _ = env.step(np.array([1, 0, 1, 0]))
    assert terminated.tolist() == [True, False, True, False] and type(terminated | truncated) is torch.Tensor
    for array in (np.logical_or(terminated, truncated), 1 - terminated, np.where(terminated, reward, 0.0)):
        assert isinstance(np.asarray(array), np.ndarray) and len(array) == 4
    assert np.sum(terminated) == 2 and (1 - terminated).tolist() == [0, 1, 0, 1]
    assert type(torch.cat([reward, reward])) is torch.Tensor and (2 - reward).tolist() == (2 - reward.numpy()).tolist()
    total = np.zeros(4)
    total += reward
    assert np.array_equal(total, reward.numpy())
    torch.save({"reward": reward}, file := io.BytesIO())
    file.seek(0)
    copies = (copy.deepcopy(reward), pickle.loads(pickle.dumps(reward)), torch.load(file, weights_only=True)["reward"])
    assert all(type(copied) is torch.Tensor and torch.equal(copied, reward) for copied in copies)


@pytest.mark.parametrize("kind", SINGLE)
def test_four_unseeded_copies_show_different_images(kind):
    env = SyncVectorEnv([partial(make, kind, images=small_images(1000))] * 4)
    shown = env.reset()[0]
    assert len({image.tobytes() for image in shown}) > 2  # two of a thousand may be the same by chance
    seeded = SyncVectorEnv([partial(make, kind, images=small_images(1000), seed=3)] * 4).reset()[0]
    assert len({image.tobytes() for image in seeded}) == 1
    again = SyncVectorEnv([partial(make, kind, images=small_images(1000))] * 4)
    assert np.array_equal(*(again.reset(seed=5)[0] for _ in range(2)))


NO_IMAGE = (AssertionError, "image|Dict obs|rgb_array")
SB3: dict[str, tuple[dict[str, Any], Any, Any]] = {  # arguments, and what comes of image numbers and of features
    "VecCheckNan": ({"raise_exception": True}, WORKS, WORKS),
    "VecMonitor": ({"info_keywords": ("is_success", "macs")}, WORKS, WORKS),
    "VecNormalize": ({}, (UserError, "say norm_obs=False to VecNormalize"), WORKS),
    "VecFrameStack": ({"n_stack": 2}, (UserError, "cannot be stacked: leave VecFrameStack out"), WORKS),
    "VecTransposeImage": ({}, NO_IMAGE, NO_IMAGE),
    "VecExtractDictObs": ({"key": "a"}, NO_IMAGE, NO_IMAGE),
    "VecVideoRecorder": ({"video_folder": ".", "record_video_trigger": bool}, NO_IMAGE, NO_IMAGE),
}


def learn(features: bool, env: Any) -> None:
    arguments = {} if features else {"policy_kwargs": {"features_extractor_class": LookUp}}
    PPO("MlpPolicy", env, n_steps=K, batch_size=4 * K, n_epochs=1, device="cpu", **arguments).learn(4 * K)


def test_no_wrapper_of_sb3_is_forgotten():
    found = {
        name
        for name, kind in inspect.getmembers(vec_env, inspect.isclass)
        if issubclass(kind, vec_env.VecEnvWrapper) and kind is not vec_env.VecEnvWrapper
    }
    assert found == set(SB3)


@pytest.mark.parametrize("name", SB3)
@pytest.mark.parametrize("kind", VECTOR)
def test_every_wrapper_of_sb3(kind, name):
    arguments, with_images, with_features = SB3[name]
    images = kind is VECTOR[0]
    wrap = partial(getattr(vec_env, name), SB3VecEnv(make(kind)), **arguments)
    tried(wrap, partial(learn, not images), with_images if images else with_features)
    if images and name == "VecNormalize":
        learn(False, vec_env.VecNormalize(SB3VecEnv(make(kind)), norm_obs=False))
