"""Tensors in a file that notices when it has been changed: safetensors with a SHA-256 of everything in them.

The digest finds damage, not malice: whoever changes a file on purpose can change the digest too. Nothing in such a file
is ever executed.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

ABOUT, SEAL = "policyskip", "sha256"
"""The one entry of a file's metadata, a JSON object, and its key for the digest."""


def digest_of(tensors: dict[str, Tensor], content: dict[str, Any] | None) -> str:
    """SHA-256 of what is said about tensors on the CPU, and of their names, types, shapes and bytes."""
    digest = hashlib.sha256(json.dumps(content).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def sealed(tensors: dict[str, Tensor], content: dict[str, Any] | None = None) -> bytes:
    """A file with these tensors, and ``content``, of which JSON can be made, about them."""
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    if content is None:
        return save(plain, metadata={SEAL: digest_of(plain, None)})
    return save(plain, metadata={ABOUT: json.dumps({**content, SEAL: digest_of(plain, content)})})


def read_metadata(path: Path) -> dict[str, Any] | None:
    """What a file says about its tensors, less the digest; None if it is not ours.

    Raises:
        ValueError, TypeError, RecursionError: it says something else.
        OSError, safetensors.SafetensorError: the file cannot be read.
    """
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(ABOUT)
    if text is None:
        return None
    content = dict(json.loads(text))
    content.pop(SEAL, None)
    return content


def unsealed(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Those without a digest are taken as they are.

    Raises:
        ValueError: they are not those that were sealed.
        OSError, safetensors.SafetensorError: the file cannot be read.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
    said = json.loads(metadata.get(ABOUT, "null"))
    seal = said.get(SEAL) if isinstance(said, dict) else metadata.get(SEAL)
    content = {key: value for key, value in said.items() if key != SEAL} if isinstance(said, dict) else None
    if seal is not None and seal != digest_of(tensors, content):
        raise ValueError("its content has been changed since it was written")
    return tensors


def largest_number(content: Any) -> int:
    """The largest whole number, by size, anywhere in what JSON can say; 0 if there is none."""
    if isinstance(content, dict | list):
        inner = content.values() if isinstance(content, dict) else content
        return max(map(largest_number, inner), default=0)
    return abs(content) if isinstance(content, int) else 0
