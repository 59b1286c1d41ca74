"""The environments for Stable-Baselines3: ``PPO("MlpPolicy", SB3VecEnv(env), ...)``.

SB3 moves and stores observations as numpy arrays. Where the observation is an image, the adapter gives it a number
instead, and :class:`LookUp`, the first layer of the policy, finds the image by its number where it lies on the device:
no image is copied to the host, and a buffer of 100,000 observations takes 800 KB.

Nothing else in the package imports this module, as nothing else needs SB3.

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

from policyskip.data import Batch, TensorImages
from policyskip.envs.base import DecisionEnv
from policyskip.errors import UserError

EXACT = 2**24
"""Numbers below this are exact in float32, which SB3 turns them into on their way to the features extractor."""


class ImageIndex(Protocol):
    """Images that can be found by their number."""

    def number(self, batch: Batch) -> Tensor:
        """Numbers of images that are shown, int64 (B,) on the CPU."""
        ...

    def find(self, number_B: Tensor) -> Tensor:
        """The images with these numbers, int64 (B,): uint8 (B, 3, H, W)."""
        ...


class DatasetIndex:
    """A set that lies on the device and shows its images as they are: their places are their numbers."""

    def __init__(self, images: TensorImages) -> None:
        self.images = images.images

    def number(self, batch: Batch) -> Tensor:
        return batch.index_B

    def find(self, number_B: Tensor) -> Tensor:
        return self.images.index_select(0, number_B.to(self.images.device))


class RecentImages:
    """The last R images that were shown, as they were shown: for sets that are augmented or read from files.

    Args:
        first: a batch, which says what an image looks like and where it lies.
        remember: R at least; rounded up to a power of two, so that numbers may start anew at ``EXACT``.
    """

    def __init__(self, first: Batch, remember: int) -> None:
        self.capacity = 1 << (remember - 1).bit_length()
        self.images = first.images.new_empty(self.capacity, *first.images.shape[1:])
        self.shown = 0

    def number(self, batch: Batch) -> Tensor:
        number_B = (self.shown + torch.arange(len(batch))) % EXACT
        self.images.index_copy_(0, (number_B % self.capacity).to(self.images.device), batch.images)
        self.shown += len(batch)
        return number_B

    def find(self, number_B: Tensor) -> Tensor:
        age = int(((self.shown - 1 - number_B) % EXACT).max()) + 1
        if age > self.capacity:  # its place was taken: another image would be found there
            raise UserError(
                f"an image that was shown {age} images ago is looked up, and {self.capacity} are remembered; "
                "SB3VecEnv(env, remember=…) must be at least the learner's buffer and one batch more"
            )
        return self.images.index_select(0, (number_B % self.capacity).to(self.images.device))


class ImageNumbers(gymnasium.spaces.Box):
    """The space of image numbers, int64 (1,), which knows the images. They are left behind when it is pickled.

    Args:
        numbered: where the images are.
        image_space: what the images look like, uint8 (3, H, W).
    """

    def __init__(self, numbered: ImageIndex, image_space: gymnasium.spaces.Box) -> None:
        super().__init__(0, EXACT - 1, (1,), np.int64)
        self.numbered: ImageIndex | None = numbered
        self.image_space = image_space

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "numbered": None}

    def find(self, number_B1: Tensor) -> Tensor:
        """The images uint8 (B, 3, H, W) with these numbers, (B, 1) of any dtype, on the device of the numbers."""
        if self.numbered is None:
            raise UserError(
                "the images of a saved observation space are not saved with it; "
                'load(…, custom_objects={"observation_space": env.observation_space}) gives those of env'
            )
        return self.numbered.find(number_B1[:, 0].long()).to(number_B1.device)


@flatdim.register(ImageNumbers)
def _no_numbers_as_features(space: ImageNumbers) -> int:
    """SB3's default features extractor asks for this, and a policy would learn from the numbers themselves."""
    raise UserError('image numbers are no features; give policy_kwargs={"features_extractor_class": LookUp}')


class SmallConv(BaseFeaturesExtractor):
    """Three strided convolutions and a mean over the pixels: for images too small for SB3's ``NatureCNN`` (36×36)."""

    def __init__(self, observation_space: gymnasium.spaces.Box, features_dim: int = 64) -> None:
        super().__init__(observation_space, features_dim)
        channels = [observation_space.shape[0], 16, 32, features_dim]
        self.layers = nn.Sequential()
        for i in range(3):
            self.layers += nn.Sequential(nn.Conv2d(channels[i], channels[i + 1], 3, stride=2, padding=1), nn.ReLU())

    def forward(self, observations: Tensor) -> Tensor:
        return self.layers(observations).mean((2, 3))


class LookUp(BaseFeaturesExtractor):
    """Features of images that are given by their numbers: looks them up, and hands them to another extractor.

    ``policy_kwargs={"features_extractor_class": LookUp}``, with ``"features_extractor_kwargs": {"extractor": …}`` for
    another extractor than the small one.

    Args:
        observation_space: of an :class:`SB3VecEnv` over images.
        extractor: any of SB3's features extractors for images; it sees float32 (B, 3, H, W) in [0, 1].
        kwargs: its arguments.

    Raises:
        UserError: the observations are no image numbers.
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
    """Any of the three vector environments, for Stable-Baselines3.

    **Observation** image numbers, int64 (B, 1), over ``BlockSelection-v0`` (the policy needs :class:`LookUp`); float32
    (B, D), as they are, over the others. **Action** as in the environment, numpy. **Reward** float32 (B,).
    ``infos`` holds, where an episode ended, ``terminal_observation`` and ``TimeLimit.truncated`` as SB3 wants them,
    ``is_success`` (the prediction was right; SB3 logs it as ``rollout/success_rate``) and ``macs``; elsewhere nothing.
    All images share one environment: ``get_attr`` and ``env_method`` ask it once and repeat the answer.

    Args:
        env: one of the three vector environments, in shuffled order; not to be stepped by anyone else.
        remember: needed where images are augmented or read from files, as their numbers say nothing of how they looked:
            how many of those last shown are kept on the device. At least what the learner's buffer holds, and one batch
            more: ``n_steps * num_envs + num_envs`` for PPO and A2C, ``buffer_size + num_envs`` for DQN.

    Raises:
        UserError: sequential order (SB3 wants the same number of images at every step), ``remember`` is missing, or is
            beyond what float32 can number.
    """

    def __init__(self, env: DecisionEnv, remember: int | None = None) -> None:
        if env.metadata.get("autoreset_mode") is not AutoresetMode.SAME_STEP:
            raise UserError("SB3 wants the next episode's observation in the step that ends one: autoreset SAME_STEP")
        self._feed = env.feed
        if self._feed.order != "shuffled":
            raise UserError("SB3 wants as many images at every step, and a sequential order ends: say order=shuffled")
        self.env = env
        space = env.single_observation_space
        self._numbered: ImageIndex | None = None
        if isinstance(space, gymnasium.spaces.Box) and space.dtype == np.uint8:
            self._numbered = self._number_images(remember)
            space = ImageNumbers(self._numbered, space)
        super().__init__(env.num_envs, space, env.single_action_space)

    def _number_images(self, remember: int | None) -> ImageIndex:
        images = self._feed.images
        if isinstance(images, TensorImages) and images.augment is None and len(images) <= EXACT:
            return DatasetIndex(images)
        if remember is None or not 1 <= remember <= EXACT // 2:
            raise UserError(
                "these images look different each time they are shown, or are read from files: remember=… must say how "
                f"many to keep on the device, from 1 to {EXACT // 2} (the learner's buffer and one batch more), "
                f"got {remember}"
            )
        return RecentImages(self._feed.batch, remember)

    def reset(self) -> np.ndarray:
        """Show images: with the first seed that :meth:`seed` gave, if it did, otherwise those that come next."""
        self.env.reset(seed=self._seeds[0])
        self._reset_seeds()
        self._reset_options()
        self._shown = self._observe(self.env.observation)
        return self._shown

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        observation, reward_B, terminated_B, truncated_B, info = self.env.step(torch.as_tensor(self._actions))
        truncated = truncated_B.cpu().numpy()
        over = terminated_B.cpu().numpy() | truncated
        infos = _infos(self._shown, over, truncated, info)
        self._shown = self._observe(observation)
        return self._shown, reward_B.cpu().numpy(), over, infos

    def _observe(self, observation: Tensor) -> np.ndarray:
        if self._numbered is not None:
            return self._numbered.number(self._feed.batch).unsqueeze(1).numpy()
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
        answer = getattr(self.env, method_name)(*method_args, **method_kwargs)
        return [answer for _ in self._get_indices(indices)]

    def env_is_wrapped(
        self, wrapper_class: type[gymnasium.Wrapper[Any, Any, Any, Any]], indices: int | Iterable[int] | None = None
    ) -> list[bool]:
        return [False for _ in self._get_indices(indices)]


def _infos(shown: np.ndarray, over: np.ndarray, truncated: np.ndarray, info: dict[str, Any]) -> list[dict[str, Any]]:
    """A dict for each image, its own to change; filled where an episode ended, in as little Python as a list allows."""
    infos: list[dict[str, Any]] = [{} for _ in range(len(over))]
    rows = over.nonzero()[0]
    if not len(rows):
        return infos
    correct, macs = info["final_info"]["correct"].tolist(), info["final_info"]["macs"].tolist()
    for row, ended, at_limit in zip(rows.tolist(), shown[rows], truncated[rows].tolist(), strict=True):
        infos[row] = {
            "terminal_observation": ended,
            "TimeLimit.truncated": at_limit,
            "is_success": correct[row],
            "macs": macs[row],
        }
    return infos
