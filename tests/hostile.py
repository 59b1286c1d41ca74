"""Files that are damaged, or made to do harm."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save

JUNK: list[Any] = [None, True, -1, 0, 1.5, "", "x", "nan", "\0", [], {}, [[]], {"a": 1}, [1, "x", None]]


class Bomb:
    """Unpickling it makes a file named ``marker`` in the current folder."""

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, ("marker", "w")


def torch_bomb() -> bytes:
    buffer = io.BytesIO()
    torch.save({"learner": Bomb(), "step": 2, "a": torch.ones(2)}, buffer)
    return buffer.getvalue()


def old_torch_bomb() -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": Bomb()}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


BOMBS: dict[str, Callable[[], bytes]] = {
    "a pickle": lambda: pickle.dumps(Bomb()),
    "an old pickle": lambda: pickle.dumps(Bomb(), protocol=0),
    "torch's file": torch_bomb,
    "torch's old file": old_torch_bomb,
    "YAML that makes objects": lambda: b"seed: !!python/object/apply:builtins.open [marker, w]\nagent: {}\n",
    "YAML that interpolates": lambda: b"seed: ${oc.create:{a:1}}\nagent: ${oc.env:HOME}\n",
}


def cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content) or 1)]


def flip(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content or b"\0")
    for _ in range(chance.choice([1, 1, 8])):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def noise(content: bytes, chance: random.Random) -> bytes:
    return chance.randbytes(chance.choice([0, 1, 8, 100, len(content)]))


def longer(content: bytes, chance: random.Random) -> bytes:
    return content + chance.randbytes(chance.choice([1, 1000, 10**6]))


def twice(content: bytes, chance: random.Random) -> bytes:
    return content + content


def oversized(content: bytes, chance: random.Random) -> bytes:
    """Safetensors that claim a header, or tensors, far larger than the file; JSON nested without end."""
    claims = {"a": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4 * 10**18]}}
    header = json.dumps(claims).encode()
    large = {"policyskip": json.dumps({"num_classes": 10, "depth": 6 * 10**9 + 2, "width": 10**7})}
    return chance.choice(
        [
            struct.pack("<Q", 2**62) + content[8:],
            struct.pack("<Q", len(header)) + header,
            save({"stem.conv.weight": torch.ones(4, 3, 3, 3)}, metadata=large),
            b"[" * 10**5,
            b'{"a":' * 10**5,
        ]
    )


def of_another_version(content: bytes, chance: random.Random) -> bytes:
    """JSON or YAML with one value replaced, or a key dropped; other files get a bit flipped."""
    try:
        document = yaml.safe_load(content) if b"_target_" in content else json.loads(content)
    except (ValueError, yaml.YAMLError):
        return flip(content, chance)
    if not isinstance(document, dict):
        return b"{}"
    places = list(_places(document))
    holder, key = chance.choice(places)
    if chance.random() < 0.2 and isinstance(holder, dict):
        del holder[key]
    else:
        holder[key] = 99 if key == "version" else chance.choice(JUNK)
    return (yaml.safe_dump(document) if b"_target_" in content else json.dumps(document)).encode()


def _places(document: Any) -> Any:
    for key, value in list(document.items()) if isinstance(document, dict) else list(enumerate(document)):
        yield document, key
        if isinstance(value, dict | list):
            yield from _places(value)


DAMAGE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "cut": cut,
    "flip": flip,
    "noise": noise,
    "longer": longer,
    "twice": twice,
    "oversized": oversized,
    "version": of_another_version,
    "bomb": lambda content, chance: BOMBS[chance.choice(list(BOMBS))](),
}


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below, with what is in it."""
    paths = [path for path in folder.rglob("*") if "__pycache__" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in sorted(paths)}
