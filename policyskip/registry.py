"""Names are resolved here to classes and functions: the package's own, those of installed packages, and the user's own.

Importing a module executes it, so a name is imported only if the user decided for it. The user decided for a name that
was typed, and for one that an installed package declares as an entry point. A dotted path that comes with a run folder
is imported if the user says ``trust``, and refused otherwise. The current folder is searched only for a name that was
typed or is trusted, behind everything else.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, distributions
from pathlib import Path
from typing import Any, get_type_hints

from policyskip.errors import UserError, named, remember_users_class
from policyskip.typed import current_folder

GROUPS = {
    "data": "policyskip.data",
    "backbone": "policyskip.backbones",
    "env": "policyskip.envs",
    "reward": "policyskip.rewards",
    "agent": "policyskip.agents",
    "pretrain": "policyskip.pretraining",
    "policy": "policyskip.policies",
    "rule": "policyskip.exits.rules",
}
"""The groups of names, and the module in which the package keeps its own of each group."""
ENTRY_POINT_GROUPS = {"data": ("policyskip.data", "policyskip.datas"), "policy": ("policyskip.policies",)}
"""The entry-point groups of an installed package, where they are not ``policyskip.<group>s``."""
KEYS = {"policy": "agent.policy", "rule": "agent.rule"}
"""The configuration key that names a member of a group, where it is not ``<group>._target_``."""
WORDS = {"backbone": "network", "rule": "exit rule"}
"""What messages about a stored file call a member of a group, where it is not the group's name."""


@dataclass(frozen=True)
class _Source:
    """Says where names come from, and whether what they name may be imported."""

    trusted: bool = True
    stored: bool = False  # read from a file such as policy.json, rather than from settings


TYPED = _Source()
"""The source of names outside of any :func:`trusting`: the user typed them."""
_source: ContextVar[_Source] = ContextVar("policyskip_source", default=TYPED)


@contextmanager
def trusting(trusted: bool, stored: bool = True) -> Iterator[None]:
    """Say for the names that are resolved inside whether they may be imported.

    An agent's constructor resolves ``agent.policy`` and ``agent.rule`` without knowing where its arguments come from.
    Inside a scope that does not trust, no inner scope does.

    Args:
        trusted: whether dotted paths outside the package may be imported.
        stored: whether the names were read from a file such as ``policy.json``; False: they are settings.
    """
    token = _source.set(_Source(trusted and _source.get().trusted, stored))
    try:
        yield
    finally:
        _source.reset(token)


def is_trusted() -> bool:
    """Return whether what is named now was typed, or comes from a folder that the user trusts."""
    return _source.get().trusted


def resolve(group: str, target: str, trusted: bool | None = None) -> Callable[..., Any]:
    """Import the class or function of a group that ``target`` names.

    Args:
        group: a key of :data:`GROUPS`.
        target: ``package.module.Name``, or the name of an installed entry point.
        trusted: whether a name that was read from a file may be imported if it is neither the package's own nor
            installed; never inside a :func:`trusting` that does not trust. None: as the enclosing :func:`trusting`
            says; without one, the name was typed and is imported.

    Raises:
        UserError: the name is not installed, has to be trusted, cannot be imported, or is no class or function.
    """
    found = find(group, target, trusted)
    if not callable(found):
        raise UserError(f"{_key(group)}={target} is no class or function")
    checked: Callable[..., Any] = found
    return checked


def find(group: str, target: str, trusted: bool | None = None) -> Any:
    """Import the object of a group that ``target`` names, of whatever kind; otherwise as :func:`resolve`."""
    source = _source.get()
    if trusted is not None:  # a function that a stranger's file calls may get trusted=True from that very file
        source = _Source(trusted and source.trusted, stored=True)
    found = _found(group, target, source)
    module = getattr(found, "__module__", None)
    if not is_own(module):
        remember_users_class(str(module), f"{group}: {target}")
    return found


def _found(group: str, target: str, source: _Source) -> Any:
    """Import the object that ``target`` names, from a source of names.

    Raises:
        UserError: the name is not the package's own and neither trusted nor installed, or its import failed.
    """
    own = is_own(target.rpartition(".")[0], group)
    if own or ("." in target and source.trusted):
        if not own:
            current_folder.make_importable()
        with _naming_import(group, target, source):
            found = _locate(target, nested=not own)
        if own and not source.trusted and not is_own(getattr(found, "__module__", ""), group):
            raise UserError(f"the run's {group} {target} is not one of policyskip's own")
        return found
    point = _installed_point(group, target)
    if point is None:
        raise UserError(_not_installed(group, target, source))
    with _naming_import(group, target, source):
        return point.load()


def name_of(group: str, kind: type) -> str:
    """Return the name under which files store a class: the plain name of the package's own, else the dotted path."""
    return kind.__name__ if is_own(kind.__module__, group) else f"{kind.__module__}.{kind.__qualname__}"


def path_of(group: str, target: str) -> str:
    """Return the dotted path of what ``target`` names: itself, or what the installed entry point stands for."""
    point = installed(group).get(target) if "." not in target else None
    return target if point is None else f"{point.module}.{point.attr}"


def declared_class(target: Callable[..., Any]) -> type | None:
    """Return the class of what ``target`` makes, as it is or is annotated; None if no annotation names a class."""
    if inspect.isclass(target):
        return target
    try:
        returned = get_type_hints(target).get("return")
    except Exception:  # an annotation may be any expression, and need not make sense
        return None
    return returned if inspect.isclass(returned) and returned is not type(None) else None


def is_own(module: str | None, group: str | None = None) -> bool:
    """Return whether a module belongs to the package, and to the package's modules for ``group`` if there is one."""
    return f"{module}.".startswith(f"{GROUPS[group] if group else 'policyskip'}.")


def installed(group: str) -> dict[str, EntryPoint]:
    """Find the entry points that installed packages declare for a group, by name.

    What lies in the current folder is not installed: whoever unpacks a folder of somebody else's and works in it has
    decided for nothing in it.
    """
    here, groups = Path.cwd(), _entry_point_groups(group)
    path = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    points: dict[str, EntryPoint] = {}
    for distribution in distributions(path=path):
        for point in distribution.entry_points:
            if point.group in groups:
                points.setdefault(point.name, point)
    return points


@contextmanager
def naming_failures(label: str) -> Iterator[None]:
    """Turn whatever a user's class or function raises into a UserError of one line that begins with ``label``."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # sys.exit would end the command, and look like success
        raise UserError(f"{label} failed with {named(error, 1000)}") from error


def _installed_point(group: str, target: str) -> EntryPoint | None:
    """Find the installed entry point of that name or dotted path; None if there is none."""
    points = installed(group)
    if "." not in target:
        return points.get(target)
    for point in points.values():
        if target == f"{point.module}.{point.attr}":
            return point
    for point in points.values():  # a class that its package re-exports is stored under the module that defines it
        if point.module.partition(".")[0] == target.partition(".")[0]:
            with suppress(Exception):
                found = point.load()
                if target == f"{found.__module__}.{found.__qualname__}":
                    return point
    return None


def _not_installed(group: str, target: str, source: _Source) -> str:
    """Say why an import is refused: the message for a name that is not installed here, or has to be trusted."""
    if "." not in target:
        known = ", ".join(sorted(installed(group))) or "none is installed"
        if source.stored:
            return f"this {WORDS.get(group, group)} is {target}, which is not installed here ({known})"
        return f"{_key(group)}={target} is no installed {group} ({known}); or say package.module.Name"
    if source.stored:
        return (
            f"this {WORDS.get(group, group)} is {target}, which is not installed here (no installed package declares "
            f"it in the entry-point group {_entry_point_groups(group)[0]}); say trust=True to import it "
            "(on the command line: trust=true)"
        )
    return (
        f"the run's {group} {target} is not one of policyskip's own; say trust=true (when resuming: run.trust=true) "
        "to execute it, or install a package that declares it; the folder's own/ may hold its code, to be read first"
    )


@contextmanager
def _naming_import(group: str, target: str, source: _Source) -> Iterator[None]:
    """Turn whatever a module raises while it is imported into a UserError of one line."""
    try:
        yield
    except (Exception, SystemExit) as error:
        what = f"{_key(group)}={target}"
        if source.stored:
            what = f"{target}, this {WORDS.get(group, group)}"
        raise UserError(f"could not import {what}: {named(error, 1000)} (current folder: {os.getcwd()})") from error


def _locate(path: str, nested: bool) -> Any:
    """Import what ``package.module.Name`` names; with ``nested``, the name may be that of a class within a class."""
    parent, _, name = path.rpartition(".")
    try:
        holder: Any = import_module(parent)
    except ModuleNotFoundError as error:
        if not nested or error.name != parent or "." not in parent:
            raise
        holder = _locate(parent, nested)
    return getattr(holder, name)


def _entry_point_groups(group: str) -> tuple[str, ...]:
    """Return the entry-point groups in which packages declare members of a group, the documented one first."""
    return ENTRY_POINT_GROUPS.get(group, (f"policyskip.{group}s",))


def _key(group: str) -> str:
    """Return the configuration key that names a member of a group."""
    return KEYS.get(group, f"{group}._target_")
