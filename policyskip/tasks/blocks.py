"""The family ``blocks``: an agent decides which blocks of a frozen network run.

It is judged beside the full network and its rivals.

Shapes: B images, K blocks.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from policyskip import registry
from policyskip.agents.base import Agent
from policyskip.backbones import Backbone
from policyskip.build import Setup, class_of
from policyskip.config import Settings, group_of
from policyskip.deployment.loading import load_best_so_far, load_weights
from policyskip.deployment.policy_files import describe_blocks
from policyskip.envs.base import DecisionEnv
from policyskip.errors import UserError
from policyskip.evaluation.block_plots import block_pictures
from policyskip.evaluation.evaluate import evaluate
from policyskip.evaluation.figures import block_figures
from policyskip.evaluation.tables import show_blocks
from policyskip.parallel import processes
from policyskip.policies.networks import KeepPolicy
from policyskip.runs.folder import Run
from policyskip.runs.tracking import Tracker
from policyskip.static_front import StaticFront
from policyskip.tasks.base import FamilyTask, Judgement, check_batch, names_of
from policyskip.tasks.fronts import best_set, load_front, remembered_front, static_front
from policyskip.tasks.report import completed, head_of, write_finished
from policyskip.tasks.rivals import block_verdict
from policyskip.tasks.run_rivals import RunRival, load_run_rivals
from policyskip.texts import a_type


class BlockTask(FamilyTask):
    """The task of an agent that decides which blocks run; it is judged beside the full network and the static front.

    Raises:
        UserError: the configuration has no network with blocks, no reward or no front.
    """

    def __init__(self, setup: Setup, settings: Settings, others: Sequence[RunRival]) -> None:
        _check(setup)
        if settings.front is None:
            raise UserError("the configuration has no front, and skipping blocks needs one")
        self.setup, self.others = setup, others
        self.source = env = setup.env(setup.data.train, "shuffled", settings.seed)
        everything = torch.ones(len(env.observation), env.backbone.num_blocks, dtype=torch.bool, device=env.device)
        env.rewards(env.score(everything))  # a reward that fails is refused before there is a run folder
        front_settings = settings.front
        if remembered_front(setup, front_settings) is None:  # an agent that fails is refused before the long search
            _check_policy(setup.agent(env), env)
        self.front = processes.first(lambda: static_front(setup, front_settings))
        best = processes.first(lambda: best_set(setup, self.front)) if _takes_best_set(setup) else None
        self.learner: Agent = setup.agent(env, self.front, best)
        _check_policy(self.learner, env)
        self.validation = setup.env(setup.data.validation)
        self.names = names_of(setup, self.learner.name, env.id)
        self.greeting = (
            f"{self.learner.name} {'learns' if settings.train.steps else 'is judged'} on "
            f"{setup.data.name} over {setup.backbone.name} ({env.costs.full / 1e6:.1f} M MACs)"
        )

    def validate(self) -> dict[str, Any]:
        """Return figures of the greedy decisions on validation images."""
        return block_figures(evaluate(self.learner, self.validation, full=False))

    def deployable(self) -> dict[str, Tensor]:
        return self.learner.policy.state_dict()

    def finish(self, run: Run, tracker: Tracker, seconds: float) -> dict[str, Any]:
        setup, policy = self.setup, self.learner.policy
        load_best_so_far(policy, run)
        judgement = judge_policy(setup, self.learner, self.front, "test", self.others)
        macs = judgement.decisions.policy_macs
        described = describe_blocks(policy, macs, setup.backbone, setup.config["backbone"], setup.config["seed"])
        draw = partial(block_pictures, stages=setup.backbone.stages)
        way = str(getattr(getattr(self.validation, "execution", None), "way", "unknown"))  # of an env of one's own
        head = head_of(setup, self.names, seconds, way)

        def write_more(new: Run) -> None:
            run.deploy_best(new)
            self.front.save(new.folder / "front.json")

        return write_finished(setup, run, tracker, head, judgement, "blocks", described, draw, write_more)

    def show(self, summary: dict[str, Any]) -> None:
        show_blocks(summary)

    @staticmethod
    def judge(setup: Setup, run: Run, split: str, compared: bool) -> Judgement:
        _check(setup)
        front = load_front(run, setup.backbone.num_blocks, setup.backbone.content_hash())
        agent = setup.agent(setup.env(setup.data.validation, "shuffled"), front)  # SB3 asks for a shuffled order
        load_weights(agent.policy, run, "the run's config.yaml")
        others = load_run_rivals(run, setup.data.test) if compared else None
        return judge_policy(setup, agent, front, split, others)


def judge_policy(
    setup: Setup, agent: Agent, front: StaticFront, split: str, others: Sequence[RunRival] | None = ()
) -> Judgement:
    """Judge an agent's greedy decisions on a split, beside the full network, and on test beside its rivals.

    The test split is read once a run, after everything has been chosen. On the other splits there is no verdict:
    rivals are chosen on validation images, and the policy has learned from training images.

    Args:
        others: finished runs to compare with; None: there is no verdict.
    """
    decisions = evaluate(agent, setup.env(setup.data.split(split).plain()))
    figures, pairs = block_figures(decisions), list[tuple[float, float]]()
    if split == "test":
        validation = None
        if not agent.sees_the_label and others is not None:
            validation = evaluate(agent, setup.env(setup.data.validation.plain()), full=False).ran_NK
        verdict, pairs = block_verdict(setup, decisions, validation, front, others)
        figures |= verdict
    return Judgement(completed(decisions, setup, split, pairs, setup.backbone.content_hash()), figures)


def _takes_best_set(setup: Setup) -> bool:
    """Return whether the configuration's agent asks for the fixed set of the highest reward, which takes a while."""
    with suppress(TypeError, ValueError):  # a callable without a signature: it is given the set
        declared = inspect.signature(class_of(setup.config, "agent", setup.trusted)).parameters
        return "best" in declared or bool(group_of(setup.config, "agent").get("warm_start"))
    return True


def _check_policy(agent: Agent, env: DecisionEnv) -> None:
    """Refuse a batch that is too small for the agent's policy network to learn from, and decisions of a wrong shape.

    Raises:
        UserError: the batch or the decisions are refused, or the agent fails.
    """
    if isinstance(agent.policy, KeepPolicy):
        check_batch(agent.policy, env.feed.batch.images)
    if agent.sees_the_label:
        return
    with registry.naming_failures(f"the agent {agent.name}"), torch.random.fork_rng(devices=[]):
        action = agent.decide(env)
    expected = (len(env.observation), *(env.single_action_space.shape or ()))
    if not isinstance(action, Tensor) or (action.dtype, tuple(action.shape)) != (torch.bool, expected):
        found = f"{action.dtype} {tuple(action.shape)}" if isinstance(action, Tensor) else a_type(action)
        raise UserError(f"the agent {agent.name} must decide with a tensor torch.bool {expected} here, got {found}")


def _check(setup: Setup) -> None:
    """Refuse a setup (UserError) whose network has no blocks to skip, or which has no reward."""
    if not isinstance(setup.backbone, Backbone):
        raise UserError(f"{setup.backbone.name} has exits, not blocks to skip; say backbone=resnet32_digits")
    if setup.reward is None:
        raise UserError("the configuration has no reward, and this command needs one")
