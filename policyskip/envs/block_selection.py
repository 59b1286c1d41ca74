"""One decision for each image says which of the K residual blocks run: ``policyskip/BlockSelection-v0``.

Shapes: B images side by side, K blocks, H W pixels.
"""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium.vector.utils import batch_space
from torch import Tensor

from policyskip.envs.arguments import decisions, one_row
from policyskip.envs.base import ImageVectorEnv, Step
from policyskip.envs.single_view import SingleView, numpy_of
from policyskip.parallel.devices import usual_defaults


class BlockSelectionVectorEnv(ImageVectorEnv):
    """An environment in which one action chooses the blocks that run for each of B images; one step is one episode.

    **Observation** uint8 (B, 3, H, W): the images. **Action** MultiBinary(K), int8 or bool (B, K): 1 runs the block.
    **Reward** float32 (B,): what ``reward`` gives for the outcome. **Episode end** after every step; autoreset is
    ``SAME_STEP``, so the observation that ``step`` returns already shows the next images. The outcome of the step is
    in ``env.outcome``, and the most important of it (``correct``, ``macs``, ``kept``) in ``info["final_info"]``.
    Arguments: see :class:`ImageVectorEnv`.
    """

    key: ClassVar[str] = "block_selection"
    id: ClassVar[str] = "BlockSelection-v0"
    steps_per_episode = 1

    def __init__(self, num_envs: int = 256, **kwargs: Any) -> None:
        super().__init__(num_envs, **kwargs)
        self.single_action_space = gymnasium.spaces.MultiBinary(self.backbone.num_blocks)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    @usual_defaults()
    @torch.no_grad()
    def step(self, actions: Tensor | np.ndarray) -> Step:
        """Score ``actions`` (B, K) on the images shown, and show the next images.

        Raises:
            UserError: an action is neither 0 nor 1, or there is not one for each block of each image.
        """
        shape = (len(self.observation), self.backbone.num_blocks)
        self.outcome = self.score(decisions(actions, shape, self.device))
        return self._end(self.outcome)


class BlockSelectionEnv(SingleView):
    """An environment that shows one image at a time, in numpy: :class:`BlockSelectionVectorEnv` with B = 1.

    Observation uint8 (3, H, W), action MultiBinary(K), reward float. ``reset`` shows an image, ``step`` ends the
    episode. The image stays until the next ``reset``, so that further steps try other blocks on the same image.
    """

    vector: BlockSelectionVectorEnv

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(BlockSelectionVectorEnv, kwargs)

    def step(self, action: np.int64 | np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        row = one_row(action, self.action_space)
        outcome = self.vector.score(decisions(row, (1, self.vector.backbone.num_blocks)))
        reward = float(self.vector.rewards(outcome))
        info = {"correct": bool(outcome.correct_B), "macs": float(outcome.macs_B), "kept": int(outcome.keep_BK.sum())}
        return numpy_of(self.vector.observation), reward, True, False, info
