"""Files that are written whole or not at all, and errors of reading and writing in one line."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shlex
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TextIO

from policyskip.errors import UserError, in_one_line, users_problem

LARGEST_TEXT = 2**26
"""Bytes of the largest JSON or YAML file that is read."""
NEVER_A_LINK: int = getattr(os, "O_NOFOLLOW", 0)
AT_ONCE: int = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
"""Flags of ``os.open``, as far as the system has them: no link is followed; no open waits, as a pipe's would."""
_HIDDEN = ".policyskip-"


@contextmanager
def reporting_write_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the body into a UserError that says that ``path`` cannot be written, and why.

    Exceptions of a user's own class pass, as in :func:`damaged`.

    Raises:
        UserError: the body raised an OSError.
    """
    try:
        yield
    except OSError as error:
        if users_problem(error):
            raise
        shown = Path(*(part for part in path.parts if not is_hidden_name(part)))
        reason = error.strerror or in_one_line(error)
        raise UserError(f"cannot write {shown}: {reason}; what was saved before is intact") from error


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


def hidden_name() -> str:
    """Return a name that nobody can foresee, for a file or folder that is not whole yet."""
    return f"{_HIDDEN}{secrets.token_hex(8)}"


def is_hidden_name(name: str) -> bool:
    """Return whether a name is one of :func:`hidden_name`, which what is left of a killed process has."""
    return re.fullmatch(rf"{re.escape(_HIDDEN)}[0-9a-f]{{16}}", name) is not None


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: under a hidden name in the same folder, then renamed.

    A link of the file's name is replaced by the file, so nothing is written through it.

    Raises:
        UserError: the disk is full, the folder cannot be written, or a folder, device or pipe has the file's name; what
            is there stays.
    """
    if not path.name:
        raise UserError(f"{path} is a folder; name a file to write")
    with suppress(OSError):  # nothing of that name
        mode = os.lstat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            raise UserError(f"cannot write {path}: it is a {_kind(mode)}, not a file")
    temporary = path.with_name(hidden_name())
    with reporting_write_errors(path):
        try:
            with open(_opened(temporary, os.O_EXCL), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):  # the first error is the one to report
                os.unlink(temporary)
            raise
        flush_folder(path.parent)


def open_log(path: Path, append: bool = False) -> TextIO:
    """Return a text file to be written line by line, never through a link: a new one, or the end of one that is there.

    Raises:
        OSError: the file cannot be made, or there is a link, a pipe or a folder in its place.
    """
    if not append:
        path.unlink(missing_ok=True)
    return open(_opened(path, os.O_APPEND if append else os.O_EXCL), "a" if append else "w", encoding="utf-8")


def _opened(path: Path, flags: int) -> int:
    """Return a descriptor of a file that is made if need be, to be written; never through a link."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | NEVER_A_LINK | AT_ONCE | flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a file")
    return descriptor


def check_regular(path: Path, most: float = float("inf")) -> None:
    """Refuse what is not a file, such as a pipe or a device, before it is opened, and a file that is too large.

    Raises:
        UserError: it is refused.
        OSError: there is nothing of that name.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path} is a {_kind(found.st_mode)}, not a file")
    if found.st_size > most:
        raise UserError(f"{path} has {found.st_size} bytes; a file of its kind has at most {most:.0f}")


def open_regular(path: Path, most: float = float("inf")) -> BinaryIO:
    """Return a file opened to be read, if :func:`check_regular` does not refuse it.

    Raises:
        UserError, OSError: as for :func:`check_regular`.
    """
    check_regular(path, most)
    return open(os.open(path, os.O_RDONLY | AT_ONCE), "rb")


def read(path: Path, most: float = LARGEST_TEXT) -> bytes:
    """Return the content of a file of at most ``most`` bytes.

    Raises:
        UserError, OSError: as for :func:`check_regular`.
    """
    with open_regular(path, most) as file:
        return file.read()


def _kind(mode: int) -> str:
    """Name what a mode of ``os.stat`` is of."""
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")


def flush_folder(folder: Path) -> None:
    """Write a folder's list of files to the disk, so that a renamed file survives a power failure."""
    with suppress(OSError):  # not every system can
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
