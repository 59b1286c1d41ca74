"""Skipping blocks by gates: SkipNet learns from labelled images; beside it stand its network without gates, the network
before training, and the static front.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from policyskip.agents.skipnet import SkipNet
from policyskip.backbones import Backbone, checkpoints
from policyskip.build import Setup, build
from policyskip.config import FrontSection, group_of
from policyskip.data import Feed, Images, sequential
from policyskip.deployment.policy_files import describe_gates, load_weights
from policyskip.errors import UserError
from policyskip.evaluation.decisions import Decisions
from policyskip.evaluation.evaluate import evaluate_gates
from policyskip.evaluation.figures import block_figures
from policyskip.evaluation.tables import show_blocks
from policyskip.runs.folder import Run
from policyskip.runs.tracking import Tracker
from policyskip.static_front import Keep
from policyskip.tasks.base import check_batch
from policyskip.tasks.fronts import all_at_once, load_front, static_figures, static_front
from policyskip.tasks.report import report


class LayerTask:
    """Gates that decide block by block, and the blocks themselves unless they are frozen."""

    choose_by = "reward"

    def __init__(self, setup: Setup, wanted: FrontSection) -> None:
        if setup.reward is not None:
            raise UserError("agent=skipnet learns by its own loss (agent.alpha, agent.cost) and takes no reward")
        if setup.config.get("env") is not None:
            raise UserError("agent=skipnet learns from labelled images and takes no env")
        self.setup, self.wanted, self.trains = setup, wanted, setup.backbone
        self.learner = make_agent(setup)
        self.source = Feed(setup.data.train, setup.batch_size, "shuffled", setup.config["seed"])
        check_batch(self.learner.network.backbone, self.source.batch.images)
        self.names = dict(
            agent=self.learner.name, env="LayerSkip-v0", backbone=setup.backbone.name, data=setup.data.name
        )
        full, gates = self.learner.costs.full, self.learner.decision_macs
        self.greeting = (
            f"skipnet learns on {setup.data.name} over {setup.backbone.name} ({full / 1e6:.1f} M MACs, and gates that "
            f"cost {gates / 1e6:.3f} M more, {100 * gates / full:.2f} %)"
        )

    def validate(self) -> dict[str, Any]:
        """Figures of the greedy decisions on validation images, and of all blocks without gates."""
        return block_figures(evaluate_gates(self.learner, self.setup.data.validation, self.setup.batch_size))

    def deployable(self) -> dict[str, Tensor]:
        return self.learner.network.state_dict()

    def finish(self, run: Run, tracker: Tracker, seconds: float) -> dict[str, Any]:
        """Search the static front of the best weights, judge them once on test, and write everything."""
        agent, data = self.learner, self.setup.data
        load_best(agent, run)
        trained = with_network(self.setup, agent)
        front = static_front(trained, self.wanted, self._sets_in_use())
        checkpoints.save(agent.network.backbone, run.folder / "network.safetensors")
        policy = describe_gates(agent.network, data.classes, data.image_shape)
        test = data.test.plain()
        result = evaluate_gates(agent, test, self.setup.batch_size)
        before = accuracy(self.setup.backbone, test, self.setup.batch_size)
        frozen = frozen_network(self.setup)
        told = (policy, run, tracker, seconds, frozen)
        return report(trained, self.names, result, front, *told, before_accuracy=before)

    def _sets_in_use(self, count: int = 16) -> list[Keep]:
        """The keep-sets that the gates decide for most often on validation images."""
        keep_NK = evaluate_gates(self.learner, self.setup.data.validation, self.setup.batch_size).ran_NK
        sets, images = keep_NK.unique(dim=0, return_counts=True)
        return [tuple(keep) for keep in sets[images.argsort(descending=True, stable=True)[:count]].tolist()]

    def show(self, summary: dict[str, Any]) -> None:
        """Print the table."""
        show_blocks(summary)
        before = 100 * summary["test/before_accuracy"]
        print(f"Before training, all its blocks kept, the network was right on {before:.2f} %.")


def make_agent(setup: Setup) -> SkipNet:
    """The agent of a configuration, before it has learned."""
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
    return agent


def with_network(setup: Setup, agent: SkipNet) -> Setup:
    """The same data and settings over the agent's own network, whose fixed keep-sets are judged in BlockSelection."""
    return replace(all_at_once(setup), backbone=agent.network.backbone.eval())


@torch.no_grad()
def accuracy(backbone: Backbone, images: Images, batch_size: int) -> float:
    """Share of the images that a network with all its blocks gets right."""
    backbone.eval()
    batches = images.stream(sequential(len(images), batch_size))
    return sum(int((backbone(b.images).argmax(1) == b.label_B).sum()) for b in batches) / len(images)


def again(setup: Setup, run: Run, split: str) -> dict[str, Any]:
    """A finished run's figures on a split, from its folder."""
    agent = make_agent(setup)
    load_best(agent, run)
    images = setup.data.split(split).plain()
    result = evaluate_gates(agent, images, setup.batch_size)
    before = accuracy(setup.backbone, images, setup.batch_size)
    static, _ = static_figures(with_network(setup, agent), result, load_front(run, setup.backbone.num_blocks), split)
    return block_figures(result) | {"before_accuracy": before} | static


def frozen_network(setup: Setup) -> str:
    """Content hash of a network that the gates leave as it is; "" where it learns with them."""
    network: Backbone = setup.backbone
    return network.content_hash() if group_of(setup.config, "agent").get("frozen") else ""


def decide_again(setup: Setup, run: Run) -> Decisions:
    """A finished run's decisions on test images, from its folder."""
    frozen, agent, data = frozen_network(setup), make_agent(setup), setup.data
    load_best(agent, run)
    result = evaluate_gates(agent, data.test.plain(), setup.batch_size)
    _, curve = static_figures(with_network(setup, agent), result, load_front(run, setup.backbone.num_blocks))
    return replace(
        result,
        static_F2=torch.tensor(curve, dtype=torch.float64).reshape(-1, 2),
        images=data.test.fingerprint(),
        network=frozen,
        classes=data.classes,
    )


def load_best(agent: SkipNet, run: Run) -> None:
    """Put the run's best weights into the agent's network."""
    load_weights(agent.network, run, "the run's config.yaml")
