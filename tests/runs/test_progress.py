"""What is said of a wait: what it is, how far it has come, how much longer; never too much, and never on stdout."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from policyskip.runs import progress
from policyskip.runs.progress import Wait, duration, updates, waiting

PACKAGE = Path(progress.__file__).parent.parent
MAY_BE_SILENT = {
    "data/base.py: _from": "a feed's batches are read as they are asked for",
    "data/base.py: batch_at": "one batch",
    "evaluation/decisions.py: pixels": "a few example images",
    "pretraining.py: pixel_statistics": "at most 5,000 images that are in memory",
    "static_front/scoring.py: _stream": "read by those who say so",
}
"""Functions that go through a set of images without a word."""


@contextlib.contextmanager
def on_screen(stream: io.StringIO | None = None) -> Iterator[io.StringIO]:
    """A standard error that can be read: pytest puts its own in place before each test."""
    with contextlib.redirect_stderr(stream or io.StringIO()) as screen:
        yield screen


def until(seen: Callable[[], object]) -> None:
    """Wait for what the reporting thread does, which a busy machine may delay."""
    give_up = time.monotonic() + 20
    while not seen() and time.monotonic() < give_up:
        time.sleep(0.005)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def eager(monkeypatch) -> None:
    """A hundredth of the usual patience, and a screen that is asked for."""
    for name, seconds in (("PATIENCE", 0.02), ("INTERVAL", 0.1), ("REFRESH", 0.0025)):
        monkeypatch.setattr(progress, name, seconds)
    monkeypatch.setattr(progress, "_shown", True)
    monkeypatch.setattr(progress, "_reported_at", {})


def test_a_long_wait_says_what_it_is_how_far_it_has_come_and_how_long_it_took(eager, capsys):
    with on_screen() as screen, waiting("searching sets", total=200) as wait:
        wait.advance(50)
        until(screen.getvalue)
    lines = screen.getvalue().splitlines()
    assert lines[0] == "searching sets 25 %, 0 s left" and lines[-1] == "searching sets took 0 s"
    assert capsys.readouterr().out == ""


def test_a_short_wait_says_nothing_and_a_long_one_not_too_much(eager, monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL", 1000.0)
    with on_screen() as screen:
        with waiting("nothing"):
            pass
        assert screen.getvalue() == ""
        with waiting("validating"):
            until(screen.getvalue)
        with waiting("validating"):  # soon after the first
            time.sleep(0.05)
    assert screen.getvalue().splitlines() == ["validating, 0 s so far …", "validating took 0 s"]


def test_waits_that_nobody_asked_to_see_are_silent(eager, monkeypatch):
    monkeypatch.setattr(progress, "_shown", False)
    monkeypatch.setattr(progress, "_hidden", False)
    with on_screen() as screen:
        with waiting("importing policyskip in a program"):
            time.sleep(0.05)
        progress.hide()
        progress.show()
        with waiting("the second of two processes"):
            time.sleep(0.05)
    assert screen.getvalue() == ""


@pytest.mark.parametrize("ending", ["closed", "absent"])
def test_a_screen_that_cannot_be_written_stops_nothing(ending, eager, monkeypatch):
    screen = io.StringIO()
    screen.close()
    monkeypatch.setattr(sys, "stderr", screen if ending == "closed" else None)
    with waiting("working"):
        time.sleep(0.05)


def test_an_error_inside_a_wait_leaves_no_wait_behind(eager):
    with pytest.raises(ZeroDivisionError), waiting("outer"), waiting("inner"):
        1 / 0  # noqa: B018
    assert progress._waits == []


def test_on_a_terminal_a_line_for_each_wait_is_updated_and_taken_away(monkeypatch, eager):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    with updates(600, 0) as show, waiting("validating"):
        show(12, [{"reward": 0.5, "loss": 0.25}])
        until(lambda: "validating" in sys.stderr.getvalue())
    shown = sys.stderr.getvalue()
    assert "step 12/600" in shown and "reward 0.500" in shown and "validating" in shown
    assert "\x1b[2K" in shown  # what was there is erased
    assert sys.stdout.getvalue() == "step 12/600  reward 0.500  loss 0.250  took 0 s\n"


def test_updates_are_about_twenty_plain_lines_elsewhere(capsys):
    with updates(100, 40) as show:
        for step in range(41, 101):
            show(step, [{"reward": 1.0}])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == [f"{step}/100" for step in range(45, 101, 5)]
    assert all("reward 1.000" in line for line in lines)
    assert all(line.endswith(" s left") for line in lines[:-1]) and lines[-1].endswith("  took 0 s")


def test_a_line_fits_every_width_and_keeps_what_matters_most(monkeypatch):
    monkeypatch.setattr("policyskip.runs.progress.time", SimpleNamespace(monotonic=lambda: 100.0))
    wait = Wait("step", 600, counted=True)
    wait.reach(12)
    wait.started -= 24
    wait.figures = tuple(f"{key} 0.123" for key in ("reward", "sampled_reward", "accuracy", "kept", "loss"))
    for width in range(200):
        line = wait.bar_line(width)
        assert len(line) <= width
        if width >= 40:
            assert line.startswith("step 12/600") and "19 min 36 s left" in line and "─" in line
        last = wait.last_line(width)
        assert len(last) <= max(width, len("step 12/600  took 24 s")) and last.endswith("  took 24 s")
        assert re.fullmatch(r"step 12/600  (\w+ 0\.123  )*took 24 s", last)  # a figure is whole, or left out
    assert all(figure in wait.last_line() for figure in wait.figures)
    assert "reward 0.123" in wait.bar_line(80) and all(figure in wait.bar_line(140) for figure in wait.figures)


def test_the_bar_and_the_time_left_by_hand():
    wait = Wait("work", 80, done=20)  # resumed: the rate is that of the 20 that were done in 10 seconds
    wait.reach(40)
    wait.started -= 10
    assert wait.share == 0.5 and wait.seconds_left == pytest.approx(20, abs=0.1)
    assert wait.bar_line(100, "#", ".") == "work 50 %  ##########..........  20 s left"
    assert Wait("work", 80).time_text() == Wait("work").time_text() == "0 s so far"
    assert Wait("work", 0).share is None
    bound = Wait("work")
    bound.expect(10)
    bound.reach(20)
    assert bound.share == 1.0 and bound.time_text() == "0 s left"
    assert "\x1b" not in Wait("\x1b[2J", 1).line()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (125, "2 min 5 s"), (4320, "1 h 12 min")]
)
def test_times_as_people_say_them(seconds, text):
    assert duration(seconds) == text


def test_every_pass_over_a_set_of_images_is_a_wait_that_is_reported():
    """By the source: who loops over ``….stream(…)`` does so inside ``waiting(…)``."""
    silent = set()
    for path in PACKAGE.rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(function, ast.FunctionDef) and function.name != "stream":
                text = ast.unparse(function)
                if ".stream(" in text.replace("cuda.stream(", "") and "waiting(" not in text:
                    silent.add(f"{path.relative_to(PACKAGE).as_posix()}: {function.name}")
    assert silent == set(MAY_BE_SILENT)
