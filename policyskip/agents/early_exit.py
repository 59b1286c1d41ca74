"""The family ``thresholds``: agents that train a network with exits by a joint loss, and a threshold at each exit.

They learn by supervision from a feed of labelled images. The thresholds are chosen afterwards, on the cached outputs of
validation images (``exits/calibration.py``), and can be chosen again without learning.

Shapes: B images, N exits, E early exits (N - 1), C classes.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policyskip.agents.base import Agent
from policyskip.agents.schedules import SCHEDULES, ScheduleName
from policyskip.backbones.exits import ExitNetwork
from policyskip.data import Feed
from policyskip.errors import UserError
from policyskip.exits.cache import CachedExits
from policyskip.exits.calibration import Curve, check_search, curve_of
from policyskip.exits.rules import rule_named
from policyskip.finite import check_finite, check_gradients
from policyskip.parallel.data_parallel import Divisible
from policyskip.parallel.deferred import Figure, figure, sent
from policyskip.policies.thresholds import ThresholdPolicy

OptimizerName = Literal["sgd", "adam"]


def joint_loss(logits_BNC: Tensor, label_B: Tensor, weight_N: Tensor) -> Tensor:
    """Compute ``Σ_n w_n CE_n``: the weighted sum over exits of the mean cross-entropy (nats), a scalar.

    Args:
        logits_BNC: float (B, N, C).
        label_B: int64 (B,).
        weight_N: float (N,); an exit of weight 0 gets no gradient.

    Raises:
        ValueError: the shapes do not belong together.
    """
    B, N, _ = logits_BNC.shape
    if label_B.shape != (B,) or weight_N.shape != (N,):
        shapes = [tuple(t.shape) for t in (logits_BNC, label_B, weight_N)]
        raise ValueError(f"expected logits (B, N, C), labels (B,), weights (N,); got {shapes}")
    entropy_NB = torch.stack([F.cross_entropy(logits, label_B, reduction="none") for logits in logits_BNC.unbind(1)])
    return weight_N @ entropy_NB.mean(1)


class EarlyExitAgent(Agent, Divisible):
    """An agent that trains a network to classify at every exit, and lets images leave by a rule.

    A subclass defines :meth:`weights`.

    Args:
        network: the network with exits; its parameters learn, except for those that are frozen.
        total_steps: learning updates of the whole run; the schedule scales with it.
        lr: highest learning rate.
        optimizer: "sgd" (Nesterov momentum 0.9) or "adam".
        weight_decay: of the optimizer.
        schedule: "onecycle", "steps" (divided by 10 at half and at three quarters, as MSDNet is trained) or "constant".
        rule: the rule by which images leave: confidence, entropy or delta (see ``exits/rules.py``).
        search: how thresholds are searched: quota, grid or common (see ``exits/calibration.py``).

    Attributes:
        trains_trunk: whether the trunk learns with the heads; if not, the heads alone learn.
        policy: None until thresholds have been chosen.
        decision_macs: 0, because the network's exit costs include the heads.

    Raises:
        UserError: a value that is not allowed, or a network of which every parameter is frozen.
    """

    family = "thresholds"
    trains_network = True
    trains_trunk: ClassVar[bool] = True
    environments = ("early_exit",)
    policy: ThresholdPolicy | None  # type: ignore[assignment]  # there is none before thresholds are chosen
    decision_macs = 0.0

    def __init__(
        self,
        network: ExitNetwork,
        total_steps: int,
        lr: float,
        optimizer: OptimizerName,
        weight_decay: float,
        schedule: ScheduleName,
        rule: str,
        search: str,
    ) -> None:
        if not (0 < lr < math.inf and 0 <= weight_decay < math.inf):
            raise UserError(
                f"agent.lr must be positive and agent.weight_decay not negative, got {lr} and {weight_decay}"
            )
        if schedule not in SCHEDULES or optimizer not in ("sgd", "adam"):
            raise UserError(
                f"agent.schedule must be one of {', '.join(SCHEDULES)} and agent.optimizer sgd or adam, "
                f"got {schedule!r} and {optimizer!r}"
            )
        rule_named(rule)
        check_search(rule, search, network.num_exits)
        self.network, self.total_steps, self.rule, self.search = network, total_steps, rule, search
        self.policy = None
        self.step = 0
        trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
        if not trainable:
            raise UserError("nothing is left to learn: every parameter of the network is frozen")
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(trainable, lr, momentum=0.9, weight_decay=weight_decay, nesterov=True)
            if optimizer == "sgd"
            else torch.optim.Adam(trainable, lr, weight_decay=weight_decay)
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: SCHEDULES[schedule](step / total_steps)
        )

    @abstractmethod
    def weights(self) -> Tensor:
        """Return the weight of each exit's loss at this update, float (N,)."""

    def update(self, source: Feed) -> dict[str, Figure]:
        """Take one step down the joint loss on the batch that the feed shows."""
        batch = source.batch
        self.network.train()
        logits_BNC = self.forward_through_ddp(self.network, batch.images)
        weight_N = sent(self.weights().to(logits_BNC.dtype), logits_BNC.device)
        loss = joint_loss(logits_BNC, batch.label_B, weight_N)
        check_finite(self.name, self.step + 1, logits=logits_BNC, loss=loss)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        check_gradients(self.name, self.step + 1, self.optimizer)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        source.advance()
        correct_N = (logits_BNC.argmax(-1) == batch.label_B.unsqueeze(1)).float().mean(0)
        metrics = {"loss": figure(loss), "accuracy": figure(correct_N[-1]), "lr": self.schedule.get_last_lr()[0]}
        return metrics | {f"accuracy_exit{n}": figure(accuracy) for n, accuracy in enumerate(correct_N.unbind())}

    @property
    def trainable_modules(self) -> list[nn.Module]:
        return [self.network]

    def act(self, observation: Tensor) -> Tensor:
        """Decide for observations of ``policyskip/EarlyExit-v0``, float32 (B, C + 3 + N): bool (B,), True leaves.

        Raises:
            UserError: no thresholds have been chosen yet.
        """
        if self.policy is None:
            raise UserError("this agent has no thresholds yet; calibrate it first")
        return self.policy.decide(observation)

    def network_to_deploy(self, validation: Callable[[], CachedExits]) -> tuple[ExitNetwork, list[str]]:
        """Return the network with the exits that are deployed, and lines to print about them: all exits, and no line.

        Args:
            validation: computes the cached outputs of validation images, for agents that choose by them.
        """
        return self.network, []

    def curve(self, validation: CachedExits) -> Curve:
        """Search thresholds on the cached outputs of validation images: return the curve to choose a point from."""
        return curve_of(validation, self.rule, self.search)

    def state_dict(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step = state["step"]
