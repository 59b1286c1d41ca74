"""The package writes files in one way, and neither reads nor writes through a link that leads out of a run folder."""

from __future__ import annotations

import ast
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import policyskip
from policyskip.comparison.compare import compare
from policyskip.errors import UserError
from policyskip.files import LARGEST_TEXT, is_hidden_name, open_log, read, write
from policyskip.runs.folder import Run, create, open_run
from policyskip.sealed import unsealed
from policyskip.static_front import StaticFront
from tests.conftest import typed
from tests.runs.test_stored_runs import STORED, no_pictures  # noqa: F401 - a fixture
from tests.test_layout import modules

# One way to write

WRITERS = {
    *("write_text", "write_bytes", "touch", "symlink_to", "hardlink_to", "link_to", "rename", "replace"),
    *("save_file", "to_csv", "tofile", "savetxt", "savez", "copy", "copy2", "copyfile", "copytree", "move"),
    *("mkstemp", "mkdtemp", "NamedTemporaryFile", "TemporaryDirectory", "print_figure", "renames", "symlink"),
}
"""Names of functions that write files; of ``replace``, ``copy`` and ``move``, only those of ``os``, ``shutil`` and paths are meant."""
MODULES_THAT_RENAME = {"files", "runs.generations", "comparison.folder"}
ALLOWED = {
    ("parallel.processes", "open(os.devnull, 'w', encoding='utf-8')"),
    ("evaluation.plots", "figure.savefig(buffer, format='png')"),
    ("runs.folder", "torch.save(state, buffer)"),
    ("typed.streams", "os.open(os.devnull, os.O_RDWR)"),
    ("typed.streams", "os.open(os.devnull, os.O_WRONLY)"),
    ("backbones.translation", "rename(name)"),  # a function of its own, of names of tensors
}


def other_ways(source: str) -> Iterator[str]:
    """Every call in a module that writes a file in a way of its own."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        owner, _, name = called.rpartition(".")
        mode = [n.value for n in [*node.args, *(k.value for k in node.keywords)] if isinstance(n, ast.Constant)]
        opens = name == "open" and any(isinstance(m, str) and set(m) & set("wax+") and len(m) < 4 for m in mode)
        saves = name in ("savefig",) or called in ("torch.save", "np.save", "json.dump", "pickle.dump", "os.open")
        saves |= called == "yaml.dump" and len(node.args) > 1
        copies = name in WRITERS and not (name in ("copy", "move", "replace") and owner not in ("os", "shutil"))
        if opens or saves or copies:
            yield ast.unparse(node)


def test_the_reader_of_calls_sees_them():
    ways = [
        *("open(path, 'w')", "path.open('ab')", "io.open(path, mode='x')", "path.write_text('')", "os.replace(a, b)"),
        *(
            "figure.savefig(path)",
            "torch.save(x, path)",
            "save_file(x, path)",
            "json.dump(x, file)",
            "shutil.copy(a, b)",
        ),
        *("os.open(path, 1)", "path.rename(other)", "tempfile.mkdtemp()"),
    ]
    assert [way for line in ways for way in other_ways(line)] == ways
    harmless = [
        "open(path)",
        "path.open('rb')",
        "text.replace('a', 'b')",
        "copy.copy(x)",
        "json.dumps(x)",
        "Image.open(f)",
    ]
    assert not [way for line in harmless for way in other_ways(line)]


def test_no_module_writes_in_a_way_of_its_own():
    found = {(name, way) for name, path in modules().items() for way in other_ways(path.read_text("utf-8"))}
    others = {(name, way) for name, way in found if name not in MODULES_THAT_RENAME and name != "runs.locks"}
    assert others <= ALLOWED, "\n".join(map(str, sorted(others - ALLOWED)))


def test_a_file_is_made_under_a_name_that_nobody_foresees_and_never_through_a_link(tmp_path, monkeypatch):
    victim, target, names = tmp_path / "victim", tmp_path / "x.json", []
    victim.write_text("secret")
    real = os.open

    def watched(path: Path, flags: int, *mode: int) -> int:
        if flags & os.O_CREAT:
            names.append(Path(path).name)
            assert flags & os.O_EXCL and flags & os.O_NOFOLLOW
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", watched)
    target.symlink_to("victim")
    for _ in range(2):
        write(target, b"ours")
    assert len(set(names)) == 2 and all(map(is_hidden_name, names))
    assert victim.read_text() == "secret" and target.read_bytes() == b"ours" and not target.is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"victim", "x.json"}
    monkeypatch.undo()
    (tmp_path / "log").symlink_to("victim")
    with pytest.raises(OSError):
        open_log(tmp_path / "log", append=True)
    with open_log(tmp_path / "log") as file:
        file.write("ours")
    assert victim.read_text() == "secret"
    with pytest.raises(UserError, match="is a folder; name a file to write"):
        write(Path("/"), b"")


def test_a_file_of_something_else_is_not_replaced_by_an_output(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for command in ("front", "profile"):
        result = typed(command, "output=notes.txt", cwd=tmp_path)
        assert result.returncode == 2 and "output=notes.txt is there, and is no JSON file" in result.stderr
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_neither_a_pipe_nor_a_device_is_replaced_by_a_file(tmp_path, monkeypatch):
    """Whoever may write in /dev would lose /dev/null for all programs."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for kind in ("pipe", "folder"):
        with pytest.raises(UserError, match=f"cannot write .*{kind}: it is a {kind}, not a file"):
            write(tmp_path / kind, b"ours")
    for command in ("front", "profile"):
        result = typed(command, "output=pipe", cwd=tmp_path)
        assert result.returncode == 2 and "output=pipe is there, and is no file; say a file" in result.stderr
    assert (tmp_path / "pipe").is_fifo() and sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"]


# Links, pipes and giants in a run folder

FILES = ("config.yaml", "policy.json", "summary.json", "checkpoint.pt", "metrics.jsonl", "best.safetensors")
MORE = ("front.json", "network.safetensors", "start.safetensors", "decisions.safetensors", "profile.json", "curve.json")


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.mark.parametrize("name", [*FILES, *MORE])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_what_is_no_file_of_the_run_is_neither_read_nor_waited_for(name, kind, tmp_path):
    run = Path(shutil.copytree(STORED / "calibrated", tmp_path / "x"))
    (run / name).unlink(missing_ok=True)
    if kind == "link":
        (tmp_path / "outside").write_bytes((STORED / "calibrated" / "policy.json").read_bytes())
        (run / name).symlink_to("../outside")
    else:
        os.mkfifo(run / name)
    opened = Run(run)
    with pytest.raises(UserError, match="leads out of the folder" if kind == "link" else "is a pipe, not a file"):
        opened.has(name)
    readers: dict[str, Callable[[], object]] = {
        "config.yaml": lambda: open_run(str(run)),
        "policy.json": lambda: policyskip.load(run),
        "network.safetensors": lambda: policyskip.load(run),
        "summary.json": lambda: compare([str(run)], tmp_path / "page"),
        "decisions.safetensors": lambda: compare([str(run)], tmp_path / "page"),
        "metrics.jsonl": lambda: compare([str(run)], tmp_path / "page"),
        "checkpoint.pt": opened.load_checkpoint,
        "best.safetensors": opened.load_best,
    }
    if name in readers:
        with pytest.raises(UserError, match="leads out" if kind == "link" else "is a pipe|there is no checkpoint"):
            readers[name]()
        assert not (tmp_path / "page").exists()


def test_links_that_stay_inside_and_a_run_folder_that_is_a_link_are_read(tmp_path):
    run = Path(shutil.copytree(STORED / "calibrated", tmp_path / "elsewhere" / "x"))
    (run / "policy.json").rename(run / "kept.json")
    (run / "policy.json").symlink_to("kept.json")
    (tmp_path / "x").symlink_to("elsewhere/x")
    assert Run(tmp_path / "x").load_json("policy.json")["version"] == 1
    assert policyskip.load(tmp_path / "x").classes


VICTIMS = (
    *("policy.json", "config.yaml", "summary.json", "curve.json", "decisions.safetensors"),
    *(f"{name}.tmp" for name in ("policy.json", "config.yaml", "summary.json", "checkpoint.pt", "curve.json")),
)


def test_calibrate_writes_through_no_link(tmp_path, no_pictures):  # noqa: F811
    """Through none of the temporary names of older versions either, nor into a folder of pictures elsewhere."""
    run = Path(shutil.copytree(STORED / "calibrated", tmp_path / "x"))
    (tmp_path / "victim").write_text("secret")
    (tmp_path / "elsewhere").mkdir()
    for name in VICTIMS:
        if name.endswith(".tmp"):
            (run / name).symlink_to("../victim")
    (run / "plots").symlink_to("../elsewhere")
    words = ["calibrate", "run=x", "target.macs_fraction=0.8", "device=cpu"]
    before = tree(tmp_path)
    result = typed(*words, cwd=tmp_path)
    assert result.returncode == 2 and "plots is a link that leads out" in result.stderr, result.stderr
    assert tree(tmp_path) == before
    (run / "plots").unlink()
    (run / "plots").mkdir()
    (run / "plots" / "learning_curves.png").symlink_to("../../victim")
    assert typed(*words, cwd=tmp_path).returncode == 0
    assert (tmp_path / "victim").read_text() == "secret" and not list((tmp_path / "elsewhere").iterdir())


def test_a_run_that_begins_and_learns_writes_through_no_link(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "victim").write_text("secret")
    (tmp_path / "x" / "config.yaml.tmp").symlink_to("../victim")
    run = create(str(tmp_path / "x"), "policyskip train", "a: $(touch /tmp/y)")
    assert run.folder == tmp_path / "x-2" and (tmp_path / "victim").read_text() == "secret"
    for name in ("checkpoint.pt", "checkpoint.pt.tmp", "best-so-far.safetensors"):
        (run.folder / name).symlink_to("../victim")
    run.save_checkpoint({"step": 1})
    run.save_best({})
    assert (tmp_path / "victim").read_text() == "secret"
    (run.folder / "metrics.jsonl").symlink_to("../victim")
    for use in (run.metrics, lambda: run.append_metrics({"step": 1}), lambda: run.save_checkpoint({})):
        with pytest.raises(UserError, match="leads out of the folder|cannot write .*metrics.jsonl"):
            use()
    assert (tmp_path / "victim").read_text() == "secret"


def test_giants_are_refused_before_they_are_read(tmp_path):
    run = create(str(tmp_path / "x"), "policyskip train", "a: 1")
    for name, size in (("summary.json", LARGEST_TEXT + 1), ("metrics.jsonl", 2**40)):
        with (run.folder / name).open("wb") as file:
            file.truncate(size)  # sparse: it takes no room
    with pytest.raises(UserError, match=r"summary.json has 67108865 bytes; a file of its kind has at most 67108864"):
        run.load_json("summary.json")
    with pytest.raises(UserError, match=r"metrics.jsonl has 1099511627776 bytes"):
        run.metrics()
    with pytest.raises(UserError, match="is a device, not a file"):
        read(Path("/dev/zero"))
    header = json.dumps({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}).encode()
    for content in (
        len(header).to_bytes(8, "little") + header + bytes(35),  # one byte is missing
        (2**25).to_bytes(8, "little") + bytes(2**25 + 8),  # a header of 32 MiB
        (2**63).to_bytes(8, "little") + header,
    ):
        (run.folder / "best.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="best.safetensors is damaged or not ours"):
            run.load_best()
        with pytest.raises(Exception, match="."):
            unsealed(run.folder / "best.safetensors")


SOUND = {"sets": ["00", "01"], "accuracy": [0.1, 1], "macs": [1, 2e6], "images": 4, "finished": True, "backbone": "a", "data": "b"}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"accuracy": [0.1, float("nan")]}, {"accuracy": [0.1, 1.5]}, {"accuracy": ["0.1", True]}, {"macs": [1, -1e300]},
        {"macs": [1, float("inf")]}, {"sets": ["00", "0x"]}, {"sets": ["", ""]}, {"sets": [1, 2]}, {"sets": "01"},
        {"images": True}, {"images": -1}, {"finished": "no"}, {"backbone": 3}, {"data": None}, {"more": 1},
        {"sets": ["00"]}, {"macs": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_front_with_impossible_numbers_is_refused(change, tmp_path):
    path = tmp_path / "front.json"
    path.write_text(json.dumps(SOUND))
    front = StaticFront.load(path)
    assert front.sets == [(False, False), (False, True)] and front.hull == [0, 1]
    front.save(path)
    assert StaticFront.load(path) == front
    path.write_text(json.dumps(SOUND | change))
    with pytest.raises((ValueError, TypeError, KeyError)):
        StaticFront.load(path)
