"""What every agent declares, and how little an agent has to define."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from omegaconf import OmegaConf

import policyskip
from policyskip.agents.base import Agent
from policyskip.agents.fixed import FixedAgent
from policyskip.envs.block_selection import BlockSelectionVectorEnv
from policyskip.errors import UserError
from policyskip.policies.fixed import FixedPolicy
from policyskip.policies.networks import ConstantPolicy
from tests.conftest import small_backbone, small_images

CONFIGS = Path(policyskip.__file__).parent / "configs" / "agent"
FIXED = {"full", "first", "distributed", "random", "best_static", "oracle"}
FAMILIES = {"skipnet": "gates"} | dict.fromkeys(("branchynet", "msdnet", "distiller", "cdl"), "thresholds")


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "custom"))
def test_every_agent_of_the_package_declares_its_family_before_it_is_made(name):
    node: Any = OmegaConf.load(CONFIGS / f"{name}.yaml")
    module, _, attribute = node.get("agent", node)["_target_"].rpartition(".")
    target = getattr(importlib.import_module(module), attribute)
    agent = target if inspect.isclass(target) else get_type_hints(target)["return"]
    assert issubclass(agent, Agent)
    assert agent.family == FAMILIES.get(name)
    assert agent.learns == (name not in FIXED)
    assert agent.trains_network == (name in FAMILIES)
    assert agent.sees_the_label == (name == "oracle")


def make_env() -> BlockSelectionVectorEnv:
    return BlockSelectionVectorEnv(8, backbone=small_backbone(), images=small_images(8), order="sequential")


def test_a_user_writes_an_agent_without_learning_in_one_line():
    class Mine(FixedAgent):
        def __init__(self, env: BlockSelectionVectorEnv) -> None:
            super().__init__("mine", FixedPolicy(env.backbone.num_blocks))

    env = make_env()
    agent = Mine(env)
    assert agent.name == "mine" and agent.decision_macs == 0.0 and not Mine.learns
    assert torch.equal(agent.decide(env), torch.ones(8, 6, dtype=torch.bool))
    agent.load_state_dict(agent.state_dict())
    with pytest.raises(UserError, match="agent=mine has nothing to learn"):
        agent.update(env)


def test_a_user_writes_an_agent_that_learns_with_three_methods():
    class Mine(Agent):
        """Keeps one block fewer at every update."""

        decision_macs = 0.0

        def __init__(self, env: BlockSelectionVectorEnv) -> None:
            self.policy = ConstantPolicy(env.backbone.num_blocks)

        def update(self, source: BlockSelectionVectorEnv) -> dict[str, float]:
            with torch.no_grad():
                self.policy.logits_K[int(self.act(source.observation)[0].sum()) - 1] = -1
            source.advance()
            return {"kept": float(self.act(source.observation).sum())}

        def state_dict(self) -> dict[str, Any]:
            return {"policy": self.policy.state_dict()}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.policy.load_state_dict(state["policy"])

    env = make_env()
    agent = Mine(env)
    agent.update(env)
    assert agent.name == "mine" and Mine.learns and Mine.family is None
    env.reset()
    assert agent.decide(env).tolist() == [[True] * 5 + [False]] * 8
