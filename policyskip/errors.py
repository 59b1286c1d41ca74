"""The one exception for what a user can cause and put right."""

from __future__ import annotations

from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. Its message says what was given and what is allowed; the command line prints it and exits with 2."""


def check_choice(key: str, value: str, allowed: Iterable[str]) -> None:
    """Refuse a value of a configuration key that is none of the allowed ones.

    Raises:
        UserError: naming the key, what is allowed and the value.
    """
    if value not in (choices := tuple(allowed)):
        raise UserError(f"{key} must be one of {', '.join(choices)}, got {value!r}")
