"""Files that belong together are switched together: all that a finished run consists of, by one rename.

A new generation of a folder's files is written into a hidden folder inside it. The hidden folder is then renamed to
``.commit``, which is the switch: from there on, whoever reads looks into ``.commit`` first. What remains is to move the
files to their places and to delete ``.commit``; a process that is killed before leaves that to the next one that locks
the folder. Nothing here follows a link that leads out of the folder.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from policyskip.errors import UserError
from policyskip.files import flush_folder, hidden_name, is_hidden_name, reporting_write_errors

COMMITTED = ".commit"
"""The folder of a generation that has been switched to, and whose files are not all in their places yet."""
BEST, BEST_SO_FAR = "best.safetensors", "best-so-far.safetensors"
"""The weights that a finished run deploys; and the best weights of a run that learns, until it is finished."""
PLOTS, ENDINGS = "plots", (".json", ".jsonl", ".png", ".pt", ".safetensors", ".yaml")
"""The folder of a run's pictures; and the endings of the files in a run's folder."""


def find(folder: Path, name: str) -> Path:
    """Return where a folder's file or folder of a name is, or would be.

    Raises:
        UserError: it is behind a link that leads out of the folder.
    """
    for path in (folder / COMMITTED / name, folder / name):
        if os.path.lexists(path):
            _check_inside(path, folder)
            return path
    _check_inside(folder / name, folder)
    return folder / name


def _check_inside(path: Path, folder: Path) -> None:
    """Refuse a path that leads out of a folder; the folder itself may be a link, as its user has named it.

    Raises:
        UserError: it is refused.
    """
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError) as error:  # links that lead to each other
        raise UserError(f"{path} cannot be used: its links lead nowhere") from error
    if not inside:
        raise UserError(f"{path} is a link that leads out of the folder; nothing is read or written through it")


@contextmanager
def generation(folder: Path) -> Iterator[Path]:
    """Let the body write files into a new folder, and make them the folder's files, all at once, when it ends.

    What the body raises leaves the folder as it was.

    Yields: the new folder, in which every file has the name that it is to have.

    Raises:
        UserError: the files cannot be written, or cannot take their places.
    """
    move_into_place(folder)
    new = folder / hidden_name()
    with reporting_write_errors(folder):
        try:
            os.mkdir(new)
            yield new
            _check_places(new, folder)
            for path in [new, *(path for path in new.iterdir() if path.is_dir())]:
                flush_folder(path)
            os.rename(new, folder / COMMITTED)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
    flush_folder(folder)
    move_into_place(folder)


def move_into_place(folder: Path) -> None:
    """Move the files of the generation that a folder was switched to to their places, if that has not been done.

    Raises:
        UserError: ``.commit`` is none of ours, or the folder cannot be written.
    """
    committed = folder / COMMITTED
    if not os.path.lexists(committed):
        return
    _check_places(committed, folder)
    with reporting_write_errors(folder):
        if (committed / BEST).exists():
            (folder / BEST_SO_FAR).unlink(missing_ok=True)
        for path in _files(committed):
            place = folder / path.relative_to(committed)
            place.parent.mkdir(exist_ok=True)
            os.replace(path, place)
        for path in [*committed.iterdir(), committed]:
            path.rmdir()
    flush_folder(folder)


def _files(generation: Path) -> list[Path]:
    """Return the files of a generation: those in its folder and in the folders in it."""
    entries = sorted(generation.iterdir())
    return [file for path in entries for file in (sorted(path.iterdir()) if path.is_dir() else [path])]


def _check_places(generation: Path, folder: Path) -> None:
    """Refuse a generation whose files cannot take their places, or which we have not written.

    Raises:
        UserError: there is a link in it, something that is no file, a folder in a file's place, or a place lies behind
            a link that leads out of the folder.
    """
    if not stat.S_ISDIR(os.lstat(generation).st_mode):
        raise UserError(f"{generation} is damaged or not ours: it is no folder")
    entries = list(generation.iterdir())
    if any(path.is_symlink() for path in entries):
        raise UserError(f"{generation} is damaged or not ours: it holds a link")
    for path in _files(generation):
        place = folder / path.relative_to(generation)
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise UserError(f"{generation} is damaged or not ours: {path.name} is no file")
        if place.is_dir() and not place.is_symlink():
            raise UserError(f"cannot write {place}: there is a folder of that name")
        if os.path.lexists(place.parent) and not place.parent.is_dir():
            raise UserError(f"cannot write {place}: {place.parent} is no folder")
        _check_inside(place.parent, folder)


def check_can_be_written(folder: Path) -> None:
    """Refuse a folder in which something else is in the place of a file of a run, before anything of it is changed.

    Raises:
        UserError: a folder has the name of a file, or ``plots`` is no folder, or a link that leads out of this one.
    """
    plots = find(folder, PLOTS)
    if os.path.lexists(plots) and not plots.is_dir():
        raise UserError(f"{plots} is no folder, but the pictures of a run are written there; move it away")
    for path in [*folder.iterdir(), *(plots.iterdir() if plots.is_dir() else [])]:
        if path.suffix in ENDINGS and path.is_dir() and not path.is_symlink():
            raise UserError(f"{path} is a folder, but a file of a run may be written there; move it away")


def clear_leftovers(folder: Path) -> None:
    """Delete the hidden files and folders of processes that were killed while they wrote into a folder."""
    for path in folder.iterdir():
        if is_hidden_name(path.name):
            with suppress(OSError):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def holds_nothing(folder: Path) -> bool:
    """Return whether a folder is empty, or holds only what a process that was killed has left."""
    return all(is_hidden_name(path.name) for path in folder.iterdir())
