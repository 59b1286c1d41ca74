"""Small versions of every agent that learns by a loss of its own, for tests of the training loop."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import torch

from policyskip.agents.blockdrop import BlockDrop
from policyskip.agents.branchynet import BranchyNet
from policyskip.agents.cdl import CDL
from policyskip.agents.distiller import Distiller
from policyskip.agents.msdnet import MSDNetAgent
from policyskip.agents.skipnet import SkipNet
from policyskip.backbones.msdnet import MSDNet
from policyskip.backbones.resnet import CifarResNet
from policyskip.backbones.resnet_exits import ResNetExits
from policyskip.data import Feed, TensorImages, crop_and_flip
from policyskip.envs.block_selection import BlockSelectionVectorEnv
from policyskip.parallel.data_parallel import divide
from policyskip.pretraining import Pretrainer
from policyskip.rewards import Budget, Reward
from policyskip.runs.folder import Run
from policyskip.runs.tracking import Tracker
from policyskip.training import train
from tests.conftest import small_backbone, small_images

SHAPE = (3, 12, 12)
DEVICE = torch.device("cpu")
"""The device that learners are made on; tests/gpu changes it."""
Made = tuple[Any, Any, Callable[[], dict[str, torch.Tensor]]]


def augmented() -> TensorImages:
    images = small_images()
    return TensorImages(images.images.to(DEVICE), images.label_N.to(DEVICE), augment=crop_and_flip)


def feed() -> Feed:
    return Feed(augmented(), 16, "shuffled", 0)


def exits() -> ResNetExits:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ResNetExits(small_backbone(), [1, 3], "linear", SHAPE).to(DEVICE)


def msdnet_network() -> MSDNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MSDNet(5, num_exits=2, base=1, step=1, step_mode="even", channels=8, growth_rate=4,
                      growth_factors=[1, 2], bottleneck_factors=[1, 2]).to(DEVICE)  # fmt: skip


def blockdrop(steps: int, reward: Reward | None = None, **options: Any) -> Made:
    env = BlockSelectionVectorEnv(16, backbone=small_backbone().to(DEVICE), images=augmented(), seed=0, reward=reward)
    agent = BlockDrop(env, steps, width=4, samples=2, curriculum=0.5, schedule="onecycle", alpha_end=0.98, **options)
    return agent, env, agent.policy.state_dict


def skipnet(steps: int) -> Made:
    agent = SkipNet(small_backbone().to(DEVICE), SHAPE, steps, supervised=0.5, lr=0.01, hybrid_lr=0.01)
    return agent, feed(), agent.network.state_dict


def pretrain(steps: int, **options: Any) -> Made:
    backbone = small_backbone().to(DEVICE)
    return Pretrainer(backbone, steps, **options), feed(), backbone.state_dict


def deep(steps: int) -> Made:
    """Pretrain from random weights in float64, because in float32 rounding would decide some of the ReLUs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = CifarResNet(32, 5, width=4).to(DEVICE, torch.float64)
    return Pretrainer(backbone, steps), feed(), backbone.state_dict


def exit_agent(kind: Any, network: Callable[[], Any], steps: int, **options: Any) -> Made:
    net = network()
    return kind(net, steps, lr=0.01, **options), feed(), net.state_dict


LEARNERS: dict[str, Callable[[int], Made]] = {
    "blockdrop": blockdrop,
    "blockdrop with a value baseline": lambda steps: blockdrop(steps, baseline="value"),
    "blockdrop on a budget": lambda steps: blockdrop(steps, Budget(0.5)),
    "skipnet": skipnet,
    "msdnet": lambda steps: exit_agent(MSDNetAgent, msdnet_network, steps),
    "branchynet": lambda steps: exit_agent(BranchyNet, exits, steps),
    "branchynet by SGD": lambda steps: exit_agent(BranchyNet, exits, steps, optimizer="sgd"),
    "cdl": lambda steps: exit_agent(CDL, exits, steps),
    "distiller": lambda steps: exit_agent(Distiller, exits, steps),
    "pretrain": pretrain,
    "pretrain a deep network in float64": deep,
    "pretrain with blocks that hardly run": lambda steps: pretrain(steps, stochastic_depth="linear", survival=0.02),
}


def network_of(learner: Any) -> torch.nn.Module:
    """What the learner trains."""
    if hasattr(learner, "backbone"):
        return learner.backbone
    return learner.network if hasattr(learner, "network") else learner.policy


def learn(
    name: str,
    run: Run,
    steps: int = 8,
    resume: bool = False,
    stop_at: int | None = None,
    spoil: Callable[[Any, Any, int], None] | None = None,
) -> bool:
    """Train a learner; ``stop_at`` sends this process a Ctrl-C during that update, and ``spoil`` is called with learner,
    source and number before every one."""
    learner, source, deployable = LEARNERS[name](steps)
    divide(learner, source)
    update, count = learner.update, [run.load_checkpoint()["step"] if resume else 0]

    def counted(source: Any) -> dict[str, float]:
        count[0] += 1
        if count[0] == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        if spoil is not None:
            spoil(learner, source, count[0])
        return update(source)

    learner.update = counted

    def validate() -> dict[str, float]:
        score = float(sum(value.double().sum() for value in deployable().values()))
        return {"score": score, "accuracy": 0.5, "macs_fraction": 0.6}  # these are what a budget looks at

    options = dict(steps=steps, validate_every=3, log_every=2, choose_by="score", resume=resume)
    return train(learner, source, validate, deployable, run, Tracker(run, "none", {}), **options)
