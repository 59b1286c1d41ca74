"""The oracle: for each image the best set of blocks that a search can find when it may see the label.

It is no policy and cannot be deployed; it says how much deciding per image could gain at most, or rather at least: the
search tries the static front's sets and changes them block by block, not all 2^K.

Shapes: B images, F sets on the front, K blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from policyskip.agents.fixed import FixedAgent
from policyskip.envs.block_selection import BlockSelectionVectorEnv
from policyskip.policies.fixed import OraclePolicy
from policyskip.static_front import StaticFront


class Oracle(FixedAgent):
    """Searches, image by image, the keep-set with the highest reward, the cheapest of those that earn the same.

    Args:
        env: the environment it will act in (for its sizes).
        front: the static front, whose sets are tried first; None: all blocks and none.
    """

    sees_the_label = True

    def __init__(self, env: BlockSelectionVectorEnv, front: StaticFront | None = None) -> None:
        super().__init__("oracle", OraclePolicy())
        K = env.backbone.num_blocks
        self.sets_FK = torch.tensor([(False,) * K, (True,) * K] if front is None else front.sets)

    def decide(self, env: BlockSelectionVectorEnv) -> Tensor:
        """The best of the front's sets for each image shown; then single blocks are flipped while that helps any.

        Returns: bool (B, K). Each flip is judged by the reward, which sees the label.
        """
        keep_BK = best_of(env, self.sets_FK.unsqueeze(1).expand(-1, len(env.observation), -1).to(env.device))
        flip_K1K = torch.eye(keep_BK.shape[1], dtype=torch.bool, device=env.device).unsqueeze(1)
        while True:
            better_BK = best_of(env, torch.cat([keep_BK.unsqueeze(0), keep_BK ^ flip_K1K]))
            if torch.equal(better_BK, keep_BK):
                return keep_BK
            keep_BK = better_BK


def best_of(env: BlockSelectionVectorEnv, keep_SBK: Tensor) -> Tensor:
    """Of S decisions for each image shown, the one that earns most; of equals the cheapest, and of these the first.

    Args:
        keep_SBK: bool (S, B, K).

    Returns: bool (B, K).
    """
    S, B, _ = keep_SBK.shape
    outcome = env.score(keep_SBK)
    reward_SB, macs_SB = env.rewards(outcome).view(S, B), outcome.macs_B.view(S, B)
    equal_SB = reward_SB == reward_SB.amax(0)
    place_B = macs_SB.masked_fill(~equal_SB, torch.inf).argmin(0)
    return keep_SBK[place_B, torch.arange(B, device=place_B.device)]
