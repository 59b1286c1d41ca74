"""A frozen network that loads and answers wrongly is said before anything is learned over it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from policyskip.backbones import ResNetExits
from policyskip.backbones.resnet import CifarResNet
from policyskip.build import Setup
from policyskip.data import Data, TensorImages
from policyskip.tasks.network_check import network_warnings, remark, upper_tail
from tests.backbones.test_checkpoints import akamaster
from tests.conftest import small_backbone, small_images, typed

CLASSES = tuple("abcde")


def trained(count: int = 300) -> tuple[CifarResNet, Tensor, Tensor]:
    """A network, images, and the classes that it answers, each about as often."""
    network = small_backbone(shortcut="A")
    images = small_images(count, size=12).images
    with torch.no_grad():
        logits = network(images)
        network.head.linear.bias -= logits.median(0).values
        network.head.linear.weight *= 1
        answers = network(images).argmax(1)
    assert torch.bincount(answers, minlength=5).max() < 0.6 * count
    return network, images, answers


def setup_of(network: Any, images: Tensor, label_N: Tensor, checkpoint: str = "net.th") -> Setup:
    data = TensorImages(images, label_N)
    config = {"backbone": {"checkpoint": checkpoint}}
    return Setup(config, torch.device("cpu"), Data("x", data, data, data, CLASSES, (3, 12, 12)), network, None, 64)


def test_a_network_that_knows_its_classes_gives_no_warning():
    network, images, label_N = trained()
    assert network_warnings(setup_of(network, images, label_N)) == []
    network.stated_accuracy = 0.95
    assert network_warnings(setup_of(network, images, label_N)) == []
    exits = ResNetExits(network, [1], image_shape=(3, 12, 12)).eval()
    assert network_warnings(setup_of(exits, images, label_N)) == []


def test_classes_in_another_order_are_noticed_and_named():
    network, images, label_N = trained()
    for net in (network, ResNetExits(network, [1], image_shape=(3, 12, 12)).eval()):
        warnings = network_warnings(setup_of(net, images, (label_N + 1) % 5))
        assert len(warnings) == 1 and "0.0 % of 300 validation images rightly, which is chance" in warnings[0]
        assert (
            "the order of the classes" in warnings[0]
            and "with the classes in another order it would be 100.0 %" in warnings[0]
        )
        assert "a, b, c, d" in warnings[0]
    assert network_warnings(setup_of(network, images, (label_N + 1) % 5, "random")) == []


def test_the_other_order_of_class_folders_is_named():
    """Folders 1 to 10 as texts are 1, 10, 2, …: what the network calls its class 1 is the folder 2."""
    names = tuple(sorted(str(number) for number in range(8, 13)))  # 10, 11, 12, 8, 9
    network, images, label_N = trained()
    in_numbers = torch.tensor([names.index(str(number)) for number in range(8, 13)])
    data = TensorImages(images, in_numbers[label_N])
    config = {"backbone": {"checkpoint": "net.th"}, "data": {"class_order": "text"}}
    setup = Setup(config, torch.device("cpu"), Data("x", data, data, data, names, (3, 12, 12)), network, None, 64)
    [warning] = network_warnings(setup)
    assert "; with data.class_order=numbers it would be 100.0 %" in warning


def test_a_network_that_is_hardly_trained_is_called_so_if_its_file_is_ours():
    network, images, _ = trained()
    label_N = torch.randint(0, 5, (len(images),), generator=torch.Generator().manual_seed(1))
    [ours] = network_warnings(setup_of(network, images, label_N))
    network.remark = "net.th is read as …"
    [others] = network_warnings(setup_of(network, images, label_N))
    assert "it is hardly trained, or the order of the classes" in ours and "hardly trained" not in others


@pytest.mark.parametrize("changes", [dict(shortcut="pool"), dict(mean=[0.0] * 3, std=[1.0] * 3), dict(std=[9.0] * 3)])
def test_another_shortcut_or_normalisation_is_found(changes):
    network, images, label_N = trained()
    other = CifarResNet(**{**network.architecture, **changes}).eval()
    weights = {name: value for name, value in network.state_dict().items() if name not in ("mean", "std")}
    other.load_state_dict(weights, strict=False)
    other.remark, other.stated_accuracy = "net.th is read as …", 0.99
    [warning] = network_warnings(setup_of(other, images, label_N))
    assert "it would be 100.0 %" in warning and remark(other) in ("net.th is read as …",)
    for key in changes:
        assert f"backbone.{key}={'A' if key == 'shortcut' else '['}" in warning


def test_far_below_what_the_file_says():
    network, images, label_N = trained()
    half = torch.where(torch.arange(len(label_N)) % 2 == 0, label_N, (label_N + 1) % 5)
    assert network_warnings(setup_of(network, images, half)) == []
    network.stated_accuracy = 0.6
    assert network_warnings(setup_of(network, images, half)) == []
    network.stated_accuracy = 0.9
    [warning] = network_warnings(setup_of(network, images, half))
    assert "50.0 % of 300 validation images rightly, and its file says 90.0 %" in warning and "normalisation" in warning


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_images_to_tell_give_no_warning(count):
    network, images, label_N = trained()
    assert network_warnings(setup_of(network, images[:count], (label_N[:count] + 1) % 5)) == []


def test_one_answer_for_every_image_is_chance_however_frequent_the_class_is():
    network, images, _ = trained()
    with torch.no_grad():
        network.head.linear.bias[2] += 1e6
    label_N = torch.where(torch.arange(300) % 5 == 0, 1, 2)  # 80 % are of class 2
    [warning] = network_warnings(setup_of(network, images, label_N))
    assert "80.0 % of 300 validation images rightly, which is chance" in warning


def test_the_random_numbers_of_a_run_stay_what_they_are():
    network, images, label_N = trained()
    before = torch.random.get_rng_state()
    network_warnings(setup_of(network, images, (label_N + 1) % 5))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_upper_tail_by_hand():
    assert upper_tail(2, 3, 0.5) == pytest.approx(0.5)
    assert upper_tail(0, 3, 0.2) == pytest.approx(1)
    assert upper_tail(3, 3, 0.2) == pytest.approx(0.008)
    assert upper_tail(1, 2, 0.1) == pytest.approx(0.19)
    assert upper_tail(500, 500, 0.0) == 0 and upper_tail(0, 500, 1.0) == 1


@pytest.mark.slow
def test_a_run_says_what_is_guessed_and_warns_on_the_screen_and_in_its_summary(tmp_path):
    torch.save(akamaster(small_backbone(classes=10, shortcut="A")), tmp_path / "net.th")
    small = "data.train=64 data.validation=40 data.test=40 data.batch_size=32 device=cpu tracking=none"
    run = f"train agent=full train.steps=0 backbone=cifar_resnet backbone.depth=14 run.dir=x backbone.checkpoint=net.th {small}"
    done = typed(*run.split(), "front.budget=4e3", "front.images=20", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "net.th is read as a CIFAR ResNet-14 in the names of torchvision" in done.stdout
    assert "warning: resnet14 answers" in done.stdout and "which is chance" in done.stdout
    [warning] = json.loads((tmp_path / "x" / "summary.json").read_text())["warnings"]
    assert "which is chance" in warning
