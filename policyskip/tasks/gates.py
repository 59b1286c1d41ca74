"""The family ``gates``: SkipNet learns from labelled images which blocks its gates let run.

It is judged beside its network without gates, the network before training, and its rivals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from policyskip.agents.skipnet import SkipNet
from policyskip.backbones import Backbone, checkpoints
from policyskip.build import Setup, build, wrong_kind
from policyskip.config import Settings, group_of
from policyskip.data import Feed, Images, sequential
from policyskip.deployment.loading import load_best_so_far, load_weights
from policyskip.deployment.policy_files import describe_gates
from policyskip.envs.layer_skip import LayerSkipVectorEnv
from policyskip.errors import UserError
from policyskip.evaluation.block_plots import block_pictures
from policyskip.evaluation.decisions import Decisions
from policyskip.evaluation.evaluate import evaluate_gates
from policyskip.evaluation.figures import block_figures
from policyskip.evaluation.tables import show_blocks
from policyskip.execution.gates import GateExecution
from policyskip.execution.ways import Execution
from policyskip.runs.folder import Run
from policyskip.runs.progress import waiting
from policyskip.runs.tracking import Tracker
from policyskip.static_front import Keep, StaticFront
from policyskip.tasks.base import FamilyTask, Judgement, check_batch, names_of
from policyskip.tasks.fronts import load_front, static_front, with_block_selection
from policyskip.tasks.report import completed, head_of, write_finished
from policyskip.tasks.rivals import block_verdict
from policyskip.tasks.run_rivals import RunRival, load_run_rivals


class GateTask(FamilyTask):
    """The task of gates that decide block by block; the blocks learn with them unless they are frozen.

    Raises:
        UserError: the configuration has an environment or a reward, or no front.
    """

    learner: SkipNet

    def __init__(self, setup: Setup, settings: Settings, others: Sequence[RunRival]) -> None:
        agent = f"agent={str(group_of(setup.config, 'agent').get('_target_')).rpartition('.')[2].lower()}"
        if setup.reward is not None:
            raise UserError(f"{agent} learns by its own loss (agent.alpha, agent.cost) and takes no reward")
        if setup.config.get("env") is not None:
            raise UserError(f"{agent} learns from labelled images and takes no env")
        if settings.front is None:
            raise UserError("the configuration has no front, and skipping blocks needs one")
        self.setup, self.front_settings, self.others = setup, settings.front, others
        self.learner = make_agent(setup)
        self.source = Feed(setup.data.train, setup.batch_size, "shuffled", settings.seed)
        check_batch(self.learner.network.backbone, self.source.batch.images)
        self.names = names_of(setup, self.learner.name, LayerSkipVectorEnv.id)
        full, gates = self.learner.costs.full, self.learner.decision_macs
        self.greeting = (
            f"skipnet learns on {setup.data.name} over {setup.backbone.name} ({full / 1e6:.1f} M MACs, and gates that "
            f"cost {gates / 1e6:.3f} M more, {100 * gates / full:.2f} %)"
        )

    def validate(self) -> dict[str, Any]:
        """Return figures of the greedy decisions on validation images, and of all blocks without gates."""
        return block_figures(self._judged(self.setup.data.validation))

    def deployable(self) -> dict[str, Tensor]:
        return self.learner.network.state_dict()

    def finish(self, run: Run, tracker: Tracker, seconds: float) -> dict[str, Any]:
        """Search the static front of the best weights, judge them once on test, and write everything."""
        setup, agent = self.setup, self.learner
        load_best_so_far(agent.network, run)
        front = static_front(with_network_of(agent, setup), self.front_settings, self._sets_in_use())
        judgement = judge_gates(setup, agent, front, "test", self.others)
        described = describe_gates(agent.network)
        draw = partial(block_pictures, stages=setup.backbone.stages)
        way = GateExecution(agent.network, setup.data.image_shape, *setup.how).way
        head = head_of(setup, self.names, seconds, way)

        def write_more(new: Run) -> None:
            run.deploy_best(new)
            checkpoints.save(agent.network.backbone, new.folder / "network.safetensors")
            front.save(new.folder / "front.json")

        return write_finished(setup, run, tracker, head, judgement, "gates", described, draw, write_more)

    def show(self, summary: dict[str, Any]) -> None:
        show_blocks(summary)
        before = 100 * summary["test/before_accuracy"]
        print(f"Before training, all its blocks kept, the network was right on {before:.2f} %.")

    @staticmethod
    def judge(setup: Setup, run: Run, split: str, compared: bool) -> Judgement:
        agent = make_agent(setup)
        load_weights(agent.network, run, "the run's config.yaml")
        front = load_front(run, setup.backbone.num_blocks, agent.network.backbone.content_hash())
        others = load_run_rivals(run, setup.data.test) if compared else None
        return judge_gates(setup, agent, front, split, others)

    def _judged(self, images: Images) -> Decisions:
        """Return what the gates decide for images."""
        return evaluate_gates(self.learner, images, self.setup.batch_size, self.setup.how)

    def _sets_in_use(self, count: int = 16) -> list[Keep]:
        """Return the keep-sets that the gates decide for most often on validation images."""
        keep_NK = self._judged(self.setup.data.validation).ran_NK
        sets, images = keep_NK.unique(dim=0, return_counts=True)
        return [tuple(keep) for keep in sets[images.argsort(descending=True, stable=True)[:count]].tolist()]


def judge_gates(
    setup: Setup, agent: SkipNet, front: StaticFront, split: str, others: Sequence[RunRival] | None = ()
) -> Judgement:
    """Judge the gates' greedy decisions on a split, beside the network before training, and on test beside its rivals.

    Args:
        others: finished runs to compare with; None: there is no verdict.
    """
    images = setup.data.split(split).plain()
    decisions = evaluate_gates(agent, images, setup.batch_size, setup.how)
    before = accuracy(setup, images)
    figures, pairs = block_figures(decisions) | {"before_accuracy": before}, list[tuple[float, float]]()
    if split == "test":
        keep_VK = None
        if others is not None:
            keep_VK = evaluate_gates(agent, setup.data.validation.plain(), setup.batch_size, setup.how).ran_NK
        verdict, pairs = block_verdict(with_network_of(agent, setup), decisions, keep_VK, front, others)
        figures |= verdict
    frozen = setup.backbone.content_hash() if group_of(setup.config, "agent").get("frozen") else ""
    return Judgement(completed(decisions, setup, split, pairs, frozen), figures)


def make_agent(setup: Setup) -> SkipNet:
    """Build the agent of a configuration, before it has learned.

    Raises:
        UserError: the network has no blocks to skip, or the agent refuses its settings.
    """
    if not isinstance(setup.backbone, Backbone):
        raise UserError(f"{setup.backbone.name} has exits, not blocks to skip; say backbone=resnet32_digits")
    agent: SkipNet = build(
        "agent",
        group_of(setup.config, "agent"),
        setup.trusted,
        backbone=setup.backbone,
        image_shape=setup.data.image_shape,
        total_steps=setup.config["train"]["steps"],
        seed=setup.config["seed"],
    )
    if not isinstance(agent, SkipNet):
        raise UserError(
            wrong_kind("agent", group_of(setup.config, "agent"), agent, "policyskip.agents.skipnet.SkipNet")
        )
    return agent


def with_network_of(agent: SkipNet, setup: Setup) -> Setup:
    """Return a setup over the agent's own network, whose fixed keep-sets are judged in ``BlockSelection-v0``."""
    return replace(with_block_selection(setup), backbone=agent.network.backbone.eval())


@torch.no_grad()
def accuracy(setup: Setup, images: Images) -> float:
    """Return the share of the images that a configuration's network with all its blocks gets right."""
    execution = Execution(setup.backbone.eval(), setup.data.image_shape, *setup.how, as_it_is=True)
    right = 0
    with waiting("judging the network without gates", len(images)) as wait:
        for batch in images.stream(sequential(len(images), setup.batch_size)):
            right += int((execution.whole(batch.images).argmax(1) == batch.label_B).sum())
            wait.advance(len(batch))
    return right / len(images)
