"""Let an agent decide for every image of a set, and record what came of it. Nothing else changes.

Shapes: B images side by side, N images of a set (M in a cache), K blocks, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from policyskip.agents.base import Agent
from policyskip.agents.skipnet import SkipNet
from policyskip.data import Images, sequential
from policyskip.envs.base import ImageVectorEnv
from policyskip.evaluation.decisions import BLOCKS, EXITS, Decisions
from policyskip.execution.gates import GateExecution
from policyskip.execution.ways import DEFAULT, How
from policyskip.exits.cache import CachedExits
from policyskip.exits.rules import decisions_at
from policyskip.runs.progress import waiting


def evaluate(agent: Agent, env: ImageVectorEnv, full: bool = True) -> Decisions:
    """Let the agent decide greedily for every image of a sequential environment, at once or step by step.

    Args:
        full: also run the whole network on the same images.
    """
    env.reset()
    rows: list[tuple[Tensor, ...]] = []
    with waiting("judging decisions", len(env.feed.images)) as wait:
        while len(env.observation):
            index_B = env.feed.batch.index_B
            full_correct_B = torch.zeros(len(index_B), dtype=torch.bool)
            if full:
                keep_BK = torch.ones(len(index_B), env.backbone.num_blocks, dtype=torch.bool, device=env.device)
                full_correct_B = env.score(keep_BK).correct_B
            steps, over = 0, False
            while not over:  # all images of a batch end together
                _, reward_B, over_B, *_ = env.step(agent.decide(env))
                steps, over = steps + 1, bool(over_B.all())
            out = env.outcome
            prediction_B = out.logits_BC.argmax(1)
            rows.append((index_B, out.label_B, prediction_B, full_correct_B, out.keep_BK, out.macs_B, reward_B))
            wait.advance(len(index_B))
    index_N, label_N, prediction_N, full_correct_N, keep_NK, macs_N, reward_N = _whole_set(rows)
    difficulty_N = env.feed.images.difficulty
    return Decisions(
        kind=BLOCKS,
        label_N=label_N,
        prediction_N=prediction_N,
        ran_NK=keep_NK,
        macs_N=macs_N + steps * agent.decision_macs,
        full_macs=env.costs.full,
        full_correct_N=full_correct_N if full else None,
        reward_N=reward_N,
        difficulty_N=None if difficulty_N is None else difficulty_N[index_N],
        policy_macs=steps * agent.decision_macs,
        sees_the_label=agent.sees_the_label,
    )


@torch.no_grad()
def evaluate_gates(agent: SkipNet, images: Images, batch_size: int, how: How = DEFAULT) -> Decisions:
    """Let the gates decide greedily for every image of a set, each block computed only for the images that run it.

    The full network is the agent's own with all blocks kept and no gates. The reward is −L, the paper's objective.

    Args:
        how: in which way and precision the network is executed.
    """
    network: GateExecution | None = None
    rows: list[tuple[Tensor, ...]] = []
    with waiting("judging decisions", len(images)) as wait:
        for batch in images.stream(sequential(len(images), batch_size)):
            _, channels, height, width = batch.images.shape
            network = network or GateExecution(agent.network, (channels, height, width), *how)
            run = network.greedy(batch.images)
            full_correct_B = network.whole(batch.images).argmax(1) == batch.label_B
            ce_B = F.cross_entropy(run.logits_BC.float(), batch.label_B, reduction="none")
            reward_B = agent.returns(ce_B, run)[:, 0]
            macs_B = agent.costs.of(run.keep_BK) + agent.decision_macs
            rows.append((batch.label_B, run.logits_BC.argmax(1), full_correct_B, run.keep_BK, macs_B, reward_B))
            wait.advance(len(batch))
    label_N, prediction_N, full_correct_N, keep_NK, macs_N, reward_N = _whole_set(rows)
    return Decisions(
        kind=BLOCKS,
        label_N=label_N,
        prediction_N=prediction_N,
        ran_NK=keep_NK,
        macs_N=macs_N,
        full_macs=agent.costs.full,
        full_correct_N=full_correct_N,
        reward_N=reward_N,
        difficulty_N=images.difficulty,
        policy_macs=agent.decision_macs,
    )


def exit_decisions(
    exit_M: Tensor, cache: CachedExits, decision_macs: float = 0.0, difficulty_M: Tensor | None = None
) -> Decisions:
    """Record what leaving at exits int64 (M,) does with the images of a cache.

    Args:
        decision_macs: MACs of one decision of the policy, which it makes at every exit that it comes to but the last.
        difficulty_M: float32 (M,), the data set's own measure of difficulty.
    """
    N, rows = cache.num_exits, torch.arange(len(cache), device=exit_M.device)
    policy_macs_M = decision_macs * decisions_at(exit_M, N)
    return Decisions(
        kind=EXITS,
        label_N=cache.label_M.cpu(),
        prediction_N=cache.logits_MNC[rows, exit_M].argmax(-1).cpu(),
        ran_NK=(torch.arange(N, device=exit_M.device) <= exit_M.unsqueeze(1)).cpu(),
        macs_N=(cache.macs_N[exit_M] + policy_macs_M).double().cpu(),
        full_macs=cache.costs.full,
        full_correct_N=cache.correct_MN[:, -1].cpu(),
        difficulty_N=None if difficulty_M is None else difficulty_M.cpu(),
        policy_macs=policy_macs_M.mean().item(),
    )


def _whole_set(rows: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """Join the rows of all batches, each a tuple of tensors (B, …), into one tensor (N, …) a column, on the CPU."""
    return [torch.cat(column).cpu() for column in zip(*rows, strict=True)]
