"""An agent that its family cannot use is refused in one line when the task is made, before there is a run folder."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from policyskip.agents.fixed import FixedAgent
from policyskip.backbones.resnet_exits import ResNetExits
from policyskip.build import Setup
from policyskip.config import TargetSection
from policyskip.data import Data
from policyskip.errors import UserError
from policyskip.policies.fixed import OraclePolicy
from policyskip.rewards import Macs
from policyskip.tasks.exit_policy import ExitPolicyTask
from policyskip.tasks.gates import GateTask
from policyskip.tasks.thresholds import ThresholdTask
from tests.conftest import small_backbone, small_images

MADE = f"{__name__}.decides_without_leave"
EXITS = {"_target_": "policyskip.envs.early_exit.EarlyExitVectorEnv"}
GAVE = f"agent._target_={MADE} gave a FixedAgent; it must be a policyskip.agents"


def decides_without_leave() -> FixedAgent:
    """An agent of another family, whose policy has no method ``leave``."""
    return FixedAgent("mine", OraclePolicy())


@pytest.mark.parametrize(
    ("task", "exits", "changes", "target", "message"),
    [
        (GateTask, False, {}, None, f"{GAVE}.skipnet.SkipNet"),
        (ThresholdTask, True, {"env": EXITS}, 0.9, f"{GAVE}.early_exit.EarlyExitAgent"),
        (ExitPolicyTask, True, {"env": EXITS}, None, rf"agent: {MADE} must set policy to one with leave\(\)"),
    ],
)
def test_an_agent_of_another_family_is_refused_by_name(task, exits, changes, target, message):
    images, shape = small_images(), (3, 12, 12)
    data = Data("made up", images, images, images, tuple("abcde"), shape)
    config: dict[str, Any] = {"agent": {"_target_": MADE}, "train": {"steps": 1}, "seed": 0, **changes}
    network = ResNetExits(small_backbone(), [1, 3], "pooled", shape).freeze() if exits else small_backbone()
    reward = Macs() if task is ExitPolicyTask else None
    settings: Any = SimpleNamespace(
        target=TargetSection(accuracy_drop=None, macs_fraction=target, knee=False),
        front=SimpleNamespace(rivals=[]),
        train=SimpleNamespace(steps=1),
        seed=0,
    )
    with pytest.raises(UserError, match=message):
        task(Setup(config, torch.device("cpu"), data, network, reward, 16), settings, [])
