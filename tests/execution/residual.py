"""Small residual networks, made of the blocks that are given."""

from __future__ import annotations

import torch
from torch import nn

from policyskip.backbones.base import Backbone, Block
from tests.conftest import with_statistics


def conv(channels: int, out: int, size: int = 1, stride: int = 1) -> nn.Sequential:
    """A convolution and its batch normalisation, as torchvision's networks have them."""
    return nn.Sequential(nn.Conv2d(channels, out, size, stride, size // 2, bias=False), nn.BatchNorm2d(out))


def bottleneck(channels: int, mid: int, out: int, stride: int = 1) -> Block:
    """A bottleneck with its stride in the middle, its shortcut a projection where the shape changes."""
    residual = nn.Sequential(*conv(channels, mid), nn.ReLU(), *conv(mid, mid, 3, stride), nn.ReLU(), *conv(mid, out))
    same = stride == 1 and channels == out
    return Block(residual, nn.Identity() if same else conv(channels, out, 1, stride))


def network(*blocks: Block, channels: int = 6, out: int = 10) -> Backbone:
    """A frozen network of these blocks, with random weights and statistics that do something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stem = nn.Sequential(*conv(3, channels, 3), nn.ReLU())
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(out, 5))
        made = Backbone(stem, blocks, head, 5, (0.4,) * 3, (0.3,) * 3, (len(blocks),))
        with_statistics(made)
        for parameter in made.parameters():
            if parameter.dim() == 4:
                nn.init.kaiming_normal_(parameter)
    return made.freeze()
