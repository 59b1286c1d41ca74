"""Writing files so that nothing is lost: whole or not at all, and with one clear line when it cannot be done."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from policyskip.errors import UserError


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Turns an OSError into a line for the user."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; what was saved before is intact") from error


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
        finally:
            temporary.unlink(missing_ok=True)
