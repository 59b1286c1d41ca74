"""MSDNet's training: every exit has the same weight in the loss, and images leave by confidence.

Huang et al., "Multi-Scale Dense Networks for Resource Efficient Image Classification", ICLR 2018 (arXiv 1703.09844).
The network itself is ``backbones/msdnet.py``; this learner trains any network with exits.

Shapes: N exits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from policyskip.agents.early_exit import EarlyExitAgent, OptimizerName
from policyskip.agents.schedules import ScheduleName
from policyskip.backbones.exits import ExitNetwork


class MSDNetAgent(EarlyExitAgent):
    """The agent of MSDNet: its loss is the plain sum of the exits' cross-entropies.

    Its thresholds on the top probability are searched by quota, for budgeted batch classification.

    Arguments: see :class:`EarlyExitAgent`. The defaults are the paper's.
    """

    name = "msdnet"

    def __init__(
        self,
        network: ExitNetwork,
        total_steps: int,
        lr: float = 0.1,
        optimizer: OptimizerName = "sgd",
        weight_decay: float = 1e-4,
        schedule: ScheduleName = "steps",
        rule: str = "confidence",
        search: str = "quota",
    ) -> None:
        super().__init__(network, total_steps, lr, optimizer, weight_decay, schedule, rule, search)

    def weights(self) -> Tensor:
        return torch.ones(self.network.num_exits)
