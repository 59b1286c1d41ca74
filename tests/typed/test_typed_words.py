"""The words behind a command: which reach Hydra, and what is said of the others."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from policyskip import cli
from policyskip.errors import UserError
from policyskip.typed import showing, words
from tests.conftest import typed
from tests.hostile import contents

REFUSED = {
    "evaluate run=null": "run must be a run folder, got run=null",
    "evaluate run=true": "run must be the name of a folder or file, got true; .* run=./true",
    "evaluate run=": "run must be a run folder",
    "evaluate run=[a]": r"run must be a run folder, got run=\[a\]",
    "calibrate run=0": "run=./0",
    "train run.resume=0": "run.resume=./0",
    "train run.resume=[a]": "run.resume must be a run folder",
    "train run.resume=true": "run.resume=./true",
    "train --config-name evaluate": "there is no flag --config-name",
    "train --config-name=evaluate": "there is no flag --config-name",
    "train --config-dir .": "there is no flag --config-dir",
    "train --config-path=/": "there is no flag --config-path",
    "train -cn evaluate": "there is no flag -cn",
    "train --conf x": "there is no flag --conf",
    "train --experimental-rerun x": "there is no flag --experimental-rerun",
    "train --lazy": r"there is no flag --lazy; .*\$\{args_no_hyphens\}",
    "train agent=../agent/full": "there is no agent/../agent/full; agent is one of a2c",
    "train agent=full.yaml": "there is no agent/full.yaml; agent is one of",
    "train agent=/full": "there is no agent//full",
    "train agent={}": r"there is no agent/\{\}; agent is one of",
    "train agent=[full,first]": r"there is no agent/\['full', 'first'\]",
    "train --multirun agent=full,../full": "there is no agent/../full",
    "train +experiment=../agent/full": "there is no experiment/../agent/full",
    "train agent@_global_=full": "agent@_global_ is no key",
    "train /agent=full": "/agent is no key",
    "train ~agent": "~agent cannot be left out",
    "train hydra.searchpath=[file://nowhere]": "hydra.searchpath=.* is a setting of Hydra",
    "train +hydra.searchpath=[file://nowhere]": "is a setting of Hydra",
    "train ++hydra.run.dir=/": "is a setting of Hydra",
    "train ~hydra.sweep": "is a setting of Hydra",
    "train hydra.verbose=nonsense": "is a setting of Hydra",
    "train hydra.output_subdir=x": "is a setting of Hydra",
    "train hydra/job_logging=x": "is a setting of Hydra",
    "train hydra/launcher=../x": "names no launcher",
    "train x": "x cannot be read: arguments are key=value",
    "evaluate runs/x": "did you mean run=runs/x",
    "compare runs": "did you mean runs=runs",
    "evaluate run=x/agent=full,seed=0": "cannot be read; unusual letters go in quotes of their own: \"run='x/agent=full,seed=0'\"",
    "train front.rivals=[~/a,b]": "unusual letters go in quotes of their own: \"front.rivals=\\['~/a','b'\\]\"",
    "front output=/": "output=/ is there, and is no file",
    "front output=true": "output=./true",
    "train run.dir=..": "run.dir=.. is no folder of its own",
    "train run.dir=a/..": "run.dir=a/.. is no folder of its own",
    "train run.dir=/dev/null": "run.dir cannot be below /dev/null, which is no folder",
    "train run.dir=/": "is no folder of its own",
    "compare runs=. output=..": "output=.. is no folder of its own",
    "compare runs=*": "no finished run",
    "train --package x": "--package goes with --cfg job",
    "train --resolve": "--resolve goes with --cfg job",
    "profile output=/": "output=/ is there, and is no file",
}


@pytest.mark.parametrize(("line", "message"), REFUSED.items(), ids=REFUSED.keys())
def test_refused_in_a_line_and_nothing_is_left(tmp_path, line, message):
    (here := tmp_path / "here").mkdir()
    result = typed(*line.split(" "), cwd=here)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert re.search(message, result.stderr), result.stderr
    assert contents(here) == {}


@pytest.mark.parametrize("word", ["run=a\udcff", "reward._target_=\udcff.A", "agent=\udcff", "--\udcff", "\udcff=1"])
def test_what_is_not_utf_8_is_named(tmp_path, word):
    result = typed("train", word, cwd=tmp_path)
    assert result.returncode == 2 and "is not UTF-8" in result.stderr and "\\udcff" in result.stderr


def test_words_for_hydra():
    good = ["agent=full", "+experiment=debug", "seed=1", "~reward", "hydra/launcher=ray", "++hydra.launcher.x=1"]
    assert words.checked("train", ["--multirun", *good, "--cfg", "job"]) == ["--multirun", "--cfg", "job", *good]
    assert words.checked("train", ["--seed=1", "--reward.penalty=2"]) == ["seed=1", "reward.penalty=2"]  # W&B's sweeps
    assert words.checked("train", ["data.root=~/x", "run.dir='~/y'"]) == ["data.root='~/x'", "run.dir='~/y'"]
    assert words.checked("train", ["run.resume=x", "data.root=y"]) == ["run.resume=x", "++data.root=y"]
    moved = ["data.root=y", "+backbone.checkpoint=z"]
    assert words.checked("evaluate", ["run=x", *moved]) == ["run=x", "++data.root=y", "++backbone.checkpoint=z"]
    assert words.checked("profile", ["run=x", "data.root=y"]) == ["~data", "~backbone", "run=x", "++data.root=y"]
    assert words.checked("profile", ["data=cifar10", "data.root=y"]) == ["data=cifar10", "data.root=y"]
    with pytest.raises(UserError):
        words.checked("profile", ["run=x", "backbone=resnet20"])


def test_home_is_meant_by_a_tilde_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for line in ("evaluate run=~/none", "train run.resume='~/none'", "calibrate run=~/none"):
        result = typed(*line.split(" "), cwd=tmp_path)
        assert result.returncode == 2 and f"the run folder {tmp_path}/none does not exist" in result.stderr


@pytest.mark.parametrize("command", ["train", "pretrain", "evaluate", "calibrate", "profile", "compare", "front"])
def test_help_shows_the_command_s_own_groups_and_keys(tmp_path, command):
    result = typed(command, "--help", cwd=tmp_path)
    own = words.defaults_of(command)
    shown = {line.split()[0] for line in result.stdout.splitlines() if line[:2] == "  " and line[2:3].isalpha()}
    assert result.returncode == 0 and {group for group in words.groups() if group in shown} == set(own)
    assert ("device:" in result.stdout) and "${" not in result.stdout and "hydra" not in result.stdout


def test_a_shell_completes_commands_groups_names_and_keys(monkeypatch):
    def completed(line: str) -> list[str]:
        monkeypatch.setenv("COMP_LINE", line)
        return showing.completions(("train", "front"))

    assert completed("policyskip ") == ["train ", "front "] and completed("policyskip f") == ["front "]
    assert completed("policyskip train agent=b") == ["agent=best_static", "agent=blockdrop", "agent=branchynet"]
    assert "train.steps=" in completed("policyskip train seed=1 train.s")
    assert "agent=" in completed("policyskip train a") and completed("policyskip front a") == []
    assert completed("policyskip train [") == [] and completed("policyskip nothing x") == []


@pytest.mark.skipif(not Path("/bin/bash").exists(), reason="bash is not here")
def test_the_script_for_bash_replaces_what_stands_behind_the_equals_sign(tmp_path):
    (tmp_path / "policyskip").write_text("#!/bin/sh\nprintf 'agent=best_static\\nagent=blockdrop\\n'\n")
    (tmp_path / "policyskip").chmod(0o755)
    code = f"{showing.SCRIPTS['bash']}\nCOMP_LINE='policyskip train agent=b' COMP_POINT=24\n_policyskip\necho ${{COMPREPLY[@]}}"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for breaks, expected in (("=: ", "best_static blockdrop"), (": ", "agent=best_static agent=blockdrop")):
        run = subprocess.run(
            ["bash", "-c", f"COMP_WORDBREAKS='{breaks}'\n{code}"], env=environment, capture_output=True
        )
        assert run.stdout.decode().strip() == expected, run.stderr


@pytest.mark.parametrize("width", [40, 80, 100, 300])
def test_help_fits_the_width_and_loses_no_word(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    shown = {command: showing.help_of(command) for command in cli.COMMANDS} | {"": showing.folded(cli.USAGE)}
    monkeypatch.setenv("COLUMNS", "999")
    for command, text in shown.items():
        whole = showing.help_of(command) if command else cli.USAGE
        assert text.replace("#", "").split() == whole.replace("#", "").split()
        longest_word = max(map(len, text.split()))
        assert max(map(len, text.splitlines())) <= max(width, 4 + longest_word)


def test_a_comment_that_is_folded_goes_on_as_a_comment(monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    line = "  steps: 600   # learning updates; every schedule scales with their number"
    first, *others = showing.folded(line).splitlines()
    assert first.startswith("  steps: 600   # learning") and others
    assert all(other.startswith(" " * 15 + "# ") for other in others)
