"""Files of weights that strangers made: what is refused says what it is, in one line, and soon."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import pickle
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from policyskip.backbones import cifar_resnet, multi_scale_densenet, torchvision_resnet
from policyskip.backbones.builders import load_exits
from policyskip.backbones.checkpoints import load, read_architecture, save
from policyskip.backbones.msdnet import MSDNet
from policyskip.backbones.resnet import CifarResNet
from policyskip.backbones.translation import layout_of
from policyskip.backbones.weight_files import read_weights
from policyskip.errors import UserError
from tests.backbones.test_checkpoints import GOOD, akamaster, blockdrop, rename, torchvision_like
from tests.conftest import small_backbone


def zipped(files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def torch_bytes(content: Any, zipfile_format: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipfile_format)
    return buffer.getvalue()


def inflating() -> bytes:
    """A file that torch would read, whose 50 KB of zeros fill 50 MB."""
    with zipfile.ZipFile(io.BytesIO(torch_bytes({"w": torch.zeros(12_500_000)}))) as archive:
        return zipped({name: archive.read(name) for name in archive.namelist()}, zipfile.ZIP_DEFLATED)


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("net.th"))
    return buffer.getvalue()


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(2))
    return buffer.getvalue()


def scripted() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 12345\n"
INDEX = json.dumps({"metadata": {}, "weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}})
FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "it is empty"),
    "a web page": (lambda: b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "it is a web page .*download"),
    "XML": (lambda: b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "it is a web page"),
    "a pointer": (lambda: POINTER, "a pointer of Git LFS .*git lfs pull"),
    "JSON": (lambda: b'{"error": "not found"}', "it is a JSON file"),
    "an index": (lambda: INDEX.encode(), "the index of weights that lie in 2 files .*model-1-of-2"),
    "text": (lambda: "Grüße\n".encode(), "it is text"),
    "gzip": (lambda: gzip.compress(b"x" * 100), "compressed with gzip; unpack it"),
    "tar": (tar, "a tar archive; unpack it"),
    "zip": (lambda: zipped({"net/net.th": b"x", "README": b""}), r"a zip archive \(net/net\.th, …\); unpack it"),
    "an empty zip": (lambda: zipped({}), "an empty zip archive"),
    "half a zip": (lambda: torch_bytes(GOOD)[:5000], "cut off or damaged"),
    "half an old file": (lambda: torch_bytes(GOOD, False)[:5000], "cut off or damaged"),
    "npz": (npz, r"arrays of NumPy \(npz\)"),
    "npy": (lambda: b"\x93NUMPY\x01\0" + bytes(100), "an array of NumPy"),
    "TorchScript": (scripted, r"a TorchScript program.*torch\.jit\.load"),
    "HDF5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file"),
    "ONNX": (lambda: b"\x08\x07\x12\x07pytorch\x1a\x052.1.0" + bytes(100), "an ONNX model"),
    "a network": (lambda: torch_bytes(nn.Linear(2, 2)), r"a Python object \(torch\.nn\.modules\.linear\.Linear\)"),
    "an old network": (
        lambda: torch_bytes(nn.Linear(2, 2), False),
        r"a Python object \(torch\.nn\.modules.*state_dict",
    ),
    "options": (
        lambda: torch_bytes({"args": argparse.Namespace(lr=1), "state_dict": GOOD}),
        "Python object.*Namespace",
    ),
    "a pickle": (lambda: pickle.dumps({"a": argparse.Namespace()}), "it is a pickle"),
    "a picture": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(50), "it is a picture"),
    "noise": (lambda: bytes(range(255, 127, -1)) * 4, "cut off or damaged"),
    "what inflates": (inflating, r"fill 50,0\d\d,\d\d\d in memory, more than 10 times as many"),
    "half a safetensors file": (lambda: struct.pack("<Q", 200) + b'{"a":' + bytes(20), "cut off or damaged"),
    "a header without end": (lambda: struct.pack("<Q", 2**62) + b'{"a":' + bytes(20), "its header is too large"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("suffix", ["th", "safetensors"])
@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_refused_says_what_it_is(tmp_path, kind, suffix):
    make, message = FILES[kind]
    path = tmp_path / f"net.{suffix}"
    path.write_bytes(make())
    with pytest.raises(UserError, match=f"cannot read .*net.{suffix} as weights: .*{message}") as refused:
        cifar_resnet(5, 14, str(path))
    text = str(refused.value).replace(str(tmp_path), "")
    assert text.isprintable() and len(text) < 300
    assert "weights_only" not in text and "options" not in text and "holds no weights" not in text


def test_the_content_decides_and_not_the_name(tmp_path):
    network = small_backbone()
    save(network, tmp_path / "net.pt")
    torch.save(GOOD, tmp_path / "theirs.safetensors")
    assert cifar_resnet(5, 14, str(tmp_path / "net.pt")).content_hash() == network.content_hash()
    assert read_architecture(str(tmp_path / "theirs.safetensors")) is None
    assert cifar_resnet(5, 14, str(tmp_path / "theirs.safetensors")).architecture["shortcut"] == "A"


def rebuilt_tensor(size: tuple[int, ...]) -> torch.Tensor:
    """A tensor of one number that says that it has any size."""
    return torch.zeros(1).expand(size)


def nested() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


TENSORS: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "sparse": (lambda: torch.eye(4).to_sparse(), "conv1.weight is sparse or nested"),
    "compressed sparse": (lambda: torch.eye(4).to_sparse_csr(), "conv1.weight is sparse or nested"),
    "nested": (nested, "conv1.weight is sparse or nested"),
    "meta": (lambda: torch.zeros(4, 3, 3, 3, device="meta"), "conv1.weight holds no numbers"),
    "float8": (lambda: torch.zeros(4, 3, 3, 3).to(torch.float8_e4m3fn), "conv1.weight is of float8_e4m3fn"),
    "complex": (lambda: torch.zeros(4, 3, 3, 3, dtype=torch.complex64), "conv1.weight is of complex64"),
    "quantised": (lambda: torch.quantize_per_tensor(torch.zeros(4, 3, 3, 3), 1.0, 0, torch.qint8), "quantised"),
    "a number": (lambda: torch.tensor(1.0), r"its stem.conv.weight has shape \(\)"),
    "huge": (lambda: rebuilt_tensor((10**6, 10**6, 3, 3)), "for which the file holds too few numbers"),
    "empty": (lambda: torch.zeros(0, 3, 3, 3), "width must be at least 1"),
    "infinite here": (lambda: torch.full((4, 3, 3, 3), 1e300, dtype=torch.float64), "numbers that are not finite"),
    "integers": (lambda: torch.zeros(4, 3, 3, 3, dtype=torch.int64), "is of int64, not float32"),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_are_no_plain_numbers_are_refused(tmp_path, kind):
    make, message = TENSORS[kind]
    torch.save({**GOOD, "module.conv1.weight": make()}, tmp_path / "net.th")
    with pytest.raises(UserError, match=message):
        cifar_resnet(5, 14, str(tmp_path / "net.th"))


NAMES = {
    "a stage of 10⁹": ({"layer1000000000.0.conv1.weight": torch.ones(1)}, "has .*too many"),
    "a block of 10⁹": ({"layer1.1000000000.conv1.weight": torch.ones(1)}, "has .*too many"),
    "a stage of 10⁵ digits": ({f"layer{'9' * 10**5}.0.conv1.weight": torch.ones(1)}, "has .*too many"),
    "the same tensor by two names": (
        {"fc.weight": torch.ones(5, 16)},
        "holds linear.weight twice|holds fc.weight twice",
    ),
    "with a prefix and without": ({"conv1.weight": torch.ones(4, 3, 3, 3)}, "two tensors named conv1.weight"),
    "escape codes": ({"\x1b[2Jx": torch.ones(1)}, r"has \\x1b\[2Jx too many"),
}


@pytest.mark.parametrize(("extra", "message"), NAMES.values(), ids=NAMES.keys())
def test_names_that_make_no_network_are_refused_soon(tmp_path, extra, message):
    torch.save({**GOOD, **extra}, tmp_path / "net.th")
    begun = time.monotonic()
    with pytest.raises(UserError, match=message) as refused:
        cifar_resnet(5, 14, str(tmp_path / "net.th"))
    assert time.monotonic() - begun < 10 and len(str(refused.value)) < 400 and str(refused.value).isprintable()


@pytest.mark.parametrize("name", ["layer0.0.conv1.weight", "layer9.0.conv1.weight", "layer1.9.conv1.weight"])
def test_torchvision_s_names_beside_its_stages_are_refused(tmp_path, name):
    torch.save({"layer4.0.conv1.weight": torch.ones(1), name: torch.ones(1)}, tmp_path / "net.th")
    with pytest.raises(UserError, match="does not fit torchvision_resnet18"):
        torchvision_resnet(5, 18, str(tmp_path / "net.th"))


@pytest.mark.parametrize(
    "architecture",
    [
        dict(depth=9998, num_classes=5, width=10_000),
        dict(depth=602, num_classes=5, width=10_000),
        dict(network="msdnet", num_classes=5, num_exits=9999, step=9999),
        dict(network="msdnet", num_classes=5, num_exits=400, step=1, step_mode="even", growth_factors=[2] * 900),
        dict(network="branchy_resnet", num_classes=5, depth=9998, image_shape=[3, 32, 32]),
        dict(depth=14, num_classes="5"),
        dict(depth=14),
        dict(depth="14", num_classes=5, shortcut=[]),
    ],
)
def test_descriptions_of_networks_that_cannot_be_are_refused_soon(tmp_path, architecture):
    network = small_backbone()
    network.architecture = architecture
    save(network, tmp_path / "net.safetensors")
    begun, path = time.monotonic(), str(tmp_path / "net.safetensors")
    for read in (
        lambda: cifar_resnet(5, 14, path),
        lambda: multi_scale_densenet(5, path, 2, 1, 1, "even", 4, 2, [1], [1]),
        lambda: load_exits(path),
        lambda: load(path),
    ):
        with pytest.raises(UserError):
            read()
    assert time.monotonic() - begun < 20


def test_random_networks_are_bounded_by_memory():
    with pytest.raises(UserError, match="would hold .* numbers; 500,000,000 are allowed"):
        cifar_resnet(10, 602, "random", width=1000)
    for depth in (2006, 6_000_002):
        with pytest.raises(UserError, match="at most 2000"):
            CifarResNet(depth, 10)
    with pytest.raises(UserError, match="is too large"):
        MSDNet(10, num_exits=10**9)


# Layouts


def skipnet(gates: bool) -> dict[str, torch.Tensor]:
    names = ["conv1.weight", "bn1.weight", "group1_layer0.conv1.weight", "group2_ds0.0.weight", "fc.weight"]
    names += ["group1_gate0.1.weight", "control.rnn.weight_ih_l0"] if gates else []
    return {f"module.{name}": torch.ones(1) for name in names}


def distiller() -> dict[str, torch.Tensor]:
    state = torchvision_like(small_backbone(shortcut="B"))
    return {**state, "layer1.1.relu2.branch_net.1.weight": torch.ones(5, 16)}


def resnet101() -> dict[str, torch.Tensor]:
    sizes = (3, 4, 23, 3)
    blocks = {
        f"blocks.{s}.{b}.conv{c}.weight": torch.ones(1)
        for s, n in enumerate(sizes)
        for b in range(n)
        for c in (1, 2, 3)
    }
    return {
        "conv1.weight": torch.ones(64, 3, 7, 7),
        **blocks,
        "ds.0.0.weight": torch.ones(1),
        "fc.weight": torch.ones(1),
    }


AGENT = {"features.conv1.weight": torch.ones(1), "logit.weight": torch.ones(1), "vnet.weight": torch.ones(1)}
LAYOUTS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "SkipNet": (
        lambda: {"iter": 3, "arch": "x", "state_dict": skipnet(True), "best_prec1": 92.5},
        "SkipNet's network with",
    ),
    "SkipNet's ResNet": (lambda: {"iter": 3, "state_dict": skipnet(False)}, "SkipNet's ResNet"),
    "Distiller": (lambda: {"epoch": 1, "state_dict": distiller()}, "Distiller's ResNet with early exits"),
    "BlockDrop's ResNet-101": (
        lambda: {"agent": AGENT, "resnet": resnet101()},
        "BlockDrop's ResNet-101 .* cannot be read",
    ),
    "BlockDrop's first stage": (
        lambda: {"agent": AGENT, "epoch": 1, "reward": 0.2, "acc": 0.75},
        "policy network of BlockDrop",
    ),
    "BlockDrop's old files": (lambda: {"net": AGENT, "epoch": 1, "acc": 0.75}, "BlockDrop's policy network"),
    "an MSDNet": (
        lambda: {
            "state_dict": {
                "blocks.0.0.layers.0.net.0.weight": torch.ones(1),
                "classifier.0.linear.weight": torch.ones(1),
            }
        },
        "MSDNet of the PyTorch port; say backbone=msdnet_cifar",
    ),
    "ours": (lambda: small_backbone().state_dict(), "network of policyskip without the description"),
    "weights elsewhere": (lambda: {"ema": {"w": torch.ones(1)}}, "holds its weights under 'ema'"),
}


@pytest.mark.parametrize("read", ["cifar_resnet", "torchvision_resnet"])
@pytest.mark.parametrize(("make", "message"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts_that_are_known_and_cannot_be_used_are_refused_by_name(tmp_path, make, message, read):
    torch.save(make(), tmp_path / "net.th")
    path = str(tmp_path / "net.th")
    message = "does not fit torchvision_resnet18" if message.startswith("network of") and "torch" in read else message
    with pytest.raises(UserError, match=message) as refused:
        cifar_resnet(5, 14, path) if read == "cifar_resnet" else torchvision_resnet(5, 18, path)
    assert "net.th" in str(refused.value) and "\n" not in str(refused.value)


def test_every_layout_that_is_read_has_a_name():
    assert layout_of(akamaster(small_backbone(shortcut="A"))) is None  # "module." is taken off when the file is read
    for make, name in ((torchvision_like, "ResNet in the names of torchvision"), (blockdrop, "BlockDrop's ResNet")):
        assert str(layout_of(make(small_backbone()))).startswith(name)
    assert layout_of(["anything"]) is None


# What is guessed is said


def remark_of(tmp_path: Path, state: dict[str, Any], **typed: Any) -> str:
    torch.save(state, tmp_path / "net.th")
    return cifar_resnet(5, 14, str(tmp_path / "net.th"), **typed).remark


def test_what_a_file_of_others_does_not_say_is_guessed_aloud(tmp_path):
    guessed = remark_of(tmp_path, GOOD)
    assert "net.th is read as a CIFAR ResNet-14 in the names of torchvision" in guessed
    assert "guessed, as the file does not say: shortcut A (backbone.shortcut=pool is the other), mean [0.485" in guessed
    typed = dict(shortcut="pool", mean=[0.0] * 3, std=[1.0] * 3)
    assert "guessed" not in remark_of(tmp_path, GOOD, **typed)
    assert "std [" in remark_of(tmp_path, GOOD, shortcut="A", mean=[0.0] * 3)
    with_projections = remark_of(tmp_path, torchvision_like(small_backbone(shortcut="B")))
    assert (
        "with shortcut B" in with_projections and "shortcut A" not in with_projections and "mean [" in with_projections
    )
    drop = remark_of(tmp_path, {"resnet": blockdrop(small_backbone())})
    assert "shortcut pool (backbone.shortcut=A is the other)" in drop and "mean [0.0, 0.0, 0.0]" in drop


def test_blockdrop_s_network_for_cifar10_names_the_normalisation_that_it_needs(tmp_path):
    theirs = small_backbone(depth=32, classes=10)
    torch.save({"resnet": blockdrop(theirs), "acc": 0.923}, tmp_path / "net.t7")
    network = cifar_resnet(10, 32, str(tmp_path / "net.t7"))
    assert "needs backbone.mean=[0.4914, 0.4824, 0.4467]" in network.remark
    assert "backbone.std=[0.2471, 0.2435, 0.2616]" in network.remark
    assert network.stated_accuracy == 0.923


def test_our_own_files_need_no_remark(tmp_path):
    save(small_backbone(), tmp_path / "net.safetensors")
    assert cifar_resnet(5, 14, str(tmp_path / "net.safetensors")).remark == ""
    assert load(str(tmp_path / "net.safetensors")).remark == "" == cifar_resnet(5, 14, "random").remark


@pytest.mark.parametrize(
    ("note", "accuracy"),
    [
        ({"best_prec1": 91.73}, 0.9173),
        ({"best_prec1": torch.tensor(91.5)}, 0.915),
        ({"acc": 0.93}, 0.93),
        ({"best_acc": "x", "acc": 93}, 0.93),
        ({"best_prec1": float("nan")}, None),
        ({"best_prec1": torch.ones(3)}, None),
        ({"acc": 1e300}, None),
        ({"acc": -1, "epoch": 5}, None),
        ({}, None),
    ],
)
def test_the_accuracy_that_a_file_states(tmp_path, note, accuracy):
    torch.save({"state_dict": GOOD, **note}, tmp_path / "net.th")
    stated = read_weights(tmp_path / "net.th").accuracy
    assert stated == (accuracy if accuracy is None else pytest.approx(accuracy))
    plain = {
        name.removeprefix("module."): value for name, value in rename(small_backbone(), "layer", "", "fc", 1).items()
    }
    save_file(plain, tmp_path / "net.safetensors", metadata={"acc": "93.5"})
    assert read_weights(tmp_path / "net.safetensors").accuracy == pytest.approx(0.935)
