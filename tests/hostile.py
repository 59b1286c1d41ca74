"""Files that are damaged, or made to do harm."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import socket
import struct
import zipfile
import zlib
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from safetensors.torch import save

from policyskip.files import is_hidden_name

TEXTS = (
    *(
        "",
        "x",
        "nan",
        "\0",
        "[/x]",
        "$\\frac{$",
        "<script>alert(1)</script>",
        "# a\n# b",
        "a|b",
        "=HYPERLINK(1)",
        "\x1b[2J",
    ),
    *("\ud800", "\u202eabc", "é中", "../x", "/dev/zero", "~", "${oc.env:POLICYSKIP_SECRET}", "x" * 10**5, "a\\", "[b]"),
)
"""Texts that some output would take for markup, a formula, a command, a path or a value to resolve."""
NUMBERS = (-1, 0, 1, 3, 1.5, 2.5, -5, 10**9, 10**12, -(10**9), 1e300, -1e300, float("nan"), float("inf"), 10**400, True)
JUNK: list[Any] = [
    *(None, [], {}, [[]], {"a": 1}, [1, "x", None], [None], {"a": {"b": []}}, ["nan"]), *TEXTS, *NUMBERS
]  # fmt: skip
"""Values that no key of a file expects, and odd ones that some key would take."""
SECRET = "c0ffee-secret"
"""The value of the environment variable POLICYSKIP_SECRET, which nothing in a file may have written anywhere."""


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
    _replace_one(document, chance)
    return (yaml.safe_dump(document) if b"_target_" in content else json.dumps(document)).encode()


def _replace_one(document: Any, chance: random.Random) -> None:
    """Replace one value anywhere in nested dictionaries and lists, or drop a key."""
    holder, key = chance.choice(list(_places(document)))
    if chance.random() < 0.2 and isinstance(holder, dict):
        del holder[key]
    else:
        holder[key] = 99 if key == "version" else chance.choice(JUNK)


def of_another_line(content: bytes, chance: random.Random) -> bytes:
    """JSON in lines with one value of one line replaced; other files with one line twice."""
    lines = content.splitlines(keepends=True) or [b"{}\n"]
    number = chance.randrange(len(lines))
    try:
        lines[number] = of_another_version(lines[number], chance) + b"\n"
    except IndexError:  # an empty document
        lines.append(lines[number])
    return b"".join(lines)


def of_another_state(content: bytes, chance: random.Random) -> bytes:
    """What torch.save wrote, with one value replaced, and its checksums right; other files get a bit flipped."""
    try:
        state = torch.load(io.BytesIO(content), weights_only=True)
    except Exception:
        return flip(content, chance)
    if not isinstance(state, dict):
        return flip(content, chance)
    for _ in range(chance.choice([1, 1, 3])):
        holder, key = chance.choice(list(_places(state)))
        odd: list[Any] = [*JUNK, torch.tensor(float("nan")), torch.ones(3, 5), torch.ones(2).to_sparse()]
        odd += [torch.ones(1, dtype=torch.complex64), torch.zeros(0), 1e-300]
        odd += [torch.zeros(1).expand(10**6, 10**4), torch.zeros(1, device="meta")]
        holder[key] = chance.choice(odd)
    if chance.random() < 0.1:
        holder[key] = state  # a tree without an end
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def inflating(content: bytes, chance: random.Random) -> bytes:
    """A small file that becomes large when it is read: an archive of zeros, or YAML of anchors."""
    if content[:2] == b"PK":
        buffer = io.BytesIO()
        with (
            zipfile.ZipFile(io.BytesIO(content)) as source,
            zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target,
        ):
            names = source.namelist()
            inflated = chance.sample(names, min(4, len(names)))
            for name in names:
                zeros = name in inflated and "/data/" in name
                with target.open(name, "w", force_zip64=True) as part:
                    if zeros:
                        for _ in range(64):
                            part.write(bytes(2**20))
                    else:
                        part.write(source.read(name))
        return buffer.getvalue()
    anchors = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    anchors += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9))
    return anchors.encode() + (content if chance.random() < 0.5 else b"")


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
    "value": of_another_version,
    "line": of_another_line,
    "state": of_another_state,
    "inflating": inflating,
    "bomb": lambda content, chance: BOMBS[chance.choice(list(BOMBS))](),
}


LINKS = ["../../outside/victim", "../../outside", "../../outside/new", "/etc/passwd", "/dev/zero", "config.yaml"]
OBSTACLES: dict[str, Callable[[Path], object]] = {
    **{f"a link to {target}": lambda path, target=target: path.symlink_to(target) for target in LINKS},
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a pipe": os.mkfifo,
    "a socket": lambda path: _socket(path),
    "a folder": lambda path: path.mkdir(),
    "a folder of a link": lambda path: _folder(path, "victim", OBSTACLES["a link to ../../outside/victim"]),
    "a folder of a folder": lambda path: _folder(path, "best.safetensors", OBSTACLES["a link to ../../outside"]),
    "a folder of a pipe": lambda path: _folder(path, "policy.json", OBSTACLES["a pipe"]),
    "a file": lambda path: path.write_text("{}"),
    "a terabyte": lambda path: _sparse(path, 2**40),
    "a gigabyte": lambda path: _sparse(path, 2**30),
}
"""What can lie in the place of a run's file or folder."""


def _folder(path: Path, name: str, fill: Callable[[Path], object]) -> None:
    path.mkdir()
    fill(path / name)


def _sparse(path: Path, size: int) -> None:
    """Make a file of zeros that takes no room on the disk."""
    path.touch()
    os.truncate(path, size)


def _socket(path: Path) -> None:
    """Make a socket; its path may be longer than sockets allow."""
    with socket.socket(socket.AF_UNIX) as listener, chdir(path.parent):
        listener.bind(path.name)


def contents(folder: Path) -> dict[str, bytes | int | str | None]:
    """Every file and folder below, with what is in it: a link has its target, a very large file its size.

    What a process that was killed has left is passed over: the next command deletes it.
    """
    found: dict[str, bytes | int | str | None] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if "__pycache__" in name.parts or any(map(is_hidden_name, name.parts)):
            continue
        if path.is_symlink():
            found[str(name)] = os.readlink(path)
        elif path.is_file():
            size = path.stat().st_size
            found[str(name)] = path.read_bytes() if size < 2**28 else size
        else:
            found[str(name)] = None
    return found


def values_in(content: bytes, chance: random.Random, text: str) -> bytes:
    """JSON or YAML with ``text`` in the place of one of its texts, or as the name of one of its keys."""
    is_yaml = b"_target_" in content and not content.startswith(b"{")
    document = yaml.safe_load(content) if is_yaml else json.loads(content)
    places = [(holder, key) for holder, key in _places(document) if isinstance(holder[key], str)]
    holder, key = chance.choice(places)
    if isinstance(holder, dict) and chance.random() < 0.1:
        holder[text] = holder.pop(key)
    else:
        holder[key] = text
    if is_yaml:
        return b"# policyskip train\n" + yaml.safe_dump(document).encode()
    return json.dumps(document).encode()


def _picture(kind: str, mode: str = "RGB", size: tuple[int, int] = (8, 8), **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind, **options)
    return buffer.getvalue()


def _claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be of this size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    data = b"IDAT" + zlib.compress(bytes(100))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))


POSTSCRIPT = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(marker) (w) file closefile\nshowpage\n%%EOF\n"
)
IMAGES: dict[str, Callable[[], bytes]] = {
    "a picture": lambda: _picture("PNG"),
    "PostScript": lambda: POSTSCRIPT,
    "a jpeg": lambda: _picture("JPEG"),
    "a gif": lambda: _picture("GIF"),
    "grey": lambda: _picture("PNG", "L"),
    "one bit": lambda: _picture("PNG", "1"),
    "16 bits": lambda: _picture("PNG", "I;16"),
    "with alpha": lambda: _picture("PNG", "RGBA"),
    "a palette": lambda: _picture("PNG", "P"),
    "CMYK": lambda: _picture("JPEG", "CMYK"),
    "floats": lambda: _picture("TIFF", "F"),
    "one pixel": lambda: _picture("PNG", size=(1, 1)),
    "long": lambda: _picture("PNG", size=(1, 5000)),
    "a bomb": lambda: _claiming(2**16, 2**16),
    "a larger bomb": lambda: _claiming(2**31 - 1, 2**31 - 1),
    "no pixels": lambda: _claiming(0, 8),
    "cut": lambda: _picture("PNG")[:40],
    "empty": lambda: b"",
    "noise": lambda: bytes(range(256)),
    "a PDF": lambda: _picture("PDF"),
    "an icon": lambda: _picture("ICO"),
    "a web page": lambda: b"<!DOCTYPE html><html>",
    "a WMF": lambda: b"\xd7\xcd\xc6\x9a\x00\x00" + struct.pack("<4hHI", 0, 0, 8, 8, 72, 0) + b"\x01\x00" * 20,
}  # fmt: skip
"""Files that lie where an image should; some are images."""


def _saved(state: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


def _sealed_by_somebody(**metadata: Any) -> bytes:
    return save({"stem.conv.weight": torch.ones(4, 3, 3, 3)}, metadata={"policyskip": json.dumps(metadata)})


def _cifar(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    """A ResNet-20 in the layout of which most files are, with some tensors replaced."""
    state = {
        "conv1.weight": torch.ones(16, 3, 3, 3),
        "linear.weight": torch.ones(10, 64),
        "linear.bias": torch.ones(10),
    }
    for norm, width in [("bn1", 16)]:
        state |= {f"{norm}.{name}": torch.ones(width) for name in ("weight", "bias", "running_mean", "running_var")}
    for stage, width in [(1, 16), (2, 32), (3, 64)]:
        for block in range(3):
            for conv in (1, 2):
                inputs = width // 2 if stage > 1 and block == 0 and conv == 1 else width
                place = f"layer{stage}.{block}"
                state[f"{place}.conv{conv}.weight"] = torch.ones(width, inputs, 3, 3)
                for name in ("weight", "bias", "running_mean", "running_var"):
                    state[f"{place}.bn{conv}.{name}"] = torch.ones(width)
    return state | changes


WEIGHTS: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "a web page": lambda: b"<!DOCTYPE html>\n<html><body>Not found</body></html>\n",
    "a pointer": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n",
    "an archive": lambda: b"\x1f\x8b" + bytes(50),
    "a pickle": lambda: pickle.dumps(Bomb()),
    "a module": lambda: _saved(torch.nn.Linear(2, 2)),
    "a list": lambda: _saved([torch.ones(2)]),
    "no tensors": lambda: _saved({"state_dict": {}}),
    "numbers": lambda: _saved({"state_dict": {"a": 1}}),
    "a network": lambda: _saved(_cifar()),
    "another network": lambda: _saved({"state_dict": {"features.0.weight": torch.ones(2, 3, 3, 3)}}),
    "sparse": lambda: _saved(_cifar(**{"linear.weight": torch.ones(10, 64).to_sparse()})),
    "meta": lambda: _saved(_cifar(**{"linear.weight": torch.ones(10, 64, device="meta")})),
    "float8": lambda: _saved(_cifar(**{"linear.weight": torch.ones(10, 64).to(torch.float8_e4m3fn)})),
    "complex": lambda: _saved(_cifar(**{"linear.weight": torch.ones(10, 64, dtype=torch.complex64)})),
    "a scalar": lambda: _saved(_cifar(**{"conv1.weight": torch.tensor(1.0)})),
    "NaN": lambda: _saved(_cifar(**{"conv1.weight": torch.full((16, 3, 3, 3), float("nan"))})),
    "no rows": lambda: _saved(_cifar(**{"conv1.weight": torch.ones(0, 3, 3, 3)})),
    "a view that is larger": lambda: _saved(_cifar(**{"linear.weight": torch.ones(1).expand(10**6, 10**4)})),
    "a stage of a billion": lambda: _saved(_cifar(**{"layer1000000000.0.conv1.weight": torch.ones(2)})),
    "a block of a billion": lambda: _saved(_cifar(**{"layer3.1000000000.conv1.weight": torch.ones(2)})),
    "a hole": lambda: _saved(_cifar(**{"layer3.5.conv1.weight": torch.ones(64, 64, 3, 3)})),
    "no text for a key": lambda: _saved({"state_dict": {3: torch.ones(2)}}),
    "itself": lambda: _saved({"state_dict": {"a": {"b": {"c": torch.ones(2)}}}}),
    "depth of a billion": lambda: _sealed_by_somebody(num_classes=10, depth=6 * 10**9 + 2, width=16),
    "depth of a text": lambda: _sealed_by_somebody(num_classes="x", depth="20", width=[]),
    "minus one class": lambda: _sealed_by_somebody(num_classes=-1, depth=20, width=16),
    "a list of metadata": lambda: save({"a": torch.ones(1)}, metadata={"policyskip": "[1]"}),
}  # fmt: skip
"""Files that lie where weights should."""
