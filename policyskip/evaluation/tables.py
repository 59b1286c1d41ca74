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

CHEAPER = 0.9
"""A rival that costs less than this share of a policy's cost, and is as accurate, is worth a line of its own."""


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


def verdict_line(summary: dict[str, Any]) -> str:
    """Say whether a policy pays, by how many points, and against which rival: one sentence."""
    test = _figures_on_test(summary)
    remark = "which sees the label" if test.get("sees_the_label") else "which learns nothing"
    learned = summary.get("steps", 1) and not test.get("sees_the_label")
    subject = "this policy" if learned else f"{summary['agent']}, {remark},"
    if test.get("verdict") is None:
        return f"Whether {subject} pays is not shown: it was judged by an older version."
    if summary.get("steps") == 0 and test.get("unique_decisions") == 1 and not test.get("exits"):
        return (
            f"{summary['agent']} decides the same for every image: it is a fixed choice itself, and needs no verdict."
        )
    answer, because = test["verdict"], test["verdict_because"]
    if test.get("rival") is None:
        return f"Whether {subject} pays is not shown: {because}."
    points = f"{100 * test['rival_margin']:+z.2f} points ({_interval(test['rival_low'], test['rival_high'])})"
    is_equal = abs(test["rival_macs"] - test["macs_mean"]) <= 0.005 * test["macs_mean"]
    cost = "of equal cost" if is_equal else f"at {test['rival_macs'] / test['macs_mean']:.3f} of its cost"
    against = f"{points} against {test['rival']}, the strongest fixed rival {cost}"
    if answer == "not shown":
        return f"Whether {subject} pays is not shown: {against}: {because}."
    return f"{'This policy' if learned else subject} {answer}: {against}."


def _interval(low: float | None, high: float | None) -> str:
    """Return an interval in points as text; a dash stands for that of a single image."""
    return "no interval" if low is None or high is None else f"{100 * low:+z.2f} to {100 * high:+z.2f}"


def _rivals(test: Mapping[str, Any]) -> Table | None:
    """Make the table of the rivals of every family, the strongest first; None if there are none."""
    lines = test.get("rivals") or []
    if not lines:
        return None
    table = Table(title="fixed choices that ignore the image, chosen on validation, judged on test", style="dim")
    columns = ("the best of", "is", "accuracy", "of full", "margin", "95 % interval")
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:2] else "right", style="dim", header_style="dim")
    for line in lines:
        margin, interval = f"{100 * line['margin']:+z.2f}", _interval(line["low"], line["high"])
        share = f"{line['macs'] / test['full_macs']:.3f}"
        table.add_row(line["family"], line["name"], _percent(line["accuracy"]), share, margin, interval)
    return table


def _cheaper(test: Mapping[str, Any]) -> list[str]:
    """Return a line for the cheapest rival that costs clearly less and is not shown to be less accurate."""
    as_good = [line for line in test.get("rivals") or [] if line["low"] is not None and line["low"] <= 0]
    cheaper = [line for line in as_good if line["macs"] < CHEAPER * test["macs_mean"]]
    if not cheaper:
        return []
    line = min(cheaper, key=lambda line: float(line["macs"]))
    share = line["macs"] / test["macs_mean"]
    return [
        f"For {share:.2f} of its cost, {line['name']} is not shown to be less accurate ({_percent(line['accuracy'])})."
    ]


def show_rivals(test: Mapping[str, Any]) -> None:
    """Print the rivals of every family, the strongest first, if there are any.

    Args:
        test: figures on the test split, by their names without ``test/``.
    """
    if (table := _rivals(test)) is not None:
        console().print(table)


def _dearer(test: Mapping[str, Any]) -> list[str]:
    """Return a line for each run of ``front.rivals`` that costs more than the policy."""
    return [f"No rival at this cost: {name}, which costs more." for name in test.get("rivals_dearer") or []]


def show_blocks(summary: dict[str, Any]) -> None:
    """Print a policy that skips blocks beside the full network and its rivals."""
    test = _figures_on_test(summary)
    sees_the_label, full_macs = test.get("sees_the_label", False), test["full_macs"]
    label = f"{summary['agent']} (sees the label)" if sees_the_label else "policy, its own cost included"
    kept = f"{test['kept_mean']:.2f} ± {test['kept_sd']:.2f}"
    accuracy, cost = _percent(test["accuracy"]), _cost(test["macs_mean"], full_macs, test["macs_sd"])
    rows = [(label, accuracy, kept, *cost, str(test["unique_decisions"]))]
    full = (_percent(test["full_accuracy"]), f"{test['blocks']}", *_cost(full_macs, full_macs))
    rows.append(("full network", *full, "1"))
    if test.get("rival") is not None:
        name, accuracy = f"rival: {test['rival']}", _percent(test["rival_accuracy"])
        rows.append((name, accuracy, "", *_cost(test["rival_macs"], full_macs), ""))
    columns = ("", "accuracy", "blocks kept", "MACs (millions)", "of full", "decisions")
    lines = [verdict_line(summary), *_cheaper(test), *_dearer(test)]
    if "kept_by_difficulty" in test:
        quarters = ", ".join("–" if kept is None else f"{kept:.1f}" for kept in test["kept_by_difficulty"])
        lines.append(f"Blocks kept, from the easiest quarter of the images to the hardest: {quarters}.")
    _show(summary, columns, rows, lines)


def show_exits(summary: dict[str, Any]) -> None:
    """Print a policy beside its last exit, the fixed exits, its rivals, and the oracle."""
    test = _figures_on_test(summary)
    included = "heads and policy" if test["policy_macs"] else "heads"
    references = [
        ("all to the last exit, heads included", test["full_accuracy"], test["full_macs"]),
        *(
            (f"all straight to exit {n}", accuracy, macs)
            for n, (accuracy, macs) in enumerate(zip(test["exit_alone_accuracy"], test["exit_alone_macs"], strict=True))
        ),
        *([(f"rival: {test['rival']}", test["rival_accuracy"], test["rival_macs"])] if test.get("rival") else []),
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
    alone = test["exit_alone_macs"][-1]
    leaving = ", ".join(f"{100 * share:.1f} %" for share in test["exit_share"])
    right = ", ".join("–" if accuracy is None else f"{100 * accuracy:.1f} %" for accuracy in test["exit_accuracy"])
    lines = [
        verdict_line(summary),
        *_cheaper(test),
        *_dearer(test),
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
    """Print a table of a run's figures, that of its rivals, lines of text below, and the run's warnings."""
    table = Table(title=f"{summary['agent']} on {summary['data']}, test split, seed {summary['seed']}")
    for column in columns:
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        table.add_row(*row)
    out = console()
    out.print(table)
    show_rivals(_figures_on_test(summary))
    for line in [*lines, *(f"warning: {warning}" for warning in summary.get("warnings", []))]:
        out.print(line)
