"""Tensors in a file that notices when it has been changed: safetensors with a SHA-256 of everything in them.

The digest finds damage, not malice: whoever changes a file on purpose can change the digest too. Nothing in such a file
is ever executed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

SEAL = "sha256"


def digest_of(tensors: dict[str, Tensor], text: str = "") -> str:
    """SHA-256 of a text and of the names, types, shapes and bytes of tensors on the CPU."""
    digest = hashlib.sha256(text.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def sealed(tensors: dict[str, Tensor]) -> bytes:
    """The content of a sealed file."""
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    return save(plain, metadata={SEAL: digest_of(plain)})


def unsealed(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: they are not those that were sealed. Files without a seal are taken as they are.
        OSError, safetensors.SafetensorError: the file cannot be read.
    """
    with safe_open(path, "pt") as file:
        seal = (file.metadata() or {}).get(SEAL)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
    if seal is not None and seal != digest_of(tensors):
        raise ValueError("its tensors have been changed since they were written")
    return tensors
