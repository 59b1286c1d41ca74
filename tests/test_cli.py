"""The commands, typed as a user types them, from a backbone made here to a policy deployed and judged again."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

import policyskip
from policyskip.data import digits
from policyskip.errors import UserError
from policyskip.runs.folder import Run
from tests.conftest import typed, without_waits

SMALL_DATA = ["data.train=300", "data.validation=80", "data.test=90", "data.batch_size=32", "device=cpu"]
SMALL = [*SMALL_DATA, "train.steps=6", "train.validate_every=2", "train.log_every=2"]
SUMMARY_KEYS = {
    *("agent", "env", "backbone", "data", "seed", "steps", "seconds"),
    *("test/accuracy", "test/full_accuracy", "test/kept_mean", "test/kept_sd", "test/blocks", "test/macs_mean"),
    *("test/full_macs", "test/macs_fraction", "test/policy_macs", "test/unique_decisions"),
    *("test/rival", "test/rival_margin", "test/rivals", "test/verdict", "test/kept_by_difficulty"),
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """A folder with a pretrained network (runs/net) and a policy trained over it (runs/policy)."""
    folder = tmp_path_factory.mktemp("workshop")
    made = typed("pretrain", "backbone=resnet20", *SMALL, "run.dir=runs/net", "tracking=none", cwd=folder)
    assert made.returncode == 0, made.stderr
    assert "backbone.checkpoint=runs/net/backbone.safetensors" in made.stdout
    arguments = ["agent=blockdrop", *SMALL, "run.dir=runs/policy", "tracking.mode=offline"]
    arguments += ["backbone=resnet20", "backbone.checkpoint=runs/net/backbone.safetensors"]
    arguments += ["front.budget=2e5", "front.images=50"]
    trained = typed("train", *arguments, cwd=folder, drawn=True)
    assert trained.returncode == 0, trained.stderr
    (folder / "stdout.txt").write_text(trained.stdout)
    return folder


def test_train_leaves_a_whole_run_folder(workshop):
    run = workshop / "runs" / "policy"
    files = {path.name for path in run.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "checkpoint.pt", "best.safetensors", "policy.json", "summary.json"} <= files
    assert not [path for path in run.rglob(".*") if path.name != ".gitignore"]
    assert set(json.loads((run / "summary.json").read_text())) >= SUMMARY_KEYS
    pictures = {path.stem for path in (run / "plots").iterdir()}
    assert pictures == {
        *(
            "learning_curves",
            "accuracy_against_macs",
            "block_use",
            "block_use_by_class",
            "gallery",
            "kept_by_difficulty",
        ),
    }
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "val/accuracy" in r] == [2, 4, 6]
    assert sorted(path.name for path in workshop.iterdir()) == ["runs", "stdout.txt"]


def test_train_prints_its_table_and_where_things_are(workshop):
    printed = (workshop / "stdout.txt").read_text()
    for words in (
        "policy, its own cost included",
        "full network",
        "rival: ",
        "Run folder",
        "W&B",
    ):
        assert words in printed


def test_wandb_has_the_metrics_the_summary_and_the_pictures(workshop):
    (offline,) = (workshop / "runs" / "policy" / "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(offline)]
    inspected = subprocess.run(command, capture_output=True, text=True, check=True)
    content = json.loads(inspected.stdout)
    summary = content["summary"]
    assert {"test/accuracy", "train/reward", "val/reward", "plots/gallery", "examples"} <= set(summary)


def test_evaluate_repeats_the_figures_exactly(workshop):
    result = typed("evaluate", "run=runs/policy", "device=cpu", cwd=workshop)
    assert result.returncode == 0, result.stderr
    assert "Every figure is that of summary.json." in result.stdout


def test_load_predicts_what_the_run_reported(workshop, monkeypatch):
    monkeypatch.chdir(workshop)
    predictor = policyskip.load("runs/policy")
    test = digits(torch.device("cpu"), 1, 1, 90).test
    result = predictor.predict(test.images, batch_size=17)
    summary = json.loads(Path("runs/policy/summary.json").read_text())
    assert (result.label_B == test.label_N).double().mean().item() == pytest.approx(summary["test/accuracy"])
    assert result.macs_B.mean().item() == pytest.approx(summary["test/macs_mean"])
    assert result.keep_BK.sum(1).double().mean().item() == pytest.approx(summary["test/kept_mean"])
    one = predictor.predict(test.images[:1].numpy())
    torch.testing.assert_close(one.logits_BC, result.logits_BC[:1], rtol=1e-4, atol=1e-4)
    assert predictor.predict(test.images[:0]).label_B.shape == (0,)
    with pytest.raises(UserError, match="images must be uint8 of shape"):
        predictor.predict(test.images.float())


def test_another_network_under_a_policy_is_refused(workshop, monkeypatch):
    monkeypatch.chdir(workshop)
    with pytest.raises(UserError, match="was trained with the network"):
        policyskip.load("runs/policy", backbone="random")


def test_front_prints_and_writes(workshop):
    arguments = [
        "backbone=resnet20",
        "backbone.checkpoint=runs/net/backbone.safetensors",
        *SMALL_DATA,
    ]
    result = typed("front", *arguments, "output=front.json", cwd=workshop)
    (workshop / "front.json").unlink()
    assert result.returncode == 0, result.stderr
    assert "the blocks that run" in result.stdout and "111111111" in result.stdout


@pytest.mark.parametrize(("command", "name"), [("pretrain", "net"), ("train", "policy")])
def test_a_finished_run_says_so_and_nothing_is_done(workshop, command, name):
    before = {path: path.read_bytes() for path in (workshop / "runs" / name).rglob("*") if path.is_file()}
    for steps in ([], ["train.steps=6"]):
        result = typed(command, f"run.resume=runs/{name}", *steps, cwd=workshop)
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith(f"runs/{name} has finished its 6 updates, and nothing is left to do")
    assert {path: path.read_bytes() for path in (workshop / "runs" / name).rglob("*") if path.is_file()} == before


def test_a_finished_run_can_go_on_for_more_steps(workshop):
    shutil.copytree(workshop / "runs/policy", workshop / "runs/longer", ignore=shutil.ignore_patterns("wandb"))
    result = typed("train", "run.resume=runs/longer", "train.steps=8", "tracking.mode=none", cwd=workshop)
    assert result.returncode == 0, result.stderr
    assert json.loads((workshop / "runs/longer/summary.json").read_text())["steps"] == 8
    assert yaml.safe_load((workshop / "runs/longer/config.yaml").read_text())["train"]["steps"] == 8
    assert "has finished its 8 updates" in typed("train", "run.resume=runs/longer", cwd=workshop).stdout
    fewer = typed("train", "run.resume=runs/longer", "train.steps=7", cwd=workshop)
    assert fewer.returncode == 2 and "has done 8 updates already; train.steps=7 is below that" in fewer.stderr


def test_ctrl_c_saves_and_says_how_to_go_on(workshop):
    arguments = ["pretrain", "backbone=resnet20", *SMALL, "train.steps=5000", "tracking=none", "run.dir=runs/stopped"]
    command = [sys.executable, "-m", "policyskip", *arguments]
    process = subprocess.Popen(command, cwd=workshop, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (workshop / "runs/stopped/checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and not without_waits(errors)
    assert "Go on with:  policyskip pretrain run.resume=runs/stopped" in printed
    done = Run(workshop / "runs/stopped").load_checkpoint()["step"]
    fewer = typed("pretrain", "run.resume=runs/stopped", "train.steps=1", cwd=workshop)
    assert fewer.returncode == 2 and f"has done {done} updates already; train.steps=1 is below" in fewer.stderr
    resumed = typed("pretrain", "run.resume=runs/stopped", f"train.steps={done + 1}", cwd=workshop)
    assert resumed.returncode == 0, resumed.stderr


def test_a_sweep_makes_a_folder_for_each_job(tmp_path):
    arguments = ["agent=blockdrop", *SMALL, "tracking=none", "backbone=resnet20", "backbone.checkpoint=random"]
    arguments += ["front.budget=1e4", "front.images=20", "train.steps=1"]
    result = typed("train", "--multirun", "seed=0,1", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    seeds = [json.loads(path.read_text())["seed"] for path in sorted(tmp_path.glob("runs/sweep-*/*/summary.json"))]
    assert sorted(seeds) == [0, 1]
