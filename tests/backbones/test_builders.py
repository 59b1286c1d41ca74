"""Multi-exit networks with weights: out of files and back, by their configurations, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module

from policyskip import registry
from policyskip.backbones import (
    ExitNetwork,
    ResNetExits,
    branchy_alexnet,
    branchy_lenet,
    branchy_resnet,
    checkpoints,
    cifar_resnet,
    cifar_resnet_exits,
    count_exit_costs,
    load_exits,
    multi_scale_densenet,
    torchvision_resnet,
    torchvision_resnet_exits,
)
from policyskip.backbones.checkpoints import load, save
from policyskip.backbones.resnet import TorchvisionResNet
from policyskip.build import build_backbone
from policyskip.config import plain
from policyskip.data import Data
from policyskip.errors import UserError
from tests.conftest import small_backbone, small_images, with_statistics

SHAPE = (3, 16, 16)
MSDNET = dict(num_classes=5, num_exits=2, base=1, step=1, step_mode="even", channels=4, growth_rate=2, head_channels=8)
BUILDERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "msdnet": (multi_scale_densenet, MSDNET | dict(growth_factors=[1, 2], bottleneck_factors=[1, 2])),
    "lenet": (branchy_lenet, dict(num_classes=5, image_shape=SHAPE, channels=1)),
    "alexnet": (branchy_alexnet, dict(num_classes=5, image_shape=SHAPE)),
    "resnet": (branchy_resnet, dict(num_classes=5, image_shape=SHAPE, depth=8)),
    "exits": (
        cifar_resnet_exits,
        dict(num_classes=5, image_shape=SHAPE, depth=14, width=4, exits=["layer1.1", 3], heads="conv"),
    ),
    "torchvision exits": (
        torchvision_resnet_exits,
        dict(num_classes=5, image_shape=(3, 32, 32), depth=18, exits=[2], heads=["pooled"]),
    ),
}
EXITS = BUILDERS["exits"][1]


def built(name: str, **changed: Any) -> ExitNetwork:
    build, arguments = BUILDERS[name]
    network: ExitNetwork = build(**{**arguments, "checkpoint": "random", **changed})
    return network


@pytest.mark.parametrize("name", BUILDERS)
def test_what_is_saved_is_loaded(name, tmp_path):
    """By the builder, which is told the network again, and by what the file says of itself."""
    file = str(tmp_path / "net.safetensors")
    normalisation = dict(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6]) if name != "torchvision exits" else {}
    torch.manual_seed(1)
    network = with_statistics(built(name, **normalisation, seed=7)).eval()
    save(network, Path(file))
    again, alone = built(name, checkpoint=file), load_exits(file)
    images = small_images(3, size=32 if name == "torchvision exits" else 16).images
    with torch.no_grad():
        expected_BNC = network(images)
        assert torch.equal(again.eval()(images), expected_BNC) and torch.equal(alone(images), expected_BNC)
    assert again.content_hash() == alone.content_hash() == network.content_hash()
    assert again.architecture == alone.architecture == network.architecture
    assert not again.frozen and alone.frozen and not alone.training


@pytest.mark.parametrize("name", ["msdnet", "lenet", "alexnet", "resnet", "exits"])
def test_random_weights_are_those_of_the_seed(name):
    before = torch.random.get_rng_state()
    hashes = [built(name, seed=seed).content_hash() for seed in (1, 1, 2)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_is_said_of_the_normalisation_is_obeyed(tmp_path):
    file = tmp_path / "net.safetensors"
    for name in ("lenet", "exits"):
        save(built(name, mean=[0.1, 0.2, 0.3]), file)
        network = built(name, checkpoint=str(file), mean=[0.5, 0.5, 0.5])
        assert network.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    assert network.backbone.mean.flatten().tolist() == [0.5, 0.5, 0.5]


def test_lazy_is_no_part_of_the_weights(tmp_path):
    save(built("msdnet", lazy=False), tmp_path / "net.safetensors")
    assert built("msdnet", checkpoint=str(tmp_path / "net.safetensors")).lazy
    assert not built("msdnet", lazy=False).lazy


def test_exits_over_weights_of_the_resnet_alone(tmp_path):
    """The trunk is the checkpoint's to the bit, the new heads are those of the seed."""
    backbone, file = small_backbone(), tmp_path / "net.safetensors"
    save(backbone, file)
    networks = [cifar_resnet_exits(checkpoint=str(file), seed=seed, **EXITS) for seed in (1, 1, 2)]
    assert {network.backbone.content_hash() for network in networks} == {backbone.content_hash()}
    hashes = [network.content_hash() for network in networks]
    assert hashes[0] == hashes[1] != hashes[2]
    torch.manual_seed(0)
    theirs = TorchvisionResNet(18, 5)
    save(theirs, tmp_path / "theirs.safetensors")
    ours = built("torchvision exits", checkpoint=str(tmp_path / "theirs.safetensors"))
    assert ours.backbone.content_hash() == theirs.content_hash()


def test_shipped_weights_go_by_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "WEIGHTS", tmp_path)
    network = built("exits")
    save(network, tmp_path / "ours.safetensors")
    assert (
        load_exits("ours").content_hash() == built("exits", checkpoint="ours").content_hash() == network.content_hash()
    )
    with pytest.raises(UserError, match="there is no checkpoint theirs: neither a file nor one of ours"):
        built("msdnet", checkpoint="theirs")
    with pytest.raises(UserError, match=r"msdnet needs weights; give a file, one of ours, .*checkpoint=random"):
        built("msdnet", checkpoint=None)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("msdnet", dict(num_classes=10), "has 5 classes, the data has 10"),
        ("msdnet", dict(growth_rate=4), "holds a msdnet of growth_rate 2, not of growth_rate 4"),
        ("msdnet", dict(growth_factors=[1, 4]), r"of growth_factors \[1, 2\], not of growth_factors \[1, 4\]"),
        ("lenet", dict(image_shape=(3, 20, 20)), r"of image_shape \[3, 16, 16\], not of image_shape \[3, 20, 20\]"),
        ("lenet", dict(channels=3), "of channels 1, not of channels 3"),
        ("resnet", dict(depth=14), "of depth 8, not of depth 14"),
        ("exits", dict(depth=20), "holds a ResNet of depth 14, not of depth 20"),
        ("exits", dict(num_classes=3), "has 5 classes, the data has 3"),
        ("exits", dict(exits=[1, 4]), r"holds a resnet14_exits of exits \[1, 3\], not of exits \[1, 4\]"),
        ("exits", dict(exits=[1, 5]), "block 5 is the last"),
        ("exits", dict(heads=["conv", "linear"]), r"heads \['conv', 'conv'\], not of heads \['conv', 'linear'\]"),
    ],
)
def test_a_network_other_than_the_one_asked_for_is_refused(name, changed, message, tmp_path):
    file = tmp_path / "net.safetensors"
    save(built(name), file)
    with pytest.raises(UserError, match=message) as refused:
        built(name, checkpoint=str(file), **changed)
    assert "\n" not in str(refused.value)


def test_another_kind_of_network_is_refused(tmp_path):
    lenet, plain_net, foreign = (str(tmp_path / name) for name in ("a.safetensors", "b.safetensors", "c.th"))
    save(built("lenet"), Path(lenet))
    save(small_backbone(), Path(plain_net))
    torch.save(small_backbone().state_dict(), foreign)
    for call, message in (
        (lambda: built("msdnet", checkpoint=lenet), "holds no msdnet but a branchy_lenet"),
        (lambda: built("msdnet", checkpoint=plain_net), "holds no msdnet but a CIFAR ResNet"),
        (
            lambda: built("msdnet", checkpoint=foreign),
            "holds no msdnet but a network of policyskip without the description",
        ),
        (lambda: built("exits", checkpoint=lenet), "holds a branchy_lenet, not a CIFAR ResNet"),
        (lambda: cifar_resnet(5, 14, lenet), "holds a branchy_lenet, not a CIFAR ResNet"),
        (lambda: load(lenet), "holds a branchy_lenet, not a CIFAR ResNet"),
        (lambda: load_exits(plain_net), "holds no multi-exit network but a CIFAR ResNet"),
        (lambda: load_exits(foreign), "holds no multi-exit network but a network of policyskip without"),
    ):
        with pytest.raises(UserError, match=message) as refused:
            call()
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("damage", [lambda whole: whole[: len(whole) // 2], lambda whole: b"", lambda whole: b"text\n"])
def test_damaged_files_are_refused_by_name(damage, tmp_path):
    file = tmp_path / "net.safetensors"
    save(built("lenet"), file)
    file.write_bytes(damage(file.read_bytes()))
    for call in (lambda: built("lenet", checkpoint=str(file)), lambda: load_exits(str(file))):
        with pytest.raises(UserError, match=r"cannot read .*net\.safetensors as weights"):
            call()


def test_a_file_of_another_version_is_refused(tmp_path):
    network = built("lenet")
    network.architecture["colours"] = 2
    save(network, tmp_path / "net.safetensors")
    with pytest.raises(UserError, match=r"net\.safetensors is damaged or of another version: .*colours"):
        load_exits(str(tmp_path / "net.safetensors"))


@pytest.mark.parametrize(
    ("name", "shape", "exits", "millions"),
    [
        ("msdnet_digits", (3, 20, 20), 5, 10.55),
        ("msdnet_cifar", (3, 32, 32), 5, 58.09),
        ("msdnet_cifar_anytime", (3, 32, 32), 7, 75.49),
        ("branchy_lenet", (3, 20, 20), 2, 0.899),
        ("branchy_alexnet", (3, 20, 20), 3, 11.82),
        ("branchy_resnet32", (3, 20, 20), 3, 42.35),
        ("resnet32_exits", (3, 20, 20), 5, 26.90),
    ],
)
def test_configurations_build_what_they_say(name, shape, exits, millions):
    with initialize_config_module("policyskip.configs", version_base="1.3"):
        node = plain(compose("train", [f"backbone={name}", "run.dir=x"]))["backbone"]
    images = small_images(2, size=shape[1])
    data = Data("digits", images, images, images, tuple("0123456789"), shape)
    network = build_backbone(node, data, torch.device("cpu"))
    assert isinstance(network, ExitNetwork) and network.num_exits == exits
    assert count_exit_costs(network, shape).full / 1e6 == pytest.approx(millions, rel=0.01)
    if isinstance(network, ResNetExits):
        assert network.backbone.content_hash() == load("resnet32_digits").content_hash()


def test_a_run_folder_downloads_no_weights_of_torchvision(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with registry.trusting(False), pytest.raises(UserError, match="nothing is downloaded because a run folder"):
        torchvision_resnet(num_classes=1000, depth=18, checkpoint="DEFAULT")
    assert not list(tmp_path.iterdir())
