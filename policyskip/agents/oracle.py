"""The oracle searches the best set of blocks for each image, and may see the label for it.

The oracle cannot be deployed. It shows how much deciding per image could gain: at least this much, since the search
tries the best of the static front's sets and changes them block by block, but not all 2^K sets.

Shapes: B images, F sets that are tried first, S decisions for each image, K blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from policyskip.agents.fixed import FixedAgent
from policyskip.envs.block_selection import BlockSelectionVectorEnv
from policyskip.fronts import pareto
from policyskip.policies.fixed import OraclePolicy
from policyskip.static_front import StaticFront


class Oracle(FixedAgent):
    """An agent that searches for each image the keep-set with the highest reward, and of equals the cheapest.

    Args:
        env: the environment that the agent will act in (for its sizes).
        front: the static front. Tried first are all blocks, no block, and those sets of the front that are more
            accurate on validation images than every cheaper one.
    """

    sees_the_label = True

    def __init__(self, env: BlockSelectionVectorEnv, front: StaticFront | None = None) -> None:
        super().__init__("oracle", OraclePolicy())
        K = env.backbone.num_blocks
        best = [] if front is None else [front.sets[i] for i in pareto(front.macs, front.accuracy)]
        self.sets_FK = torch.tensor(list(dict.fromkeys([(False,) * K, (True,) * K, *best])))

    def decide(self, env: BlockSelectionVectorEnv) -> Tensor:
        """Find the best of the first sets for each image shown, bool (B, K), then flip single blocks as long as a
        flip helps.

        The reward, which sees the label, judges every flip.

        Returns: bool (B, K).
        """
        keep_BK = best_of(env, self.sets_FK.unsqueeze(1).expand(-1, len(env.observation), -1).to(env.device))
        flip_K1K = torch.eye(keep_BK.shape[1], dtype=torch.bool, device=env.device).unsqueeze(1)
        while True:
            better_BK = best_of(env, torch.cat([keep_BK.unsqueeze(0), keep_BK ^ flip_K1K]))
            if torch.equal(better_BK, keep_BK):
                return keep_BK
            keep_BK = better_BK


def best_of(env: BlockSelectionVectorEnv, keep_SBK: Tensor) -> Tensor:
    """Pick for each image shown, of its S decisions, the one with the highest reward; of equals the cheapest, and of
    these the first.

    Args:
        keep_SBK: bool (S, B, K).

    Returns: bool (B, K).
    """
    S, B, _ = keep_SBK.shape
    outcome = env.score(keep_SBK)
    reward_SB, macs_SB = env.rewards(outcome).view(S, B), outcome.macs_B.view(S, B)
    is_highest_SB = reward_SB == reward_SB.amax(0)
    index_B = macs_SB.masked_fill(~is_highest_SB, torch.inf).argmin(0)
    return keep_SBK[index_B, torch.arange(B, device=index_B.device)]
