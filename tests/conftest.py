"""Small networks and images that every test can afford."""

from __future__ import annotations

import os

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policyskip.backbones import ExitCosts
from policyskip.backbones.resnet import CifarResNet
from policyskip.data import TensorImages
from policyskip.exit_cache import CachedExits

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


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


def small_cache(count: int = 40, exits: int = 3, classes: int = 5, seed: int = 0) -> CachedExits:
    """Made-up outputs: later exits are surer and more often right, and images differ in difficulty."""
    generator = torch.Generator().manual_seed(seed)
    label_M = torch.randint(0, classes, (count,), generator=generator)
    logits_MNC = torch.randn(count, exits, classes, generator=generator)
    ease_MN = 4 * torch.rand(count, 1, generator=generator) * torch.linspace(0.6, 1, exits)
    logits_MNC += ease_MN.unsqueeze(2) * F.one_hot(label_M, classes).unsqueeze(1)
    trunk_N, head_N = torch.linspace(3, 5, exits).double(), torch.linspace(1, 0.5, exits).double()
    return CachedExits(logits_MNC, label_M, ExitCosts(trunk_N, head_N))


@pytest.fixture
def backbone() -> CifarResNet:
    return small_backbone()


@pytest.fixture
def images() -> Tensor:
    return small_images(7).images
