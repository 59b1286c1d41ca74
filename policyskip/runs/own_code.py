"""The code of a user's own classes is kept as text in the run's folder ``own``; nothing is ever imported from there."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

from policyskip.errors import UserError, is_users_file, users_modules
from policyskip.files import reporting_write_errors, write
from policyskip.runs.folder import Run
from policyskip.texts import one_line

FOLDER = "own"
MOST_BYTES = 2**20
"""The largest source file that is kept."""


def keep(run: Run) -> None:
    """Write the source files of the user's own classes that take part into a run's folder.

    A file that is there already is left as it is; if the class has changed since, a line says so. What is installed has
    a version, and is not kept.

    Raises:
        UserError: the folder cannot be written.
    """
    for module, source in _sources().items():
        path = _path(run, module)
        with reporting_write_errors(path):
            if path.is_file():
                if path.read_bytes() != source:
                    print(f"{one_line(module)} has changed since the run began; {path} is as it was then", flush=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
        write(path, source)


def kept(run: Run) -> dict[str, Path]:
    """Return the files that :func:`keep` wrote for the classes that take part, by their names in the run's folder."""
    paths = [_path(run, module) for module in _sources()]
    return {path.relative_to(run.folder).as_posix(): path for path in paths if path.is_file()}


def _path(run: Run, module: str) -> Path:
    """Return where the source of a module is kept.

    Raises:
        UserError: a link in the run's folder leads elsewhere.
    """
    inside = Path(FOLDER, *module.split(".")).with_suffix(".py")
    if (run.folder / inside).resolve() != run.folder.resolve() / inside:
        raise UserError(f"{run.folder / inside} is a link, and nothing of a run is read or written through one")
    return run.folder / inside


def commit_of(folder: Path) -> str | None:
    """Return the commit that a folder's git repository is at; None if there is none.

    It is read from git's files: git itself would execute what a stranger's repository configures.
    """
    for place in [folder, *folder.parents]:
        if (place / ".git").exists():
            with suppress(OSError, ValueError):
                return _commit(place / ".git")
            return None
    return None


def _commit(git: Path) -> str | None:
    """Return the commit in the files of a repository, whose ``.git`` is a folder, or a file that names the folder."""
    if git.is_file():  # a worktree or a submodule
        git = git.parent / _text(git).removeprefix("gitdir:").strip()
    head = _text(git / "HEAD")
    if not head.startswith("ref:"):
        return _hash(head)
    reference = head.removeprefix("ref:").strip()
    shared = git / _text(git / "commondir") if (git / "commondir").is_file() else git
    for place in (git, shared):
        if (place / reference).is_file():
            return _hash(_text(place / reference))
    packed = (shared / "packed-refs").read_text().splitlines() if (shared / "packed-refs").is_file() else []
    return next((_hash(line.split()[0]) for line in packed if line.endswith(f" {reference}")), None)


def _text(path: Path) -> str:
    """Return the text of a short file without what surrounds it."""
    if not path.is_file():  # a pipe would be read for ever
        return ""
    with path.open("rb") as file:
        return file.read(4096).decode().strip()


def _hash(text: str) -> str | None:
    """Return a commit's hash, or None for a text that is none."""
    return text if len(text) in (40, 64) and not set(text) - set("0123456789abcdef") else None


def _sources() -> dict[str, bytes]:
    """Return the source of each module with a class of the user's own, by the module's name; it is text."""
    sources = {}
    for module in users_modules():
        file = getattr(sys.modules.get(module), "__file__", None)
        if isinstance(file, str) and file.endswith(".py") and is_users_file(file):
            with suppress(OSError, UnicodeDecodeError):
                content = Path(file).read_bytes()
                content.decode()
                if len(content) <= MOST_BYTES and all(part.isidentifier() for part in module.split(".")):
                    sources[module] = content
    return sources
