"""Figures against numbers worked out by hand, and against an agent whose decisions are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from policyskip.agents.base import Agent
from policyskip.envs.block_selection import BlockSelectionVectorEnv
from policyskip.evaluation.decisions import Evaluation
from policyskip.evaluation.evaluate import evaluate
from tests.conftest import small_backbone, small_images

RESULT = Evaluation(
    label_N=torch.tensor([0, 0, 1, 1]),
    prediction_N=torch.tensor([0, 1, 1, 1]),
    full_correct_N=torch.tensor([True, True, True, False]),
    keep_NK=torch.tensor([[1, 1], [1, 0], [1, 0], [0, 0]]).bool(),
    macs_N=torch.tensor([110.0, 70.0, 70.0, 30.0], dtype=torch.float64),
    reward_N=torch.tensor([0.0, -1.0, 0.5, 1.0]),
    difficulty_N=torch.tensor([0.9, 0.5, 0.6, 0.1]),
    policy_macs=10.0,
    full_macs=100.0,
)


def test_figures_by_hand():
    assert RESULT.figures() == {
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


def test_block_use_by_class():
    assert RESULT.block_use_CK(2).tolist() == [[1.0, 0.5], [0.5, 0.0]]


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
    assert torch.equal(result.keep_NK, keep_NK) and torch.equal(result.label_N, images.label_N)
    with torch.no_grad():
        assert torch.equal(result.prediction_N, backbone(images.images, keep_NK).argmax(1))
        assert torch.equal(result.full_correct_N, backbone(images.images).argmax(1) == images.label_N)
    assert torch.equal(result.macs_N, env.costs.of(keep_NK) + 7.0)
    assert evaluate(Parity(), env, full=False).full_correct_N is None
