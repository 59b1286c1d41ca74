"""A residual network whose early exits are heads after some of its blocks.

Placement follows Distiller's early exits (Intel AI Lab; Zmora et al., *Neural Network Distiller*, arXiv 1910.12232):
an exit may follow any block, and a block may be given by the name of its module.

Shapes: B images, N exits, C classes, K blocks, H W pixels.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from policyskip.backbones.base import Backbone, evaluation_mode
from policyskip.backbones.exits import ExitNetwork, State
from policyskip.errors import UserError

Shape = tuple[int, int, int]
HeadKind = Literal["linear", "pooled", "conv", "distiller_cifar", "distiller_imagenet"]


def linear_head(shape: Shape, num_classes: int) -> nn.Module:
    """Build a head of one linear layer over all features, as in Conditional Deep Learning (Panda et al. 2016)."""
    channels, height, width = shape
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, num_classes))


def pooled_head(shape: Shape, num_classes: int) -> nn.Module:
    """Build a head of one linear layer over each channel's average: the cheapest head."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(shape[0], num_classes))


def conv_head(shape: Shape, num_classes: int, depth: int) -> nn.Module:
    """Build a head of ``depth`` strided 3×3 convolutions with BN and ReLU, to twice the channels but at most 64, and a
    pooled head."""
    channels, width = shape[0], min(2 * shape[0], 64)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Conv2d(channels, width, 3, 2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, *pooled_head((channels, 1, 1), num_classes).children())


def distiller_cifar_head(shape: Shape, num_classes: int) -> nn.Module:
    """Build the head of Distiller's CIFAR ResNets: 3×3 averages, and one linear layer over them.

    Raises:
        UserError: the features are smaller than 3×3.
    """
    channels, height, width = shape
    if min(height, width) < 3:
        raise UserError(f"a distiller_cifar head needs features of at least 3×3, there are {height}×{width}")
    return nn.Sequential(nn.AvgPool2d(3), *linear_head((channels, height // 3, width // 3), num_classes).children())


def distiller_imagenet_head(shape: Shape, num_classes: int, channels: int) -> nn.Module:
    """Build the head of Distiller's ResNet-50: a strided 7×7 convolution to ``channels``, 3×3 max pooling, and a linear
    layer."""
    height, width = (-(-size // 4) for size in shape[1:])
    return nn.Sequential(
        nn.Conv2d(shape[0], channels, 7, 2, padding=3),
        nn.MaxPool2d(3, 2, padding=1),
        *linear_head((channels, height, width), num_classes).children(),
    )


HEADS: dict[str, Callable[[Shape, int, int, int], nn.Module]] = {
    "linear": lambda shape, num_classes, n, later: linear_head(shape, num_classes),
    "pooled": lambda shape, num_classes, n, later: pooled_head(shape, num_classes),
    "conv": lambda shape, num_classes, n, later: conv_head(shape, num_classes, min(later, 3)),
    "distiller_cifar": lambda shape, num_classes, n, later: distiller_cifar_head(shape, num_classes),
    "distiller_imagenet": lambda shape, num_classes, n, later: distiller_imagenet_head(shape, num_classes, 10 + 2 * n),
}
"""The functions that build a head from the features' shape (channels, H, W), C, the exit's index n, and the number of
exits from this one to the last, by name."""


class ResNetExits(ExitNetwork):
    """A backbone that has exits after some of its blocks; the last exit is the backbone's own head.

    Over a frozen backbone only the new heads learn: ``train()`` leaves the backbone in evaluation mode.

    Args:
        backbone: the network that gets the exits; all its blocks run.
        exits: the blocks that an exit follows, in ascending order: indices from 0, or names such as "layer1.2" or
            "stage1.2" (the third block of the first stage), also with the ReLU that ends the block
            ("layer1.2.relu2").
        heads: "linear" (over all features), "pooled" (over each channel's average), "conv" (strided convolutions,
            pooled: one at the last exit before the backbone's own, one more at each earlier exit, up to three),
            "distiller_cifar" or "distiller_imagenet" (Distiller's own); one kind for all, or one for each of ``exits``.
        image_shape: (3, H, W), on which the sizes of the heads depend.

    Raises:
        UserError: an exit follows no block or the last block, the exits are not in ascending order, or a head is
            unknown or does not fit.
    """

    def __init__(
        self,
        backbone: Backbone,
        exits: Sequence[int | str],
        heads: str | Sequence[str] = "pooled",
        image_shape: tuple[int, int, int] = (3, 32, 32),
    ) -> None:
        blocks = find_blocks(backbone, exits)
        kinds = [heads] * len(blocks) if isinstance(heads, str) else list(heads)
        unknown = [kind for kind in kinds if kind not in HEADS]
        if unknown:
            raise UserError(f"there is no head {unknown[0]!r}; heads are {', '.join(HEADS)}")
        if len(kinds) != len(blocks):
            raise UserError(f"{len(blocks)} exits need one kind of head or {len(blocks)}, got {len(kinds)}")
        mean, std = backbone.mean.flatten().tolist(), backbone.std.flatten().tolist()
        super().__init__(backbone.num_classes, len(blocks) + 1, mean, std)
        for name in ("mean", "std"):  # the backbone's own, which are saved as part of it
            self.register_buffer(name, getattr(backbone, name), persistent=False)
        self.backbone = backbone
        self.exits = tuple(blocks)
        self.exit_heads = nn.ModuleList(
            HEADS[kind](shape, self.num_classes, n, len(blocks) - n)
            for n, (kind, shape) in enumerate(zip(kinds, feature_shapes(backbone, blocks, image_shape)))
        )
        self.name = f"{backbone.name}_exits"
        if backbone.architecture:
            self.architecture = dict(
                network="resnet_exits",
                backbone=backbone.architecture,
                exits=blocks,
                heads=kinds,
                image_shape=list(image_shape),
            )

    def only(self, kept: Sequence[int]) -> ResNetExits:
        """Make a network with only some of the early exits, given by their indices from 0, ascending, and with the last
        exit. It shares all weights with this network."""
        fewer = copy.copy(self)
        fewer._modules = dict(self._modules)
        fewer.exits = tuple(self.exits[n] for n in kept)
        fewer.exit_heads = nn.ModuleList(self.exit_heads[n] for n in kept)
        fewer.num_exits = len(kept) + 1
        if "heads" in self.architecture:
            kinds = [self.architecture["heads"][n] for n in kept]
            fewer.architecture = {**self.architecture, "exits": list(fewer.exits), "heads": kinds}
        elif self.architecture:  # a call of the user's own made this network
            fewer.architecture = {**self.architecture, "kept_exits": list(kept)}
        return fewer

    def up_to(self, n: int) -> Backbone:
        """Make the network that ends at exit n, counted from 0: the blocks before it, which can be skipped, and its
        head. It shares all weights with this network."""
        if n == self.num_exits - 1:
            return self.backbone
        part, K = copy.copy(self.backbone), self.exits[n] + 1
        part._modules = dict(self.backbone._modules)
        part.blocks = nn.ModuleList(self.backbone.blocks[:K])  # type: ignore[assignment]
        part.head, part.architecture = self.exit_heads[n], {}
        edges = [min(sum(self.backbone.stages[:stage]), K) for stage in range(len(self.backbone.stages) + 1)]
        part.stages = tuple(end - start for start, end in pairwise(edges) if end > start)
        return part

    def begin(self, images: Tensor) -> State:
        return {"x": self.backbone.features(images)}

    def segment(self, n: int, state: State) -> State:
        ends = (-1, *self.exits, self.backbone.num_blocks - 1)
        x = state["x"]
        for k in range(ends[n] + 1, ends[n + 1] + 1):
            x = self.backbone.blocks[k](x)
        return {"x": x}

    def head(self, n: int, state: State) -> Tensor:
        head = self.backbone.head if n == self.num_exits - 1 else self.exit_heads[n]
        return head(state["x"])


def find_blocks(backbone: Backbone, exits: Sequence[int | str]) -> list[int]:
    """Find the indices, from 0, of the blocks that ``exits`` follow (see :class:`ResNetExits`).

    Raises:
        UserError: there is no such block, it is the last one, or they are not in ascending order.
    """
    last = backbone.num_blocks - 1
    blocks = [_find_block(backbone, block) for block in exits]
    if any(a >= b for a, b in pairwise(blocks)):
        raise UserError(f"exits must be in ascending order, each once, got {list(exits)}")
    if last in blocks:
        raise UserError(
            f"block {last} is the last of {backbone.name}: its exit is the network's own head; "
            f"exits follow blocks 0 to {last - 1}"
        )
    return blocks


def _find_block(backbone: Backbone, name: int | str) -> int:
    """Find the index of a block from its index or name.

    Raises:
        UserError: there is no such block.
    """
    if isinstance(name, int):
        if 0 <= name < backbone.num_blocks:
            return name
        raise UserError(
            f"there is no block {name} in {backbone.name}: exits follow blocks 0 to {backbone.num_blocks - 2}"
        )
    match = re.fullmatch(r"(?:layer|stage)(\d+)\.(\d+)(?:\.relu(\d))?", name)
    stage, block = (int(match[1]) - 1, int(match[2])) if match else (-1, -1)
    if not 0 <= stage < len(backbone.stages) or block >= backbone.stages[stage]:
        names = ", ".join(f"layer{s}.0 to layer{s}.{size - 1}" for s, size in enumerate(backbone.stages, 1))
        raise UserError(f"there is no block {name!r} in {backbone.name}: its blocks are {names}")
    index = sum(backbone.stages[:stage]) + block
    convolutions = sum(isinstance(m, nn.Conv2d) for m in backbone.blocks[index].residual.modules())
    if match and match[3] and int(match[3]) != convolutions:
        raise UserError(f"{name} is no end of a block: exits follow whole blocks, such as layer{stage + 1}.{block}")
    return index


@torch.no_grad()
def feature_shapes(backbone: Backbone, blocks: Sequence[int], image_shape: tuple[int, int, int]) -> list[Shape]:
    """Find the shapes (channels, H, W) of the features after some blocks, given by index, for images (3, H, W)."""
    shapes: list[Shape] = []
    with evaluation_mode(backbone):
        x = backbone.features(torch.zeros(1, *image_shape, device=backbone.mean.device))
        for k, block in enumerate(backbone.blocks[: max(blocks, default=-1) + 1]):
            x = block(x)
            if k in blocks:
                shapes.append((x.shape[1], x.shape[2], x.shape[3]))
    return shapes
