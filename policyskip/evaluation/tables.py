"""The tables that a run prints at its end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from policyskip.exits.references import LABEL_NATS
from policyskip.texts import LONGEST_LINE, one_line
from policyskip.typed.streams import line_width


class PlainConsole(Console):
    """A console on which every text is one line, shown as it is: no markup, and what cannot be seen is escaped."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a line of a table, a cell, a title or a heading, ready to be printed."""
        options |= {"markup": False, "emoji": False}
        return super().render_str(one_line(text, LONGEST_LINE), **options)


def console(width: int = 110) -> Console:
    """Make the console that everything is printed on which can hold text of strangers.

    Args:
        width: of the lines, where the output is no terminal and ``COLUMNS`` says nothing.
    """
    return PlainConsole(width=line_width(width))


def verdict(summary: dict[str, Any]) -> tuple[str, str]:
    """Say whether deciding per image pays against the best fixed choice, and by how many points: two texts."""
    margin, half = 100 * summary["test/static_margin"], summary["test/static_margin_ci95"]
    if half is None:
        return "cannot be judged by one image", f"{margin:+z.2f} ± –"
    half *= 100
    text = "pays" if margin > half else "does not pay" if margin < -half else "makes no clear difference"
    return text, f"{margin:+z.2f} ± {half:.2f}"


def static_choice(test: Mapping[str, Any]) -> str:
    """Name the static choice that a policy is compared with: its cost is equal only if no end of the front is nearer.

    Args:
        test: figures of a split.
    """
    cost, policy = test["static_macs"], test["macs_mean"]
    if abs(cost - policy) <= 0.005 * policy:
        return "best static choice of equal cost"
    return "best static choice, which costs less" if cost < policy else "cheapest static choice, which costs more"


def show_blocks(summary: dict[str, Any]) -> None:
    """Print a policy that skips blocks beside the full network and the best static choice of equal cost."""
    test = _figures_on_test(summary)
    sees_the_label, full_macs = test.get("sees_the_label", False), test["full_macs"]
    label = f"{summary['agent']} (sees the label)" if sees_the_label else "policy, its own cost included"
    kept = f"{test['kept_mean']:.2f} ± {test['kept_sd']:.2f}"
    accuracy, cost = _percent(test["accuracy"]), _cost(test["macs_mean"], full_macs, test["macs_sd"])
    rows = [(label, accuracy, kept, *cost, str(test["unique_decisions"]))]
    full = (_percent(test["full_accuracy"]), f"{test['blocks']}", *_cost(full_macs, full_macs))
    rows.append(("full network", *full, "1"))
    if "static_accuracy" in test:
        fixed = (_percent(test["static_accuracy"]), f"{test['static_blocks']:.2f}")
        cost = _cost(test["static_macs"], full_macs)
        rows.append((static_choice(test), *fixed, *cost, str(len(test["static_sets"]))))
    columns = ("", "accuracy", "blocks kept", "MACs (millions)", "of full", "decisions")
    lines = []
    if "static_accuracy" in test:
        text, margin = verdict(summary)
        subject = f"Deciding per image {text}" if summary["steps"] else f"{summary['agent']}, which learns nothing"
        subject += ", but sees the label" if sees_the_label else ""
        name = static_choice(test)
        end = "." if test["static_search_finished"] else " (its search ran out of front.budget)."
        lines.append(f"{subject}: {margin} points against the {name}{end}")
    if "kept_by_difficulty" in test:
        quarters = ", ".join("–" if kept is None else f"{kept:.1f}" for kept in test["kept_by_difficulty"])
        lines.append(f"Blocks kept, from the easiest quarter of the images to the hardest: {quarters}.")
    _show(summary, columns, rows, lines)


def show_exits(summary: dict[str, Any]) -> None:
    """Print a policy beside its last exit, the fixed exits, random exits at its rates, and the oracle."""
    test = _figures_on_test(summary)
    included = "heads and policy" if test["policy_macs"] else "heads"
    whole: list[tuple[str, float, float]] = [
        ("all to the last exit, heads included", test["full_accuracy"], test["full_macs"])
    ]
    alone = test["exit_alone_macs"][-1]
    if "fixed_names" in test:  # the network has fixed choices beside its exits, and the last of them is its whole
        columns = (test["fixed_names"], test["fixed_accuracy"], test["fixed_macs"])
        whole, alone = list(zip(*columns, strict=True))[::-1], test["full_macs"]
    references = [
        *whole,
        *(
            (f"all straight to exit {n}", accuracy, macs)
            for n, (accuracy, macs) in enumerate(zip(test["exit_alone_accuracy"], test["exit_alone_macs"], strict=True))
        ),
        ("best fixed exits that cost no more, mixed", test["static_accuracy"], test["static_macs"]),
        ("random exits at the same rates", test["random_accuracy"], test["random_macs"]),
        ("oracle: the first exit that is right", test["oracle_accuracy"], test["oracle_macs"]),
    ]
    if summary["agent"] == "distiller":
        label = f"Distiller's criterion, an oracle (sees the label): loss < {LABEL_NATS}"
        references.append((label, test["label_oracle_accuracy"], test["label_oracle_macs"]))
    full_macs = test["full_macs"]
    cost = _cost(test["macs_mean"], full_macs, test["macs_sd"])
    rows = [(f"each image its own exit, {included} included", _percent(test["accuracy"]), *cost)]
    rows += [(label, _percent(accuracy), *_cost(macs, full_macs)) for label, accuracy, macs in references]
    text, margin = verdict(summary)
    leaving = ", ".join(f"{100 * share:.1f} %" for share in test["exit_share"])
    right = ", ".join("–" if accuracy is None else f"{100 * accuracy:.1f} %" for accuracy in test["exit_accuracy"])
    lines = [
        f"Deciding per image {text}: {margin} points against the best fixed exits that cost no more, chosen on "
        "validation.",
        f"Without early exits the network costs {alone / 1e6:.2f} M MACs; "
        f"the policy's {test['macs_mean'] / 1e6:.2f} M are {test['macs_mean'] / alone:.3f} of that.",
        f"Images that left at each exit: {leaving}; of these, right: {right}.",
    ]
    _show(summary, ("", "accuracy", "MACs (millions)", "of full"), rows, lines)


def show_classes(figures: Sequence[Mapping[str, Any]], most: int = 20) -> None:
    """Print accuracy and cost of each class; of many classes, those that are most often wrong.

    Args:
        figures: those of :func:`~policyskip.evaluation.figures.class_figures`.
        most: how many classes are printed at most.
    """
    shown, count = list(figures), len(figures)
    if count > most:
        shown = sorted(shown, key=lambda line: float(line["accuracy"]))[:most]
    table = Table(title="by class" if count <= most else f"the {most} of {count} classes that are most often wrong")
    for column in ("class", "images", "accuracy", "full network", "MACs of full"):
        table.add_column(column, justify="left" if column == "class" else "right", overflow="fold")
    for line in shown:
        full = "–" if line["full_accuracy"] is None else _percent(line["full_accuracy"])
        cells = (str(line["images"]), _percent(line["accuracy"]), full, f"{line['macs_share']:.3f}")
        table.add_row(one_line(line["class"], 60), *cells)
    console().print(table)


def _figures_on_test(summary: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a summary on the test split, by their names without ``test/``."""
    return {key.removeprefix("test/"): value for key, value in summary.items() if key.startswith("test/")}


def _percent(accuracy: float) -> str:
    return f"{100 * accuracy:.2f} %"


def _cost(macs: float, full_macs: float, sd: float | None = None) -> tuple[str, str]:
    """Return two cells: millions of MACs, with their standard deviation if there is one, and the fraction of full."""
    spread = "" if sd is None else f" ± {sd / 1e6:.2f}"
    return f"{macs / 1e6:.2f}{spread}", f"{macs / full_macs:.3f}"


def _show(summary: dict[str, Any], columns: Sequence[str], rows: Iterable[Sequence[str]], lines: Iterable[str]) -> None:
    """Print a table of a run's figures, lines of text below, and the run's warnings."""
    table = Table(title=f"{summary['agent']} on {summary['data']}, test split, seed {summary['seed']}")
    for column in columns:
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        table.add_row(*row)
    out = console()
    out.print(table)
    for line in [*lines, *(f"warning: {warning}" for warning in summary.get("warnings", []))]:
        out.print(line)
