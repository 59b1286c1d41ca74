"""Many runs from one command: folders, lines on the screen, failures, and the comparison of what came of them."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from policyskip import sweeps
from policyskip.evaluation.decisions import load_decisions
from policyskip.runs.folder import Run
from tests.conftest import typed

SMALL = ["+experiment=debug", "device=cpu", "data.test=40", "train.steps=2", "train.validate_every=1", "seed=0,1"]
EXITS = [*SMALL, "backbone=resnet32_digits_exits", "train.log_every=1"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> tuple[Path, Path, object]:
    """A sweep over agents of which one cannot act on a network with exits; its folder, and what it said."""
    folder = tmp_path_factory.mktemp("swept")
    result = typed("train", "--multirun", "agent=blockdrop,cdl", *EXITS, cwd=folder)
    (sweep,) = (folder / "runs").iterdir()
    return folder, sweep, result


def test_a_failing_job_does_not_end_the_others_and_is_named(swept):
    _, sweep, result = swept
    assert result.returncode == 2
    first, *failures = result.stderr.splitlines()
    assert first == f"2 jobs failed; {Path('runs') / sweep.name / 'logs'} has what they said"
    assert [line.split(":")[0].strip() for line in failures] == [
        "[1] agent=blockdrop seed=0",
        "[2] agent=blockdrop seed=1",
    ]
    assert all("has exits, not blocks to skip" in line for line in failures)


def test_folders_and_lines_tell_jobs_apart(swept):
    _, sweep, result = swept
    finished = {path.parent.name for path in sweep.glob("*/summary.json")}
    assert finished == {"cdl-digits-seed-0", "cdl-digits-seed-1"}
    assert [json.loads((sweep / name / "summary.json").read_text())["seed"] for name in sorted(finished)] == [0, 1]
    lines = result.stdout.splitlines()
    assert len(lines) == 9 and lines[-1] == f"Compare them:  policyskip compare runs=runs/{sweep.name}"
    assert lines[6].startswith("[4/4] agent=cdl seed=1: started")
    assert re.fullmatch(
        r"\[4/4\] agent=cdl seed=1: test accuracy [\d.]+ % at [\d.]+ of the MACs, \d+ s, runs/\S+", lines[7]
    )
    assert "cdl on digits, test split, seed 1" in (sweep / "logs/004.txt").read_text()
    config = (sweep / "cdl-digits-seed-1/config.yaml").read_text()
    assert f"group: {sweep.name}" in config


def test_a_sweep_can_be_compared_and_decided_again(swept):
    folder, sweep, _ = swept
    recorded = load_decisions(Run(sweep / "cdl-digits-seed-0"))
    assert recorded is not None and len(recorded) == 40 and recorded.kind == "exits" and recorded.network == ""
    summary = json.loads((sweep / "cdl-digits-seed-0/summary.json").read_text())
    assert recorded.correct_N.double().mean().item() == pytest.approx(summary["test/accuracy"])
    assert recorded.macs_N.mean().item() == pytest.approx(summary["test/macs_mean"])
    result = typed("compare", f"runs={sweep}", "output=one", "tracking=none", cwd=folder)
    assert result.returncode == 0, result.stderr
    (sweep / "cdl-digits-seed-0/decisions.safetensors").unlink()
    again = typed("compare", f"runs={sweep}", "output=two", "tracking=none", "recompute=true", "device=cpu", cwd=folder)
    assert again.returncode == 0, again.stderr
    for name in ("comparison.csv", "agreement.csv", "disagreements.csv"):
        assert (folder / "one" / name).read_text() == (folder / "two" / name).read_text()
    with (folder / "one/comparison.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["row"], row["seeds"]) == ("cdl", "0 1")


@pytest.mark.slow
def test_every_agent_writes_the_metrics_that_are_compared(tmp_path):
    """Blocks, gates, thresholds and learned exits use the same names."""
    for number, arguments in enumerate(
        (["agent=blockdrop"], ["agent=skipnet"], ["agent=cdl"], ["agent=ppo", "env=early_exit"])
    ):
        small = [argument for argument in SMALL if not argument.startswith("seed")]
        small += ["train.log_every=1", f"run.dir=r{number}", *arguments]
        small += ["backbone=resnet32_digits"] if number == 1 else []
        result = typed("train", *small, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        run = Run(tmp_path / f"r{number}")
        names = {key for record in run.metrics() for key in record}
        assert names >= {"step", "seconds", "train/accuracy", "train/loss", "val/accuracy", "val/macs_fraction"}
        decided = load_decisions(run)
        assert decided is not None and (decided.network == "") == (arguments[0] in ("agent=skipnet", "agent=cdl"))
    result = typed("compare", "runs=r*", "output=out", "tracking=none", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    with (tmp_path / "out/comparison.csv").open() as file:
        assert [row["agent"] for row in csv.DictReader(file)] == ["blockdrop", "cdl", "ppo", "skipnet"]


def test_a_run_s_folder_is_named_after_what_was_chosen_or_a_class_of_the_user_s_own(monkeypatch):
    choices = {"data": "custom", "backbone": "resnet20", "agent": "full"}
    hydra = SimpleNamespace(get=lambda: SimpleNamespace(runtime=SimpleNamespace(choices=choices)))
    monkeypatch.setattr(sweeps, "HydraConfig", hydra)
    targets = {"data": "my_data.load", "backbone": "policyskip.backbones.cifar_resnet", "agent": "a b/c.Mine"}
    config = OmegaConf.create({group: {"_target_": target} for group, target in targets.items()})
    config.name = "${chosen:data} ${chosen:backbone} ${chosen:agent}"
    assert config.name == "my_data.load resnet20 a-b-c.Mine"


def test_what_hydra_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, folder = sweeps.prepare("train", ["-m", "agent=a,b", "seed=range(0,3)", "reward.penalty=2", "env=x,y"])
    name = "${chosen:agent}-${chosen:data}-seed-${seed}-${hydra:runtime.choices.env}"
    assert arguments[5:] == [
        f"hydra.sweep.dir={folder}",
        "+hydra.job.env_set.POLICYSKIP_SWEEP='12 agent seed env'",
        f"run.dir='{folder}/{name}'",
        f"tracking.group={folder.name}",
    ]
    again, other = sweeps.prepare("train", ["-m", "seed=1,2", "run.dir=mine", "tracking.group=mine"])
    assert other != folder and not any(a.startswith(("run.dir='", "tracking.group=sweep")) for a in again)
    assert sweeps.prepare("train", ["-m", "--cfg", "job", "seed=1,2"])[1] is not None
    assert sweeps.prepare("train", ["-m", "hydra/launcher=ray", "seed=0,1"])[1].is_absolute()
    given, _ = sweeps.prepare("train", ["-m", "backbone.checkpoint=a/b,../c", "seed=0,1"])
    assert given[-2].endswith("-seed-${seed}-${hydra:job.num}'")
    given, _ = sweeps.prepare("train", ["-m", "reward.penalty='a b',c", "agent.net_arch=[1,2],[3]", "train.steps=1,2"])
    assert given[-2].endswith("-train.steps-${train.steps}-${hydra:job.num}'")  # names that need no quoting
    for untouched in (["agent=a"], ["-m", "agent=[a"]):
        assert sweeps.prepare("train", untouched) == (untouched, None)
    assert sweeps.prepare("evaluate", ["-m", "run=a,b"])[1] is None


def test_a_job_that_is_stopped_ends_the_sweep_and_says_where_to_go_on(tmp_path, monkeypatch, capsys):
    job = SimpleNamespace(num=1, env_set={sweeps.SWEEP: "4 seed"})
    hydra = SimpleNamespace(job=job, overrides=SimpleNamespace(task=["seed=1"]), sweep=SimpleNamespace(dir=tmp_path))
    monkeypatch.setattr("hydra.core.hydra_config.HydraConfig.get", lambda: hydra)
    assert sweeps.run_job(lambda config: print("go on with …") or 130, None, lambda error: True) == 130
    said = capsys.readouterr().out
    assert "[2/4] seed=1: stopped" in said and "002.txt says how to go on" in said
    assert "go on with …" in (tmp_path / "logs/002.txt").read_text()


def test_a_wrong_key_is_refused_before_the_first_job(tmp_path):
    result = typed("train", "--multirun", "seed=0,1", "agent.learning=3", cwd=tmp_path)
    assert result.returncode == 2 and "there is no key agent.learning" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("plugin", "launcher"),
    [("hydra_ray_launcher", "ray_cluster"), ("hydra_submitit_launcher", "submitit_slurm")],
)
def test_launchers_compose(plugin, launcher):
    pytest.importorskip(f"hydra_plugins.{plugin}")
    from hydra import compose, initialize_config_module

    with initialize_config_module("policyskip.configs", version_base="1.3"):
        config = compose("train", [f"hydra/launcher={launcher}", "run.dir=x"], return_hydra_config=True)
    assert config.hydra.launcher._target_.startswith(f"hydra_plugins.{plugin}")
    if launcher == "ray_cluster":
        assert config.hydra.launcher.ray.init == {"address": "auto", "object_store_memory": None}
