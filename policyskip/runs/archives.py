"""``checkpoint.pt`` is read here, an archive that ``torch.save`` wrote; it is checked before anything uses its content.

Nothing in it is executed. What it says of sizes is compared with its own size first, so that a small file cannot take
all memory; what it holds must be plain values, and what every run has must be there.
"""

from __future__ import annotations

import math
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from policyskip.files import open_regular
from policyskip.runs.schemas import is_number

LARGEST_STEP = 2**40
"""Above any number of updates or batches that a run comes to."""
LARGEST_NUMBER = 2**128
"""Above any whole number that a state holds: NumPy's random generators have numbers of 128 bits."""
MOST_VALUES, DEEPEST, MOST_UPDATES = 2**20, 64, 2**16
"""Bounds of a state: how many values, how deeply nested, and how many updates since the last record."""
PLAIN = (type(None), bool, int, float, str, bytes)


def checked_checkpoint(path: Path) -> dict[str, Any]:
    """Return what ``training.train`` saved, after a check of all that the training loop itself uses.

    Raises:
        ValueError: the file is none of ours, or has been changed since it was written.
        Exception: of any other kind, where the file is no such archive.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        with zipfile.ZipFile(file) as archive:
            _check_archive(archive, size)
        file.seek(0)
        state = torch.load(file, map_location="cpu", weights_only=True)
    _check_plain(state, size)
    if not isinstance(state, dict):
        raise ValueError("it holds no state of a run")
    check_state(state)
    return state


def _check_archive(archive: zipfile.ZipFile, size: int) -> None:
    """Refuse an archive of ``size`` bytes that would become larger as it is read, or whose checksums are wrong, which
    ``torch.load`` ignores.

    Raises:
        ValueError: it is refused.
    """
    parts = archive.infolist()
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or sum(p.file_size for p in parts) > size:
        raise ValueError("its parts are larger than the file; torch.save packs nothing")
    if (name := archive.testzip()) is not None:
        raise ValueError(f"its part {name} has been changed since it was written")


def _check_plain(state: Any, size: int) -> None:
    """Refuse what no run's state has: other values than dictionaries, lists, tensors, texts and numbers, or a tree that
    is far larger than its file of ``size`` bytes, as one is that repeats its parts.

    Raises:
        ValueError: it is refused.
    """
    todo, count, total = [(state, 0)], 0, 0
    while todo:
        value, depth = todo.pop()
        count += 1
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
                raise ValueError("it holds a tensor that is not dense")
            total += value.numel() * value.element_size()
        elif isinstance(value, dict):
            todo += [(part, depth + 1) for pair in value.items() for part in pair]
        elif isinstance(value, list | tuple):
            todo += [(part, depth + 1) for part in value]
        elif not isinstance(value, PLAIN) or (isinstance(value, int) and abs(value) > LARGEST_NUMBER):
            raise ValueError(f"it holds {value!r:.80}")
        if count + len(todo) > MOST_VALUES or depth > DEEPEST or total > 16 * size:
            raise ValueError("it holds more than the state of a run")


def check_state(state: dict[str, Any]) -> None:
    """Check what every run's checkpoint has, beside the learner's own state.

    Raises:
        ValueError: something is missing, of another type, or no possible number.
    """
    for key in ("step", "cursor"):
        if type(state.get(key)) is not int or not 0 <= state[key] < LARGEST_STEP:
            raise ValueError(f"its {key} is {state.get(key)!r:.80}")
    if not is_number(state.get("seconds")) or state["seconds"] < 0:
        raise ValueError(f"its seconds are {state.get('seconds')!r:.80}")
    best = state.get("best", -math.inf)
    if not is_number(best) and best != -math.inf:
        raise ValueError(f"its best score is {best!r:.80}")
    for key in ("learner", "reward"):
        if not isinstance(state.get(key, {}), dict):
            raise ValueError(f"it holds no {key} of a run")
    if "learner" not in state:
        raise ValueError("it holds no learner of a run")
    window = state.get("window", [])
    if not isinstance(window, list) or len(window) > MOST_UPDATES or not all(map(_are_figures, window)):
        raise ValueError("its figures of the last updates are no numbers by name")


def _are_figures(figures: Any) -> bool:
    """Return whether figures of an update are numbers by name; they may be infinite."""
    return isinstance(figures, dict) and all(
        isinstance(key, str) and (isinstance(value, float) or is_number(value) or isinstance(value, bool))
        for key, value in figures.items()
    )
