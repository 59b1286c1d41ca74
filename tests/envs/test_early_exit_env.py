"""The exit environment's contract: Gymnasium's checker, seeding, SAME_STEP, draining, and live = replayed."""

from __future__ import annotations

import math
from collections import Counter

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from torch import Tensor, nn

from policyskip.backbones import ExitNetwork, MSDNet, ResNetExits
from policyskip.backbones.exits import State
from policyskip.data import crop_and_flip
from policyskip.envs.early_exit import EarlyExitEnv, EarlyExitVectorEnv
from policyskip.envs.exit_sources import observe, split_observation
from policyskip.errors import UserError
from policyskip.exits.cache import CachedExits, cache_exits
from policyskip.rewards import Linear, Macs, Utilization
from tests.conftest import small_backbone, small_images

ID = "policyskip/EarlyExit-v0"
N, C = 3, 5


class SmallExits(ExitNetwork):
    """Three convolutions, each with a head; ``computed`` counts the images that each segment saw."""

    def __init__(self) -> None:
        super().__init__(C, N, [0.5] * 3, [0.25] * 3)
        torch.manual_seed(0)
        self.segments = nn.ModuleList(nn.Conv2d(c, 6, 3, stride=2, padding=1) for c in (3, 6, 6))
        self.heads = nn.ModuleList(nn.Linear(6, C) for _ in range(N))
        self.computed: Counter[int] = Counter()

    def begin(self, images: Tensor) -> State:
        return {0: self.normalise(images)}

    def segment(self, n: int, state: State) -> State:
        self.computed[n] += len(state[n])
        return {n + 1: self.segments[n](state[n]).relu()}

    def head(self, n: int, state: State) -> Tensor:
        return 30 * self.heads[n](state[n + 1].mean((2, 3)))


def make(num_envs: int = 8, **kwargs) -> EarlyExitVectorEnv:
    return EarlyExitVectorEnv(num_envs, **{"network": SmallExits(), "images": small_images(), **kwargs})


def single(**kwargs) -> EarlyExitEnv:
    return EarlyExitEnv(network=SmallExits(), images=small_images(), **kwargs)


def random_actions(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 2, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("cached", [False, True])
def test_gymnasium_checks_the_single_environment(cached):
    check_env(single(cached=cached), skip_render_check=True)


def test_registered_ids_make_the_environments():
    arguments = {"network": SmallExits(), "images": small_images()}
    env = gymnasium.make(ID, **arguments)
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation) and env.action_space == gymnasium.spaces.Discrete(2)
    vector = gymnasium.make_vec(ID, num_envs=8, cached=True, **arguments)
    assert isinstance(vector, EarlyExitVectorEnv) and vector.num_envs == 8
    assert vector.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert vector.single_observation_space.high.tolist() == pytest.approx([1] * C + [math.log(C)] + [1] * (2 + N))


def test_an_environment_declares_what_it_is():
    env = make()
    env.reset(seed=0)
    assert (env.family, env.key, env.id, env.steps_per_episode) == ("exit_policy", "early_exit", ID[11:], N)
    leave = torch.ones(8, dtype=torch.bool)
    for decisions in (1, 2, 2):  # at the last exit every image leaves, and there is nothing to decide
        assert env.decisions_of(env.score(leave)).tolist() == [decisions] * 8
        env.step(~leave)


def test_an_observation_is_what_the_exit_says():
    """Worked out by hand for probabilities 1/2, 1/4, 1/4 at exit 1 of 2, and for a uniform answer at exit 0."""
    logits = torch.tensor([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]]).log()
    expected = [
        [0.5, 0.25, 0.25, 1.5 * math.log(2), 0.5, 0.25, 0, 1],
        [1 / 3, 1 / 3, 1 / 3, math.log(3), 1 / 3, 0, 1, 0],
    ]
    observation = observe(logits, torch.tensor([1, 0]), 2)
    torch.testing.assert_close(observation, torch.tensor(expected))
    seen = split_observation(observation, 3)
    torch.testing.assert_close(seen.probability_BC, logits.exp())
    torch.testing.assert_close(seen.entropy_B, torch.tensor([1.5 * math.log(2), math.log(3)]))
    assert seen.top_B[0] == 0.5 and seen.margin_B[0] == 0.25 and seen.exit_B.tolist() == [1, 0]


@pytest.mark.parametrize("cached", [False, True])
def test_spaces_and_types_of_a_vector_step(cached):
    env = make(cached=cached)
    observation, _ = env.reset(seed=0)
    assert observation.dtype == torch.float32 and env.observation_space.shape == observation.shape == (8, C + 3 + N)
    for action in (env.action_space.sample(), torch.ones(8, dtype=torch.bool), np.ones(8, np.int8)):
        observation, reward, terminated, truncated, info = env.step(action)
        assert reward.dtype == torch.float32 and terminated.dtype == truncated.dtype == torch.bool
        assert reward.shape == terminated.shape == truncated.shape == (8,) and not truncated.any()
        assert set(info["final_info"]) == {"correct", "macs", "exit"}
        assert env.observation_space.contains(observation.numpy())


@pytest.mark.parametrize("cached", [False, True])
def test_an_image_leaves_in_its_own_time_and_the_next_takes_its_place(cached):
    """Three images, N = 3: the first leaves at once, the second goes to the end, the third leaves at exit 1."""
    env = make(3, reward=Macs(), order="sequential", cached=cached)
    first, _ = env.reset()
    assert env.index_B.tolist() == [0, 1, 2] and env.exit_B.tolist() == [0, 0, 0]
    second, reward, over, _, info = env.step(torch.tensor([1, 0, 0]))
    assert over.tolist() == [True, False, False] and reward[1:].tolist() == [0, 0] and reward[0] != 0
    assert torch.equal(info["final_obs"], first) and torch.equal(info["_final_obs"], over)
    assert env.index_B.tolist() == [3, 1, 2] and env.exit_B.tolist() == [0, 1, 1]
    assert split_observation(second, C).exit_B.tolist() == [0, 1, 1]
    _, _, over, _, info = env.step(torch.tensor([0, 0, 1]))
    assert over.tolist() == [False, False, True] and info["final_info"]["exit"][2] == 1
    assert env.index_B.tolist() == [3, 1, 4] and env.exit_B.tolist() == [1, 2, 0]
    _, _, over, _, info = env.step(torch.tensor([0, 0, 0]))  # at the last exit any action leaves
    assert over.tolist() == [False, True, False] and info["final_info"]["exit"][1] == 2
    assert env.index_B.tolist() == [3, 5, 4] and env.exit_B.tolist() == [2, 0, 1]
    assert env.outcome.keep_BK.tolist() == [[True, True, True]]


def test_the_outcome_is_that_of_the_network_at_the_exit():
    network = SmallExits().freeze()
    images = small_images()
    logits_MNC = network(images.images)
    env = make(network=network, images=images, reward=lambda outcome: outcome.macs_fraction_B)
    macs_N = env.costs.cumulative_N
    env.reset(seed=0)
    for step in range(20):
        index_B, exit_B = env.index_B, env.exit_B
        _, reward, over, _, info = env.step(random_actions(8, step))
        out, index, at = env.outcome, index_B[over], exit_B[over]
        torch.testing.assert_close(out.logits_BC, logits_MNC[index, at])
        assert torch.equal(out.label_B, images.label_N[index])
        assert torch.equal(out.correct_B, logits_MNC[index, at].argmax(1) == out.label_B)
        assert torch.equal(out.keep_BK.sum(1), at + 1) and out.keep_BK[:, 0].all()
        assert torch.equal(out.macs_B, macs_N[at]) and out.full_macs == macs_N[-1]
        torch.testing.assert_close(reward[over], (macs_N[at] / macs_N[-1]).float())
        assert (reward[~over] == 0).all()
        final = info["final_info"]
        assert torch.equal(final["macs"][over], out.macs_B) and torch.equal(final["correct"][over], out.correct_B)
        assert torch.equal(final["exit"][over], at)


def play(env: EarlyExitVectorEnv, policy_MN: Tensor) -> dict[int, tuple]:
    """Play a sequential order to its end, and return for each image: exit, label, correct, MACs, reward, logits."""
    observation, _ = env.reset()
    results = {}
    while len(observation):
        index_B, exit_B = env.index_B, env.exit_B
        observation, reward, over, *_ = env.step(policy_MN[index_B, exit_B])
        out = env.outcome
        rows = (index_B[over], exit_B[over], out.label_B, out.correct_B, out.macs_B, reward[over], out.logits_BC)
        for index, *row in zip(*rows, strict=True):
            assert int(index) not in results
            results[int(index)] = tuple(row)
    return results


@pytest.mark.parametrize("num_envs", [1, 7, 40, 64])
def test_cached_and_live_give_the_same_outcome_image_by_image_whoever_is_beside(num_envs):
    policy_MN = torch.rand(40, N, generator=torch.Generator().manual_seed(0)) < 0.5
    expected_M = torch.where(policy_MN.any(1), policy_MN.int().argmax(1), N - 1).clamp(max=N - 1)
    live = play(make(8, order="sequential", reward=Linear()), policy_MN)
    cached = play(make(num_envs, order="sequential", reward=Linear(), cached=True), policy_MN)
    other_live = play(make(num_envs, order="sequential", reward=Linear()), policy_MN)
    assert list(sorted(live)) == list(range(40))
    for i in range(40):
        assert live[i][0] == expected_M[i]
        for other in (cached, other_live):
            assert live[i][:4] == other[i][:4]
            torch.testing.assert_close(live[i][4:], other[i][4:])


@pytest.mark.parametrize("kind", ["msdnet", "resnet"])
def test_cached_and_live_agree_for_networks_that_carry_several_features(kind):
    """MSDNet carries scales and drops them on the way, with deferred ones where it is lazy."""
    torch.manual_seed(0)
    if kind == "msdnet":
        network: ExitNetwork = MSDNet(C, num_exits=4, channels=4, growth_rate=2)
        images = small_images(size=16)
    else:
        network, images = ResNetExits(small_backbone(), [1, 3], image_shape=(3, 12, 12)), small_images()
    policy_MN = torch.rand(40, network.num_exits, generator=torch.Generator().manual_seed(1)) < 0.4
    live, cached = (
        play(make(7, network=network, images=images, order="sequential", cached=cached), policy_MN)
        for cached in (False, True)
    )
    assert {int(came[0]) for came in live.values()} == set(range(network.num_exits))
    for i in range(40):
        assert live[i][:4] == cached[i][:4]
        torch.testing.assert_close(live[i][4:], cached[i][4:])


def test_a_sequential_order_drains():
    """Five images in three places: places close from the first that stays empty, the others keep their order."""
    env = make(3, images=small_images(5), order="sequential")
    env.reset()
    env.step(torch.tensor([0, 1, 0]))
    assert env.index_B.tolist() == [0, 3, 2]
    observation, reward, over, *_ = env.step(torch.tensor([1, 1, 0]))  # two leave, one image is left to begin
    assert len(reward) == len(over) == 3 and over.tolist() == [True, True, False]
    assert env.index_B.tolist() == [4, 2] and env.exit_B.tolist() == [0, 2]
    assert len(observation) == 2 and split_observation(observation, C).exit_B.tolist() == [0, 2]
    observation, *_ = env.step(torch.tensor([0, 0]))
    assert env.index_B.tolist() == [4] and env.exit_B.tolist() == [1]
    observation, *_ = env.step(torch.tensor([1]))
    assert observation.shape == (0, C + 3 + N) and env.index_B.tolist() == []
    assert len(env.reset()[0]) == 3 and env.index_B.tolist() == [0, 1, 2]


def test_images_that_left_are_not_computed():
    network = SmallExits()
    env = make(8, network=network)
    network.computed.clear()
    env.reset(seed=0)
    assert network.computed == {0: 8}
    env.step(torch.tensor([1, 1, 1, 0, 0, 0, 0, 0]))  # five go on, three begin
    assert network.computed == {0: 11, 1: 5}
    env.step(torch.tensor([1, 0, 0, 1, 1, 1, 0, 0]))  # two begun stay, two of the five stay, four begin
    assert network.computed == {0: 15, 1: 7, 2: 2}
    network.computed.clear()
    for _ in range(3):
        env.step(torch.ones(8))
    assert network.computed == {0: 24}


def test_replaying_computes_nothing():
    network = SmallExits()
    env = make(8, network=network, cached=True)
    once = {n: 40 + 2 for n in range(N)}  # and one to see that it fits, and an empty one to count the costs
    assert network.computed == once
    env.reset(seed=0)
    for step in range(20):
        env.step(random_actions(8, step))
    assert network.computed == once


@pytest.mark.parametrize("cached", [False, True])
def test_a_seed_gives_the_same_images_and_rewards(cached):
    def rollout(seed: int) -> list[Tensor]:
        env = make(cached=cached)
        seen = [env.reset(seed=seed)[0]]
        for step in range(20):  # more than one pass over the 40 images
            seen += env.step(random_actions(8, step))[:3]
        return seen

    assert all(torch.equal(a, b) for a, b in zip(rollout(3), rollout(3), strict=True))
    assert not torch.equal(rollout(3)[0], rollout(4)[0])


def test_live_and_cached_show_the_same_shuffled_order():
    live, cached = make(), make(cached=True)
    for env in (live, cached):
        env.reset(seed=2)
    shown = Counter(live.index_B.tolist())
    for step in range(30):
        rewards = [env.step(random_actions(8, step))[1] for env in (live, cached)]
        torch.testing.assert_close(*rewards)
        torch.testing.assert_close(live.observation, cached.observation)
        assert torch.equal(live.index_B, cached.index_B)
        shown.update(live.index_B[live.exit_B == 0].tolist())
    assert max(shown.values()) - min(shown[i] for i in range(40)) <= 1  # one order of the set after another


def test_an_unseeded_reset_goes_on_in_a_shuffled_order_and_starts_over_in_a_sequential_one():
    env = make()
    env.reset(seed=0)
    first = env.index_B
    assert torch.equal(env.reset() and env.index_B, first)  # no step was taken
    env.step(torch.tensor([1, 0, 0, 0, 0, 0, 0, 0]))
    env.reset()
    assert env.exit_B.tolist() == [0] * 8 and not set(env.index_B.tolist()) & set(first.tolist())
    env = make(order="sequential")
    env.reset()
    env.step(torch.ones(8))
    env.reset()
    assert env.index_B.tolist() == list(range(8))


@pytest.mark.parametrize("cached", [False, True])
def test_seek_goes_back_to_a_cursor(cached):
    env = make(cached=cached)
    env.reset(seed=1)
    assert env.cursor == 0
    for step in range(5):
        env.step(random_actions(8, step))
    cursor = env.cursor
    observation, _ = env.reset()
    assert env.cursor == cursor
    other = make(seed=1, cached=cached)
    other.seek(cursor)
    assert torch.equal(other.reset()[0], observation) and torch.equal(other.index_B, env.index_B)


def test_score_asks_without_moving_on():
    env = make()
    env.reset(seed=0)
    env.step(torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]))
    shown, leave = env.observation, torch.tensor([1, 0, 0, 1, 0, 0, 0, 1]).bool()
    outcome = env.score(leave)
    assert env.observation is shown and outcome.keep_BK.sum(1).tolist() == [2, 2, 1]
    env.step(leave)
    assert torch.equal(env.outcome.logits_BC, outcome.logits_BC)


def test_the_single_view_agrees_with_the_vector_environment():
    view, vector = single(), make(1)
    observation, _ = view.reset(seed=5)
    shown, _ = vector.reset(seed=5)
    for action in (0, 0, 0, 1, 0, 1):
        assert np.array_equal(observation, shown[0].numpy())
        observation, reward, terminated, truncated, info = view.step(action)
        shown, reward_B, over, _, vector_info = vector.step(torch.tensor([action]))
        assert (reward, terminated, truncated) == (pytest.approx(reward_B.item()), bool(over), False)
        if terminated:
            assert info == {key: value.item() for key, value in vector_info["final_info"].items()}
            assert np.array_equal(observation, vector_info["final_obs"][0].numpy())
            observation, _ = view.reset()


def test_the_single_view_shows_each_image_of_a_sequential_order_once_and_starts_over():
    view, seen = single(order="sequential"), []
    for image in range(41):
        view.reset()
        seen.append(int(view.vector.index_B))
        if image < 38:
            assert view.step(1)[2]
        elif image == 38:
            assert [view.step(0)[2] for _ in range(N)] == [False, False, True]
        else:
            assert not view.step(0)[2]  # given up
    assert seen == [*range(40), 0]


@pytest.mark.parametrize("cached", [False, True])
def test_the_label_is_not_in_the_observation(cached):
    """Same images with other labels: observations stay, rewards change."""
    images, other = small_images(), small_images()
    other.label_N = (other.label_N + 1) % C
    envs = [make(40, images=i, order="sequential", cached=cached) for i in (images, other)]
    assert torch.equal(*(env.reset()[0] for env in envs))
    steps = [env.step(random_actions(40)) for env in envs]
    assert torch.equal(steps[0][0], steps[1][0]) and torch.equal(steps[0][4]["final_obs"], steps[1][4]["final_obs"])
    assert not torch.equal(steps[0][1], steps[1][1])


def test_a_step_leaves_no_gradient_but_its_observation_can_train_a_policy():
    env = make()
    observation, _ = env.reset(seed=0)
    observation, reward, *_ = env.step(random_actions(8))
    assert not reward.requires_grad and not observation.requires_grad
    weight = torch.ones(1, requires_grad=True)
    (observation * weight).sum().backward()


def test_an_observation_is_not_overwritten_by_later_steps():
    env = make()
    kept, _ = env.reset(seed=0)
    copy = kept.clone()
    for step in range(4):
        env.step(random_actions(8, step))
    assert torch.equal(kept, copy)


def test_the_reward_sees_only_images_that_left():
    sizes = []

    def reward(outcome):
        sizes.append(len(outcome.label_B))
        return torch.ones(len(outcome.label_B))

    env = make(reward=reward)
    env.reset(seed=0)
    for actions in ([0] * 8, [1, 1] + [0] * 6):
        env.step(torch.tensor(actions))
    assert sizes == [2]
    assert make().reward == Macs() and make(reward=Utilization()).reward == Utilization()


def test_cached_outputs_can_be_replayed_without_network_or_images():
    cache = cache_exits(SmallExits(), small_images())
    assert cache.logits_MNC.shape == (40, N, C) and not cache.logits_MNC.requires_grad
    env = EarlyExitVectorEnv(8, network=cache, seed=3)
    assert torch.equal(env.reset()[0], make(seed=3).reset()[0])
    assert isinstance(cache, CachedExits) and torch.equal(cache.label_M, small_images().label_N)


def test_making_a_cache_leaves_a_network_in_training_as_it_was():
    network = ResNetExits(small_backbone(), [1, 3], image_shape=(3, 12, 12)).train()
    before = network.content_hash()
    cache = cache_exits(network, small_images())
    assert network.training and not network.frozen and network.content_hash() == before
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert torch.equal(cache.logits_MNC, cache_exits(network.freeze(), small_images()).logits_MNC)


@pytest.mark.parametrize("cached", [False, True])
def test_the_network_is_frozen_and_stays_as_it_was(cached):
    network = SmallExits()
    before = network.content_hash()
    env = make(network=network, cached=cached)
    env.reset(seed=0)
    for step in range(5):
        env.step(random_actions(8, step))
    assert network.content_hash() == before and network.frozen


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"order": "random"}, "order must be one of shuffled, sequential"),
        ({"num_envs": 0}, "num_envs must be a whole number, from 1 to 1048576, got 0"),
        ({"network": "resnet32_digits"}, "resnet32_digits holds no multi-exit network"),
        ({"network": "nothing"}, "there is no checkpoint nothing"),
    ],
)
def test_bad_arguments_are_named(wrong, message):
    with pytest.raises(UserError, match=message):
        make(**wrong)


def test_augmented_images_cannot_be_cached():
    images = small_images()
    images.augment = crop_and_flip
    with pytest.raises(UserError, match="augmented at random cannot be cached"):
        make(images=images, cached=True)
    make(images=images).reset(seed=0)


def test_actions_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"actions must be of shape \(8,\), got \(8, 1\)"):
        make().step(torch.ones(8, 1))


def test_a_network_and_images_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="does not take images of 3×12×12; give images=… that it was made for"):
        make(4, network=ResNetExits(small_backbone(), [1], "linear", (3, 16, 16)), images=small_images(5, size=12))
    with pytest.raises(UserError, match="has 5 classes, the images have more"):
        make(4, network=SmallExits(), images=small_images(50, classes=9))
