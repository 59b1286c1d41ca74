"""The base class of every network, and the contract of a network whose blocks can be kept or skipped.

Shapes: B images, K blocks, C classes, H W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from policyskip.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Network(nn.Module):
    """Holds what backbones and multi-exit networks share: normalisation, number of classes, name, and freezing.

    Args:
        num_classes: C.
        mean, std: per-channel normalisation of pixels in [0, 1]; part of the network because the weights depend on it.

    Attributes:
        frozen: whether :meth:`freeze` was called.
        remark: as what a file that others made was read, and what of that is guessed; empty otherwise.
        stated_accuracy: what the file says that the network reaches, as a share; None if it says nothing.
    """

    mean: Tensor
    std: Tensor
    stated_accuracy: float | None
    architecture: dict[str, Any]
    """The arguments from which the network can be built again; empty if they are not known."""

    def __init__(self, num_classes: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.name = type(self).__name__
        self.frozen = False
        self.remark, self.stated_accuracy = "", None
        self.architecture = {}
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def normalise(self, images: Tensor) -> Tensor:
        """Normalise images (B, 3, H, W), uint8 in 0..255 or float in [0, 1], to the first layer's input."""
        x = images.to(self.mean.dtype)
        if not images.is_floating_point():
            x = x / 255
        return (x - self.mean) / self.std

    def freeze(self) -> Self:
        """Put the network into evaluation mode for good, without gradients, and return it. ``train()`` on a frozen
        network leaves it in evaluation mode."""
        self.requires_grad_(False).eval()
        self.frozen = True
        return self

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode as in torch, except that a frozen network stays in evaluation mode."""
        super().train(mode and not self.frozen)
        return self

    def content_hash(self) -> str:
        """Return a hash, as text, of all parameters and buffers: two networks with one hash have the same weights."""
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
    """Draw the weights of every convolution as He et al. (2015) do for ReLUs, scaled by its fan-out."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class Block(nn.Module):
    """A residual unit that gives ``relu(shortcut(x) + residual(x))`` if kept, and ``shortcut(x)``, with no ReLU, if
    dropped.

    The original BlockDrop networks have no ReLU there either (it matters where the shortcut is a strided convolution);
    see ``execution.py``.
    """

    def __init__(self, residual: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.residual = residual
        self.shortcut = shortcut

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        """Run the block as kept, on features (B, C, H, W).

        Args:
            inplace: whether x may be overwritten, because it is not needed afterwards; never done with gradients.
        """
        if torch.is_grad_enabled():
            return torch.relu_(self.shortcut(x) + self.residual(x))
        return self.join(self.shortcut(x), x, inplace)

    def join(self, shortcut: Tensor, x: Tensor, inplace: bool = False) -> Tensor:
        """Return ``relu(shortcut + residual(x))``, in the shape of the shortcut, which is computed before; without
        gradients.

        Args:
            inplace: whether ``shortcut`` may be overwritten.
        """
        joined: Tensor = self.residual(x).add_(shortcut).relu_()
        return joined


class Backbone(Network):
    """A network that has a stem, K blocks and a head: the package uses these three of a network, and nothing else.

    Args:
        stem: module from normalised images (B, 3, H, W) to features.
        blocks: the K blocks, in order.
        head: module from the last features to logits (B, C).
        num_classes: C.
        mean, std: as in :class:`Network`.
        stages: number of blocks in each stage; sums to K. Used to label plots and to name blocks.

    Raises:
        UserError: the stages do not sum to K.
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
        if sum(stages) != len(blocks):
            raise UserError(f"stages {list(stages)} must sum to the number of blocks, {len(blocks)}")
        self.stages = tuple(stages)

    @property
    def num_blocks(self) -> int:
        """Return K, the number of blocks that can be skipped."""
        return len(self.blocks)

    def features(self, images: Tensor) -> Tensor:
        """Compute the features that enter block 0 from images (B, 3, H, W), uint8 in 0..255 or float in [0, 1]."""
        return self.stem(self.normalise(images))

    def forward(self, images: Tensor, keep_BK: Tensor | None = None) -> Tensor:
        """Compute logits (B, C) of images (B, 3, H, W), with the blocks where ``keep_BK``, bool, is true, or with all
        blocks."""
        from policyskip.backbones.execution import dense

        if keep_BK is not None:
            return dense(self, images, keep_BK)
        x = self.features(images)
        for block in self.blocks:
            x = block(x, inplace=True)
        return self.head(x)
