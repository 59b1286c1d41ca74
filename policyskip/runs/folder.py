"""The run folder: which files it holds, and how they are written so that nothing is lost.

``config.yaml`` (resolved), ``metrics.jsonl`` (one line a record), ``checkpoint.pt`` and ``best-so-far.safetensors``
(all that a resumed run needs); and of a finished run ``best.safetensors`` and ``policy.json`` (what deployment loads),
``summary.json``, ``plots/*.png`` and more, which are switched together (:meth:`Run.generation`); ``wandb/``.
Every file is written under a hidden name and then renamed, so a reader never sees half a file.
A process that writes into a run folder locks it first (:meth:`Run.lock`), so that no other process writes there.
"""

from __future__ import annotations

import io
import json
import math
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, TypeVar

import torch
from torch import Tensor

from policyskip.errors import UserError
from policyskip.files import check_regular, damaged, open_log, read, reporting_write_errors, write
from policyskip.runs import generations, schemas
from policyskip.runs.archives import checked_checkpoint
from policyskip.runs.generations import BEST, BEST_SO_FAR
from policyskip.runs.locks import lock_folder
from policyskip.sealed import sealed, unsealed
from policyskip.texts import for_json, one_line

T = TypeVar("T")
REWARD = "reward.json"
"""The file of a finished run that holds where a reward that moves stood when the run was judged."""
LARGEST_METRICS = 2**30
"""Bytes of the largest ``metrics.jsonl`` that is read."""


class Run:
    """A run's folder, which :func:`create` makes and :func:`open_run` finds.

    A copy that is sent to another process is a :class:`ReadOnlyRun`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._close_lock: Callable[[], object] | None = None

    def __reduce__(self) -> tuple[type[Run], tuple[Path]]:
        return ReadOnlyRun, (self.folder,)

    def path(self, name: str) -> Path:
        """Return where a file or folder of the run is, or would be; every reader asks here.

        Raises:
            UserError: it is behind a link that leads out of the run folder.
        """
        return generations.find(self.folder, name)

    def has(self, name: str) -> bool:
        """Return whether the run has a file of that name.

        Raises:
            UserError: there is something that is no file in its place; and as for :meth:`path`.
        """
        for _ in range(2):  # while it is looked at, another process may move it from ``.commit`` to its place
            with suppress(OSError):
                check_regular(self.path(name))
                return True
        return False

    @contextmanager
    def generation(self) -> Iterator[Run]:
        """Let the body write files that belong together into a run that has no other files; when it ends, they become
        this run's, all at once.

        What the body raises leaves this run as it was.

        Raises:
            UserError: the files cannot be written.
        """
        with generations.generation(self.folder) as folder:
            yield Run(folder)

    def lock(self) -> None:
        """Keep other processes from writing into the folder, until it is unlocked or this process ends.

        The lock is one of the operating system, on the folder itself, so a process that is killed leaves no lock
        behind. Where the operating system or the file system has no such locks, nothing is locked. What a process that
        was killed has left is put in order.

        Raises:
            UserError: another process has locked the folder, it cannot be put in order, or something else is in the
                place of a file that a run writes.
        """
        if self._close_lock is None:
            try:
                descriptor = lock_folder(self.folder)
            except BlockingIOError as error:
                raise UserError(f"another process is writing into {self.folder}; wait for it or stop it") from error
            if descriptor is not None:
                self._close_lock = weakref.finalize(self, os.close, descriptor)
                _LOCKED_RUNS.add(self)
                generations.clear_leftovers(self.folder)
            generations.move_into_place(self.folder)
            generations.check_can_be_written(self.folder)

    def unlock(self) -> None:
        """Let other processes write into the folder."""
        _LOCKED_RUNS.discard(self)
        if self._close_lock is not None:
            self._close_lock()
            self._close_lock = None

    @property
    def name(self) -> str:
        """Return the folder's name, also where it was typed as "." or ".."."""
        return self.folder.name if self.folder.name not in ("", "..") else self.folder.resolve().name

    @property
    def command(self) -> str:
        """Return the command that made the run.

        Raises:
            UserError: ``config.yaml`` is missing or damaged.
        """
        return self._read("config.yaml", lambda path: read(path).decode().partition("\n")[0].removeprefix("# "))

    def save_config(self, command: str, config: str) -> None:
        """Write ``config.yaml``: the command as a comment, then the configuration, which is YAML."""
        in_one_line = "\\n".join(command.splitlines())  # text behind a line break would be read as configuration
        write(self.folder / "config.yaml", f"# {in_one_line}\n{config}".encode())

    def save_json(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file; numbers that are NaN or infinite, which JSON does not have, become null."""
        text = json.dumps(_without_nonfinite(content), indent=2, ensure_ascii=False, allow_nan=False)
        write(self.folder / name, f"{for_json(text)}\n".encode())

    def load_json(self, name: str) -> dict[str, Any]:
        """Return the content of a JSON file.

        Raises:
            UserError: there is no such file, or it is damaged.
        """
        content: object = self._read(name, lambda path: schemas.check(name, json.loads(read(path))))
        if not isinstance(content, dict):
            raise UserError(f"{self.folder / name} is damaged: it holds no JSON object")
        return content

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write ``checkpoint.pt``, after the records in ``metrics.jsonl`` have reached the disk."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        if self.has("metrics.jsonl"):  # a checkpoint must not survive a power failure that its records do not
            with self._appending_metrics() as file:
                os.fsync(file.fileno())
        write(self.folder / "checkpoint.pt", buffer.getvalue())

    def load_checkpoint(self) -> dict[str, Any]:
        """Return the state that ``training.train`` saved: ``step``, ``seconds``, ``cursor``, ``learner`` and more.

        Nothing in the file is executed.

        Raises:
            UserError: there is no checkpoint, it is damaged, or the file is none of ours.
        """
        return self._read("checkpoint.pt", checked_checkpoint)

    def save_best(self, tensors: dict[str, Tensor]) -> None:
        """Write the best weights so far; :meth:`deploy_best` makes them those of the finished run."""
        write(self.folder / BEST_SO_FAR, sealed(tensors))

    def load_best_so_far(self) -> dict[str, Tensor]:
        """Return the best weights of a run that learns; of a finished run, those that it deploys.

        Raises:
            UserError: there are none, or the file is damaged.
        """
        return self._read(self.best_so_far, unsealed)

    @property
    def best_so_far(self) -> str:
        """Return the name of the file that :meth:`load_best_so_far` reads."""
        return BEST_SO_FAR if self.has(BEST_SO_FAR) else BEST

    def deploy_best(self, generation: Run) -> None:
        """Write the best weights so far into a generation, as those that the finished run deploys.

        Raises:
            UserError: there are none, or they cannot be read or written.
        """
        write(generation.folder / BEST, self._read(self.best_so_far, lambda path: read(path, math.inf)))

    def load_best(self) -> dict[str, Tensor]:
        """Return the weights that a finished run deploys, ``best.safetensors``.

        Raises:
            UserError: there is no such file, or it is damaged.
        """
        return self._read(BEST, unsealed)

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Write one more line to ``metrics.jsonl``."""
        with self._appending_metrics() as file:
            file.write(json.dumps(_without_nonfinite(record), allow_nan=False) + "\n")

    @contextmanager
    def _appending_metrics(self) -> Iterator[TextIO]:
        """Yield ``metrics.jsonl``, to which lines can be added.

        Raises:
            UserError: it cannot be written.
        """
        path = self.folder / "metrics.jsonl"
        with reporting_write_errors(path), open_log(path, append=True) as file:
            yield file

    def metrics(self) -> list[dict[str, Any]]:
        """Return the records of ``metrics.jsonl``, without lines that are damaged or that a kill cut short."""
        records = []
        for line in self._read("metrics.jsonl", _lines) if self.has("metrics.jsonl") else []:
            try:
                records.append(schemas.record(json.loads(line)))
            except (ValueError, RecursionError):
                continue
        return [record for record in records if record is not None]

    def rewind_metrics(self, step: int) -> None:
        """Delete the records after ``step`` from ``metrics.jsonl``, because a resumed run writes them again."""
        kept = [record for record in self.metrics() if record["step"] <= step]
        write(self.folder / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept).encode())

    def _read(self, name: str, reader: Callable[[Path], T]) -> T:
        """Return what ``reader`` makes of a file.

        Raises:
            UserError: there is no such file, or ``reader`` fails.
        """
        if not self.has(name):
            raise UserError(f"there is no {self.folder / name}; the run did not get that far")
        with damaged(self.folder / name):
            try:
                return reader(self.path(name))
            except FileNotFoundError:  # another process has just moved it from ``.commit`` to its place
                return reader(self.path(name))


class ReadOnlyRun(Run):
    """A run's folder that is only read: all methods that lock it or write a file do nothing.

    Of several processes that make one run, all but the first have their folder in this form.
    """

    def lock(self) -> None: ...

    def save_config(self, command: str, config: str) -> None: ...

    def save_json(self, name: str, content: dict[str, Any]) -> None: ...

    def save_checkpoint(self, state: dict[str, Any]) -> None: ...

    def save_best(self, tensors: dict[str, Tensor]) -> None: ...

    def append_metrics(self, record: dict[str, Any]) -> None: ...

    def rewind_metrics(self, step: int) -> None: ...


_LOCKED_RUNS: weakref.WeakSet[Run] = weakref.WeakSet()


def unlock_all() -> None:
    """Unlock every run folder that this process has locked, at the end of a command."""
    for run in list(_LOCKED_RUNS):
        run.unlock()


def create(folder: str, command: str, config: str) -> Run:
    """Make a new run folder with the command and the resolved configuration in it, and lock it.

    If a folder of that name exists and is not empty, the new folder gets -2, -3, … behind its name.

    Raises:
        UserError: the folder cannot be made.
    """
    requested = path = Path(folder)
    number = 1
    with reporting_write_errors(path):
        while True:
            run = Run(path)
            try:
                path.mkdir(parents=True, exist_ok=path.is_dir() and generations.holds_nothing(path))
                run.lock()
                if generations.holds_nothing(path):  # another process may have made a run in it meanwhile
                    break
            except (FileExistsError, UserError):
                pass
            run.unlock()
            number += 1
            path = requested.with_name(f"{requested.name}-{number}")
        run.save_config(command, config)
    return run


def open_run(folder: str) -> Run:
    """Return an existing run folder.

    Raises:
        UserError: there is no folder of that name, or it is no run folder, or its ``config.yaml`` is a link out of it.
    """
    run = Run(Path(folder))
    if "\0" in folder or not run.has("config.yaml"):  # no path of a system has that letter
        raise UserError(f"the run folder {folder} {_why_no_run(run.folder)}")
    return run


def _why_no_run(path: Path) -> str:
    """Say what is wrong with a path that was given as a run folder, and which run folders are in it."""
    try:
        if not path.is_dir():
            return "is a file" if path.exists() else "does not exist"
        inside = sorted(config.parent for config in path.glob("*/config.yaml"))
    except (OSError, ValueError):
        return "does not exist"
    runs = f"; there are runs in it, such as {one_line(inside[0])}" if inside else ""
    return f"is not a run folder: it has no config.yaml{runs}"


def _without_nonfinite(content: Any) -> Any:
    """Return nested dictionaries and lists with None in the place of every float that is NaN or infinite."""
    if isinstance(content, dict):
        return {key: _without_nonfinite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nonfinite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _lines(path: Path) -> list[bytes]:
    return read(path, LARGEST_METRICS).splitlines()
