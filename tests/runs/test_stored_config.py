"""What the configuration of a stranger's run folder may say, and what it may ask for."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import yaml

from policyskip.errors import UserError
from policyskip.runs import stored_config
from tests.conftest import typed

STORED = Path(__file__).parent.parent / "stored" / "runs"
RUNS = sorted(path.parent for path in STORED.glob("*/config.yaml"))


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_every_stored_configuration_is_read_and_written_as_it_was(run, tmp_path):
    text = (run / "config.yaml").read_text().partition("\n")[2]
    content = stored_config.read(run / "config.yaml")
    assert stored_config.to_yaml(content) == text
    assert stored_config.buildable(content, trust=False, typed={}) == content


def test_a_text_is_never_resolved(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "hunter2")
    path = written(tmp_path, "a: ${oc.env:MY_SECRET}\nb: {c: '${a}', d: ['${oc.decode:1}', '???']}\n")
    content = stored_config.read(path)
    assert content == {"a": "${oc.env:MY_SECRET}", "b": {"c": "${a}", "d": ["${oc.decode:1}", "???"]}}
    assert stored_config.read(written(tmp_path, stored_config.to_yaml(content))) == content


BOMBS = {
    "anchors": "a: &a [x, x]\nb: [*a, *a]",
    "an anchor alone": "a: &a 1",
    "an alias to itself": "a: &a [*a]",
    "a merge": "a: {<<: {b: 1}}",
    "a tag": "a: !!python/object/apply:os.getcwd []",
    "a harmless tag": "a: !!str 1",
    "depth": "a: " + "[" * 21 + "]" * 21,
    "great depth": "a: " + "[" * 10**5,
    "many values": "a: [" + "1, " * 10_000 + "]",
    "size": "# " + "x" * 2**20 + "\na: 1",
    "numbers as keys": "a: {1: 2}",
    "null as a key": "{null: 2}",
    "true as a key": "a: [{b: {true: 2}}]",
    "a key twice": "a: 1\na: 2",
    "half a surrogate": 'a: "\\ud800"',
    "half a surrogate as a key": '{"\\ud800": 1}',
    "a list": "- a",
    "a text": "a",
    "two documents": "a: 1\n---\nb: 2",
    "no UTF-8": b"a: \xff",
    "a long number": "a: " + "9" * 5000,
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS.keys())
def test_what_no_configuration_of_ours_holds_is_refused(tmp_path, text):
    with pytest.raises(UserError, match=r"config\.yaml (is damaged or not ours|has 1048583 bytes)") as refused:
        stored_config.read(written(tmp_path, text))
    assert len(str(refused.value)) < 600 + len(str(tmp_path))


ASKED = {
    "backbone.depth": 6_000_002,
    "backbone.width": 10**5,
    "backbone.num_exits": 10**6,
    "backbone.unheard_of": 10**12,
    "agent.width": 10**9,
    "agent.buffer_size": 10**10,
    "agent.net_arch": [64, 10**9],
    "data.train": 10**9,
    "data.batch_size": 10**12,
    "data.workers": 500,
    "data.image_size": 10**6,
    "train.steps": 10**15,
    "front.budget": 1e30,
}


@pytest.mark.parametrize(("key", "value"), ASKED.items(), ids=ASKED.keys())
def test_a_file_may_ask_for_so_much_and_trust_or_a_typed_value_for_more(key, value):
    group, _, name = key.partition(".")
    with pytest.raises(UserError, match=rf"the run's {key} is .* at most; .*trust=true"):
        stored_config.buildable({group: {name: value}}, trust=False, typed={})
    for trust, typed_keys in ((True, {}), (False, {group: {name: value}})):
        built = stored_config.buildable({group: {name: value}}, trust, typed_keys)
        assert built[group][name] is value


def test_depth_and_width_are_bounded_together():
    for depth, width in ((1202, 16), (152, 64), (28, 160)):
        stored_config.buildable({"backbone": {"depth": depth, "width": width}}, trust=False, typed={})
    with pytest.raises(UserError, match="depth · backbone.width"):
        stored_config.buildable({"backbone": {"depth": 2000, "width": 1024}}, trust=False, typed={})


def test_nothing_is_downloaded_because_a_file_says_so():
    content = {"data": {"root": "x", "download": True}}
    assert stored_config.buildable(content, False, {})["data"]["download"] is False
    assert stored_config.buildable(content, True, {})["data"]["download"] is True
    for typed_keys in ({"root": "y"}, {"download": True}):
        assert stored_config.buildable(content, False, {"data": typed_keys})["data"]["download"] is True
    assert content["data"]["download"] is True


@pytest.mark.parametrize("key", ["reward.table", "backbone.checkpoint", "data.root"])
def test_a_pipe_or_a_device_is_no_file(tmp_path, key):
    os.mkfifo(tmp_path / "pipe")
    group, _, name = key.partition(".")
    for path in (str(tmp_path / "pipe"), "/dev/zero"):
        with pytest.raises(UserError, match=f"{key}={path} is neither a file nor a folder"):
            stored_config.buildable({group: {name: path}}, trust=True, typed={})


# The commands


@pytest.fixture
def copied(tmp_path) -> Path:
    (tmp_path / "here").mkdir()
    return shutil.copytree(STORED / "cdl", tmp_path / "here" / "x")


def change(run: Path, **groups) -> None:
    content = yaml.safe_load((run / "config.yaml").read_text())
    for group, keys in groups.items():
        content[group] = {**content[group], **keys} if isinstance(keys, dict) else keys
    (run / "config.yaml").write_text(yaml.safe_dump(content))


@pytest.mark.slow
def test_no_secret_of_the_environment_is_written_out(copied, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "hunter2")
    change(copied, tracking={"project": "${oc.env:MY_SECRET}"})
    result = typed("calibrate", "run=x", "target.knee=true", "device=cpu", cwd=copied.parent)
    assert result.returncode == 0, result.stderr
    assert "hunter2" not in (copied / "config.yaml").read_text() + result.stdout
    assert "${oc.env:MY_SECRET}" in (copied / "config.yaml").read_text()


@pytest.mark.parametrize("command", ["evaluate", "resume"])
def test_a_stored_data_set_is_neither_downloaded_nor_given_a_folder(copied, monkeypatch, command):
    change(copied, data={"_target_": "policyskip.data.torchvision_data", "name": "mnist", "root": "../elsewhere",
                         "download": True, "train": None, "validation": 0.1, "test": None})  # fmt: skip
    content = yaml.safe_load((copied / "config.yaml").read_text())
    content["data"] = {key: value for key, value in content["data"].items() if value is not None}
    (copied / "config.yaml").write_text(yaml.safe_dump(content))
    words = (
        ["evaluate", "run=x", "device=cpu"] if command == "evaluate" else ["train", "run.resume=x", "train.steps=99"]
    )
    monkeypatch.setattr("torchvision.datasets.MNIST.download", lambda self: pytest.fail("the network is asked"))
    result = typed(*words, cwd=copied.parent)
    assert result.returncode == 2 and "mnist is not in" in result.stderr and "data.root=FOLDER" in result.stderr
    assert not (copied.parent.parent / "elsewhere").exists()


def test_what_may_be_typed_beside_a_run(copied):
    said = typed("evaluate", "run=x", "data.test=30", "device=cpu", cwd=copied.parent)
    assert said.returncode == 0 and "Differs from summary.json" in said.stdout
    for word, message in {
        "backbone.depth=3": "a run keeps its backbone.depth",
        "data._target_=a.b": "a run keeps its data._target_",
        "data=cifar10": "data=cifar10 has no effect beside run=",
        "data.root=/x": "data has no key root",
        "data.workers=-1": "",
    }.items():
        refused = typed("evaluate", "run=x", word, "device=cpu", cwd=copied.parent)
        assert refused.returncode == 2 and message in refused.stderr


@pytest.mark.slow
def test_weights_of_another_network_are_refused(tmp_path):
    shutil.copytree(STORED / "blockdrop", tmp_path / "here" / "x")
    other = typed("evaluate", "run=x", "backbone.checkpoint=random", "device=cpu", cwd=tmp_path / "here")
    assert other.returncode == 2 and "backbone.checkpoint=random holds another network" in other.stderr
    change(tmp_path / "here" / "x", backbone={"checkpoint": "gone.safetensors"})
    gone = typed("evaluate", "run=x", "device=cpu", cwd=tmp_path / "here")
    assert (
        gone.returncode == 2 and "gone.safetensors is not there any more; say backbone.checkpoint=FILE" in gone.stderr
    )


def test_what_is_written_is_read_again(tmp_path):
    """A list at two places too, which YAML would write once, with an anchor."""
    exits = [1, 2]
    content = {"a": exits, "b": {"c": exits}, "d": "${oc.env:HOME}", "e": 1e-3, "f": "1e-3", "g": "on", "h": None}
    content |= {"i": "2026-01-01", "j": "é\n", "k": float("inf"), "l": {}, "m": [], "n": "", "o": "a: b # c"}
    assert stored_config.read(written(tmp_path, stored_config.to_yaml(content))) == content


@pytest.mark.parametrize("data", [{}, {"download": True}], ids=["left out", "written"])
def test_nothing_is_downloaded_because_a_file_says_so_or_leaves_it_out(data):
    content = {"data": {"_target_": "policyskip.data.torchvision_data", "name": "cifar10", "root": "elsewhere"} | data}
    assert stored_config.buildable(content, False, {})["data"]["download"] is False
    assert stored_config.buildable(content, True, {})["data"].get("download", True) is True
    assert stored_config.buildable(content, False, {"data": {"root": "here"}})["data"].get("download", True) is True
    digits = {"data": {"_target_": "policyskip.data.digits"}}
    assert "download" not in stored_config.buildable(digits, False, {})["data"]


@pytest.mark.parametrize("seed", [16**5000, float("nan")], ids=["thousands of digits", "NaN"])
def test_a_number_that_nothing_can_have_is_refused_in_a_line(seed):
    with pytest.raises(UserError, match="the run's seed is no number that a run could have"):
        stored_config.buildable({"seed": seed}, False, {})


def test_a_home_that_is_not_there_is_no_path():
    content = {"backbone": {"checkpoint": "~nobody-of-that-name/x.pth"}}
    assert stored_config.buildable(content, False, {}) == content
