"""The adapter that lets Stable-Baselines3 (SB3) learn in the environments: ``PPO("MlpPolicy", SB3VecEnv(env), ...)``.

SB3 moves and stores observations as numpy arrays. Where an observation is an image, the adapter gives SB3 a number in
its place, and :class:`LookUp`, the first layer of the policy, finds the image with that number on the device: no image
is copied to the host, and a buffer of 100,000 observations takes 800 KB.

Only ``agents/sb3.py`` imports this module, because only SB3's learners need SB3.

Shapes: B images side by side, D numbers of an observation, R images remembered, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import gymnasium
import numpy as np
import torch
from gymnasium.spaces.utils import flatdim
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn

from policyskip.data import Batch, Feed, TensorImages
from policyskip.data.base import described
from policyskip.envs.base import DecisionEnv
from policyskip.errors import UserError
from policyskip.parallel.devices import usual_defaults
from policyskip.texts import one_line

EXACT = 2**24
"""Integers below this are exact in float32, to which SB3 converts image numbers before the features extractor."""


class ImageIndex(Protocol):
    """An index that gives images numbers, and finds them by number."""

    def number(self, batch: Batch) -> Tensor:
        """Give numbers to the images of a batch that is shown: int64 (B,) on the CPU."""
        ...

    def find(self, number_B: Tensor) -> Tensor:
        """Find the images, uint8 (B, 3, H, W), with these numbers, int64 (B,)."""
        ...


class DatasetIndex:
    """The index of a set that is held on the device and not augmented: an image's number is its index in the set."""

    def __init__(self, images: TensorImages) -> None:
        self.images = images.images

    def number(self, batch: Batch) -> Tensor:
        return batch.index_B

    def find(self, number_B: Tensor) -> Tensor:
        return self.images.index_select(0, number_B.to(self.images.device))


class RecentImages:
    """An index that keeps the last R images shown, as they looked: for sets that are augmented or read from files.

    Args:
        example: a batch whose images have the shape and the device of all that will be shown.
        remember: the least R; it is rounded up to a power of two, so that numbers can start again from 0 at ``EXACT``.

    Attributes:
        count: how many images have been numbered.
    """

    def __init__(self, example: Batch, remember: int) -> None:
        self.capacity = 1 << (remember - 1).bit_length()
        self.images = example.images.new_empty(self.capacity, *example.images.shape[1:])
        self.count = 0

    def number(self, batch: Batch) -> Tensor:
        number_B = (self.count + torch.arange(len(batch))) % EXACT
        self.images.index_copy_(0, (number_B % self.capacity).to(self.images.device), batch.images)
        self.count += len(batch)
        return number_B

    def find(self, number_B: Tensor) -> Tensor:
        """Find the images, uint8 (B, 3, H, W), with these numbers, int64 (B,).

        Raises:
            UserError: one of them is no longer kept.
        """
        age = int(((self.count - 1 - number_B) % EXACT).max()) + 1
        if age > self.capacity:  # a later image has taken its row, and would be found instead
            raise UserError(
                f"an image that was shown {age} images ago is looked up, and {self.capacity} are remembered; "
                "SB3VecEnv(env, remember=…) must be at least the learner's buffer and one batch more"
            )
        return self.images.index_select(0, (number_B % self.capacity).to(self.images.device))


class Bound(np.ndarray[Any, Any]):
    """A bound of image numbers: an array that cannot be repeated, as ``VecFrameStack`` does to stack observations."""

    def __array_function__(self, function: Any, types: Any, inputs: Any, kwargs: Any) -> Any:
        if function is np.repeat:
            raise UserError("observations that are image numbers cannot be stacked: leave VecFrameStack out")
        return super().__array_function__(function, types, inputs, kwargs)


class ImageNumbers(gymnasium.spaces.Box):
    """The space of image numbers, int64 (1,), which can find the images. When it is pickled, its images are not.

    Args:
        image_index: finds the images.
        image_space: the space of the images, uint8 (3, H, W).
    """

    image_index: ImageIndex | None = None

    def __init__(self, image_index: ImageIndex, image_space: gymnasium.spaces.Box) -> None:
        super().__init__(0, EXACT - 1, (1,), np.int64)
        self.low = self.low.view(Bound)
        self.image_index = image_index
        self.image_space = image_space

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "image_index": None, "low": np.asarray(self.low)}

    def find(self, number_B1: Tensor) -> Tensor:
        """Find the images, uint8 (B, 3, H, W), with these numbers, (B, 1) of any dtype, on the device of the numbers.

        Raises:
            UserError: the space was pickled and has no images, a wrapper has changed the numbers, or one of the images
                is no longer kept.
        """
        if self.image_index is None:
            raise UserError(
                "the images of a saved observation space are not saved with it; "
                'load(…, custom_objects={"observation_space": env.observation_space}) gives those of env'
            )
        number_B = number_B1[:, 0].long()
        if number_B1.is_floating_point() and not torch.equal(number_B, number_B1[:, 0]):
            raise UserError(
                "a wrapper has changed the image numbers that SB3VecEnv gives for images: say norm_obs=False to "
                "VecNormalize, and leave out other wrappers that change observations"
            )
        return self.image_index.find(number_B).to(number_B1.device)


@flatdim.register(ImageNumbers)
def _no_numbers_as_features(space: ImageNumbers) -> int:
    """Refuse what SB3's default features extractor calls: with it, a policy would learn from the image numbers.

    Raises:
        UserError: always.
    """
    raise UserError('image numbers are no features; give policy_kwargs={"features_extractor_class": LookUp}')


class SmallConv(BaseFeaturesExtractor):
    """A features extractor of three strided convolutions and a mean over the pixels, for images that are too small for
    SB3's ``NatureCNN`` (36×36)."""

    def __init__(self, observation_space: gymnasium.spaces.Box, features_dim: int = 64) -> None:
        super().__init__(observation_space, features_dim)
        channels = [observation_space.shape[0], 16, 32, features_dim]
        self.layers = nn.Sequential()
        for i in range(3):
            self.layers += nn.Sequential(nn.Conv2d(channels[i], channels[i + 1], 3, stride=2, padding=1), nn.ReLU())

    def forward(self, observations: Tensor) -> Tensor:
        return self.layers(observations).mean((2, 3))


class LookUp(BaseFeaturesExtractor):
    """A features extractor that looks images up by their numbers and passes them to another extractor.

    It is chosen by ``policy_kwargs={"features_extractor_class": LookUp}``, together with
    ``"features_extractor_kwargs": {"extractor": …}`` for another extractor than the small one.

    Args:
        observation_space: of an :class:`SB3VecEnv` over images.
        extractor: any of SB3's features extractors for images; it sees float32 (B, 3, H, W) in [0, 1].
        kwargs: arguments of ``extractor``.

    Raises:
        UserError: the observations are not image numbers.
    """

    def __init__(
        self,
        observation_space: gymnasium.Space[Any],
        extractor: type[BaseFeaturesExtractor] = SmallConv,
        **kwargs: Any,
    ) -> None:
        if not isinstance(observation_space, ImageNumbers):
            raise UserError("LookUp is for observations that are images; these are features already: leave it out")
        inner = extractor(observation_space.image_space, **kwargs)
        super().__init__(observation_space, inner.features_dim)
        self.extractor = inner
        self.space = observation_space

    def forward(self, observations: Tensor) -> Tensor:
        return self.extractor(self.space.find(observations).float() / 255)


class SB3VecEnv(VecEnv):
    """Wraps any of the three vector environments as a vector environment of Stable-Baselines3.

    SB3's wrappers of it that change observations (``VecNormalize`` with ``norm_obs=True``, ``VecFrameStack``) are for
    the environments that show features, not for image numbers.

    **Observation** over ``BlockSelection-v0`` image numbers, int64 (B, 1), for which the policy needs :class:`LookUp`;
    over the other two their own, float32 (B, D). **Action** that of the environment, in numpy. **Reward** float32 (B,).
    ``infos`` has, for an image whose episode ended, ``terminal_observation`` and ``TimeLimit.truncated`` as SB3
    defines them, ``is_success`` (whether the prediction was right; SB3 logs it as ``rollout/success_rate``) and
    ``macs``; for the other images, nothing. All images share one environment: ``get_attr`` and ``env_method`` read or
    call it once and repeat the result.

    Args:
        env: one of the three vector environments, in shuffled order; nothing else may step it.
        remember: how many of the images last shown are kept on the device. Needed only where images are augmented or
            read from files, so that an image's index in the set does not determine how it looked. It must be at least
            the size of the learner's buffer and one batch more: ``n_steps * num_envs + num_envs`` for PPO and A2C,
            ``buffer_size + num_envs`` for DQN.

    Raises:
        UserError: ``env`` is something else, its order is sequential (SB3 needs the same number of images at every
            step), or ``remember`` is missing, no whole number or larger than float32 can number.
    """

    def __init__(self, env: DecisionEnv, remember: int | None = None) -> None:
        if not isinstance(getattr(env, "feed", None), Feed):
            raise UserError(f"SB3VecEnv takes one of policyskip's vector environments, got {described(env)}")
        if env.metadata.get("autoreset_mode") is not AutoresetMode.SAME_STEP:
            raise UserError("SB3 wants the next episode's observation in the step that ends one: autoreset SAME_STEP")
        self._feed = env.feed
        if self._feed.order != "shuffled":
            raise UserError("SB3 wants as many images at every step, and a sequential order ends: say order=shuffled")
        self.env = env
        space = env.single_observation_space
        self._image_index: ImageIndex | None = None
        if isinstance(space, gymnasium.spaces.Box) and space.dtype == np.uint8:
            self._image_index = self._make_image_index(remember)
            space = ImageNumbers(self._image_index, space)
        super().__init__(env.num_envs, space, env.single_action_space)

    def _make_image_index(self, remember: int | None) -> ImageIndex:
        """Make the index by which the images of the environment are found.

        Raises:
            UserError: ``remember`` is needed, and missing or out of range.
        """
        images = self._feed.images
        if isinstance(images, TensorImages) and images.augment is None and len(images) <= EXACT:
            return DatasetIndex(images)
        if type(remember) is not int or not 1 <= remember <= EXACT // 2:
            raise UserError(
                "these images look different each time they are shown, or are read from files: remember=… must say how "
                f"many to keep on the device, from 1 to {EXACT // 2} (the learner's buffer and one batch more), "
                f"got {one_line(repr(remember), 60)}"
            )
        return RecentImages(self._feed.batch, remember)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make a copy; a pickled space has no images, and those of the copy are put back into it."""
        self.__dict__.update(state)
        if isinstance(self.observation_space, ImageNumbers) and self._image_index is not None:
            self.observation_space = ImageNumbers(self._image_index, self.observation_space.image_space)

    @usual_defaults()
    def reset(self) -> np.ndarray:
        """Show the first images of the order of the seed that :meth:`seed` set; if it set none, those that come next.

        Returns: the observation (B, …).
        """
        self.env.reset(seed=self._seeds[0])
        self._reset_seeds()
        self._reset_options()
        self._observation = self._observe(self.env.observation)
        return self._observation

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    @usual_defaults()
    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        observation, reward_B, terminated_B, truncated_B, info = self.env.step(self._actions)
        truncated = truncated_B.cpu().numpy()
        over = terminated_B.cpu().numpy() | truncated
        infos = _infos(self._observation, over, truncated, info)
        self._observation = self._observe(observation)
        return self._observation, reward_B.cpu().numpy(), over, infos

    def _observe(self, observation: Tensor) -> np.ndarray:
        """Convert the environment's observation to SB3's: image numbers (B, 1), or the observation itself, (B, D)."""
        if self._image_index is not None:
            return self._image_index.number(self._feed.batch).unsqueeze(1).numpy()
        return observation.cpu().numpy()

    def close(self) -> None:
        self.env.close()

    def get_attr(self, attr_name: str, indices: int | Iterable[int] | None = None) -> list[Any]:
        return [getattr(self.env, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: int | Iterable[int] | None = None) -> None:
        setattr(self.env, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: int | Iterable[int] | None = None, **method_kwargs: Any
    ) -> list[Any]:
        result = getattr(self.env, method_name)(*method_args, **method_kwargs)
        return [result for _ in self._get_indices(indices)]

    def env_is_wrapped(
        self, wrapper_class: type[gymnasium.Wrapper[Any, Any, Any, Any]], indices: int | Iterable[int] | None = None
    ) -> list[bool]:
        return [False for _ in self._get_indices(indices)]


def _infos(
    observation: np.ndarray, over: np.ndarray, truncated: np.ndarray, info: dict[str, Any]
) -> list[dict[str, Any]]:
    """Make the dict of each image, B of them, which SB3 may change; it is filled only where an episode ended.

    Args:
        observation: (B, …), before the step.
        over, truncated: bool (B,).
    """
    infos: list[dict[str, Any]] = [{} for _ in range(len(over))]
    rows = over.nonzero()[0]
    if not len(rows):
        return infos
    correct, macs = info["final_info"]["correct"].tolist(), info["final_info"]["macs"].tolist()
    for row, last_observation, at_limit in zip(rows.tolist(), observation[rows], truncated[rows].tolist(), strict=True):
        infos[row] = {
            "terminal_observation": last_observation,
            "TimeLimit.truncated": at_limit,
            "is_success": correct[row],
            "macs": macs[row],
        }
    return infos
