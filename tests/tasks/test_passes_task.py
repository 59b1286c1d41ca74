"""Passes on the command line: train, evaluate, calibrate, load; simulated and real decisions are the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import policyskip
from policyskip.backbones import PassNetwork, count_costs
from policyskip.data import digits
from policyskip.exits.cache import cache_exits
from policyskip.exits.rules import exit_of
from tests.conftest import typed

SMALL = ["data.train=32", "data.validation=60", "data.test=50", "data.batch_size=32", "device=cpu", "tracking=none"]
FEW = ["agent.candidates=8", "agent.limit=40", "target.macs_fraction=0.7"]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """A folder with a run in x."""
    folder = tmp_path_factory.mktemp("passes")
    result = typed("train", "agent=passes", *SMALL, *FEW, "run.dir=x", cwd=folder)
    assert result.returncode == 0, result.stderr
    for words in ("passes is judged on digits", "pass 1 keeps", "all 15 blocks", "Budget asked for 0.700"):
        assert words in result.stdout
    return folder


def test_the_summary_is_relative_to_the_whole_network(workshop):
    summary = json.loads((workshop / "x/summary.json").read_text())
    network = policyskip.load(workshop / "x").network
    assert isinstance(network, PassNetwork)
    whole = count_costs(network.backbone, (3, 20, 20)).full
    assert summary["agent"] == "passes" and summary["test/full_macs"] == pytest.approx(whole)
    test = digits(torch.device("cpu"), 1, 1, 50).test
    right = (network.backbone(test.images).argmax(1) == test.label_N).double().mean().item()
    assert summary["test/full_accuracy"] == pytest.approx(right)
    assert summary["val/macs_fraction"] <= 0.7 and summary["test/exits"] == 2


def test_simulated_and_real_leaving_are_the_same_image_by_image(workshop):
    predictor = policyskip.load(workshop / "x")
    test = digits(torch.device("cpu"), 1, 1, 50).test
    cache = cache_exits(predictor.network, test)
    exit_M = exit_of(predictor.policy.rule, cache.probability_MNC, predictor.policy.threshold_E)
    result = predictor.predict(test.images, 16)
    assert torch.equal(result.exit_B, exit_M) and len(exit_M.unique()) == 2
    assert torch.equal(result.label_B, cache.logits_MNC[torch.arange(50), exit_M].argmax(1))
    summary = json.loads((workshop / "x/summary.json").read_text())
    assert result.macs_B.mean().item() == pytest.approx(summary["test/macs_mean"])


def test_it_can_be_evaluated_and_calibrated_again(workshop):
    result = typed("evaluate", "run=x", "device=cpu", cwd=workshop)
    assert result.returncode == 0 and "Every figure is that of summary.json." in result.stdout, result.stderr
    before = policyskip.load(workshop / "x")
    result = typed("calibrate", "run=x", "target.macs_fraction=0.9", "device=cpu", cwd=workshop)
    assert result.returncode == 0, result.stderr
    after = policyskip.load(workshop / "x")
    assert after.network.sets == before.network.sets
    assert not torch.equal(after.policy.threshold_E, before.policy.threshold_E)


@pytest.mark.parametrize(
    ("typed_words", "message"),
    [
        (["backbone=resnet32_digits_exits"], "agent=passes skips the blocks of a network without exits"),
        (["target.macs_fraction=0.01"], "no threshold meets macs_fraction=0.01"),
        (["agent.passes=1"], "agent.passes must be 2 or 3"),
        (["agent.good=[]"], "there is no key agent.good"),
    ],
)
def test_bad_input_is_one_line(tmp_path, typed_words, message):
    result = typed("train", "agent=passes", *SMALL, *FEW, "run.dir=x", *typed_words, cwd=tmp_path)
    assert result.returncode == 2 and message in result.stderr, result.stdout
    assert len(result.stderr.strip().splitlines()) <= 2 and not (tmp_path / "x").exists()
