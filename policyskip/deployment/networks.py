"""The network that a run's policy was trained with is built again here, from its folder or from where it is now."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from policyskip import registry
from policyskip.backbones import Backbone, Network, checkpoints, cifar_resnet, load_exits, torchvision_resnet
from policyskip.backbones.gated import GatedNetwork
from policyskip.deployment.policy_files import Family, PolicyFile, damaged_policy
from policyskip.deployment.policy_schema import check_arguments
from policyskip.errors import UserError, in_one_line, named
from policyskip.files import damaged
from policyskip.finite import find_nonfinite
from policyskip.runs.folder import Run

OWN_BACKBONES = {f"policyskip.backbones.{make.__name__}": make for make in (cifar_resnet, torchvision_resnet)}
"""The package's own networks, by the names that ``policy.json`` has for them."""

OTHER_NETWORK: dict[Family, str] = {
    "gates": "the gates of {} were trained with",
    "thresholds": "the thresholds of {} were chosen for",
    "exit_policy": "the policy of {} was trained with",
}
"""The beginning of the message that a run's network is not the one that its policy goes with."""


def network_of(run: Run, file: PolicyFile, trust: bool) -> Network:
    """Build the network that a policy was trained with.

    Raises:
        UserError: the weights in the file are not those that the policy was trained with.
    """
    path = str(run.path("network.safetensors"))
    if file.family == "blocks":
        return _external_network(run, file)
    if file.family == "gates":
        backbone = checkpoints.load(path, trust)
        with damaged(run.folder / "network.safetensors"):
            network: Network = GatedNetwork(backbone, str(file.policy["kind"]), file.image_shape)
        gates = {name.removeprefix("gates."): t for name, t in run.load_best().items() if name.startswith("gates.")}
        load_state(network.gates, gates, run, "policy.json")  # type: ignore[arg-type]
    else:
        network = load_exits(path, trust)
    if network.content_hash() != file.network["hash"]:
        raise UserError(f"{OTHER_NETWORK[file.family].format(run.folder)} another network than its network.safetensors")
    return network


def _external_network(run: Run, file: PolicyFile) -> Backbone:
    """Build a network that the run folder names but does not hold.

    Raises:
        UserError: the name is none of a network with blocks, or the network is another than the run's.
    """
    config = dict(file.network["config"])
    target = str(config.pop("_target_"))
    make = OWN_BACKBONES.get(target)
    if make is None and registry.is_own(target):  # the package has other functions, which are not for a file to call
        raise ValueError(f"{target} is no network with blocks")
    if make is not None:
        check_arguments(make, config)
    make = make or registry.resolve("backbone", target)
    parameters, seed = inspect.signature(make).parameters, int(file.network.get("seed", 0))
    known = {"num_classes": len(file.classes), "image_shape": file.image_shape, "seed": seed}
    try:
        with checkpoints.seeded(seed):  # as build_backbone draws the random weights of a user's network
            network = built(run, target, make, {k: v for k, v in known.items() if k in parameters} | config)
    except UserError as error:
        if not _is_gone(config.get("checkpoint")):
            raise
        hint = f"policyskip.load({str(run.folder)!r}, backbone=FILE)"
        raise UserError(f"{error}; if the network's weights have moved, say where they are: {hint}") from error
    if not isinstance(network, Backbone):
        raise UserError(f"{target} of {run.folder / 'policy.json'} gives no network with blocks")
    if network.content_hash() != file.network["hash"]:
        raise UserError(
            f"the policy of {run.folder} was trained with the network {file.network['hash']}, "
            f"but {config.get('checkpoint', target)} is {network.content_hash()}"
        )
    return network


def _is_gone(checkpoint: Any) -> bool:
    """Return whether a network's weights are named, and there is neither a file nor a shipped network of that name."""
    if not isinstance(checkpoint, str) or checkpoint == checkpoints.RANDOM:
        return False
    try:
        checkpoints.find(checkpoint)
    except UserError:
        return True
    return False


def built(run: Run, name: str, make: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Call what ``policy.json`` names. Errors of the user's own code are reported as such, and not as damage.

    Raises:
        UserError: the call failed.
    """
    try:
        return make(**arguments)
    except UserError:
        raise
    except Exception as error:
        if registry.is_own(make.__module__):
            raise damaged_policy(run, error) from error
        raise UserError(f"{name} failed with {named(error, 1000)}") from error


def load_state(
    module: nn.Module, tensors: dict[str, torch.Tensor], run: Run, described: str, file: str = "best.safetensors"
) -> None:
    """Put some of a run's best weights, which come from a file of it, into a module that was built as ``described``.

    Raises:
        UserError: the weights are not finite, or belong to another module.
    """
    path = run.folder / file
    if (name := find_nonfinite(tensors)) is not None:
        raise UserError(f"{path} cannot be used: {name} holds numbers that are not finite")
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit {described}: {in_one_line(error)}") from error
