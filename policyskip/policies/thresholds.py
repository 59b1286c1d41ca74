"""The policy of thresholds: an image leaves at the first exit where a rule is met.

Shapes: B images, B' of them still in the network, E early exits (one less than the N exits), C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policyskip.envs.exit_sources import split_observation
from policyskip.exits.rules import check_thresholds, rule_named


class ThresholdPolicy(nn.Module):
    """A policy under which an image leaves at the first exit where a rule is met, or else at the last exit.

    Args:
        rule: the rule's name: confidence, entropy, delta, or one of the user's own (see ``exits/rules.py``).
        thresholds: one for each exit but the last.

    Raises:
        UserError: there is no such rule, or a threshold is NaN.
    """

    threshold_E: Tensor

    def __init__(self, rule: str, thresholds: Sequence[float]) -> None:
        super().__init__()
        self.rule = rule_named(rule)
        check_thresholds(thresholds, len(thresholds) + 1)
        self.register_buffer("threshold_E", torch.tensor(list(thresholds), dtype=torch.float64))

    def leave(self, n: int, logits_BC: Tensor, rows: Tensor) -> Tensor:
        """Return which of the B' images at exit n leave, bool (B',), for :func:`~policyskip.backbones.exits.run_until`.

        Args:
            n: the exit, counted from 0.
            logits_BC: float (B', C), the exit's.
            rows: int64 (B',), the images' rows in the batch; not used.
        """
        return self.rule.leaves(logits_BC.float().softmax(-1), self.threshold_E[n])

    def decide(self, observation: Tensor) -> Tensor:
        """Decide for observations of ``policyskip/EarlyExit-v0``, float32 (B, C + 3 + N): bool (B,), True leaves."""
        num_exits = len(self.threshold_E) + 1
        parts = split_observation(observation, observation.shape[1] - 3 - num_exits)
        threshold_B = F.pad(self.threshold_E, (0, 1))[parts.exit_B]
        return self.rule.leaves(parts.probability_BC, threshold_B) | (parts.exit_B == num_exits - 1)
