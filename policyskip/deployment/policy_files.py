"""``policy.json`` has one reader and one writer, which are here, with what each family puts into it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from policyskip import registry
from policyskip.backbones import Backbone
from policyskip.backbones.gated import GatedNetwork
from policyskip.deployment.policy_schema import check_content
from policyskip.deployment.predictors import (
    ExitPredictor,
    ThresholdPredictor,
)
from policyskip.errors import UserError, in_one_line
from policyskip.policies.base import Policy
from policyskip.policies.perceptrons import ExitPolicy
from policyskip.runs.folder import Run
from policyskip.texts import one_line

VERSION = 1
Family = Literal["blocks", "gates", "thresholds", "exit_policy"]
KEYS: dict[Family, str] = {"blocks": "policy", "gates": "gates", "thresholds": "exits", "exit_policy": "leaves"}
"""The key of ``policy.json`` under which each family describes its policy."""


@dataclass(frozen=True)
class PolicyFile:
    """Holds the content of ``policy.json``.

    Attributes:
        family: of the policy.
        policy: what builds the policy again, beside the weights in ``best.safetensors``.
        network: its content hash, ``hash``; and if the run folder does not hold it as ``network.safetensors``,
            ``config``, its part of the configuration, and the run's ``seed``.
        classes: their names.
        image_shape: (3, H, W).
    """

    family: Family
    policy: dict[str, Any]
    network: dict[str, Any]
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]

    @property
    def files(self) -> tuple[str, ...]:
        """Return the names of the files in the run folder that hold the weights to deploy."""
        weights = () if self.family == "thresholds" else ("best.safetensors",)
        return weights if "config" in self.network else (*weights, "network.safetensors")

    def save(self, run: Run, steps: int | None) -> None:
        """Write the file into a run's folder, with the number of updates that the run has learned."""
        content = {
            "version": VERSION,
            KEYS[self.family]: self.policy,
            "backbone" if "config" in self.network else "network": self.network,
            "classes": list(self.classes),
            "image_shape": list(self.image_shape),
            "steps": steps,
        }
        run.save_json("policy.json", content)


def read_policy(run: Run) -> PolicyFile:
    """Read ``policy.json`` of a run.

    Raises:
        UserError: there is none, or it is damaged or of another version.
    """
    content = run.load_json("policy.json")
    try:
        family = next((name for name, key in KEYS.items() if key in content), None)
        if family is None:
            raise ValueError("it describes no policy")
        if content.get("version") != VERSION:
            raise ValueError(f"version {one_line(content.get('version'), 40)}")
        check_content(content, KEYS[family])
        channels, height, width = content["image_shape"]
        network, classes = dict(content["backbone" if family == "blocks" else "network"]), tuple(content["classes"])
        return PolicyFile(family, dict(content[KEYS[family]]), network, classes, (channels, height, width))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise damaged_policy(run, error) from error


def describe_blocks(
    policy: Policy, policy_macs: float, backbone: Backbone, config: dict[str, Any], seed: int
) -> dict[str, Any]:
    """Return the entries ``policy`` and ``network`` of a policy that decides which blocks of a frozen network run.

    Args:
        policy_macs: what the policy costs for one image.
        config: the network's part of the run's configuration.
        seed: the run's, by which random weights of the network were drawn.
    """
    checkpoint = config.get("checkpoint")
    if checkpoint and Path(checkpoint).is_file():
        config = {**config, "checkpoint": str(Path(checkpoint).resolve())}
    name = registry.name_of("policy", type(policy))
    return {
        "policy": {"name": name, "arguments": policy.spec(), "macs": policy_macs},
        "network": {"config": config, "hash": backbone.content_hash(), "seed": seed},
    }


def describe_gates(network: GatedNetwork) -> dict[str, Any]:
    """Return the entries ``policy`` and ``network`` of gates, whose weights are in ``best.safetensors``."""
    return {
        "policy": {"kind": network.gate, "macs": network.gate_macs},
        "network": {"hash": network.content_hash()},
    }


def describe_thresholds(predictor: ThresholdPredictor) -> dict[str, Any]:
    """Return the entries ``policy`` and ``network`` of thresholds; only ``network.safetensors`` has weights."""
    policy = predictor.policy
    thresholds = as_text(policy.threshold_E.tolist())
    return {
        "policy": {"rule": policy.rule.name, "search": predictor.search, "thresholds": thresholds},
        "network": {"hash": predictor.network_hash},
    }


def describe_exit_policy(predictor: ExitPredictor) -> dict[str, Any]:
    """Return the entries ``policy`` and ``network`` of a policy at exits; ``best.safetensors`` has its weights."""
    entry = {"arguments": predictor.policy.spec(), "macs": predictor.decision_macs}
    if type(predictor.policy) is not ExitPolicy:
        entry["name"] = registry.name_of("policy", type(predictor.policy))
    return {"policy": entry, "network": {"hash": predictor.network_hash}}


def as_text(thresholds: list[float]) -> list[str]:
    """Return thresholds as text for a JSON file, which has no infinity; ``float`` reads them back to the bit."""
    return [repr(threshold) for threshold in thresholds]


def damaged_policy(run: Run, error: Exception) -> UserError:
    """Return the error that says why ``policy.json`` of a run cannot be read."""
    return UserError(f"{run.folder / 'policy.json'} is damaged or of another version: {one_line(in_one_line(error))}")
