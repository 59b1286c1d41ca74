"""What belongs together is switched together, at whatever call a process dies or the disk fails."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import policyskip
from policyskip.errors import UserError
from policyskip.files import hidden_name
from policyskip.runs import generations
from policyskip.runs.folder import Run
from policyskip.runs.generations import BEST, BEST_SO_FAR, COMMITTED, move_into_place
from tests.conftest import typed
from tests.dying import Died, State, before_each_call, dying_at, failing_at, put_back, state_of, states_between_calls
from tests.runs.test_stored_runs import STORED, no_pictures  # noqa: F401 - a fixture

TOGETHER = ("a", BEST, "plots/p.png", "plots/q.png", "new")
"""Files that belong together in these tests; in the old generation there is no "new"."""


def old_run(folder: Path) -> Run:
    """A finished run that has learned more since, and that a killed process has left something in."""
    (folder / "plots").mkdir(parents=True)
    for name in TOGETHER[:-1]:
        (folder / name).write_text("old")
    (folder / BEST_SO_FAR).write_text("new")
    (folder / hidden_name()).write_text("half a file")
    (folder / hidden_name()).mkdir()
    return Run(folder)


def write_new(run: Run) -> None:
    run.lock()
    try:
        with run.generation() as new:
            (new.folder / "plots").mkdir()
            for name in TOGETHER:
                (new.folder / name).write_text("new")
    finally:
        run.unlock()


def seen(folder: Path, names: Any = TOGETHER) -> dict[str, bytes]:
    """What a reader finds, who has no lock."""
    run = Run(folder)
    return {name: run.path(name).read_bytes() for name in names if run.has(name)}


OLD, NEW = dict.fromkeys(TOGETHER[:-1], b"old"), dict.fromkeys(TOGETHER, b"new")


def check(folder: Path) -> bool:
    """Check that a folder holds one of the two generations, also when the next writer has put it in order.

    Returns: whether it is the new one.
    """
    found = seen(folder)
    assert found in (OLD, NEW)
    best_so_far = Run(folder).best_so_far
    assert Run(folder).path(best_so_far).read_bytes() == b"new"
    run = Run(folder)
    run.lock()
    run.unlock()
    assert seen(folder) == found and Run(folder).path(Run(folder).best_so_far).read_bytes() == b"new"
    left = {*TOGETHER, "plots"} if found == NEW else {*TOGETHER[:-1], "plots", BEST_SO_FAR}
    assert set(state_of(folder)) == left
    return found == NEW


def test_a_process_that_is_killed_leaves_one_generation_whole(tmp_path):
    run = old_run(tmp_path / "x")
    states = states_between_calls(run.folder, lambda: write_new(run))
    assert len(states) > 10 and COMMITTED in set().union(*states)
    switched = [check(put_back(state, tmp_path / "then")) for state in states]
    assert switched == sorted(switched) and set(switched) == {False, True}


@pytest.mark.parametrize("how", ["dies", "full once", "full from then on"])
def test_a_disk_that_fails_at_any_call_leaves_one_generation_whole(how, tmp_path):
    before = state_of(old_run(tmp_path / "x").folder)
    with before_each_call(lambda number: None) as calls:
        write_new(Run(put_back(before, tmp_path / "y")))
    assert {"mkdir", "rename", "replace", "rmdir", "unlink"} <= set(calls)
    for number in range(len(calls)):
        folder = put_back(before, tmp_path / "then")
        act = dying_at(number) if how == "dies" else failing_at(number, how == "full from then on")
        with before_each_call(act), contextlib.suppress(Died, UserError):
            write_new(Run(folder))
        check(folder)


def test_a_generation_that_cannot_take_its_places_is_refused_before_the_switch(tmp_path):
    run = old_run(tmp_path / "x")
    (tmp_path / "elsewhere").mkdir()
    shutil.rmtree(run.folder / "plots")
    (run.folder / "plots").symlink_to("../elsewhere")
    with pytest.raises(UserError, match="plots is a link that leads out of the folder"):
        write_new(run)
    (run.folder / "plots").unlink()
    (run.folder / "a").unlink()
    (run.folder / "a").mkdir()
    with pytest.raises(UserError, match="cannot write .*x/a: there is a folder of that name"):
        write_new(run)
    assert not list((tmp_path / "elsewhere").iterdir()) and not list(run.folder.glob(".*"))


@pytest.mark.parametrize("what", ["a link", "a link in it", "a file", "a link in its folder"])
def test_a_commit_that_is_not_ours_is_refused(what, tmp_path):
    """Else a stranger's folder would have the files of another one moved."""
    run, victim = old_run(tmp_path / "x"), tmp_path / "victim"
    victim.mkdir()
    (victim / "a").write_text("secret")
    commit = run.folder / COMMITTED
    if what == "a link":
        commit.symlink_to("../victim")
    elif what == "a file":
        commit.write_text("")
    elif what == "a link in it":
        commit.mkdir()
        (commit / "plots").symlink_to("../../victim")
    else:
        (commit / "plots").mkdir(parents=True)
        (commit / "plots" / "p.png").symlink_to("../../../victim/a")
    with pytest.raises(UserError, match=r"\.commit is damaged or not ours"):
        run.lock()
    run.unlock()
    assert (victim / "a").read_text() == "secret"
    if what == "a link":
        with pytest.raises(UserError, match="leads out of the folder"):
            run.has("a")


@pytest.mark.parametrize("place", ["decisions.safetensors", "plots/learning_curves.png", "metrics.jsonl", "plots"])
def test_what_could_not_be_written_in_the_end_is_refused_before_anything_is_changed(place, tmp_path):
    """Else a run would learn for hours, and fail as it writes what came out."""
    run = old_run(tmp_path / "x")
    if place == "plots":
        shutil.rmtree(run.folder / place)
        (run.folder / place).write_text("")
    else:
        (run.folder / place).mkdir()
    with pytest.raises(UserError, match=f"{place} is (a folder|no folder)"):
        run.lock()
    run.unlock()


# Commands


def deployed(state: State) -> set[str]:
    """Files that belong together in a stored run."""
    names = {"policy.json", "summary.json", "decisions.safetensors", "curve.json", "front.json", "config.yaml"}
    names |= {"network.safetensors", BEST}
    return {name for name in state if name in names or name.startswith("plots/")}


def test_calibrate_that_is_killed_leaves_the_old_target_or_the_new_one(tmp_path, no_pictures):  # noqa: F811
    folder = Path(shutil.copytree(STORED / "calibrated", tmp_path / "x"))
    before = state_of(folder)

    def calibrate() -> None:
        result = typed("calibrate", "run=x", "target.macs_fraction=0.8", "device=cpu", cwd=tmp_path)
        assert result.returncode == 0, result.stderr

    states = states_between_calls(folder, calibrate)
    after = states[-1]
    names = deployed(after)
    old, new = ({name: state[name] for name in names & set(state)} for state in (before, after))
    assert (
        old.keys() < new.keys() and old["config.yaml"] != new["config.yaml"] and not [n for n in after if n[0] == "."]
    )
    assert json.loads(new["summary.json"])["target/macs_fraction"] == 0.8
    switched = []
    for state in states:
        found = seen(put_back(state, tmp_path / "then"), names)
        assert found in (old, new)
        switched.append(found == new)
    assert switched == sorted(switched) and set(switched) == {False, True} and len(states) > 20


@pytest.mark.parametrize("number", [0, 20])
def test_a_disk_that_is_full_at_the_end_of_a_run_keeps_what_was_learned(number, tmp_path, no_pictures):  # noqa: F811
    folder = Path(shutil.copytree(STORED / "branchynet", tmp_path / "x"))
    for name in ("policy.json", "summary.json", "network.safetensors"):  # as if it had been killed before its end
        (folder / name).unlink()
    with before_each_call(failing_at(number, True)):
        result = typed("train", "run.resume=x", cwd=tmp_path)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "cannot write" in result.stderr and "No space left on device" in result.stderr
    if number:
        assert "what was learned is safe. Go on with:  policyskip train run.resume=x" in result.stderr
    with pytest.raises(UserError, match="the run did not get that far"):
        policyskip.load(folder)
    assert typed("train", "run.resume=x", cwd=tmp_path).returncode == 0
    assert policyskip.load(folder) and not list(folder.glob(".*"))


def figures(run: Path) -> dict[str, Any]:
    """Everything in the JSON files of a run but the time that it took."""
    found = {path.name: json.loads(path.read_bytes()) for path in run.glob("*.json")}
    found["summary.json"].pop("seconds")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["skipnet", "budget", "branchynet", "a2c-exit"])
def test_an_extension_that_is_killed_leaves_what_is_deployed_and_goes_on_to_the_same_figures(
    name,
    tmp_path,
    no_pictures,  # noqa: F811
):
    folder = Path(shutil.copytree(STORED / name, tmp_path / "x"))
    assert typed("train", "run.resume=x", "train.steps=5", cwd=tmp_path).returncode == 0  # written by this version
    before = state_of(folder)

    def extend(where: str = "x") -> None:
        result = typed("train", f"run.resume={where}", "train.steps=7", cwd=tmp_path)
        assert result.returncode == 0, result.stderr

    states = states_between_calls(folder, extend)
    names = deployed(states[-1]) - {"config.yaml"} | {"reward.json"}  # which says from the start what is typed
    old, new = ({name: state[name] for name in names & set(state)} for state in (before, states[-1]))
    assert old.keys() == new.keys() and old["summary.json"] != new["summary.json"]
    switched = []
    for state in states:
        found = seen(put_back(state, tmp_path / "then"), names)
        assert found in (old, new)
        switched.append(found == new)
    assert switched == sorted(switched) and len(states) > 40
    first = switched.index(True)
    for number in sorted({0, len(states) // 3, first - 9, first - 1, first, first + 3, len(states) - 1}):
        then = put_back(states[number], tmp_path / "then")
        result = typed("evaluate", "run=then", "device=cpu", cwd=tmp_path)
        assert "Every figure is that of summary.json." in result.stdout, (number, result.stdout + result.stderr)
        assert policyskip.load(then)
        extend("then")
        assert figures(then) == figures(folder) and not list(then.glob(".*"))
        assert (then / BEST).read_bytes() == (folder / BEST).read_bytes()
        assert not (then / BEST_SO_FAR).exists()


def test_a_stopped_run_of_an_older_version_goes_on_from_its_best_weights(tmp_path):
    run = Run(Path(shutil.copytree(STORED / "branchynet-half", tmp_path / "x")))
    assert run.load_best_so_far().keys() == run.load_best().keys()
    run.save_best({})
    assert run.load_best_so_far() == {} != run.load_best()


def test_a_file_that_is_moved_while_it_is_read_is_read(tmp_path, monkeypatch):
    """Another process moves the files of a generation from ``.commit`` to their places meanwhile."""
    (tmp_path / "run" / COMMITTED).mkdir(parents=True)
    (tmp_path / "run" / COMMITTED / "summary.json").write_text('{"seed": 3}')
    run = Run(tmp_path / "run")
    find = generations.find

    def find_and_move(folder: Path, name: str) -> Path:
        place = find(folder, name)
        move_into_place(folder)
        return place

    for moved_at in ("has", "read"):
        calls = iter([find, find_and_move] if moved_at == "read" else [find_and_move])
        monkeypatch.setattr(generations, "find", lambda *a, calls=calls: next(calls, find)(*a))
        assert run.load_json("summary.json") == {"seed": 3}
        (tmp_path / "run" / COMMITTED).mkdir(exist_ok=True)
        if (tmp_path / "run" / "summary.json").exists():
            (tmp_path / "run" / "summary.json").rename(tmp_path / "run" / COMMITTED / "summary.json")


def test_the_name_of_a_run_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Run(Path(".")).name == tmp_path.name and Run(Path("a/..")).name == tmp_path.name
