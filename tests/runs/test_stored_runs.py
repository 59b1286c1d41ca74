"""Runs that commit 158d277 made, before the package was rebuilt: they load, evaluate, resume and compare as before.

The runs are small and lie in ``tests/stored/runs`` (see its README); every test works on a copy. Another processor may round
differently and so decide differently on an image; hence the recorded figures are met within what one image can move.
What rounding cannot move (settings, names, keys, counts, costs of a network) is met exactly.

Shapes: N test images, K blocks or exits.
"""

from __future__ import annotations

import ast
import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from safetensors import safe_open
from torch import Tensor

import policyskip
from policyskip.data import digits
from policyskip.errors import UserError
from policyskip.tasks import rivals
from tests.conftest import typed

STORED = Path(__file__).parent.parent / "stored" / "runs"
HALF = sorted(path.name.removesuffix("-half") for path in STORED.glob("*-half"))
"""Runs that are stored twice: whole, and stopped after half of their updates."""
JUDGED = sorted(path.parent.name for path in STORED.glob("*/policy.json"))
"""Finished runs of ``policyskip train``."""
SIMILAR = {"ppo-layer"}
"""Runs whose learner and environment other runs have too; they are not resumed, which takes seconds."""
FIXED = ["best_static", "distributed", "oracle", "random"]
"""Runs of agents that have nothing to learn."""
IMAGES = 64
OLD, NEW = ("test/static_",), ("test/rival", "test/verdict")
"""What keys begin with that say how a policy compares with fixed choices: in these runs, and since."""
EXACT = (
    *("blocks", "full_macs", "policy_macs", "exits", "exit_macs", "exit_alone_macs", "sees_the_label"),
    *("agent", "env", "backbone", "data", "seed", "steps", "test_images", "rule"),
)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of every stored run in ``runs``."""
    folder = tmp_path_factory.mktemp("stored") / "here"
    shutil.copytree(STORED, folder / "runs")
    return folder


@pytest.fixture(scope="module")
def test_images() -> tuple[Tensor, Tensor]:
    """The runs' test images, uint8 (N, 3, 20, 20), and their labels, int64 (N,)."""
    test = digits(torch.device("cpu"), 96, 64, IMAGES).test
    return test.images, test.label_N


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are neither laid out nor encoded, which takes most of the time."""
    monkeypatch.setattr(ConstrainedLayoutEngine, "execute", lambda engine, figure: None)
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: None)


def copy_of(name: str, folder: Path) -> Path:
    """A copy of a stored run in a folder ``runs``."""
    return Path(shutil.copytree(STORED / name, folder / "runs" / name))


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_bytes())


def records_of(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def recorded(run: Path) -> dict[str, Tensor]:
    """The tables of a run's ``decisions.safetensors``."""
    with safe_open(run / "decisions.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping


def comparable(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary less the time that it took, and less the comparison with fixed choices, which is another since."""
    left_out = ("seconds", "version", "execution", "precision", *OLD, *NEW)
    return {key: value for key, value in summary.items() if not key.startswith(left_out)}


def tolerance(key: str, before: dict[str, Any], images: int) -> float:
    """How far ``images`` images that are decided otherwise can move a figure of a summary."""
    name = key.rpartition("/")[2]
    if name in EXACT:
        return 0
    unit = before.get("test/full_macs", 1) if "macs" in name and "fraction" not in name else 1
    unit = before["test/blocks"] if "kept" in name else unit
    if name == "exit_accuracy":  # of the images that leave at an exit, which may be one
        return 1
    if name.endswith("_sd"):
        return unit * (images / IMAGES) ** 0.5
    if name == "kept_by_difficulty":  # of a quarter of the images
        return 4 * unit * images / IMAGES
    if name == "unique_decisions":
        return images
    if name == "reward":  # at most 1 for a right answer, and at least -5 for a wrong one
        return 6 * images / IMAGES
    return 2 * unit * images / IMAGES  # twice: a margin is moved by the policy and by what it is compared with


def check_alike(after: dict[str, Any], before: dict[str, Any], images: int = 1) -> None:
    """Two summaries have the same keys, and figures that differ by what ``images`` images can move."""
    after, before = comparable(after), comparable(before)
    assert after.keys() == before.keys()
    if after == before:
        return
    for key, value in before.items():
        within = tolerance(key, before, images)
        if isinstance(value, list):
            assert len(after[key]) == len(value), key
        pairs = zip(after[key], value) if isinstance(value, list) else [(after[key], value)]
        for new, old in pairs:
            if isinstance(old, float | int) and not isinstance(old, bool) and new is not None:
                assert new == pytest.approx(old, abs=within + 1e-9 * abs(old)), key
            elif within == 0:
                assert new == old, key


def printed_figures(text: str) -> dict[str, Any]:
    """What ``policyskip evaluate`` has printed, by key."""
    pairs = (line.split(": ", 1) for line in text.splitlines() if line.startswith("test/"))
    texts = ("test/verdict", "test/verdict_because", "test/rival")
    return {key: value if key in texts else ast.literal_eval(value) for key, value in pairs}


def test_every_kind_is_stored():
    assert len(JUDGED) == 15 and len(HALF) == 5
    size = sum(path.stat().st_size for path in STORED.rglob("*") if path.is_file())
    assert size < 1.25e6
    for path in STORED.glob("*/*.*"):
        assert path.suffix in (".json", ".jsonl", ".yaml", ".pt", ".safetensors"), path


@pytest.mark.parametrize("name", JUDGED)
def test_evaluate_gives_the_figures_of_the_summary(name, workshop):
    before = summary_of(STORED / name)
    result = typed("evaluate", f"run=runs/{name}", "device=cpu", cwd=workshop)
    assert result.returncode == 0, result.stderr
    figures = printed_figures(result.stdout)
    assert figures["test/verdict"] in ("pays", "does not pay", "not shown") and "dealt at random" in result.stdout
    check_alike(figures, {key: value for key, value in before.items() if key.startswith("test/")})


@pytest.mark.parametrize("name", sorted({*JUDGED} - {"oracle"}))
def test_a_loaded_policy_decides_and_predicts_as_recorded(name, workshop, test_images):
    images, label_N = test_images
    before, prediction = recorded(STORED / name), policyskip.load(workshop / "runs" / name).predict(images, 48)
    assert torch.equal(before["label_N"], label_N)
    K = before["ran_NK"].shape[1]
    exits = hasattr(prediction, "exit_B")
    ran_NK = torch.arange(K) <= prediction.exit_B.unsqueeze(1) if exits else prediction.keep_BK
    alike_N = (ran_NK == before["ran_NK"]).all(1)
    assert alike_N.sum() >= IMAGES - 1
    assert torch.allclose(prediction.macs_B[alike_N], before["macs_N"][alike_N], rtol=1e-12)
    assert (prediction.label_B == before["prediction_N"]).sum() >= IMAGES - 1


@pytest.mark.parametrize(
    ("name", "message"),
    [("oracle", "oracle's, which sees the label"), ("pretrain", "policy.json; the run did not get that far")],
)
def test_what_cannot_be_loaded_is_said_as_before(name, message, workshop):
    with pytest.raises(UserError, match=message):
        policyskip.load(workshop / "runs" / name)


@pytest.mark.parametrize(
    ("name", "changes", "backbone"),
    [
        ("best_static", {"policy": {"name": "FixedPolicy", "arguments": {"num_blocks": 15}, "macs": 10**400}}, None),
        ("best_static", {"image_shape": [3, float("inf"), 20]}, None),
        ("best_static", {"backbone": {"config": None, "hash": "x", "seed": float("inf")}}, "resnet32_digits"),
    ],
)
def test_numbers_and_kinds_that_cannot_be_are_damage(name, changes, backbone, tmp_path):
    path = copy_of(name, tmp_path) / "policy.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))
    with pytest.raises(UserError, match=r"policy\.json is damaged or of another version"):
        policyskip.load(path.parent, backbone)


def test_a_run_is_judged_again_without_its_checkpoint(tmp_path):
    run = copy_of("budget", tmp_path)
    (run / "checkpoint.pt").unlink()
    result = typed("evaluate", f"run=runs/{run.name}", "device=cpu", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Differs from summary.json in test/reward; judged in float32." in result.stdout


def test_a_reward_that_moves_has_not_moved_where_nothing_was_learned(tmp_path):
    run = copy_of("best_static", tmp_path)
    config = (run / "config.yaml").read_text()
    utilization = "_target_: policyskip.rewards.Utilization\n  penalty: 12.0\n"
    assert utilization in config
    (run / "config.yaml").write_text(
        config.replace(utilization, "_target_: policyskip.rewards.Budget\n  target: 0.5\n")
    )
    result = typed("evaluate", f"run=runs/{run.name}", "device=cpu", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Differs from summary.json in test/reward; judged in float32." in result.stdout


@pytest.mark.parametrize("name", HALF)
def test_a_run_that_was_stopped_half_way_ends_as_if_it_had_not(name, tmp_path, no_pictures):
    run = copy_of(f"{name}-half", tmp_path)
    if name == "a2c-exit":  # over a frozen network in a file, the one that cdl started from
        (tmp_path / "linear").mkdir()
        shutil.copy(STORED / "cdl/start.safetensors", tmp_path / "linear/network.safetensors")
    command = "pretrain" if name == "pretrain" else "train"
    result = typed(command, f"run.resume=runs/{run.name}", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    after, before = summary_of(run), summary_of(STORED / name)
    if command == "pretrain":
        assert after.pop("command").replace("-half", "") == before.pop("command")
        after["hash"] = before["hash"]
    for summary in (after, before):  # the static front is searched otherwise since, and finds other sets
        for key in [key for key in summary if key.startswith("test/static_")]:
            del summary[key]
    check_alike(after, before, images=3)  # which are judged by weights that two updates have changed
    records, whole = records_of(run), records_of(STORED / name)
    assert records[: len(whole) // 2] == records_of(STORED / f"{name}-half")
    for record, same in zip(records, whole, strict=True):
        assert record.keys() == same.keys() and record["step"] == same["step"]
        if name != "a2c-exit":  # which begins the episodes that were under way anew
            numbers = {key: value for key, value in same.items() if isinstance(value, float) and key != "seconds"}
            assert {key: record[key] for key in numbers} == pytest.approx(numbers, rel=0.02, abs=0.05)
    newer = {"plots", "reward.json"}
    assert {path.name for path in run.iterdir()} - newer == {path.name for path in (STORED / name).iterdir()}


@pytest.mark.parametrize("name", sorted({*JUDGED} - {*HALF, *FIXED, *SIMILAR}))
def test_a_finished_run_goes_on_to_more_updates(name, tmp_path, no_pictures):
    run = copy_of(name, tmp_path)
    result = typed("train", f"run.resume=runs/{name}", "train.steps=5", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    after, before = summary_of(run), summary_of(STORED / name)
    assert after["steps"] == 5 and comparable(after).keys() >= comparable(before).keys()
    assert json.loads((run / "policy.json").read_bytes())["steps"] == 5
    records, old = records_of(run), records_of(STORED / name)
    assert records[: len(old)] == old and records[-1]["step"] == 5


@pytest.mark.parametrize("name", FIXED)
def test_a_run_that_learns_nothing_has_nothing_left_to_do(name, tmp_path):
    run = copy_of(name, tmp_path)
    result = typed("train", f"run.resume=runs/{name}", cwd=tmp_path)
    assert result.returncode == 0 and "nothing is left to do" in result.stdout
    assert summary_of(run) == summary_of(STORED / name)


def test_calibrate_chooses_the_same_thresholds_again(tmp_path, no_pictures):
    run = copy_of("calibrated", tmp_path)
    result = typed("calibrate", "run=runs/calibrated", "target.macs_fraction=0.6", "device=cpu", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    check_alike(summary_of(run), summary_of(STORED / "calibrated"))
    before, after = (json.loads((folder / "policy.json").read_bytes()) for folder in (STORED / "calibrated", run))
    thresholds = [[float(t) for t in policy["exits"].pop("thresholds")] for policy in (before, after)]
    assert before == after and thresholds[0] == pytest.approx(thresholds[1], rel=1e-3)


def test_compare_tables_have_the_recorded_accuracies(workshop, no_pictures, monkeypatch):
    """With the recorded decisions, and with decisions made again where the files are missing: without any rival."""
    monkeypatch.setattr(rivals, "choose", None)
    monkeypatch.setattr(rivals, "dealt_exits", None)
    again = workshop / "again"
    for name in ("blockdrop", "skipnet", "branchynet", "a2c-exit"):
        shutil.copytree(STORED / name, again / name, ignore=shutil.ignore_patterns("decisions.safetensors"))
    made = {}
    for folder, output in (("runs", "whole"), ("again", "recomputed")):
        words = [f"runs={folder}", f"output={output}", "recompute=true", "images=false", "tracking=none", "device=cpu"]
        result = typed("compare", *words, cwd=workshop)
        assert result.returncode == 0, result.stderr
        with (workshop / output / "runs.csv").open() as file:
            made[output] = {row["run"]: row for row in csv.DictReader(file)}
    whole, recomputed = made["whole"], made["recomputed"]
    assert sorted(whole) == JUDGED
    for name, row in whole.items():
        summary = summary_of(STORED / name)
        assert float(row["accuracy"]) == pytest.approx(summary["test/accuracy"])
        assert float(row["macs_fraction"]) == pytest.approx(summary["test/macs_fraction"])
    assert sorted(recomputed) == sorted(path.name for path in again.iterdir())
    for name, row in recomputed.items():
        assert float(row["accuracy"]) == pytest.approx(float(whole[name]["accuracy"]), abs=1 / IMAGES)


def test_a_pretrained_network_still_serves(workshop):
    words = ["backbone=cifar_resnet", "backbone.depth=8", "backbone.checkpoint=runs/pretrain/backbone.safetensors"]
    small = ["data.train=32", "data.validation=32", "data.test=32", "front.images=32"]
    result = typed("front", *words, *small, "device=cpu", cwd=workshop)
    assert result.returncode == 0, result.stderr
    assert "the blocks that run" in result.stdout and "  111\n" in result.stdout
