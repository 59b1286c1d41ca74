"""The comparison with the static front, by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from policyskip.backbones import load
from policyskip.data import TensorImages, digits
from policyskip.envs.block_selection import BlockSelectionVectorEnv
from policyskip.evaluation.decisions import Decisions
from policyskip.static_front import StaticFront, known_front
from policyskip.tasks import fronts as report
from tests.conftest import small_backbone


def test_the_margin_is_paired_with_the_mix_of_equal_cost(monkeypatch):
    """At 15 MACs the front offers half of set 0 (right on images 0 and 1) and half of set 1 (right on 0, 1 and 2):
    1, 1, ½ and 0 right answers, 0.625 on average. The policy is right on 0, 2 and 3: 0.75."""
    sets = [(False, False), (True, False)]
    right = {sets[0]: torch.tensor([1, 1, 0, 0]).bool(), sets[1]: torch.tensor([1, 1, 1, 0]).bool()}
    front = StaticFront(sets, [0.5, 0.75], [10.0, 20.0], 4, True, "backbone", "data")
    result = Decisions(
        kind="blocks",
        label_N=torch.tensor([0, 0, 0, 0]),
        prediction_N=torch.tensor([0, 1, 0, 0]),
        ran_NK=torch.ones(4, 2, dtype=torch.bool),
        macs_N=torch.tensor([5.0, 15.0, 15.0, 25.0], dtype=torch.float64),
        policy_macs=1.0,
        full_macs=30.0,
    )

    class Scorer:
        count = 4

        def __init__(self, backbone, images):
            assert images == "test images"

        def correct(self, sets):
            return [right[keep] for keep in sets]

    monkeypatch.setattr(report, "SetScorer", Scorer)
    setup = type(
        "Setup",
        (),
        {
            "backbone": None,
            "data": type("Data", (), {"split": lambda name: SimpleNamespace(plain=lambda: f"{name} images")}),
        },
    )
    figures, curve = report.static_figures(setup, result, front)
    assert figures["static_accuracy"] == 0.625
    assert figures["static_margin"] == pytest.approx(0.125)
    differences = torch.tensor([0.0, -1.0, 0.5, 1.0])
    assert figures["static_margin_ci95"] == pytest.approx(1.96 * differences.std().item() / 2)
    assert figures["static_macs"] == 15.0 and figures["static_blocks"] == 0.5
    assert figures["static_sets"] == ["00", "10"]
    assert curve == [(10.0, 0.5), (20.0, 0.75)]


def test_the_shipped_front_is_that_of_the_shipped_network_on_the_default_validation_images(tmp_path):
    validation = digits(torch.device("cpu"), train=1, test=1).validation
    front = known_front(load("resnet32_digits"), validation, tmp_path)
    assert front is not None and front.finished and {sum(keep) for keep in front.sets} == set(range(16))


def test_the_best_set_is_sought_over_all_classes():
    """Images sorted by class, as folders are: dropping all blocks is right about the first class only."""
    label_N = torch.arange(5).repeat_interleave(200)
    images = TensorImages(torch.zeros(1000, 3, 12, 12, dtype=torch.uint8), label_N)

    def reward(outcome):
        return (outcome.keep_BK.all(1) | (outcome.label_B == 0)).float() - 0.1 * outcome.keep_BK.float().mean(1)

    def env(images, order="sequential", seed=0):
        return BlockSelectionVectorEnv(
            100, backbone=small_backbone(), images=images, reward=reward, order=order, seed=seed
        )

    setup = SimpleNamespace(env=env, reward=None, data=SimpleNamespace(validation=images))
    front = StaticFront([(False,) * 6, (True,) * 6], [0.2, 1.0], [1.0, 2.0], 10, True, "", "")
    assert report.best_set(setup, front, count=200) == (True,) * 6
