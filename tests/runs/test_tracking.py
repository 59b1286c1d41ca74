"""What Weights & Biases receives, read back from its offline file, and what happens without a network."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from policyskip.comparison.compare import compare
from policyskip.runs.folder import Run
from policyskip.runs.tracking import Examples, Tracker, _by_name, _server_answers, log_comparison
from tests.made_up import drawn, made_up_run


def read_back(folder: Path) -> list[dict]:
    """The records of a run's offline file, by W&B's own reader."""
    (offline,) = (folder / "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(offline)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in printed.splitlines()]


def of(records: list[dict], kind: str) -> list[dict]:
    return [record[kind] for record in records if record["type"] == kind]


def test_the_offline_file_holds_everything_of_a_run(tmp_path):
    folder = tmp_path / "blockdrop-digits"
    folder.mkdir()
    (folder / "policy.json").write_text("{}")
    (folder / "plots").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "plots/gallery.png")
    tags = ["blockdrop", "digits", "seed 3"]
    tracker = Tracker(Run(folder), "offline", {"seed": 3, "agent": {"lr": 0.1}}, "shelf", "a group", "train", tags)
    tracker.log(10, 1.5, {"train/reward": 0.25, "note": "not a number"})
    tracker.log(20, 3.0, {"val/accuracy": 0.75})
    examples = Examples(["label"], [[np.zeros((4, 4, 3), np.uint8), "seven"]])
    summary = {"agent": "blockdrop", "test/accuracy": 0.5, "test/exit_share": [0.5, 0.5], "frozen_network": None}
    tracker.finish(summary, [folder / "plots/gallery.png"], [folder / "policy.json"], examples)
    assert tracker.where.startswith("offline; `wandb sync ")

    records = read_back(folder)
    (run,) = of(records, "run")
    assert (run["display_name"], run["run_group"], run["project"]) == ("blockdrop-digits", "a group", "shelf")
    assert run["job_type"] == "train" and sorted(run["tags"]) == sorted(tags)
    assert run["config"]["update"]["agent"] == {"lr": 0.1} and run["config"]["update"]["seed"] == 3
    history = [record["item"] for record in of(records, "history")]
    assert any(item.get("step") == 10 and item.get("train/reward") == 0.25 for item in history)
    assert any(item.get("step") == 20 and item.get("val/accuracy") == 0.75 for item in history)
    metrics = of(records, "metric")
    assert {(m.get("glob_name"), m.get("step_metric")) for m in metrics} >= {("train/*", "step"), ("val/*", "step")}
    logged = {key: value for record in of(records, "summary") for key, value in record["update"].items()}
    assert logged["test/accuracy"] == 0.5 and not any(key.startswith("test/exit_share") for key in logged)
    assert any(key.startswith("plots/gallery") for key in logged) and any(key.startswith("examples") for key in logged)
    artifacts = of(records, "artifact")
    assert ("policy", "blockdrop-digits") in {(artifact["type"], artifact["name"]) for artifact in artifacts}
    assert len(artifacts) == 2  # the policy, and the table of examples
    assert [r["step"] for r in Run(folder).metrics()] == [10, 20]


def test_a_comparison_is_a_run_of_its_own(tmp_path):
    for seed in range(2):
        made_up_run(tmp_path / f"runs/{seed}", drawn(seed), seed=seed)
    made_up_run(tmp_path / "runs/p", drawn(0, "ppo"), "ppo")
    made = compare([str(tmp_path / "runs")], tmp_path / "out")
    where = log_comparison(made.folder, made.tables, made.pictures, "offline", {"runs": "runs"}, "shelf", None)
    assert where.startswith("offline")
    records = read_back(tmp_path / "out")
    (run,) = of(records, "run")
    assert (run["display_name"], run["job_type"], run["tags"]) == ("out", "compare", ["comparison"])
    summary_keys = {key for record in of(records, "summary") for key in record["update"]}
    for name in ("comparison", "runs", "differences", "agreement", "plots/pareto_front", "plots/agreement"):
        assert any(key.startswith(name) for key in summary_keys), name
    assert ("comparison", "out") in {(artifact["type"], artifact["name"]) for artifact in of(records, "artifact")}


def test_pictures_in_a_folder_of_their_own_have_its_name(tmp_path):
    found = _by_name([tmp_path / "plots/x.png", tmp_path / "plots/group2/x.png"])
    assert list(found) == ["x", "group2/x"]


def test_a_run_that_was_stopped_ends_as_failed(tmp_path):
    codes: list[int] = []
    tracker = Tracker(Run(tmp_path), "none", {})
    tracker.close()
    tracker.wandb_run = SimpleNamespace(finish=lambda exit_code: codes.append(exit_code))
    tracker.close()
    assert codes == [1]


def test_a_server_that_does_not_answer_is_noticed():
    class Refuses(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        def log_message(self, *_args):
            pass

    with socket.socket() as silent, HTTPServer(("127.0.0.1", 0), Refuses) as server:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        assert not _server_answers(f"http://127.0.0.1:{silent.getsockname()[1]}", seconds=0.2)
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert _server_answers(f"http://127.0.0.1:{server.server_port}")
        thread.join()
    assert not _server_answers("http://127.0.0.1:9") and not _server_answers("nonsense")


@pytest.mark.parametrize("mode", ["auto", pytest.param("online", marks=pytest.mark.slow)])
def test_a_key_without_a_network_goes_on_offline_and_says_so(tmp_path, mode):
    (tmp_path / "run").mkdir()
    program = (
        "from pathlib import Path; from policyskip.runs.folder import Run; from policyskip.runs.tracking import Tracker\n"
        f"tracker = Tracker(Run(Path('run')), {mode!r}, {{}}); tracker.log(1, 0.1, {{'train/loss': 1.0}})\n"
        "tracker.finish({}, [], [], None); print(tracker.where)"
    )
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    set_ = {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_SILENT": "true"}
    command = [sys.executable, "-c", program]
    result = subprocess.run(
        command, cwd=tmp_path, env=clean | set_, capture_output=True, text=True, timeout=30, check=True
    )
    assert "W&B cannot be reached (no answer from http://127.0.0.1:9); this run is written offline" in result.stdout
    assert "brings it up" in result.stdout
    assert any(record["type"] == "history" for record in read_back(tmp_path / "run"))
