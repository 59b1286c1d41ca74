"""Block by block, one decision for each image says whether the block runs: ``policyskip/LayerSkip-v0``.

Shapes: B images side by side, K blocks, F channels of the widest features that enter a block, H W pixels,
D numbers of an observation (F + K).
"""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium.vector.utils import batch_space
from torch import Tensor, nn

from policyskip.backbones import Backbone
from policyskip.envs.arguments import decisions
from policyskip.envs.base import ImageVectorEnv, Step
from policyskip.envs.single_view import SingleView
from policyskip.envs.step_tensors import for_numpy
from policyskip.parallel.devices import usual_defaults


class LayerSkipVectorEnv(ImageVectorEnv):
    """An environment in which an action decides, block by block and for each of B images, whether the block runs; an
    episode is one image and has K steps.

    **Observation** float32 (B, F + K): the mean over the pixels of each channel of the features that enter block k,
    zeros up to the F channels of the widest, and the one-hot of k. **Action** Discrete(2), integer or bool (B,): 1 runs
    the block. **Reward** float32 (B,): what ``reward`` gives for the outcome, at the last step; 0 before. **Episode
    end** after K steps, for all B images at once. Autoreset is ``SAME_STEP``: the observation that the last ``step``
    returns already shows the next images at block 0. The outcome of the episodes is then in ``env.outcome``, the most
    important of it (``correct``, ``macs``, ``kept``) in ``info["final_info"]``, and the observation at block K - 1 in
    ``info["final_obs"]``; at the steps before, ``info`` is empty.

    A block is computed for the images that keep it and for no others; nothing is computed twice. In sequential order
    the last batch is short, and after it the observation is empty.
    :meth:`score` takes decisions about all K blocks, bool (…, B, K), at whatever block the episodes are.
    Arguments: see :class:`ImageVectorEnv`.
    """

    key: ClassVar[str] = "layer_skip"
    id: ClassVar[str] = "LayerSkip-v0"

    @usual_defaults()
    def __init__(self, num_envs: int = 256, **kwargs: Any) -> None:
        super().__init__(num_envs, **kwargs)
        self.num_blocks = self.steps_per_episode = self.backbone.num_blocks
        self.width = max(_channels(self.backbone, self.feed.batch.images[:1]))
        self._block_KK = torch.eye(self.num_blocks, device=self.device)
        # A shortcut's features may be negative and of any size, and Gymnasium's checker warns of infinite bounds.
        high_D = np.full(self.width + self.num_blocks, np.finfo(np.float32).max, np.float32)
        low_D = -high_D
        low_D[self.width :], high_D[self.width :] = 0, 1
        self.single_observation_space = gymnasium.spaces.Box(low_D, high_D, dtype=np.float32)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.single_action_space = gymnasium.spaces.Discrete(2)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._begin()

    @property
    def observation(self) -> Tensor:
        """Return the observation at block :attr:`block`, float32 (B, F + K)."""
        return self._observation

    @property
    def cursor(self) -> int:
        """Return the number of the batch to go on from: that of the batch shown or, after a step, that of the next."""
        return self.feed.cursor + (1 if self.block else 0)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, Any]]:
        """Show images at block 0: the first of the order, with ``seed`` or if it is sequential; otherwise, those that
        come next. Episodes under way are given up.

        Returns: the observation float32 (B, F + K), and an empty info.
        """
        if self.block and seed is None and self.feed.order == "shuffled":
            self.advance()
        return super().reset(seed=seed, options=options)

    @torch.no_grad()
    def _begin(self) -> None:
        images = self.feed.batch.images
        self._features = self.execution.features(images)
        self._kept_BK = torch.zeros(len(images), self.num_blocks, dtype=torch.bool, device=self.device)
        self._enter(0)

    def _enter(self, block: int) -> None:
        self.block = block
        self._observation = observe(self._features, self._block_KK[block], self.width)

    @usual_defaults()
    @torch.no_grad()
    def step(self, actions: Tensor | np.ndarray) -> Step:
        """Run the block for the images whose action, in ``actions`` (B,), is 1, and go on to the next block; after the
        last block, end the episodes and show the next images.

        Raises:
            UserError: an action is neither 0 nor 1, or there is not one for each image.
        """
        keep_B = decisions(actions, (len(self._kept_BK),))
        self._kept_BK[:, self.block] = keep_B.to(self.device)
        self._features = self.execution.advance(self._features, keep_B.unsqueeze(1), self.block)
        if self.block < self.num_blocks - 1:
            self._enter(self.block + 1)
            nothing_B = torch.zeros(len(keep_B), device=self.device)
            return self.observation, *for_numpy(nothing_B, nothing_B.bool(), nothing_B.bool()), {}
        logits_BC = self.execution.head(self._features)
        self.outcome = self._outcome(logits_BC, self.feed.batch.label_B, self._kept_BK)
        return self._end(self.outcome)


def observe(features: Tensor, block_K: Tensor, width: int) -> Tensor:
    """Make the observation of features (B, C, H, W) that enter the block with the one-hot ``block_K`` (K,).

    Returns: float32 (B, width + K): each channel's mean, zeros up to ``width`` channels, and the one-hot.
    """
    pooled_BF = features.float().mean((2, 3))
    pooled_BF = nn.functional.pad(pooled_BF, (0, width - pooled_BF.shape[1]))
    return torch.cat([pooled_BF, block_K.expand(len(pooled_BF), -1)], dim=1)


def _channels(backbone: Backbone, images: Tensor) -> list[int]:
    """Count the channels of the features that enter each block, by running the shortcuts alone on images (B, 3, H,
    W)."""
    channels = []
    with torch.no_grad():
        x = backbone.features(images)
        for block in backbone.blocks:
            channels.append(x.shape[1])
            x = block.shortcut(x)
    return channels


class LayerSkipEnv(SingleView):
    """An environment that shows one image at a time, in numpy: :class:`LayerSkipVectorEnv` with B = 1.

    Observation float32 (F + K,), action Discrete(2), reward float. ``reset`` shows an image at block 0; the K-th
    ``step`` ends the episode and returns the observation at block K - 1 again.
    """

    vector: LayerSkipVectorEnv

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(LayerSkipVectorEnv, kwargs)
