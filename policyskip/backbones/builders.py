"""Multi-exit networks with weights: the functions that ``configs/backbone`` names, and shipped weights by name.

Of every function: ``checkpoint`` is a file that :func:`policyskip.backbones.checkpoints.save` wrote, a shipped name, or
"random" (the weights of ``seed``, to be trained). What is left None comes from the checkpoint, or is the network's
default. Each raises UserError if there is no such checkpoint, or one of another network, or if the arguments make no
network.

Shapes: C classes, H W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from policyskip.backbones.architectures import EXIT_NETWORKS, is_users_own
from policyskip.backbones.base import Backbone
from policyskip.backbones.branchynet import BranchyAlexNet, BranchyLeNet, BranchyResNet
from policyskip.backbones.checkpoints import (
    RANDOM,
    cifar_resnet,
    find,
    read_architecture,
    read_tensors,
    rebuilt,
    seeded,
    shipped,
    torchvision_resnet,
)
from policyskip.backbones.exits import ExitNetwork
from policyskip.backbones.msdnet import MSDNet, Prune, Stem, StepMode
from policyskip.backbones.resnet import Shortcut
from policyskip.backbones.resnet_exits import ResNetExits, find_blocks
from policyskip.errors import UserError

Shape = tuple[int, int, int]


Built = TypeVar("Built", bound=ExitNetwork)


def multi_scale_densenet(
    num_classes: int,
    checkpoint: str | None,
    num_exits: int,
    base: int,
    step: int,
    step_mode: StepMode,
    channels: int,
    growth_rate: int,
    growth_factors: Sequence[int],
    bottleneck_factors: Sequence[int],
    prune: Prune = "max",
    reduction: float = 0.5,
    stem: Stem = "cifar",
    head_channels: int = 128,
    lazy: bool = True,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: int | None = None,
    seed: int = 0,
) -> MSDNet:
    """An :class:`MSDNet`. ``image_size`` is what image folders are scaled to for it; the network takes any size."""
    asked = dict(
        num_classes=num_classes,
        num_exits=num_exits,
        base=base,
        step=step,
        step_mode=step_mode,
        channels=channels,
        growth_rate=growth_rate,
        growth_factors=growth_factors,
        bottleneck_factors=bottleneck_factors,
        prune=prune,
        reduction=reduction,
        stem=stem,
        head_channels=head_channels,
        mean=mean,
        std=std,
    )
    network = _with_weights(MSDNet, "msdnet", asked, checkpoint, seed)
    network.lazy = lazy
    return network


def branchy_lenet(
    num_classes: int,
    image_shape: Shape,
    checkpoint: str | None,
    channels: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
) -> BranchyLeNet:
    """A :class:`BranchyLeNet` for images of shape (3, H, W)."""
    asked = dict(num_classes=num_classes, image_shape=image_shape, channels=channels, mean=mean, std=std)
    return _with_weights(BranchyLeNet, "branchy_lenet", asked, checkpoint, seed)


def branchy_alexnet(
    num_classes: int,
    image_shape: Shape,
    checkpoint: str | None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
) -> BranchyAlexNet:
    """A :class:`BranchyAlexNet` for images of shape (3, H, W)."""
    asked = dict(num_classes=num_classes, image_shape=image_shape, mean=mean, std=std)
    return _with_weights(BranchyAlexNet, "branchy_alexnet", asked, checkpoint, seed)


def branchy_resnet(
    num_classes: int,
    image_shape: Shape,
    depth: int,
    checkpoint: str | None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
) -> BranchyResNet:
    """A :class:`BranchyResNet` for images of shape (3, H, W)."""
    asked = dict(num_classes=num_classes, image_shape=image_shape, depth=depth, mean=mean, std=std)
    return _with_weights(BranchyResNet, "branchy_resnet", asked, checkpoint, seed)


def cifar_resnet_exits(
    num_classes: int,
    image_shape: Shape,
    depth: int,
    exits: list[int | str],
    checkpoint: str | None,
    heads: str | list[str] = "pooled",
    shortcut: Shortcut | None = None,
    width: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
) -> ResNetExits:
    """:class:`ResNetExits` over a CIFAR ResNet. A checkpoint of the ResNet alone (see :func:`cifar_resnet`) leaves the
    exits' heads random."""
    asked = dict(depth=depth, num_classes=num_classes, shortcut=shortcut, width=width, mean=mean, std=std)
    return _exits_over(
        lambda: cifar_resnet(num_classes, depth, checkpoint, shortcut, width, mean, std, seed),
        *(asked, exits, heads, image_shape, checkpoint, seed),
    )


def torchvision_resnet_exits(
    num_classes: int,
    image_shape: Shape,
    depth: int,
    exits: list[int | str],
    checkpoint: str | None = "DEFAULT",
    heads: str | list[str] = "pooled",
    image_size: int = 224,
    seed: int = 0,
) -> ResNetExits:
    """:class:`ResNetExits` over torchvision's ResNet. A checkpoint of the ResNet alone (see :func:`torchvision_resnet`)
    leaves the exits' heads random. ``image_size`` is what image folders are scaled to."""
    return _exits_over(
        lambda: torchvision_resnet(num_classes, depth, checkpoint, image_size, seed),
        *(dict(depth=depth, num_classes=num_classes), exits, heads, image_shape, checkpoint, seed),
    )


def load_exits(name: str, trusted: bool = False) -> ExitNetwork:
    """Read a frozen multi-exit network: shipped weights by name, or a file that ``save`` wrote.

    Args:
        name: the shipped weights' name, or the file's.
        trusted: whether a network that is neither the package's own nor installed may be imported.

    Raises:
        UserError: there is no such file, it holds another kind of network, or one that is not installed here.
    """
    architecture = read_architecture(name) or {}
    kind = architecture.get("network")
    if not (is_users_own(architecture) or (isinstance(kind, str) and kind in EXIT_NETWORKS)):
        raise UserError(f"{name} holds no multi-exit network{_what(architecture)}")
    network = rebuilt(architecture, read_tensors(find(name)), name, trusted)
    if not isinstance(network, ExitNetwork):
        raise UserError(f"{name} holds no multi-exit network{_what(architecture)}")
    return network.freeze()


def _with_weights(
    kind: Callable[..., Built], name: str, asked: dict[str, Any], checkpoint: str | None, seed: int
) -> Built:
    """The network that was asked for (None: as the checkpoint says), with the checkpoint's weights."""
    given = {key: value for key, value in asked.items() if value is not None}
    if checkpoint is None:
        raise UserError(
            f"backbone.checkpoint is not set: {name} needs weights; give a file, one of {', '.join(shipped())}, or say "
            "backbone.checkpoint=random and train it"
        )
    if checkpoint == RANDOM:
        with seeded(seed):
            return kind(**given)
    found = read_architecture(checkpoint) or {}
    if found.get("network") != name:
        raise UserError(f"{checkpoint} holds no {name}{_what(found)}")
    _check_same(checkpoint, name, given, found)
    network: Built = rebuilt({**found, **given}, read_tensors(find(checkpoint)), checkpoint)  # type: ignore[assignment]
    return network


def _exits_over(
    backbone: Callable[[], Backbone],
    asked: dict[str, Any],
    exits: list[int | str],
    heads: str | list[str],
    image_shape: Shape,
    checkpoint: str | None,
    seed: int,
) -> ResNetExits:
    """Exits over the backbone, or the checkpoint's if it has them already and they are those that were asked for."""
    if not exits:
        raise UserError("backbone.exits is empty; name the blocks that an exit follows")
    found = _architecture_if_file(checkpoint)
    if checkpoint is None or found.get("network") != "resnet_exits":
        trunk = backbone()
        with seeded(seed):
            return ResNetExits(trunk, exits, heads, image_shape)
    given = {key: value for key, value in asked.items() if value is not None}
    if not isinstance(found.get("backbone"), dict):
        raise UserError(
            f"{checkpoint} is damaged or of another version: it does not say which network its exits are on"
        )
    _check_same(checkpoint, "ResNet", given, found["backbone"])
    architecture = {**found, "backbone": {**found["backbone"], **given}}
    network: ResNetExits = rebuilt(architecture, read_tensors(find(checkpoint)), checkpoint)  # type: ignore[assignment]
    places = find_blocks(network.backbone, exits)
    kinds = [heads] * len(places) if isinstance(heads, str) else list(heads)
    _check_same(checkpoint, network.name, dict(exits=places, heads=kinds, image_shape=image_shape), found)
    return network


def _architecture_if_file(checkpoint: str | None) -> dict[str, Any]:
    """What a file of ours says of itself; nothing if ``checkpoint`` is no such file."""
    try:
        find(checkpoint or RANDOM)
    except UserError:
        return {}
    return read_architecture(checkpoint or RANDOM) or {}


def _check_same(checkpoint: str, name: str, given: dict[str, Any], found: dict[str, Any]) -> None:
    """Refuse a checkpoint that was made with other arguments; the normalisation may be another."""
    for key, value in given.items():
        value, was = json.loads(json.dumps(value)), found.get(key)
        if key == "num_classes" and was != value:
            raise UserError(f"{checkpoint} has {was} classes, the data has {value}")
        if key not in ("mean", "std") and was != value:
            raise UserError(f"{checkpoint} holds a {name} of {key} {was}, not of {key} {value}")


def _what(architecture: dict[str, Any]) -> str:
    return f" but a {architecture.get('network', 'CIFAR ResNet')}" if architecture else ""
