"""One decision for each image: which of the K residual blocks run. ``policyskip/BlockSelection-v0``.

Shapes: B images side by side, K blocks, H W pixels.
"""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium.vector.utils import batch_space
from torch import Tensor

from policyskip.envs.base import ImageVectorEnv, decisions


class BlockSelectionVectorEnv(ImageVectorEnv):
    """Choose the blocks that run for each of B images; one step is one episode.

    **Observation** uint8 (B, 3, H, W): the images. **Action** MultiBinary(K), int8 or bool (B, K): 1 runs the block.
    **Reward** float32 (B,): whatever ``reward`` makes of the outcome. **Episode end** after every step; autoreset is
    ``SAME_STEP``, so the observation that ``step`` returns already shows the next images. The outcome of the step is
    in ``info["final_info"]`` (``correct``, ``macs``, ``kept``) and, whole, in ``env.outcome``.
    Arguments: see :class:`ImageVectorEnv`.
    """

    key: ClassVar[str] = "block_selection"
    id: ClassVar[str] = "BlockSelection-v0"
    steps_per_episode = 1

    def __init__(self, num_envs: int = 256, **kwargs: Any) -> None:
        super().__init__(num_envs, **kwargs)
        self.single_action_space = gymnasium.spaces.MultiBinary(self.backbone.num_blocks)
        self.action_space = batch_space(self.single_action_space, num_envs)

    @torch.no_grad()
    def step(self, actions: Tensor | np.ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Score ``actions`` (B, K) on the images shown, and show the next ones."""
        self.outcome = self.score(decisions(actions, self.device))
        reward_B, over_B, info = self._end(self.outcome)
        return self.advance(), reward_B, over_B, ~over_B, info


class BlockSelectionEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """One image at a time, in numpy: the same environment as :class:`BlockSelectionVectorEnv` with B = 1.

    Observation uint8 (3, H, W), action MultiBinary(K), reward float; ``reset`` shows an image, ``step`` ends
    the episode.
    """

    metadata = {  # noqa: RUF012 - Gymnasium declares it so
        "render_modes": []
    }

    def __init__(self, **kwargs: Any) -> None:
        self.vector = BlockSelectionVectorEnv(1, **kwargs)
        self.observation_space = self.vector.single_observation_space
        self.action_space = self.vector.single_action_space
        self._shown = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.vector.reset(seed=seed)
        elif self._shown and not len(self.vector.advance()):
            self.vector.reset()  # every image of a sequential order was shown
        self._shown = True
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        outcome = self.vector.score(decisions(action, self.vector.device).view(1, -1))
        reward = float(self.vector.rewards(outcome))
        info = {"correct": bool(outcome.correct_B), "macs": float(outcome.macs_B), "kept": int(outcome.keep_BK.sum())}
        return self._observation(), reward, True, False, info

    def _observation(self) -> np.ndarray:
        shown: np.ndarray = self.vector.observation[0].cpu().numpy().copy()
        return shown
