"""What costs nothing to learn: agents that keep blocks by a rule, without looking at what an image shows.

``full`` keeps every block; ``first``, ``distributed`` and ``best_static`` keep one set for all images; ``random`` draws
a set for each image. (FirstK, RandomK and DistributeK are the baselines of Wu et al., "BlockDrop", CVPR 2018.) None has
anything to learn, so their runs take no update.

Shapes: B images, K blocks, H W pixels, P numbers in an image (3·H·W).
"""

from __future__ import annotations

from typing import Any

import torch

from policyskip.agents.base import Agent
from policyskip.envs.block_selection import BlockSelectionVectorEnv
from policyskip.errors import UserError
from policyskip.policies.base import Policy
from policyskip.policies.fixed import FixedPolicy, RandomPolicy
from policyskip.static_front import Keep, StaticFront


def first_blocks(K: int, m: int) -> Keep:
    """The first m of K blocks."""
    return tuple(k < m for k in range(K))


def spread_blocks(K: int, m: int) -> Keep:
    """m of K blocks at even distances: those at ⌊i·K/m⌋, which begin with the first."""
    places = {i * K // m for i in range(m)}
    return tuple(k in places for k in range(K))


class FixedAgent(Agent):
    """An agent with nothing to learn: it follows a policy that is complete from the beginning.

    Args:
        name: its name in summaries.
        policy: maps observations to decisions.
        decision_macs: MACs that one decision of the policy costs.
    """

    learns = False

    def __init__(self, name: str, policy: Policy, decision_macs: float = 0.0) -> None:
        self._name, self.policy, self.decision_macs = name, policy.eval(), decision_macs

    @property
    def name(self) -> str:
        return self._name

    def update(self, source: Any) -> dict[str, float]:
        """Refuse to learn.

        Raises:
            UserError: always.
        """
        raise UserError(f"agent={self.name} has nothing to learn")

    def state_dict(self) -> dict[str, Any]:
        return {"policy": self.policy.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policy.load_state_dict(state["policy"])


def full(env: BlockSelectionVectorEnv) -> FixedAgent:
    """Keeps every block."""
    return _keeping("full", env, (True,) * env.backbone.num_blocks)


def first(env: BlockSelectionVectorEnv, blocks: int | None = None, best: Keep | None = None) -> FixedAgent:
    """Keeps the first ``blocks`` blocks.

    Args:
        env: the environment it will act in.
        blocks: how many; None: as many as ``best``.
        best: the fixed keep-set that earns the highest reward on validation images, where it is known already.

    Raises:
        UserError: ``blocks`` is not between 0 and K.
    """
    K = env.backbone.num_blocks
    return _keeping("first", env, first_blocks(K, _how_many(K, blocks, best)))


def distributed(env: BlockSelectionVectorEnv, blocks: int | None = None, best: Keep | None = None) -> FixedAgent:
    """Keeps ``blocks`` blocks at even distances. Arguments as for :func:`first`."""
    K = env.backbone.num_blocks
    return _keeping("distributed", env, spread_blocks(K, _how_many(K, blocks, best)))


def random(
    env: BlockSelectionVectorEnv, seed: int = 0, blocks: int | None = None, best: Keep | None = None
) -> FixedAgent:
    """Keeps ``blocks`` random blocks of each image, drawn by ``seed``. Other arguments as for :func:`first`."""
    K = env.backbone.num_blocks
    policy = RandomPolicy(K, seed)
    policy.blocks.fill_(_how_many(K, blocks, best))
    return FixedAgent("random", policy.to(env.device))


def best_static(
    env: BlockSelectionVectorEnv,
    blocks: int | None = None,
    best: Keep | None = None,
    front: StaticFront | None = None,
) -> FixedAgent:
    """Keeps the front's most accurate set of ``blocks`` blocks; None: the set of the front with the highest reward.

    Args:
        front: the static front, where it is known already; see :func:`first` for the others.

    Raises:
        UserError: ``blocks`` is not between 0 and K, or the search was too short to find a set of that size.
    """
    K = env.backbone.num_blocks
    m = _how_many(K, blocks, best)
    if front is not None and blocks is not None:
        sets = [(accuracy, keep) for accuracy, keep in zip(front.accuracy, front.sets, strict=True) if sum(keep) == m]
        if not sets:
            raise UserError(f"the static front has no set of {m} blocks: its search ran out of front.budget")
        best = max(sets)[1]
    return _keeping("best_static", env, best or (True,) * K)


def _keeping(name: str, env: BlockSelectionVectorEnv, keep: Keep) -> FixedAgent:
    policy = FixedPolicy(len(keep))
    policy.keep_K.copy_(torch.tensor(keep))
    return FixedAgent(name, policy.to(env.device))


def _how_many(K: int, blocks: int | None, best: Keep | None) -> int:
    """The number of blocks to keep; K as long as neither says."""
    if blocks is not None and not 0 <= blocks <= K:
        raise UserError(f"agent.blocks must be from 0 to {K}, the network's blocks, got {blocks}")
    return blocks if blocks is not None else K if best is None else sum(best)
