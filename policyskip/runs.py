"""The run folder: what is in it, and how it is written so that nothing is lost.

``config.yaml`` (resolved), ``metrics.jsonl`` (one line a record), ``checkpoint.pt`` (everything needed to go on),
``best.safetensors`` and ``policy.json`` (what deployment loads), ``summary.json``, ``plots/*.png``, ``wandb/``.
What a run is loaded from is written beside its place and renamed into it, so a reader never sees half of a file.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from policyskip.errors import UserError
from policyskip.files import refusing, write


class Run:
    """A run's folder; see :func:`create` and :func:`open_run`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def command(self) -> str:
        """The command that made the run."""
        return (self.folder / "config.yaml").read_text().partition("\n")[0].removeprefix("# ")

    def save_config(self, command: str, config: str) -> None:
        write(self.folder / "config.yaml", f"# {command}\n{config}".encode())

    def save_json(self, name: str, content: dict[str, Any]) -> None:
        write(self.folder / name, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())

    def load_json(self, name: str) -> dict[str, Any]:
        content = _read(self.folder / name, lambda path: json.loads(path.read_text()))
        if not isinstance(content, dict):
            raise UserError(f"{self.folder / name} is damaged: it holds no JSON object")
        return content

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write(self.folder / "checkpoint.pt", buffer.getvalue())

    def load_checkpoint(self) -> dict[str, Any]:
        state: dict[str, Any] = _read(
            self.folder / "checkpoint.pt", lambda path: torch.load(path, map_location="cpu", weights_only=True)
        )
        return state

    def save_best(self, tensors: dict[str, Tensor]) -> None:
        plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        write(self.folder / "best.safetensors", save(plain))

    def load_best(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = _read(self.folder / "best.safetensors", load_file)
        return tensors

    def append_metrics(self, record: dict[str, Any]) -> None:
        with refusing(self.folder / "metrics.jsonl"), (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The records of ``metrics.jsonl``; a last line that a kill cut short is left out."""
        path = self.folder / "metrics.jsonl"
        records = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                records.append(json.loads(line))
            except ValueError:
                break
        return records

    def rewind_metrics(self, step: int) -> None:
        """Forget the records after ``step``: a resumed run writes them again."""
        kept = [record for record in self.metrics() if record["step"] <= step]
        write(self.folder / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept).encode())


def create(folder: str, command: str, config: str) -> Run:
    """Make a new run folder and put the resolved configuration in it, under the command that made it.

    A folder that exists and is not empty is left alone: the new one gets -2, -3, … behind its name.
    """
    wanted = path = Path(folder)
    number = 1
    with refusing(path):
        while True:
            try:
                path.mkdir(parents=True, exist_ok=path.is_dir() and not any(path.iterdir()))
                break
            except FileExistsError:
                number += 1
                path = wanted.with_name(f"{wanted.name}-{number}")
        run = Run(path)
        run.save_config(command, config)
    return run


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


def _read(path: Path, reader: Callable[[Path], Any]) -> Any:
    if not path.is_file():
        raise UserError(f"there is no {path}; the run did not get that far")
    try:
        return reader(path)
    except Exception as error:  # damaged files raise whatever the reader stumbles over
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is damaged or not ours: {reason}") from error
