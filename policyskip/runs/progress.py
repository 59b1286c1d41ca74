"""Every wait above two seconds says what it is, how far it has come, and how much longer it takes.

Waits are reported on the standard error, so that a program can read what a command prints. On a terminal a line is
updated in place; elsewhere there is a plain line now and then. Only the command line shows them: see :func:`show`.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate
from typing import Any

from policyskip.texts import one_line
from policyskip.typed.streams import line_width

PATIENCE = 2.0
"""Seconds for which a wait says nothing."""
INTERVAL = 10.0
"""Seconds between two lines about the same kind of wait, where the screen is no terminal."""
REFRESH = 0.25
"""Seconds between two updates of a terminal's line."""
SHOWN_FIGURES = ("reward", "sampled_reward", "accuracy", "kept", "loss")
"""The figures of an update that its progress line shows, where the learner has them."""
LONGEST_BAR, SHORTEST_BAR = 20, 5

ShowUpdate = Callable[[int, Sequence[dict[str, float]]], None]
"""Shows an update's number, and the figures of the updates whose figures have become known since the last call."""


class Wait:
    """Something that takes a while, and how far it has come.

    Args:
        what: a short text such as "drawing pictures".
        total: amount of work; None if it is not known.
        done: amount that was done before.
        counted: whether the amounts are shown, rather than a percentage.
        patience: seconds for which nothing is said.
    """

    def __init__(
        self,
        what: str,
        total: float | None = None,
        done: float = 0,
        counted: bool = False,
        patience: float | None = None,
    ) -> None:
        self.what, self.total, self.done, self.before = one_line(what), total, done, done
        self.counted = counted
        self.patience = PATIENCE if patience is None else patience
        self.started = time.monotonic()
        self.reported = False
        self.figures: tuple[str, ...] = ()

    def advance(self, amount: float = 1) -> None:
        """Note that ``amount`` more has been done."""
        self.done += amount

    def expect(self, total: float) -> None:
        """Note that there is ``total`` to do in all."""
        self.total = total

    def reach(self, done: float) -> None:
        """Note that ``done`` of ``total`` has been done."""
        self.done = done

    @property
    def seconds(self) -> float:
        """Return the seconds since it began."""
        return time.monotonic() - self.started

    @property
    def is_long(self) -> bool:
        """Return whether it has taken long enough to be reported."""
        return self.seconds >= self.patience

    @property
    def share(self) -> float | None:
        """Return the share of the work that is done, in [0, 1]; None if the total is not known."""
        return min(1.0, self.done / self.total) if self.total else None

    @property
    def seconds_left(self) -> float | None:
        """Return the seconds that the rest takes at the present rate; None if nothing can be said."""
        if not self.total or self.done <= self.before:
            return None
        return max(0.0, self.seconds * (self.total - self.done) / (self.done - self.before))

    def time_text(self) -> str:
        """Say how much longer it takes, or else how long it has taken so far."""
        if (left := self.seconds_left) is None:
            return f"{duration(self.seconds)} so far"
        return f"{duration(left)} left"

    def amount_text(self) -> str:
        """Say how much is done; "" if the total is not known."""
        if self.share is None:
            return ""
        return f"{self.done:.0f}/{self.total:.0f}" if self.counted else f"{100 * self.share:.0f} %"

    def line(self) -> str:
        """Describe it in a line that is not changed later."""
        return ", ".join([self._begin, *self.figures, self.time_text()])

    def last_line(self, width: int | None = None) -> str:
        """Describe it at its end, with as many figures as there is room for, and the time that it took.

        Args:
            width: letters that there is room for; None: any number.
        """
        parts = [self._begin, f"took {duration(self.seconds)}"]
        shown = self.figures if width is None else self._fitting(width - len("  ".join(parts)))
        return "  ".join([parts[0], *shown, parts[1]])

    @property
    def _begin(self) -> str:
        """Return what it is and how much is done."""
        return " ".join(filter(None, (self.what, self.amount_text())))

    def _fitting(self, room: int) -> list[str]:
        """Return the first figures that fit into ``room`` letters, with two spaces before each."""
        ends = accumulate(len(figure) + 2 for figure in self.figures)
        return [figure for figure, end in zip(self.figures, ends, strict=True) if end <= room]

    def bar_line(self, width: int, full: str = "━", empty: str = "─") -> str:
        """Describe it in a line of at most ``width`` letters, with a bar and with as many figures as there is room for.

        What it is, how far it has come and the time left come first; then a short bar, figures, and a longer bar.

        Args:
            full, empty: what the bar is made of.
        """
        bar = SHORTEST_BAR if self.share is not None else 0
        parts = [self._begin, self.time_text()]
        room = width - len("  ".join(parts)) - (bar + 2 if bar else 0)
        if room < 0:
            bar, room = 0, 0
        shown = self._fitting(room)
        parts += shown
        room -= sum(len(figure) + 2 for figure in shown)
        if bar:
            bar = min(LONGEST_BAR, bar + room)
            filled = round(bar * (self.share or 0))
            parts.insert(1, full * filled + empty * (bar - filled))
        return "  ".join(parts)[: max(0, width)]


def duration(seconds: float) -> str:
    """Write a time as people say it: 8 s, 2 min 5 s, 1 h 12 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


_shown = _hidden = False
"""Whether this process was asked to report its waits, and whether it must not in any case."""
_waits: list[Wait] = []
"""The waits that are under way, the outermost first."""
_reported_at: dict[str, float] = {}
"""When a line about each kind of wait was last written."""


def show() -> None:
    """Show the waits of this process from now on: called by the command line, not by programs that import us."""
    global _shown
    _shown = not _hidden


def hide() -> None:
    """Keep the waits of this process silent for good: called by all but the first of a run's processes."""
    global _shown, _hidden
    _shown, _hidden = False, True


@contextmanager
def waiting(what: str, total: float | None = None) -> Iterator[Wait]:
    """Show the body on the screen if it takes longer than two seconds; it calls :meth:`Wait.advance` as it goes on.

    Args:
        what, total: see :class:`Wait`.

    Yields: the wait.
    """
    with _reported(Wait(what, total)) as wait:
        yield wait


@contextmanager
def updates(steps: int, done: int) -> Iterator[ShowUpdate]:
    """Show a training of ``steps`` updates: by a bar on a terminal, by about twenty plain lines elsewhere.

    Args:
        done: updates that were done before.

    Yields: a function that shows how far it has come; figures are running means.
    """
    means: dict[str, float] = {}
    wait = Wait("step", steps, done, counted=True, patience=0)

    def note(step: int, fresh: Sequence[dict[str, float]]) -> None:
        for metrics in fresh:
            for key in SHOWN_FIGURES:
                if key in metrics:
                    means[key] = 0.9 * means.get(key, metrics[key]) + 0.1 * metrics[key]
        wait.figures = tuple(f"{key} {value:.3f}" for key, value in means.items())
        wait.reach(step)

    if _shown and _is_terminal(sys.stdout) and _is_terminal(sys.stderr):
        with _reported(wait):
            yield note
        print(wait.last_line(line_width(80) - 1), flush=True)  # the bar is gone, and its last figures are worth keeping
        return
    interval = max(1, steps // 20)

    def print_some(step: int, fresh: Sequence[dict[str, float]]) -> None:
        note(step, fresh)
        if step == steps:
            print(wait.last_line(), flush=True)
        elif step % interval == 0:
            print("  ".join([f"step {step}/{steps}", *wait.figures, wait.time_text()]), flush=True)

    yield print_some


@contextmanager
def _reported(wait: Wait) -> Iterator[Wait]:
    """Show a wait on the screen as long as the body runs; waits inside it share its screen.

    Yields: the wait.
    """
    stream = sys.stderr
    if not _shown or stream is None or threading.current_thread() is not threading.main_thread():
        yield wait
        return
    screen = (_Terminal if _is_terminal(stream) else _Lines)(stream) if not _waits else None
    _waits.append(wait)
    try:
        yield wait
    finally:
        _waits.remove(wait)
        if screen is not None:
            screen.end()
        if wait.reported and not _is_terminal(stream):
            _write(stream, f"{wait.what} took {duration(wait.seconds)}")


def _is_terminal(stream: Any) -> bool:
    """Return whether a stream is there, open, and shown on a terminal."""
    with suppress(Exception):
        return bool(stream.isatty())
    return False


def _write(stream: Any, line: str) -> None:
    """Write a line; a stream that takes none is no reason to stop."""
    with suppress(Exception):
        print(line, file=stream, flush=True)


class _Lines:
    """Writes plain lines about the innermost long wait, from a thread of its own, until :meth:`end`."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="policyskip-progress", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(REFRESH):
            with suppress(Exception):  # a screen that cannot be written is no reason to stop
                self.report([wait for wait in list(_waits) if wait.is_long])
        with suppress(Exception):
            self.close()

    def report(self, waits: list[Wait]) -> None:
        """Show the waits that have become long."""
        if waits:
            wait, now = waits[-1], time.monotonic()
            if now - _reported_at.get(wait.what, -INTERVAL) >= INTERVAL:
                _reported_at[wait.what], wait.reported = now, True
                _write(self.stream, f"{wait.line()} …" if wait.share is None else wait.line())

    def close(self) -> None:
        """Take away what must not stay on the screen."""

    def end(self) -> None:
        """End the thread, and return when the screen is free."""
        self._ended.set()
        self._thread.join()


class _Terminal(_Lines):
    """Updates a line for each long wait on a terminal, below what is printed meanwhile."""

    def __init__(self, stream: Any) -> None:
        self._live: Any = None
        super().__init__(stream)

    def report(self, waits: list[Wait]) -> None:
        if waits and self._live is None:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(
                console=Console(file=self.stream),
                auto_refresh=False,
                transient=True,
                redirect_stdout=_is_terminal(sys.stdout),
            )
            self._live.start()
        if self._live is not None:
            from rich.text import Text

            console = self._live.console
            bar = ("━", "─") if "utf" in console.encoding.lower() else ("#", "-")
            lines = [wait.bar_line(console.width - 1, *bar) for wait in waits]
            self._live.update(Text("\n".join(lines), no_wrap=True), refresh=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
