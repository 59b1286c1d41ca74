"""The run folder: what is in it, and how it is written so that nothing is lost.

``config.yaml`` (resolved), ``metrics.jsonl`` (one line a record), ``checkpoint.pt`` (everything needed to go on),
``best.safetensors`` and ``policy.json`` (what deployment loads), ``summary.json``, ``plots/*.png``, ``wandb/``.
What a run is loaded from is written beside its place and renamed into it, so a reader never sees half of a file.
Whoever writes into a run folder holds it (:meth:`Run.hold`), and no other process can.
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
from typing import Any

import torch
from torch import Tensor

from policyskip.errors import UserError
from policyskip.files import damaged, reporting_write_errors, write
from policyskip.sealed import sealed, unsealed

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class Run:
    """A run's folder; see :func:`create` and :func:`open_run`. Handed to another process it is a :class:`ReadRun`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._let_go: Callable[[], object] | None = None

    def __reduce__(self) -> tuple[type[Run], tuple[Path]]:
        return ReadRun, (self.folder,)

    def hold(self) -> None:
        """Keep other processes from writing into the folder, until it is released or this process ends.

        The lock is the system's own, on the folder itself: a process that is killed leaves nothing behind. Where the
        system or the file system has no such locks, nothing is held.

        Raises:
            UserError: another process holds it.
        """
        if self._let_go is None:
            try:
                descriptor = locked(self.folder)
            except BlockingIOError as error:
                raise UserError(f"another process is writing into {self.folder}; wait for it or stop it") from error
            if descriptor is not None:
                self._let_go = weakref.finalize(self, os.close, descriptor)
                _HELD.add(self)

    def release(self) -> None:
        """Let others write into the folder."""
        _HELD.discard(self)
        if self._let_go is not None:
            self._let_go()
            self._let_go = None

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def command(self) -> str:
        """The command that made the run."""
        return (self.folder / "config.yaml").read_text("utf-8").partition("\n")[0].removeprefix("# ")

    def save_config(self, command: str, config: str) -> None:
        in_a_line = "\\n".join(command.splitlines())  # or what is behind a line break would be read as configuration
        write(self.folder / "config.yaml", f"# {in_a_line}\n{config}".encode())

    def save_json(self, name: str, content: dict[str, Any]) -> None:
        text = json.dumps(in_json(content), indent=2, ensure_ascii=False, allow_nan=False)
        write(self.folder / name, f"{text}\n".encode())

    def load_json(self, name: str) -> dict[str, Any]:
        content = _read(self.folder / name, lambda path: json.loads(path.read_bytes()))
        if not isinstance(content, dict):
            raise UserError(f"{self.folder / name} is damaged: it holds no JSON object")
        return content

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        metrics = self.folder / "metrics.jsonl"
        if metrics.exists():  # no checkpoint is safer than the records before it
            with reporting_write_errors(metrics), metrics.open("ab") as file:
                os.fsync(file.fileno())
        write(self.folder / "checkpoint.pt", buffer.getvalue())

    def load_checkpoint(self) -> dict[str, Any]:
        """Where the run stands: ``step``, ``seconds`` and the rest of what ``training.train`` saved.

        Raises:
            UserError: there is none, or it is damaged or something else. Nothing in it is executed.
        """
        path = self.folder / "checkpoint.pt"
        state = _read(path, _unpacked)
        wanted: dict[str, Any] = {"step": int, "seconds": int | float, "cursor": int, "learner": dict}
        for key, kind in wanted.items():
            if not isinstance(state, dict) or not isinstance(state.get(key), kind) or isinstance(state[key], bool):
                raise UserError(f"{path} is damaged or not ours: it holds no {key} of a run")
        return state

    def save_best(self, tensors: dict[str, Tensor]) -> None:
        write(self.folder / "best.safetensors", sealed(tensors))

    def load_best(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = _read(self.folder / "best.safetensors", unsealed)
        return tensors

    def append_metrics(self, record: dict[str, Any]) -> None:
        with reporting_write_errors(self.folder / "metrics.jsonl"), (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(in_json(record), allow_nan=False) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The records of ``metrics.jsonl``; lines that are damaged, or that a kill cut short, are left out."""
        path = self.folder / "metrics.jsonl"
        records = []
        for line in path.read_bytes().splitlines() if path.exists() else []:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(
                    {key: value for key, value in record.items() if isinstance(value, int | float | list | None)}
                )
        return records

    def rewind_metrics(self, step: int) -> None:
        """Forget the records after ``step``: a resumed run writes them again."""
        kept = [record for record in self.metrics() if record["step"] <= step]
        write(self.folder / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept).encode())


class ReadRun(Run):
    """The folder of a run that several processes make, for those that do not write into it."""

    def hold(self) -> None: ...

    def save_config(self, command: str, config: str) -> None: ...

    def save_json(self, name: str, content: dict[str, Any]) -> None: ...

    def save_checkpoint(self, state: dict[str, Any]) -> None: ...

    def save_best(self, tensors: dict[str, Tensor]) -> None: ...

    def append_metrics(self, record: dict[str, Any]) -> None: ...

    def rewind_metrics(self, step: int) -> None: ...


_HELD: weakref.WeakSet[Run] = weakref.WeakSet()


def release_all() -> None:
    """Let others write into every folder that this process holds: a command has ended, well or not."""
    for run in list(_HELD):
        run.release()


def create(folder: str, command: str, config: str) -> Run:
    """Make a new run folder and put the resolved configuration in it, under the command that made it.

    A folder that exists and is not empty is left alone: the new one gets -2, -3, … behind its name.
    """
    wanted = path = Path(folder)
    if not path.name:
        raise UserError(f"run.dir={folder} is no folder of its own; name one that is to be made")
    number = 1
    with reporting_write_errors(path):
        while True:
            run = Run(path)
            try:
                path.mkdir(parents=True, exist_ok=path.is_dir() and _is_unused(path))
                run.hold()
                if _is_unused(path):  # another run may have begun in it meanwhile
                    break
            except (FileExistsError, UserError):
                pass
            run.release()
            number += 1
            path = wanted.with_name(f"{wanted.name}-{number}")
        run.save_config(command, config)
    return run


def _is_unused(folder: Path) -> bool:
    """Whether there is nothing in a folder, but for what a kill leaves of a run that had only begun to begin."""
    return all(entry.name == "config.yaml.tmp" for entry in folder.iterdir())


def open_run(folder: str) -> Run:
    """An existing run folder.

    Raises:
        UserError: it is not one.
    """
    path = Path(folder)
    if not (path / "config.yaml").is_file():
        what = "is not a run folder: it has no config.yaml" if path.is_dir() else "does not exist"
        raise UserError(f"the run folder {folder} {what}")
    return Run(path)


def locked(folder: Path) -> int | None:
    """A descriptor that locks a folder for as long as it is open; None where there are no such locks.

    Raises:
        BlockingIOError: it is locked already.
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


def _unpacked(path: Path) -> Any:
    """What ``torch.save`` wrote: a zip archive, whose checksums ``torch.load`` does not look at."""
    with zipfile.ZipFile(path) as archive:
        if (part := archive.testzip()) is not None:
            raise ValueError(f"its part {part} has been changed since it was written")
    return torch.load(path, map_location="cpu", weights_only=True)


def in_json(content: Any) -> Any:
    """The same with None for every NaN and infinity, which JSON does not have."""
    if isinstance(content, dict):
        return {key: in_json(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [in_json(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _read(path: Path, reader: Callable[[Path], Any]) -> Any:
    if not path.is_file():
        raise UserError(f"there is no {path}; the run did not get that far")
    with damaged(path):
        return reader(path)
