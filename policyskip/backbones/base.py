"""What every network here has in common, and the contract of one whose blocks can be kept or skipped.

Shapes: B images, K blocks, C classes, H W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Network(nn.Module):
    """Normalisation, classes, a name, and how to be frozen: what a backbone and a multi-exit network share.

    Args:
        num_classes: C.
        mean, std: per-channel normalisation of pixels in [0, 1]; part of the network because the weights depend on it.
    """

    mean: Tensor
    std: Tensor
    architecture: dict[str, Any]
    """The arguments that build it again; empty where they are not known."""

    def __init__(self, num_classes: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.name = type(self).__name__
        self.frozen = False
        self.architecture = {}
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def normalise(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), uint8 in 0..255 or float in [0, 1], to what the first layer sees."""
        x = images.to(self.mean.dtype)
        if not images.is_floating_point():
            x = x / 255
        return (x - self.mean) / self.std

    def freeze(self) -> Self:
        """Evaluation mode, no gradients. ``train()`` on a frozen network leaves it in evaluation mode."""
        self.requires_grad_(False).eval()
        self.frozen = True
        return self

    def train(self, mode: bool = True) -> Self:
        """As ever, but a frozen network stays in evaluation mode."""
        super().train(mode and not self.frozen)
        return self

    def content_hash(self) -> str:
        """Hash of every parameter and buffer: two networks with one hash are the same network."""
        digest = hashlib.sha256()
        for name, value in sorted(self.state_dict().items()):
            digest.update(f"{name}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode, and afterwards back into the mode it was in."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)


def he_init(network: nn.Module) -> None:
    """Draw every convolution's weights as in He et al. (2015), for ReLUs, by the size of what it leads to."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class Block(nn.Module):
    """One residual unit. Kept: ``relu(shortcut(x) + residual(x))``. Dropped: ``shortcut(x)``, with no ReLU.

    The missing ReLU is how the original BlockDrop networks treat a dropped block
    (it matters where the shortcut is a strided convolution); see ``execution.py``.
    """

    def __init__(self, residual: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.residual = residual
        self.shortcut = shortcut

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        """``inplace``: x is no longer needed, and may be written over where no gradient is asked."""
        if torch.is_grad_enabled():
            return torch.relu_(self.shortcut(x) + self.residual(x))
        return self.join(self.shortcut(x), x, inplace)

    def join(self, shortcut: Tensor, x: Tensor, inplace: bool = False) -> Tensor:
        """``relu(shortcut + residual(x))`` of a shortcut that is at hand, and may be written over if ``inplace``;
        without gradients."""
        joined: Tensor = self.residual(x).add_(shortcut).relu_()
        return joined


class Backbone(Network):
    """Stem, K blocks, head: everything else in the package asks a network for these three and nothing more.

    Args:
        stem: module from normalised images (B, 3, H, W) to features.
        blocks: the K blocks, in order.
        head: module from the last features to logits (B, C).
        num_classes: C.
        mean, std: as in :class:`Network`.
        stages: number of blocks in each stage; sums to K. Used to label plots.
    """

    blocks: Sequence[Block]  # an nn.ModuleList

    def __init__(
        self,
        stem: nn.Module,
        blocks: Sequence[Block],
        head: nn.Module,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        stages: Sequence[int],
    ) -> None:
        super().__init__(num_classes, mean, std)
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.head = head
        self.stages = tuple(stages)

    @property
    def num_blocks(self) -> int:
        """K, the number of blocks that can be skipped."""
        return len(self.blocks)

    def features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), uint8 in 0..255 or float in [0, 1], to the features that enter block 0."""
        return self.stem(self.normalise(images))

    def forward(self, images: Tensor, keep_BK: Tensor | None = None) -> Tensor:
        """Logits (B, C) of images (B, 3, H, W). ``keep_BK`` (bool; default: all kept) says which blocks run."""
        from policyskip.backbones.execution import dense

        if keep_BK is not None:
            return dense(self, images, keep_BK)
        x = self.features(images)
        for block in self.blocks:
            x = block(x, inplace=True)
        return self.head(x)
