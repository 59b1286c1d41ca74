"""What ``train`` and ``pretrain`` share: one course from a configuration to a finished folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import policyskip.data
from policyskip import cli, commands
from tests.conftest import typed

DATA = ["data.train=64", "data.validation=32", "data.test=32", "data.batch_size=16", "device=cpu", "tracking=none"]
STEPS = ["train.steps=2", "train.validate_every=1", "train.log_every=1", "run.dir=x"]


def test_every_command_that_can_be_typed_is_there():
    assert tuple(commands.COMMANDS) == cli.COMMANDS
    assert commands.EXIT_INTERRUPTED == cli.EXIT_INTERRUPTED


def test_data_are_built_once_where_exits_are_proposed(tmp_path, monkeypatch):
    built, digits = [], policyskip.data.digits

    def counted(device, train: int = 1, validation: int = 1, test: int = 1):
        built.append(train)
        return digits(device, train, validation, test)

    monkeypatch.setattr(policyskip.data, "digits", counted)
    arguments = ["agent=distiller", "data=digits", "backbone.exits=auto 2"]
    result = typed("train", *arguments, *DATA, *STEPS, "target.macs_fraction=1.0", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert built == [64] and "proposed exits:" in result.stdout


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    """A folder with a network that ``pretrain`` trained, in net/backbone.safetensors."""
    folder = tmp_path_factory.mktemp("network")
    arguments = ["backbone=resnet20", "+backbone.width=4", *DATA, *STEPS[:3], "run.dir=net"]
    result = typed("pretrain", *arguments, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


def test_pretraining_says_what_it_does_and_how_to_use_what_came_of_it(network, tmp_path):
    result = typed("pretrain", "backbone=resnet20", "+backbone.width=4", *DATA, *STEPS, cwd=tmp_path)
    assert result.stdout.startswith("resnet20 learns to classify the images of digits\n")
    last = result.stdout.splitlines()[-1]
    assert last.endswith("backbone=cifar_resnet backbone.depth=20 backbone.checkpoint=x/backbone.safetensors")
    ours, theirs = (json.loads((path / "summary.json").read_text()) for path in (tmp_path / "x", network / "net"))
    assert ours["hash"] == theirs["hash"] and ours["backbone"] == "resnet20"


def test_pretraining_goes_on_when_the_network_it_started_from_is_gone(network, tmp_path):
    shutil.copytree(network / "net", tmp_path / "net")
    arguments = ["backbone=resnet20", "+backbone.width=4", "backbone.checkpoint=net/backbone.safetensors"]
    result = typed("pretrain", *arguments, *DATA, *STEPS, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    shutil.rmtree(tmp_path / "net")
    result = typed("pretrain", "run.resume=x", "train.steps=3", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "x/summary.json").read_text())["steps"] == 3
