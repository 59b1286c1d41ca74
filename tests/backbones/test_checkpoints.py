"""Weights in and out: our own files, networks that others trained, and files that are no network at all."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from policyskip.backbones import checkpoints
from policyskip.backbones.base import IMAGENET_MEAN, IMAGENET_STD
from policyskip.backbones.builders import load_exits
from policyskip.backbones.checkpoints import cifar_resnet, load, save, shipped, torchvision_resnet
from policyskip.backbones.resnet import CifarResNet
from policyskip.errors import UserError
from tests.conftest import small_backbone, small_images

State = dict[str, Tensor]


def assert_same_network(one: nn.Module, other: nn.Module) -> None:
    images = small_images(5).images
    with torch.no_grad():
        torch.testing.assert_close(one(images), other(images), rtol=0, atol=0)


# Our own files


def test_what_is_saved_is_loaded_and_frozen(tmp_path):
    backbone = CifarResNet(8, 5, "B", 4, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6]).eval()
    save(backbone, tmp_path / "net.safetensors")
    loaded = load(str(tmp_path / "net.safetensors"))
    assert loaded.architecture == backbone.architecture
    assert loaded.content_hash() == backbone.content_hash()
    assert_same_network(loaded, backbone)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert [path.name for path in tmp_path.iterdir()] == ["net.safetensors"]


def test_what_a_file_says_of_itself_needs_no_saying(tmp_path):
    backbone = CifarResNet(8, 5, "A", 6, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6]).eval()
    file = str(tmp_path / "net.safetensors")
    save(backbone, Path(file))
    assert_same_network(cifar_resnet(5, 8, file).eval(), backbone)
    assert cifar_resnet(5, 8, file, mean=[0.0, 0.0, 0.0]).mean.sum() == 0  # what is said is obeyed


def test_shipped_weights_go_by_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "WEIGHTS", tmp_path)
    backbone = small_backbone()
    save(backbone, tmp_path / "ours.safetensors")
    save(backbone, tmp_path / "another.safetensors")
    assert shipped() == ["another", "ours"]
    assert load("ours").content_hash() == backbone.content_hash()
    with pytest.raises(UserError, match="there is no checkpoint theirs: neither a file nor one of another, ours"):
        cifar_resnet(5, 14, "theirs")
    with pytest.raises(
        UserError, match=r"needs weights: give a file .* or random .*; another, ours come with the package"
    ):
        cifar_resnet(5, 14, None)


def test_random_weights_are_those_of_the_seed():
    before = torch.random.get_rng_state()
    hashes = [cifar_resnet(5, 8, "random", width=4, seed=seed).content_hash() for seed in (1, 1, 2)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", shipped() or [pytest.param("", marks=pytest.mark.skip("no weights are shipped yet"))])
def test_shipped_weights_load_and_say_where_they_come_from(name):
    beside = json.loads((checkpoints.WEIGHTS / f"{name}.json").read_text())
    assert beside["command"].startswith("policyskip ")
    network = load_exits(name) if "network" in (checkpoints.read_architecture(name) or {}) else load(name)
    assert network.content_hash() == beside["hash"]
    assert all(torch.isfinite(value).all() for value in network.state_dict().values())


# Networks that others trained


def rename(backbone: CifarResNet, stage: str, shortcut: str, linear: str, first: int) -> State:
    """A backbone's tensors under the names of another code: ``{stage}{s}.{b}.…``, s counted from ``first``."""
    n, renamed = backbone.stages[0], {}
    for name, value in backbone.state_dict().items():
        block = re.fullmatch(r"blocks\.(\d+)\.(residual|shortcut)\.(.+)", name)
        if block:
            s, b = divmod(int(block[1]), n)
            branch = shortcut.format(s=s) if block[2] == "shortcut" else f"{stage}{s + first}.{b}."
            if block[2] == "shortcut" and not shortcut.startswith("ds."):
                branch = f"{stage}{s + first}.{b}.{shortcut}"
            renamed[branch + block[3]] = value
        elif name not in ("mean", "std"):
            name = re.sub(r"^stem\.conv\.", "conv1.", re.sub(r"^stem\.bn\.", "bn1.", name))
            renamed[re.sub(r"^head\.linear\.", f"{linear}.", name)] = value
    return renamed


def akamaster(backbone: CifarResNet) -> State:
    """As in akamaster/pytorch_resnet_cifar10, trained under DataParallel."""
    state = rename(backbone, "layer", "shortcut.", "linear", 1)
    return {f"module.{name}": value for name, value in state.items()}


def torchvision_like(backbone: CifarResNet) -> State:
    return rename(backbone, "layer", "downsample.", "fc", 1)


def blockdrop(backbone: CifarResNet) -> State:
    return rename(backbone, "blocks.", "ds.{s}.", "fc", 0)


@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize("naming", [akamaster, torchvision_like])
def test_layer_named_checkpoints_give_the_same_logits(tmp_path, naming, shortcut):
    theirs = small_backbone(depth=20, shortcut=shortcut)
    state = naming(theirs)
    assert any("layer3.2.conv2.weight" in name for name in state)  # 3 blocks a stage
    torch.save({"state_dict": state, "best_prec1": 91.7}, tmp_path / "net.th")
    ours = cifar_resnet(5, 20, str(tmp_path / "net.th")).eval()
    assert ours.architecture["shortcut"] == shortcut
    assert (ours.architecture["mean"], ours.architecture["std"]) == (list(IMAGENET_MEAN), list(IMAGENET_STD))
    assert_same_network(ours, theirs)


@pytest.mark.parametrize("shortcut", ["pool", "B"])
def test_blockdrop_checkpoints_give_the_same_logits(tmp_path, shortcut):
    theirs = small_backbone(depth=20, shortcut=shortcut)
    theirs.mean.zero_()  # the original networks see pixels in [0, 1]
    theirs.std.fill_(1)
    state = blockdrop(theirs)
    assert {"blocks.0.0.conv1.weight", "blocks.2.2.bn2.bias", "fc.weight"} <= set(state)
    torch.save({"agent": {"fc.weight": torch.zeros(2, 2)}, "resnet": state, "epoch": 3}, tmp_path / "net.t7")
    ours = cifar_resnet(5, 20, str(tmp_path / "net.t7")).eval()
    assert ours.architecture["shortcut"] == shortcut
    assert_same_network(ours, theirs)


def test_foreign_safetensors_and_old_files_without_counters_are_read_too(tmp_path):
    theirs = small_backbone(shortcut="A")
    state = {name: value for name, value in akamaster(theirs).items() if "num_batches_tracked" not in name}
    save_file(state, tmp_path / "net.safetensors")
    assert_same_network(cifar_resnet(5, 14, str(tmp_path / "net.safetensors")).eval(), theirs)


# torchvision's ImageNet networks


@pytest.mark.parametrize("depth", [18, 50])
def test_torchvision_networks_give_torchvision_s_logits(tmp_path, depth):
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(f"resnet{depth}", num_classes=7)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    state = theirs.eval().state_dict()
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "net.pth")
    ours = torchvision_resnet(7, depth, str(tmp_path / "net.pth")).eval()
    assert ours.num_blocks == {18: 8, 50: 16}[depth]
    images = torch.randint(0, 256, (2, 3, 48, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    normalised = (images / 255 - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
    with torch.no_grad():
        expected = theirs(normalised)
        torch.testing.assert_close(ours(images), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_random_torchvision_networks_are_those_of_the_seed():
    before = torch.random.get_rng_state()
    hashes = [torchvision_resnet(3, 18, "random", seed=seed).content_hash() for seed in (1, 1, 2)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_torchvision_weights_that_cannot_be_had_are_one_line(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    with pytest.raises(UserError, match=r"no weights DEFAULT for .*resnet18 .*no route to host.*checkpoint=FILE"):
        torchvision_resnet(1000, 18)
    with pytest.raises(UserError, match="weights have 1000 classes, the data has 10"):
        torchvision_resnet(10, 18)  # found before the download is tried
    with pytest.raises(UserError, match=r"no weights net\.pth: neither a file nor one of IMAGENET1K_V1, "):
        torchvision_resnet(10, 18, "net.pth")
    with pytest.raises(UserError, match="depth 18, 34, 50, 101 and 152, not 20"):
        torchvision_resnet(10, 20)
    with pytest.raises(UserError, match=r"backbone\.checkpoint is not set: say DEFAULT"):
        torchvision_resnet(10, 18, None)
    torch.save(torchvision.models.resnet18(num_classes=3).state_dict(), tmp_path / "net.pth")
    with pytest.raises(UserError, match=r"net\.pth does not fit .*18: head\.linear\.weight has shape \(3, 512\)"):
        torchvision_resnet(10, 18, str(tmp_path / "net.pth"))
    with pytest.raises(UserError, match=r"net\.pth does not fit torchvision_resnet34"):
        torchvision_resnet(3, 34, str(tmp_path / "net.pth"))


# What is refused


def without(state: State, *names: str) -> State:
    return {name: value for name, value in state.items() if not name.endswith(names)}


GOOD = akamaster(small_backbone(shortcut="A"))  # depth 14, width 4, 5 classes
CONTENTS = {
    "no tensors": ({"epoch": 3}, "holds no weights"),
    "a list": ([torch.zeros(3)], "holds no state dict but a list"),
    "other tensors": ({"w": torch.zeros(3)}, "is not a CIFAR ResNet that is known here; its tensors are named w"),
    "four stages": (torchvision.models.resnet18(num_classes=5).state_dict(), r"stages have \[2, 2, 2, 2\] blocks"),
    "unequal stages": (
        {name: value for name, value in GOOD.items() if ".layer3.1." not in name},
        r"stages have \[2, 2, 1\] blocks",
    ),
    "no classifier": (without(GOOD, "linear.weight", "linear.bias"), "has no classifier"),
    "a missing tensor": (without(GOOD, "layer2.1.bn1.bias"), r"misses blocks\.3\.residual\.bn1\.bias"),
    "a tensor too many": (GOOD | {"module.extra": torch.zeros(1)}, "has extra too many"),
    "a tensor of another shape": (
        GOOD | {"module.layer1.0.conv1.weight": torch.zeros(4, 4, 5, 5)},
        r"has shape \(4, 4, 5, 5\), not \(4, 4, 3, 3\)",
    ),
}


@pytest.mark.parametrize(("content", "message"), CONTENTS.values(), ids=CONTENTS.keys())
def test_files_that_hold_no_fitting_network_are_refused_by_name(tmp_path, content, message):
    torch.save(content, tmp_path / "net.th")
    with pytest.raises(UserError, match=message) as refused:
        cifar_resnet(5, 14, str(tmp_path / "net.th"))
    assert "net.th" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", ["ours", "theirs"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_classes=5, depth=20), "holds a ResNet of depth 14, not of depth 20"),
        (dict(num_classes=5, depth=14, width=8), "holds a ResNet of width 4, not of width 8"),
        (dict(num_classes=10, depth=14), "has 5 classes, the data has 10"),
        (
            dict(num_classes=5, depth=14, shortcut="B"),
            r"misses blocks\.2\.shortcut\.0\.weight|shortcut A, not of shortcut B",
        ),
    ],
    ids=["depth", "width", "classes", "shortcut"],
)
def test_a_network_other_than_the_one_asked_for_is_refused(tmp_path, kind, arguments, message):
    file = tmp_path / ("net.safetensors" if kind == "ours" else "net.th")
    if kind == "ours":
        save(small_backbone(shortcut="A"), file)
    else:
        torch.save(GOOD, file)
    cifar_resnet(5, 14, str(file), shortcut="A", width=4)
    with pytest.raises(UserError, match=message) as refused:
        cifar_resnet(checkpoint=str(file), **arguments)
    assert str(file) in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(depth=21), "depth must be 6n.2 .* got 21"),
        (dict(depth=2), "depth must be 6n.2 .* got 2"),
        (dict(depth=8, shortcut="C"), "shortcut must be one of A, pool, B, got 'C'"),
        (dict(depth=8, width=0), "width must be at least 1, .* got 0"),
        (dict(depth=8, mean=[0.5]), r"three numbers, .* \[0\.5\]"),
        (dict(depth=8, std=[1, 0, 1]), r"positive; .* \[1, 0, 1\]"),
    ],
)
def test_an_impossible_architecture_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        cifar_resnet(num_classes=5, checkpoint="random", **arguments)


@pytest.mark.parametrize("name", ["net.safetensors", "net.th"])
@pytest.mark.parametrize("damage", [lambda whole: whole[: len(whole) // 2], lambda whole: b"", lambda whole: b"text\n"])
def test_damaged_files_are_refused_by_name(tmp_path, name, damage):
    backbone = small_backbone()
    save(backbone, tmp_path / "net.safetensors")
    torch.save(backbone.state_dict(), tmp_path / "net.th")
    file = tmp_path / name
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=f"cannot read .*{name} as weights") as refused:
        cifar_resnet(5, 14, str(file))
    assert "\n" not in str(refused.value)


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("suffix", [".th", ".pt", ".safetensors"])
@pytest.mark.parametrize("packed", [False, True], ids=["bare pickle", "torch archive"])
def test_nothing_in_a_file_is_executed(tmp_path, suffix, packed):
    marker, file = tmp_path / "marker", tmp_path / f"net{suffix}"
    content = {"state_dict": {"conv1.weight": torch.zeros(4, 3, 3, 3), "bomb": Bomb(marker)}}
    if packed:
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content))
    for read in (lambda: cifar_resnet(5, 14, str(file)), lambda: torchvision_resnet(5, 18, str(file))):
        with pytest.raises(UserError, match=f"cannot read .*net{suffix} as weights"):
            read()
    assert not marker.exists()
    pickle.loads(pickle.dumps(Bomb(marker))).close()
    assert marker.exists()  # it would have been made


def test_shipped_weights_are_for_their_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints.check_data("resnet32_digits", "digits")
    for unknown in (None, "random", "net.pth"):
        checkpoints.check_data(unknown, "cifar10")
    with pytest.raises(UserError, match="resnet32_digits was trained on digits, not on cifar10"):
        checkpoints.check_data("resnet32_digits", "cifar10")
    (tmp_path / "resnet32_digits").touch()  # a file of the user's own with that name
    checkpoints.check_data("resnet32_digits", "cifar10")
