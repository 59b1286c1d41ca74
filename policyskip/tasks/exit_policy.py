"""Leaving early by a learned policy: the network and its exits are frozen, and an agent learns where each image leaves.

Shapes: M images of a set, N exits, E early exits (N - 1).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from policyskip.agents.base import Agent
from policyskip.backbones import ExitNetwork, checkpoints
from policyskip.backbones.exits import in_millions
from policyskip.build import Setup
from policyskip.deployment.policy_files import describe_leaving, load_leaving_run
from policyskip.deployment.predictors import ExitPredictor
from policyskip.errors import UserError
from policyskip.evaluation import decisions, exit_plots
from policyskip.evaluation.decisions import Decisions, collapse_warnings
from policyskip.evaluation.evaluate import exit_decisions
from policyskip.evaluation.figures import exit_figures
from policyskip.evaluation.tables import show_exits
from policyskip.exits.cache import CachedExits, cache_exits
from policyskip.exits.references import static_pairs
from policyskip.exits.rules import decisions_at, first_exit
from policyskip.policies.perceptrons import ExitPolicy
from policyskip.rewards import Outcome, reward_of
from policyskip.runs.folder import Run
from policyskip.runs.tracking import Tracker
from policyskip.tasks import blocks
from policyskip.tasks.base import id_of


class LeavingTask:
    """An agent that decides at every exit of a frozen network, judged beside fixed and random exits and the oracle."""

    choose_by, trains = "reward", None

    def __init__(self, setup: Setup) -> None:
        network = setup.backbone
        if not isinstance(network, ExitNetwork) or network.num_exits < 2:
            raise UserError(f"{network.name} has no early exits; say backbone=resnet32_digits_exits")
        if setup.reward is None:
            raise UserError("the configuration has no reward, and this command needs one; say reward=macs")
        self.setup, self.network = setup, network
        self.source = env = setup.env(setup.data.train, "shuffled", setup.config["seed"])
        everyone = torch.ones(len(env.observation), dtype=torch.bool, device=env.device)
        reward_of(setup.reward, env.score(everyone))  # a reward that fails is refused before there is a run folder
        self.learner: Agent = setup.agent(env)
        self.validation = cache_exits(network, setup.data.validation.plain())
        name = self.learner.name
        self.names = dict(agent=name, env=id_of(setup), backbone=network.name, data=setup.data.name)
        right = ", ".join(f"{100 * a:.1f}" for a in self.validation.correct_MN.double().mean(0).tolist())
        self.greeting = (
            f"{name} learns on {setup.data.name} over {network.name}, whose {network.num_exits} exits are right on "
            f"{right} % of the validation images and cost {in_millions(env.costs.cumulative_N)}"
        )

    @property
    def policy(self) -> ExitPolicy:
        policy = self.learner.policy
        assert isinstance(policy, ExitPolicy)
        return policy

    def validate(self) -> dict[str, Any]:
        """Figures of the greedy decisions on validation images."""
        exit_M = exits_of(self.policy, self.validation)
        outcome = outcome_of(exit_M, self.validation)
        macs_M = outcome.macs_B + self.learner.decision_macs * decisions_at(exit_M, self.network.num_exits)
        reward_M = reward_of(self.setup.reward, outcome)  # type: ignore[arg-type]
        return {
            "reward": reward_M.double().mean().item(),
            "accuracy": outcome.correct_B.double().mean().item(),
            "macs_fraction": macs_M.mean().item() / outcome.full_macs,
            "exit_mean": exit_M.double().mean().item(),
        }

    def deployable(self) -> dict[str, Tensor]:
        return self.policy.state_dict()

    def finish(self, run: Run, tracker: Tracker, seconds: float) -> dict[str, Any]:
        """Judge the best weights once on test; write summary, deployable files and pictures; close the tracker."""
        setup, data, agent = self.setup, self.setup.data, self.learner
        blocks.load_best(agent, run)
        predictor = ExitPredictor(self.policy, self.network, data.classes, data.image_shape, agent.decision_macs)
        test = cache_exits(predictor.network, data.test.plain())
        exit_M = exits_of(self.policy, test)
        head = {"seed": setup.config["seed"], "steps": setup.config["train"]["steps"], "seconds": round(seconds, 1)}
        judged = decisions_of(setup, exit_M, test, agent.decision_macs)
        figures = exit_figures(judged, test, self.validation)
        told = decisions.save_decisions(judged, run)
        summary = {**self.names, **head, **told, **{f"test/{key}": value for key, value in figures.items()}}
        summary["warnings"] = collapse_warnings(judged)
        checkpoints.save(self.network, run.folder / "network.safetensors")
        run.save_json("summary.json", summary)
        pictures = exit_plots.exit_pictures(run.folder / "plots", run.metrics(), judged, test, [], data.test)
        # The last, so that what is deployed has figures; with it, the run is finished.
        run.save_json("policy.json", describe_leaving(predictor) | {"steps": head["steps"]})
        written = ("best.safetensors", "network.safetensors", "policy.json", "summary.json", "config.yaml")
        files = [run.folder / name for name in written]
        tracker.finish(summary, pictures, files, decisions.examples(judged, data.test))
        return summary

    def show(self, summary: dict[str, Any]) -> None:
        """Print the table."""
        show_exits(summary)


@torch.no_grad()
def exits_of(policy: ExitPolicy, cache: CachedExits) -> Tensor:
    """Where each image leaves, int64 (M,), when every exit's outputs are known."""
    rows = torch.arange(len(cache), device=cache.label_M.device)
    early = cache.logits_MNC[:, :-1].unbind(1)
    return first_exit(torch.stack([policy.leave(n, logits_MC, rows) for n, logits_MC in enumerate(early)], 1))


def outcome_of(exit_M: Tensor, cache: CachedExits) -> Outcome:
    """What comes of leaving at exits int64 (M,)."""
    N, rows = cache.num_exits, torch.arange(len(cache), device=exit_M.device)
    ran_NN = torch.ones(N, N, dtype=torch.bool, device=exit_M.device).tril()
    return Outcome(
        cache.logits_MNC[rows, exit_M],
        cache.label_M,
        cache.correct_MN[rows, exit_M],
        ran_NN[exit_M],
        cache.macs_N[exit_M],
        cache.costs.full,
    )


def anytime_of(cache: CachedExits) -> list[list[float]]:
    """MACs and accuracy of each exit for all images."""
    return static_pairs(cache)


def decisions_of(setup: Setup, exit_M: Tensor, test: CachedExits, decision_macs: float) -> Decisions:
    """What leaving at exits int64 (M,) did with each test image; the network was frozen."""
    data, frozen = setup.data, setup.backbone.content_hash()
    fingerprint = data.test.fingerprint()
    return replace(
        exit_decisions(exit_M, test, decision_macs, data.test.difficulty),
        static_F2=torch.tensor(static_pairs(test), dtype=torch.float64),
        images=fingerprint,
        network=frozen,
        classes=data.classes,
    )


def decide_again(setup: Setup, run: Run) -> Decisions:
    """A finished run's decisions on test images, from its folder."""
    predictor = load_leaving_run(run, setup.device)
    cache = cache_exits(predictor.network, setup.data.test.plain())
    return decisions_of(setup, exits_of(predictor.policy, cache), cache, predictor.decision_macs)


def again(setup: Setup, run: Run, split: str) -> dict[str, Any]:
    """A finished run's figures on a split, from its folder."""
    predictor = load_leaving_run(run, setup.device)
    cache = cache_exits(predictor.network, setup.data.split(split).plain())
    validation = cache_exits(predictor.network, setup.data.validation.plain())
    judged = exit_decisions(exits_of(predictor.policy, cache), cache, predictor.decision_macs)
    return exit_figures(judged, cache, validation)
