"""Policy networks: from an image they compute K logits, one for each block, which decide which blocks run.

Shapes: B images, K blocks, D features, H W pixels.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from policyskip import registry
from policyskip.backbones.base import IMAGENET_MEAN, IMAGENET_STD
from policyskip.backbones.resnet import basic_block
from policyskip.errors import UserError
from policyskip.policies.base import Policy
from policyskip.texts import a_type


class KeepPolicy(Policy):
    """A network from images to K logits, one for each block, which :class:`~policyskip.agents.blockdrop.BlockDrop`
    trains.

    A subclass defines :meth:`features_and_logits`; one without features defines :meth:`forward` instead. From the
    features BlockDrop can learn to predict the reward. ``agent.warm_start=true`` needs a last layer named
    ``keep_head``, from :func:`keep_layer`.

    Args:
        num_blocks: K.

    Attributes:
        free_K: bool (K,), the blocks that the curriculum has freed; the others are kept.
    """

    free_K: Tensor

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.register_buffer("free_K", torch.ones(num_blocks, dtype=torch.bool))

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features float (B, D) and logits float (B, K) of images uint8 (B, 3, H, W)."""
        logits_BK: Tensor = self(images)
        return logits_BK.new_zeros(len(images), 0), logits_BK

    def forward(self, images: Tensor) -> Tensor:
        """Return logits float (B, K) of images uint8 (B, 3, H, W)."""
        if type(self).features_and_logits is KeepPolicy.features_and_logits:
            name = type(self).__name__
            raise NotImplementedError(f"{name} has neither features_and_logits nor forward; a KeepPolicy needs one")
        return self.features_and_logits(images)[1]

    def decide(self, images: Tensor) -> Tensor:
        return self.greedy(self(images))

    def greedy(self, logits_BK: Tensor) -> Tensor:
        """Decide greedily: ũ = [s ≥ ½], s = sigmoid(logits); bool (B, K). Blocks that are not free are kept."""
        return (logits_BK >= 0) | ~self.free_K

    def start_from(self, keep: Sequence[bool]) -> None:
        """Let a fresh policy start from a fixed keep-set of K blocks: the blocks of the set keep their probability, and
        each of the others gets the complement.

        Raises:
            UserError: the policy has no ``keep_head`` with a bias.
        """
        head = getattr(self, "keep_head", None)
        if not isinstance(head, nn.Linear) or head.bias is None:
            raise UserError(
                f"{type(self).__name__} cannot start from a keep-set, as it has no keep_head (see keep_layer); "
                "say agent.warm_start=false"
            )
        with torch.no_grad():
            head.bias.mul_(torch.tensor(keep).float() * 2 - 1)


def keep_layer(num_features: int, num_blocks: int, initial_keep: float = 0.5) -> nn.Linear:
    """Make the last layer of a policy network, from features (B, D) to logits (B, K), which at first keeps each block
    with a probability of about ``initial_keep``.

    Raises:
        UserError: ``initial_keep`` is not between 0 and 1.
    """
    if not 0 < initial_keep < 1:
        raise UserError(f"agent.initial_keep must be above 0 and below 1, got {initial_keep}")
    layer = nn.Linear(num_features, num_blocks)
    nn.init.constant_(layer.bias, math.log(initial_keep / (1 - initial_keep)))
    return layer


def policy_network(
    name: str,
    num_blocks: int,
    image_shape: Sequence[int],
    width: int = 16,
    pool: int = 1,
    initial_keep: float = 0.5,
) -> KeepPolicy:
    """Make a fresh policy network by name.

    Args:
        name: "cifar" or "imagenet" (:class:`PolicyNetwork`), "constant" (:class:`ConstantPolicy`), or the name of a
            :class:`KeepPolicy` of the user's own: ``package.module.Name``, or that of an installed entry point.
        num_blocks: K.
        image_shape: (3, H, W).
        width, pool, initial_keep: as for :class:`PolicyNetwork`. A class of the user's own gets ``num_blocks``, and
            those of the other arguments that its constructor declares.

    Raises:
        UserError: there is no such network, it may not be imported, or it fails.
    """
    if name in ("cifar", "imagenet"):
        return PolicyNetwork(num_blocks, name, width, pool, initial_keep)  # type: ignore[arg-type]
    if name == "constant":
        return ConstantPolicy(num_blocks, initial_keep)
    if "." not in name and name not in (known := registry.installed("policy")):
        raise UserError(
            f"agent.policy: input should be 'cifar', 'imagenet' or 'constant', got {name!r}, which is not installed "
            f"here either ({', '.join(sorted(known)) or 'none is installed'})"
        )
    kind = registry.resolve("policy", name)
    if not (inspect.isclass(kind) and issubclass(kind, KeepPolicy)):
        raise UserError(f"agent.policy={name} must be a subclass of {KeepPolicy.__module__}.KeepPolicy, and is none")
    optional = dict(image_shape=list(image_shape), width=width, pool=pool, initial_keep=initial_keep)
    declared = inspect.signature(kind.__init__).parameters
    with registry.naming_failures(f"agent.policy={name}"):
        return kind(num_blocks=num_blocks, **{key: value for key, value in optional.items() if key in declared})


def check_policy(policy: KeepPolicy, images: Tensor, num_blocks: int) -> int:
    """Try a policy network on images uint8 (B, 3, H, W) and return the number of its features, D.

    Raises:
        UserError: the network fails, or does not return features (B, D) and logits (B, K).
    """
    kind = type(policy).__name__
    with torch.no_grad(), registry.naming_failures(f"agent: the policy network {kind}"):
        returned: Any = policy.eval().features_and_logits(images)
    if not isinstance(returned, tuple | list) or len(returned) != 2 or not all(isinstance(x, Tensor) for x in returned):
        what = f"{len(returned)} values" if isinstance(returned, tuple | list) else a_type(returned)
        raise UserError(
            f"features_and_logits of the policy network {kind} must return features (B, D) and logits (B, K), got "
            f"{what}; a network without features may define forward, which returns the logits"
        )
    features_BD, logits_BK = returned
    if logits_BK.shape != (len(images), num_blocks) or features_BD.shape[:-1] != (len(images),):
        raise UserError(
            f"the policy network {kind} must give features (B, D) and logits (B, K), here ({len(images)}, D) and "
            f"({len(images)}, {num_blocks}); got {tuple(features_BD.shape)} and {tuple(logits_BK.shape)}"
        )
    return features_BD.shape[1]


class PolicyNetwork(KeepPolicy):
    """A small ResNet that computes K logits from images.

    Args:
        num_blocks: K.
        family: "cifar", ResNet-8 (one basic block a stage, 16/32/64 channels), or "imagenet", ResNet-10 (four stages,
            64 to 512 channels, behind a strided stem).
        width: channels of the first stage; fewer make the policy cheaper, and its cost counts.
        pool: factor by which the image is average-pooled before anything else, which makes the policy cheaper, too.
        initial_keep: approximate probability with which a fresh policy keeps a block.

    Raises:
        UserError: a value that is not allowed.
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
        super().__init__(num_blocks)
        if family not in ("cifar", "imagenet"):
            raise UserError(f"agent.policy must be cifar, imagenet or constant, got {family!r}")
        if min(width, pool) < 1 or not 0 < initial_keep < 1:
            raise UserError(
                f"agent.width and agent.pool must be at least 1 and agent.initial_keep above 0 and below 1, "
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
        self.keep_head = keep_layer(channels, num_blocks, initial_keep)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, -1, 1, 1))

    def spec(self) -> dict[str, Any]:
        return self.arguments

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        # images / 255 alone would be of torch's default dtype, which a program may have set
        features_BD: Tensor = self.features((images.to(self.mean.dtype) / 255 - self.mean) / self.std)
        return features_BD, self.keep_head(features_BD)


class ConstantPolicy(KeepPolicy):
    """A policy whose K logits are the same for every image: it learns the best decision that ignores the image, and
    costs nothing to evaluate."""

    def __init__(self, num_blocks: int, initial_keep: float = 0.5) -> None:
        super().__init__(num_blocks)
        self.arguments = dict(num_blocks=num_blocks, initial_keep=initial_keep)
        self.logits_K = nn.Parameter(torch.full((num_blocks,), math.log(initial_keep / (1 - initial_keep))))

    def start_from(self, keep: Sequence[bool]) -> None:
        with torch.no_grad():
            self.logits_K.mul_(torch.tensor(keep).float() * 2 - 1)

    def spec(self) -> dict[str, Any]:
        return self.arguments

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features of no dimension, (B, 0), since the image is ignored, and the logits, (B, K)."""
        return self.logits_K.new_zeros(len(images), 0), self.logits_K.repeat(len(images), 1)
