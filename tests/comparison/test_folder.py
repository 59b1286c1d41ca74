"""The old comparison is there or the new one, at whatever call a process dies or the disk fails."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest

from policyskip.comparison import folder as comparison_folder
from policyskip.comparison.folder import clear_leftovers, replaced
from policyskip.errors import UserError
from policyskip.files import write
from tests.dying import Died, State, before_each_call, dying_at, failing_at, put_back, state_of, states_between_calls

OLD: State = {"comparison.json": b"old", "index.html": b"old", "notes": b"old"}
NEW: State = {"comparison.json": b"new", "index.html": b"new", "plots": None, "plots/a.png": b"new"}


def overwrite(parent: Path) -> None:
    clear_leftovers(parent / "out")
    with replaced(parent / "out") as new:
        (new / "plots").mkdir()
        for name in ("comparison.json", "index.html", "plots/a.png"):
            write(new / name, b"new")


def prefixed(state: State) -> State:
    return {"out": None} | {f"out/{name}": content for name, content in state.items()}


@pytest.fixture(params=["in one step", "in two"])
def exchanging(request, monkeypatch) -> bool:
    """Whether two folders exchange their names in one step here."""
    if request.param == "in two":
        monkeypatch.setattr(comparison_folder, "_exchange", lambda first, second: False)
    return request.param == "in one step"


def test_a_process_that_is_killed_leaves_the_old_comparison_or_the_new_one(exchanging, tmp_path):
    parent = put_back(prefixed(OLD), tmp_path / "parent")
    states = states_between_calls(parent, lambda: overwrite(parent))
    assert states[-1] == prefixed(NEW) and len(states) > 8
    for state in states:
        visible = {name: content for name, content in state.items() if not name.startswith(".")}
        assert visible in (prefixed(OLD), prefixed(NEW)) or (not exchanging and not visible)
        then = put_back(state, tmp_path / "then")
        clear_leftovers(then / "out")
        assert state_of(then) == (visible or prefixed(OLD))  # no hidden folder, and nothing is lost
        if exchanging:
            overwrite(then)
            assert state_of(then) == prefixed(NEW)


@pytest.mark.parametrize("before", [OLD, None], ids=["over an old one", "a first one"])
@pytest.mark.parametrize("how", ["dies", "full once", "full from then on"])
def test_a_disk_that_fails_at_any_call_leaves_one_of_them(how, before, exchanging, tmp_path):
    old = {} if before is None else prefixed(before)
    with before_each_call(lambda number: None) as calls:
        overwrite(put_back(old, tmp_path / "whole"))
    for number in range(len(calls)):
        then = put_back(old, tmp_path / "then")
        act: Callable[[int], None] = dying_at(number) if how == "dies" else failing_at(number, how != "full once")
        with before_each_call(act), contextlib.suppress(Died, UserError, OSError):
            overwrite(then)
        clear_leftovers(then / "out")
        assert state_of(then) in (old, prefixed(NEW)), (number, calls[number])


def test_what_another_process_writes_is_left_alone_and_a_folder_above_goes_again(tmp_path):
    with replaced(tmp_path / "a" / "out") as new:
        write(new / "index.html", b"theirs")
        (tmp_path / "a" / ".policyskip-0123456789abcdef").mkdir()  # of a run in that folder
        clear_leftovers(tmp_path / "a" / "out")
        assert (new / "index.html").exists()
    assert (tmp_path / "a/out/index.html").exists() and (tmp_path / "a/.policyskip-0123456789abcdef").exists()
    with pytest.raises(UserError), replaced(tmp_path / "b" / "c" / "out"):
        raise UserError("no runs")
    assert not (tmp_path / "b").exists()
