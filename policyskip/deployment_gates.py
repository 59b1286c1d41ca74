"""A run with gates, ready to use: what :func:`policyskip.load` gives for SkipNet.

Shapes: B images, K blocks, C classes, H W pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from policyskip.backbones import checkpoints, count_costs
from policyskip.backbones.folding import folded
from policyskip.backbones.gated import GatedNetwork
from policyskip.deployment import VERSION, Prediction, checked, of_data
from policyskip.errors import UserError
from policyskip.parts import Parts
from policyskip.runs import Run


class GatedPredictor:
    """A network whose gates decide on the way which of its blocks run.

    Attributes:
        network: backbone and gates, a copy with batch normalisation folded into the convolutions.
        classes: their names.
        image_shape: (3, H, W) that it was trained on.
    """

    def __init__(self, network: GatedNetwork, classes: list[str], image_shape: tuple[int, int, int]) -> None:
        self.network = folded(network).freeze()
        self.classes, self.image_shape = classes, image_shape
        self.costs = count_costs(self.network.backbone, image_shape)
        self.parts = Parts()

    @torch.no_grad()
    def predict(self, images: Tensor | np.ndarray, batch_size: int = 256) -> Prediction:
        """Decide and classify; only the blocks that a gate lets run are computed, and ``macs_B`` includes the gates.

        Args:
            images: uint8 (B, 3, H, W), any B, 0 too.
            batch_size: images that are worked on at a time.

        Raises:
            UserError: another shape or dtype.
        """
        images = checked(images, self.image_shape)
        images = images.to(self.network.mean.device)
        runs = self.parts(lambda of: self.network.greedy(images[of]), len(images), batch_size)
        logits_BC, keep_BK = (torch.cat(column) for column in zip(*((r.logits_BC, r.keep_BK) for r in runs)))
        macs_B = self.costs.of(keep_BK) + self.network.gate_macs
        return Prediction(logits_BC.argmax(1), logits_BC.float(), keep_BK, macs_B)


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
