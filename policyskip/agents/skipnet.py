"""SkipNet: before every block but the first, a gate sees the features and decides whether the block runs.

Wang, Yu, Dou, Darrell, Gonzalez, "SkipNet: Learning Dynamic Routing in Convolutional Networks", ECCV 2018. Training is
supervised first, with hard gates and straight-through gradients; then hybrid, with cross-entropy for the blocks and
REINFORCE for the gates. docs/agents/skipnet.md lists where the published code differs.

Shapes: B images, K blocks, G gates (K - 1: the first block always runs), C classes.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policyskip.agents.base import Agent
from policyskip.agents.schedules import SCHEDULES, ScheduleName
from policyskip.backbones.base import Backbone
from policyskip.backbones.checkpoints import seeded
from policyskip.backbones.costs import count_costs
from policyskip.backbones.gated import GatedNetwork, GatedRun
from policyskip.data import Feed
from policyskip.errors import UserError, check_choice
from policyskip.finite import check_finite, check_gradients
from policyskip.parallel import processes
from policyskip.parallel.data_parallel import Divisible
from policyskip.parallel.deferred import Figure, figure, sent


def skipnet_returns(ce_B: Tensor, keep_BG: Tensor, cost_G: Tensor, alpha: float) -> Tensor:
    """Compute ``R_i = −CE + (α/G) Σ_{j≥i} (1 − g_j) C_j``: the part of −L that decision i can change (paper, section
    3.3).

    The first column is the whole objective: ``−L(g, x)`` with ``L = CE − (α/G) Σ_i (1 − g_i) C_i``.

    Args:
        ce_B: float (B,), cross-entropy of each image in nats; no gradient flows into it.
        keep_BG: bool (B, G), the decisions g.
        cost_G: float (G,), the cost C of each block, 1 on average.
        alpha: the worth of skipping every gated block, in nats.

    Returns: float (B, G). An image's row depends on that image alone.

    Raises:
        ValueError: other shapes, or decisions that are not bool.
    """
    B, G = keep_BG.shape
    if ce_B.shape != (B,) or cost_G.shape != (G,) or keep_BG.dtype != torch.bool:
        shapes = [tuple(t.shape) for t in (ce_B, keep_BG, cost_G)]
        raise ValueError(f"expected cross-entropy (B,), keep bool (B, G), cost (G,); got {shapes}, {keep_BG.dtype}")
    saved_BG = (alpha / G) * (~keep_BG * cost_G)
    return saved_BG.flip(1).cumsum(1).flip(1) - ce_B.detach().unsqueeze(1)


def log_probability(gate_BG: Tensor, keep_BG: Tensor) -> Tensor:
    """Compute ``log p(g_i | x)`` of each decision, float (B, G).

    Args:
        gate_BG: float (B, G), the gates' logits.
        keep_BG: bool (B, G), the decisions g.

    Raises:
        ValueError: the shapes differ, or have another rank.
    """
    if gate_BG.shape != keep_BG.shape or gate_BG.dim() != 2:
        raise ValueError(f"expected gates and keep (B, G); got {tuple(gate_BG.shape)} and {tuple(keep_BG.shape)}")
    return torch.where(keep_BG, F.logsigmoid(gate_BG), F.logsigmoid(-gate_BG))


def hybrid_loss(
    ce_B: Tensor, log_probability_BG: Tensor, return_BG: Tensor, baseline_BG: Tensor, rl_weight: float
) -> Tensor:
    """Compute ``CE − w Σ_i (R_i − b_i) log p(g_i)``, mean over images: with w = 1 its expected gradient is that of E[L]
    (paper, section 3.3).

    Args:
        ce_B: float (B,), cross-entropy of each image in nats.
        log_probability_BG: float (B, G), of the sampled decisions.
        return_BG: float (B, G), of the same decisions; no gradient flows into it.
        baseline_BG: float (B, G), which must not depend on the image's own sample; 0 means no baseline.
        rl_weight: w.

    Returns: a scalar.

    Raises:
        ValueError: the shapes do not belong together.
    """
    B, G = return_BG.shape
    if ce_B.shape != (B,) or log_probability_BG.shape != (B, G) or baseline_BG.shape != (B, G):
        shapes = [tuple(t.shape) for t in (ce_B, log_probability_BG, return_BG, baseline_BG)]
        raise ValueError(f"expected cross-entropy (B,), log-probability, return and baseline (B, G); got {shapes}")
    advantage_BG = (return_BG - baseline_BG).detach()
    return (ce_B - rl_weight * (advantage_BG * log_probability_BG).sum(1)).mean()


class SkipNet(Agent, Divisible):
    """An agent that puts gates on a network and trains both, in two stages, from labelled images.

    The defaults here are the paper's; those of ``configs/agent/skipnet.yaml`` learn in minutes from a trained network.

    Args:
        backbone: the network to put gates on; it is copied, and stays as it is.
        image_shape: (3, H, W).
        total_steps: updates of both stages.
        seed: decides the gates' initial weights and the samples.
        gate: "rnn", "ff1" or "ff2" (see ``backbones/gates.py``).
        frozen: whether the gates alone learn.
        initial_keep: approximate probability with which a fresh gate keeps its block.
        supervised: fraction of the updates that belong to stage one; the others belong to stage two.
        alpha: the worth of skipping every gated block, in nats.
        cost: "ones" (C_i = 1, paper) or "macs" (C_i = the block's MACs, over their mean).
        baseline: "none" (paper) or "greedy" (the return of the image's own greedy decisions, which takes a second pass
            without gradients).
        rl_weight: weight of the REINFORCE term; 1 follows the objective's gradient.
        lr, hybrid_lr: highest learning rate in stage one and in stage two.
        backbone_lr: the backbone's learning rate, as a fraction of the gates'.
        optimizer: "sgd" (momentum 0.9) or "adam".
        weight_decay: of the optimizer.
        schedule: "onecycle", "steps" or "constant", within each stage.

    Attributes:
        network: the copy of the backbone, with its gates.
        costs: MACs of the network's blocks.
        decision_macs: MACs of all gates, which run for every image.

    Raises:
        UserError: a value that is not allowed.
    """

    family = "gates"
    trains_network = True
    environments = ()
    may_skip_parameters = True

    def __init__(
        self,
        backbone: Backbone,
        image_shape: tuple[int, int, int],
        total_steps: int,
        seed: int = 0,
        gate: Literal["rnn", "ff1", "ff2"] = "rnn",
        frozen: bool = False,
        initial_keep: float = 0.5,
        supervised: float = 64 / 74,
        alpha: float = 0.1,
        cost: Literal["ones", "macs"] = "ones",
        baseline: Literal["none", "greedy"] = "none",
        rl_weight: float = 1.0,
        lr: float = 0.1,
        hybrid_lr: float = 1e-4,
        backbone_lr: float = 1.0,
        optimizer: Literal["sgd", "adam"] = "sgd",
        weight_decay: float = 1e-4,
        schedule: ScheduleName = "steps",
    ) -> None:
        check_choice("agent.cost", cost, ("ones", "macs"))
        check_choice("agent.baseline", baseline, ("none", "greedy"))
        check_choice("agent.optimizer", optimizer, ("sgd", "adam"))
        check_choice("agent.schedule", schedule, SCHEDULES)
        if min(lr, hybrid_lr, backbone_lr) <= 0 or min(weight_decay, rl_weight, alpha) < 0 or not 0 <= supervised <= 1:
            raise UserError(
                "agent.lr, agent.hybrid_lr and agent.backbone_lr must be positive, agent.weight_decay, agent.rl_weight "
                f"and agent.alpha not negative, and agent.supervised in [0, 1]; got {lr}, {hybrid_lr}, {backbone_lr}, "
                f"{weight_decay}, {rl_weight}, {alpha} and {supervised}"
            )
        copied = copy.deepcopy(backbone).requires_grad_(True)
        copied.frozen = False
        if frozen:
            copied.freeze()
        with seeded(seed):
            self.network = GatedNetwork(copied, gate, image_shape, initial_keep)
        self.costs = count_costs(copied, image_shape)
        self.decision_macs = self.network.gate_macs
        macs_G = self.costs.block_K[1:].float().to(copied.mean.device)
        self.cost_G = macs_G / macs_G.mean() if cost == "macs" else torch.ones_like(macs_G)
        self.alpha, self.baseline, self.rl_weight = alpha, baseline, rl_weight
        self.supervised_steps = round(supervised * total_steps)
        self.step = 0
        self.generator = torch.Generator().manual_seed(seed)  # on the CPU, so that a run goes on on any device
        groups: list[dict[str, Any]] = [{"params": list(self.network.gates.parameters()), "lr": lr}]
        if not frozen:
            groups.append({"params": list(copied.parameters()), "lr": lr * backbone_lr})
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(groups, momentum=0.9, weight_decay=weight_decay)
            if optimizer == "sgd"
            else torch.optim.Adam(groups, weight_decay=weight_decay)
        )
        hybrid_steps = max(1, total_steps - self.supervised_steps)

        def rate_factor(step: int) -> float:
            """Return the learning rate of an update as a multiple of the highest rate in stage one."""
            if step < self.supervised_steps:
                return SCHEDULES[schedule](step / self.supervised_steps)
            return hybrid_lr / lr * SCHEDULES[schedule]((step - self.supervised_steps) / hybrid_steps)

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate_factor)

    def update(self, source: Feed) -> dict[str, Figure]:
        """Take one step on the batch that the feed shows, in the stage that this update belongs to."""
        images, label_B = source.batch.images, source.batch.label_B
        hybrid = self.step >= self.supervised_steps
        baseline_BG = self._baseline(images, label_B) if hybrid else None
        self.network.train()
        run = (
            self.forward_through_ddp(self.network.sampled, images, self._uniform(len(images)))
            if hybrid
            else self.forward_through_ddp(self.network.straight_through, images)
        )
        keep_BG = run.keep_BK[:, 1:]
        ce_B = F.cross_entropy(run.logits_BC, label_B, reduction="none")
        return_BG = self.returns(ce_B, run)
        if baseline_BG is None:
            loss = ce_B.mean()
        else:
            log_probability_BG = log_probability(run.gate_BG, keep_BG)
            loss = hybrid_loss(ce_B, log_probability_BG, return_BG, baseline_BG, self.rl_weight)
        check_finite(self.name, self.step + 1, logits=run.logits_BC, gates=run.gate_BG, loss=loss)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        check_gradients(self.name, self.step + 1, self.optimizer)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        source.advance()
        return {
            "loss": figure(loss),
            "cross_entropy": figure(ce_B.mean()),
            "reward": figure(return_BG[:, 0].mean()),
            "accuracy": figure((run.logits_BC.argmax(1) == label_B).float().mean()),
            "kept": figure(run.keep_BK.sum(1).float().mean()),
            "keep_probability": figure(run.gate_BG.sigmoid().mean()),
            "hybrid": float(hybrid),
            "lr": float(self.schedule.get_last_lr()[0]),
        }

    @property
    def trainable_modules(self) -> list[nn.Module]:
        return [self.network]

    @torch.no_grad()
    def act(self, observation: Tensor) -> Tensor:
        """Decide greedily for images uint8 (B, 3, H, W): bool (B, K), without gradients, in evaluation mode."""
        return self.network.eval().greedy(observation).keep_BK

    def returns(self, ce_B: Tensor, run: GatedRun) -> Tensor:
        """Compute the return of each gate's decision, float (B, G): the larger it is, the better the decision was.

        A subclass may define other returns. These are :func:`skipnet_returns`, whose column 0 is −L.

        Args:
            ce_B: float (B,), cross-entropy of each image in nats.
            run: the pass; gate g decided ``run.keep_BK[:, g + 1]``, as block 0 always runs.
        """
        return skipnet_returns(ce_B, run.keep_BK[:, 1:], self.cost_G, self.alpha)

    @torch.no_grad()
    def _baseline(self, images: Tensor, label_B: Tensor) -> Tensor:
        """Compute the baseline b, float (B, G): the returns of the greedy decisions (self-critical), or 0."""
        if self.baseline == "none":
            return torch.zeros(len(images), len(self.cost_G), device=images.device)
        run = self.network.eval().greedy(images)
        return self.returns(F.cross_entropy(run.logits_BC, label_B, reduction="none"), run)

    def _uniform(self, B: int) -> Tensor:
        """Draw uniform numbers (B, G), for this process's slice of the whole batch."""
        whole_batch = torch.rand(processes.world() * B, len(self.cost_G), generator=self.generator)
        return sent(processes.this_process_slice(whole_batch), self.cost_G.device)

    def state_dict(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["generator"])
        self.step = state["step"]
