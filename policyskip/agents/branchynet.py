"""BranchyNet: the trunk learns first, then trunk and branches together, earlier exits weighing more; images leave by
entropy.

Teerapittayanon, McDanel, Kung, "BranchyNet: Fast Inference via Early Exiting from Deep Neural Networks", ICPR 2016
(arXiv 1709.01686). The paper's networks are in ``backbones/branchynet.py``; this learner trains any network with exits.

Shapes: N exits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from policyskip.agents.early_exit import EarlyExitAgent, OptimizerName
from policyskip.agents.schedules import ScheduleName
from policyskip.backbones.exits import ExitNetwork
from policyskip.errors import UserError


class BranchyNet(EarlyExitAgent):
    """The agent of BranchyNet: its loss is the last exit's alone at first, then ``Σ_n w_n CE_n``.

    Args:
        network, total_steps, lr, optimizer, weight_decay, schedule, rule, search: see :class:`EarlyExitAgent`.
        trunk_share: fraction of the updates in which only the last exit counts (the paper pretrains the main network).
        exit_weights: w_n for each exit; None falls evenly from 1 at the first to 0.3 at the last, the two weights
            that the paper found best for two exits.

    Raises:
        UserError: not one weight for each exit, a negative one, or all 0; or ``trunk_share`` is outside [0, 1).
    """

    def __init__(
        self,
        network: ExitNetwork,
        total_steps: int,
        lr: float = 1e-3,
        optimizer: OptimizerName = "adam",
        weight_decay: float = 0.0,
        schedule: ScheduleName = "constant",
        rule: str = "entropy",
        search: str = "grid",
        trunk_share: float = 0.5,
        exit_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(network, total_steps, lr, optimizer, weight_decay, schedule, rule, search)
        N = network.num_exits
        if not 0 <= trunk_share < 1:
            raise UserError(f"agent.trunk_share must be at least 0 and below 1, got {trunk_share}")
        weights = torch.linspace(1.0, 0.3, N).tolist() if exit_weights is None else list(exit_weights)
        if len(weights) != N or not all(0 <= w < math.inf for w in weights) or max(weights) == 0:
            raise UserError(
                f"agent.exit_weights must give each of the {N} exits a weight, not negative, not all 0; got {weights}"
            )
        self.trunk_steps = round(trunk_share * total_steps)
        self.weight_N = torch.tensor(weights)

    def weights(self) -> Tensor:
        if self.step < self.trunk_steps:
            return torch.eye(len(self.weight_N))[-1]
        return self.weight_N
