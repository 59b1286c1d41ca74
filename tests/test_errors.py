"""An error is one line that names what failed; a traceback is printed on request."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from policyskip import errors, training
from policyskip.errors import UserError, check_choice, first_line, in_one_line, is_users_file, place_in_users_code
from policyskip.files import damaged, reporting_write_errors
from tests.conftest import typed

SMALL = [
    *("data.train=64", "data.validation=32", "data.test=32", "data.batch_size=32", "device=cpu", "tracking=none"),
    *("train.steps=3", "train.validate_every=1", "train.log_every=1", "run.dir=x"),
    *("backbone=resnet20", "backbone.checkpoint=random"),
    *("front.budget=1e4", "front.images=20"),
]
AGENT = """
from policyskip.agents.blockdrop import BlockDrop


class Mine(BlockDrop):
    def __init__(self, env, total_steps, seed=0, fails_at=99):
        super().__init__(env, total_steps, seed=seed, width=4)
        self.fails_at = fails_at

    def update(self, env):
        if self.step == self.fails_at:
            return [][self.step]
        return super().update(env)

    def load_state_dict(self, state):
        super().load_state_dict({**state, "step": state["step"] + bool(self.fails_at == -1 and [][1])})
"""
REWARD = """
class Mine:
    def __call__(self, outcome):
        return [][3]
"""
DATA = """
from policyskip.data import digits


def mine(device, train, validation, test):
    raise IndexError("no such digit")
"""
SEE_WHERE = "; set POLICYSKIP_TRACEBACK=1 to see where"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.delenv("POLICYSKIP_TRACEBACK", raising=False)
    for name, code in (("agents", AGENT), ("rewards", REWARD), ("data", DATA)):
        (tmp_path / f"failing_{name}.py").write_text(code)
    return tmp_path


def errors_of(folder: Path, *arguments: str) -> list[str]:
    """The lines on the standard error of a ``train`` that must end with exit code 2."""
    result = typed("train", *arguments, cwd=folder)
    assert result.returncode == 2, result.stdout + result.stderr
    return result.stderr.splitlines()


def test_an_exception_s_text_in_one_line():
    error = ValueError("\n  first  \n\tsecond\n")
    assert first_line(error) == "first" and in_one_line(error) == "first second"
    assert in_one_line(error, most=7) == "first s"
    assert first_line(ValueError()) == in_one_line(ValueError()) == "ValueError"


@pytest.mark.parametrize(
    "given", [torch.zeros(3, 3), "\x1b[2J\n\u202ea", "x" * 10**5], ids=["tensor", "escapes", "long"]
)
def test_the_text_of_a_user_error_is_one_line_that_is_safe_to_print(given):
    text = str(UserError(f"images must be uint8, got {given}"))
    assert text.startswith("images must be uint8, got ") and text.isprintable() and len(text) <= 3_000
    with pytest.raises(UserError, match=r"order must be one of a, b, got .*") as error:
        check_choice("order", given, ("a", "b"))
    assert str(error.value).isprintable() and len(str(error.value)) < 200


def test_an_agent_of_one_s_own_that_fails_is_named_with_the_last_checkpoint(folder):
    (line,) = errors_of(folder, *SMALL, "agent._target_=failing_agents.Mine", "agent.fails_at=2")
    assert line.startswith("policyskip train: agent: failing_agents.Mine failed with IndexError: list index out of")
    place = " (failing_agents.py, line 12)"
    assert line.endswith(f"the last good checkpoint is x/checkpoint.pt, of update 2{place}{SEE_WHERE}")


def test_an_agent_that_fails_when_it_is_resumed_is_not_called_damage(folder):
    own = ["agent._target_=failing_agents.Mine", "agent.fails_at=2"]
    errors_of(folder, *SMALL, *own)
    (line,) = errors_of(folder, "run.resume=x", "run.trust=true")
    assert "agent: failing_agents.Mine failed with IndexError" in line and "damaged" not in line
    config = folder / "x/config.yaml"
    config.write_text(config.read_text().replace("fails_at: 2", "fails_at: -1"))
    (line,) = errors_of(folder, "run.resume=x", "run.trust=true")
    assert "agent: failing_agents.Mine failed with IndexError" in line and "damaged" not in line


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "reward._target_=failing_rewards.Mine",
            "Mine raised IndexError: list index out of range (failing_rewards.py, line 4)",
        ),
        ("data._target_=failing_data.mine", "failed with IndexError: no such digit (failing_data.py, line 6)"),
        ("reward._target_=failing_import.Mine", "NameError: name 'nothing' is not defined"),
        ("reward._target_=failing_import.Mine", " (failing_import.py, line 2)"),
        ("reward._target_=failing_helper.Mine", "(../helpers_of_mine.py, line 2)"),
    ],
)
def test_the_failing_line_of_one_s_own_code_is_named(folder, argument, message, monkeypatch):
    """Whatever failed there: a call, an import, a helper that the class calls."""
    (folder / "failing_import.py").write_text("import os\nnothing\n")
    helper = folder.parent / "helpers_of_mine.py"
    helper.write_text("def fail():\n    return [][3]\n")
    monkeypatch.syspath_prepend(folder.parent)
    (folder / "failing_helper.py").write_text(
        "import helpers_of_mine\n\n\nclass Mine:\n    def __call__(self, outcome):\n        helpers_of_mine.fail()\n"
    )
    (line,) = errors_of(folder, *SMALL, argument)
    assert message in line and line.endswith(SEE_WHERE)


def test_installed_code_is_not_the_user_s(tmp_path):
    own = tmp_path / "mine.py"
    own.write_text("")
    files = (own, json.__file__, torch.__file__, training.__file__, "<frozen importlib>", tmp_path / "gone.py")
    assert [is_users_file(str(file)) for file in files] == [True, False, False, False, False, False]
    try:
        json.loads("{")
    except ValueError as error:
        assert place_in_users_code(error).startswith(" (")  # this very file is the user's here
        assert place_in_users_code(ValueError()) == ""


def test_a_traceback_of_the_whole_chain_is_printed_on_request(folder, monkeypatch):
    monkeypatch.setenv("POLICYSKIP_TRACEBACK", "1")
    lines = errors_of(folder, *SMALL, "agent._target_=failing_agents.Mine", "agent.fails_at=0")
    text = "\n".join(lines)
    assert text.count("Traceback (most recent call last)") == 2 and 'failing_agents.py", line 12, in update' in text
    assert "IndexError: list index out of range" in lines and "direct cause of the following exception" in text
    assert lines[-1].startswith("policyskip train: agent: failing_agents.Mine failed with IndexError")
    assert lines[-1].endswith("failing_agents.py, line 12)")
    lines = errors_of(folder, "run.resume=nowhere")
    assert lines[0].startswith("Traceback") and lines[-1] == ("policyskip train: the run folder nowhere does not exist")
    monkeypatch.setenv("POLICYSKIP_TRACEBACK", "0")
    assert len(errors_of(folder, "run.resume=nowhere")) == 1


def test_a_bug_of_policyskip_itself_is_no_bad_input(folder, monkeypatch):
    monkeypatch.setattr(training, "train", lambda *arguments, **keywords: [][0])
    with pytest.raises(IndexError):
        typed("train", *SMALL, "agent=blockdrop", "agent.width=4", cwd=folder)


def test_a_place_is_named_from_a_folder_that_is_gone(tmp_path, monkeypatch):
    try:
        json.loads("{")
    except ValueError as error:
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        (tmp_path / "here").rmdir()
        assert place_in_users_code(error).startswith(f" ({__file__}, line ")


def test_what_a_class_of_one_s_own_cannot_read_is_not_called_a_failure_to_write(monkeypatch):
    cannot = "^cannot write x: image file is truncated; what"
    with pytest.raises(UserError, match=cannot), reporting_write_errors(Path("x")):
        raise OSError("image file is truncated")
    monkeypatch.setitem(errors._users_classes, __name__, "data: my_data.Mine")
    with pytest.raises(FileNotFoundError), reporting_write_errors(Path("x")):
        Path("no such file").read_bytes()


def test_only_what_could_not_be_read_is_called_damaged(tmp_path):
    with pytest.raises(UserError, match="a is damaged or not ours: 'b'"), damaged(Path("a")):
        {}["b"]
    with pytest.raises(UserError, match="^too many$"), damaged(Path("a")):
        raise UserError("too many")


def test_a_sweep_s_log_has_the_traceback_of_a_class_of_one_s_own(folder):
    small = [argument for argument in SMALL if not argument.startswith("run.dir")]
    own = ["agent._target_=failing_agents.Mine", "agent.fails_at=0,99"]
    result = typed("train", "--multirun", *small, *own, cwd=folder)
    assert result.returncode == 2
    assert "agent.fails_at=0: agent: failing_agents.Mine failed with IndexError" in result.stderr
    assert "failing_agents.py, line 12)\n" in result.stderr
    (log,) = folder.glob("runs/sweep-*/logs/001.txt")
    assert "IndexError: list index out of range" in log.read_text()
    assert len(list(folder.glob("runs/sweep-*/*/summary.json"))) == 1


def test_an_exception_without_text_is_its_name_alone():
    assert errors.named(AssertionError()) == "AssertionError" and errors.named(KeyError(3)) == "KeyError: 3"
    errors.remember_users_class(__name__, "reward: mine.R")
    try:
        try:
            raise AssertionError
        except AssertionError as error:
            assert errors.users_problem(error) == "reward: mine.R failed with AssertionError"
    finally:
        errors.forget_users_classes()
