"""Residual networks whose blocks can be skipped: the CIFAR family (depth 6n+2) and torchvision's ImageNet ResNets.

Shapes: B images, C classes, H W pixels.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policyskip import registry
from policyskip.backbones.base import IMAGENET_MEAN, IMAGENET_STD, Backbone, Block, he_init
from policyskip.errors import UserError

Shortcut = Literal["A", "pool", "B"]
MOST_DEPTH = 2000
"""Layers that a CIFAR ResNet may have; the deepest that was published has 1,202."""


class SubsampleShortcut(nn.Module):
    """A shortcut that takes every second pixel and adds zero channels on both sides: option A of He et al. (2016)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.pad = ((channels_out - channels_in) // 2, (channels_out - channels_in + 1) // 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *self.pad))


class PoolShortcut(nn.Module):
    """A shortcut that averages over pixels and adds zero channels behind: BlockDrop's variant of option A."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.extra = channels_out - channels_in

    def forward(self, x: Tensor) -> Tensor:
        # With ceil_mode, odd sizes become the same as after the strided convolution.
        pooled = F.avg_pool2d(x, self.stride, ceil_mode=True, count_include_pad=False) if self.stride > 1 else x
        return F.pad(pooled, (0, 0, 0, 0, 0, self.extra))


def projection_shortcut(channels_in: int, channels_out: int, stride: int) -> nn.Module:
    """Build option B of He et al. (2016): a strided 1×1 convolution with batch normalisation."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 1, stride, bias=False),
        nn.BatchNorm2d(channels_out),
    )


SHORTCUTS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "A": SubsampleShortcut,
    "pool": PoolShortcut,
    "B": projection_shortcut,
}


def basic_block(channels_in: int, channels_out: int, stride: int, shortcut: Shortcut) -> Block:
    """Build a block of conv3×3 – BN – ReLU – conv3×3 – BN beside a shortcut."""
    residual = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False),
            bn1=nn.BatchNorm2d(channels_out),
            relu=nn.ReLU(),
            conv2=nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False),
            bn2=nn.BatchNorm2d(channels_out),
        )
    )
    same = stride == 1 and channels_in == channels_out
    return Block(residual, nn.Identity() if same else SHORTCUTS[shortcut](channels_in, channels_out, stride))


class CifarResNet(Backbone):
    """A ResNet for small images that has three stages of n basic blocks, depth 6n+2 (He et al. 2016, section 4.2).

    Args:
        depth: 6n+2, so 8, 14, 20, 32, 56, 110, …
        num_classes: C.
        shortcut: "A" (subsampling), "pool" (average-pool A, BlockDrop's) or "B" (projection).
        width: channels of the first stage; each later stage has twice as many.
        mean, std: pixel normalisation, per channel, for pixels in [0, 1].

    Raises:
        UserError: the depth is not 6n+2, the shortcut is unknown, or width, mean or std are out of range.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int,
        shortcut: Shortcut = "pool",
        width: int = 16,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        if not 8 <= depth <= MOST_DEPTH or (depth - 2) % 6:
            raise UserError(
                f"a CIFAR ResNet's depth must be 6n+2 (8, 14, 20, 32, 56, 110, …, at most {MOST_DEPTH}), got {depth}"
            )
        if shortcut not in SHORTCUTS:
            raise UserError(f"shortcut must be one of {', '.join(SHORTCUTS)}, got {shortcut!r}")
        if width < 1 or len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise UserError(
                f"width must be at least 1, mean and std three numbers, those of std positive; "
                f"got {width}, {list(mean)} and {list(std)}"
            )
        n = (depth - 2) // 6
        stem = nn.Sequential(
            OrderedDict(conv=nn.Conv2d(3, width, 3, padding=1, bias=False), bn=nn.BatchNorm2d(width), relu=nn.ReLU())
        )
        blocks, channels = [], width
        for stage in range(3):
            for i in range(n):
                out = width * 2**stage
                blocks.append(basic_block(channels, out, 2 if stage and not i else 1, shortcut))
                channels = out
        head = nn.Sequential(
            OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), linear=nn.Linear(channels, num_classes))
        )
        super().__init__(stem, blocks, head, num_classes, mean, std, stages=(n, n, n))
        self.name = f"resnet{depth}"
        self.architecture = dict(
            depth=depth, num_classes=num_classes, shortcut=shortcut, width=width, mean=list(mean), std=list(std)
        )
        he_init(self)


class TorchvisionResNet(Backbone):
    """One of torchvision's ImageNet ResNets, with blocks that can be skipped.

    Args:
        depth: 18, 34, 50, 101 or 152.
        num_classes: C; pretrained weights have 1000.
        weights: "DEFAULT", "IMAGENET1K_V1" or "IMAGENET1K_V2" (downloaded by torchvision), or None for random ones.

    Raises:
        UserError: unknown depth or weights, or weights of another number of classes.
        OSError: the download failed.
    """

    def __init__(self, depth: int, num_classes: int = 1000, weights: str | None = None) -> None:
        from torchvision.models import get_model, get_model_weights

        if depth not in (18, 34, 50, 101, 152):
            raise UserError(f"torchvision has ResNets of depth 18, 34, 50, 101 and 152, not {depth}")
        known = get_model_weights(f"resnet{depth}").__members__
        if weights and weights not in known:
            raise UserError(f"there are no weights {weights}: neither a file nor one of {', '.join(known)}")
        if weights and num_classes != 1000:  # found before they are downloaded
            raise UserError(
                f"torchvision's weights have 1000 classes, the data has {num_classes}; give backbone.checkpoint=FILE"
            )
        if weights and not registry.is_trusted():
            _check_is_here(weights, known[weights].url)
        net = get_model(f"resnet{depth}", weights=weights, num_classes=num_classes)
        stem = nn.Sequential(OrderedDict(conv=net.conv1, bn=net.bn1, relu=net.relu, maxpool=net.maxpool))
        head = nn.Sequential(OrderedDict(pool=net.avgpool, flatten=nn.Flatten(), linear=net.fc))
        stages = [net.layer1, net.layer2, net.layer3, net.layer4]
        blocks = [_from_torchvision(block) for stage in stages for block in stage]
        super().__init__(stem, blocks, head, num_classes, IMAGENET_MEAN, IMAGENET_STD, [len(s) for s in stages])
        self.name = f"torchvision_resnet{depth}"
        self.architecture = dict(network="torchvision_resnet", depth=depth, num_classes=num_classes)


def _check_is_here(weights: str, url: str) -> None:
    """Refuse weights that a run folder names and that would have to be downloaded.

    Raises:
        UserError: they are not where torchvision keeps what it has downloaded.
    """
    if not Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2]).is_file():
        raise UserError(
            f"torchvision's weights {weights} are not on this machine, and nothing is downloaded because a run folder "
            "names it; say trust=true (when resuming: run.trust=true) to download them"
        )


def _from_torchvision(block: nn.Module) -> Block:
    """Split a torchvision BasicBlock or Bottleneck into residual branch and shortcut."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    convolutions = 3 if hasattr(block, "conv3") else 2
    for i in range(1, convolutions + 1):
        layers[f"conv{i}"] = getattr(block, f"conv{i}")
        layers[f"bn{i}"] = getattr(block, f"bn{i}")
        if i < convolutions:
            layers[f"relu{i}"] = nn.ReLU()
    downsample: Any = block.downsample
    return Block(nn.Sequential(layers), downsample or nn.Identity())
