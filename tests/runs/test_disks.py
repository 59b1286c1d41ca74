"""Disks that are full or read-only, on small file systems mounted for the purpose: one line, and nothing is lost."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from policyskip.errors import UserError
from policyskip.runs.folder import create
from tests.conftest import typed
from tests.learners import learn
from tests.runs.test_resume import same, without_times


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Leave no room."""
    with (folder / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return folder / "filler"


def remount(folder: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)


@pytest.mark.parametrize("what", ["full", "read-only"])
@pytest.mark.parametrize("name", ["blockdrop", "msdnet"])
def test_a_disk_that_fails_during_a_run_loses_nothing(name, what, disk, tmp_path):
    """After the checkpoint of update 3, before update 5 of 8."""

    def spoil(learner: Any, source: Any, number: int) -> None:
        if number == 5:
            fill(disk) if what == "full" else remount(disk, "ro")

    run, whole = (create(str(folder / "run"), "policyskip train", "") for folder in (disk, tmp_path))
    with pytest.raises(UserError) as refused:
        learn(name, run, spoil=spoil)
    reason = "No space left on device" if what == "full" else "Read-only file system"
    assert reason in str(refused.value) and "\n" not in str(refused.value)
    assert str(refused.value).endswith(f"the last good checkpoint is {run.folder / 'checkpoint.pt'}, of update 3")
    assert run.load_checkpoint()["step"] == 3 and run.load_best_so_far()
    if what == "full":
        (disk / "filler").unlink()
    else:
        remount(disk, "rw")
    assert not list(run.folder.glob(".*"))
    assert learn(name, run, resume=True) and learn(name, whole)
    assert without_times(run) == without_times(whole)
    assert same(run.load_checkpoint()["learner"], whole.load_checkpoint()["learner"])


@pytest.mark.parametrize("what", ["full", "read-only"])
def test_a_run_that_cannot_begin_says_so_in_one_line(what, disk):
    if what == "full":
        fill(disk)
    else:
        remount(disk, "ro")
    result = typed("train", "+experiment=debug", "device=cpu", f"run.dir={disk / 'x'}", cwd=disk.parent)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert f"cannot write {disk / 'x'}" in result.stderr
