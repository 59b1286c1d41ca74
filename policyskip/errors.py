"""Errors that a user can put right, the text of an exception in one line, and whose code raised it."""

from __future__ import annotations

import os
import site
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from policyskip.texts import LONGEST_LINE, one_line

TRACEBACK = "POLICYSKIP_TRACEBACK"
"""The environment variable that asks for tracebacks: any value but "" and "0"."""


class UserError(ValueError):
    """An error whose message says what was given and what is allowed; the command line prints it and exits with 2.

    Its text is one line that is safe to print, whatever was given.
    """

    def __str__(self) -> str:
        return one_line(super().__str__(), LONGEST_LINE)


def check_choice(key: str, value: Any, allowed: Iterable[str]) -> None:
    """Refuse a value of a configuration key that is none of the allowed ones.

    Raises:
        UserError: naming the key, what is allowed and the value.
    """
    choices = tuple(allowed)
    if not isinstance(value, str) or value not in choices:
        raise UserError(f"{key} must be one of {', '.join(choices)}, got {one_line(repr(value), 80)}")


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text that is not blank; without one, the name of its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def in_one_line(error: BaseException, most: int = 200) -> str:
    """Return an exception's text with its lines joined, cut to ``most`` characters; without text, its type's name."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def named(error: BaseException, most: int = 200) -> str:
    """Return the name of an exception's type, and its text in one line, cut to ``most`` characters, if it has any."""
    kind, text = type(error).__name__, in_one_line(error, most)
    return kind if text == kind else f"{kind}: {text}"


_users_classes: dict[str, str] = {}


def remember_users_class(module: str, description: str) -> None:
    """Remember a class outside policyskip that a configuration names, so that its exceptions are reported as its own.

    Args:
        module: the module that the class is in.
        description: the class and its group, such as "agent: my_agents.Mine".
    """
    _users_classes[module] = description


def users_modules() -> tuple[str, ...]:
    """Return the names of the modules with classes of the user's own that take part."""
    return tuple(_users_classes)


def forget_users_classes() -> None:
    """Clear the memory of users' classes, which an earlier command in this process may have filled."""
    _users_classes.clear()


def users_problem(error: BaseException) -> str | None:
    """Describe an exception that a user's own class raised, or something that this class called.

    Returns: a line such as "agent: my_agents.Mine failed with IndexError: …"; None if no such class took part, or if
        the error is a :class:`UserError`, which says itself what is wrong.
    """
    if isinstance(error, UserError):
        return None
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    description = next((_users_classes[name] for name in reversed(modules) if name in _users_classes), None)
    return f"{description} failed with {named(error)}" if description else None


def problem_beside_users_classes(error: BaseException) -> str | None:
    """Describe an exception that the package raised, in a run that uses classes of the user's own.

    What such a class returned may be its reason, so the user is told which classes there are.

    Returns: a line that names them; None if the run has none.
    """
    if isinstance(error, UserError) or not _users_classes:
        return None
    classes = ", ".join(dict.fromkeys(_users_classes.values()))
    return f"{named(error)}; the run has classes of your own ({classes}){_how_to_see()}"


def users_class_failed(error: BaseException) -> bool:
    """Return whether an error, or an exception that led to it, was raised by a user's own class."""
    return any(users_problem(cause) for cause in _chain(error))


def traceback_hint(error: BaseException) -> str:
    """Return what to append to an error's message if a user's own code failed: the place, and how to see more."""
    place = place_in_users_code(error)
    return f"{place}{_how_to_see()}" if place or users_class_failed(error) else ""


def place_in_users_code(error: BaseException) -> str:
    """Return file and line of the user's own code that an exception, or what led to it, went through last.

    Returns: a text to append to the error's message, such as " (my_rewards.py, line 12)"; "" if there is none.
    """
    places = [
        f" ({one_line(_short_path(frame.f_code.co_filename))}, line {line})"
        for cause in _chain(error)
        if not isinstance(cause, UserError)
        for frame, line in traceback.walk_tb(cause.__traceback__)
        if is_users_file(frame.f_code.co_filename)
    ]
    return places[-1] if places else ""


def _short_path(file: str) -> str:
    """Return a path from the current folder; the path as it is, if that folder is gone or on another drive."""
    try:
        return os.path.relpath(file)
    except (OSError, ValueError):
        return file


def is_users_file(file: str) -> bool:
    """Return whether a file of code came neither with Python, nor with an installed package, nor with policyskip."""
    path = os.path.realpath(file)
    return os.path.isfile(path) and not path.startswith(_installed_folders())


@cache
def _installed_folders() -> tuple[str, ...]:
    """Return the folders of Python's own modules, of installed packages and of policyskip."""
    folders = [*(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")), *site.getsitepackages()]
    folders += [site.getusersitepackages(), os.path.dirname(__file__)]
    return tuple(os.path.join(os.path.realpath(folder), "") for folder in folders)


def _how_to_see() -> str:
    """Return how to ask for a traceback, to be put behind a message; nothing if it was asked for."""
    return "" if traceback_wanted() else f"; set {TRACEBACK}=1 to see where"


def traceback_wanted() -> bool:
    """Return whether the user has asked for the tracebacks of errors that are otherwise one line."""
    return os.environ.get(TRACEBACK, "") not in ("", "0")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception, its cause or the exception that was being handled, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
