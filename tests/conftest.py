"""Small networks and images that every test can afford."""

from __future__ import annotations

import os

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

import pytest
import torch
from torch import Tensor, nn

from policyskip.backbones.resnet import CifarResNet
from policyskip.data import TensorImages

torch.set_num_threads(2)


def small_backbone(
    depth: int = 14, classes: int = 5, shortcut: str = "pool", width: int = 4, seed: int = 0
) -> CifarResNet:
    """A random CIFAR ResNet in evaluation mode whose batch normalisation does something."""
    torch.manual_seed(seed)
    backbone = CifarResNet(depth, classes, shortcut, width)  # type: ignore[arg-type]
    return with_statistics(backbone).eval()


def with_statistics(network: nn.Module) -> nn.Module:
    """The network, its batch normalisation with random statistics and weights."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network


def small_images(count: int = 40, classes: int = 5, size: int = 12, seed: int = 0) -> TensorImages:
    """Random images and labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    return TensorImages(images, torch.randint(0, classes, (count,), generator=generator))


@pytest.fixture
def backbone() -> CifarResNet:
    return small_backbone()


@pytest.fixture
def images() -> Tensor:
    return small_images(7).images
