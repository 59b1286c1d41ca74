"""The family ``thresholds``: a network learns to answer at every exit, and thresholds are chosen on validation images.

Shapes: M images of a set, N exits, E early exits (N - 1), P points on a curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from policyskip.agents.early_exit import EarlyExitAgent
from policyskip.backbones import checkpoints
from policyskip.backbones.checkpoints import RANDOM
from policyskip.backbones.exits import ExitNetwork, costly_exits, count_exit_costs, in_millions
from policyskip.backbones.resnet_exits import ResNetExits
from policyskip.build import Setup, build, build_backbone, wrong_kind
from policyskip.config import Settings, group_of
from policyskip.data import Data, Feed
from policyskip.deployment.loading import load_best_so_far, load_thresholds
from policyskip.deployment.policy_files import as_text, describe_thresholds
from policyskip.deployment.predictors import ThresholdPredictor
from policyskip.envs.early_exit import EarlyExitVectorEnv
from policyskip.errors import UserError
from policyskip.evaluation.evaluate import exit_decisions
from policyskip.evaluation.exit_plots import exit_pictures
from policyskip.evaluation.figures import exit_figures
from policyskip.evaluation.tables import console, show_exits
from policyskip.exits.cache import CachedExits, cache_exits
from policyskip.exits.calibration import Curve, Point
from policyskip.exits.placement import probe_blocks, propose_exits
from policyskip.exits.references import static_pairs
from policyskip.exits.rules import exit_of, rule_named
from policyskip.exits.targets import UnmetError, check_target, choose
from policyskip.policies.thresholds import ThresholdPolicy
from policyskip.runs.folder import Run
from policyskip.runs.tracking import Tracker
from policyskip.tasks.base import FamilyTask, Judgement, check_batch, names_of
from policyskip.tasks.report import completed, head_of, write_finished
from policyskip.tasks.rivals import exit_verdict, front_of_trunk
from policyskip.tasks.run_rivals import References, RunRival

ACCURACY_DROP = 0.002
"""The target of a run that names none: at most this much less accurate than the last exit, on validation images."""
FEW = 500
"""Validation images below which thresholds are little more than chance: one point of accuracy is a few images."""


class ThresholdTask(FamilyTask):
    """The task of a network with exits, which an agent trains, and whose thresholds have to meet a target.

    Raises:
        UserError: the network has no exits, the configuration has no target, or no threshold can meet it.
    """

    choose_by = "mean_accuracy"

    def __init__(self, setup: Setup, settings: Settings, others: Sequence[RunRival]) -> None:
        if settings.target is None:
            raise UserError("the configuration has no target, and leaving early needs one")
        network = setup.backbone
        if not isinstance(network, ExitNetwork):
            raise UserError(
                f"{network.name} has no exits; say backbone=resnet32_exits, or agent=blockdrop to skip blocks"
            )
        self.target = settings.target.chosen or {"accuracy_drop": ACCURACY_DROP}
        check_target(**settings.target.model_copy(update=self.target).model_dump())
        _check_unused(setup)
        self.setup, self.network, self.front_settings, self.others = setup, network, settings.front, others
        self.learner: EarlyExitAgent = build(
            "agent",
            group_of(setup.config, "agent"),
            setup.trusted,
            network=network,
            total_steps=settings.train.steps,
        )
        if not isinstance(self.learner, EarlyExitAgent):
            node = group_of(setup.config, "agent")
            raise UserError(wrong_kind("agent", node, self.learner, "policyskip.agents.early_exit.EarlyExitAgent"))
        self.source = Feed(setup.data.train, setup.batch_size, "shuffled", settings.seed)
        check_batch(network, self.source.batch.images)
        self.names = names_of(setup, self.learner.name, EarlyExitVectorEnv.id)
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
        """Return warnings of settings that are valid but probably a mistake."""
        warnings, images = [], len(self.setup.data.validation)
        if not self.learner.trains_trunk and group_of(self.setup.config, "backbone").get("checkpoint") == RANDOM:
            name = f"agent={self.learner.name}"
            warnings.append(f"{name} does not train the network, and backbone.checkpoint=random is not trained either")
        if images < FEW:
            warnings.append(f"thresholds are chosen on {images} validation images, which say little; give more data")
        return warnings

    def validate(self) -> dict[str, float]:
        """Return the accuracy of every exit on validation images, and their mean, by which the best weights are kept.

        Thresholds come later, so ``accuracy`` is the last exit's, at all of its cost.
        """
        accuracy_N = self._cached_validation().correct_MN.double().mean(0)
        figures = {"mean_accuracy": accuracy_N.mean().item(), "accuracy": accuracy_N[-1].item(), "macs_fraction": 1.0}
        return figures | {f"accuracy_exit{n}": accuracy for n, accuracy in enumerate(accuracy_N.tolist())}

    def deployable(self) -> dict[str, Tensor]:
        return self.network.state_dict()

    def finish(self, run: Run, tracker: Tracker, seconds: float) -> dict[str, Any]:
        """Choose thresholds for the best weights on validation images, judge them once on test, write everything."""
        load_best_so_far(self.network, run)
        data, learner = self.setup.data, self.learner
        network, lines = learner.network_to_deploy(self._cached_validation)
        print(*lines, sep="\n", end="\n" if lines else "")
        nobody_leaves = ThresholdPolicy(learner.rule, [rule_named(learner.rule).extremes[0]] * (network.num_exits - 1))
        predictor = ThresholdPredictor(
            nobody_leaves, learner.search, network, data.classes, data.image_shape, self.setup.how
        )
        validation = cache_exits(predictor.network, data.validation.plain(), self.setup.how)
        curve = learner.curve(validation)
        try:
            point = choose(curve, **self.target)
        except UnmetError as unmet:  # what was learned is worth more than the target: it can be calibrated anew
            print(f"warning: {unmet}, and is what this run deploys")
            point = unmet.nearest
        head = head_of(self.setup, self.names, seconds, predictor.execution.way)
        references = References(front_of_trunk(self.setup, network, self.front_settings), self.others)

        def write_more(new: Run) -> None:
            run.deploy_best(new)
            checkpoints.save(network, new.folder / "network.safetensors")
            references.save(new)

        chain = (self.setup, predictor, validation, curve, point, self.target, references)
        return deploy_point(*chain, run, tracker, head, write_more)

    def show(self, summary: dict[str, Any]) -> None:
        show_table(summary)

    @staticmethod
    def judge(setup: Setup, run: Run, split: str, compared: bool) -> Judgement:
        predictor = load_thresholds(run, setup.device, setup.trusted, setup.how)
        cache, validation = cache_exits(predictor.network, setup.data.split(split).plain(), setup.how), None
        references = None
        if compared:
            validation = cache_exits(predictor.network, setup.data.validation.plain(), setup.how)
            references = References.load(run, predictor, setup.data.test)
        return judge_thresholds(setup, predictor, cache, validation, split, references)

    def _cached_validation(self) -> CachedExits:
        return cache_exits(self.network, self.setup.data.validation.plain(), self.setup.how)


def _check_unused(setup: Setup) -> None:
    """Refuse settings that have no effect here.

    Raises:
        UserError: there is a reward, or a key of ``env`` that differs from what every configuration has.
    """
    idle = {"_target_": None, "cached": True}
    for key, value in group_of(setup.config, "env").items():
        if key not in idle or (idle[key] is not None and value != idle[key]):
            raise UserError(
                f"env.{key} has no effect: agents that set thresholds learn from labelled images, and env says "
                "only where they are judged"
            )
    if setup.reward is not None:
        raise UserError("agents that leave early learn by their own loss and take no reward")


def judge_thresholds(
    setup: Setup,
    predictor: ThresholdPredictor,
    cache: CachedExits,
    validation: CachedExits | None,
    split: str,
    references: References | None,
) -> Judgement:
    """Judge thresholds on the cached outputs of a split; on test, beside rivals chosen on validation images, if these
    are given."""
    policy = predictor.policy
    exit_M = exit_of(policy.rule, cache.probability_MNC, policy.threshold_E)
    difficulty = setup.data.split(split).difficulty
    decisions = completed(exit_decisions(exit_M, cache, difficulty_M=difficulty), setup, split, static_pairs(cache), "")
    figures = exit_figures(decisions, cache)
    if split == "test" and validation is not None and references is not None:
        given = (setup, predictor.network, decisions, cache, validation)
        figures |= exit_verdict(*given, references.front, references.others)
    return Judgement(decisions, figures)


def place_exits(node: dict[str, Any], data: Data, device: torch.device, seed: int) -> tuple[dict[str, Any], list[str]]:
    """Replace ``exits`` "auto N" in a ``backbone`` node by N places proposed from probes; return the node, and why each
    place.

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
    return {**node, "exits": [p.block for p in proposals]}, [p.reason for p in proposals]


def deploy_point(
    setup: Setup,
    predictor: ThresholdPredictor,
    validation: CachedExits,
    curve: Curve,
    point: Point,
    target: dict[str, Any],
    references: References,
    run: Run,
    tracker: Tracker,
    head: dict[str, Any],
    write_more: Callable[[Run], None],
) -> dict[str, Any]:
    """Deploy a point of the validation curve: judge it once on test, and write everything.

    Args:
        validation: the network's cached outputs for validation images.
        target: what the point was chosen for.
        references: what the point is compared with.
        head: the keys that the summary begins with.
        write_more: writes what else changes (see ``report.write_finished``).

    Returns: the summary.
    """
    data = setup.data
    predictor.policy = policy = ThresholdPolicy(point.rule, point.thresholds).to(setup.device)
    test = cache_exits(predictor.network, data.test.plain(), setup.how)
    judgement = judge_thresholds(setup, predictor, test, validation, "test", references)
    budgeted = budgeted_pairs(test, policy, curve)
    described = describe_thresholds(predictor)
    draw = partial(exit_pictures, cache=test, budgeted=budgeted)

    def write_curve_too(new: Run) -> None:
        save_curve(new, curve, budgeted)
        write_more(new)

    choice = chosen(target, point)
    return write_finished(setup, run, tracker, head, judgement, "thresholds", described, draw, write_curve_too, choice)


def chosen(target: dict[str, Any], point: Point) -> dict[str, Any]:
    """Return what a target was, and what came of it on validation images, for the summary."""
    return {
        **{f"target/{key}": value for key, value in target.items()},
        "rule": point.rule,
        "thresholds": as_text(list(point.thresholds)),
        "val/accuracy": point.accuracy,
        "val/macs_fraction": point.macs_fraction,
    }


def save_curve(run: Run, curve: Curve, test: list[list[float]]) -> None:
    """Write the front of a validation curve, and MACs and accuracy of its points on test, as ``curve.json``."""
    points = [asdict(point) | {"thresholds": as_text(list(point.thresholds))} for point in curve.front()]
    run.save_json("curve.json", {"validation": points, "test": [{"macs": m, "accuracy": a} for m, a in test]})


def budgeted_pairs(test: CachedExits, policy: ThresholdPolicy, curve: Curve) -> list[list[float]]:
    """Return mean MACs and accuracy, on test, of the thresholds that were best on validation, the cheapest first.

    Nothing is chosen here: these are the points of the validation front, whatever they turn out to be on test.
    """
    front = curve.front()
    threshold_PE = front.threshold_PE.to(test.label_M.device)
    exit_PM = torch.stack([exit_of(policy.rule, test.probability_MNC, threshold_E) for threshold_E in threshold_PE])
    accuracy_P, macs_P = test.judge(exit_PM)
    return [[macs, accuracy] for macs, accuracy in zip(macs_P.tolist(), accuracy_P.tolist())]


def show_table(summary: dict[str, Any]) -> None:
    """Print the figures of a run, and what came of its target."""
    show_exits(summary)
    console().print(outcome(summary))


def outcome(summary: dict[str, Any]) -> str:
    """Say what the thresholds were to reach, and what they reach on test."""
    drop = 100 * (summary["test/full_accuracy"] - summary["test/accuracy"])
    if "target/macs_fraction" in summary:
        budget, used = summary["target/macs_fraction"], summary["test/macs_fraction"]
        return f"Budget asked for {budget:.3f} of the full cost, used on test {used:.3f}."
    reached = f"on test it is {_against_last(drop)}."
    if "target/accuracy_drop" in summary:
        allowed = 100 * summary["target/accuracy_drop"]
        return f"Asked for: {'at most' if allowed >= 0 else 'at least'} {_against_last(allowed)}; {reached}"
    return f"The knee of the validation curve; {reached}"


def _against_last(drop: float) -> str:
    """Say how far an accuracy is below the last exit's, in points; if ``drop`` is negative, above."""
    return f"{abs(drop):.2f} points {'below' if round(drop, 2) >= 0 else 'above'} the last exit"
