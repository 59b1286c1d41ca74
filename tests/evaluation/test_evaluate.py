"""Figures against numbers worked out by hand, and against an agent whose decisions are known."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import policyskip
from policyskip.agents.base import Agent
from policyskip.envs.block_selection import BlockSelectionVectorEnv
from policyskip.envs.layer_skip import LayerSkipVectorEnv
from policyskip.errors import UserError
from policyskip.evaluation.decisions import Decisions, load_decisions, save_decisions
from policyskip.evaluation.evaluate import evaluate, exit_decisions
from policyskip.evaluation.figures import block_figures, exit_figures
from policyskip.rewards import Utilization
from policyskip.runs.folder import Run
from tests.conftest import small_backbone, small_images
from tests.exits.test_references import answers

RESULT = Decisions(
    kind="blocks",
    label_N=torch.tensor([0, 0, 1, 1]),
    prediction_N=torch.tensor([0, 1, 1, 1]),
    full_correct_N=torch.tensor([True, True, True, False]),
    ran_NK=torch.tensor([[1, 1], [1, 0], [1, 0], [0, 0]]).bool(),
    macs_N=torch.tensor([110.0, 70.0, 70.0, 30.0], dtype=torch.float64),
    reward_N=torch.tensor([0.0, -1.0, 0.5, 1.0]),
    difficulty_N=torch.tensor([0.9, 0.5, 0.6, 0.1]),
    policy_macs=10.0,
    full_macs=100.0,
)


def test_figures_by_hand():
    assert block_figures(RESULT) == {
        "accuracy": 0.75,
        "full_accuracy": 0.75,
        "reward": 0.125,
        "kept_mean": 1.0,
        "kept_sd": pytest.approx(0.5**0.5),
        "blocks": 2,
        "macs_mean": 70.0,
        "macs_sd": pytest.approx(800**0.5),
        "full_macs": 100.0,
        "macs_fraction": 0.7,
        "policy_macs": 10.0,
        "unique_decisions": 3,
        "kept_by_difficulty": [0.0, 1.0, 1.0, 2.0],
    }


def test_figures_of_exits_by_hand():
    """Exits cost 3, 8 and 13, straight to them 3, 7 and 10, and a decision of the policy half a MAC: it makes 1, 2, 2 and
    1 of them, so images cost 3.5, 9, 14 and 3.5, 7.5 on average. The policy is right on all four."""
    cache = answers(torch.tensor([[1, 0, 1], [0, 1, 1], [0, 0, 1], [1, 0, 0]]))
    decisions = exit_decisions(torch.tensor([0, 1, 2, 0]), cache, decision_macs=0.5)
    assert decisions.ran_NK.int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert decisions.exit_N.tolist() == [0, 1, 2, 0] and decisions.prediction_N.tolist() == [0, 0, 0, 0]
    assert decisions.macs_N.tolist() == [3.5, 9.0, 14.0, 3.5] and decisions.policy_macs == 0.75
    figures = exit_figures(decisions, cache)
    assert figures == {
        "accuracy": 1.0,
        "full_accuracy": 0.75,
        "macs_mean": 7.5,
        "macs_sd": pytest.approx((76.5 / 4) ** 0.5),  # 4, 1.5, 6.5 and 4 from the mean
        "full_macs": 13.0,
        "macs_fraction": 7.5 / 13,
        "policy_macs": 0.75,
        "unique_decisions": 3,
        "exits": 3,
        "exit_share": [0.5, 0.25, 0.25],
        "exit_accuracy": [1.0, 1.0, 1.0],
        "exit_macs": [3.0, 8.0, 13.0],
        "exit_alone_accuracy": [0.5, 0.25, 0.75],
        "exit_alone_macs": [3.0, 7.0, 10.0],
        "random_accuracy": 0.5 * 0.5 + 0.25 * 0.25 + 0.25 * 0.75,
        "random_macs": 0.5 * 3 + 0.25 * 7 + 0.25 * 10,
        "oracle_accuracy": 1.0,
        "oracle_macs": (3 + 8 + 13 + 3) / 4,
        "label_oracle_accuracy": 1.0,  # a logit of 1 against 0 is a loss of 0.31 nats, so the first right exit is taken
        "label_oracle_macs": (3 + 8 + 13 + 3) / 4,
    }


def test_block_use_by_class():
    assert RESULT.block_use_CK(2).tolist() == [[1.0, 0.5], [0.5, 0.0]]


def test_a_record_comes_back_from_its_file_which_holds_the_same_tables_as_ever(tmp_path):
    stored = ("label_N", "prediction_N", "full_correct_N", "ran_NK", "macs_N", "static_F2")
    texts = {"images": "made up", "network": "abc", "classes": ("ä", "b")}
    static_F2 = torch.tensor([[1.0, 0.5]], dtype=torch.float64)
    from_record = save_decisions(dataclasses.replace(RESULT, static_F2=static_F2, **texts), Run(tmp_path))
    assert from_record == {"version": policyskip.__version__, "test_images": "made up", "frozen_network": "abc"}
    with safe_open(tmp_path / "decisions.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(stored)
        assert file.metadata() == {
            "full_macs": "100.0",
            "kind": '"blocks"',
            "images": '"made up"',
            "network": '"abc"',
            "classes": '["ä", "b"]',
        }
    loaded = load_decisions(Run(tmp_path))
    assert all(torch.equal(getattr(loaded, name), getattr(RESULT, name)) for name in stored[:-1])
    assert torch.equal(loaded.static_F2, static_F2) and loaded.full_macs == 100.0 and loaded.kind == "blocks"
    assert {name: getattr(loaded, name) for name in texts} == texts
    assert loaded.reward_N is None and loaded.difficulty_N is None  # they are in the summary's figures only
    assert load_decisions(Run(tmp_path / "none")) is None


@pytest.mark.parametrize("name", ["full_correct_N", "label_N", "reward_N"])
def test_a_record_that_lacks_a_table_or_has_another_is_refused(name, tmp_path):
    save_decisions(RESULT, Run(tmp_path))
    path = tmp_path / "decisions.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata, tables = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tables = {**tables, name: RESULT.reward_N} if name == "reward_N" else {k: v for k, v in tables.items() if k != name}
    save_file(tables, path, metadata)
    with pytest.raises(UserError, match=r"decisions\.safetensors is damaged or not ours: its tables"):
        load_decisions(Run(tmp_path))


class Parity(Agent):
    """Keeps the even blocks of images whose first pixel is even, and the odd blocks of the others."""

    decision_macs = 7.0

    def act(self, observation: Tensor) -> Tensor:
        even_K = torch.arange(6) % 2 == 0
        return torch.where((observation[:, 0, 0, :1] % 2 == 0), even_K, ~even_K)

    def update(self, env): ...
    def state_dict(self): ...
    def load_state_dict(self, state): ...


@pytest.mark.parametrize("batch_size", [1, 16, 40])
def test_every_image_is_judged_by_its_own_decision(batch_size):
    backbone, images = small_backbone(), small_images()
    env = BlockSelectionVectorEnv(batch_size, backbone=backbone, images=images, order="sequential")
    result = evaluate(Parity(), env)
    keep_NK = Parity().act(images.images)
    assert torch.equal(result.ran_NK, keep_NK) and torch.equal(result.label_N, images.label_N)
    with torch.no_grad():
        assert torch.equal(result.prediction_N, backbone(images.images, keep_NK).argmax(1))
        assert torch.equal(result.full_correct_N, backbone(images.images).argmax(1) == images.label_N)
    assert torch.equal(result.macs_N, env.costs.of(keep_NK) + 7.0)
    assert evaluate(Parity(), env, full=False).full_correct_N is None


class Alternating(Parity):
    """Runs every second block of every image, as an oracle would that sees labels, for 7 MACs a decision."""

    sees_the_label = True

    def decide(self, env):
        return torch.full((len(env.observation),), bool(env.observation[0, -6:].argmax() % 2))


def test_every_decision_of_a_step_by_step_policy_is_paid_for():
    """Six blocks are six decisions; three of them run, so a right answer is worth 1 − (3/6)², a wrong one −2."""
    options = dict(backbone=small_backbone(), images=small_images(), order="sequential", reward=Utilization(2.0))
    env = LayerSkipVectorEnv(16, **options)
    result = evaluate(Alternating(), env)
    assert result.ran_NK.tolist() == [[False, True] * 3] * 40 and result.sees_the_label
    assert torch.equal(result.macs_N, env.costs.of(result.ran_NK) + 6 * 7.0) and result.policy_macs == 42
    assert result.reward_N.tolist() == [0.75 if right else -2.0 for right in result.correct_N.tolist()]
    assert block_figures(result)["sees_the_label"] is True and "sees_the_label" not in block_figures(RESULT)
