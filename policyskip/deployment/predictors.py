"""Predictors: a learned policy and its network, ready to use on new images.

Shapes: B images, K blocks, N exits, C classes, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policyskip.backbones import (
    Backbone,
    Costs,
    ExitCosts,
    ExitNetwork,
    count_costs,
    count_exit_costs,
    run_until,
)
from policyskip.backbones.folding import folded
from policyskip.backbones.gated import GatedNetwork
from policyskip.errors import UserError
from policyskip.exits.rules import decisions_at
from policyskip.memory import BatchSplitter
from policyskip.policies.base import Policy
from policyskip.policies.perceptrons import ExitPolicy
from policyskip.policies.thresholds import ThresholdPolicy

VERSION = 1
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Prediction:
    """For B images: ``label_B`` int64, ``logits_BC`` float, ``keep_BK`` bool (the blocks that each keeps), ``macs_B``
    float64 (what they cost, and the policy)."""

    label_B: Tensor
    logits_BC: Tensor
    keep_BK: Tensor
    macs_B: Tensor


class Predictor:
    """A policy in front of its network.

    Attributes:
        policy, backbone: what is executed, copies with batch normalisation folded into the convolutions.
        plan: by batch size, for each block the share of a batch above which it is computed for all (``profiling.py``);
            empty: only images that keep a block are computed in it.
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
        self.policy = folded(policy)
        self.backbone = folded(backbone).freeze()
        self.classes = classes
        self.image_shape = image_shape
        self.policy_macs = policy_macs
        self.costs: Costs = count_costs(self.backbone, image_shape)
        self.plan: dict[int, list[float]] = {}
        self.splitter = BatchSplitter()

    @torch.no_grad()
    def predict(self, images: Tensor | np.ndarray, batch_size: int = 256) -> Prediction:
        """Decide and classify; only the kept blocks are executed, and what ``plan`` says beyond them.

        Args:
            images: uint8 (B, 3, H, W), any B, 0 too.
            batch_size: images that are worked on at a time.

        Raises:
            UserError: another shape or dtype.
        """
        images = checked(images, self.image_shape)
        images = images.to(self.backbone.mean.device)
        runs = self.splitter(lambda of: self._run(images[of]), len(images), batch_size)
        logits_BC, keep_BK = (torch.cat(column) for column in zip(*runs, strict=True))
        return Prediction(logits_BC.argmax(1), logits_BC.float(), keep_BK, self.costs.of(keep_BK) + self.policy_macs)

    def _run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.policy.run(self.backbone, images, self.plan_for(len(images)))

    def plan_for(self, batch: int) -> list[float] | None:
        """The plan of the nearest batch size that was measured; None without a plan."""
        return self.plan[min(self.plan, key=lambda size: abs(size - batch))] if self.plan else None


@dataclass(frozen=True)
class ExitPrediction:
    """For B images: ``label_B`` int64, ``logits_BC`` float, ``exit_B`` int64 (where each left, from 0), ``macs_B``
    float64 (every head, and every decision, on the way included)."""

    label_B: Tensor
    logits_BC: Tensor
    exit_B: Tensor
    macs_B: Tensor


class ExitPredictor:
    """A network that really stops: images that left are computed no further.

    Args:
        policy: says at every exit which images leave.
        network: left as it is; what is executed is a copy with batch normalisation folded into the convolutions.
        classes: their names.
        image_shape: (3, H, W) that it was trained on.
        decision_macs: what deciding costs at one exit.

    Attributes:
        network: the copy.
        network_hash: content hash of the network that was given.
    """

    def __init__(
        self,
        policy: ThresholdPolicy | ExitPolicy,
        network: ExitNetwork,
        classes: Sequence[str],
        image_shape: tuple[int, int, int],
        decision_macs: float = 0.0,
    ) -> None:
        self.policy: Any = policy.eval()
        self.network_hash, self.decision_macs = network.content_hash(), decision_macs
        self.network = folded(network).freeze()
        self.classes, self.image_shape = list(classes), image_shape
        self.costs: ExitCosts = count_exit_costs(self.network, image_shape)
        self.splitter = BatchSplitter()
        N = self.network.num_exits
        decisions_N = decisions_at(torch.arange(N), N)
        self.macs_N = (self.costs.cumulative_N + decision_macs * decisions_N).to(self.network.mean.device)

    @torch.no_grad()
    def predict(self, images: Tensor | np.ndarray, batch_size: int = 256) -> ExitPrediction:
        """Classify each image at the exit where the policy lets it leave.

        Args:
            images: uint8 (B, 3, H, W), any B, 0 too.
            batch_size: images that are worked on at a time.

        Raises:
            UserError: another shape or dtype.
        """
        images = checked(images, self.image_shape)
        images = images.to(self.network.mean.device)
        parts = self.splitter(
            lambda of: run_until(self.network, images[of], self.policy.leave), len(images), batch_size
        )
        logits_BC, exit_B = (torch.cat(column) for column in zip(*parts, strict=True))
        return ExitPrediction(logits_BC.argmax(1), logits_BC.float(), exit_B, self.macs_N[exit_B])


class ThresholdPredictor(ExitPredictor):
    """An :class:`ExitPredictor` that decides by a threshold at each exit; ``search`` is how they were searched."""

    policy: ThresholdPolicy

    def __init__(self, policy: ThresholdPolicy, search: str, *network_and_data: Any) -> None:
        super().__init__(policy, *network_and_data)
        self.search = search

    def describe(self) -> dict[str, Any]:
        """The content of ``policy.json``; the network travels along as ``network.safetensors``."""
        return {
            "version": VERSION,
            "exits": {
                "rule": self.policy.rule.name,
                "search": self.search,
                "thresholds": as_text(self.policy.threshold_E.tolist()),
            },
            "network": {"hash": self.network_hash},
            "classes": self.classes,
            "image_shape": list(self.image_shape),
        }


def checked(images: Tensor | np.ndarray, image_shape: tuple[int, int, int]) -> Tensor:
    """The images as a tensor, uint8 (B, 3, H, W); UserError if they are not of that dtype and ``image_shape``."""
    try:
        if isinstance(images, np.ndarray):
            images = np.ascontiguousarray(images)  # such as mirrored ones, which torch does not take
        images = torch.as_tensor(images)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"images cannot be read as numbers: {' '.join(str(error).split())[:200]}") from error
    if images.dim() != 4 or tuple(images.shape[1:]) != image_shape or images.dtype != torch.uint8:
        found = f"{str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
        raise UserError(f"images must be uint8 of shape (B, {', '.join(map(str, image_shape))}), got {found}")
    return images


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
        self.splitter = BatchSplitter()

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
        runs = self.splitter(lambda of: self.network.greedy(images[of]), len(images), batch_size)
        logits_BC, keep_BK = (torch.cat(column) for column in zip(*((r.logits_BC, r.keep_BK) for r in runs)))
        macs_B = self.costs.of(keep_BK) + self.network.gate_macs
        return Prediction(logits_BC.argmax(1), logits_BC.float(), keep_BK, macs_B)


def as_text(thresholds: Sequence[float]) -> list[str]:
    """Thresholds for a JSON file, which has no infinity; ``float`` reads them back to the bit."""
    return [repr(threshold) for threshold in thresholds]
