"""The comparison with the static front, by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from policyskip.tasks import blocks as report
from policyskip.agents.static import StaticFront, known_front
from policyskip.backbones import load
from policyskip.data import digits
from policyskip.evaluation import Evaluation


def test_the_margin_is_paired_with_the_mix_of_equal_cost(monkeypatch):
    """At 15 MACs the front offers half of set 0 (right on images 0 and 1) and half of set 1 (right on 0, 1 and 2):
    1, 1, ½ and 0 right answers, 0.625 on average. The policy is right on 0, 2 and 3: 0.75."""
    sets = [(False, False), (True, False)]
    right = {sets[0]: torch.tensor([1, 1, 0, 0]).bool(), sets[1]: torch.tensor([1, 1, 1, 0]).bool()}
    front = StaticFront(sets, [0.5, 0.75], [10.0, 20.0], 4, True, "backbone", "data")
    result = Evaluation(
        label_N=torch.tensor([0, 0, 0, 0]),
        prediction_N=torch.tensor([0, 1, 0, 0]),
        full_correct_N=None,
        keep_NK=torch.ones(4, 2, dtype=torch.bool),
        macs_N=torch.tensor([5.0, 15.0, 15.0, 25.0], dtype=torch.float64),
        reward_N=torch.zeros(4),
        difficulty_N=None,
        policy_macs=1.0,
        full_macs=30.0,
    )

    class Scorer:
        def __init__(self, backbone, images):
            assert images == "test images"

        def correct(self, asked):
            return [right[keep] for keep in asked]

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
