"""The contract of a network whose blocks can be kept or skipped.

Shapes: B images, K blocks, C classes, H W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Block(nn.Module):
    """One residual unit. Kept: ``relu(shortcut(x) + residual(x))``. Dropped: ``shortcut(x)``, with no ReLU.

    The missing ReLU is how the original BlockDrop networks treat a dropped block
    (it matters where the shortcut is a strided convolution); see ``execution.py``.
    """

    def __init__(self, residual: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.residual = residual
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.shortcut(x) + self.residual(x))


class Backbone(nn.Module):
    """Stem, K blocks, head: everything else in the package asks a network for these three and nothing more.

    Args:
        stem: module from normalised images (B, 3, H, W) to features.
        blocks: the K blocks, in order.
        head: module from the last features to logits (B, C).
        num_classes: C.
        mean, std: per-channel normalisation of pixels in [0, 1]; part of the network because the weights depend on it.
        stages: number of blocks in each stage; sums to K. Used to label plots.
    """

    blocks: Sequence[Block]  # an nn.ModuleList
    mean: Tensor
    std: Tensor

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
        super().__init__()
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.head = head
        self.num_classes = num_classes
        self.stages = tuple(stages)
        self.name = type(self).__name__
        self.frozen = False
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    @property
    def num_blocks(self) -> int:
        """K, the number of blocks that can be skipped."""
        return len(self.blocks)

    def features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), uint8 in 0..255 or float in [0, 1], to the features that enter block 0."""
        x = images.to(self.mean.dtype)
        if not images.is_floating_point():
            x = x / 255
        return self.stem((x - self.mean) / self.std)

    def forward(self, images: Tensor, keep_BK: Tensor | None = None) -> Tensor:
        """Logits (B, C) of images (B, 3, H, W). ``keep_BK`` (bool; default: all kept) says which blocks run."""
        from policyskip.backbones.execution import dense

        if keep_BK is None:
            keep_BK = torch.ones(len(images), self.num_blocks, dtype=torch.bool, device=images.device)
        return dense(self, images, keep_BK)

    def freeze(self) -> Backbone:
        """Evaluation mode, no gradients. ``train()`` on a frozen backbone leaves it in evaluation mode."""
        self.requires_grad_(False).eval()
        self.frozen = True
        return self

    def train(self, mode: bool = True) -> Backbone:
        """As ever, but a frozen backbone stays in evaluation mode."""
        super().train(mode and not self.frozen)
        return self

    def content_hash(self) -> str:
        """Hash of every parameter and buffer: two backbones with one hash are the same network."""
        digest = hashlib.sha256()
        for name, value in sorted(self.state_dict().items()):
            digest.update(f"{name}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]
