"""The policy of thresholds: an image leaves at the first exit where a rule is met.

Shapes: B images, E early exits (one less than the N exits), C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policyskip.envs.exit_sources import split_observation
from policyskip.exits.rules import check_thresholds, rule_named


class ThresholdPolicy(nn.Module):
    """Leave at the first exit where the rule is met; whoever comes to the last exit leaves there.

    Args:
        rule: confidence, entropy or delta (see ``exits/rules.py``).
        thresholds: one for each exit but the last.
    """

    threshold_E: Tensor

    def __init__(self, rule: str, thresholds: Sequence[float]) -> None:
        super().__init__()
        self.rule = rule_named(rule)
        check_thresholds(thresholds, len(thresholds) + 1)
        self.register_buffer("threshold_E", torch.tensor(list(thresholds), dtype=torch.float64))

    def leave(self, n: int, logits_BC: Tensor, rows: Tensor) -> Tensor:
        """Which of the images at exit n leave, bool (B',): what :func:`~policyskip.backbones.exits.run_until` asks."""
        return self.rule.leaves(logits_BC.float().softmax(-1), self.threshold_E[n])

    def decide(self, observation: Tensor) -> Tensor:
        """The same for observations of ``policyskip/EarlyExit-v0``, float32 (B, C + 3 + N): bool (B,)."""
        num_exits = len(self.threshold_E) + 1
        seen = split_observation(observation, observation.shape[1] - 3 - num_exits)
        threshold_B = F.pad(self.threshold_E, (0, 1))[seen.exit_B]
        return self.rule.leaves(seen.probability_BC, threshold_B) | (seen.exit_B == num_exits - 1)
