"""The tables that a run prints at its end."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from policyskip.exits.references import (
    LABEL_NATS,
)


def show_exit_table(summary: dict[str, Any]) -> None:
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


def verdict_on(summary: dict[str, Any]) -> tuple[str, str]:
    """Whether deciding per image pays against a fixed choice, and by how many points, as text."""
    margin, half = 100 * summary["test/static_margin"], summary["test/static_margin_ci95"]
    if half is None:
        return "cannot be judged by one image", f"{margin:+.2f} ± –"
    half *= 100
    verdict = "pays" if margin > half else "does not pay" if margin < -half else "makes no clear difference"
    return verdict, f"{margin:+.2f} ± {half:.2f}"


def show_block_table(summary: dict[str, Any]) -> None:
    """Print the policy beside the full network and the best static choice of equal cost."""
    from rich.console import Console
    from rich.table import Table

    def get(name: str) -> Any:
        return summary[f"test/{name}"]

    table = Table(title=f"{summary['agent']} on {summary['data']}, test split, seed {summary['seed']}")
    for column in ("", "accuracy", "blocks kept", "MACs (millions)", "of full", "decisions"):
        table.add_column(column, justify="left" if not column else "right")
    full, oracle = get("full_macs"), summary.get("test/sees_the_label", False)

    def row(name: str, accuracy: float, kept: str, macs: float, spread: str, decisions: str) -> None:
        table.add_row(
            name, f"{100 * accuracy:.2f} %", kept, f"{macs / 1e6:.2f}{spread}", f"{macs / full:.3f}", decisions
        )

    row(
        f"{summary['agent']} (sees the label)" if oracle else "policy, its own cost included",
        get("accuracy"),
        f"{get('kept_mean'):.2f} ± {get('kept_sd'):.2f}",
        get("macs_mean"),
        f" ± {get('macs_sd') / 1e6:.2f}",
        str(get("unique_decisions")),
    )
    row("full network", get("full_accuracy"), f"{get('blocks')}", full, "", "1")
    if "test/static_accuracy" in summary:
        sets = str(len(get("static_sets")))
        row(
            "best static choice of equal cost",
            get("static_accuracy"),
            f"{get('static_blocks'):.2f}",
            get("static_macs"),
            "",
            sets,
        )
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(table)
    if "test/static_accuracy" in summary:
        verdict, margin = verdict_on(summary)
        told = f"Deciding per image {verdict}" if summary["steps"] else f"{summary['agent']}, which learns nothing"
        console.print(
            f"{told}{', but sees the label' if oracle else ''}: {margin} points "
            "against the best static choice of equal cost"
            + ("." if get("static_search_finished") else " (its search ran out of front.budget).")
        )
    if "test/kept_by_difficulty" in summary:
        quarters = ", ".join("–" if kept is None else f"{kept:.1f}" for kept in get("kept_by_difficulty"))
        console.print(f"Blocks kept, from the easiest quarter of the images to the hardest: {quarters}.")
    for warning in summary.get("warnings", []):
        console.print(f"warning: {warning}")
