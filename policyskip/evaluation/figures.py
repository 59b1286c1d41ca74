"""The figures that a summary states, computed from the record of what was decided.

Shapes: N images, M images of a cache, K blocks, N exits.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from policyskip.exits.cache import CachedExits
from policyskip.exits.references import (
    LABEL_NATS,
    accuracy_by_exit,
    exit_histogram,
    label_oracle,
    oracle_exit,
    random_exits,
    static_exits,
    static_mix,
)
from policyskip.exits.rules import decisions_at
from policyskip.intervals import half_interval


def figures_of(exit_M: Tensor, cache: CachedExits, decision_macs: float = 0.0) -> dict[str, Any]:
    """What leaving at exits int64 (M,) does on a set, beside each static exit, random exits at the same rates, and the
    oracle.

    Args:
        decision_macs: what a policy costs at each exit where it is asked.
    """
    N = cache.num_exits
    correct_M = cache.correct_MN.gather(1, exit_M.unsqueeze(1)).squeeze(1)
    policy_macs_M = decision_macs * decisions_at(exit_M, N)
    macs_M = cache.macs_N[exit_M] + policy_macs_M
    share_N = exit_histogram(exit_M, N)
    alone_accuracy_N, alone_macs_N = static_exits(cache)
    static_M, static_macs = static_mix(cache, macs_M.mean().item())
    difference_M = correct_M.double() - static_M
    random_accuracy, random_macs = random_exits(cache, share_N)
    oracle_accuracy, oracle_macs = cache.judge(oracle_exit(cache.correct_MN))
    label_accuracy, label_macs = cache.judge(label_oracle(cache, [LABEL_NATS] * (N - 1)))
    return {
        "accuracy": correct_M.double().mean().item(),
        "full_accuracy": cache.correct_MN[:, -1].double().mean().item(),
        "macs_mean": macs_M.mean().item(),
        "macs_sd": macs_M.std(correction=0).item(),
        "full_macs": cache.costs.full,
        "macs_fraction": macs_M.mean().item() / cache.costs.full,
        "policy_macs": policy_macs_M.mean().item(),
        "unique_decisions": int((share_N > 0).sum()),
        "exits": N,
        "exit_share": share_N.tolist(),
        "exit_accuracy": [
            None if value != value else value for value in accuracy_by_exit(exit_M, correct_M, N).tolist()
        ],
        "exit_macs": cache.macs_N.tolist(),
        "exit_alone_accuracy": alone_accuracy_N.tolist(),
        "exit_alone_macs": alone_macs_N.tolist(),
        "static_accuracy": static_M.mean().item(),
        "static_macs": static_macs,
        "static_margin": difference_M.mean().item(),
        "static_margin_ci95": half_interval(difference_M),
        "random_accuracy": random_accuracy,
        "random_macs": random_macs,
        "oracle_accuracy": oracle_accuracy.item(),
        "oracle_macs": oracle_macs.item(),
        "label_oracle_accuracy": label_accuracy.item(),
        "label_oracle_macs": label_macs.item(),
    }
