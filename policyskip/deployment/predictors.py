"""Predictors hold a learned policy and its network, ready to use on new images.

Shapes: B images, K blocks, N exits, C classes, H W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from policyskip.backbones import Backbone, Costs, ExitCosts, ExitNetwork, count_costs, count_exit_costs
from policyskip.backbones.folding import folded
from policyskip.backbones.gated import GatedNetwork
from policyskip.backbones.resnet_exits import ResNetExits
from policyskip.errors import UserError
from policyskip.execution.exits import ExitExecution
from policyskip.execution.gates import GateExecution
from policyskip.execution.ways import DEFAULT, Execution, How, NetworkExecution
from policyskip.exits.rules import RULES, decisions_at
from policyskip.finite import described, plain_tensor
from policyskip.memory import BatchSplitter
from policyskip.parallel.devices import device_named, usual_defaults
from policyskip.policies.base import Policy, taken_by
from policyskip.policies.perceptrons import ExitPolicy
from policyskip.policies.thresholds import ThresholdPolicy


@dataclass(frozen=True)
class Prediction:
    """Holds the answers for B images, and the blocks that were kept for them.

    Attributes:
        label_B: int64 (B,), the class that was answered.
        logits_BC: float32 (B, C).
        keep_BK: bool (B, K), the blocks that each image keeps.
        macs_B: float64 (B,), what they cost, the policy or the gates included.
    """

    label_B: Tensor
    logits_BC: Tensor
    keep_BK: Tensor
    macs_B: Tensor


@dataclass(frozen=True)
class ExitPrediction:
    """Holds the answers for B images, and the exits at which the images left.

    Attributes:
        label_B: int64 (B,), the class that was answered.
        logits_BC: float32 (B, C), of the exit where the image left.
        exit_B: int64 (B,), that exit, counted from 0.
        macs_B: float64 (B,), what leaving there cost, every head and every decision on the way included.
    """

    label_B: Tensor
    logits_BC: Tensor
    exit_B: Tensor
    macs_B: Tensor


class BasePredictor(ABC):
    """Checks images, answers them batch by batch, and says what the answers cost.

    Args:
        network: left as it is; the predictor executes a copy with batch normalisation folded into the convolutions.
        classes: their names.
        image_shape: (3, H, W) that the network was trained on.
        how: in which way and precision the network is executed.

    Attributes:
        execution: executes that copy, and says in which way.

    Raises:
        UserError: the network cannot be executed so.
    """

    executes: ClassVar[type[NetworkExecution]]
    """The class of :attr:`execution`."""

    def __init__(
        self, network: Any, classes: Sequence[str], image_shape: tuple[int, int, int], how: How = DEFAULT
    ) -> None:
        self.execution: Any = self.executes(network, image_shape, *how)
        self.classes, self.image_shape = list(classes), image_shape
        self.splitter = BatchSplitter()

    @property
    def network(self) -> Any:
        """Return the copy that is executed: a Backbone, a GatedNetwork or an ExitNetwork."""
        return self.execution.network

    @property
    def network_to_measure(self) -> Backbone | ExitNetwork:
        """Return the network whose blocks or exits ``policyskip profile`` measures."""
        return self.network

    @abstractmethod
    def ran(self, prediction: Any) -> Tensor:
        """Return which blocks (or segments) ran for a prediction's images, bool (B, K)."""

    def to(self, device: str | torch.device) -> Self:
        """Move the predictor to ``auto``, ``cpu``, ``cuda`` or ``cuda:N``, and return it.

        Raises:
            UserError: there is no such device.
        """
        where = device_named(str(device))
        self.execution.to(where)
        for part in self._parts():
            part.to(where)
        self.splitter = BatchSplitter()
        return self

    def _parts(self) -> list[nn.Module]:
        """Return the modules beside the network that are executed."""
        return []

    @abstractmethod
    def _answer(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute logits (B, C) and decisions (B, …) for images uint8 (B, 3, H, W) on the network's device."""

    def _answers(self, images: Tensor | np.ndarray, batch_size: int) -> tuple[Tensor, Tensor]:
        """Compute logits (B, C) and decisions (B, …) for images uint8 (B, 3, H, W), ``batch_size`` at a time."""
        on_device = as_images(images, self.image_shape).to(self.network.mean.device)
        answers = self.splitter(lambda rows: self._answer(on_device[rows]), len(on_device), batch_size)
        logits_BC, decision_B = (torch.cat(column) for column in zip(*answers, strict=True))
        return logits_BC, decision_B


class BlockPredictor(BasePredictor):
    """A predictor whose policy decides which blocks run.

    Attributes:
        costs: what the network's blocks cost.
        policy_macs: what the policy, or all gates together, cost for one image.
    """

    costs: Costs
    policy_macs: float

    @usual_defaults()
    @torch.no_grad()
    def predict(self, images: Tensor | np.ndarray, batch_size: int = 256) -> Prediction:
        """Decide and classify; a block is executed only for the images that keep it, but for what a ``plan`` or
        ``execution=dense`` says.

        Args:
            images: uint8 (B, 3, H, W), any B, 0 too.
            batch_size: images that are computed at a time.

        Raises:
            UserError: the images are of another kind, shape or dtype, or ``batch_size`` is no positive whole number.
        """
        logits_BC, keep_BK = self._answers(images, batch_size)
        macs_B = self.costs.of(keep_BK) + self.policy_macs
        return Prediction(logits_BC.argmax(1), logits_BC.float(), keep_BK, macs_B)

    def ran(self, prediction: Any) -> Tensor:
        return prediction.keep_BK


class Predictor(BlockPredictor):
    """A predictor whose policy stands in front of its network: it decides at once which blocks run.

    Args:
        policy: left as it is; a copy is executed, as of the network.
        policy_macs: what the policy costs for one image.

    Attributes:
        policy, backbone: the copies that are executed.
        plan: by batch size, for each block the share of a batch above which the block is computed for all images where
            images are gathered (see ``deployment/profiling.py``). Empty: a block is computed only for the images that
            keep it.
    """

    executes = Execution

    def __init__(
        self,
        policy: Policy,
        backbone: Backbone,
        classes: Sequence[str],
        image_shape: tuple[int, int, int],
        policy_macs: float,
        how: How = DEFAULT,
    ) -> None:
        super().__init__(backbone, classes, image_shape, how)
        self.policy = folded(policy)
        taken_by(self.policy, self.execution)  # refused now rather than at the first prediction
        self.policy_macs = policy_macs
        self.costs = count_costs(backbone, image_shape)
        self.plan: dict[int, list[float]] = {}

    @property
    def backbone(self) -> Backbone:
        """Return the network, by the name that it has where blocks are skipped."""
        return self.network

    def to(self, device: str | torch.device) -> Self:
        """Move the predictor, as :meth:`BasePredictor.to` says; a plan that was measured elsewhere is given up.

        Raises:
            UserError: there is no such device.
        """
        before = self.network.mean.device
        super().to(device)
        self.plan = self.plan if self.network.mean.device == before else {}
        return self

    def _parts(self) -> list[nn.Module]:
        return [self.policy]

    def _answer(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.policy.run(taken_by(self.policy, self.execution), images, self.plan_for(len(images)))

    def plan_for(self, batch: int) -> list[float] | None:
        """Return the plan of the nearest batch size that was measured; None without one, and where images are not
        gathered in float32, which is what its times were measured for."""
        measured = self.execution.way == "gather" and self.execution.precision == "float32"
        return self.plan[min(self.plan, key=lambda size: abs(size - batch))] if self.plan and measured else None


class GatedPredictor(BlockPredictor):
    """A predictor whose network has gates, which decide on the way which blocks run."""

    executes = GateExecution

    def __init__(
        self, network: GatedNetwork, classes: Sequence[str], image_shape: tuple[int, int, int], how: How = DEFAULT
    ) -> None:
        super().__init__(network, classes, image_shape, how)
        self.costs, self.policy_macs = count_costs(network.backbone, image_shape), network.gate_macs

    @property
    def network_to_measure(self) -> Backbone:
        """Return the network without its gates."""
        return self.network.backbone

    def _answer(self, images: Tensor) -> tuple[Tensor, Tensor]:
        gated = self.execution.greedy(images)
        return gated.logits_BC, gated.keep_BK


class ExitPredictor(BasePredictor):
    """A predictor whose network really stops: images that left are computed no further.

    Args:
        policy: says at every exit which images leave.
        decision_macs: what deciding costs at one exit.

    Attributes:
        network_hash, trunk_hash: content hashes of the network that was given, and of it without exits, if it has that.
    """

    executes = ExitExecution

    def __init__(
        self,
        policy: ThresholdPolicy | ExitPolicy,
        network: ExitNetwork,
        classes: Sequence[str],
        image_shape: tuple[int, int, int],
        decision_macs: float = 0.0,
        how: How = DEFAULT,
    ) -> None:
        super().__init__(network, classes, image_shape, how)
        self.policy: Any = policy.eval()
        self.network_hash, self.decision_macs = network.content_hash(), decision_macs
        self.trunk_hash = network.backbone.content_hash() if isinstance(network, ResNetExits) else ""
        self.costs: ExitCosts = count_exit_costs(network, image_shape)
        N = self.network.num_exits
        decisions_N = decisions_at(torch.arange(N), N)
        self.macs_N = (self.costs.cumulative_N + decision_macs * decisions_N).to(self.network.mean.device)

    @usual_defaults()
    @torch.no_grad()
    def predict(self, images: Tensor | np.ndarray, batch_size: int = 256) -> ExitPrediction:
        """Classify each image at the exit where the policy lets it leave.

        Args:
            images: uint8 (B, 3, H, W), any B, 0 too.
            batch_size: images that are computed at a time.

        Raises:
            UserError: the images are of another kind, shape or dtype, or ``batch_size`` is no positive whole number.
        """
        logits_BC, exit_B = self._answers(images, batch_size)
        return ExitPrediction(logits_BC.argmax(1), logits_BC.float(), exit_B, self.macs_N[exit_B])

    def to(self, device: str | torch.device) -> Self:
        super().to(device)
        self.macs_N = self.macs_N.to(self.network.mean.device)
        return self

    def _parts(self) -> list[nn.Module]:
        return [self.policy]

    def ran(self, prediction: Any) -> Tensor:
        segments_N = torch.arange(self.network.num_exits, device=prediction.exit_B.device)
        return segments_N <= prediction.exit_B.unsqueeze(1)

    def _answer(self, images: Tensor) -> tuple[Tensor, Tensor]:
        kind, rule = type(self.policy), getattr(self.policy, "rule", None)
        known = kind is ExitPolicy or (kind is ThresholdPolicy and rule in RULES.values())  # a user's may do anything
        return self.execution.run_until(images, self.policy.leave, may_record=known)


class ThresholdPredictor(ExitPredictor):
    """An :class:`ExitPredictor` that decides by a threshold at each exit; ``search`` is how they were searched."""

    policy: ThresholdPolicy

    def __init__(
        self,
        policy: ThresholdPolicy,
        search: str,
        network: ExitNetwork,
        classes: Sequence[str],
        image_shape: tuple[int, int, int],
        how: How = DEFAULT,
    ) -> None:
        super().__init__(policy, network, classes, image_shape, how=how)
        self.search = search


def as_images(given: Tensor | np.ndarray, image_shape: tuple[int, int, int]) -> Tensor:
    """Return images that a user gave as a tensor, uint8 (B, 3, H, W).

    Raises:
        UserError: they are something else than an ordinary tensor or array of that dtype and ``image_shape``.
    """
    images = plain_tensor(given, "images")
    found = tuple(images.shape)
    if images.dtype == torch.uint8 and len(found) == 4 and found[1:] == image_shape:
        return images
    if found == image_shape:
        hint = "; one image is images[None]"
    elif len(found) == 4 and found[1:] == (*image_shape[1:], image_shape[0]):
        hint = "; channels come first, which numpy.moveaxis(images, -1, 1) does"
    else:
        hint = ""
    shape = ", ".join(map(str, image_shape))
    raise UserError(f"images must be uint8 of shape (B, {shape}), got {described(images)}{hint}")
