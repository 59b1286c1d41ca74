"""From an image to K logits, one for each block: the networks that decide which blocks run.

Shapes: B images, K blocks, D features, H W pixels.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from policyskip.backbones.base import IMAGENET_MEAN, IMAGENET_STD
from policyskip.backbones.resnet import basic_block
from policyskip.errors import UserError
from policyskip.policies.base import Policy


class KeepPolicy(Policy):
    """K logits for each image; blocks that the curriculum has not freed (``free_K``, bool (K,)) are kept."""

    free_K: Tensor
    num_features: int

    @abstractmethod
    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features float (B, D) and logits float (B, K) of images uint8 (B, 3, H, W)."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits float (B, K) of images uint8 (B, 3, H, W)."""
        return self.look(images)[1]

    def decide(self, images: Tensor) -> Tensor:
        return self.greedy(self(images))

    def greedy(self, logits_BK: Tensor) -> Tensor:
        """ũ = [s ≥ ½], from the unbounded s; bool (B, K)."""
        return (logits_BK >= 0) | ~self.free_K


class PolicyNetwork(KeepPolicy):
    """A small ResNet from images to K logits.

    ``family="cifar"`` is ResNet-8 (one basic block a stage, 16/32/64 channels), ``"imagenet"`` ResNet-10 (four
    stages, 64 to 512, behind a strided stem). ``width`` is the first stage's channels; the image is average-pooled
    by ``pool`` before anything else. Both are there because what the policy costs is counted.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        num_blocks: int,
        family: Literal["cifar", "imagenet"] = "cifar",
        width: int = 16,
        pool: int = 1,
        initial_keep: float = 0.5,
    ) -> None:
        super().__init__()
        if family not in ("cifar", "imagenet"):
            raise UserError(f"agent.policy must be cifar, imagenet or constant, got {family!r}")
        if min(width, pool) < 1 or not 0 < initial_keep < 1:
            raise UserError(
                f"agent.width and agent.pool must be at least 1 and agent.initial_keep between 0 and 1, "
                f"got {width}, {pool} and {initial_keep}"
            )
        self.arguments = dict(num_blocks=num_blocks, family=family, width=width, pool=pool, initial_keep=initial_keep)
        imagenet = family == "imagenet"
        layers: list[nn.Module] = [nn.AvgPool2d(pool)] if pool > 1 else []
        layers += [
            nn.Conv2d(3, width, 7 if imagenet else 3, 2 if imagenet else 1, padding=3 if imagenet else 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        layers += [nn.MaxPool2d(3, 2, padding=1)] if imagenet else []
        channels = width
        for stage in range(4 if imagenet else 3):
            out = width * 2**stage
            layers.append(basic_block(channels, out, 2 if stage else 1, "B" if imagenet else "pool"))
            channels = out
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.num_features = channels
        self.keep_head = nn.Linear(channels, num_blocks)
        nn.init.constant_(self.keep_head.bias, math.log(initial_keep / (1 - initial_keep)))
        self.register_buffer("free_K", torch.ones(num_blocks, dtype=torch.bool))
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, -1, 1, 1))

    def depart_from(self, keep: Sequence[bool]) -> None:
        """Turn round the first probability of the blocks that a fixed keep-set drops."""
        with torch.no_grad():
            self.keep_head.bias.mul_(torch.tensor(keep).float() * 2 - 1)

    def spec(self) -> dict[str, Any]:
        return self.arguments

    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features_BD: Tensor = self.features((images / 255 - self.mean) / self.std)
        return features_BD, self.keep_head(features_BD)


class ConstantPolicy(KeepPolicy):
    """The same K logits for every image: what the learner can do without looking. Costs nothing to evaluate."""

    def __init__(self, num_blocks: int, initial_keep: float = 0.5) -> None:
        super().__init__()
        self.arguments = dict(num_blocks=num_blocks, initial_keep=initial_keep)
        self.num_features = 0
        self.logits_K = nn.Parameter(torch.full((num_blocks,), math.log(initial_keep / (1 - initial_keep))))
        self.register_buffer("free_K", torch.ones(num_blocks, dtype=torch.bool))

    def depart_from(self, keep: Sequence[bool]) -> None:
        """As for :class:`PolicyNetwork`."""
        with torch.no_grad():
            self.logits_K.mul_(torch.tensor(keep).float() * 2 - 1)

    def spec(self) -> dict[str, Any]:
        return self.arguments

    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features of no dimension, (B, 0): every image is alike."""
        return self.logits_K.new_zeros(len(images), 0), self.logits_K.repeat(len(images), 1)
