"""The layout of the package, read from its source: which module may import which, and how large modules are.

Nothing is imported here. ``python -m pytest -n 0 tests/test_layout.py`` names every import that breaks a rule.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import median
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parent.parent / "policyskip"

# From top to bottom. A module imports modules of lower rows and of its own entry, and of no other entry in its row.
LAYERS = (
    ("__main__",),
    ("cli",),  # argv to a command
    ("commands", "sweeps"),  # one command, or many
    ("comparison",),  # many finished runs
    ("tasks",),  # one run of one family, from its start to its figures
    ("evaluation",),  # what a policy decided, and how good that is
    ("build",),  # from settings to objects
    ("pretraining",),  # a network that learns to classify
    ("agents", "deployment"),  # what learns, and what is loaded again: neither needs the other
    ("policies",),  # from what is observed to a decision
    ("envs",),
    ("exits", "static_front", "runs.lifecycle"),  # what needs networks and images, and no environment
    ("execution",),  # how a network runs: kernels on a GPU, gathering, or everything
    ("backbones", "data"),  # networks, and images: neither needs the other
)
# Below all of them. Its modules may import each other, without a circle.
GROUND_FLOOR = (
    *("config", "registry", "rewards", "training"),
    *("runs", "parallel", "typed", "memory", "files", "sealed", "finite", "errors", "texts"),
    *("fronts", "intervals", "rivals"),
)
# Imports inside functions, which are made when the function is called: so that `policyskip --help` needs no torch, and
# `import policyskip` neither Hydra nor W&B. Of our modules, these alone.
LAZY = {
    "": {"rewards", "deployment.loading", "deployment.predictors"},  # public names
    "cli": {"commands"},
    "execution.choosing": {"execution.stage_network", "execution.tile_network"},  # where there is Triton
    "execution.stage_network": {"execution.stage_kernels", "execution.order_kernels"},
    "execution.tile_network": {"execution.tile_kernels"},
    "deployment.loading": {"runs.stored_config"},  # needs OmegaConf
    "backbones.base": {"backbones.execution"},  # Backbone.forward runs as execution says, which needs Backbone
}
TOP_MODULES = 20
MEDIAN_LINES, MOST_LINES = 170, 350


class Import(NamedTuple):
    """One import of a module of ours by another; names are without ``policyskip.``, and empty for the package itself."""

    importer: str
    imported: str
    line: int
    in_function: bool

    def __str__(self) -> str:
        return f"{self.importer or '__init__'}:{self.line} imports {self.imported or 'policyskip'}"


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its name without ``policyskip.``; a package's name stands for its ``__init__``."""
    paths = {path.relative_to(PACKAGE).with_suffix("").parts: path for path in sorted(PACKAGE.rglob("*.py"))}
    return {".".join(part for part in parts if part != "__init__"): path for parts, path in paths.items()}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def import_nodes(node: ast.AST, in_function: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import statement below a node, but those for type checkers, and whether it is inside a function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, in_function
        elif not is_type_checking(child):
            yield from import_nodes(child, in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


def imported_names(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """The modules of ours that a statement imports: of ``from a import b``, ``a.b`` if that is a module, else ``a``."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    else:
        assert node.level == 0, "imports are written in full"
        inside = [f"{node.module}.{alias.name}" for alias in node.names]
        names = [name if name.removeprefix("policyskip.") in modules() else node.module or "" for name in inside]
    yield from {
        name.removeprefix("policyskip").removeprefix(".") for name in names if name.split(".")[0] == "policyskip"
    }


@cache
def imports() -> list[Import]:
    """Every import of a module of ours by a module of ours."""
    return [
        Import(importer, imported, node.lineno, in_function)
        for importer, path in modules().items()
        for node, in_function in import_nodes(ast.parse(path.read_text("utf-8")))
        for imported in imported_names(node)
    ]


def entry_of(module: str) -> str:
    """The entry of LAYERS or GROUND_FLOOR that a module belongs to: the longest that its name begins with."""
    entries = {entry for row in (*LAYERS, GROUND_FLOOR) for entry in row}
    fitting = [entry for entry in entries if module == entry or module.startswith(f"{entry}.")]
    assert fitting, f"{module} has no place: add it to LAYERS or GROUND_FLOOR in {Path(__file__).name}"
    return max(fitting, key=len)


def row_of(entry: str) -> int:
    """The number of an entry's row from the top; the ground floor's is the largest."""
    return next((number for number, row in enumerate(LAYERS) if entry in row), len(LAYERS))


def broken_rule(statement: Import) -> str:
    """Which rule of LAYERS an import breaks; empty if none."""
    if "configs" in (statement.importer, statement.imported) or "" in (statement.importer, statement.imported):
        return ""  # configurations hold no code, and the package itself has its version and public names
    importer, imported = entry_of(statement.importer), entry_of(statement.imported)
    above, below = row_of(importer), row_of(imported)
    if importer == imported or above < below or above == below == len(LAYERS):
        return ""
    if above == below:
        return f"{statement}, but {importer} and {imported} stand side by side: neither imports the other"
    return f"{statement}, but {importer} stands below {imported}: imports lead downwards"


def circles() -> list[list[str]]:
    """Every module that imports itself by way of others, with a shortest such way, each circle once."""
    graph: dict[str, set[str]] = {name: set() for name in modules()}
    for statement in imports():
        if not statement.in_function:
            graph[statement.importer].add(statement.imported)
    ways_by_modules: dict[frozenset[str], list[str]] = {}
    for start in graph:
        ways, seen = [[start]], set()
        while ways:
            way = ways.pop(0)
            if start in graph[way[-1]]:
                ways_by_modules.setdefault(frozenset(way), [*way, start])
                break
            new = sorted(graph[way[-1]] - seen)
            seen.update(new)
            ways += [[*way, name] for name in new]
    return list(ways_by_modules.values())


def test_the_reader_of_imports_sees_them():
    """Else every rule would hold."""
    assert len(modules()) > 90 and len(imports()) > 300
    assert any(i.importer == "rewards" and i.imported == "errors" for i in imports())
    assert any(i.in_function for i in imports()) and not all(i.in_function for i in imports())


@pytest.mark.parametrize(
    ("importer", "imported", "message"),
    [
        ("tasks.blocks", "evaluation.tables", ""),
        ("evaluation.tables", "tasks.blocks", "evaluation stands below tasks"),
        ("agents.sb3", "deployment.loading", "stand side by side"),
        ("files", "errors", ""),
        ("runs.folder", "runs.lifecycle", "runs stands below runs.lifecycle"),
        ("errors", "backbones.base", "errors stands below backbones"),
    ],
)
def test_the_order_by_hand(importer, imported, message):
    broken = broken_rule(Import(importer, imported, 1, False))
    assert message in broken and bool(message) == bool(broken)


def test_no_circle_of_imports():
    ways = [" imports ".join(way) for way in circles()]
    assert not ways, "\n".join(["circles of imports:", *ways])


def test_no_import_leads_upwards():
    """By LAYERS; imports inside functions count as well."""
    broken = [broken_rule(statement) for statement in imports()]
    assert not any(broken), "\n".join(["imports against the order:", *filter(None, broken)])


def test_imports_inside_functions_are_few_and_known():
    lazy = [statement for statement in imports() if statement.in_function]
    unknown = [str(statement) for statement in lazy if statement.imported not in LAZY.get(statement.importer, ())]
    assert not unknown, "\n".join(["imports inside functions that are not in LAZY:", *unknown])


def test_few_modules_stand_at_the_top():
    """What a reader sees first; a new module belongs into one of the packages."""
    names = sorted(path.stem for path in PACKAGE.glob("*.py"))
    assert len(names) <= TOP_MODULES, f"{len(names)} modules at the top, more than {TOP_MODULES}: {', '.join(names)}"


@pytest.mark.parametrize("package", [name for name, path in modules().items() if path.name == "__init__.py" and name])
def test_no_init_holds_logic(package):
    """A docstring, imports and ``__all__``, nothing else; the package's own registers environments and has lazy names."""
    body = ast.parse(modules()[package].read_text("utf-8")).body
    allowed = (ast.Import, ast.ImportFrom)
    logic = [node for node in body if not isinstance(node, allowed) and not is_docstring(node) and not is_all(node)]
    assert not logic, "\n".join(f"line {node.lineno}: {ast.unparse(node).splitlines()[0]}" for node in logic)


def is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def is_all(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]


def test_files_are_short():
    lines = {name: len(path.read_text("utf-8").splitlines()) for name, path in modules().items()}
    too_long = [
        f"{name} has {count} lines, more than {MOST_LINES}" for name, count in lines.items() if count > MOST_LINES
    ]
    assert not too_long, "\n".join(too_long)
    assert median(count for name, count in lines.items() if modules()[name].name != "__init__.py") <= MEDIAN_LINES
