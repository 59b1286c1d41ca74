"""The family ``exit_policy``: network and exits are frozen, and an agent learns where each image leaves.

Shapes: M images of a set, N exits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from policyskip.agents.base import Agent
from policyskip.backbones import ExitNetwork, checkpoints
from policyskip.backbones.exits import in_millions
from policyskip.build import Setup
from policyskip.config import Settings, group_of
from policyskip.deployment.loading import load_best_so_far, load_predictor
from policyskip.deployment.policy_files import describe_exit_policy
from policyskip.deployment.predictors import ExitPredictor
from policyskip.errors import UserError
from policyskip.evaluation.evaluate import exit_decisions
from policyskip.evaluation.exit_plots import exit_pictures
from policyskip.evaluation.figures import exit_figures
from policyskip.evaluation.tables import show_exits
from policyskip.exits.cache import CachedExits, cache_exits
from policyskip.exits.references import static_pairs
from policyskip.exits.rules import decisions_at, first_exit
from policyskip.policies.perceptrons import ExitPolicy
from policyskip.rewards import Outcome, reward_of
from policyskip.runs.folder import Run
from policyskip.runs.tracking import Tracker
from policyskip.tasks.base import FamilyTask, Judgement, names_of
from policyskip.tasks.report import completed, head_of, write_finished
from policyskip.tasks.rivals import exit_verdict, front_of_trunk
from policyskip.tasks.run_rivals import References, RunRival


class ExitPolicyTask(FamilyTask):
    """The task of an agent that decides at every exit of a frozen network; it is judged beside its rivals and the
    oracle.

    Raises:
        UserError: the network has no early exits, there is no reward, or there is a target.
    """

    def __init__(self, setup: Setup, settings: Settings, others: Sequence[RunRival]) -> None:
        network = setup.backbone
        if settings.target is not None and settings.target.chosen:
            raise UserError("target is for thresholds; a learned policy has none, and follows reward.penalty")
        if not isinstance(network, ExitNetwork) or network.num_exits < 2:
            raise UserError(f"{network.name} has no early exits; say backbone=resnet32_digits_exits")
        if setup.reward is None:
            raise UserError("the configuration has no reward, and this command needs one; say reward=macs")
        self.setup, self.network, self.reward, self.front_settings = setup, network, setup.reward, settings.front
        self.others = others
        self.source = env = setup.env(setup.data.train, "shuffled", settings.seed)
        everyone = torch.ones(len(env.observation), dtype=torch.bool, device=env.device)
        reward_of(self.reward, env.score(everyone))  # a reward that fails is refused before there is a run folder
        self.learner: Agent = setup.agent(env)
        if not callable(getattr(self.learner.policy, "leave", None)):
            kind, node = "such as policyskip.policies.perceptrons.ExitPolicy", group_of(setup.config, "agent")
            got = type(self.learner.policy).__name__
            raise UserError(f"agent: {node['_target_']} must set policy to one with leave(), {kind}, got {got}")
        self.validation = cache_exits(network, setup.data.validation.plain(), setup.how)
        name = self.learner.name
        self.names = names_of(setup, name, env.id)
        right = ", ".join(f"{100 * a:.1f}" for a in self.validation.correct_MN.double().mean(0).tolist())
        self.greeting = (
            f"{name} learns on {setup.data.name} over {network.name}, whose {network.num_exits} exits are right on "
            f"{right} % of the validation images and cost {in_millions(env.costs.cumulative_N)}"
        )

    def validate(self) -> dict[str, Any]:
        """Return figures of the greedy decisions on validation images."""
        exit_M = exits_of(self.policy, self.validation)
        outcome = outcome_of(exit_M, self.validation)
        macs_M = outcome.macs_B + self.learner.decision_macs * decisions_at(exit_M, self.network.num_exits)
        reward_M = reward_of(self.reward, outcome)
        return {
            "reward": reward_M.double().mean().item(),
            "accuracy": outcome.correct_B.double().mean().item(),
            "macs_fraction": macs_M.mean().item() / outcome.full_macs,
            "exit_mean": exit_M.double().mean().item(),
        }

    @property
    def policy(self) -> ExitPolicy:
        """Return the agent's policy, which is asked at every exit."""
        return self.learner.policy  # type: ignore[return-value]

    def deployable(self) -> dict[str, Tensor]:
        return self.policy.state_dict()

    def finish(self, run: Run, tracker: Tracker, seconds: float) -> dict[str, Any]:
        setup, data, agent, policy = self.setup, self.setup.data, self.learner, self.policy
        load_best_so_far(policy, run)
        predictor = ExitPredictor(policy, self.network, data.classes, data.image_shape, agent.decision_macs, setup.how)
        test = cache_exits(predictor.network, data.test.plain(), setup.how)
        validation = cache_exits(predictor.network, data.validation.plain(), setup.how)
        references = References(front_of_trunk(setup, self.network, self.front_settings), self.others)
        judgement = judge_exit_policy(setup, predictor, test, validation, "test", references)
        described = describe_exit_policy(predictor)
        draw = partial(exit_pictures, cache=test, budgeted=[])
        head = head_of(setup, self.names, seconds, predictor.execution.way)

        def write_more(new: Run) -> None:
            run.deploy_best(new)
            checkpoints.save(self.network, new.folder / "network.safetensors")
            references.save(new)

        return write_finished(setup, run, tracker, head, judgement, "exit_policy", described, draw, write_more)

    def show(self, summary: dict[str, Any]) -> None:
        show_exits(summary)

    @staticmethod
    def judge(setup: Setup, run: Run, split: str, compared: bool) -> Judgement:
        """Judge a finished run's best weights, from its folder, on a split.

        Raises:
            UserError: ``policy.json`` is not that of a policy that leaves early.
        """
        predictor = load_predictor(run, setup.device, trust=setup.trusted, how=setup.how)
        if not isinstance(predictor, ExitPredictor):
            raise UserError(f"{run.folder / 'policy.json'} is not that of a policy that leaves early")
        cache, validation = cache_exits(predictor.network, setup.data.split(split).plain(), setup.how), None
        references = None
        if compared:
            validation = cache_exits(predictor.network, setup.data.validation.plain(), setup.how)
            references = References.load(run, predictor, setup.data.test)
        return judge_exit_policy(setup, predictor, cache, validation, split, references)


def judge_exit_policy(
    setup: Setup,
    predictor: ExitPredictor,
    cache: CachedExits,
    validation: CachedExits | None,
    split: str,
    references: References | None,
) -> Judgement:
    """Judge a policy on the cached outputs of a split; on test, beside rivals chosen on validation images, if these
    are given."""
    exit_M = exits_of(predictor.policy, cache)
    difficulty = setup.data.split(split).difficulty
    record = exit_decisions(exit_M, cache, predictor.decision_macs, difficulty)
    decisions = completed(record, setup, split, static_pairs(cache), setup.backbone.content_hash())
    figures = exit_figures(decisions, cache)
    if split == "test" and validation is not None and references is not None:
        given = (setup, predictor.network, decisions, cache, validation)
        figures |= exit_verdict(*given, references.front, references.others)
    return Judgement(decisions, figures)


@torch.no_grad()
def exits_of(policy: ExitPolicy, cache: CachedExits) -> Tensor:
    """Return where each image leaves, int64 (M,), when every exit's outputs are known."""
    rows = torch.arange(len(cache), device=cache.label_M.device)
    early = cache.logits_MNC[:, :-1].unbind(1)
    return first_exit(torch.stack([policy.leave(n, logits_MC, rows) for n, logits_MC in enumerate(early)], 1))


def outcome_of(exit_M: Tensor, cache: CachedExits) -> Outcome:
    """Return the outcome of leaving at exits int64 (M,)."""
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
