"""The functions that ``configs/backbone`` names to build multi-exit networks, with weights from files or shipped ones.

In every function, ``checkpoint`` is a file that :func:`policyskip.backbones.checkpoints.save` wrote, a shipped name, or
"random" (the weights of ``seed``, to be trained). Arguments that are None are taken from the checkpoint, or are the
network's defaults. Every function raises UserError if there is no such checkpoint, if it holds another network, or if
the arguments make no network.

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
    check_classes,
    check_memory,
    check_size,
    cifar_resnet,
    find,
    load_into,
    read_architecture,
    rebuilt,
    seeded,
    shipped,
    torchvision_resnet,
)
from policyskip.backbones.exits import ExitNetwork
from policyskip.backbones.msdnet import MSDNet, Prune, Stem, StepMode
from policyskip.backbones.msdnet_port import NORMALISATIONS, from_msdnet_port, is_msdnet_port
from policyskip.backbones.resnet import Shortcut
from policyskip.backbones.resnet_exits import ResNetExits, find_blocks
from policyskip.backbones.translation import but_a
from policyskip.backbones.weight_files import Weights, read_weights
from policyskip.errors import UserError
from policyskip.texts import one_line

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
    """Build an :class:`MSDNet`, also with a checkpoint of its common PyTorch port (see ``msdnet_port.py``).

    Image folders are scaled to ``image_size``; the network itself takes any size.
    """
    arguments = dict(
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
    weights = _weights_of_others(checkpoint)
    if weights is not None and is_msdnet_port(weights.tensors):
        network = _ported(weights, arguments, str(checkpoint))
    else:
        network = _with_weights(MSDNet, "msdnet", arguments, checkpoint, seed)
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
    """Build a :class:`BranchyLeNet` for images of shape (3, H, W)."""
    arguments = dict(num_classes=num_classes, image_shape=image_shape, channels=channels, mean=mean, std=std)
    return _with_weights(BranchyLeNet, "branchy_lenet", arguments, checkpoint, seed)


def branchy_alexnet(
    num_classes: int,
    image_shape: Shape,
    checkpoint: str | None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
) -> BranchyAlexNet:
    """Build a :class:`BranchyAlexNet` for images of shape (3, H, W)."""
    arguments = dict(num_classes=num_classes, image_shape=image_shape, mean=mean, std=std)
    return _with_weights(BranchyAlexNet, "branchy_alexnet", arguments, checkpoint, seed)


def branchy_resnet(
    num_classes: int,
    image_shape: Shape,
    depth: int,
    checkpoint: str | None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
) -> BranchyResNet:
    """Build a :class:`BranchyResNet` for images of shape (3, H, W)."""
    arguments = dict(num_classes=num_classes, image_shape=image_shape, depth=depth, mean=mean, std=std)
    return _with_weights(BranchyResNet, "branchy_resnet", arguments, checkpoint, seed)


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
    """Build :class:`ResNetExits` over a CIFAR ResNet. With a checkpoint of the ResNet alone (see
    :func:`cifar_resnet`), the exits' heads are random."""
    arguments = dict(depth=depth, num_classes=num_classes, shortcut=shortcut, width=width, mean=mean, std=std)
    return _exits_over(
        lambda: cifar_resnet(num_classes, depth, checkpoint, shortcut, width, mean, std, seed),
        *(arguments, exits, heads, image_shape, checkpoint, seed),
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
    """Build :class:`ResNetExits` over torchvision's ResNet. With a checkpoint of the ResNet alone (see
    :func:`torchvision_resnet`), the exits' heads are random. Image folders are scaled to ``image_size``."""
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
    architecture = read_architecture(name)
    kind = (architecture or {}).get("network")
    if architecture is None or not (is_users_own(architecture) or (isinstance(kind, str) and kind in EXIT_NETWORKS)):
        raise UserError(f"{name} holds no multi-exit network{_but_a(architecture, name)}")
    network = rebuilt(architecture, read_weights(find(name)).tensors, name, trusted)
    if not isinstance(network, ExitNetwork):
        raise UserError(f"{name} holds no multi-exit network{_but_a(architecture, name)}")
    return network.freeze()


def _with_weights(
    kind: Callable[..., Built], name: str, arguments: dict[str, Any], checkpoint: str | None, seed: int
) -> Built:
    """Build a network with a checkpoint's weights; arguments that are None are as the checkpoint says.

    Raises:
        UserError: no checkpoint is set, or it holds another network.
    """
    chosen = {key: value for key, value in arguments.items() if value is not None}
    if checkpoint is None:
        raise UserError(
            f"backbone.checkpoint is not set: {name} needs weights; give a file, one of {', '.join(shipped())}, or say "
            "backbone.checkpoint=random and train it"
        )
    if checkpoint == RANDOM:
        check_memory(lambda: kind(**chosen))
        with seeded(seed):
            return kind(**chosen)
    stored = read_architecture(checkpoint)
    if stored is None or stored.get("network") != name:
        raise UserError(f"{checkpoint} holds no {name}{_but_a(stored, checkpoint)}")
    _check_same(checkpoint, name, chosen, stored)
    tensors = read_weights(find(checkpoint)).tensors
    network: Built = rebuilt({**stored, **chosen}, tensors, checkpoint)  # type: ignore[assignment]
    return network


def _weights_of_others(checkpoint: str | None) -> Weights | None:
    """Read the weights in a file that others made; None for another checkpoint."""
    if checkpoint in (None, RANDOM) or read_architecture(checkpoint) is not None:
        return None
    return read_weights(find(checkpoint))


def _ported(weights: Weights, arguments: dict[str, Any], checkpoint: str) -> MSDNet:
    """Build an MSDNet with the weights of its PyTorch port.

    Raises:
        UserError: the weights are those of another MSDNet than the arguments say.
    """
    chosen = {key: value for key, value in arguments.items() if value is not None}
    num_classes = chosen["num_classes"]
    check_classes(checkpoint, (*weights.tensors["classifier.0.linear.weight"].shape, "no")[0], num_classes)
    check_size(lambda: MSDNet(**chosen), weights.tensors, checkpoint)
    network = MSDNet(**{**NORMALISATIONS.get(num_classes, {}), **chosen})
    found = from_msdnet_port(weights.tensors, network, checkpoint)
    load_into(network, found.tensors, checkpoint)
    network.remark, network.stated_accuracy = found.remark(checkpoint, chosen), weights.accuracy
    return network


def _exits_over(
    make_backbone: Callable[[], Backbone],
    arguments: dict[str, Any],
    exits: list[int | str],
    heads: str | list[str],
    image_shape: Shape,
    checkpoint: str | None,
    seed: int,
) -> ResNetExits:
    """Build exits over a ResNet: with random heads, or with those of a checkpoint that has the same exits.

    Args:
        make_backbone: makes the ResNet, if the checkpoint has no exits.
        arguments: of the ResNet; those that are None are as the checkpoint says.

    Raises:
        UserError: ``exits`` is empty, or the checkpoint does not fit.
    """
    if not exits:
        raise UserError("backbone.exits is empty; name the blocks that an exit follows")
    stored = _architecture_if_file(checkpoint)
    if checkpoint is None or stored.get("network") != "resnet_exits":
        backbone = make_backbone()
        with seeded(seed):
            return ResNetExits(backbone, exits, heads, image_shape)
    chosen = {key: value for key, value in arguments.items() if value is not None}
    if not isinstance(stored.get("backbone"), dict):
        raise UserError(
            f"{checkpoint} is damaged or of another version: it does not say which network its exits are on"
        )
    _check_same(checkpoint, "ResNet", chosen, stored["backbone"])
    architecture = {**stored, "backbone": {**stored["backbone"], **chosen}}
    network: ResNetExits = rebuilt(architecture, read_weights(find(checkpoint)).tensors, checkpoint)  # type: ignore[assignment]
    blocks = find_blocks(network.backbone, exits)
    kinds = [heads] * len(blocks) if isinstance(heads, str) else list(heads)
    _check_same(checkpoint, network.name, dict(exits=blocks, heads=kinds, image_shape=image_shape), stored)
    return network


def _architecture_if_file(checkpoint: str | None) -> dict[str, Any]:
    """Read the architecture in a file of the package's own; it is empty if ``checkpoint`` is no such file."""
    try:
        find(checkpoint or RANDOM)
    except UserError:
        return {}
    return read_architecture(checkpoint or RANDOM) or {}


def _check_same(checkpoint: str, name: str, chosen: dict[str, Any], stored: dict[str, Any]) -> None:
    """Refuse a checkpoint that was made with other arguments than the chosen ones; the normalisation may differ.

    Raises:
        UserError: says the argument, and both of its values.
    """
    for key, value in chosen.items():
        value, stored_value = json.loads(json.dumps(value)), stored.get(key)
        if key == "num_classes" and stored_value != value:
            raise UserError(f"{checkpoint} has {one_line(stored_value, 40)} classes, the data has {value}")
        if key not in ("mean", "std") and stored_value != value:
            raise UserError(f"{checkpoint} holds a {name} of {key} {one_line(stored_value)}, not of {key} {value}")


def _but_a(architecture: dict[str, Any] | None, checkpoint: str) -> str:
    """Return the end of a message, which says what network a file holds, as it says itself or as its tensors show."""
    if architecture is not None:
        return f" but a {one_line(architecture.get('network', 'CIFAR ResNet'), 80)}"
    return f" {but_a(read_weights(find(checkpoint)).tensors)}"
