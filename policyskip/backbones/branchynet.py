"""BranchyNet's networks, which follow the authors' code and take images of any size (Teerapittayanon, McDanel, Kung,
*BranchyNet: Fast Inference via Early Exiting from Deep Neural Networks*, ICPR 2016, arXiv 1709.01686).

Pooling is as in Chainer: a window that reaches beyond the edge counts (``ceil_mode``). So is local response
normalisation: it adds the sum of the squares of neighbouring channels to 2, where torch adds their mean to 1.

Shapes: B images, N exits, C classes, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policyskip.backbones.base import IMAGENET_MEAN, IMAGENET_STD, he_init
from policyskip.backbones.exits import ExitNetwork, State
from policyskip.backbones.resnet import MOST_DEPTH, basic_block
from policyskip.errors import UserError

Layers = Sequence[nn.Module]


@dataclass
class Part:
    """Holds one part of a network: the trunk from the exit before to this exit, and this exit's branch.

    Attributes:
        trunk: layers from the part before to this exit.
        branch: layers from the trunk to the linear layers.
        hidden: widths of linear layers behind the branch; a linear layer to the C classes follows them.
        between: layers after each of the hidden layers.
    """

    trunk: Layers
    branch: Layers
    hidden: Sequence[int] = ()
    between: Layers = field(default_factory=list)


class BranchyNet(ExitNetwork):
    """A network whose trunk has N parts, each with a branch to an exit.

    Args:
        parts: the N parts, from the image to the last exit.
        num_classes: C.
        image_shape: (3, H, W), on which the sizes of the linear layers depend.
        mean, std: pixel normalisation, per channel, for pixels in [0, 1].

    Raises:
        UserError: images of this size are too small.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        num_classes: int,
        image_shape: tuple[int, int, int],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__(num_classes, len(parts), mean, std)
        self.segments, self.heads = nn.ModuleList(), nn.ModuleList()
        x = torch.zeros(1, *image_shape)
        try:
            for part in parts:
                segment = nn.Sequential(*part.trunk)
                x = _run(segment, x)
                self.segments.append(segment)
                self.heads.append(_head(part, x, num_classes))
        except RuntimeError as error:
            raise UserError(f"images of {image_shape[1]}×{image_shape[2]} are too small for this network") from error
        self.architecture = dict(num_classes=num_classes, image_shape=list(image_shape), mean=list(mean), std=list(std))

    def begin(self, images: Tensor) -> State:
        return {"x": self.normalise(images)}

    def segment(self, n: int, state: State) -> State:
        return {"x": self.segments[n](state["x"])}

    def head(self, n: int, state: State) -> Tensor:
        return self.heads[n](state["x"])


class BranchyLeNet(BranchyNet):
    """B-LeNet, a network for MNIST that has two exits.

    Args:
        channels: 3, or 1 to see only the mean of the colours, as the original saw grey images.

    Raises:
        UserError: ``channels`` is neither 1 nor 3, or images of this size are too small.
    """

    def __init__(
        self,
        num_classes: int,
        image_shape: tuple[int, int, int],
        channels: int = 3,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> None:
        if channels not in (1, 3):
            raise UserError(f"channels must be 1 (grey) or 3, got {channels}")
        grey = [Grey()] if channels == 1 else []
        parts = [
            Part(
                [*grey, nn.Conv2d(channels, 5, 5, padding=3)],
                [max_pool(2), nn.ReLU(), nn.Conv2d(5, 10, 3, padding=1), max_pool(2), nn.ReLU()],
            ),
            Part(
                [
                    *(max_pool(2), nn.ReLU(), nn.Conv2d(5, 10, 5, padding=3)),
                    *(max_pool(2), nn.ReLU(), nn.Conv2d(10, 20, 5, padding=3), max_pool(2), nn.ReLU()),
                ],
                [],
                hidden=[84],
            ),
        ]
        super().__init__(parts, num_classes, image_shape, mean, std)
        self.name = "branchy_lenet"
        self.architecture |= dict(network="branchy_lenet", channels=channels)


class BranchyAlexNet(BranchyNet):
    """B-AlexNet, a network for CIFAR-10 that has three exits: after the second and third convolution, as in the
    authors' code (the paper says after the first and second), and at the end."""

    def __init__(
        self,
        num_classes: int,
        image_shape: tuple[int, int, int],
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        def pool_and_norm() -> Layers:
            return [nn.ReLU(), max_pool(3), response_norm()]

        parts = [
            Part(
                [nn.Conv2d(3, 32, 5, padding=2), *pool_and_norm(), nn.Conv2d(32, 64, 5, padding=2)],
                [*pool_and_norm(), *conv_relu(64, 32), *conv_relu(32, 32), max_pool(3)],
            ),
            Part(
                [*pool_and_norm(), nn.Conv2d(64, 96, 3, padding=1)],
                [*pool_and_norm(), *conv_relu(96, 32), max_pool(3)],
            ),
            Part(
                [nn.ReLU(), *conv_relu(96, 96), *conv_relu(96, 64), max_pool(3)],
                [],
                hidden=[256, 128],
                between=[nn.ReLU(), nn.Dropout(0.5)],
            ),
        ]
        super().__init__(parts, num_classes, image_shape, mean, std)
        self.name = "branchy_alexnet"
        self.architecture |= dict(network="branchy_alexnet")


class BranchyResNet(BranchyNet):
    """B-ResNet, a network for CIFAR-10 that has three exits: after the first convolution, after a third of the blocks,
    and at the end. The original has depth 110. Its first convolution is not padded, so 32 pixels become 30.

    Raises:
        UserError: the depth is not 6n+2, or images of this size are too small.
    """

    def __init__(
        self,
        num_classes: int,
        image_shape: tuple[int, int, int],
        depth: int = 110,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        if not 8 <= depth <= MOST_DEPTH or (depth - 2) % 6:
            raise UserError(
                f"a B-ResNet's depth must be 6n+2 (8, 14, 20, 32, 56, 110, …, at most {MOST_DEPTH}), got {depth}"
            )

        def stage(channels_in: int, channels: int) -> Layers:
            first = basic_block(channels_in, channels, 1 if channels_in == channels else 2, "A")
            return [first, *(basic_block(channels, channels, 1, "A") for _ in range((depth - 2) // 6 - 1))]

        parts = [
            Part(
                [nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()],
                [nn.Conv2d(16, 64, 5, padding=2), nn.ReLU(), response_norm(), *conv_relu(64, 32), *conv_relu(32, 32)],
            ),
            Part(stage(16, 16), [basic_block(16, 16, 1, "A")]),
            Part([*stage(16, 32), *stage(32, 64)], [AveragePool(6)]),
        ]
        super().__init__(parts, num_classes, image_shape, mean, std)
        self.name = f"branchy_resnet{depth}"
        self.architecture |= dict(network="branchy_resnet", depth=depth)
        he_init(self)


class Grey(nn.Module):
    """A layer that averages the colours, (B, 3, H, W) to (B, 1, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True)


class AveragePool(nn.Module):
    """A layer that averages over every window of ``size``×``size`` pixels, or over all pixels if there are fewer."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, (min(self.size, x.shape[2]), min(self.size, x.shape[3])), stride=1)


def max_pool(kernel: int) -> nn.Module:
    """Build max pooling over windows two pixels apart; windows that reach beyond the edge count, as in Chainer."""
    return nn.MaxPool2d(kernel, 2, ceil_mode=True)


def response_norm() -> nn.Module:
    """Build Chainer's local response normalisation over three channels, x / (2 + 5e-5 Σ x²)^0.75."""
    return nn.LocalResponseNorm(3, alpha=3 * 5e-5, beta=0.75, k=2)


def conv_relu(channels_in: int, channels_out: int) -> Layers:
    """Build a 3×3 convolution and a ReLU."""
    return [nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.ReLU()]


def _head(part: Part, x: Tensor, num_classes: int) -> nn.Sequential:
    """Build a part's branch as one module, for features like x (B, C, H, W)."""
    layers, size = list(part.branch), _run(nn.Sequential(*part.branch), x).numel()
    layers.append(nn.Flatten())
    for width in part.hidden:
        layers += [nn.Linear(size, width), *part.between]
        size = width
    return nn.Sequential(*layers, nn.Linear(size, num_classes))


@torch.no_grad()
def _run(layers: nn.Sequential, x: Tensor) -> Tensor:
    """Compute the layers' output for x in evaluation mode, which leaves their statistics alone, and return to training
    mode."""
    x = layers.eval()(x)
    layers.train()
    return x
