"""Sealed files: safetensors files with a SHA-256 digest of their content, so that a change is noticed.

The digest finds damage, not malice: whoever changes a file on purpose can change the digest too. Nothing in such a file
is ever executed.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from policyskip.files import open_regular

LARGEST_HEADER = 2**24
"""Bytes of the largest description of its tensors that a file may have."""
METADATA_KEY, DIGEST_KEY = "policyskip", "sha256"
"""The metadata entry that is a JSON object, ``content``, and the digest's key in it. In a file without ``content`` the
digest is a metadata entry of its own."""


def digest_of(tensors: dict[str, Tensor], content: dict[str, Any] | None) -> str:
    """Return the SHA-256 digest of ``content``, and of the names, dtypes, shapes and bytes of tensors on the CPU."""
    digest = hashlib.sha256(json.dumps(content).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def sealed(tensors: dict[str, Tensor], content: dict[str, Any] | None = None) -> bytes:
    """Return the bytes of a file that holds tensors, their digest, and ``content``, which JSON must be able to hold."""
    on_cpu = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    if content is None:
        return save(on_cpu, metadata={DIGEST_KEY: digest_of(on_cpu, None)})
    return save(on_cpu, metadata={METADATA_KEY: json.dumps({**content, DIGEST_KEY: digest_of(on_cpu, content)})})


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Yield an open safetensors file, which may be anything; the reader compares what it says of sizes with its own.

    Raises:
        ValueError: what is there is no file, or its header is too large.
        OSError, safetensors.SafetensorError: the file cannot be read.
    """
    with open_regular(path) as file:
        start = file.read(8)
    if len(start) == 8 and struct.unpack("<Q", start)[0] > LARGEST_HEADER:
        raise ValueError("it is no safetensors file, or its header is too large")
    with safe_open(path, "pt") as tensors:
        yield tensors


def read_metadata(path: Path) -> dict[str, Any] | None:
    """Return the ``content`` that a file was sealed with; None if the file has none.

    Raises:
        ValueError, TypeError, RecursionError: the metadata is no JSON object, or the file is refused by :func:`opened`.
        OSError, safetensors.SafetensorError: the file cannot be read.
    """
    with opened(path) as file:
        text = (file.metadata() or {}).get(METADATA_KEY)
    if text is None:
        return None
    content = dict(json.loads(text))
    content.pop(DIGEST_KEY, None)
    return content


def unsealed(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, after a comparison with its digest if it has one.

    Raises:
        ValueError: tensors or metadata are not those that were sealed, or the file is refused by :func:`opened`.
        OSError, safetensors.SafetensorError: the file cannot be read.
    """
    with opened(path) as file:
        entries = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is no dictionary
    metadata = json.loads(entries.get(METADATA_KEY, "null"))
    digest = metadata.get(DIGEST_KEY) if isinstance(metadata, dict) else entries.get(DIGEST_KEY)
    content = (
        {key: value for key, value in metadata.items() if key != DIGEST_KEY} if isinstance(metadata, dict) else None
    )
    if digest is not None and digest != digest_of(tensors, content):
        raise ValueError("its content has been changed since it was written")
    return tensors


def largest_number(content: Any) -> int:
    """Return the largest absolute value of all whole numbers in a JSON value, however deep; 0 if there are none."""
    if isinstance(content, dict | list):
        inner = content.values() if isinstance(content, dict) else content
        return max(map(largest_number, inner), default=0)
    return abs(content) if isinstance(content, int) else 0
