"""What a process that is killed leaves on the disk, and a disk that fails at one call or from one call on."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from policyskip.comparison import folder as comparison_folder

CALLS = ("open", "fsync", "mkdir", "rename", "replace", "rmdir", "unlink")
"""The functions of ``os`` through which the package changes the disk."""
State = dict[str, bytes | str | None]
"""What is in a folder: files with their bytes, links with where they lead, and folders."""


class Died(BaseException):
    """The process is dead: nothing that it would still do has an effect."""


@contextmanager
def before_each_call(act: Callable[[int], None]) -> Iterator[list[str]]:
    """Call ``act`` with a number from 0 on before every call that changes the disk; yield the names of the calls."""
    made: list[str] = []

    def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            changes = name != "open" or arguments[1] & os.O_CREAT
            if changes:
                made.append(name)
                act(len(made) - 1)
            return real(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, watched(name, getattr(os, name)))
        patch.setattr(comparison_folder, "_exchange", watched("exchange", comparison_folder._exchange))
        yield made


def dying_at(number: int) -> Callable[[int], None]:
    """For :func:`before_each_call`: the process dies before this call, and every later one does nothing."""

    def act(call: int) -> None:
        if call >= number:
            raise Died

    return act


def failing_at(number: int, for_good: bool) -> Callable[[int], None]:
    """For :func:`before_each_call`: the disk is full at this call, or from this call on."""

    def act(call: int) -> None:
        if call == number or (for_good and call > number):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return act


def state_of(folder: Path) -> State:
    """What is in a folder now."""
    found: State = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found


def put_back(state: State, folder: Path) -> Path:
    """Make a folder in which this is, and nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in state.items():
        if content is None:
            (folder / name).mkdir()
        elif isinstance(content, str):
            (folder / name).symlink_to(content)
        else:
            (folder / name).write_bytes(content)
    return folder


def states_between_calls(folder: Path, body: Callable[[], object]) -> list[State]:
    """Every state in which a process that does ``body`` can leave a folder, if it is killed between two calls."""
    states: list[State] = []

    def remember(number: int) -> None:
        state = state_of(folder)
        if not states or states[-1] != state:
            states.append(state)

    with before_each_call(remember):
        body()
    remember(-1)
    return states
