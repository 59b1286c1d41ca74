"""The streams that a process prints to may be closed, full, or unable to show a letter: what is computed goes on.

What cannot be written is dropped. The first reason is kept, and said at the end.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any

EXIT_OUTPUT_LOST = 74
"""The exit code of a command that did all its work and could not print all of it; sysexits.h calls it EX_IOERR."""


NARROWEST = 40
"""A width that ``COLUMNS`` states and that is less than this is ignored."""


def line_width(elsewhere: int) -> int:
    """Return how many letters a line of the standard output may have.

    It is what ``COLUMNS`` says, or else the width of the terminal.

    Args:
        elsewhere: the width where the output is no terminal, and ``COLUMNS`` says nothing.
    """
    columns = os.environ.get("COLUMNS", "")
    if columns.isascii() and columns.isdecimal() and int(columns[:6]) >= NARROWEST:
        return int(columns[:6])
    with suppress(AttributeError, ValueError, OSError):  # no stream, a closed one, no terminal
        return max(NARROWEST, os.get_terminal_size(sys.stdout.fileno()).columns)
    return elsewhere


class PatientStream:
    """A text stream that drops what cannot be written, and remembers why in ``problem``.

    Args:
        stream: the stream to write to; letters that its encoding lacks are written as escape sequences.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.problem: OSError | None = None
        with suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._give_up(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Let what is still to be written, by this process or those that it starts, go nowhere."""
        self.problem = self.problem or error
        with suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def make_patient() -> None:
    """Put patient streams in place of the process's own; streams that a caller has put there stay.

    A stream that was closed when the process started is opened, to nowhere: otherwise the next file that is opened
    would get its number, and be written to by whatever prints.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, f"__{name}__") is None:
            opened = os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one
            if getattr(sys, name) is None:
                setattr(sys, name, os.fdopen(opened, mode, encoding="utf-8", closefd=False))
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, PatientStream(stream))


def lost_output() -> OSError | None:
    """Write what is still held back, and return why something could not be printed; None if all was."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, PatientStream):
            stream.flush()
    return sys.stdout.problem if isinstance(sys.stdout, PatientStream) else None
