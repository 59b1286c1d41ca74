"""What was learned, ready to use: ``policyskip.load("runs/x").predict(images)``.

Shapes: B images, K blocks, C classes, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policyskip.agents.base import Policy
from policyskip.agents.blockdrop import ConstantPolicy, PolicyNetwork
from policyskip.backbones import Backbone, Costs, cifar_resnet, count_costs, sparse, torchvision_resnet
from policyskip.errors import UserError
from policyskip.runs import open_run

POLICIES: dict[str, type[Policy]] = {"PolicyNetwork": PolicyNetwork, "ConstantPolicy": ConstantPolicy}
BACKBONES = {
    "policyskip.backbones.cifar_resnet": cifar_resnet,
    "policyskip.backbones.torchvision_resnet": torchvision_resnet,
}
VERSION = 1


@dataclass(frozen=True)
class Prediction:
    """For B images: ``label_B`` int64, ``logits_BC`` float, ``keep_BK`` bool (what ran), ``macs_B`` float64 (the
    policy's own cost included)."""

    label_B: Tensor
    logits_BC: Tensor
    keep_BK: Tensor
    macs_B: Tensor


class Predictor:
    """A policy in front of its network.

    Attributes:
        classes: their names.
        image_shape: (3, H, W) that it was trained on.
    """

    def __init__(
        self,
        policy: Policy,
        backbone: Backbone,
        classes: list[str],
        image_shape: tuple[int, int, int],
        policy_macs: float,
    ) -> None:
        self.policy = policy.eval()
        self.backbone = backbone.freeze()
        self.classes = classes
        self.image_shape = image_shape
        self.policy_macs = policy_macs
        self.costs: Costs = count_costs(backbone, image_shape)

    @torch.no_grad()
    def predict(self, images: Tensor | np.ndarray, batch_size: int = 256) -> Prediction:
        """Decide and classify; only the kept blocks are executed.

        Args:
            images: uint8 (B, 3, H, W), any B, 0 too.
            batch_size: images that are worked on at a time.

        Raises:
            UserError: another shape or dtype.
        """
        images = torch.as_tensor(images)
        if images.dim() != 4 or tuple(images.shape[1:]) != self.image_shape or images.dtype != torch.uint8:
            found = f"{str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
            raise UserError(f"images must be uint8 of shape (B, {', '.join(map(str, self.image_shape))}), got {found}")
        keep, logits = [], []
        for part in images.to(self.backbone.mean.device).split(batch_size):
            keep.append(self.policy.decide(part))
            logits.append(sparse(self.backbone, part, keep[-1]))
        keep_BK, logits_BC = torch.cat(keep), torch.cat(logits)
        return Prediction(logits_BC.argmax(1), logits_BC, keep_BK, self.costs.of(keep_BK) + self.policy_macs)


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


def load(run: str | Path, backbone: str | None = None, device: str = "cpu") -> Predictor:
    """Load what a run learned. Nothing in the folder is executed.

    Args:
        run: the run folder.
        backbone: where the network's weights are now, if they have moved since.

    Raises:
        UserError: no run folder, a damaged file, or network weights other than those the policy was trained with.
    """
    folder = open_run(str(run))
    content = folder.load_json("policy.json")
    try:
        policy = POLICIES[content["policy"]["name"]](**content["policy"]["arguments"])
        policy_macs, image_shape = float(content["policy"]["macs"]), tuple(content["image_shape"])
        config, expected = dict(content["backbone"]["config"]), content["backbone"]["hash"]
        classes = [str(name) for name in content["classes"]]
        build = BACKBONES[config.pop("_target_")]
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']}, not {VERSION}")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder.folder / 'policy.json'} is damaged or of another version: {error}") from error
    _load_weights(policy, folder.load_best(), folder.folder)
    if backbone is not None:
        config["checkpoint"] = backbone
    try:
        network: Backbone = build(num_classes=len(classes), **config)  # type: ignore[operator]
    except TypeError as error:
        raise UserError(f"{folder.folder / 'policy.json'} is damaged or of another version: {error}") from error
    if network.content_hash() != expected:
        raise UserError(
            f"the policy of {run} was trained with the network {expected}, "
            f"but {config['checkpoint']} is {network.content_hash()}"
        )
    network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Predictor(policy.to(device), network, classes, image_shape, policy_macs)


def _load_weights(policy: Policy, tensors: dict[str, Tensor], folder: Path) -> None:
    try:
        policy.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder / 'best.safetensors'} does not fit policy.json: {reason}") from error
