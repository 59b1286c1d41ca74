"""Leaving early on the command line: train, evaluate, calibrate, load; simulated and real decisions are the same."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import policyskip
from policyskip.backbones.checkpoints import WEIGHTS
from policyskip.data import digits
from policyskip.errors import UserError
from policyskip.exits.cache import cache_exits
from policyskip.exits.rules import exit_of
from policyskip.tasks import thresholds as exits
from policyskip.tasks.calibrate import distinct_texts
from tests.conftest import typed

SMALL = ["data.train=300", "data.validation=120", "data.test=90", "data.batch_size=32", "device=cpu", "tracking=none"]
STEPS = ["train.steps=30", "train.validate_every=10", "train.log_every=5"]
BUDGET = ["target.macs_fraction=0.6"]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """A folder with a trained MSDNet in runs/x."""
    folder = tmp_path_factory.mktemp("exits")
    result = typed("train", "agent=msdnet", *SMALL, *STEPS, *BUDGET, "run.dir=runs/x", cwd=folder, drawn=True)
    assert result.returncode == 0, result.stderr
    for words in ("each image its own exit", "all straight to exit 4", "oracle", "Budget asked for 0.600"):
        assert words in result.stdout
    return folder


def test_the_run_folder_is_whole(workshop):
    run = workshop / "runs" / "x"
    names = {path.name for path in run.iterdir()}
    assert names >= {"best.safetensors", "network.safetensors", "policy.json", "curve.json", "summary.json"}
    assert {path.stem for path in (run / "plots").iterdir()} == {
        *("learning_curves", "accuracy_against_macs", "exit_use", "gallery", "exit_by_difficulty"),
    }
    for name in ("summary.json", "policy.json", "curve.json"):
        json.loads((run / name).read_text(), parse_constant=pytest.fail)  # JSON has no infinity
    summary = json.loads((run / "summary.json").read_text())
    assert sum(summary["test/exit_share"]) == pytest.approx(1)
    assert summary["test/macs_fraction"] == pytest.approx(
        sum(s * m for s, m in zip(summary["test/exit_share"], summary["test/exit_macs"])) / summary["test/full_macs"]
    )
    assert summary["val/macs_fraction"] <= 0.6
    assert summary["test/oracle_accuracy"] >= summary["test/accuracy"]


def test_evaluate_repeats_the_figures_exactly(workshop):
    result = typed("evaluate", "run=runs/x", "device=cpu", cwd=workshop)
    assert result.returncode == 0, result.stderr
    assert "Every figure is that of summary.json." in result.stdout


def test_simulated_and_real_leaving_are_the_same_image_by_image(workshop):
    predictor = policyskip.load(workshop / "runs" / "x")
    test = digits(torch.device("cpu"), 1, 1, 90).test
    cache = cache_exits(predictor.network, test)
    exit_M = exit_of(predictor.policy.rule, cache.probability_MNC, predictor.policy.threshold_E)
    for batch_size in (1, 7, 90):
        result = predictor.predict(test.images, batch_size)
        assert torch.equal(result.exit_B, exit_M)
        assert torch.equal(result.label_B, cache.logits_MNC[torch.arange(90), exit_M].argmax(1))
    assert len(exit_M.unique()) > 1
    summary = json.loads((workshop / "runs/x/summary.json").read_text())
    assert result.macs_B.mean().item() == pytest.approx(summary["test/macs_mean"])
    assert predictor.predict(test.images[:0]).label_B.shape == (0,)
    with pytest.raises(UserError, match="images must be uint8"):
        predictor.predict(test.images.float())


def test_calibrate_writes_other_thresholds(workshop):
    before = json.loads((workshop / "runs/x/policy.json").read_text())
    low = ["run=runs/x", "device=cpu", "target.macs_fraction=0.3", "precision=bfloat16"]
    result = typed("calibrate", *low, cwd=workshop)
    assert result.returncode == 0, result.stderr
    after = json.loads((workshop / "runs/x/policy.json").read_text())
    assert after["exits"]["thresholds"] != before["exits"]["thresholds"] and after["network"] == before["network"]
    assert json.loads((workshop / "runs/x/summary.json").read_text())["val/macs_fraction"] <= 0.3
    assert yaml.safe_load((workshop / "runs/x/config.yaml").read_text())["target"]["macs_fraction"] == 0.3
    words = ("target.accuracy_drop=0", "precision=bfloat16")
    nothing = typed("calibrate", "run=runs/x", "device=cpu", *words, cwd=workshop)
    assert nothing.returncode == 0 and "Asked for: at most 0.00 points below the last exit" in nothing.stdout
    assert yaml.safe_load((workshop / "runs/x/config.yaml").read_text())["precision"] == "bfloat16"
    judged = typed("evaluate", "run=runs/x", "device=cpu", cwd=workshop)  # in the precision that thresholds are for
    assert "Every figure is that of summary.json" in judged.stdout
    words = ("target.macs_fraction=0.6", "precision=float32")
    again = typed("calibrate", "run=runs/x", "device=cpu", *words, cwd=workshop)
    assert again.returncode == 0
    assert json.loads((workshop / "runs/x/policy.json").read_text()) == before


def test_calibrate_without_a_target_shows_the_whole_curve_and_changes_nothing_else(workshop):
    run = workshop / "runs" / "x"
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    result = typed("calibrate", "run=runs/x", "device=cpu", cwd=workshop)
    assert result.returncode == 0, result.stderr
    assert "meets accuracy_drop" in result.stdout and "Knee at 0." in result.stdout
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    content = json.loads((run / "curve.json").read_text())
    assert len(content["validation"]) == len(content["test"]) > 2
    knee = typed("calibrate", "run=runs/x", "device=cpu", "target.knee=true", cwd=workshop)
    assert knee.returncode == 0 and "The knee of the validation curve" in knee.stdout
    share = json.loads((run / "summary.json").read_text())["val/macs_fraction"]
    assert f"Knee at {share:.3f}" in result.stdout


@pytest.mark.parametrize(
    ("typed_words", "message"),
    [
        (["calibrate", "run=runs/x", "target.macs_fraction=0.01"], "the nearest that can be met is"),
        (["calibrate", "run=runs/x", "target.macs_fraction=0.5", "target.knee=true"], "give one target"),
        (["calibrate", "run=runs/x", "target.macs_fraction=2"], "macs_fraction must be"),
        (["calibrate", "run=nowhere", "target.macs_fraction=0.5"], "does not exist"),
        (["train", "agent=msdnet", "backbone=resnet32_digits", *SMALL], "has no exits"),
        (["train", "agent=blockdrop", "backbone=msdnet_digits", *SMALL], "has exits, not blocks"),
        (["train", "agent=msdnet", *SMALL, "target.macs_fraction=0.5", "target.accuracy_drop=0"], "give one target"),
        (["train", "agent=msdnet", *SMALL, "target.macs_fraction=0.1"], "first exit of msdnet5 costs 0.1282 of going"),
        (["train", "agent=msdnet", *SMALL, "target.macs_fraction=0"], "above 0 and at most 1, got 0"),
        (["calibrate", "run=runs/x", "target.macs_fraction=0"], "above 0 and at most 1, got 0"),
        (["train", "agent=msdnet", "agent.search=bogus", *SMALL], "agent.search must be one of quota, grid, common"),
        (["train", "agent=msdnet", "agent.rule=delta", *SMALL], "agent.search=quota needs a rule that orders images"),
        (["train", "agent=msdnet", "agent.lr=nan", *SMALL], "agent.lr must be positive"),
        (["train", "agent=branchynet", "agent.exit_weights=[nan,1,1,1,1]", *SMALL], "agent.exit_weights must give"),
        (["train", "agent=cdl", "backbone=msdnet_digits", *SMALL], "resnet32_exits"),
        (["train", "agent=distiller", "agent.lossweights=[0.9,0.2,0.1,0.1]", *SMALL], "sum to less than 1"),
        (["train", "agent=branchynet", "backbone=resnet32_exits", "backbone.exits=[2,15]", *SMALL], "no block 15"),
        (["train", "agent=msdnet", "reward=macs", *SMALL], "take no reward"),
        (["train", "agent=msdnet", "reward.penalty=2", *SMALL], "no key reward"),
        (["train", "agent=cdl", "backbone.exits=auto", *SMALL], "auto N"),
        (["train", "agent=cdl", "backbone.exits=auto 15", *SMALL], "from 1 to 14"),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(workshop, typed_words, message):
    before = {path: path.read_bytes() for path in sorted(workshop.rglob("*")) if path.is_file()}
    result = typed(*typed_words, cwd=workshop)
    assert result.returncode == 2, result.stdout
    assert message in result.stderr and len(result.stderr.strip().splitlines()) <= 2
    assert {path: path.read_bytes() for path in sorted(workshop.rglob("*")) if path.is_file()} == before


def test_calibrate_wants_a_run_with_exits(tmp_path):
    arguments = ["agent=blockdrop", *SMALL, "data.train=64", "backbone=resnet20", "backbone.checkpoint=random"]
    arguments += [
        "train.steps=1",
        "front.budget=1e2",
        "front.images=8",
        "agent.width=4",
        "run.dir=b",
    ]
    assert typed("train", *arguments, cwd=tmp_path).returncode == 0
    result = typed("calibrate", "run=b", "target.macs_fraction=0.5", cwd=tmp_path)
    assert result.returncode == 2 and "b skips blocks; it has no exits" in result.stderr


@pytest.mark.parametrize("agent", ["cdl", "distiller", "branchynet"])
def test_every_agent_trains_and_is_judged(agent, tmp_path):
    arguments = [f"agent={agent}", *SMALL, *STEPS, *BUDGET, "run.dir=x"]
    arguments += ["agent.delta=0.3", "agent.lr=0.03", "backbone.exits=[5,9,12]"] if agent == "cdl" else []
    arguments += ["backbone=branchy_lenet"] if agent == "branchynet" else []
    arguments += ["target.macs_fraction=0.9"]
    result = typed("train", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "x/summary.json").read_text())["agent"] == agent
    assert len(policyskip.load(tmp_path / "x").predict(torch.zeros(2, 3, 20, 20, dtype=torch.uint8)).exit_B) == 2


def test_exits_are_proposed_and_the_run_says_which(tmp_path):
    arguments = ["agent=distiller", "backbone.exits=auto 2", *SMALL, "train.steps=1", *BUDGET, "run.dir=x"]
    result = typed("train", *arguments, "target.macs_fraction=0.9", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("% right at") == 2 and "points for" in result.stdout
    places = yaml.safe_load((tmp_path / "x/config.yaml").read_text())["backbone"]["exits"]
    assert [f"after block {place}:" in result.stdout for place in places] == [True, True]
    assert typed("evaluate", "run=x", "device=cpu", cwd=tmp_path).returncode == 0


def test_a_target_that_training_cannot_meet_is_said_and_the_run_is_whole(tmp_path):
    arguments = ["agent=msdnet", *SMALL, *STEPS, "target.accuracy_drop=-0.9", "run.dir=x"]
    result = typed("train", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "warning: no threshold meets accuracy_drop=-0.9" in result.stdout
    summary = json.loads((tmp_path / "x/summary.json").read_text())
    points = json.loads((tmp_path / "x/curve.json").read_text())["validation"]
    assert summary["val/accuracy"] == max(point["accuracy"] for point in points)


def test_cdl_without_a_head_that_pays_deploys_the_network_alone(tmp_path):
    arguments = ["agent=cdl", *SMALL, "train.steps=1", "agent.delta=1.0", "agent.lr=1e-6", "run.dir=x"]
    result = typed("train", *arguments, cwd=tmp_path, drawn=True)
    assert result.returncode == 0, result.stderr
    assert "no head saves operations at agent.delta=1" in result.stdout
    summary = json.loads((tmp_path / "x/summary.json").read_text())
    assert summary["test/exits"] == 1 and summary["test/macs_fraction"] == 1
    assert summary["test/accuracy"] == summary["test/full_accuracy"]
    assert policyskip.load(tmp_path / "x").predict(torch.zeros(2, 3, 20, 20, dtype=torch.uint8)).exit_B.tolist() == [
        0,
        0,
    ]
    again = typed("evaluate", "run=x", "device=cpu", cwd=tmp_path)
    assert again.returncode == 0 and "Every figure is that of summary.json." in again.stdout
    refused = typed("calibrate", "run=x", "device=cpu", "target.macs_fraction=0.5", cwd=tmp_path)
    assert refused.returncode == 2 and "has no early exits" in refused.stderr


def test_everything_is_chosen_on_validation_and_test_is_read_once_at_the_end(tmp_path, monkeypatch):
    seen: list[int] = []

    def noted(network, images, how):
        seen.append(len(images))
        return cache_exits(network, images, how)

    monkeypatch.setattr(exits, "cache_exits", noted)
    monkeypatch.setattr("policyskip.tasks.calibrate.cache_exits", noted)
    arguments = ["agent=cdl", *SMALL, *STEPS, "agent.delta=0.3", "target.macs_fraction=0.9", "run.dir=x"]
    assert typed("train", *arguments, cwd=tmp_path).returncode == 0
    assert set(seen[:-1]) == {120} and seen[-1] == 90  # of SMALL: validation, and test
    seen.clear()
    assert typed("calibrate", "run=x", "device=cpu", "target.macs_fraction=0.95", cwd=tmp_path).returncode == 0
    assert seen == [120, 90]
    seen.clear()
    assert typed("calibrate", "run=x", "device=cpu", cwd=tmp_path).returncode == 0
    assert seen == [120]


def test_thresholds_of_another_network_are_refused(workshop, tmp_path):
    shutil.copytree(workshop / "runs" / "x", tmp_path / "x")
    shutil.copy(WEIGHTS / "msdnet_digits.safetensors", tmp_path / "x" / "network.safetensors")
    result = typed("evaluate", "run=x", "device=cpu", cwd=tmp_path)
    assert result.returncode == 2 and "were chosen for another network" in result.stderr


@pytest.mark.parametrize(
    ("target", "accuracy", "sentence"),
    [
        ({"accuracy_drop": 0.002}, 0.75, "Asked for: at most 0.20 points below the last exit; on test it is 15.00 points above"),
        ({"accuracy_drop": -0.01}, 0.55, "Asked for: at least 1.00 points above the last exit; on test it is 5.00 points below"),
        ({"knee": True}, 0.599999999, "The knee of the validation curve; on test it is 0.00 points below the last exit."),
        ({"knee": True}, 0.7, "it is 10.00 points above the last exit."),
        ({"macs_fraction": 0.5}, 0.7, "Budget asked for 0.500 of the full cost, used on test 0.510."),
    ],
)  # fmt: skip
def test_what_came_of_a_target_is_said_without_negative_points(target, accuracy, sentence):
    figures = {"test/full_accuracy": 0.6, "test/accuracy": accuracy, "test/macs_fraction": 0.51}
    assert sentence in exits.outcome(figures | {f"target/{key}": value for key, value in target.items()})


def test_thresholds_have_as_many_digits_as_tell_them_apart():
    close = [(2.3021, 2.29), (2.3022, 2.29), (2.3022, 2.29), (math.inf, 0.5)]
    assert distinct_texts(close) == ["2.3021 2.29", "2.3022 2.29", "2.3022 2.29", "inf 0.5"]
    assert distinct_texts([(1 / 3,)]) == ["0.333"] and distinct_texts([]) == []
    next_one = math.nextafter(0.1, 1)
    assert len(set(distinct_texts([(0.1,), (next_one,)]))) == 2
