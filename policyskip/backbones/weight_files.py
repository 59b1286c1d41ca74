"""Files of weights are read here, whoever made them: nothing in a file is executed, and what is none is said by name.

The content of a file decides how it is read, not its name: safetensors, or what ``torch.save`` wrote.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from policyskip.errors import UserError, first_line
from policyskip.sealed import read_metadata, unsealed
from policyskip.texts import a_type, one_line

State = dict[str, Tensor]

WRAPPERS = ("state_dict", "model_state_dict", "resnet", "net", "model")
"""The keys under which programs that train networks put the state dict into a larger dictionary, in order."""
PREFIXES = ("module.", "_orig_mod.")
"""What ``DataParallel`` and ``torch.compile`` write in front of every name."""
ACCURACIES = ("best_prec1", "best_acc1", "best_acc", "prec1", "acc1", "acc", "accuracy")
"""The keys under which such programs note the accuracy, as a share or in per cent."""
DTYPES = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
}
MOST_INFLATION = 10
"""How many times its own size an archive may fill in memory; ``torch.save`` does not compress at all."""
STATE_DICT = "save its weights alone, torch.save(model.state_dict(), FILE), and give that file"
UNPACK = "unpack it, and give the file of weights in it"
SIGNATURES = (
    (b"version https://git-lfs", "it is a pointer of Git LFS and not the file itself; `git lfs pull` fetches the file"),
    (b"\x89HDF\r\n\x1a\n", f"it is an HDF5 file, as Keras writes; load it where it was made, and {STATE_DICT}"),
    (b"\x93NUMPY", f"it is an array of NumPy; load it where it was made, and {STATE_DICT}"),
    (b"GGUF", f"it is a GGUF file; load it where it was made, and {STATE_DICT}"),
    (b"\x1f\x8b", f"it is compressed with gzip; {UNPACK}"),
    (b"\xfd7zXZ\0", f"it is compressed with xz; {UNPACK}"),
    (b"BZh", f"it is compressed with bzip2; {UNPACK}"),
    (b"\x28\xb5\x2f\xfd", f"it is compressed with zstd; {UNPACK}"),
    (b"7z\xbc\xaf\x27\x1c", f"it is a 7z archive; {UNPACK}"),
    (b"Rar!", f"it is a rar archive; {UNPACK}"),
    (b"PK\5\6", "it is an empty zip archive"),
    (b"\x89PNG", "it is a picture"),
    (b"\xff\xd8\xff", "it is a picture"),
)
"""The first bytes of files that hold no weights for the package, and what to say of them."""
OLD_TORCH = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The pickled number with which files begin that ``torch.save`` wrote before it made archives."""
CUT_OFF = "it is cut off or damaged; copy or download it again"


@dataclass(frozen=True)
class Weights:
    """Holds what a file of weights says: the tensors, and the accuracy that its network is said to reach, if any."""

    tensors: State
    accuracy: float | None = None


def read_weights(path: Path) -> Weights:
    """Read a file of weights; the prefixes of ``DataParallel`` and ``torch.compile`` are removed.

    Raises:
        UserError: the file is of another kind, is damaged, holds no tensors, or holds some that are no plain numbers.
    """
    try:
        head = _head(path)
        notes: dict[Any, Any] = {}
        if is_safetensors(head):
            content: Any = unsealed(path)
            with safe_open(path, "pt") as file:
                notes = file.metadata() or {}
        else:
            content = _read_torch(path, head)
    except UserError as error:
        raise UserError(f"cannot read {one_line(path)} as weights: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {one_line(path)} as weights: {error.strerror or error}") from error
    except (ValueError, SafetensorError) as error:
        raise UserError(f"cannot read {one_line(path)} as weights: {_damage(error)}") from error
    except Exception as error:  # readers raise exceptions of every type for damaged files
        raise UserError(f"cannot read {one_line(path)} as weights: {CUT_OFF}") from error
    while isinstance(content, dict) and (key := _wrapper(content)) is not None:
        notes, content = {**notes, **content}, content[key]
    return Weights(_named_tensors(content, one_line(path)), _stated_accuracy(notes))


def is_safetensors(head: bytes) -> bool:
    """Return whether a file that begins with these bytes is a safetensors file: eight bytes of length, then JSON."""
    return head[8:9] == b"{" and b"\0" in head[:8]


def read_content(path: Path) -> dict[str, Any] | None:
    """Return what the package wrote beside the weights of a safetensors file; None for a file that others made.

    Raises:
        UserError: the file's description is damaged.
    """
    try:
        return read_metadata(path) if is_safetensors(_head(path)) else None
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"cannot read {one_line(path)} as weights: {_damage(error)}") from error


def _head(path: Path) -> bytes:
    """Return the first bytes of a file."""
    with path.open("rb") as file:
        return file.read(512)


def _damage(error: Exception) -> str:
    """Say in words why a safetensors file cannot be read."""
    text = first_line(error)
    return f"{CUT_OFF} ({one_line(text, 120)})" if isinstance(error, SafetensorError) else f"it is damaged: {text}"


def _read_torch(path: Path, head: bytes) -> Any:
    """Return what ``torch.save`` wrote into a file, without executing anything.

    Raises:
        UserError: it is a file of another kind, says that it is far larger than it is, or needs code.
    """
    if (reason := _other_kind(path, head)) is not None:
        raise UserError(reason)
    try:
        with path.open("rb") as file:  # by its path, torch.load would go by the file's name
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise whatever the reader stumbles over
        named = re.search(r"GLOBAL ([\w.]+)|class ([\w.]+)|function ([\w.]+)", str(error))
        if named is None or "weights_only" not in str(error).lower().replace(" ", "_"):
            raise UserError(CUT_OFF) from error
        what = next(filter(None, named.groups()))
        raise UserError(
            f"it holds a Python object ({one_line(what, 80)}), and reading that would execute code, which is never "
            f"done; where the file was made, {STATE_DICT}"
        ) from error


def _other_kind(path: Path, head: bytes) -> str | None:
    """Say what a file is that ``torch.save`` did not write; None if it may have written it."""
    if not head:
        return "it is empty; copy or download it again"
    for signature, reason in SIGNATURES:
        if head.startswith(signature):
            return reason
    if head.startswith(b"PK\3\4"):
        return _other_archive(path)
    if head[257:262] == b"ustar":
        return f"it is a tar archive; {UNPACK}"
    if re.match(rb"\x08[\x01-\x1f]\x12.?[a-z]", head, re.DOTALL) or path.suffix == ".onnx":
        return f"it is an ONNX model; load the network where it was made, and {STATE_DICT}"
    if head[:1] == b"\x80" and OLD_TORCH not in head[:32]:
        return f"it is a pickle, and reading it would execute code, which is never done; {STATE_DICT}"
    if b"\0" in head or not _is_text(head):
        return None
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if re.match(rb"<(!doctype|html|head|body|\?xml|!--)", start):
        return "it is a web page and not the file behind it; download the file itself"
    if start.startswith(b"{"):
        return _other_json(path)
    return "it is text"


def _is_text(head: bytes) -> bool:
    """Return whether the first bytes of a file are UTF-8, but for a letter that is cut at their end."""
    try:
        head[:-4].decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _other_archive(path: Path) -> str | None:
    """Say what a zip archive is that ``torch.save`` did not write, or that cannot be read; None if it wrote it."""
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return CUT_OFF
    inner = {name.partition("/")[2] for name in sizes}
    if "data.pkl" not in inner:
        if sizes and all(name.endswith(".npy") for name in sizes):
            return f"it holds arrays of NumPy (npz); load it where it was made, and {STATE_DICT}"
        return f"it is a zip archive ({one_line(next(iter(sizes), 'empty'), 60)}, …); {UNPACK}"
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        load = "torch.save(torch.jit.load(FILE).state_dict(), OTHER)"
        return f"it is a TorchScript program, and reading it would execute code; make a file of its weights with {load}"
    total, size = sum(sizes.values()), path.stat().st_size
    if total > MOST_INFLATION * size + 2**20:
        return f"its {size:,} bytes say that they fill {total:,} in memory, more than {MOST_INFLATION} times as many"
    return None


def _other_json(path: Path) -> str:
    """Say what a JSON file is, which holds no weights."""
    try:
        index = json.loads(path.read_bytes()) if path.stat().st_size < 2**24 else None
        parts = sorted({str(name) for name in index["weight_map"].values()})  # type: ignore[index]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError):
        return "it is a JSON file"
    return (
        f"it is the index of weights that lie in {len(parts)} files ({one_line(', '.join(parts[:2]), 80)}, …); "
        "load the network where it was made, and save its state dict into one file"
    )


def _wrapper(content: dict[Any, Any]) -> str | None:
    """Return the key under which a dictionary holds another one with the weights; None if it holds them itself."""
    return next((key for key in WRAPPERS if isinstance(content.get(key), dict)), None)


def _named_tensors(content: Any, source: str) -> State:
    """Return the tensors of a state dict, by names without prefixes.

    Raises:
        UserError: there are none, two have the same name, or one of them is no plain tensor of numbers.
    """
    if not isinstance(content, dict):
        kind = "a tensor without a name" if isinstance(content, Tensor) else a_type(content)
        raise UserError(f"{source} holds no state dict but {kind}: tensors must be in a dictionary, by their names")
    tensors: State = {}
    for key, value in content.items():
        if not isinstance(value, Tensor):
            continue
        name = str(key)
        while name.startswith(PREFIXES):
            name = name.partition(".")[2]
        if (problem := _not_plain(value)) is not None:
            raise UserError(f"{source} cannot be used: {one_line(name, 80)} {problem}")
        if name in tensors:
            raise UserError(f"{source} cannot be used: it holds two tensors named {one_line(name, 80)}")
        tensors[name] = value.detach()
    if tensors:
        return tensors
    keys = [key for key, value in content.items() if isinstance(value, dict) and _holds_tensors(value)]
    if "agent" in keys:
        raise UserError(
            f"{source} holds a policy network of BlockDrop (agent), and not the network that it decides for"
        )
    if keys:
        places = one_line(", ".join(map(repr, keys[:3])), 80)
        raise UserError(f"{source} holds its weights under {places}, where they are not looked for; {STATE_DICT}")
    raise UserError(f"{source} holds no weights: it must be a state dict, or a dictionary with one")


def _holds_tensors(content: dict[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in content.values())


def _not_plain(value: Tensor) -> str | None:
    """Say why a tensor is no plain tensor of numbers that are all there; None if it is one."""
    if type(value) not in (Tensor, nn.Parameter):
        return f"is {a_type(value)} and no plain tensor"
    if value.is_nested or value.layout is not torch.strided:
        return "is sparse or nested; make it dense with to_dense()"
    if value.is_quantized:
        return "is quantised; make it float32 with dequantize()"
    if value.device.type == "meta":
        return "holds no numbers (it is on the device meta)"
    if value.dtype not in DTYPES:
        return f"is of {str(value.dtype).removeprefix('torch.')}; make it float32"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"has shape {tuple(value.shape)}, for which the file holds too few numbers"
    return None


def _stated_accuracy(notes: dict[Any, Any]) -> float | None:
    """Return the accuracy, a share of 1, that a file notes beside its weights; None if it notes none."""
    for key in ACCURACIES:
        try:
            value = float(notes[key])
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError):
            continue
        share = value / 100 if value > 1 else value
        if math.isfinite(share) and 0 < share <= 1:
            return share
    return None
