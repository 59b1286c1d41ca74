"""Streams that cannot be written, and the exit code of what was done in spite of them."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from policyskip.evaluation.tables import console
from policyskip.typed.streams import PatientStream, line_width

PROGRAM = """
import sys
from policyskip.typed import streams
streams.make_patient()
for i in range(10_000):  # more than a pipe holds
    print("line é", i, flush=i % 2 == 0)
open("done", "w").write("written")
print("said", file=sys.stderr)
sys.exit(3 if streams.lost_output() else 0)
"""


class Full(io.StringIO):
    def flush(self) -> None:
        raise OSError(28, "No space left on device")


def test_what_cannot_be_written_is_dropped_and_remembered():
    stream = PatientStream(Full())
    assert stream.write("abc") == 3 and stream.problem is None
    stream.flush()
    stream.flush()
    assert stream.problem is not None and stream.problem.errno == 28


def test_a_letter_that_the_encoding_lacks_is_shown_as_its_number():
    raw = io.BytesIO()
    stream = PatientStream(io.TextIOWrapper(raw, encoding="ascii"))
    print("γ = 1 ✓", file=stream, flush=True)
    assert raw.getvalue() == b"\\u03b3 = 1 \\u2713\n"


@pytest.mark.parametrize(("redirected", "code"), [(">&-", 0), ("> /dev/full", 3), ("| head -1", 3), ("2>&-", 0)])
def test_the_work_is_done_whatever_becomes_of_the_output(tmp_path, redirected, code):
    (tmp_path / "program.py").write_text(PROGRAM)
    line = f"{sys.executable} program.py {redirected}; echo ${{PIPESTATUS[0]}} > code"
    path = os.pathsep.join(filter(None, sys.path))
    ran = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, capture_output=True, env={**os.environ, "PYTHONPATH": path,
                                                                     "PYTHONIOENCODING": "ascii"}
    )  # fmt: skip
    assert (tmp_path / "done").read_text() == "written" and int((tmp_path / "code").read_text()) == code
    assert ran.stderr.strip() == (b"" if redirected == "2>&-" else b"said")


@pytest.mark.parametrize(
    ("columns", "width"),
    [
        ("80", 80),
        ("200", 200),
        (None, 110),
        ("", 110),
        ("0", 110),
        ("39", 110),
        ("-80", 110),
        ("x", 110),
        ("８０", 110),
    ],
)
def test_what_is_piped_is_as_wide_as_columns_says(columns, width, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    assert line_width(110) == width == console().width
