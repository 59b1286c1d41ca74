"""BlockDrop: a policy sees the image and decides about all blocks at once; it learns by REINFORCE.

Wu et al., "BlockDrop: Dynamic Inference Paths in Residual Networks", CVPR 2018. Where the published code departs from
the paper or from sense (half an entropy, entropy on frozen blocks, tuning on the test set), this follows the paper;
docs/agents/blockdrop.md lists the differences.

Shapes: B images, S sampled decisions for each image, K blocks, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policyskip.agents.base import Agent
from policyskip.agents.baselines import (
    Baseline,
    ValueHead,
    greedy_advantage,
    leave_one_out_advantage,
    value_advantage,
    value_loss,
)
from policyskip.agents.schedules import one_cycle
from policyskip.backbones.costs import count_macs
from policyskip.envs.block_selection import BlockSelectionVectorEnv
from policyskip.errors import UserError, check_choice
from policyskip.finite import check_finite, check_gradients
from policyskip.parallel import processes
from policyskip.parallel.data_parallel import Divisible
from policyskip.parallel.deferred import Figure, figure, sent
from policyskip.policies.networks import KeepPolicy, check_policy, policy_network

VALUE_LR = 10
"""The value head's learning rate, as a multiple of the policy's: its weights start at zero, and have to follow the
rewards."""


def bounded(probability: Tensor, alpha: float) -> Tensor:
    """Compute ``s' = αs + (1−α)(1−s)``, elementwise, in [1−α, α], which explores even if the policy is sure (paper)."""
    return alpha * probability + (1 - alpha) * (1 - probability)


def log_probability(logits_BK: Tensor, keep_SBK: Tensor, alpha: float) -> Tensor:
    """Compute ``log π(u) = log[s'u + (1−s')(1−u)]`` of each decision u (paper).

    Args:
        logits_BK: float (B, K); s is their sigmoid, and s' is :func:`bounded` by ``alpha``.
        keep_SBK: bool (S, B, K), the decisions u.

    Returns: float (S, B, K).
    """
    # s' mixes Bernoulli(s), with weight α, and its complement; in logs this is exact also where s rounds to 0 or 1.
    log_s = torch.where(keep_SBK, F.logsigmoid(logits_BK), F.logsigmoid(-logits_BK))
    if alpha == 1:
        return log_s
    log_not_s = torch.where(keep_SBK, F.logsigmoid(-logits_BK), F.logsigmoid(logits_BK))
    return torch.logaddexp(log_s + math.log(alpha), log_not_s + math.log(1 - alpha))


def reinforce_loss(
    logits_BK: Tensor, keep_SBK: Tensor, advantage_SB: Tensor, free_K: Tensor, alpha: float, beta: float
) -> Tensor:
    """Compute ``−A Σ_k log π(u_k) − β Σ_k H(s'_k)`` over the free blocks, mean over decisions and images (paper).

    Args:
        logits_BK: float (B, K), the policy's output before the sigmoid.
        keep_SBK: bool (S, B, K), decisions sampled from ``bounded(sigmoid(logits))``.
        advantage_SB: float (S, B), the reward of each decision minus its baseline; no gradient flows into it.
        free_K: bool (K,), the blocks that the curriculum leaves to the policy.
        alpha: the bound on the probabilities, in (0.5, 1].
        beta: weight of the Bernoulli entropy, in nats.

    Returns: a scalar.

    Raises:
        ValueError: the shapes do not belong together.
    """
    S, B, K = keep_SBK.shape
    if logits_BK.shape != (B, K) or advantage_SB.shape != (S, B) or free_K.shape != (K,):
        shapes = [tuple(t.shape) for t in (logits_BK, keep_SBK, advantage_SB, free_K)]
        raise ValueError(f"expected logits (B, K), keep (S, B, K), advantage (S, B), free (K,); got {shapes}")
    log_pi_SB = (log_probability(logits_BK, keep_SBK, alpha) * free_K).sum(2)
    entropy_B = (bernoulli_entropy(bounded(logits_BK.sigmoid(), alpha).clamp(1e-6, 1 - 1e-6)) * free_K).sum(1)
    return -(advantage_SB.detach() * log_pi_SB).mean() - beta * entropy_B.mean()


def bernoulli_entropy(probability: Tensor) -> Tensor:
    """Compute ``−p log p − (1−p) log(1−p)`` in nats, elementwise."""
    return -(torch.xlogy(probability, probability) + torch.xlogy(1 - probability, 1 - probability))


class BlockDrop(Agent, Divisible):
    """An agent that learns by REINFORCE with a baseline, under a curriculum that frees the last blocks first.

    The defaults here are the paper's; those of ``configs/agent/blockdrop.yaml`` learn in minutes.

    Args:
        env: the environment that the agent will learn in (for its sizes and device).
        total_steps: learning updates of the whole run; the schedules scale with it.
        seed: decides the initial weights and the samples.
        lr: highest learning rate of Adam.
        schedule: "onecycle" (up over the first tenth, then down to zero) or "constant" (the paper).
        alpha, alpha_end: bound on the sampling probabilities, in (0.5, 1], at the first update and at the last. At 0.8
            a sample differs from the greedy decision in a fifth of the blocks at least, so that the policy learns the
            best decision *under that noise*; towards 1 it learns the best greedy decision.
        beta: weight of the entropy.
        baseline: the number subtracted from a decision's reward: "greedy", the reward of the image's greedy decision
            (the paper); "leave_one_out", the mean reward of the image's other samples; "value", the reward that a
            linear layer on the policy's features expects of the image; "none", 0. See ``agents/baselines.py``.
        samples: decisions sampled for each image in each update.
        curriculum: fraction of the training over which the K blocks are freed one after another, last block first.
        policy: the policy network: "cifar", "imagenet", "constant", or the name of one of the user's own; see
            :func:`~policyskip.policies.networks.policy_network`.
        width, pool: of the policy network.
        initial_keep: probability with which a fresh policy keeps a block.
        start: a fixed keep-set to begin from: a fresh policy keeps the blocks of the set with probability
            ``initial_keep`` and the others with the complement. None: it keeps every block with ``initial_keep``.

    Raises:
        UserError: a value that is not allowed.
    """

    def __init__(
        self,
        env: BlockSelectionVectorEnv,
        total_steps: int,
        seed: int = 0,
        lr: float = 1e-3,
        schedule: Literal["onecycle", "constant"] = "constant",
        alpha: float = 0.8,
        alpha_end: float = 0.8,
        beta: float = 0.1,
        baseline: Baseline = "greedy",
        samples: int = 1,
        curriculum: float = 0.01,
        policy: str = "cifar",
        width: int = 16,
        pool: int = 1,
        initial_keep: float = 0.5,
        start: Sequence[bool] | None = None,
    ) -> None:
        if not (0.5 < alpha <= 1 and 0.5 < alpha_end <= 1):
            raise UserError(
                f"agent.alpha and agent.alpha_end must be above 0.5 and at most 1, got {alpha} and {alpha_end}"
            )
        if samples < 1 or not 0 <= curriculum <= 1 or lr <= 0 or beta < 0:
            raise UserError(
                f"agent.samples must be at least 1, agent.curriculum in [0, 1], agent.lr positive and agent.beta "
                f"not negative; got {samples}, {curriculum}, {lr} and {beta}"
            )
        check_choice("agent.baseline", baseline, get_args(Baseline))
        if baseline == "leave_one_out" and samples < 2:
            raise UserError(
                f"agent.baseline=leave_one_out compares an image's samples with each other, so agent.samples must be "
                f"at least 2, got {samples}"
            )
        if total_steps < 1:
            raise UserError(f"train.steps must be at least 1, got {total_steps}")
        K = env.backbone.num_blocks
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            shape = env.observation.shape[1:]
            self.policy: KeepPolicy = policy_network(policy, K, shape, width, pool, initial_keep)
        if start is not None:
            self.policy.start_from(start)
        self.policy.to(env.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.alpha_range, self.beta, self.samples, self.total_steps = (alpha, alpha_end), beta, samples, total_steps
        self.steps_per_block = curriculum * total_steps / K
        self.step = 0
        self.generator = torch.Generator().manual_seed(seed)  # on the CPU, so that a run goes on on any device
        self.baseline = baseline
        num_features = check_policy(self.policy, env.observation[:1], K)
        self.value_head = ValueHead(num_features).to(env.device) if baseline == "value" else None
        groups: list[dict[str, Any]] = [{"params": self.policy.parameters()}]
        if self.value_head is not None:
            groups.append({"params": self.value_head.parameters(), "lr": VALUE_LR * lr})
        self.optimizer = torch.optim.Adam(groups, lr=lr)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: one_cycle(step / total_steps) if schedule == "onecycle" else 1.0
        )
        self.policy.eval()
        self.decision_macs = count_macs(self.policy, env.observation[:1])
        self._free_blocks()

    def update(self, source: BlockSelectionVectorEnv) -> dict[str, Figure]:
        """Sample decisions, score them in one pass (with the greedy one, if that is the baseline), and take a step down
        the loss."""
        self._free_blocks()
        self.policy.train()
        logits_BK, value_B = self.forward_through_ddp(self._forward, source.observation)
        probability_BK = logits_BK.detach().sigmoid()
        keep_SBK = self._sample(probability_BK)
        greedy_BK = self.policy.greedy(logits_BK)

        to_score = [keep_SBK, greedy_BK.unsqueeze(0)] if self.baseline == "greedy" else [keep_SBK]
        outcome = source.score(torch.cat(to_score))
        reward = source.rewards(outcome).view(-1, len(logits_BK))
        reward_SB = reward[: self.samples]
        metrics = {"sampled_reward": figure(reward_SB.mean())}
        value_fit: Tensor | float = 0.0
        if self.baseline == "greedy":
            advantage_SB = greedy_advantage(reward_SB, reward[-1])
            correct_B = outcome.correct_B[-len(logits_BK) :]
            metrics |= {"reward": figure(reward[-1].mean()), "accuracy": figure(correct_B.float().mean())}
        elif self.baseline == "leave_one_out":
            advantage_SB = leave_one_out_advantage(reward_SB)
        elif value_B is not None:
            advantage_SB, value_fit = value_advantage(reward_SB, value_B), value_loss(value_B, reward_SB)
            metrics["value_loss"] = figure(value_fit)
        else:
            advantage_SB = reward_SB

        loss = reinforce_loss(logits_BK, keep_SBK, advantage_SB, self.policy.free_K, self.alpha, self.beta)
        check_finite(self.name, self.step + 1, logits=logits_BK, rewards=reward, loss=loss + value_fit)
        self.optimizer.zero_grad(set_to_none=True)
        (loss + value_fit).backward()
        check_gradients(self.name, self.step + 1, self.optimizer)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        source.advance()

        return metrics | {
            "loss": figure(loss),
            "kept": figure(greedy_BK.sum(1).float().mean()),
            "macs_fraction": (figure(source.costs.of(greedy_BK).mean()) + self.decision_macs) / source.costs.full,
            "entropy": figure(bernoulli_entropy(probability_BK).mean()),
            "free_blocks": figure(self.policy.free_K.sum().double()),
            "lr": float(self.schedule.get_last_lr()[0]),
        }

    @property
    def alpha(self) -> float:
        """Return the bound on sampling probabilities at this update, which moves from ``alpha`` to ``alpha_end``."""
        low, high = self.alpha_range
        return low + (high - low) * min(1.0, self.step / self.total_steps)

    @property
    def trainable_modules(self) -> list[nn.Module]:
        return [self.policy] if self.value_head is None else [self.policy, self.value_head]

    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the policy's logits, float (B, K), and the value head's, if there is one, expected rewards (B,)."""
        features_BD, logits_BK = self.policy.features_and_logits(images)
        return logits_BK, None if self.value_head is None else self.value_head(features_BD)

    def _sample(self, probability_BK: Tensor) -> Tensor:
        """Sample decisions, bool (S, B, K), from the bounded Bernoulli; blocks that are not yet free are kept."""
        B, K = probability_BK.shape
        whole_batch = torch.rand(self.samples, processes.world() * B, K, generator=self.generator)
        uniform = sent(processes.this_process_slice(whole_batch, 1), probability_BK.device)
        return (uniform < bounded(probability_BK, self.alpha)) | ~self.policy.free_K

    def _free_blocks(self) -> None:
        """Free the last e+1 blocks in curriculum epoch e, counted from 0 (paper)."""
        K = len(self.policy.free_K)
        epoch = int(self.step / self.steps_per_block) if self.steps_per_block else K
        self.policy.free_K.copy_(torch.arange(K, device=self.policy.free_K.device) >= K - 1 - epoch)

    def state_dict(self) -> dict[str, Any]:
        head = {} if self.value_head is None else {"value_head": self.value_head.state_dict()}
        return head | {
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policy.load_state_dict(state["policy"])
        if self.value_head is not None:
            self.value_head.load_state_dict(state["value_head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["generator"])
        self.step = state["step"]
