"""What was learned, ready to use: ``policyskip.load("runs/x").predict(images)``.

Shapes: B images, K blocks, C classes, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from policyskip.agents.base import Policy
from policyskip.agents.early_exit import ThresholdPolicy
from policyskip.agents.fixed import FixedPolicy, RandomPolicy
from policyskip.agents.greedy import BlockPolicy, ExitPolicy, LookPolicy
from policyskip.agents.oracle import OraclePolicy
from policyskip.agents.policies import ConstantPolicy, PolicyNetwork
from policyskip.backbones import (
    Backbone,
    Costs,
    ExitCosts,
    ExitNetwork,
    cifar_resnet,
    count_costs,
    count_exit_costs,
    load_exits,
    run_until,
    torchvision_resnet,
)
from policyskip.backbones.folding import folded
from policyskip.errors import UserError
from policyskip.exits.rules import check_thresholds, decisions_at
from policyskip.files import damaged
from policyskip.finite import first_bad
from policyskip.memory import hold
from policyskip.parts import Parts
from policyskip.profiling import device_name
from policyskip.runs import Run, open_run

if TYPE_CHECKING:
    from policyskip.deployment_gates import GatedPredictor

POLICIES: dict[str, type[Policy]] = {
    policy.__name__: policy
    for policy in (PolicyNetwork, ConstantPolicy, FixedPolicy, RandomPolicy, OraclePolicy, LookPolicy, BlockPolicy)
}
BACKBONES = {
    "policyskip.backbones.cifar_resnet": cifar_resnet,
    "policyskip.backbones.torchvision_resnet": torchvision_resnet,
}
VERSION = 1
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Built = TypeVar("Built", bound=Policy)


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
        self.parts = Parts()

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
        runs = self.parts(lambda of: self._run(images[of]), len(images), batch_size)
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
        self.parts = Parts()
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
        parts = self.parts(lambda of: run_until(self.network, images[of], self.policy.leave), len(images), batch_size)
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


def as_text(thresholds: Sequence[float]) -> list[str]:
    """Thresholds for a JSON file, which has no infinity; ``float`` reads them back to the bit."""
    return [repr(threshold) for threshold in thresholds]


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
    hold()
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
        from policyskip.deployment_leaving import load_leaving_run

        return load_leaving_run(run, device)
    if "gates" in content:
        from policyskip.deployment_gates import load_gated_run

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
    if (place := first_bad(tensors)) is not None:
        raise UserError(f"{path} cannot be used: {place} holds numbers that are not finite")
    try:
        policy.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit {described}: {' '.join(str(error).split())[:200]}") from error
