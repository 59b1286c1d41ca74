"""Networks are built again from a file's ``architecture``: the package's own by name, others by their dotted path."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

import torch

from policyskip import registry
from policyskip.backbones.base import Backbone, Network
from policyskip.backbones.branchynet import BranchyAlexNet, BranchyLeNet, BranchyResNet
from policyskip.backbones.exits import ExitNetwork
from policyskip.backbones.msdnet import MSDNet
from policyskip.backbones.resnet import CifarResNet, TorchvisionResNet
from policyskip.backbones.resnet_exits import ResNetExits
from policyskip.errors import UserError
from policyskip.texts import a_type

RANDOM = "random"
"""The checkpoint that is none: random weights, for trying things out."""


def resnet_exits(backbone: dict[str, Any], **arguments: Any) -> ResNetExits:
    """Build :class:`ResNetExits` from its ``architecture``, which holds that of the network below."""
    return ResNetExits(BACKBONES[backbone.get("network")](**_arguments(backbone)), **arguments)


BACKBONES: dict[str | None, Callable[..., Backbone]] = {
    None: CifarResNet,
    "torchvision_resnet": TorchvisionResNet,
}
EXIT_NETWORKS: dict[str | None, Callable[..., ExitNetwork]] = {
    "msdnet": MSDNet,
    "branchy_lenet": BranchyLeNet,
    "branchy_alexnet": BranchyAlexNet,
    "branchy_resnet": BranchyResNet,
    "resnet_exits": resnet_exits,
}
"""The package's own networks by the key "network" of their ``architecture``, which a CIFAR ResNet's has not."""


def is_users_own(architecture: dict[str, Any]) -> bool:
    """Return whether an ``architecture`` names, by its dotted path, a network that is not the package's."""
    name = architecture.get("network")
    return isinstance(name, str) and "." in name


def build_again(architecture: dict[str, Any], trusted: bool | None = None) -> Network:
    """Build the network that an ``architecture`` describes; its weights are still to be loaded.

    Args:
        architecture: the name of the network under "network", and the arguments that build it.
        trusted: whether a network that is neither the package's own nor installed may be imported; see
            :func:`policyskip.registry.resolve`.

    Raises:
        UserError: the network is not installed here, or what it names makes no network.
        KeyError, TypeError: the package has no network of that name, or it takes other arguments.
    """
    name, arguments = architecture.get("network"), _arguments(architecture)
    if not is_users_own(architecture):
        own: dict[str | None, Callable[..., Network]] = {**BACKBONES, **EXIT_NETWORKS}
        return own[name](**arguments)
    kept_exits = arguments.pop("kept_exits", None)
    network = registry.resolve("backbone", str(name), trusted)(**arguments)
    if not isinstance(network, Backbone | ExitNetwork):
        raise UserError(f"{name} gave {a_type(network)}; it must be a Backbone or an ExitNetwork")
    return network if kept_exits is None else network.only(kept_exits)  # type: ignore[operator]


def record_architecture(network: Network, path: str, target: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Note in a network's ``architecture`` the call that made it, unless what stands there builds it again already.

    A function of the user's may return one of the package's own networks, whose ``architecture`` is right, or a class
    derived from one, whose ``architecture`` is the base class's.

    Args:
        path: the dotted path of ``target``.
        target: the user's class or function that made the network.
        arguments: what it was called with. Only what JSON can hold is noted; weights come from the file.
    """
    if _builds_again(network):
        return
    noted = {key: json.loads(json.dumps(value)) for key, value in arguments.items() if _is_plain(value)}
    if "checkpoint" in inspect.signature(target).parameters:
        noted["checkpoint"] = RANDOM
    network.architecture = {**noted, "network": path}


def _builds_again(network: Network) -> bool:
    """Return whether a network's ``architecture`` builds the same modules and tensors."""
    try:
        with torch.device("meta"):
            other = build_again(network.architecture)
    except Exception:  # of networks that look at numbers while they are made, too
        return False
    kinds, shapes = (
        [[(name, type(module)) for name, module in n.named_modules()] for n in (network, other)],
        [{name: value.shape for name, value in n.state_dict().items()} for n in (network, other)],
    )
    return kinds[0] == kinds[1] and shapes[0] == shapes[1]


def _arguments(architecture: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments in an ``architecture``, without the network's name."""
    return {key: value for key, value in architecture.items() if key != "network"}


def _is_plain(value: Any) -> bool:
    """Return whether JSON can hold a value."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
