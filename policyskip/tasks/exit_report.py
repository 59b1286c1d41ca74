"""Figures and table of images that left at exits, whatever decided where.

Shapes: M images of a set, N exits.
"""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from policyskip.exits.baselines import (
    LABEL_NATS,
    accuracy_by_exit,
    exit_histogram,
    label_oracle,
    oracle_exit,
    random_exits,
    static_exits,
    static_mix,
)
from policyskip.exits.cache import CachedExits
from policyskip.exits.rules import decisions_at
from policyskip.tasks.margins import half_interval, verdict_on


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


def show_table(summary: dict[str, Any]) -> None:
    """Print a policy beside its last exit, the static exits, random exits at its rates, and the oracle."""

    def get(name: str) -> Any:
        return summary[f"test/{name}"]

    table = Table(title=f"{summary['agent']} on {summary['data']}, test split, seed {summary['seed']}")
    for column in ("", "accuracy", "MACs (millions)", "of full"):
        table.add_column(column, justify="left" if not column else "right")

    def row(name: str, accuracy: float, macs: float, spread: str = "") -> None:
        table.add_row(name, f"{100 * accuracy:.2f} %", f"{macs / 1e6:.2f}{spread}", f"{macs / get('full_macs'):.3f}")

    included = "heads and policy" if get("policy_macs") else "heads"
    own = f"each image its own exit, {included} included"
    row(own, get("accuracy"), get("macs_mean"), f" ± {get('macs_sd') / 1e6:.2f}")
    row("all to the last exit, heads included", get("full_accuracy"), get("full_macs"))
    for n, (accuracy, macs) in enumerate(zip(get("exit_alone_accuracy"), get("exit_alone_macs"), strict=True)):
        row(f"all straight to exit {n}", accuracy, macs)
    row("best fixed exits that cost no more, mixed", get("static_accuracy"), get("static_macs"))
    row("random exits at the same rates", get("random_accuracy"), get("random_macs"))
    row("oracle: the first exit that is right", get("oracle_accuracy"), get("oracle_macs"))
    if summary["agent"] == "distiller":
        name = f"Distiller's criterion, an oracle (sees the label): loss < {LABEL_NATS}"
        row(name, get("label_oracle_accuracy"), get("label_oracle_macs"))
    out = console()
    out.print(table)
    verdict, margin = verdict_on(summary)
    opponent = "the best fixed exits that cost no more"
    out.print(f"Deciding per image {verdict}: {margin} points against {opponent}.")
    alone = get("exit_alone_macs")[-1]
    share = get("macs_mean") / alone
    out.print(f"Without early exits the network costs {alone / 1e6:.2f} M MACs; this is {share:.3f} of it.")
    places = list(zip(get("exit_share"), get("exit_accuracy"), strict=True))
    leaving = ", ".join(f"{100 * share:.1f} %" for share, _ in places)
    right = ", ".join("–" if accuracy is None else f"{100 * accuracy:.1f} %" for _, accuracy in places)
    out.print(f"Images that left at each exit: {leaving}; of these, right: {right}.")
    for warning in summary.get("warnings", []):
        out.print(f"warning: {warning}")


def console() -> Console:
    """Where tables are printed; wide enough for them where the output is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 110)
