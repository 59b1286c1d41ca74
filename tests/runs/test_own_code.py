"""The code of a user's own classes is kept with the run, as text; the commit is read without git."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from policyskip.errors import UserError
from policyskip.runs import own_code
from policyskip.runs.folder import Run


@pytest.fixture
def run(tmp_path) -> Run:
    (tmp_path / "run").mkdir()
    return Run(tmp_path / "run")


def uses(monkeypatch, *modules: str) -> None:
    """Let classes of these modules take part in the run."""
    monkeypatch.setattr(own_code, "users_modules", lambda: modules)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the user's own, ``package_of_mine.rewards``."""
    (tmp_path / "package_of_mine").mkdir()
    source = tmp_path / "package_of_mine/rewards.py"
    source.write_text("class Mine: ...  # ä\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "package_of_mine", None)
    monkeypatch.delitem(sys.modules, "package_of_mine")
    __import__("package_of_mine.rewards")
    yield source
    for name in ("package_of_mine", "package_of_mine.rewards"):
        sys.modules.pop(name, None)


def test_the_source_is_kept_once_and_a_later_change_is_said(run, mine, monkeypatch, capsys):
    uses(monkeypatch, "package_of_mine.rewards")
    own_code.keep(run)
    kept = run.folder / "own/package_of_mine/rewards.py"
    assert kept.read_bytes() == mine.read_bytes() and list(own_code.kept(run)) == ["own/package_of_mine/rewards.py"]
    own_code.keep(run)
    assert capsys.readouterr().out == ""
    before = mine.read_bytes()
    mine.write_text("class Mine: pass\n")
    own_code.keep(run)
    assert kept.read_bytes() == before
    assert "package_of_mine.rewards has changed since the run began" in capsys.readouterr().out


def test_what_is_installed_or_no_text_is_not_kept(run, mine, monkeypatch):
    uses(
        monkeypatch,
        "json",
        "torch.nn",
        "builtins",
        "not.there",
        "policyskip.rewards",
        "__main__",
        "package_of_mine.rewards",
    )
    assert json and "torch" in sys.modules
    mine.write_bytes(b"\xff\xfe\x00")
    own_code.keep(run)
    mine.write_bytes(b"#" * (own_code.MOST_BYTES + 1))
    own_code.keep(run)
    own = run.folder / "own"
    assert not own.exists() or [path.name for path in own.rglob("*.py")] == ["__main__.py"]  # pytest's own program


@pytest.mark.parametrize("link", ["own", "own/package_of_mine", "own/package_of_mine/rewards.py"])
def test_nothing_is_kept_or_handed_on_through_a_link(link, run, mine, monkeypatch, tmp_path):
    uses(monkeypatch, "package_of_mine.rewards")
    victim = tmp_path / "victim"
    if link.endswith(".py"):
        victim.write_text("secret")
    else:
        victim.mkdir()
    place = run.folder / link
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(victim)
    for action in (own_code.keep, own_code.kept):
        with pytest.raises(UserError, match="is a link"):
            action(run)
    assert victim.read_text() == "secret" if victim.is_file() else not list(victim.iterdir())


def git(folder, *arguments: str) -> str:
    options = ["-c", "user.email=a@b", "-c", "user.name=a", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *options, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_commit_is_that_which_git_names(tmp_path):
    """On a branch, with packed references, detached, and in a worktree."""
    repository = tmp_path / "repository"
    (repository / "inside").mkdir(parents=True)
    git(tmp_path, "init", "-q", "repository")
    assert own_code.commit_of(repository) is None  # nothing is committed
    git(repository, "commit", "-q", "--allow-empty", "-m", "first")
    first = git(repository, "rev-parse", "HEAD")
    assert own_code.commit_of(repository / "inside") == first
    git(repository, "pack-refs", "--all")
    assert own_code.commit_of(repository) == first
    git(repository, "worktree", "add", "-q", "-b", "other", "../tree")
    git(tmp_path / "tree", "commit", "-q", "--allow-empty", "-m", "second")
    second = git(tmp_path / "tree", "rev-parse", "HEAD")
    assert own_code.commit_of(tmp_path / "tree") == second != first
    git(repository, "checkout", "-q", "--detach")
    assert own_code.commit_of(repository) == first


@pytest.mark.parametrize(
    "head", ["ref: ../../secret", "ref: /etc/passwd", "x" * 40, "ref: ", "", "\udcff", "ref: refs/heads/gone"]
)
def test_a_strange_repository_gives_no_commit_and_runs_nothing(head, tmp_path, monkeypatch):
    (tmp_path / "secret").write_text("not a hash")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/HEAD").write_bytes(os.fsencode(head))
    (tmp_path / ".git/config").write_text("[core]\n\tfsmonitor = touch executed\n")
    monkeypatch.setattr(subprocess, "Popen", lambda *_arguments, **_options: pytest.fail("a program was started"))
    assert own_code.commit_of(tmp_path) is None
    (tmp_path / ".git/HEAD").unlink()
    os.mkfifo(tmp_path / ".git/HEAD")  # it would be read for ever
    assert own_code.commit_of(tmp_path) is None


def test_a_folder_without_a_repository_has_no_commit(tmp_path):
    assert own_code.commit_of(tmp_path) is None
