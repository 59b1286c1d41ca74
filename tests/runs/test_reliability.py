"""Run folders that stay whole and need no other file, and what is printed when something goes wrong."""

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
from policyskip.backbones.checkpoints import save
from policyskip.errors import UserError
from policyskip.evaluation.decisions import collapse_warnings
from policyskip.runs.folder import Run, create, open_run
from tests.conftest import typed, without_waits
from tests.learners import exits, learn
from tests.made_up import made_up_decisions
from tests.runs.test_stored_runs import STORED
from tests.test_cli import SMALL

EXITS = ["agent=cdl", "backbone.exits=[5,9,12]", "agent.delta=0.3", "target.macs_fraction=0.95", "tracking=none"]
DATA = ["data.train=64", "data.validation=40", "data.test=40"]
COMMAND = [sys.executable, "-m", "policyskip"]


# Collapse


def test_collapsed_policies_are_named():
    every, none = torch.ones(4, 3, dtype=torch.bool), torch.zeros(4, 3, dtype=torch.bool)
    one = torch.tensor([[True, False, True]]).expand(4, 3)

    def warnings(ran_NK: torch.Tensor, kind: str = "blocks") -> list[str]:
        return collapse_warnings(made_up_decisions(ran_NK.int().tolist(), kind=kind))

    assert "all 3 blocks run for every image" in warnings(every)[0]
    assert "none of the 3 blocks" in warnings(none)[0]
    assert "the same for every image, 101" in warnings(one)[0]
    assert warnings(torch.cat([one, every])) == [] == warnings(every[:1])
    first_NK, second_NK = (torch.tensor([ran]).expand(2, 3) for ran in ([1, 0, 0], [1, 1, 0]))
    assert "leaves at exit 1" in warnings(second_NK, "exits")[0]
    assert "leaves at the last exit" in warnings(every, "exits")[0]
    assert warnings(torch.cat([first_NK, second_NK]), "exits") == [] == warnings(torch.ones(2, 1), "exits")


def test_a_collapsed_policy_is_a_warning_in_the_summary_on_screen_and_in_wandb(tmp_path):
    """The constant policy sees no image, so it decides the same for all."""
    arguments = [
        *SMALL,
        "train.steps=1",
        "agent.policy=constant",
        "front.budget=4e3",
        "front.images=20",
    ]
    arguments += ["backbone=resnet20", "backbone.checkpoint=random", "tracking.mode=offline", "run.dir=x"]
    result = typed("train", *arguments, cwd=tmp_path, drawn=True)
    assert result.returncode == 0, result.stderr
    (warning,) = json.loads((tmp_path / "x/summary.json").read_text())["warnings"]
    assert warning.startswith("the policy has collapsed") and "warning: the policy has collapsed" in result.stdout
    (offline,) = (tmp_path / "x" / "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(offline)]
    content = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert warning in json.dumps(content["summary"], ensure_ascii=False)


def test_one_test_image_has_no_interval(tmp_path):
    arguments = [*SMALL, "data.test=1", "backbone=resnet20", "backbone.checkpoint=random", "tracking=none", "run.dir=x"]
    arguments += ["front.budget=4e3", "front.images=20", "agent.width=4"]
    result = typed("train", *arguments, cwd=tmp_path, drawn=True)
    assert result.returncode == 0 and "points (no interval)" in result.stdout, result.stderr
    summary = json.loads((tmp_path / "x/summary.json").read_text(), parse_constant=pytest.fail)
    assert (
        summary["test/rival_low"] is None
        and summary["test/verdict"] == "not shown"
        and None in summary["test/kept_by_difficulty"]
    )
    assert "Every figure is that" in typed("evaluate", "run=x", "device=cpu", cwd=tmp_path).stdout


# A run folder needs no other file


@pytest.fixture(scope="module")
def moved(tmp_path_factory) -> Path:
    """A run with exits (x) and a stopped copy of it (stopped), whose starting checkpoint is no longer there."""
    folder = tmp_path_factory.mktemp("moved")
    shipped = Path(policyskip.__file__).parent / "weights" / "resnet32_digits.safetensors"
    shutil.copy(shipped, folder / "net.safetensors")
    arguments = [*EXITS, *SMALL, "backbone.checkpoint=net.safetensors", "run.dir=x"]
    result = typed("train", *arguments, cwd=folder)
    assert result.returncode == 0, result.stderr
    (folder / "net.safetensors").unlink()
    return folder


def test_a_run_with_exits_needs_no_other_file(moved):
    assert (moved / "x/start.safetensors").is_file()
    result = typed("evaluate", "run=x", "device=cpu", cwd=moved)
    assert result.returncode == 0 and "Every figure is that of summary.json." in result.stdout, result.stderr
    result = typed("calibrate", "run=x", "device=cpu", "target.macs_fraction=0.97", cwd=moved)
    assert result.returncode == 0, result.stderr
    shutil.copytree(moved / "x", moved / "longer")
    result = typed("train", "run.resume=longer", "train.steps=7", cwd=moved)
    assert result.returncode == 0, result.stderr


def test_a_backbone_for_a_run_that_brings_its_own_is_refused(moved):
    with pytest.raises(UserError, match="brings its own network, network.safetensors; backbone=random has no effect"):
        policyskip.load(moved / "x", backbone="random")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["calibrate", "run=x", "+agent.rule=entropy"], "there is no key agent"),
        (["evaluate", "run=x", "+env.name=3"], "env"),
        (["pretrain", "+agent.width=3"], "there is no key agent"),
        (["train", "agent=msdnet", *DATA, "+env.speed=3"], "env.speed has no effect"),
        (["train", "agent=branchynet", *DATA, "env.cached=false"], "env.cached has no effect"),
        (["train", "+experiment=debug", "agent.policy=imagenet", "data.batch_size=1"], "needs two images at least"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_has_no_effect_or_cannot_work_is_refused(moved, words, message):
    before = {path for path in moved.rglob("*") if path.name != "outputs"}
    result = typed(*words, "device=cpu", cwd=moved)
    assert result.returncode == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr
    assert {path for path in moved.rglob("*")} == before


# One writer


def test_a_folder_that_another_process_writes_into_is_refused(moved):
    code = "import time; from policyskip.runs.folder import open_run\nrun = open_run('x'); run.lock(); print('held', flush=True); time.sleep(99)"
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=moved, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        for words in (
            ["train", "run.resume=x", "train.steps=9"],
            ["calibrate", "run=x", "target.knee=true"],
            ["profile", "run=x"],
        ):
            result = typed(*words, cwd=moved)
            assert result.returncode == 2 and "another process is writing into x" in result.stderr
        assert typed("evaluate", "run=x", "device=cpu", cwd=moved).returncode == 0  # which only reads
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    run = open_run(str(moved / "x"))
    run.lock()  # a killed process leaves no lock behind
    run.unlock()


def test_runs_that_begin_together_get_folders_of_their_own(tmp_path):
    """Three processes that are let go at the same moment."""
    code = (
        "import sys, time\nfrom policyskip.runs.folder import create\nprint('ready', flush=True); sys.stdin.readline()\n"
        "print(create('run', 'policyskip train', 'a: 1').name, flush=True); sys.stdin.readline()"
    )
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, **pipes) for _ in range(3)]
    try:
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        names = [process.stdout.readline().strip() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()
    assert sorted(names) == sorted(["run", *(f"run-{n}" for n in (2, 3))])


def test_one_of_several_processes_that_cannot_find_the_others_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = typed("train", "+experiment=debug", cwd=tmp_path)
    assert result.returncode == 2 and "the other processes cannot be met" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


# Interruptions


def test_ctrl_c_while_libraries_are_imported_leaves_no_trace(tmp_path):
    process = subprocess.Popen([*COMMAND, "train"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT) and errors in ("", "interrupted\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("saved", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_interruption_that_waits_for_nothing_claims_nothing(saved, tmp_path, monkeypatch):
    """A second Ctrl-C arrives while the first is waiting for the update to end."""
    from policyskip.agents.blockdrop import BlockDrop

    update = BlockDrop.update

    def interrupted(agent, env):
        if agent.step == (3 if saved else 1):
            raise KeyboardInterrupt
        return update(agent, env)

    monkeypatch.setattr(BlockDrop, "update", interrupted)
    result = typed("train", "+experiment=debug", "front.budget=2e3", "device=cpu", "run.dir=x", cwd=tmp_path)
    assert result.returncode == 130 and not without_waits(result.stderr)
    printed = "Stopped at once; what came after update 3 is not kept" if saved else "before anything was saved"
    assert printed in result.stdout and "policyskip train run.resume=x" in result.stdout
    assert "Stopped and saved" not in result.stdout
    if not saved:
        monkeypatch.setattr(BlockDrop, "update", update)
        assert typed("train", "run.resume=x", cwd=tmp_path).returncode == 0


def test_sigterm_saves_first(tmp_path):
    process = subprocess.Popen(
        [*COMMAND, "train", "+experiment=debug", "device=cpu", "train.steps=9000", "train.validate_every=9000",
         "front.budget=2e3", "run.dir=x"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "x/metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and not without_waits(errors) and "Stopped and saved." in printed
    assert Run(tmp_path / "x").load_checkpoint()["step"] >= 2


# Damaged metadata


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.yaml", "policy.json", "summary.json"])
@pytest.mark.parametrize("content", ["null", "[[[", '{"steps": {}}'])
def test_metadata_of_wrong_types_is_refused_in_one_line(moved, tmp_path, name, content):
    shutil.copytree(moved / "x", tmp_path / "x")
    (tmp_path / "x" / name).write_text(content)
    if name == "policy.json":
        with pytest.raises(UserError, match="policy.json is damaged"):
            policyskip.load(tmp_path / "x")
    for words in (["evaluate", "run=x"], ["calibrate", "run=x", "target.knee=true"], ["train", "run.resume=x"]):
        result = typed(*words, *(["device=cpu"] if words[0] != "train" else []), cwd=tmp_path)
        lines = result.stderr.splitlines()
        assert (result.returncode, len(lines)) in ((0, 0), (2, 1)), result.stderr
        assert name != "config.yaml" or result.returncode == 2


def test_weights_that_were_changed_are_noticed(tmp_path):
    run = create(str(tmp_path / "run"), "policyskip train", "")
    assert learn("blockdrop", run, steps=2)
    content = bytearray((run.folder / "best-so-far.safetensors").read_bytes())
    content[-3] ^= 4
    (run.folder / "best-so-far.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="best-so-far.safetensors is damaged or not ours: its content has been changed"):
        run.load_best_so_far()
    content = bytearray((run.folder / "checkpoint.pt").read_bytes())
    content[len(content) // 2] ^= 4  # torch.load would take it
    (run.folder / "checkpoint.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"checkpoint.pt is damaged or not ours: its part .* has been changed"):
        run.load_checkpoint()
    save(exits(), tmp_path / "net.safetensors")
    content = bytearray((tmp_path / "net.safetensors").read_bytes())
    content[-3] ^= 4
    (tmp_path / "net.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="its content has been changed since it was written"):
        policyskip.backbones.load_exits(str(tmp_path / "net.safetensors"))


def test_a_line_break_in_a_command_makes_no_configuration(tmp_path):
    run = create(str(tmp_path / "x"), "policyskip train tracking.project='a\nseed: 77\u2028b: 1'", "seed: 1\n")
    assert yaml.safe_load((run.folder / "config.yaml").read_text("utf-8")) == {"seed": 1}
    assert run.command == r"policyskip train tracking.project='a\nseed: 77\nb: 1'"


def test_a_run_of_pretrain_is_no_run_of_train(tmp_path):
    shutil.copytree(STORED / "pretrain", tmp_path / "x")
    for words in (["evaluate", "run=x"], ["train", "run.resume=x"], ["calibrate", "run=x"]):
        result = typed(*words, cwd=tmp_path)
        assert result.returncode == 2 and "go on with:  policyskip pretrain run.resume=x  or use its" in result.stderr


def test_what_is_no_run_folder_says_which_runs_are_in_it(tmp_path):
    shutil.copytree(STORED / "pretrain", tmp_path / "sweep" / "x")
    (tmp_path / "log.txt").touch()
    assert "such as sweep/x" in typed("evaluate", "run=sweep", cwd=tmp_path).stderr
    assert "the run folder log.txt is a file" in typed("evaluate", "run=log.txt", cwd=tmp_path).stderr
