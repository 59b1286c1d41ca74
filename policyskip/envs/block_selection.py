"""One decision for each image: which of the K residual blocks run. ``policyskip/BlockSelection-v0``.

Shapes: B images side by side, S decisions for each image, K blocks, H W pixels.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector.utils import batch_space
from torch import Tensor

from policyskip.backbones.execution import sparse_many
from policyskip.envs.base import ImageVectorEnv
from policyskip.rewards import Outcome, reward_of


class BlockSelectionVectorEnv(ImageVectorEnv):
    """Choose the blocks that run for each of B images; one step is one episode.

    **Observation** uint8 (B, 3, H, W): the images. **Action** MultiBinary(K), int8 or bool (B, K): 1 runs the block.
    **Reward** float32 (B,): whatever ``reward`` makes of the outcome. **Episode end** after every step; autoreset is
    ``SAME_STEP``, so the observation that ``step`` returns already shows the next images. The outcome of the step is
    in ``info["final_info"]`` (``correct``, ``macs``, ``kept``) and, whole, in ``env.outcome``.
    Arguments: see :class:`ImageVectorEnv`.
    """

    outcome: Outcome

    def __init__(self, num_envs: int = 256, **kwargs: Any) -> None:
        super().__init__(num_envs, **kwargs)
        self.single_action_space = gymnasium.spaces.MultiBinary(self.backbone.num_blocks)
        self.action_space = batch_space(self.single_action_space, num_envs)

    @torch.no_grad()
    def score(self, keep: Tensor) -> Outcome:
        """What these decisions would earn on the images now shown; nothing moves on.

        Args:
            keep: bool (B, K), or (S, B, K) for S decisions an image, answered in one sparsely executed pass.

        Returns: outcome of B decisions, or of S·B, laid end to end.
        """
        images, label_B = self.feed.batch.images, self.feed.batch.label_B
        keep_SBK = keep.view(-1, len(label_B), self.backbone.num_blocks)
        logits_BC = sparse_many(self.backbone, images, keep_SBK).flatten(0, 1)
        keep_BK = keep_SBK.flatten(0, 1)
        label_B = label_B.repeat(len(keep_SBK))
        correct_B = logits_BC.argmax(1) == label_B
        return Outcome(logits_BC, label_B, correct_B, keep_BK, self.costs.of(keep_BK), self.costs.full)

    def rewards(self, outcome: Outcome) -> Tensor:
        """The reward of each decision in an outcome, float32 (B,)."""
        return reward_of(self.reward, outcome)

    @torch.no_grad()
    def step(self, actions: Tensor | np.ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Score ``actions`` (B, K) on the images shown, and show the next ones."""
        keep_BK = torch.as_tensor(actions, device=self.device).bool()
        observation = self.observation
        self.outcome = outcome = self.score(keep_BK)
        reward_B = self.rewards(outcome)
        over = torch.ones_like(outcome.correct_B)
        info = {
            "final_obs": observation,
            "_final_obs": over,
            "final_info": {
                "correct": outcome.correct_B,
                "macs": outcome.macs_B,
                "kept": outcome.keep_BK.sum(1),
            },
            "_final_info": over,
        }
        return self.advance(), reward_B, over, ~over, info


class BlockSelectionEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """One image at a time, in numpy: the same environment as :class:`BlockSelectionVectorEnv` with B = 1.

    Observation uint8 (3, H, W), action MultiBinary(K), reward float; ``reset`` shows an image, ``step`` ends
    the episode.
    """

    metadata = {  # noqa: RUF012 - Gymnasium declares it so
        "render_modes": []
    }

    def __init__(self, **kwargs: Any) -> None:
        self.images = BlockSelectionVectorEnv(1, **kwargs)
        self.observation_space = self.images.single_observation_space
        self.action_space = self.images.single_action_space
        self._shown = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.images.reset(seed=seed)
        elif self._shown:
            self.images.advance()
        self._shown = True
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        outcome = self.images.score(torch.as_tensor(action, device=self.images.device).bool().view(1, -1))
        reward = float(self.images.rewards(outcome))
        info = {"correct": bool(outcome.correct_B), "macs": float(outcome.macs_B), "kept": int(outcome.keep_BK.sum())}
        return self._observation(), reward, True, False, info

    def _observation(self) -> np.ndarray:
        shown: np.ndarray = self.images.observation[0].cpu().numpy().copy()
        return shown
