"""Files that are written whole or not at all, and errors of reading and writing in one line."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from policyskip.errors import UserError, in_one_line, users_problem


@contextmanager
def reporting_write_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the body into a UserError that says that ``path`` cannot be written, and why.

    Raises:
        UserError: the body raised an OSError.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; what was saved before is intact") from error


@contextmanager
def damaged(path: Path) -> Iterator[None]:
    """Turn any exception of a body that only reads ``path`` into a UserError that says that the file is damaged.

    Exceptions of a user's own class pass: its code failed, whatever is in the file.

    Raises:
        UserError: the body raised an exception.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # readers raise exceptions of every type for damaged files
        if users_problem(error):
            raise
        raise UserError(f"{path} is damaged or not ours: {in_one_line(error)}") from error


def shell_argument(key: str, path: Path) -> str:
    """Return ``key=path`` quoted so that both a shell and Hydra read it, whatever characters the path has."""
    if re.fullmatch(r"[\w./@%+-]+", str(path), re.ASCII):
        return f"{key}={path}"
    escaped = re.sub(r"(\\+)(?='|$)", r"\1\1", str(path)).replace("'", r"\'")
    word = f"{key}='{escaped}'"
    return shlex.quote(word) if set('"$`\\!') & set(word) else f'"{word}"'


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: under a temporary name in the same folder, then renamed.

    Raises:
        UserError: the disk is full, or the folder cannot be written; the file keeps its former content.
    """
    temporary = path.with_name(path.name + ".tmp")
    with reporting_write_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _flush_folder(path.parent)
        finally:
            with suppress(OSError):  # the first error is the one to report
                temporary.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """Write a folder's list of files to the disk, so that a renamed file survives a power failure."""
    with suppress(OSError):  # not every system can
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
