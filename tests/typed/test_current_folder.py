"""No module of the current folder is imported because it lies there: only because a user names or trusts it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from policyskip import registry
from policyskip.errors import UserError
from policyskip.typed import current_folder
from tests.conftest import without_waits

STORED = Path(__file__).parent.parent / "stored" / "runs"
ROOT = str(Path(__file__).parent.parent.parent)
TRAP = "import os\nopen(os.path.join(os.path.dirname(__file__), 'sprung'), 'a').write(__name__ + chr(10))\n"


def set_traps(folder: Path) -> None:
    """Put a module of every name that could be imported into a folder, but those that ``python -m`` itself imports."""
    code = "import runpy, sys; print(*sys.modules)"
    before = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    names = {*sys.stdlib_module_names, *packages_distributions(), "hydra_plugins", "sitecustomize", "usercustomize"}
    for name in names - set(before) - {"policyskip", "tests", "encodings"}:
        if name.isidentifier():
            (folder / f"{name}.py").write_text(TRAP)
    (folder / "matplotlibrc").write_text("text.usetex: True\nfont.family: nonsense\nno.such.key: 1\n")


def run(folder: Path, *words: str, python_path: str = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)


def test_no_module_of_the_current_folder_is_imported(tmp_path):
    """All that a command imports, up to the reading of a run folder."""
    set_traps(tmp_path)
    result = run(tmp_path, "-m", "policyskip", "calibrate", "run=nothing")
    assert not (tmp_path / "sprung").exists(), (tmp_path / "sprung").read_text()
    assert result.returncode == 2 and "the run folder nothing does not exist" in result.stderr
    assert len(without_waits(result.stderr)) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "run=.", "device=cpu"],
        ["calibrate", "run=.", "device=cpu", "target.knee=true"],
        ["profile", "run=.", "device=cpu", "repeats=1", "batch_sizes=[1]", "images=4"],
        ["compare", "runs=.", "output=c", "device=cpu", "tracking=none"],
        ["train", "run.resume=.", "train.steps=5", "device=cpu"],
    ],
    ids=lambda words: words[0],
)
def test_nothing_of_a_run_folder_is_imported_that_is_the_current_folder(tmp_path, words):
    shutil.copytree(STORED / "cdl", tmp_path / "x")
    set_traps(tmp_path / "x")
    result = run(tmp_path / "x", "-m", "policyskip", *words)
    assert not (tmp_path / "x" / "sprung").exists(), (tmp_path / "x" / "sprung").read_text()
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_a_class_that_is_typed_is_found_in_the_current_folder_and_behind_all_else(tmp_path):
    set_traps(tmp_path)
    (tmp_path / "my_rewards.py").write_text(
        "import yaml, sys\nfrom policyskip.rewards import Utilization\n"
        "class Mine(Utilization):\n    def __init__(self) -> None:\n        super().__init__(1.0)\n"
    )
    words = ["reward._target_=my_rewards.Mine", "+experiment=debug", "device=cpu", "run.dir=x"]
    result = run(tmp_path, "-m", "policyskip", "train", *words)
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "sprung").exists(), (tmp_path / "sprung").read_text()


def path_after(monkeypatch, folder: Path, path: list[str]) -> list[str]:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", path)
    current_folder.leave_out()
    return sys.path


def test_what_is_left_out_of_the_path(monkeypatch, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    path = ["", str(tmp_path), str(tmp_path / "link"), ".", "/other", ROOT]
    assert path_after(monkeypatch, tmp_path, path) == ["/other", ROOT]
    assert path_after(monkeypatch, Path(ROOT), ["", ROOT, "/other"]) == [
        "/other",
        ROOT,
    ]  # policyskip is imported from it
    installed = os.path.dirname(pytest.__path__[0])
    assert path_after(monkeypatch, Path(installed), [installed, "/other"]) == [installed, "/other"]


def test_a_current_folder_that_is_gone_is_no_error(monkeypatch, tmp_path):
    (gone := tmp_path / "gone").mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setattr(sys, "path", ["/other"])
    current_folder.leave_out()
    current_folder.make_importable()
    assert sys.path == ["/other"]
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("argv", "orig_argv", "expected"),
    [
        (["-m"], ["python", "-m", "policyskip", "train"], True),
        (["-m"], ["python", "-mpolicyskip", "train"], True),
        (["-m"], ["python", "-X", "utf8", "-Bm", "policyskip"], True),
        (["-m"], ["python", "-m", "pytest", "policyskip"], False),
        (["/usr/bin/policyskip", "train"], [], True),
        (["my_script.py"], [], False),
        ([""], [], False),
        ([], [], False),
    ],
)
def test_which_processes_run_the_command_line(monkeypatch, argv, orig_argv, expected):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", orig_argv)
    assert current_folder.is_command() is expected


def test_only_what_is_typed_or_trusted_makes_the_current_folder_importable(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    (tmp_path / "my_untrusted_part.py").write_text("class Mine: ...\n")
    with registry.trusting(False), pytest.raises(UserError):
        registry.resolve("reward", "my_untrusted_part.Mine")
    registry.resolve("reward", "policyskip.rewards.Utilization")
    assert str(tmp_path) not in sys.path
    registry.resolve("reward", "my_untrusted_part.Mine")
    assert sys.path[-1] == str(tmp_path)
