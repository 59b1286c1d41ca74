"""``policy.json``: what it holds for each family, how it is read, and ``policyskip.load``.

Shapes: B images, K blocks, C classes, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from policyskip.backbones import (
    Backbone,
    checkpoints,
    cifar_resnet,
    load_exits,
    torchvision_resnet,
)
from policyskip.backbones.gated import GatedNetwork
from policyskip.deployment.predictors import (
    PRECISIONS,
    VERSION,
    ExitPredictor,
    GatedPredictor,
    Predictor,
    ThresholdPredictor,
)
from policyskip.deployment.profiling import device_name
from policyskip.errors import UserError
from policyskip.exits.rules import check_thresholds
from policyskip.files import damaged
from policyskip.finite import find_nonfinite
from policyskip.memory import keep_freed_memory
from policyskip.policies.base import Policy
from policyskip.policies.fixed import FixedPolicy, OraclePolicy, RandomPolicy
from policyskip.policies.networks import ConstantPolicy, PolicyNetwork
from policyskip.policies.perceptrons import BlockPolicy, ExitPolicy, LookPolicy
from policyskip.policies.thresholds import ThresholdPolicy
from policyskip.runs.folder import Run, open_run

POLICIES: dict[str, type[Policy]] = {
    policy.__name__: policy
    for policy in (PolicyNetwork, ConstantPolicy, FixedPolicy, RandomPolicy, OraclePolicy, LookPolicy, BlockPolicy)
}


BACKBONES = {
    "policyskip.backbones.cifar_resnet": cifar_resnet,
    "policyskip.backbones.torchvision_resnet": torchvision_resnet,
}


Built = TypeVar("Built", bound=Policy)


def of_data(content: dict[str, Any]) -> tuple[list[str], tuple[int, int, int]]:
    """Classes and image shape of what ``policy.json`` holds.

    Raises:
        KeyError, TypeError, ValueError: it is of another version, or damaged.
    """
    classes, image_shape = [str(name) for name in content["classes"]], tuple(map(int, content["image_shape"]))
    if content["version"] != VERSION or len(image_shape) != 3:
        raise ValueError(f"version {content['version']}, image shape {image_shape}")
    return classes, image_shape


def load_exits_run(run: Run, device: str | torch.device = "cpu") -> ThresholdPredictor:
    """What a run that leaves early by thresholds has learned.

    Raises:
        UserError: a damaged file, or weights other than those that the thresholds were chosen for.
    """
    content = run.load_json("policy.json")
    if "leaves" in content:
        raise UserError(f"the run {run.folder} leaves early by a learned policy; it has no thresholds")
    if "policy" in content or "gates" in content:
        raise UserError(f"the run {run.folder} skips blocks; it has no exits")
    try:
        rule, search = str(content["exits"]["rule"]), str(content["exits"]["search"])
        thresholds = [float(t) for t in content["exits"]["thresholds"]]
        classes, image_shape = of_data(content)
        expected = content["network"]["hash"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{run.folder / 'policy.json'} is damaged or of another version: {error}") from error
    network = load_exits(str(run.folder / "network.safetensors"))
    check_thresholds(thresholds, network.num_exits)
    if network.content_hash() != expected:
        raise UserError(f"the thresholds of {run.folder} were chosen for another network than its network.safetensors")
    network = network.to(device)
    return ThresholdPredictor(ThresholdPolicy(rule, thresholds).to(device), search, network, classes, image_shape)


def describe(
    policy: Policy,
    backbone: Backbone,
    backbone_config: dict[str, Any],
    classes: tuple[str, ...],
    image_shape: tuple[int, ...],
    policy_macs: float,
) -> dict[str, Any]:
    """The content of ``policy.json``: all that :func:`load` needs beside the policy's weights."""
    config = dict(backbone_config)
    if config.get("checkpoint") and Path(config["checkpoint"]).is_file():
        config["checkpoint"] = str(Path(config["checkpoint"]).resolve())
    return {
        "version": VERSION,
        "policy": {"name": type(policy).__name__, "arguments": policy.spec(), "macs": policy_macs},
        "backbone": {"config": config, "hash": backbone.content_hash()},
        "classes": list(classes),
        "image_shape": list(image_shape),
    }


def load(
    run: str | Path,
    backbone: str | None = None,
    device: str = "cpu",
    precision: str = "float32",
    planned: bool = True,
) -> Predictor | ExitPredictor | GatedPredictor:
    """Load what a run learned: a :class:`Predictor`, an :class:`ExitPredictor` or a
    :class:`~policyskip.deployment_gates.GatedPredictor`. Nothing in the folder is executed.

    Args:
        run: the run folder.
        backbone: where the network's weights are now, if they have moved since.
        precision: "float32", or "bfloat16" or "float16" for the network; a policy in front of it stays as it is.
            Decisions and answers can then differ from those that the run was judged by; see docs/speed.md.
        planned: go by what ``policyskip profile run=…`` found, if it was here: a block that nearly all images of a
            batch keep is then computed for all. Otherwise none is computed for an image that skips it.

    From then on the process keeps freed memory (``memory.py``).

    Raises:
        UserError: no run folder, a damaged file, another precision, or network weights other than those the policy was
            trained with.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"there is no device {device} here: {reason}") from error
    keep_freed_memory()
    opened = open_run(str(run))
    content = opened.load_json("policy.json")
    if backbone is not None and not {"exits", "leaves", "gates"}.isdisjoint(content):
        raise UserError(f"the run {run} brings its own network, network.safetensors; backbone={backbone} has no effect")
    with damaged(opened.folder / "policy.json"):
        predictor = _load(opened, content, backbone, device, planned)
    network = predictor.backbone if isinstance(predictor, Predictor) else predictor.network
    network.to(PRECISIONS[precision])
    if isinstance(predictor, Predictor) and precision != "float32":
        predictor.plan = {}  # it was measured in float32
    return predictor


def _load(
    run: Run, content: dict[str, Any], backbone: str | None, device: str, planned: bool
) -> Predictor | ExitPredictor | GatedPredictor:
    """:func:`load` for the content of ``policy.json``."""
    if "exits" in content:
        return load_exits_run(run, device)
    if "leaves" in content:
        from policyskip.deployment.policy_files import load_leaving_run

        return load_leaving_run(run, device)
    if "gates" in content:
        from policyskip.deployment.policy_files import load_gated_run

        return load_gated_run(run, device)
    try:
        policy = policy_of(POLICIES[content["policy"]["name"]], content["policy"]["arguments"], run)
        policy_macs, (classes, image_shape) = float(content["policy"]["macs"]), of_data(content)
        config, expected = dict(content["backbone"]["config"]), content["backbone"]["hash"]
        build = BACKBONES[config.pop("_target_")]
    except UserError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{run.folder / 'policy.json'} is damaged or of another version: {error}") from error
    if isinstance(policy, OraclePolicy):
        raise UserError(
            f"the run {run.folder} is an oracle's, which sees the label: there is nothing to load for other images"
        )
    load_weights(policy, run)
    if backbone is not None:
        config["checkpoint"] = backbone
    try:
        network: Backbone = build(num_classes=len(classes), **config)  # type: ignore[operator]
    except TypeError as error:
        raise UserError(f"{run.folder / 'policy.json'} is damaged or of another version: {error}") from error
    if network.content_hash() != expected:
        raise UserError(
            f"the policy of {run.folder} was trained with the network {expected}, "
            f"but {config['checkpoint']} is {network.content_hash()}"
        )
    network = network.to(device)
    predictor = Predictor(policy.to(device), network, classes, image_shape, policy_macs)
    predictor.plan = _plan(run, expected, network) if planned else {}
    return predictor


def _plan(run: Run, network_hash: str, network: Backbone) -> dict[int, list[float]]:
    """What ``policyskip profile run=…`` found, if it was for this network on this kind of device; otherwise nothing."""
    if not (run.folder / "profile.json").is_file():
        return {}
    content = run.load_json("profile.json")
    try:
        here = (network_hash, device_name(network.mean.device), torch.get_num_threads())
        if (content["hash"], content["device"], content["threads"]) != here:
            return {}
        plan = {
            int(size): [float(share) for share in times["break_even"]] for size, times in content["batches"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{run.folder / 'profile.json'} is damaged; `policyskip profile run=` makes it anew") from error
    return {size: shares for size, shares in plan.items() if len(shares) == network.num_blocks}


def policy_of(kind: Callable[..., Built], arguments: dict[str, Any], run: Run) -> Built:
    """A policy that is built again, its weights not yet those of the run.

    Raises:
        UserError: it would be larger than the run's weights, for which no memory is then taken.
    """
    with torch.device("meta"):
        needed = sum(value.numel() for value in kind(**arguments).state_dict().values())
    given = sum(value.numel() for value in run.load_best().values())
    if needed != given:
        raise UserError(
            f"{run.folder / 'best.safetensors'} does not fit policy.json: it holds {given} numbers, not {needed}"
        )
    return kind(**arguments)


def load_weights(policy: nn.Module, run: Run, described: str = "policy.json") -> None:
    """Put a run's best weights into a policy that was built as ``described``."""
    tensors, path = run.load_best(), run.folder / "best.safetensors"
    if (place := find_nonfinite(tensors)) is not None:
        raise UserError(f"{path} cannot be used: {place} holds numbers that are not finite")
    try:
        policy.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit {described}: {' '.join(str(error).split())[:200]}") from error


def describe_gates(network: GatedNetwork, classes: tuple[str, ...], image_shape: tuple[int, ...]) -> dict[str, Any]:
    """The content of ``policy.json`` where gates decide; the backbone travels along as ``network.safetensors``, and the
    gates are in ``best.safetensors``."""
    return {
        "version": VERSION,
        "gates": {"kind": network.gate, "macs": network.gate_macs},
        "network": {"hash": network.content_hash()},
        "classes": list(classes),
        "image_shape": list(image_shape),
    }


def load_gated_run(run: Run, device: str | torch.device = "cpu") -> GatedPredictor:
    """What a run with gates has learned. Nothing in the folder is executed.

    Raises:
        UserError: a damaged file, or weights other than those that were trained together.
    """
    content = run.load_json("policy.json")
    try:
        kind, expected = str(content["gates"]["kind"]), content["network"]["hash"]
        classes, image_shape = of_data(content)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{run.folder / 'policy.json'} is damaged or of another version: {error}") from error
    try:
        network = GatedNetwork(checkpoints.load(str(run.folder / "network.safetensors")), kind, image_shape)
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{run.folder / 'network.safetensors'} is damaged or not ours: {error}") from error
    gates = {name.removeprefix("gates."): t for name, t in run.load_best().items() if name.startswith("gates.")}
    try:
        network.gates.load_state_dict(gates)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{run.folder / 'best.safetensors'} does not fit policy.json: {reason}") from error
    if network.content_hash() != expected:
        raise UserError(f"the gates of {run.folder} were trained with another network than its network.safetensors")
    network = network.to(device)
    return GatedPredictor(network, classes, image_shape)


def describe_leaving(predictor: ExitPredictor) -> dict[str, Any]:
    """The content of ``policy.json``; the network travels along as ``network.safetensors``, and the weights of the
    policy are in ``best.safetensors``."""
    return {
        "version": VERSION,
        "leaves": {"arguments": predictor.policy.spec(), "macs": predictor.decision_macs},
        "network": {"hash": predictor.network_hash},
        "classes": predictor.classes,
        "image_shape": list(predictor.image_shape),
    }


def load_leaving_run(run: Run, device: str | torch.device = "cpu") -> ExitPredictor:
    """What a run has learned about leaving early. Nothing in the folder is executed.

    Raises:
        UserError: a damaged file, or a network other than the one that the policy was trained with.
    """
    content = run.load_json("policy.json")
    try:
        policy = policy_of(ExitPolicy, content["leaves"]["arguments"], run)
        decision_macs = float(content["leaves"]["macs"])
        classes, image_shape = of_data(content)
        expected = content["network"]["hash"]
    except UserError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{run.folder / 'policy.json'} is damaged or of another version: {error}") from error
    load_weights(policy, run)
    network = load_exits(str(run.folder / "network.safetensors"))
    if network.content_hash() != expected:
        raise UserError(f"the policy of {run.folder} was trained with another network than its network.safetensors")
    network = network.to(device)
    return ExitPredictor(policy.to(device), network, classes, image_shape, decision_macs)
