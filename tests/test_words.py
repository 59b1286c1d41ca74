"""The words of the source, as far as they can be held by a test: docstrings and names.

Nothing is imported here. ``python -m pytest -n 0 tests/test_words.py`` names every docstring and name that breaks a
rule, and says what to write instead.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("policyskip", "tests", "benchmarks")

# What the docstring of a function or property begins with. Add a verb here if none of these says what a function does.
VERBS = frozenset(
    [
        "Add",
        "Admit",
        "Append",
        "Begin",
        "Build",
        "Clear",
        "Call",
        "Carry",
        "Change",
        "Check",
        "Choose",
        "Classify",
        "Collect",
        "Compare",
        "Compose",
        "Compute",
        "Connect",
        "Continue",
        "Convert",
        "Copy",
        "Count",
        "Crop",
        "Cut",
        "Decide",
        "Decode",
        "Delete",
        "Deploy",
        "Describe",
        "Divide",
        "Do",
        "Draw",
        "End",
        "Escape",
        "Find",
        "Format",
        "Free",
        "Give",
        "Go",
        "Import",
        "Join",
        "Judge",
        "Keep",
        "Label",
        "Learn",
        "Leave",
        "Let",
        "List",
        "Load",
        "Lock",
        "Lower",
        "Make",
        "Measure",
        "Mix",
        "Move",
        "Name",
        "Normalise",
        "Note",
        "Overwrite",
        "Pick",
        "Plan",
        "Print",
        "Propose",
        "Put",
        "Raise",
        "Rank",
        "Read",
        "Record",
        "Refuse",
        "Release",
        "Remember",
        "Remove",
        "Rename",
        "Render",
        "Replace",
        "Resolve",
        "Restore",
        "Return",
        "Round",
        "Run",
        "Sample",
        "Save",
        "Say",
        "Score",
        "Search",
        "Select",
        "Set",
        "Show",
        "Sort",
        "Split",
        "Start",
        "Stop",
        "Take",
        "Try",
        "Turn",
        "Unlock",
        "Validate",
        "View",
        "Wait",
        "Write",
        "Yield",
    ]
)
# A class's docstring is a sentence, or a noun with a relative clause, or begins with what the class does: "Holds …".
CLAUSE = re.compile(r"^[A-Z][a-z]+s [^,]|\b(that|which|who|whose|where|when|is|are|has|says?|decides?|learns)\b")
# Names that said nothing; each stood for several things that have names of their own.
RIDDLES = frozenset({"told", "asked", "offered", "settle", "rest", "standing", "lost"})


class Documented(NamedTuple):
    """A module, class or function together with where it stands."""

    file: str
    name: str
    node: ast.Module | ast.ClassDef | ast.FunctionDef

    def __str__(self) -> str:
        return f"{self.file}:{getattr(self.node, 'lineno', 1)} {self.name}"

    @property
    def docstring(self) -> str:
        """Return the docstring; "" if there is none."""
        return ast.get_docstring(self.node) or ""

    @property
    def summary(self) -> str:
        """Return the docstring's first paragraph on one line."""
        return " ".join(self.docstring.split("\n\n")[0].split())


def inside(file: str, node: ast.AST, prefix: str = "") -> Iterator[Documented]:
    """Yield the classes and functions below a node, at any depth, with their qualified names."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            yield Documented(file, f"{prefix}{child.name}", child)
            yield from inside(file, child, f"{prefix}{child.name}.")
        else:
            yield from inside(file, child, prefix)


def documented() -> list[Documented]:
    """List every module, class and function of the package."""
    found = []
    for path in sorted((ROOT / "policyskip").rglob("*.py")):
        file, tree = path.relative_to(ROOT).as_posix(), ast.parse(path.read_text("utf-8"))
        found += [Documented(file, "module", tree), *inside(file, tree)]
    return found


def sentence_problem(item: Documented) -> str:
    """Say what is wrong with a docstring's first paragraph; "" if nothing is, or there is no docstring."""
    summary = item.summary
    if not summary:
        return ""
    if not summary.endswith((".", ":")):
        return f"{item}: the first paragraph of the docstring does not end in a full stop: …{summary[-40:]!r}"
    if isinstance(item.node, ast.Module):
        return ""
    word = re.split(r"[\s,:.;]", summary)[0]
    if not word[0].isupper():
        return f"{item}: the docstring begins with {word!r}, and not with a capital"
    if isinstance(item.node, ast.FunctionDef) and word not in VERBS:
        return (
            f"{item}: the docstring begins with {word!r}; say what it does: Return …, Compute …, Write … (or see VERBS)"
        )
    if isinstance(item.node, ast.ClassDef) and not CLAUSE.search(summary):
        return f'{item}: {summary!r} is no sentence; say "A … that …", "Holds …" or "Decides …" (or see CLAUSE)'
    return ""


def raises_itself(function: ast.FunctionDef) -> bool:
    """Return whether a function's own body, without the functions in it, raises a UserError."""
    nodes: list[ast.AST] = list(function.body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and ast.unparse(node.exc.func) == "UserError":
            return True
        if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            nodes += ast.iter_child_nodes(node)
    return False


def names_in(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield the names that a module gives (variables, parameters, functions, classes, attributes) and their lines."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield (node.id if isinstance(node, ast.Name) else node.attr), line
        elif isinstance(node, ast.arg):
            yield node.arg, line
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.ExceptHandler | ast.MatchAs | ast.MatchStar):
            yield node.name or "", line
        elif isinstance(node, ast.alias):
            yield node.asname or "", line


def function(source: str) -> Documented:
    """Make the entry of the first function or class in a source."""
    return next(inside("here.py", ast.parse(source)))


@pytest.mark.parametrize(
    ("docstring", "message"),
    [
        ("Return the MACs, float64 (N,).", ""),
        ("Plan, for each exit, the nodes.\n\n    More", ""),
        ("The MACs of each exit.", "begins with 'The'"),
        ("Whether it fits.", "begins with 'Whether'"),
        ("return the MACs.", "not with a capital"),
        ("Return the MACs", "full stop"),
    ],
)
def test_the_rule_for_functions_by_hand(docstring, message):
    problem = sentence_problem(function(f'def f():\n    """{docstring}"""'))
    assert message in problem and bool(message) == bool(problem)


@pytest.mark.parametrize(
    ("docstring", "fits"),
    [
        ("A layer that averages.", True),
        ("Holds the figures of a run.", True),
        ("The settings of ``pretrain``.", False),
        ("One part of a network.", False),
    ],
)
def test_the_rule_for_classes_by_hand(docstring, fits):
    assert (not sentence_problem(function(f'class C:\n    """{docstring}"""'))) == fits


def test_first_paragraphs_are_sentences():
    problems = [problem for item in documented() if (problem := sentence_problem(item))]
    assert len(documented()) > 900 and not problems, "\n".join(problems)


def test_public_functions_say_that_they_raise():
    """For ``__init__``, the docstring of its class does."""
    silent = []
    items = {(item.file, item.name): item for item in documented()}
    for (file, name), item in items.items():
        if not isinstance(item.node, ast.FunctionDef) or not raises_itself(item.node):
            continue
        holder = items.get((file, name.removesuffix(".__init__")), item)
        if not any(word.startswith("_") for word in holder.name.split(".")) and "UserError" not in holder.docstring:
            silent.append(
                f"{item} raises a UserError; add to the docstring of {holder.name}:\n    Raises:\n        UserError: …"
            )
    assert not silent, "\n".join(silent)


def test_messages_about_a_range_say_whether_its_ends_belong_to_it():
    """Of "must be between 0 and 1, got 1.0" nobody knows what is wrong."""
    found = [
        f"{path.relative_to(ROOT).as_posix()}:{number}: {line.strip()}"
        for path in sorted((ROOT / "policyskip").rglob("*.py"))
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if re.search(r"^\s*(raise UserError\()?f?\".* between -?\d+ and -?\d", line)
    ]
    assert not found, "\n".join(['say "above 0 and below 1", or "from 0 to 1":', *found])


def test_names_that_say_nothing_do_not_come_back():
    """As names in the source; as words of a sentence they are welcome."""
    found = [
        f"{path.relative_to(ROOT).as_posix()}:{line} calls something {name!r}; name what it holds"
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name, line in names_in(ast.parse(path.read_text("utf-8")))
        if name.strip("_") in RIDDLES
    ]
    assert not found, "\n".join(found)
