"""The run folder: which files it holds, and how they are written so that nothing is lost.

``config.yaml`` (resolved), ``metrics.jsonl`` (one line a record), ``checkpoint.pt`` (all that a resumed run needs),
``best.safetensors`` and ``policy.json`` (what deployment loads), ``summary.json``, ``plots/*.png``, ``wandb/``.
Files that a run is loaded from are written under a temporary name and then renamed, so a reader never sees half a file.
A process that writes into a run folder locks it first (:meth:`Run.lock`), so that no other process writes there.
"""

from __future__ import annotations

import io
import json
import math
import os
import weakref
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from policyskip.errors import UserError
from policyskip.files import damaged, reporting_write_errors, write
from policyskip.runs import schemas
from policyskip.sealed import sealed, unsealed

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")


class Run:
    """A run's folder, which :func:`create` makes and :func:`open_run` finds.

    A copy that is sent to another process is a :class:`ReadOnlyRun`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._close_lock: Callable[[], object] | None = None

    def __reduce__(self) -> tuple[type[Run], tuple[Path]]:
        return ReadOnlyRun, (self.folder,)

    def lock(self) -> None:
        """Keep other processes from writing into the folder, until it is unlocked or this process ends.

        The lock is one of the operating system, on the folder itself, so a process that is killed leaves no lock
        behind. Where the operating system or the file system has no such locks, nothing is locked.

        Raises:
            UserError: another process has locked the folder.
        """
        if self._close_lock is None:
            try:
                descriptor = lock_folder(self.folder)
            except BlockingIOError as error:
                raise UserError(f"another process is writing into {self.folder}; wait for it or stop it") from error
            if descriptor is not None:
                self._close_lock = weakref.finalize(self, os.close, descriptor)
                _LOCKED_RUNS.add(self)

    def unlock(self) -> None:
        """Let other processes write into the folder."""
        _LOCKED_RUNS.discard(self)
        if self._close_lock is not None:
            self._close_lock()
            self._close_lock = None

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def command(self) -> str:
        """Return the command that made the run."""
        return (self.folder / "config.yaml").read_text("utf-8").partition("\n")[0].removeprefix("# ")

    def save_config(self, command: str, config: str) -> None:
        """Write ``config.yaml``: the command as a comment, then the configuration, which is YAML."""
        in_one_line = "\\n".join(command.splitlines())  # text behind a line break would be read as configuration
        write(self.folder / "config.yaml", f"# {in_one_line}\n{config}".encode())

    def save_json(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file; numbers that are NaN or infinite, which JSON does not have, become null."""
        text = json.dumps(_without_nonfinite(content), indent=2, ensure_ascii=False, allow_nan=False)
        write(self.folder / name, f"{text}\n".encode())

    def load_json(self, name: str) -> dict[str, Any]:
        """Return the content of a JSON file.

        Raises:
            UserError: there is no such file, or it is damaged.
        """
        content: object = _read(self.folder / name, lambda path: schemas.check(name, json.loads(path.read_bytes())))
        if not isinstance(content, dict):
            raise UserError(f"{self.folder / name} is damaged: it holds no JSON object")
        return content

    def update_summary(self, figures: dict[str, Any]) -> None:
        """Add figures to ``summary.json``, or replace those that it has under the same keys.

        Raises:
            UserError: there is no ``summary.json``, it is damaged, or it cannot be written.
        """
        self.save_json("summary.json", self.load_json("summary.json") | figures)

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write ``checkpoint.pt``, after the records in ``metrics.jsonl`` have reached the disk."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        metrics = self.folder / "metrics.jsonl"
        if metrics.exists():  # a checkpoint must not survive a power failure that its records do not
            with reporting_write_errors(metrics), metrics.open("ab") as file:
                os.fsync(file.fileno())
        write(self.folder / "checkpoint.pt", buffer.getvalue())

    def load_checkpoint(self) -> dict[str, Any]:
        """Return the state that ``training.train`` saved: ``step``, ``seconds``, ``cursor``, ``learner`` and more.

        Nothing in the file is executed.

        Raises:
            UserError: there is no checkpoint, it is damaged, or the file is none of ours.
        """
        path = self.folder / "checkpoint.pt"
        state = _read(path, _load_archive)
        kinds: dict[str, Any] = {"step": int, "seconds": int | float, "cursor": int, "learner": dict}
        for key, kind in kinds.items():
            if not isinstance(state, dict) or not isinstance(state.get(key), kind) or isinstance(state[key], bool):
                raise UserError(f"{path} is damaged or not ours: it holds no {key} of a run")
        return state

    def save_best(self, tensors: dict[str, Tensor]) -> None:
        """Write the best weights so far to ``best.safetensors``."""
        write(self.folder / "best.safetensors", sealed(tensors))

    def load_best(self) -> dict[str, Tensor]:
        """Return the tensors of ``best.safetensors``.

        Raises:
            UserError: there is no such file, or it is damaged.
        """
        return _read(self.folder / "best.safetensors", unsealed)

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Write one more line to ``metrics.jsonl``."""
        with reporting_write_errors(self.folder / "metrics.jsonl"), (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(_without_nonfinite(record), allow_nan=False) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Return the records of ``metrics.jsonl``, without lines that are damaged or that a kill cut short."""
        path = self.folder / "metrics.jsonl"
        records = []
        for line in path.read_bytes().splitlines() if path.exists() else []:
            try:
                records.append(schemas.record(json.loads(line)))
            except (ValueError, RecursionError):
                continue
        return [record for record in records if record is not None]

    def rewind_metrics(self, step: int) -> None:
        """Delete the records after ``step`` from ``metrics.jsonl``, because a resumed run writes them again."""
        kept = [record for record in self.metrics() if record["step"] <= step]
        write(self.folder / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept).encode())


class ReadOnlyRun(Run):
    """A run's folder that is only read: all methods that lock or write do nothing.

    Of several processes that make one run, all but the first have their folder in this form.
    """

    def lock(self) -> None: ...

    def save_config(self, command: str, config: str) -> None: ...

    def save_json(self, name: str, content: dict[str, Any]) -> None: ...

    def update_summary(self, figures: dict[str, Any]) -> None: ...

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
    if not path.name:
        raise UserError(f"run.dir={folder} is no folder of its own; name one that is to be made")
    number = 1
    with reporting_write_errors(path):
        while True:
            run = Run(path)
            try:
                path.mkdir(parents=True, exist_ok=path.is_dir() and _is_unused(path))
                run.lock()
                if _is_unused(path):  # another process may have made a run in it meanwhile
                    break
            except (FileExistsError, UserError):
                pass
            run.unlock()
            number += 1
            path = requested.with_name(f"{requested.name}-{number}")
        run.save_config(command, config)
    return run


def _is_unused(folder: Path) -> bool:
    """Return whether a folder is empty, or holds only what is left of a run that was killed before its first file."""
    return all(entry.name == "config.yaml.tmp" for entry in folder.iterdir())


def open_run(folder: str) -> Run:
    """Return an existing run folder.

    Raises:
        UserError: there is no folder of that name, or it is no run folder.
    """
    path = Path(folder)
    if not (path / "config.yaml").is_file():
        what = "is not a run folder: it has no config.yaml" if path.is_dir() else "does not exist"
        raise UserError(f"the run folder {folder} {what}")
    return Run(path)


def lock_folder(folder: Path) -> int | None:
    """Lock a folder for as long as the returned file descriptor is open; None where there are no such locks.

    Raises:
        BlockingIOError: the folder is locked already.
    """
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:  # a file system without locks
        os.close(descriptor)
        return None
    return descriptor


def _load_archive(path: Path) -> Any:
    """Return what ``torch.save`` wrote, after a test of the file's checksums, which ``torch.load`` ignores.

    Raises:
        ValueError: a checksum is wrong.
        Exception: of any other kind, where the file is no such archive.
    """
    with zipfile.ZipFile(path) as archive:
        if (part := archive.testzip()) is not None:
            raise ValueError(f"its part {part} has been changed since it was written")
    return torch.load(path, map_location="cpu", weights_only=True)


def _without_nonfinite(content: Any) -> Any:
    """Return nested dictionaries and lists with None in the place of every float that is NaN or infinite."""
    if isinstance(content, dict):
        return {key: _without_nonfinite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nonfinite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _read(path: Path, reader: Callable[[Path], T]) -> T:
    """Return what ``reader`` makes of a file.

    Raises:
        UserError: there is no such file, or ``reader`` fails.
    """
    if not path.is_file():
        raise UserError(f"there is no {path}; the run did not get that far")
    with damaged(path):
        return reader(path)
