"""The idx files of MNIST and Fashion-MNIST, packed with gzip or not, are read as they lie in a folder.

Shapes: N images in a set, H W pixels.
"""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from policyskip.errors import UserError
from policyskip.files import damaged

PARTS = {"train": "train", "test": "t10k"}
"""The splits, and how the names of their files begin."""
LARGEST_FILE = 2**28
"""The most bytes that an idx file may unpack to; those of MNIST have 47 million."""


def idx_folder(root: str) -> Path | None:
    """Return the folder ``root`` if it holds the four idx files, and None if it holds none of them.

    Raises:
        UserError: it holds some of them and not all.
    """
    folder = Path(root)
    names = [f"{part}-{kind}-ubyte" for part in PARTS.values() for kind in ("images-idx3", "labels-idx1")]
    there = [name for name in names if _find(folder, name) is not None]
    if there and len(there) < len(names):
        missing = next(name for name in names if name not in there)
        raise UserError(f"{folder} holds {there[0]} but neither {missing} nor {missing}.gz")
    return folder if there else None


def read_split(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Read the images of a split, uint8 (N, H, W), and their labels, int64 (N,), from 0 to 9.

    Raises:
        UserError: a file is damaged, a label is that of no class, or there are not as many labels as images.
    """
    images, labels = (
        _read(folder, f"{PARTS[split]}-{kind}-ubyte", dimensions)
        for kind, dimensions in (("images-idx3", 3), ("labels-idx1", 1))
    )
    if len(labels) and labels.max() > 9:
        raise UserError(f"{folder} has a label of {labels.max()} for the split {split}; there are ten classes, 0 to 9")
    if not 0 < len(images) == len(labels):
        raise UserError(f"{folder} holds {len(images)} images and {len(labels)} labels for the split {split}")
    return torch.from_numpy(images), torch.from_numpy(labels).long()


def _find(folder: Path, name: str) -> Path | None:
    """Return the file of that name in a folder, or the one packed with gzip; None if neither is there."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _read(folder: Path, name: str, dimensions: int) -> np.ndarray:
    """Read an idx file of bytes: two zeros, 8 (unsigned bytes), the number of dimensions, each of them, the bytes.

    Returns: uint8, of that many dimensions.

    Raises:
        UserError: the file is damaged.
    """
    path = _find(folder, name)
    assert path is not None
    with damaged(path):
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
        start = 4 + 4 * dimensions
        if content[:4] != bytes([0, 0, 8, dimensions]) or not start <= len(content) <= LARGEST_FILE:
            raise ValueError(f"it is no idx file of bytes with {dimensions} dimensions")
        shape = tuple(np.frombuffer(content[4:start], ">u4").tolist())
        if math.prod(shape) != len(content) - start:
            raise ValueError(f"it says {shape}, and holds {len(content) - start} bytes")
        return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()
