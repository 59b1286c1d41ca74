"""Leaving early: a network learns to answer at every exit, thresholds are chosen on validation, and test is read once.

Shapes: M images of a set, N exits, E early exits (N - 1), P points on a curve.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from policyskip import exit_plots
from policyskip.agents.cdl import CDL
from policyskip.agents.early_exit import EarlyExitAgent, ThresholdPolicy
from policyskip.backbones import checkpoints
from policyskip.backbones.exits import ExitNetwork, costly_exits
from policyskip.calibration import Curve, Point, choose
from policyskip.config import Setup, TargetSection, build, group_of
from policyskip.data import Feed, Images
from policyskip.deployment import describe_exits
from policyskip.errors import UserError
from policyskip.exit_baselines import (
    accuracy_by_exit,
    exit_histogram,
    label_oracle,
    oracle_exit,
    random_exits,
    static_exits,
)
from policyskip.exit_cache import CachedExits, cache_exits
from policyskip.runs import Run
from policyskip.thresholds import exit_of
from policyskip.tracking import Examples, Tracker


class ExitTask:
    """A network with exits, the agent that trains it, and the target that its thresholds have to meet."""

    choose_by = "mean_accuracy"

    def __init__(self, setup: Setup, target: TargetSection) -> None:
        network = setup.backbone
        if not isinstance(network, ExitNetwork):
            raise UserError(f"{network.name} has no exits; say backbone=resnet32_exits, or agent=blockdrop to skip blocks")
        if (target.accuracy_drop is None) == (target.macs_fraction is None):
            raise UserError("say one target: target.accuracy_drop=… or target.macs_fraction=… (the other null)")
        self.setup, self.target, self.network = setup, target, network
        self.learner: EarlyExitAgent = build(
            "agent",
            group_of(setup.config, "agent"),
            setup.trusted,
            network=network,
            total_steps=setup.config["train"]["steps"],
        )
        self.source = Feed(setup.data.train, setup.batch_size, "shuffled", setup.config["seed"])
        self.names = dict(
            agent=type(self.learner).__name__.lower(), env="EarlyExit-v0", backbone=network.name, data=setup.data.name
        )
        self.costs = self.cached(setup.data.validation).costs
        macs = ", ".join(f"{macs / 1e6:.2f}" for macs in self.costs.cumulative_N.tolist())
        self.greeting = "\n".join(
            [
                f"{self.names['agent']} learns on {setup.data.name} over {network.name}; "
                f"leaving at its {network.num_exits} exits costs {macs} M MACs",
                *(f"warning: {line}" for line in costly_exits(self.costs)),
            ]
        )

    def cached(self, images: Images) -> CachedExits:
        """What every exit says of a set now; the network may go on learning afterwards."""
        learning = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        cache = cache_exits(self.network, images.plain())
        self.network.frozen = False
        for parameter in learning:
            parameter.requires_grad_(True)
        return cache

    def validate(self) -> dict[str, float]:
        """Accuracy of every exit on validation images, and their mean, by which the best weights are kept."""
        accuracy_N = self.cached(self.setup.data.validation).correct_MN.double().mean(0)
        figures = {"mean_accuracy": accuracy_N.mean().item(), "accuracy": accuracy_N[-1].item()}
        return figures | {f"accuracy_exit{n}": accuracy for n, accuracy in enumerate(accuracy_N.tolist())}

    def deployable(self) -> dict[str, Tensor]:
        return self.network.state_dict()

    def finish(self, run: Run, tracker: Tracker, seconds: float) -> dict[str, Any]:
        """Choose thresholds for the best weights on validation images, judge them once on test, write everything."""
        try:
            self.network.load_state_dict(run.load_best())
        except RuntimeError as error:
            raise UserError(f"{run.folder / 'best.safetensors'} does not fit the run's config.yaml") from error
        network = self._admitted()
        checkpoints.save(network, run.folder / "network.safetensors")
        steps = self.setup.config["train"]["steps"]
        head = {**self.names, "seed": self.setup.config["seed"], "steps": steps, "seconds": round(seconds, 1)}
        return settle(self.setup, network, self.learner, self.target, run, tracker, head)

    def _admitted(self) -> ExitNetwork:
        """The network to deploy: for CDL, with the heads that save operations and no others."""
        if not isinstance(self.learner, CDL):
            return self.network
        validation = self.cached(self.setup.data.validation)
        admitted = self.learner.admit_heads(validation)
        for e, stage in enumerate(self.learner.stages):
            verdict = "admitted" if stage.admitted else "dropped"
            print(
                f"head {e}: {stage.resolved} of {stage.resolved + stage.passed} validation images leave, "
                f"gain {stage.gain / 1e6:+.3f} M MACs an image: {verdict}"
            )
        return self.learner.network.only(admitted)


def settle(
    setup: Setup,
    network: ExitNetwork,
    learner: EarlyExitAgent,
    target: TargetSection,
    run: Run,
    tracker: Tracker,
    head: dict[str, Any],
) -> dict[str, Any]:
    """Thresholds for a target, chosen on validation; their figures on test; policy, summary and pictures."""
    data = setup.data
    validation = cache_exits(network, data.validation.plain())
    curve = learner.curve(validation)
    point = choose(curve, target.accuracy_drop, target.macs_fraction)
    policy = ThresholdPolicy(point.rule, point.thresholds)
    test = cache_exits(network, data.test.plain())
    figures = judge(policy, test)
    anytime, budgeted = curves(test, policy, curve)
    summary = {**head, **chosen(target, point), **{f"test/{key}": value for key, value in figures.items()}}
    run.save_json("policy.json", describe_exits(policy, network, data.classes, data.image_shape))
    run.save_json("curve.json", {"rule": curve.rule, "validation": [asdict(curve[i]) for i in range(len(curve))], "test": budgeted})
    run.save_json("summary.json", summary)
    exit_M = exit_of(policy.rule, test.probability_MNC, policy.threshold_E)
    pictures = exit_plots.all_plots(
        run.folder / "plots", run.metrics(), test, exit_M.cpu(), anytime, budgeted, data.test, data.classes
    )
    files = [run.folder / name for name in ("network.safetensors", "policy.json", "summary.json", "config.yaml")]
    tracker.finish(summary, pictures, files, None)
    return summary


def chosen(target: TargetSection, point: Point) -> dict[str, Any]:
    """What was asked for and what it came to on validation images."""
    return {
        "target/accuracy_drop": target.accuracy_drop,
        "target/macs_fraction": target.macs_fraction,
        "rule": point.rule,
        "thresholds": list(point.thresholds),
        "val/accuracy": point.accuracy,
        "val/macs_fraction": point.macs_fraction,
    }


def judge(policy: ThresholdPolicy, cache: CachedExits) -> dict[str, Any]:
    """What a policy does on a set, beside each static exit, random exits at its rates, and the oracle."""
    N = cache.num_exits
    exit_M = exit_of(policy.rule, cache.probability_MNC, policy.threshold_E)
    correct_M = cache.correct_MN.gather(1, exit_M.unsqueeze(1)).squeeze(1)
    macs_M = cache.macs_N[exit_M]
    share_N = exit_histogram(exit_M, N)
    static_accuracy_N, static_macs_N = static_exits(cache)
    random_accuracy, random_macs = random_exits(cache, share_N)
    oracle_accuracy, oracle_macs = cache.judge(oracle_exit(cache.correct_MN))
    return {
        "accuracy": correct_M.double().mean().item(),
        "full_accuracy": cache.correct_MN[:, -1].double().mean().item(),
        "macs_mean": macs_M.mean().item(),
        "macs_sd": macs_M.std(correction=0).item(),
        "full_macs": cache.costs.full,
        "macs_fraction": macs_M.mean().item() / cache.costs.full,
        "policy_macs": 0.0,
        "unique_decisions": int((share_N > 0).sum()),
        "exits": N,
        "exit_share": share_N.tolist(),
        "exit_accuracy": [None if value != value else value for value in accuracy_by_exit(exit_M, correct_M, N).tolist()],
        "exit_macs": cache.macs_N.tolist(),
        "static_accuracy": static_accuracy_N.tolist(),
        "static_macs": static_macs_N.tolist(),
        "random_accuracy": random_accuracy,
        "random_macs": random_macs,
        "oracle_accuracy": oracle_accuracy.item(),
        "oracle_macs": oracle_macs.item(),
    }


def curves(test: CachedExits, policy: ThresholdPolicy, curve: Curve) -> tuple[list[list[float]], list[list[float]]]:
    """Test accuracy against mean MACs: of each exit for all images, and of the thresholds that were best on validation.

    Both are pairs (MACs, accuracy), the cheapest first. Nothing is chosen here: the second are the points of the
    validation front, whatever they turn out to be on test.
    """
    accuracy_N, macs_N = static_exits(test)
    front = curve.front()
    threshold_PE = front.threshold_PE.to(test.label_M.device)
    exit_PM = torch.stack([exit_of(policy.rule, test.probability_MNC, threshold_E) for threshold_E in threshold_PE])
    accuracy_P, macs_P = test.judge(exit_PM)
    return (
        [[macs, accuracy] for macs, accuracy in zip(macs_N.tolist(), accuracy_N.tolist())],
        [[macs, accuracy] for macs, accuracy in zip(macs_P.tolist(), accuracy_P.tolist())],
    )
