"""What an agent does on a set of images: accuracy, blocks and cost, image by image. No side effects.

Shapes: N images, K blocks, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from policyskip.agents.base import Agent
from policyskip.agents.skipnet import SkipNet
from policyskip.backbones.folding import folded
from policyskip.data import Images, sequential
from policyskip.envs.base import ImageVectorEnv


@dataclass(frozen=True)
class Evaluation:
    """One row for each image, on the CPU, in the order of the set.

    Attributes:
        label_N, prediction_N: int64 (N,).
        full_correct_N: bool (N,), whether the whole network is right; None when it was not asked.
        keep_NK: bool (N, K).
        macs_N: float64 (N,), what each image cost, the policy's own cost included.
        reward_N: float32 (N,).
        difficulty_N: float32 (N,) or None, the set's own measure.
        policy_macs, full_macs: MACs of the policy for one image, and of the whole network.
        sees_the_label: whether it was an oracle that decided.
    """

    label_N: Tensor
    prediction_N: Tensor
    full_correct_N: Tensor | None
    keep_NK: Tensor
    macs_N: Tensor
    reward_N: Tensor
    difficulty_N: Tensor | None
    policy_macs: float
    full_macs: float
    sees_the_label: bool = False

    @property
    def correct_N(self) -> Tensor:
        return self.prediction_N == self.label_N

    @property
    def accuracy(self) -> float:
        return self.correct_N.double().mean().item()

    @property
    def macs_fraction(self) -> float:
        return self.macs_N.mean().item() / self.full_macs

    @property
    def kept_by_difficulty(self) -> list[float | None] | None:
        """Mean number of kept blocks in each quarter of the images, easiest first; None for a quarter of no images, and
        None without a difficulty."""
        if self.difficulty_N is None:
            return None
        kept_N = self.keep_NK.sum(1).double()
        quarters = self.difficulty_N.argsort().tensor_split(4)
        return [kept_N[quarter].mean().item() if len(quarter) else None for quarter in quarters]

    def block_use_CK(self, classes: int) -> Tensor:
        """Share of each class's images that kept each block, float64 (C, K); NaN for a class without images."""
        return torch.stack([self.keep_NK[self.label_N == c].double().mean(0) for c in range(classes)])

    def figures(self) -> dict[str, Any]:
        """The figures that a summary states; see docs/agents/blockdrop.md for each."""
        kept_N = self.keep_NK.sum(1).double()
        figures: dict[str, Any] = {
            "accuracy": self.accuracy,
            "reward": self.reward_N.double().mean().item(),
            "kept_mean": kept_N.mean().item(),
            "kept_sd": kept_N.std(correction=0).item(),
            "blocks": self.keep_NK.shape[1],
            "macs_mean": self.macs_N.mean().item(),
            "macs_sd": self.macs_N.std(correction=0).item(),
            "full_macs": self.full_macs,
            "macs_fraction": self.macs_fraction,
            "policy_macs": self.policy_macs,
            "unique_decisions": len(self.keep_NK.unique(dim=0)),
        }
        if self.full_correct_N is not None:
            figures["full_accuracy"] = self.full_correct_N.double().mean().item()
        if self.sees_the_label:
            figures["sees_the_label"] = True
        if self.difficulty_N is not None:
            figures["kept_by_difficulty"] = self.kept_by_difficulty
        return figures


def evaluate(agent: Agent, env: ImageVectorEnv, full: bool = True) -> Evaluation:
    """Let the agent decide greedily for every image of a sequential environment, at once or block after block.

    Args:
        full: also ask the whole network about the same images.
    """
    env.reset()
    rows: list[tuple[Tensor, ...]] = []
    while len(env.observation):
        index_B = env.feed.batch.index_B
        correct_B = torch.zeros(len(index_B), dtype=torch.bool)
        if full:
            everything = torch.ones(len(index_B), env.backbone.num_blocks, dtype=torch.bool, device=env.device)
            correct_B = env.score(everything).correct_B
        decisions, over = 0, False
        while not over:  # all images of a batch end together
            _, reward_B, over_B, *_ = env.step(agent.decide(env))
            decisions, over = decisions + 1, bool(over_B.all())
        out = env.outcome
        rows.append((index_B, out.label_B, out.logits_BC.argmax(1), correct_B, out.keep_BK, out.macs_B, reward_B))
    index_N, label_N, prediction_N, full_N, keep_NK, macs_N, reward_N = (
        torch.cat(column).cpu() for column in zip(*rows, strict=True)
    )
    difficulty_N = env.feed.images.difficulty
    return Evaluation(
        label_N,
        prediction_N,
        full_N if full else None,
        keep_NK,
        macs_N + decisions * agent.decision_macs,
        reward_N,
        None if difficulty_N is None else difficulty_N[index_N],
        decisions * agent.decision_macs,
        env.costs.full,
        agent.sees_the_label,
    )


@torch.no_grad()
def evaluate_gates(agent: SkipNet, images: Images, batch_size: int) -> Evaluation:
    """Let the gates decide greedily for every image of a set, each block computed only for the images that run it.

    The full network is the agent's own with all blocks kept and no gates. The reward is −L, the paper's objective.
    """
    network = folded(agent.network)
    rows: list[tuple[Tensor, ...]] = []
    for batch in images.stream(sequential(len(images), batch_size)):
        run = network.greedy(batch.images)
        full_B = network.backbone(batch.images).argmax(1) == batch.label_B
        ce_B = F.cross_entropy(run.logits_BC, batch.label_B, reduction="none")
        reward_B = agent.returns(ce_B, run)[:, 0]
        macs_B = agent.costs.of(run.keep_BK) + agent.decision_macs
        rows.append((batch.label_B, run.logits_BC.argmax(1), full_B, run.keep_BK, macs_B, reward_B))
    label_N, prediction_N, full_N, keep_NK, macs_N, reward_N = (
        torch.cat(column).cpu() for column in zip(*rows, strict=True)
    )
    return Evaluation(
        label_N,
        prediction_N,
        full_N,
        keep_NK,
        macs_N,
        reward_N,
        images.difficulty,
        agent.decision_macs,
        agent.costs.full,
    )
