"""What costs nothing to learn: agents that keep blocks by a rule, without looking at what an image shows.

``full`` keeps every block; ``first``, ``distributed`` and ``best_static`` keep one set for all images; ``random`` draws
a set for each image. (FirstK, RandomK and DistributeK are the baselines of Wu et al., "BlockDrop", CVPR 2018.) None has
anything to learn, so their runs take no update.

Shapes: B images, K blocks, H W pixels, P numbers in an image (3·H·W).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from policyskip.agents.base import Agent, Policy
from policyskip.agents.static import Keep, StaticFront
from policyskip.envs.block_selection import BlockSelectionVectorEnv
from policyskip.errors import UserError


class FixedPolicy(Policy):
    """The same blocks for every image: ``keep_K``, bool (K,)."""

    keep_K: Tensor

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.register_buffer("keep_K", torch.ones(num_blocks, dtype=torch.bool))

    def decide(self, images: Tensor) -> Tensor:
        return self.keep_K.repeat(len(images), 1)

    def spec(self) -> dict[str, Any]:
        return {"num_blocks": len(self.keep_K)}


class RandomPolicy(Policy):
    """For each image its own random set of ``blocks`` blocks (int64, a scalar).

    The draw is a hash of the image's pixels and the seed: the same image gets the same set, in whatever batch and on
    whatever device it comes, so a run's figures can be repeated and a deployed policy does what was judged.
    """

    blocks: Tensor

    def __init__(self, num_blocks: int, seed: int) -> None:
        super().__init__()
        self.num_blocks, self.seed = num_blocks, seed
        self.register_buffer("blocks", torch.tensor(num_blocks))

    def decide(self, images: Tensor) -> Tensor:
        rank_BK = image_hashes(images, self.num_blocks, self.seed).argsort(1).argsort(1)
        return rank_BK < self.blocks

    def spec(self) -> dict[str, Any]:
        return {"num_blocks": self.num_blocks, "seed": self.seed}


def image_hashes(images: Tensor, count: int, seed: int) -> Tensor:
    """``count`` numbers for each image that look random, and depend on its pixels and the seed alone.

    Args:
        images: uint8 (B, 3, H, W).

    Returns: int64 (B, count). Integer sums wrap around and do not depend on their order, so every device agrees.
    """
    generator = torch.Generator().manual_seed(seed)
    factor_P = torch.randint(-(2**62), 2**62, (images.shape[1:].numel(),), generator=generator)
    factor_K, offset_K = torch.randint(-(2**62), 2**62, (2, count), generator=generator).to(images.device)
    code_B = (images.flatten(1).long() * factor_P.to(images.device)).sum(1)
    code_BK = (code_B.unsqueeze(1) + offset_K) * (2 * factor_K + 1)
    for _ in range(2):  # the high half of a product depends on all of its factors; fold it into the low one
        code_BK = (code_BK ^ (code_BK >> 32)) * (2 * factor_K + 1)
    return code_BK


def first_blocks(K: int, m: int) -> Keep:
    """The first m of K blocks."""
    return tuple(k < m for k in range(K))


def spread_blocks(K: int, m: int) -> Keep:
    """m of K blocks at even distances: those at ⌊i·K/m⌋, which begin with the first."""
    places = {i * K // m for i in range(m)}
    return tuple(k in places for k in range(K))


class RestingAgent(Agent):
    """An agent that has nothing to learn.

    Args:
        name: what it is called in summaries.
        policy: what it does.
    """

    decision_macs = 0.0

    def __init__(self, name: str, policy: Policy) -> None:
        self._name, self.policy = name, policy.eval()

    @property
    def name(self) -> str:
        return self._name

    def update(self, env: BlockSelectionVectorEnv) -> dict[str, float]:
        raise UserError(f"agent={self.name} has nothing to learn")

    @torch.no_grad()
    def act(self, observation: Tensor) -> Tensor:
        return self.policy.decide(observation)

    def state_dict(self) -> dict[str, Any]:
        return {"policy": self.policy.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policy.load_state_dict(state["policy"])


def full(env: BlockSelectionVectorEnv) -> RestingAgent:
    """Keeps every block."""
    return _keeping("full", env, (True,) * env.backbone.num_blocks)


def first(env: BlockSelectionVectorEnv, blocks: int | None = None, best: Keep | None = None) -> RestingAgent:
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


def distributed(env: BlockSelectionVectorEnv, blocks: int | None = None, best: Keep | None = None) -> RestingAgent:
    """Keeps ``blocks`` blocks at even distances. Arguments as for :func:`first`."""
    K = env.backbone.num_blocks
    return _keeping("distributed", env, spread_blocks(K, _how_many(K, blocks, best)))


def random(
    env: BlockSelectionVectorEnv, seed: int = 0, blocks: int | None = None, best: Keep | None = None
) -> RestingAgent:
    """Keeps ``blocks`` random blocks of each image, drawn by ``seed``. Other arguments as for :func:`first`."""
    K = env.backbone.num_blocks
    policy = RandomPolicy(K, seed)
    policy.blocks.fill_(_how_many(K, blocks, best))
    return RestingAgent("random", policy.to(env.device))


def best_static(
    env: BlockSelectionVectorEnv,
    blocks: int | None = None,
    best: Keep | None = None,
    front: StaticFront | None = None,
) -> RestingAgent:
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


def _keeping(name: str, env: BlockSelectionVectorEnv, keep: Keep) -> RestingAgent:
    policy = FixedPolicy(len(keep))
    policy.keep_K.copy_(torch.tensor(keep))
    return RestingAgent(name, policy.to(env.device))


def _how_many(K: int, blocks: int | None, best: Keep | None) -> int:
    """The number of blocks to keep; K as long as neither says."""
    if blocks is not None and not 0 <= blocks <= K:
        raise UserError(f"agent.blocks must be from 0 to {K}, the network's blocks, got {blocks}")
    return blocks if blocks is not None else K if best is None else sum(best)
