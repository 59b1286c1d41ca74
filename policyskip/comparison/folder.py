"""The folder of a comparison is replaced as a whole: at every moment, the old one is there or the new one.

The new folder is written beside the old one, under a hidden name; then both exchange their names, which Linux and macOS
can do in one step. The next comparison of that name deletes what a process that was killed has left.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from policyskip.files import flush_folder, hidden_name, is_hidden_name, reporting_write_errors
from policyskip.runs.locks import lock_folder

BEFORE = "before"
"""Put behind the name of an old folder while it is moved away, where names cannot be exchanged."""


@contextmanager
def replaced(output: Path) -> Iterator[Path]:
    """Let the body write files into a new folder, and give it the name ``output`` when it ends; a link stays a link.

    What the body raises leaves everything as it was.

    Yields: the new folder.

    Raises:
        UserError: the folder cannot be written.
    """
    place = output.resolve()
    missing = [folder for folder in place.parents if not folder.exists()]
    new = place.with_name(f"{hidden_name()}-{place.name}")
    with ExitStack() as finally_:
        finally_.callback(_remove_empty, missing)
        finally_.callback(shutil.rmtree, new, ignore_errors=True)
        with reporting_write_errors(output):
            place.parent.mkdir(parents=True, exist_ok=True)
            os.mkdir(new)
            if (lock := lock_folder(new)) is not None:
                finally_.callback(os.close, lock)
        yield new
        with reporting_write_errors(output):
            for folder in [new, *(path for path in new.rglob("*") if path.is_dir())]:
                flush_folder(folder)
            _switch(new, place)
            flush_folder(place.parent)


def _remove_empty(folders: Iterable[Path]) -> None:
    """Remove those of the folders that are empty, the innermost first."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _switch(new: Path, output: Path) -> None:
    """Give the folder ``new`` the name ``output``; an older folder of that name is then called as the new one was."""
    if not output.exists():
        os.rename(new, output)
    elif not _exchange(new, output):
        old = new.with_name(f"{new.name}-{BEFORE}")
        os.rename(output, old)
        try:
            os.rename(new, output)
        except BaseException:
            os.rename(old, output)
            raise
        os.rename(old, new)


def _exchange(first: Path, second: Path) -> bool:
    """Let two folders exchange their names in one step; return False where the system cannot."""
    name, flag = ("renamex_np", 2) if sys.platform == "darwin" else ("renameat2", 2)
    with suppress(OSError, AttributeError, TypeError):  # TypeError: Windows
        exchange = getattr(ctypes.CDLL(None), name)
        paths = os.fsencode(first), os.fsencode(second)
        here = -100  # the current folder, from which relative paths go
        arguments = (*paths, flag) if sys.platform == "darwin" else (here, paths[0], here, paths[1], flag)
        return bool(exchange(*arguments) == 0)
    return False


def clear_leftovers(output: Path) -> None:
    """Delete the hidden folders of processes that were killed while they wrote ``output``.

    Where such a process had moved the old folder away, and no new one is there, the old one comes back.

    Raises:
        UserError: it cannot be moved back.
    """
    place = output.resolve()
    with reporting_write_errors(output):
        for path in list(place.parent.iterdir()) if place.parent.is_dir() else []:
            _clear(path, place)


def _clear(path: Path, output: Path) -> None:
    """Delete ``path``, or let it come back, if a process that was killed has left it of ``output``."""
    matched = re.fullmatch(rf"(\.[^-]+-[^-]+)-{re.escape(output.name)}(-{BEFORE})?", path.name, re.DOTALL)
    if matched is None or not is_hidden_name(matched[1]) or path.is_symlink():
        return
    try:
        lock = lock_folder(path)
    except OSError:  # its process lives
        return
    if lock is None:
        return
    if matched[2] and not output.exists():
        os.rename(path, output)
    else:
        shutil.rmtree(path, ignore_errors=True)
    os.close(lock)
