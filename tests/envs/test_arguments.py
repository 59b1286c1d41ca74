"""What environments are given: arguments, actions, seeds. What cannot be meant is refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from policyskip.backbones import ResNetExits
from policyskip.data import TensorImages
from policyskip.envs.block_selection import BlockSelectionEnv, BlockSelectionVectorEnv
from policyskip.envs.early_exit import EarlyExitEnv, EarlyExitVectorEnv
from policyskip.envs.layer_skip import LayerSkipEnv, LayerSkipVectorEnv
from policyskip.envs.sb3 import SB3VecEnv
from policyskip.errors import UserError
from tests.conftest import small_backbone, small_images

B = 4
VECTOR = (BlockSelectionVectorEnv, LayerSkipVectorEnv, EarlyExitVectorEnv)
SINGLE = (BlockSelectionEnv, LayerSkipEnv, EarlyExitEnv)


@cache
def network(kind: type) -> dict[str, nn.Module]:
    """A network for the environment; its weights are always the same."""
    backbone = small_backbone(8)
    if "EarlyExit" not in kind.__name__:
        return {"backbone": backbone}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {"network": ResNetExits(backbone, [0, 1], image_shape=(3, 12, 12))}


def make(kind: Any, **changes: Any) -> Any:
    sizes = {"num_envs": B} if kind in VECTOR else {}
    return kind(**{**sizes, **network(kind), "images": small_images(), **changes})


def refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def changed(**attributes: Any) -> TensorImages:
    """Images whose tensors were replaced after they were checked."""
    images = small_images()
    vars(images).update(attributes)
    return images


class NoReward(nn.Module):
    """What can be called, and returns None."""


ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    *(
        ({"num_envs": number}, "num_envs must be a whole number, from 1 to 1048576, got")
        for number in (2.5, True, "3", None, [3], 10**9, 0, -1, float("nan"), torch.tensor([2, 2]))
    ),
    *(({"seed": seed}, "seed must be a whole number, 0 or more, got") for seed in ("x", None, 2.5, True, -1)),
    *(({"reward": reward}, "reward must be a function .* got") for reward in (3, "macs", torch.ones(B), {})),
    *(({"device": device}, "device must be auto, cpu, cuda or cuda:N, got") for device in ("gpu", 5, "meta", {})),
    *(({"execution": way}, "execution must be one of auto, kernel, gather, dense, got") for way in ("fast", None, [1])),
    *(({"precision": odd}, "precision must be one of float32, float32_exact, .*, got") for odd in ("int8", 16)),
    *(
        ({"order": order}, "order must be one of shuffled, sequential, got")
        for order in ("random", None, [1], torch.zeros(3, 3), np.zeros(3))
    ),
    *(
        ({"images": images}, r"images must be a policyskip\.data\.Images .* got")
        for images in ("x", 3, [], {}, np.zeros((4, 3, 12, 12), np.uint8), torch.zeros(4, 3, 12, 12).to("meta"))
    ),
    (
        {"images": changed(images=small_images().images[:, :1])},
        r"images must be uint8 of shape \(N, 3, H, W\), got uint8 of shape \(N, 1, 12, 12\)",
    ),
    ({"images": changed(images=small_images().images.float())}, r"images must be uint8 .* got float32"),
    ({"images": changed(label_N=small_images().label_N + 9)}, "the images have more"),
    ({"images": changed(label_N=small_images().label_N - 9)}, "labels must be from 0 to 4, got -9"),
    ({"images": changed(label_N=small_images().label_N[:0])}, "at least one image, got none"),
    ({"foo": 3}, r"VectorEnv: got an unexpected keyword argument 'foo'; it takes num_envs, (backbone|network), images"),
]


@pytest.mark.parametrize("kind", VECTOR)
@pytest.mark.parametrize(("changes", "message"), ARGUMENTS, ids=lambda value: str(value)[:40])
def test_arguments_that_cannot_be_meant_are_refused(kind, changes, message):
    refused(lambda: make(kind, **changes), message)


@pytest.mark.parametrize("kind", VECTOR)
@pytest.mark.parametrize("given", [3, None, nn.Linear(2, 2), nn.Identity, [], NoReward()], ids=str)
def test_only_a_network_of_the_package_is_a_network(kind, given):
    key, right = next(iter(network(kind).items()))
    name = "ExitNetwork" if key == "network" else "Backbone"
    refused(
        lambda: make(kind, **{key: given}), rf"{key} must be a policyskip\.backbones\.{name}, or the name of .* got"
    )
    other = network(EarlyExitVectorEnv if key == "backbone" else BlockSelectionVectorEnv)
    refused(lambda: make(kind, **{key: next(iter(other.values()))}), r"\(\w+-v0 .*takes? a network ")
    assert make(kind, **{key: right}).num_envs == B


@pytest.mark.parametrize("kind", VECTOR[:2])
def test_a_network_that_was_made_where_float64_is_usual_is_named_so(kind):
    torch.set_default_dtype(torch.float64)
    try:
        made = small_backbone(8)
    finally:
        torch.set_default_dtype(torch.float32)
    refused(lambda: make(kind, backbone=made), r"has weights of float64: give network\.float\(\)")
    assert make(kind, backbone=made.float()).num_envs == B


@pytest.mark.parametrize("kind", VECTOR)
@pytest.mark.parametrize("three", [np.int64(3), torch.tensor(3)], ids=["numpy", "torch"])
def test_whole_numbers_of_other_libraries_are_numbers(kind, three):
    env = make(kind, num_envs=three, seed=np.uint8(2))
    assert type(env.num_envs) is int and len(env.reset(seed=np.int64(5))[0]) == 3 == env.action_space.shape[0]


@pytest.mark.parametrize("kind", VECTOR)
def test_seek_takes_any_position_of_the_order_and_nothing_else(kind):
    env = make(kind, order="sequential")
    for cursor in (2.5, "1", None, True, -1, torch.ones(2)):
        refused(lambda cursor=cursor: env.seek(cursor), "cursor must be a whole number, 0 or more, got")
    first = env.observation
    while len(env.observation):
        env.advance()
    behind = env.cursor
    env.seek(0)
    assert torch.equal(env.observation, first)
    env.seek(behind)
    assert len(env.observation) == 0 and env.cursor == behind


@pytest.mark.parametrize("name", ["BlockSelection", "LayerSkip", "EarlyExit"])
def test_an_unknown_keyword_is_named_by_gymnasium_s_ways_too(name):
    """Gymnasium adds the whole network, in many lines, to a TypeError."""
    given = {**network(EarlyExitEnv if name == "EarlyExit" else LayerSkipEnv), "images": small_images()}
    refused(lambda: gymnasium.make(f"policyskip/{name}-v0", **given, foo=3), "'foo'; it takes")
    refused(lambda: gymnasium.make_vec(f"policyskip/{name}-v0", num_envs=2, **given, foo=3), "'foo'; it takes")
    refused(lambda: gymnasium.make(f"policyskip/{name}-v0", **given, num_envs=3), "shows one image")


def wrong_actions(right: Tensor) -> dict[str, Any]:
    """What nobody can mean by the actions ``right``, float of ones."""
    return {
        "None": None, "a dict": {}, "a text": "1", "bytes": b"1", "a set": {1}, "an object": object(),
        "ragged": [[1], [1, 0]], "texts": np.full(right.shape, "1"), "objects": right.numpy().astype(object),
        "sparse": right.to_sparse(), "meta": right.to("meta"), "complex": right.to(torch.complex64),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(2)]),
        "jagged": torch.nested.nested_tensor([torch.ones(2), torch.ones(1)], layout=torch.jagged),
        "nan": right * float("nan"), "inf": right / 0, "two": right + 1, "half": right / 2, "minus": -right,
        "fewer": right[:-1], "one dimension more": right.unsqueeze(-1), "none": right[:0], "one number": 1,
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", VECTOR)
def test_actions_that_cannot_be_meant_are_refused_and_nothing_moves(kind):
    env = make(kind)
    shown, _ = env.reset(seed=0)
    right = torch.ones(env.action_space.shape)
    for name, actions in wrong_actions(right).items():
        refused(lambda actions=actions: env.step(actions), "actions (must|cannot)")
        assert env.observation is shown, name
    for name, scored in wrong_actions(torch.ones(env.action_space.shape)).items():
        if kind is not LayerSkipVectorEnv or name not in ("fewer", "one number"):
            refused(lambda scored=scored: env.score(scored), "(keep|leave) (must|cannot)")
    for actions in (right.numpy()[::-1], np.broadcast_to(np.int8(1), right.shape), right.int().tolist(), right.bool()):
        assert len(env.step(actions)[1]) == B


@pytest.mark.parametrize("kind", SINGLE)
def test_actions_for_one_image(kind):
    env = make(kind)
    env.reset(seed=0)
    for action in (None, {}, "1", 3, np.full(env.action_space.shape, np.nan), np.ones(7)):
        refused(lambda action=action: env.step(action), "actions (must|cannot)")
    for action in (env.action_space.sample(), np.ones((1, *env.action_space.shape)), env.action_space.sample()):
        env.reset()
        env.step(action)


@pytest.mark.parametrize("kind", [*VECTOR, *SINGLE])
def test_seeds_that_cannot_be_meant_are_refused(kind):
    env = make(kind)
    for seed in ("x", -1, 2.5, True, [1, 2], float("nan")):
        refused(lambda seed=seed: env.reset(seed=seed), "seed must be a whole number, 0 or more, got")


def test_the_adapter_takes_environments_alone():
    env = make(LayerSkipVectorEnv)
    for given in (3, None, "LayerSkip-v0", make(LayerSkipEnv), gymnasium.vector.VectorWrapper(env), env.feed):
        refused(lambda given=given: SB3VecEnv(given), "SB3VecEnv takes one of policyskip's vector environments, got")
    images = small_images()
    images.augment = lambda batch, generator: batch
    augmented = make(BlockSelectionVectorEnv, images=images)
    for remember in (2.5, True, "3", float("nan"), 10**9):
        refused(lambda remember=remember: SB3VecEnv(augmented, remember=remember), "remember=… must say how many")
    adapter = SB3VecEnv(env)
    adapter.reset()
    for actions in (None, np.full(B, np.nan), np.ones((B, 2)), np.full(B, "1")):
        refused(lambda actions=actions: adapter.step(actions), "actions (must|cannot)")
