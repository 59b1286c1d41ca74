"""Writing files so that nothing is lost: whole or not at all, and with one clear line when it cannot be done."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from policyskip.errors import UserError


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Turns an OSError into a line for the user."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; what was saved before is intact") from error


@contextmanager
def damaged(path: Path) -> Iterator[None]:
    """Turns whatever a reader stumbles over in a damaged file, or in somebody else's, into a line for the user."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} is damaged or not ours: {reason}") from error


def shell_argument(key: str, path: Path) -> str:
    """``key=path`` as it has to be typed, so that both a shell and Hydra read it, whatever is in the path."""
    if re.fullmatch(r"[\w./@%+-]+", str(path), re.ASCII):
        return f"{key}={path}"
    escaped = re.sub(r"(\\+)(?='|$)", r"\1\1", str(path)).replace("'", r"\'")
    word = f"{key}='{escaped}'"
    return shlex.quote(word) if set('"$`\\!') & set(word) else f'"{word}"'


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: beside its place, then renamed into it.

    Raises:
        UserError: the disk is full, or the folder cannot be written; what was there before stays.
    """
    temporary = path.with_name(path.name + ".tmp")
    with refusing(path):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _remember(path.parent)
        finally:
            with suppress(OSError):  # what went wrong before is what has to be said
                temporary.unlink(missing_ok=True)


def _remember(folder: Path) -> None:
    """Have the system write down which files a folder holds; a new name is else lost when the power fails."""
    with suppress(OSError):  # not every system can
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
