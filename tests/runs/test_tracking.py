"""What Weights & Biases receives, read back from its offline file, and what happens without a network."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from policyskip.comparison.compare import compare
from policyskip.config import TrackingSection
from policyskip.errors import UserError
from policyskip.runs import own_code
from policyskip.runs.folder import Run
from policyskip.runs.labels import Labels, labels_of
from policyskip.runs.tracking import Examples, Tracker, _by_name, _server_answers, log_comparison
from tests.conftest import typed
from tests.made_up import drawn, made_up_run

VARIABLES = ("PROJECT", "ENTITY", "NAME", "RUN_GROUP", "TAGS", "JOB_TYPE", "NOTES", "RUN_ID")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch) -> None:
    """None of W&B's variables but WANDB_MODE."""
    for name in VARIABLES:
        monkeypatch.delenv(f"WANDB_{name}", raising=False)


def section(**typed) -> TrackingSection:
    return TrackingSection(mode="offline", **typed)


def read_back(folder: Path) -> list[dict]:
    """The records of a run's newest offline file, by W&B's own reader."""
    offline = max((folder / "wandb").glob("offline-run-*"))
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(offline)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in printed.splitlines()]


def of(records: list[dict], kind: str) -> list[dict]:
    return [record[kind] for record in records if record["type"] == kind]


def test_the_offline_file_holds_everything_of_a_run_also_of_one_that_goes_on(tmp_path, monkeypatch):
    folder = tmp_path / "blockdrop-digits"
    folder.mkdir()
    (folder / "policy.json").write_text("{}")
    (folder / "plots").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "plots/gallery.png")
    monkeypatch.setattr(own_code, "users_modules", lambda: [__name__])
    monkeypatch.setattr(own_code, "commit_of", lambda folder: "a" * 40)
    own_code.keep(Run(folder))
    tags = ["blockdrop", "digits", "seed 3"]
    typed_keys = section(project="shelf", entity="us", notes="first\ntry")
    labels = labels_of(typed_keys, "a group", "train", tags, ["reward.penalty=2", "run.dir=x"])
    tracker = Tracker(Run(folder), "offline", {"seed": 3, "agent": {"lr": 0.1}, "odd": ["\udcff"]}, labels)
    tracker.log(10, 1.5, {"train/reward": 0.25, "note": "not a number"})
    tracker.log(20, 3.0, {"val/accuracy": 0.75})
    tracker.log(30, 4.0, {"val/accuracy": 0.5})
    tracker.chosen = {"val/accuracy": 0.75}  # the weights of update 20 were kept
    examples = Examples(["label"], [[np.zeros((4, 4, 3), np.uint8), "seven"]])
    summary = {"agent": "blockdrop", "test/accuracy": 0.5, "test/exit_share": [0.5, 0.5], "frozen_network": None}
    tracker.finish(summary, [folder / "plots/gallery.png"], [folder / "policy.json"], examples)
    assert tracker.where.startswith("offline; `wandb sync ")

    records = read_back(folder)
    (run,) = of(records, "run")
    assert (run["display_name"], run["run_group"]) == ("blockdrop-digits penalty=2", "a group")
    assert (run["project"], run["entity"], run["notes"]) == ("shelf", "us", "first\ntry")
    assert run["job_type"] == "train" and sorted(run["tags"]) == sorted([*tags, "reward.penalty=2"])
    assert run["git"]["commit"] == "a" * 40
    assert run["config"]["update"]["agent"] == {"lr": 0.1} and run["config"]["update"]["seed"] == 3
    history = [record["item"] for record in of(records, "history")]
    assert any(item.get("step") == 10 and item.get("train/reward") == 0.25 for item in history)
    assert any(item.get("step") == 20 and item.get("val/accuracy") == 0.75 for item in history)
    metrics = of(records, "metric")
    assert {(m.get("glob_name"), m.get("step_metric")) for m in metrics} >= {("train/*", "step"), ("val/*", "step")}
    logged = {key: value for record in of(records, "summary") for key, value in record["update"].items()}
    assert (
        logged["val/accuracy"] == 0.75
        and logged["test/accuracy"] == 0.5
        and not any(key.startswith("test/exit_share") for key in logged)
    )
    assert any(key.startswith("plots/gallery") for key in logged) and any(key.startswith("examples") for key in logged)
    artifacts = of(records, "artifact")
    assert ("policy", "blockdrop-digits") in {(artifact["type"], artifact["name"]) for artifact in artifacts}
    assert len(artifacts) == 3  # the policy, the table of examples, and the code of the user's own classes
    (code,) = (artifact for artifact in artifacts if artifact["type"] == "code")
    assert [entry["path"] for entry in code["manifest"]["contents"]] == [f"own/{__name__.replace('.', '/')}.py"]
    assert [r["step"] for r in Run(folder).metrics()] == [10, 20, 30]

    monkeypatch.setenv("WANDB_NAME", "another")
    time.sleep(1)  # W&B names an offline folder after the second in which it is made
    resumed = Tracker(Run(folder), "offline", {}, labels_of(section(), None, "train"))
    resumed.close()
    assert resumed.where.count("offline-run-") == 2
    (again, *_) = of(read_back(folder), "run")
    for key in ("run_id", "display_name", "run_group", "project", "entity", "tags", "notes"):
        assert again[key] == run[key], key


def test_a_comparison_is_a_run_of_its_own(tmp_path):
    for seed in range(2):
        made_up_run(tmp_path / f"runs/{seed}", drawn(seed), seed=seed)
    made_up_run(tmp_path / "runs/p", drawn(0, "ppo"), "ppo")
    made = compare([str(tmp_path / "runs")], tmp_path / "out")
    labels = labels_of(section(project="shelf"), None, "compare", ["comparison"])
    where = log_comparison(made.folder, made.tables, made.pictures, "offline", {"runs": "runs"}, labels)
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


def test_a_typed_key_beats_a_variable_which_beats_a_default(monkeypatch):
    default = labels_of(section(), "a group", "train", ["digits"])
    assert (default.project, default.entity, default.group) == ("policyskip", None, "a group")
    assert (default.job_type, default.name, default.notes) == ("train", None, None)
    for name in VARIABLES:
        monkeypatch.setenv(f"WANDB_{name}", f"{name} set")
    monkeypatch.setenv("WANDB_TAGS", "one, two,,one")
    named = labels_of(section(), "a group", "train", ["digits"])
    assert (named.project, named.entity, named.group) == ("PROJECT set", "ENTITY set", "RUN_GROUP set")
    assert (named.job_type, named.name, named.notes) == ("JOB_TYPE set", "NAME set", "NOTES set")
    assert named.all_tags == ["one", "two", "digits"] and named.name_of(Path("x")) == "NAME set"
    typed = section(project="p", entity="e", group="g", name="n", notes="o", tags=["t"])
    found = labels_of(typed, "a group", "train", ["digits"])
    assert (found.project, found.entity, found.group, found.name, found.notes) == ("p", "e", "g", "n", "o")
    assert found.all_tags == ["t", "digits"]
    assert labels_of(TrackingSection(mode="none"), None, "train") == Labels()


def test_name_and_tags_tell_runs_apart_that_were_typed_differently():
    """What the folder's name says already, and what says nothing about the run, is not repeated."""
    typed = ["agent=skipnet", "reward.penalty=2", "++reward._target_=mine.Own", "~target", "+agent.width=8"]
    labels = labels_of(section(), None, "train", [], [*typed, "run.dir=x", "device=cpu", "tracking.mode=offline"])
    assert labels.name_of(Path("runs/skipnet-digits")) == "skipnet-digits penalty=2 reward=mine.Own target= width=8"
    assert "reward.penalty=2" in labels.all_tags and not any("run.dir" in tag for tag in labels.all_tags)
    other = labels_of(section(), None, "train", [], ["reward.penalty=3"])
    assert other.name_of(Path("a")) != labels_of(section(), None, "train", [], ["reward.penalty=4"]).name_of(Path("a"))
    long = labels_of(section(), None, "train", ["", " ", "x" * 99], [f"data.root=/{'y' * 200}"])
    assert len(long.name_of(Path("a"))) <= 128 and all(0 < len(tag) <= 64 for tag in long.all_tags)


@pytest.mark.parametrize(
    ("typed", "variable", "message"),
    [
        ({"project": "a/b"}, {}, "say tracking.entity=a tracking.project=b"),
        ({}, {"WANDB_PROJECT": "a?b"}, r"tracking.project or WANDB_PROJECT\) must not have any of"),
        ({"project": "\x1b[2J#"}, {}, r"got '\\\\x1b\[2J#'"),
        ({"project": "p" * 129}, {}, "tracking.project must have at most 128 letters, got 129"),
        ({"group": "p" * 129}, {}, "tracking.group must have at most 128 letters"),
        ({"tags": ["t" * 65]}, {}, "must have at most 64 letters, got 65"),
        ({}, {"WANDB_TAGS": "a," + "t" * 65}, "WANDB_TAGS"),
    ],
)
def test_labels_that_wandb_would_refuse_are_refused_before_there_is_a_folder(typed, variable, message, monkeypatch):
    for name, value in variable.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        labels_of(section(**typed), None, "train")


def test_a_project_with_a_slash_leaves_nothing_behind(tmp_path):
    result = typed("train", "tracking.project=a/b", "tracking.mode=offline", "run.dir=x", cwd=tmp_path)
    assert result.returncode == 2 and "say tracking.entity=a tracking.project=b" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"id": "a/../b"}', '{"id": 5, "project": "p", "tags": []}', "9" * 5000]
)
def test_a_damaged_file_of_the_wandb_run_is_said_and_passed_over(content, tmp_path, capsys):
    (tmp_path / "wandb.json").write_text(content)
    assert Tracker(Run(tmp_path), "none", {})._known_run() == {}
    assert "goes on as a new one in W&B" in capsys.readouterr().out


def test_nothing_is_written_through_a_link_in_the_place_of_wandbs_folder(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/wandb").symlink_to("../elsewhere")
    tracker = Tracker(Run(tmp_path / "run"), "offline", {})
    assert "is a link" in tracker.where and tracker.wandb_run is None and not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("place", ["_begun", "_describe"])
@pytest.mark.parametrize("variable", ["WANDB_MODE=sideways", "WANDB_DIR=/dev/null"])
@pytest.mark.parametrize("error", [ValueError, RuntimeError], ids=["a value", "its process has ended"])
def test_variables_that_wandb_refuses_do_not_stop_a_run(variable, place, error, tmp_path, monkeypatch):
    name, _, value = variable.partition("=")

    def refuses(*_arguments, **_options):
        raise error(f"{name.lower()}: \x1b[2J not {value}")

    monkeypatch.setattr(Tracker, "_begun", lambda *_: SimpleNamespace())
    monkeypatch.setattr(Tracker, place, refuses)
    tracker = Tracker(Run(tmp_path), "auto", {})
    tracker.log(1, 0.1, {"train/loss": 1.0})
    assert tracker.where == rf"not tracked: {name.lower()}: \x1b[2J not {value}"
    assert [record["step"] for record in Run(tmp_path).metrics()] == [1]


def test_wandb_that_fails_meanwhile_does_not_stop_a_run(tmp_path, capsys):
    """Its process may be killed, its disk may be full: the run's own files have everything."""

    def fails(*_arguments):
        raise BrokenPipeError("the service is gone")

    tracker = Tracker(Run(tmp_path), "none", {})
    tracker.wandb_run = SimpleNamespace(log=fails, finish=fails)
    for step in (1, 2):
        tracker.log(step, 0.1, {"train/loss": 1.0})
    tracker.finish({}, [], [], None)
    assert [record["step"] for record in Run(tmp_path).metrics()] == [1, 2]
    assert capsys.readouterr().out == "not complete, because W&B failed: the service is gone\n"


def test_no_settings_of_the_current_folder_are_read(tmp_path):
    """They can name a server to which W&B would send the user's key."""
    for folder in ("wandb", ".wandb"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "settings").write_text("[default]\nbase_url = http://127.0.0.1:9\nmode = online\n")
    code = """
import wandb
from pathlib import Path
from policyskip.runs.folder import create
from policyskip.runs.tracking import Tracker
tracker = Tracker(create("x", "policyskip train", ""), "offline", {})
print(tracker.wandb_run.settings.base_url, wandb.setup().settings.base_url, tracker.where)
tracker.close()
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and "127.0.0.1" not in result.stdout, result.stdout + result.stderr
    assert str(tmp_path / "x" / "wandb") in result.stdout


def test_a_run_that_is_not_tracked_never_imports_wandb(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would fail
    tracker = Tracker(Run(tmp_path), "none", {}, labels_of(TrackingSection(mode="none"), None, "train"))
    tracker.log(1, 0.1, {"train/loss": 1.0})
    tracker.finish({}, [], [], None)
    tracker.close()
    assert tracker.where == "not tracked"


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
    assert "uploads it" in result.stdout
    assert any(record["type"] == "history" for record in read_back(tmp_path / "run"))
