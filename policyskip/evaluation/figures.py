"""The figures that a summary states are computed here, from the record of what was decided.

Shapes: N images of a set (M in a cache), K blocks or exits.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from policyskip.evaluation.decisions import Decisions
from policyskip.exits.cache import CachedExits
from policyskip.exits.references import (
    LABEL_NATS,
    accuracy_by_exit,
    exit_histogram,
    label_oracle,
    oracle_exit,
    random_exits,
    static_exits,
)


def block_figures(decisions: Decisions) -> dict[str, Any]:
    """Compute the figures of a policy that decides which blocks run; docs/agents/blockdrop.md explains each of them."""
    kept_N = decisions.ran_NK.sum(1).double()
    figures: dict[str, Any] = {"accuracy": decisions.accuracy}
    if decisions.reward_N is not None:
        figures["reward"] = decisions.reward_N.double().mean().item()
    figures |= {
        "kept_mean": kept_N.mean().item(),
        "kept_sd": kept_N.std(correction=0).item(),
        "blocks": decisions.ran_NK.shape[1],
        "macs_mean": decisions.macs_N.mean().item(),
        "macs_sd": decisions.macs_N.std(correction=0).item(),
        "full_macs": decisions.full_macs,
        "macs_fraction": decisions.macs_fraction,
        "policy_macs": decisions.policy_macs,
        "unique_decisions": len(decisions.ran_NK.unique(dim=0)),
    }
    if decisions.full_correct_N is not None:
        figures["full_accuracy"] = decisions.full_correct_N.double().mean().item()
    if decisions.sees_the_label:
        figures["sees_the_label"] = True
    if decisions.difficulty_N is not None:
        figures["kept_by_difficulty"] = decisions.kept_by_difficulty
    return figures


def class_figures(decisions: Decisions) -> list[dict[str, Any]]:
    """Compute what was decided for the images of each class, a dictionary each; classes without images are left out.

    Each has the class, the number of its images, accuracy, that of the full network (None if it did not run), and the
    MACs as a share of the full network's.
    """
    label_N, C = decisions.label_N, len(decisions.classes)
    images_C = label_N.bincount(minlength=C)

    def means(value_N: Tensor | None) -> list[float | None]:
        if value_N is None:
            return [None] * C
        return (label_N.bincount(value_N.double(), C) / images_C).tolist()

    columns = (
        means(decisions.correct_N),
        means(decisions.full_correct_N),
        means(decisions.macs_N / decisions.full_macs),
    )
    lines = zip(decisions.classes, images_C.tolist(), *columns, strict=True)
    keys = ("class", "images", "accuracy", "full_accuracy", "macs_share")
    return [dict(zip(keys, line, strict=True)) for line in lines if line[1]]


def exit_figures(decisions: Decisions, cache: CachedExits) -> dict[str, Any]:
    """Compute the figures of a policy that decides where images leave, beside each exit alone, random exits and
    oracles.

    Args:
        cache: outputs of all exits for the images that were decided on.
    """
    exit_N, correct_N, K = decisions.exit_N, decisions.correct_N, cache.num_exits
    share_K = exit_histogram(exit_N, K)
    alone_accuracy_K, alone_macs_K = static_exits(cache)
    macs_mean = decisions.macs_N.mean().item()
    random_accuracy, random_macs = random_exits(cache, share_K)
    oracle_accuracy, oracle_macs = cache.judge(oracle_exit(cache.correct_MN))
    label_accuracy, label_macs = cache.judge(label_oracle(cache, [LABEL_NATS] * (K - 1)))
    right_K = accuracy_by_exit(exit_N, correct_N, K).tolist()
    return {
        "accuracy": decisions.accuracy,
        "full_accuracy": cache.correct_MN[:, -1].double().mean().item(),
        "macs_mean": macs_mean,
        "macs_sd": decisions.macs_N.std(correction=0).item(),
        "full_macs": decisions.full_macs,
        "macs_fraction": decisions.macs_fraction,
        "policy_macs": decisions.policy_macs,
        "unique_decisions": int((share_K > 0).sum()),
        "exits": K,
        "exit_share": share_K.tolist(),
        "exit_accuracy": [None if value != value else value for value in right_K],
        "exit_macs": cache.macs_N.tolist(),
        "exit_alone_accuracy": alone_accuracy_K.tolist(),
        "exit_alone_macs": alone_macs_K.tolist(),
        "random_accuracy": random_accuracy,
        "random_macs": random_macs,
        "oracle_accuracy": oracle_accuracy.item(),
        "oracle_macs": oracle_macs.item(),
        "label_oracle_accuracy": label_accuracy.item(),
        "label_oracle_macs": label_macs.item(),
    }
