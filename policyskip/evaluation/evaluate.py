"""Let an agent decide for every image of a set, and record what came of it. Nothing else changes.

Shapes: N images, K blocks, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from policyskip.agents.base import Agent
from policyskip.agents.skipnet import SkipNet
from policyskip.backbones.folding import folded
from policyskip.data import Images, sequential
from policyskip.envs.base import ImageVectorEnv
from policyskip.evaluation.decisions import Evaluation


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
