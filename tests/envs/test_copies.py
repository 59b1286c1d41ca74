"""Copies of environments go on as the original does, and torch's defaults of the user's program change nothing."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from policyskip.data import Feed, crop_and_flip
from policyskip.data.folders import FileImages
from policyskip.deployment.predictors import ExitPredictor, Predictor
from policyskip.envs.block_selection import BlockSelectionVectorEnv
from policyskip.envs.layer_skip import LayerSkipVectorEnv
from policyskip.envs.sb3 import SB3VecEnv
from policyskip.policies.networks import ConstantPolicy
from policyskip.policies.thresholds import ThresholdPolicy
from tests.conftest import small_backbone, small_images
from tests.envs.test_arguments import SINGLE, VECTOR, make, network

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda env: pickle.loads(pickle.dumps(env)),
    "cloudpickle": lambda env: cloudpickle.loads(cloudpickle.dumps(env)),
}
WAYS: list[dict[str, Any]] = [{}, {"order": "sequential", "num_envs": 16}]


def augmented() -> Any:
    images = small_images()
    images.augment = crop_and_flip
    return images


def numbers(values: Any) -> Iterator[np.ndarray]:
    """Every array and number in what a step gives."""
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, list | tuple):
        for value in values:
            yield from numbers(value)
    else:
        yield np.asarray(values)


def steps(env: Any, count: int, seed: int) -> list[np.ndarray]:
    """What random actions give, in every number."""
    generator = np.random.default_rng(seed)
    shape, seen = env.action_space.shape, []
    for _ in range(count):
        actions = generator.integers(0, 2, (len(env.observation), *shape[1:])) if shape else generator.integers(0, 2)
        result = env.step(actions)
        seen += list(numbers(result))
        if not hasattr(env, "num_envs") and result[2]:
            seen += list(numbers(env.reset()))
    return seen


def equal(seen: list[np.ndarray], others: list[np.ndarray]) -> bool:
    return len(seen) == len(others) and all(map(np.array_equal, seen, others))


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("kind", VECTOR)
@pytest.mark.parametrize("changes", [*WAYS, {"images": augmented()}], ids=["shuffled", "sequential", "augmented"])
def test_a_copy_of_an_environment_goes_on_as_the_original_does(kind, changes, way):
    env = make(kind, **changes)
    env.reset(seed=3)
    steps(env, 2, 0)
    other = COPIES[way](env)
    assert equal(steps(env, 5, 1), steps(other, 5, 1)) and env.cursor == other.cursor
    assert not equal(steps(other, 5, 1), []) and other.feed is not env.feed
    assert np.array_equal(env.reset(seed=5)[0], other.reset(seed=5)[0])


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("kind", SINGLE)
def test_a_copy_of_a_single_view_goes_on_as_the_original_does(kind, way):
    env = make(kind)
    env.reset()
    env.step(env.action_space.sample())
    other = COPIES[way](env)
    assert equal([env.reset()[0]], [other.reset()[0]])
    action = env.action_space.sample()
    assert equal(list(numbers(env.step(action))), list(numbers(other.step(action))))


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize(("images", "remember"), [(small_images(), None), (augmented(), 16)])
def test_a_copy_of_the_adapter_finds_its_images(way, images, remember):
    adapter = SB3VecEnv(make(BlockSelectionVectorEnv, images=images), remember)
    adapter.reset()
    other = COPIES[way](adapter)
    for _ in range(2):
        shown = [env.step(np.ones((4, 3)))[0] for env in (adapter, other)]
        assert np.array_equal(*shown)
        for env in (adapter, other):
            assert torch.equal(env.observation_space.find(torch.from_numpy(shown[0])), env.env.observation)


def test_a_feed_s_state_is_its_cursor():
    feed = Feed(augmented(), 8, seed=2)
    for _ in range(7):
        feed.advance()
    other = pickle.loads(pickle.dumps(feed))
    assert other.cursor == 7 and torch.equal(other.batch.images, feed.batch.images)
    for _ in range(5):
        assert torch.equal(feed.advance().images, other.advance().images)


def test_a_feed_that_reads_files_is_copied(tmp_path):
    for number in range(8):
        Image.new("RGB", (12, 12), (30 * number, 0, 0)).save(tmp_path / f"{number}.png")
    files = sorted(tmp_path.iterdir())
    feed = Feed(FileImages(files, torch.arange(8) % 2, 12, torch.device("cpu"), augment=True, workers=1), 3, seed=1)
    feed.advance()
    other = pickle.loads(pickle.dumps(feed))
    for _ in range(3):
        assert torch.equal(feed.advance().images, other.advance().images)


@contextmanager
def defaults(name: str) -> Iterator[None]:
    """Torch's defaults, as the program of a user may set them."""
    if name == "float64":
        torch.set_default_dtype(torch.float64)
    if name == "meta":
        torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def results(kind: Any) -> list[np.ndarray]:
    env = make(kind)
    seen = list(numbers(env.reset(seed=1)))
    if kind in VECTOR:
        whole = (4, 3) if kind is not VECTOR[2] else (4,)
        outcome = env.score(np.ones(whole))
        seen += [*numbers((outcome.logits_BC, outcome.macs_B, env.rewards(outcome), env.advance()))]
        env.seek(3)
        seen += list(numbers(env.observation))
        return [*seen, *steps(env, 4, 0)]
    return [*seen, *numbers(env.step(np.ones(env.action_space.shape)))]


@pytest.mark.parametrize("name", ["float64", "meta"])
@pytest.mark.parametrize("kind", [*VECTOR, *SINGLE])
def test_defaults_of_torch_change_no_environment(kind, name):
    network(kind)  # made with the usual defaults
    expected = results(kind)
    images = small_images()
    with defaults(name), pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.envs.test_arguments.small_images", lambda: images)
        found = results(kind)
        assert torch.get_default_dtype() == (torch.float64 if name == "float64" else torch.float32)
        assert torch.get_default_device().type == ("meta" if name == "meta" else "cpu")
    assert [(array.dtype, array.shape) for array in found] == [(array.dtype, array.shape) for array in expected]
    assert equal(found, expected)


@pytest.mark.parametrize("name", ["float64", "meta"])
def test_defaults_of_torch_change_no_prediction_and_no_adapter(name):
    backbone, exits, images = small_backbone(8), network(VECTOR[2])["network"], small_images()
    shape = (3, 12, 12)
    adapter = SB3VecEnv(LayerSkipVectorEnv(4, backbone=backbone, images=images))
    predictors: list[Any] = [
        Predictor(ConstantPolicy(3), backbone, list("abcde"), shape, 0.0),
        ExitPredictor(ThresholdPolicy("confidence", torch.tensor([0.3, 0.3])), exits, list("abcde"), shape),
    ]
    expected = [vars(predictor.predict(images.images)) for predictor in predictors]
    adapter.seed(1)
    observation = adapter.reset()
    with defaults(name):
        found = [vars(predictor.predict(images.images)) for predictor in predictors]
        adapter.seed(1)
        assert np.array_equal(adapter.reset(), observation)
        assert adapter.step(np.ones(4))[1].dtype == np.float32
    assert equal(list(numbers(found)), list(numbers(expected)))
    assert all(a.dtype == b.dtype for a, b in zip(numbers(found), numbers(expected), strict=True))


def test_a_reward_in_float64_is_taken_as_float32(backbone: nn.Module):
    def reward(outcome: Any) -> Tensor:
        return outcome.macs_B / outcome.full_macs

    assert make(BlockSelectionVectorEnv, reward=reward).step(np.ones((4, 3)))[1].dtype == torch.float32
