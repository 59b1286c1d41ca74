"""Agents with nothing to train: they choose blocks by a rule and ignore the image.

``full`` keeps every block; ``first``, ``distributed`` and ``best_static`` keep one set for all images; ``random`` draws
a set for each image. (FirstK, RandomK and DistributeK are the baselines of Wu et al., "BlockDrop", CVPR 2018.)

Shapes: K blocks.
"""

from __future__ import annotations

from typing import Any

import torch

from policyskip.agents.base import Agent
from policyskip.envs.block_selection import BlockSelectionVectorEnv
from policyskip.errors import UserError
from policyskip.policies.base import Policy
from policyskip.policies.fixed import FixedPolicy, RandomPolicy
from policyskip.static_front import Keep, StaticFront, spread_set


def first_blocks(K: int, count: int) -> Keep:
    """Return the keep-set of the first ``count`` of K blocks."""
    return tuple(k < count for k in range(K))


class FixedAgent(Agent):
    """An agent with nothing to train: its policy is complete from the beginning.

    Args:
        name: the agent's name in summaries.
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
    """Make the agent that keeps every block."""
    return _keeping("full", env, (True,) * env.backbone.num_blocks)


def first(env: BlockSelectionVectorEnv, blocks: int | None = None, best: Keep | None = None) -> FixedAgent:
    """Make the agent that keeps the first ``blocks`` blocks.

    Args:
        env: the environment that the agent will act in.
        blocks: the number of blocks to keep; None: as many as ``best`` keeps, or all K if that is not known.
        best: the fixed keep-set with the highest reward on validation images, if it has been searched already.

    Raises:
        UserError: ``blocks`` is not between 0 and K.
    """
    K = env.backbone.num_blocks
    return _keeping("first", env, first_blocks(K, _number_to_keep(K, blocks, best)))


def distributed(env: BlockSelectionVectorEnv, blocks: int | None = None, best: Keep | None = None) -> FixedAgent:
    """Make the agent that keeps ``blocks`` blocks at even distances. Arguments and errors: see :func:`first`."""
    K = env.backbone.num_blocks
    return _keeping("distributed", env, spread_set(K, _number_to_keep(K, blocks, best)))


def random(
    env: BlockSelectionVectorEnv, seed: int = 0, blocks: int | None = None, best: Keep | None = None
) -> FixedAgent:
    """Make the agent that keeps ``blocks`` blocks of each image, drawn by ``seed``. The other arguments and the errors
    are those of :func:`first`."""
    K = env.backbone.num_blocks
    policy = RandomPolicy(K, seed)
    policy.blocks.fill_(_number_to_keep(K, blocks, best))
    return FixedAgent("random", policy.to(env.device))


def best_static(
    env: BlockSelectionVectorEnv,
    blocks: int | None = None,
    best: Keep | None = None,
    front: StaticFront | None = None,
) -> FixedAgent:
    """Make the agent that keeps the best fixed set.

    Args:
        env, best: see :func:`first`.
        blocks: keep the front's most accurate set of this many blocks; None: keep ``best``, or all K blocks if that is
            not known.
        front: the static front, if it has been searched already.

    Raises:
        UserError: ``blocks`` is not between 0 and K, or the search was too short to find a set of that size.
    """
    K = env.backbone.num_blocks
    count = _number_to_keep(K, blocks, best)
    if front is not None and blocks is not None:
        sets = [pair for pair in zip(front.accuracy, front.sets, strict=True) if sum(pair[1]) == count]
        if not sets:
            raise UserError(f"the static front has no set of {count} blocks: its search ran out of front.budget")
        best = max(sets)[1]
    return _keeping("best_static", env, best or (True,) * K)


def _keeping(name: str, env: BlockSelectionVectorEnv, keep: Keep) -> FixedAgent:
    """Make the agent that keeps these blocks for every image."""
    policy = FixedPolicy(len(keep))
    policy.keep_K.copy_(torch.tensor(keep))
    return FixedAgent(name, policy.to(env.device))


def _number_to_keep(K: int, blocks: int | None, best: Keep | None) -> int:
    """Return the number of blocks to keep: ``blocks``, or as many as ``best`` keeps, or K if both are None.

    Raises:
        UserError: ``blocks`` is not between 0 and K.
    """
    if blocks is not None and not 0 <= blocks <= K:
        raise UserError(f"agent.blocks must be from 0 to {K}, the network's blocks, got {blocks}")
    if blocks is not None:
        return blocks
    return K if best is None else sum(best)
