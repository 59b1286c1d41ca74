"""Distiller's early exit: every early exit has a weight in the loss, and the last exit has what is left of 1.

Zmora et al., "Neural Network Distiller", 2019 (arXiv 1910.12232). Distiller's published criterion compares the
cross-entropy *with the label* to a threshold, which no deployed system can: here that is
``exits.references.label_oracle``, which is reported as an oracle, and images leave by entropy or confidence.

Shapes: N exits, E early exits (N - 1).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from policyskip.agents.early_exit import EarlyExitAgent, OptimizerName
from policyskip.agents.schedules import ScheduleName
from policyskip.backbones.exits import ExitNetwork
from policyskip.errors import UserError


class Distiller(EarlyExitAgent):
    """The agent of Distiller: its loss is ``Σ_k w_k CE_k + (1 - Σ_k w_k) CE_last`` over the early exits k.

    Args:
        network, total_steps, lr, optimizer, weight_decay, schedule, rule, search: see :class:`EarlyExitAgent`.
        lossweights: w_k for each early exit (Distiller's ``--earlyexit_lossweights``); their sum is below 1.
            None gives all exits the same weight.

    Raises:
        UserError: not one weight in (0, 1) for each early exit, or weights that sum to 1 or more.
    """

    def __init__(
        self,
        network: ExitNetwork,
        total_steps: int,
        lr: float = 0.1,
        optimizer: OptimizerName = "sgd",
        weight_decay: float = 1e-4,
        schedule: ScheduleName = "steps",
        rule: str = "entropy",
        search: str = "grid",
        lossweights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(network, total_steps, lr, optimizer, weight_decay, schedule, rule, search)
        E = network.num_exits - 1
        weights = [1 / (E + 1)] * E if lossweights is None else list(lossweights)
        if len(weights) != E or any(not 0 < weight < 1 for weight in weights):
            raise UserError(
                f"agent.lossweights must give each of the {E} early exits a weight above 0 and below 1 "
                f"(the last exit gets what is left of 1), got {weights}"
            )
        if sum(weights) >= 1:
            raise UserError(
                f"agent.lossweights must sum to less than 1, or nothing is left for the last exit: {weights}"
            )
        self.weight_N = torch.tensor([*weights, 1 - sum(weights)])

    def weights(self) -> Tensor:
        return self.weight_N
