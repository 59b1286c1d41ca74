"""A learned policy at the exits of a frozen network, ready to use: what :func:`policyskip.load` gives for it."""

from __future__ import annotations

from typing import Any

import torch

from policyskip.agents.greedy import ExitPolicy
from policyskip.backbones import load_exits
from policyskip.deployment import VERSION, ExitPredictor, load_weights, of_data, policy_of
from policyskip.errors import UserError
from policyskip.runs import Run


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
