"""Leaving early: a network learns to answer at every exit, thresholds are chosen on validation, and test is read once.

Shapes: M images of a set, N exits, E early exits (N - 1), P points on a curve.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from policyskip.agents.cdl import CDL
from policyskip.agents.early_exit import EarlyExitAgent
from policyskip.backbones import checkpoints
from policyskip.backbones.checkpoints import RANDOM
from policyskip.backbones.exits import ExitNetwork, costly_exits, count_exit_costs, in_millions
from policyskip.backbones.resnet_exits import ResNetExits
from policyskip.build import Setup, build, build_backbone
from policyskip.config import TargetSection, group_of
from policyskip.data import Data, Feed
from policyskip.deployment.policy_files import load_exits_run, load_weights
from policyskip.deployment.predictors import ThresholdPredictor, as_text
from policyskip.errors import UserError
from policyskip.evaluation import decisions, exit_plots
from policyskip.evaluation.decisions import Decisions, collapse_warnings
from policyskip.evaluation.evaluate import exit_decisions
from policyskip.evaluation.figures import exit_figures
from policyskip.evaluation.tables import console, show_exits
from policyskip.exits.cache import CachedExits, cache_exits
from policyskip.exits.calibration import Curve, Point, UnmetError, check_target, choose, curve_of
from policyskip.exits.placement import probe_blocks, propose_exits
from policyskip.exits.references import static_pairs
from policyskip.exits.rules import exit_of, rule_named
from policyskip.files import damaged
from policyskip.policies.thresholds import ThresholdPolicy
from policyskip.runs.folder import Run
from policyskip.runs.tracking import Tracker
from policyskip.tasks.base import check_batch

ACCURACY_DROP = 0.002
"""The target of a run that names none: at most this much less accurate than the last exit, on validation images."""


FEW = 500
"""Validation images below which thresholds are little more than chance: one point of accuracy is a few images."""


class ExitTask:
    """A network with exits, the agent that trains it, and the target that its thresholds have to meet."""

    choose_by = "mean_accuracy"

    def __init__(self, setup: Setup, target: TargetSection) -> None:
        network = setup.backbone
        if not isinstance(network, ExitNetwork):
            raise UserError(
                f"{network.name} has no exits; say backbone=resnet32_exits, or agent=blockdrop to skip blocks"
            )
        self.target = target.given or {"accuracy_drop": ACCURACY_DROP}
        check_target(**target.model_copy(update=self.target).model_dump())
        idle = {"_target_": None, "cached": True}  # what every configuration has
        for key, value in group_of(setup.config, "env").items():
            if key not in idle or (idle[key] is not None and value != idle[key]):
                raise UserError(
                    f"env.{key} has no effect: agents that set thresholds learn from labelled images, and env says "
                    "only where they are judged"
                )
        if setup.reward is not None:
            raise UserError("agents that leave early learn by their own loss and take no reward")
        self.setup, self.network, self.trains = setup, network, network
        self.learner: EarlyExitAgent = build(
            "agent",
            group_of(setup.config, "agent"),
            setup.trusted,
            network=network,
            total_steps=setup.config["train"]["steps"],
        )
        self.source = Feed(setup.data.train, setup.batch_size, "shuffled", setup.config["seed"])
        check_batch(network, self.source.batch.images)
        self.names = dict(agent=self.learner.name, env="EarlyExit-v0", backbone=network.name, data=setup.data.name)
        self.costs = count_exit_costs(network, setup.data.image_shape)
        least = float(self.costs.cumulative_N[0]) / self.costs.full
        if self.target.get("macs_fraction", 1) < least:
            raise UserError(
                f"no threshold meets target.macs_fraction={self.target['macs_fraction']:g}: the first exit of "
                f"{network.name} costs {math.ceil(1e4 * least) / 1e4:.4f} of going to the last one"
            )
        self.greeting = "\n".join(
            [
                f"{self.names['agent']} learns on {setup.data.name} over {network.name}; "
                f"leaving at its {network.num_exits} exits costs {in_millions(self.costs.cumulative_N)}",
                *network.remarks(setup.data.image_shape),
                *(f"warning: {line}" for line in [*costly_exits(self.costs), *self._warnings()]),
            ]
        )

    def _warnings(self) -> list[str]:
        """What is allowed, and hardly meant."""
        doubts, images = [], len(self.setup.data.validation)
        if isinstance(self.learner, CDL) and group_of(self.setup.config, "backbone").get("checkpoint") == RANDOM:
            doubts.append("agent=cdl does not train the network, and backbone.checkpoint=random is not trained either")
        if images < FEW:
            doubts.append(f"thresholds are chosen on {images} validation images, which say little; give more data")
        return doubts

    def validate(self) -> dict[str, float]:
        """Accuracy of every exit on validation images, and their mean, by which the best weights are kept. Thresholds
        come later, so ``accuracy`` is the last exit's, at all of its cost."""
        accuracy_N = cache_exits(self.network, self.setup.data.validation.plain()).correct_MN.double().mean(0)
        figures = {"mean_accuracy": accuracy_N.mean().item(), "accuracy": accuracy_N[-1].item(), "macs_fraction": 1.0}
        return figures | {f"accuracy_exit{n}": accuracy for n, accuracy in enumerate(accuracy_N.tolist())}

    def deployable(self) -> dict[str, Tensor]:
        return self.network.state_dict()

    def finish(self, run: Run, tracker: Tracker, seconds: float) -> dict[str, Any]:
        """Choose thresholds for the best weights on validation images, judge them once on test, write everything."""
        load_weights(self.network, run, "the run's config.yaml")
        network, data, learner = self._admitted(), self.setup.data, self.learner
        checkpoints.save(network, run.folder / "network.safetensors")
        nobody_leaves = ThresholdPolicy(learner.rule, [rule_named(learner.rule).extremes[0]] * (network.num_exits - 1))
        predictor = ThresholdPredictor(nobody_leaves, learner.search, network, data.classes, data.image_shape)
        validation = cache_exits(predictor.network, data.validation.plain())
        curve = learner.curve(validation)
        try:
            point = choose(curve, **self.target)
        except UnmetError as unmet:  # what was learned is worth more than the target: it can be calibrated anew
            print(f"warning: {unmet}, and is what this run deploys")
            point = unmet.nearest
        steps = self.setup.config["train"]["steps"]
        head = {**self.names, "seed": self.setup.config["seed"], "steps": steps, "seconds": round(seconds, 1)}
        return deploy_point(self.setup, predictor, validation, curve, point, self.target, run, tracker, head)

    def show(self, summary: dict[str, Any]) -> None:
        """Print the table."""
        show_table(summary)

    def _admitted(self) -> ExitNetwork:
        """The network to deploy: for CDL, with the heads that save operations and no others."""
        if not isinstance(self.learner, CDL):
            return self.network
        validation = cache_exits(self.network, self.setup.data.validation.plain())
        admitted = self.learner.admit_heads(validation)
        for e, stage in enumerate(self.learner.stages):
            verdict = "admitted" if stage.admitted else "dropped"
            print(
                f"head {e}: {stage.resolved} of {stage.resolved + stage.passed} validation images leave, "
                f"gain {stage.gain / 1e6:+.3f} M MACs an image: {verdict}"
            )
        if not admitted:
            delta = f"agent.delta={self.learner.delta:g}"
            print(f"warning: no head saves operations at {delta}: the network is deployed without early exits")
        return self.learner.network.only(admitted)


def place_exits(node: dict[str, Any], data: Data, device: torch.device, seed: int) -> tuple[dict[str, Any], list[str]]:
    """A ``backbone`` node whose ``exits`` are "auto N", with N places proposed from probes, and why each of them.

    Raises:
        UserError: no number, or one that the network has no places for.
    """
    number = str(node["exits"]).removeprefix("auto").strip()
    if not number.isdecimal():
        raise UserError(f'backbone.exits must list blocks, or be "auto N" for N proposed ones, got {node["exits"]!r}')
    trial: ResNetExits = build_backbone({**node, "exits": [0], "heads": "pooled"}, data, device, seed=seed)  # type: ignore[assignment]
    probes = probe_blocks(trial.backbone, data.train, data.validation)
    proposals = propose_exits(
        probes.accuracy_K, probes.macs_K, probes.full_accuracy, probes.full_macs, int(number), 1 / len(data.classes)
    )
    return {**node, "exits": [p.place for p in proposals]}, [p.reason for p in proposals]


def deploy_point(
    setup: Setup,
    predictor: ThresholdPredictor,
    validation: CachedExits,
    curve: Curve,
    point: Point,
    target: dict[str, Any],
    run: Run,
    tracker: Tracker,
    head: dict[str, Any],
) -> dict[str, Any]:
    """Deploy a point of the validation curve: its figures on test; policy, curve, summary and pictures."""
    data = setup.data
    predictor.policy = policy = ThresholdPolicy(point.rule, point.thresholds).to(setup.device)
    test = cache_exits(predictor.network, data.test.plain())
    exit_M = exit_of(policy.rule, test.probability_MNC, policy.threshold_E)
    anytime, budgeted = curves(test, policy, curve)
    judged = replace(
        exit_decisions(exit_M, test, difficulty_M=data.test.difficulty),
        static_F2=torch.tensor(anytime, dtype=torch.float64),
        images=data.test.fingerprint(),
        classes=data.classes,
    )
    figures = exit_figures(judged, test, validation)
    told = decisions.save_decisions(judged, run)
    summary = {**head, **told, **chosen(target, point), **{f"test/{key}": value for key, value in figures.items()}}
    summary["warnings"] = collapse_warnings(judged)
    pictures = exit_plots.exit_pictures(run.folder / "plots", run.metrics(), judged, test, budgeted, data.test)
    save_curve(run, curve, budgeted)
    run.save_json("summary.json", summary)
    # The last, so that what is deployed has figures; with it, the run is finished.
    run.save_json("policy.json", predictor.describe() | {"steps": head.get("steps")})
    files = [run.folder / name for name in ("network.safetensors", "policy.json", "summary.json", "config.yaml")]
    tracker.finish(summary, pictures, files, decisions.examples(judged, data.test))
    return summary


def chosen(target: dict[str, Any], point: Point) -> dict[str, Any]:
    """What was asked for and what it came to on validation images."""
    return {
        **{f"target/{key}": value for key, value in target.items()},
        "rule": point.rule,
        "thresholds": as_text(point.thresholds),
        "val/accuracy": point.accuracy,
        "val/macs_fraction": point.macs_fraction,
    }


def save_curve(run: Run, curve: Curve, test: list[list[float]]) -> None:
    """Write the front of a validation curve, and what its points do on test (MACs, accuracy), as ``curve.json``."""
    points = [asdict(point) | {"thresholds": as_text(point.thresholds)} for point in curve.front()]
    run.save_json("curve.json", {"validation": points, "test": [{"macs": m, "accuracy": a} for m, a in test]})


def curves(test: CachedExits, policy: ThresholdPolicy, curve: Curve) -> tuple[list[list[float]], list[list[float]]]:
    """Test accuracy against mean MACs: of each exit for all images, and of the thresholds that were best on validation.

    Both are pairs (MACs, accuracy), the cheapest first. Nothing is chosen here: the second are the points of the
    validation front, whatever they turn out to be on test.
    """
    front = curve.front()
    threshold_PE = front.threshold_PE.to(test.label_M.device)
    exit_PM = torch.stack([exit_of(policy.rule, test.probability_MNC, threshold_E) for threshold_E in threshold_PE])
    accuracy_P, macs_P = test.judge(exit_PM)
    return (
        static_pairs(test),
        [[macs, accuracy] for macs, accuracy in zip(macs_P.tolist(), accuracy_P.tolist())],
    )


def again(setup: Setup, run: Run, split: str) -> dict[str, Any]:
    """A finished run's figures on a split, from its folder."""
    predictor = load_exits_run(run, setup.device)
    cache = cache_exits(predictor.network, setup.data.split(split).plain())
    exit_M = exit_of(predictor.policy.rule, cache.probability_MNC, predictor.policy.threshold_E)
    validation = cache_exits(predictor.network, setup.data.validation.plain())
    return exit_figures(exit_decisions(exit_M, cache), cache, validation)


def decide_again(setup: Setup, run: Run) -> Decisions:
    """A finished run's decisions on test images, from its folder."""
    predictor, data = load_exits_run(run, setup.device), setup.data
    cache = cache_exits(predictor.network, data.test.plain())
    exit_M = exit_of(predictor.policy.rule, cache.probability_MNC, predictor.policy.threshold_E)
    return replace(
        exit_decisions(exit_M, cache, difficulty_M=data.test.difficulty),
        static_F2=torch.tensor(static_pairs(cache), dtype=torch.float64),
        images=data.test.fingerprint(),
        classes=data.classes,
    )


def recalibrate(setup: Setup, run: Run, target: TargetSection) -> dict[str, Any]:
    """Other thresholds for a finished run: chosen on validation, reported once on test, written into its policy."""
    predictor, validation, curve = finished(setup, run)
    check_target(**target.model_dump())
    point = choose(curve, **target.given)
    before = run.load_json("summary.json")
    names = ("agent", "env", "backbone", "data", "seed", "steps", "seconds")
    with damaged(run.folder / "summary.json"):
        head: dict[str, Any] = {name: before[name] for name in names}
    return deploy_point(setup, predictor, validation, curve, point, target.given, run, Tracker(run, "none", {}), head)


def finished(setup: Setup, run: Run) -> tuple[ThresholdPredictor, CachedExits, Curve]:
    """What a run deploys, and the curve of its network on validation images.

    Raises:
        UserError: it has no early exits.
    """
    predictor = load_exits_run(run, setup.device)
    if predictor.network.num_exits == 1:
        raise UserError(f"the run {run.folder} has no early exits, so there are no thresholds to choose")
    validation = cache_exits(predictor.network, setup.data.validation.plain())
    return predictor, validation, curve_of(validation, predictor.policy.rule.name, predictor.search)


def show_curve(setup: Setup, run: Run, rows: int = 16) -> None:
    """Print what can be had: points of the front on validation images, evenly spaced in cost.

    Test is not read, as a target is chosen from this table. What the run deploys stays as it is.
    """
    predictor, _, curve = finished(setup, run)
    front, knee = curve.front(), curve.knee()
    wanted_R = torch.linspace(float(front.macs_P[0]), float(front.macs_P[-1]), rows, dtype=torch.float64)
    table = Table(title=f"{run.folder}: thresholds chosen on validation images ({predictor.policy.rule.name})")
    columns = ("MACs, of full", "accuracy", "meets accuracy_drop", "a threshold for each exit but the last")
    for column in columns:
        table.add_column(column, justify="left" if column == columns[-1] else "right")
    for place in (front.macs_P - wanted_R.unsqueeze(1)).abs().argmin(1).unique().tolist():
        point = front[place]
        table.add_row(
            f"{point.macs_fraction:.3f}",
            f"{100 * point.accuracy:.2f} %",
            f"{math.ceil(1e4 * float(front.drop_P[place])) / 1e4:.4f}",
            " ".join(f"{threshold:.3g}" for threshold in point.thresholds),
        )
    console().print(table)
    last = f"The last exit: {100 * curve.last_accuracy:.2f} % on validation."
    print(f"{last} Knee at {knee.macs_fraction:.3f} of the MACs.")
    print(f"Deployed: {' '.join(f'{threshold:.3g}' for threshold in predictor.policy.threshold_E.tolist())}")


def show_table(summary: dict[str, Any]) -> None:
    """Print the figures of a run, and what came of its target."""
    show_exits(summary)
    out = console()
    lost = 100 * (summary["test/full_accuracy"] - summary["test/accuracy"])
    if "target/macs_fraction" in summary:
        asked = summary["target/macs_fraction"]
        out.print(f"Budget asked for {asked:.3f} of the full cost, used on test {summary['test/macs_fraction']:.3f}.")
    elif "target/accuracy_drop" in summary:
        drop = 100 * summary["target/accuracy_drop"]
        out.print(f"Asked for: at most {drop:.2f} points below the last exit; on test it is {lost:.2f} below.")
    else:
        out.print(f"The knee of the validation curve; on test it is {lost:.2f} points below the last exit.")
