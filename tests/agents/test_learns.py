"""BlockDrop finds the best decision of a small problem whose best decision is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from policyskip.agents.blockdrop import BlockDrop
from policyskip.data import TensorImages
from policyskip.envs.block_selection import BlockSelectionVectorEnv
from policyskip.evaluation.evaluate import evaluate
from policyskip.evaluation.figures import block_figures
from policyskip.rewards import Outcome
from tests.conftest import small_backbone

BEST = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 1, 1, 0, 0, 1]]).bool()


def matching(outcome: Outcome) -> Tensor:
    """The fraction of the blocks that are as in BEST for the image's class: 1 at best, 0.5 by chance."""
    return (outcome.keep_BK == BEST[outcome.label_B]).float().mean(1)


@pytest.mark.parametrize("curriculum", [0.0, 0.3])
def test_it_finds_the_known_best_decision_for_each_kind_of_image(curriculum):
    """Dark images are class 0 and bright ones class 1. No fixed decision gets more than 5 of the 8 differing bits:
    (2·6 - 4)/12 = 0.67, so passing 0.95 needs a decision for each image."""
    generator = torch.Generator().manual_seed(0)
    label_N = torch.arange(64) % 2
    noise = torch.randint(0, 60, (64, 3, 8, 8), generator=generator)
    images = TensorImages((noise + 180 * label_N.view(-1, 1, 1, 1)).to(torch.uint8), label_N)
    env = BlockSelectionVectorEnv(32, backbone=small_backbone(classes=2), images=images, reward=matching)
    agent = BlockDrop(env, total_steps=150, lr=0.01, beta=0.0, samples=4, width=4, curriculum=curriculum)
    for _ in range(150):
        agent.update(env)
    sequential = BlockSelectionVectorEnv(32, backbone=env.backbone, images=images, reward=matching, order="sequential")
    result = evaluate(agent, sequential)
    assert result.reward_N.mean() > 0.95
    assert block_figures(result)["unique_decisions"] >= 2
