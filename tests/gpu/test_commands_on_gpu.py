"""Whole commands on a GPU: every agent comes to a summary, predictions are those of the CPU, errors are one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import policyskip
from tests.conftest import small_images, typed

pytestmark = pytest.mark.gpu

CONFIGS = Path(policyskip.__file__).parent / "configs" / "agent"
AGENTS = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "custom")
WORDS = {"dqn": ["env=layer_skip"], "ppo": ["env=early_exit"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The folder that the runs of this module are in."""
    folder: Path = tmp_path_factory.mktemp("runs")
    return folder


def finished(agent: str, device: torch.device, runs: Path) -> Path:
    """A short run of an agent on a device, which is made once."""
    folder = runs / f"{agent}-{device}".replace(":", "-")
    if not folder.exists():
        words = [f"agent={agent}", *WORDS.get(agent, []), f"device={device}", f"run.dir={folder.name}"]
        result = typed("train", "+experiment=debug", *words, "front.budget=2e3", cwd=runs)
        assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("agent", AGENTS)
def test_every_agents_short_run_ends_with_a_summary(agent, device, runs):
    summary = json.loads((finished(agent, device, runs) / "summary.json").read_text())
    assert summary["agent"] == agent and 0 <= summary["test/accuracy"] <= 1
    assert 0 < summary["test/macs_fraction"] <= 1.5


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs")
@pytest.mark.parametrize("agent", ["blockdrop", "skipnet", "branchynet", "dqn"])
def test_the_second_gpu_serves_as_well_as_the_first(agent, runs):
    assert (finished(agent, torch.device("cuda:1"), runs) / "summary.json").exists()
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("agent", ["blockdrop", "skipnet", "branchynet", "msdnet", "ppo"])
def test_predictions_on_a_gpu_are_those_of_the_cpu(agent, device, runs):
    """Rounding decides about few images, where a policy is undecided: a GPU computes it in TF32."""
    run = finished(agent, device, runs)
    images = small_images(64, size=20).images
    here = policyskip.load(run).predict(images)
    there = policyskip.load(run, device=str(device)).predict(images)
    check_alike(here, there, 1e-2)
    exact = policyskip.load(run, device=str(device), precision="float32_exact").predict(images.to(device))
    check_alike(here, exact, 1e-4)


def check_alike(here: Any, there: Any, tolerance: float) -> None:
    """Compare predictions: nearly all images decide alike, and then logits differ by a share of the largest at most."""
    kind = "keep_BK" if hasattr(here, "keep_BK") else "exit_B"
    ours, theirs = (getattr(found, kind).cpu().view(len(found.label_B), -1) for found in (here, there))
    alike_B = (ours == theirs).all(1)
    assert alike_B.float().mean() >= 0.9
    expected, found = here.logits_BC[alike_B], there.logits_BC.cpu()[alike_B]
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def test_a_run_is_judged_on_either_device(device, runs, tmp_path):
    run = finished("blockdrop", device, runs)
    for where in ("cpu", "auto"):
        result = typed("evaluate", f"run={run}", "split=validation", f"device={where}", cwd=tmp_path)
        assert result.returncode == 0, result.stderr


def test_auto_is_a_gpu_and_a_profile_says_how_it_runs(gpu, runs, tmp_path):
    result = typed("profile", f"run={finished('blockdrop', gpu, runs)}", "repeats=1", "batch_sizes=[4]", "images=8",
                   "output=here.json", cwd=tmp_path)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "kernel" in result.stdout
    times = json.loads((tmp_path / "here.json").read_text())
    assert times["device"] == torch.cuda.get_device_name(gpu)


def test_a_gpu_that_is_full_is_told_in_one_line(little_memory, tmp_path):
    words = ["data.batch_size=20000", "agent.width=64", "device=cuda:0", "run.dir=x", "front.budget=2e3"]
    result = typed("train", "+experiment=debug", *words, cwd=tmp_path)
    assert result.returncode == 2, result.stdout
    lines = [line for line in result.stderr.splitlines() if line.startswith("policyskip train: ")]
    assert len(lines) == 1 and "memory" in lines[0] and "Traceback" not in result.stderr, result.stderr


@pytest.mark.parametrize("words", ["device=cuda:77", "device=cuda:-1", "device=cuda:x"])
def test_a_gpu_that_is_not_there_is_refused(words, device, tmp_path):
    result = typed("train", "+experiment=debug", words, cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "cuda" in result.stderr
