"""Conditional Deep Learning trains linear heads on a frozen network, and admits them while they save operations.

Panda, Sengupta, Roy, "Conditional Deep Learning for Energy-Efficient and Enhanced Pattern Recognition", DATE 2016
(arXiv 1509.08971). The code of the paper was never published; docs/agents/cdl.md lists what it leaves open and how we
read it.

Shapes: M images of a set, N exits, E early exits (N - 1).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from policyskip.agents.early_exit import EarlyExitAgent, OptimizerName
from policyskip.agents.schedules import ScheduleName
from policyskip.backbones.exits import ExitNetwork
from policyskip.backbones.resnet_exits import ResNetExits
from policyskip.errors import UserError
from policyskip.exits.cache import CachedExits
from policyskip.exits.placement import Stage, admit
from policyskip.exits.rules import rule_named


class CDL(EarlyExitAgent):
    """The agent of Conditional Deep Learning, whose heads learn from the frozen network's features, each on its own.

    Heads are admitted afterwards, stage by stage.

    Args:
        network: a residual network with exits; its backbone is frozen here, and its heads should be linear.
        total_steps, lr, optimizer, weight_decay, schedule: see :class:`EarlyExitAgent`.
        delta: the threshold at which heads are admitted; the threshold that is deployed may be another.
        epsilon: the gain that a head must exceed, in MACs per image (0: it must save something).

    Attributes:
        stages: for each head, its gain and whether it was admitted; empty before :meth:`admit_heads`.

    Raises:
        UserError: a network that is no residual network with exits, or a delta outside (0, 1].
    """

    network: ResNetExits
    trains_trunk = False

    def __init__(
        self,
        network: ExitNetwork,
        total_steps: int,
        lr: float = 3e-3,
        optimizer: OptimizerName = "adam",
        weight_decay: float = 0.0,
        schedule: ScheduleName = "onecycle",
        delta: float = 0.9,
        epsilon: float = 0.0,
    ) -> None:
        if not isinstance(network, ResNetExits):
            raise UserError(
                f"agent=cdl puts heads on a trained residual network (backbone=resnet32_exits), not on {network.name}"
            )
        if not 0 < delta <= 1:
            raise UserError(f"agent.delta must be above 0 and at most 1, got {delta}")
        network.backbone.freeze()
        super().__init__(network, total_steps, lr, optimizer, weight_decay, schedule, "delta", "common")
        self.delta, self.epsilon = delta, epsilon
        self.stages: list[Stage] = []

    def weights(self) -> Tensor:
        weight_N = torch.ones(self.network.num_exits)
        weight_N[-1] = 0  # the network's own head is frozen
        return weight_N

    def network_to_deploy(self, validation: Callable[[], CachedExits]) -> tuple[ExitNetwork, list[str]]:
        """Return the network with the admitted heads and no others, and a line about each head."""
        admitted = self.admit_heads(validation())
        lines = []
        for e, stage in enumerate(self.stages):
            verdict = f"admitted, deployed as exit {admitted.index(e)}" if stage.admitted else "dropped"
            lines.append(
                f"exit {e} after block {self.network.exits[e]}: {stage.resolved} of {stage.resolved + stage.passed} "
                f"validation images leave, gain {stage.gain / 1e6:+.3f} M MACs an image: {verdict}"
            )
        if not admitted:
            lines.append(
                f"warning: no head saves operations at agent.delta={self.delta:g}: the network is deployed without "
                "early exits"
            )
        return self.network.only(admitted), lines

    def admit_heads(self, validation: CachedExits) -> list[int]:
        """Judge the heads one after the other on validation images, and set :attr:`stages`.

        Returns: the indices, among the early exits, of the heads that are admitted; there may be none.
        """
        leave_ME = rule_named("delta").leaves(validation.probability_MNC[:, :-1], self.delta)
        self.stages = admit(leave_ME, validation.costs.trunk_N, validation.costs.head_N, self.epsilon)
        return [e for e, stage in enumerate(self.stages) if stage.admitted]
