"""The family ``blocks``: an agent decides which blocks of a frozen network run.

Shapes: B images, K blocks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from policyskip.agents.base import Agent
from policyskip.backbones import Backbone
from policyskip.build import Setup
from policyskip.config import FrontSection
from policyskip.deployment.policy_files import describe, load_weights
from policyskip.errors import UserError
from policyskip.evaluation.decisions import Decisions
from policyskip.evaluation.evaluate import evaluate
from policyskip.evaluation.figures import block_figures
from policyskip.evaluation.tables import show_blocks
from policyskip.parallel import processes
from policyskip.policies.networks import KeepPolicy
from policyskip.runs.folder import Run
from policyskip.runs.tracking import Tracker
from policyskip.static_front import StaticFront
from policyskip.tasks.base import check_batch, id_of
from policyskip.tasks.fronts import best_set, load_front, static_figures, static_front
from policyskip.tasks.report import report


def judge(setup: Setup, agent: Agent, split: str = "test") -> Decisions:
    """The agent on a split, beside the full network. The test split is read once a run, after everything is chosen."""
    return evaluate(agent, setup.env(setup.data.split(split).plain()))


class BlockTask:
    """An agent that decides which blocks run, judged beside the full network and the static front."""

    choose_by, trains = "reward", None

    def __init__(self, setup: Setup, wanted: FrontSection) -> None:
        if not isinstance(setup.backbone, Backbone):
            raise UserError(f"{setup.backbone.name} has exits, not blocks to skip; say backbone=resnet32_digits")
        if setup.reward is None:
            raise UserError("the configuration has no reward, and this command needs one")
        self.setup = setup
        self.source = env = setup.env(setup.data.train, "shuffled", setup.config["seed"])
        everything = torch.ones(len(env.observation), env.backbone.num_blocks, dtype=torch.bool, device=env.device)
        env.rewards(env.score(everything))  # a reward that fails is refused before there is a run folder
        policy = setup.agent(env).policy  # likewise, and before the front is searched
        if isinstance(policy, KeepPolicy):
            check_batch(policy, env.feed.batch.images)
        self.front = processes.first(lambda: static_front(setup, wanted))
        best = processes.first(lambda: best_set(setup, self.front))
        self.learner: Agent = setup.agent(env, self.front, best)
        self.validation = setup.env(setup.data.validation)
        self.names = dict(
            agent=self.learner.name,
            env=id_of(setup),
            backbone=setup.backbone.name,
            data=setup.data.name,
        )
        self.greeting = (
            f"{self.names['agent']} {'learns' if setup.config['train']['steps'] else 'is judged'} on "
            f"{setup.data.name} over {setup.backbone.name} ({env.costs.full / 1e6:.1f} M MACs)"
        )

    def validate(self) -> dict[str, Any]:
        """Figures of the greedy decisions on validation images."""
        return block_figures(evaluate(self.learner, self.validation, full=False))

    def deployable(self) -> dict[str, Tensor]:
        return self.learner.policy.state_dict()

    def finish(self, run: Run, tracker: Tracker, seconds: float) -> dict[str, Any]:
        """Judge the best weights once on test; write summary, deployable files and pictures; close the tracker."""
        setup, agent = self.setup, self.learner
        load_best(agent, run)
        result = judge(setup, agent)
        policy = describe(
            agent.policy,
            setup.backbone,
            setup.config["backbone"],
            setup.data.classes,
            setup.data.image_shape,
            result.policy_macs,
        )
        frozen = setup.backbone.content_hash()
        return report(setup, self.names, result, self.front, policy, run, tracker, seconds, frozen)

    def show(self, summary: dict[str, Any]) -> None:
        """Print the table."""
        show_blocks(summary)


def again(setup: Setup, run: Run, split: str) -> dict[str, Any]:
    """A finished run's figures on a split, from its folder."""
    result, front = _judged_again(setup, run, split)
    return block_figures(result) | static_figures(setup, result, front, split)[0]


def decide_again(setup: Setup, run: Run) -> Decisions:
    """A finished run's decisions on test images, from its folder."""
    result, front = _judged_again(setup, run, "test")
    _, curve = static_figures(setup, result, front)
    data, frozen = setup.data, setup.backbone.content_hash()
    return replace(
        result,
        static_F2=torch.tensor(curve, dtype=torch.float64).reshape(-1, 2),
        images=data.test.fingerprint(),
        network=frozen,
        classes=data.classes,
    )


def _judged_again(setup: Setup, run: Run, split: str) -> tuple[Decisions, StaticFront]:
    if setup.reward is None:
        raise UserError("the configuration has no reward, and this command needs one")
    if not isinstance(setup.backbone, Backbone):
        raise UserError(f"{setup.backbone.name} has exits, not blocks to skip")
    front = load_front(run, setup.backbone.num_blocks)
    agent = setup.agent(setup.env(setup.data.validation, "shuffled"), front)  # shuffled, which is what SB3 asks for
    load_best(agent, run)
    return judge(setup, agent, split), front


def load_best(agent: Agent, run: Run) -> None:
    """Put the run's best weights into the agent's policy."""
    load_weights(agent.policy, run, "the run's config.yaml")
