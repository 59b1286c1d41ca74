"""Files that strangers made and arguments that nobody thought of: refused in a line or two, or taken for what they are.

``make fuzz`` (minutes) tries hundreds; the default tests try a few. In none is code executed that came in a file, is a
stack trace shown, or a file lost. The inputs follow from fixed seeds.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hydra import compose, initialize_config_module
from hypothesis import HealthCheck, Phase, given, settings
from omegaconf import OmegaConf

import policyskip
from policyskip.errors import UserError
from tests.conftest import typed
from tests.hostile import BOMBS, DAMAGE, contents

DATA = ["data.train=64", "data.validation=40", "data.test=40", "data.batch_size=32", "device=cpu", "tracking=none"]
STEPS = ["train.steps=2", "train.validate_every=1", "train.log_every=1", "run.dir=x"]
FRONT = ["front.budget=4e3", "front.images=20", "front.learner_steps=0"]
RANDOM = ["backbone=resnet20", "backbone.checkpoint=random"]
RUNS = {
    "blocks": ["train", *DATA, *STEPS, *FRONT, *RANDOM, "+backbone.width=4", "agent.width=4"],
    "exits": ["train", "agent=branchynet", "backbone=branchy_lenet", *DATA, *STEPS, "target.macs_fraction=0.95"],
    "gates": ["train", "agent=skipnet", *DATA, *STEPS, *FRONT, *RANDOM, "+backbone.width=4"],
    "leaving": ["train", "agent=ppo", "env=early_exit", *DATA, *STEPS],
}
FILES = ["config.yaml", "policy.json", "best.safetensors", "network.safetensors", "checkpoint.pt"]
FILES += ["summary.json", "front.json", "metrics.jsonl"]
READERS = {
    "load": [],
    "evaluate": ["evaluate", "run=x", "device=cpu"],
    "calibrate": ["calibrate", "run=x", "device=cpu", "target.knee=true"],
    "resume": ["train", "run.resume=x", "train.steps=3"],
    "finish": ["train", "run.resume=x"],
}
TRIED: set[object] = set()
"""The distinct inputs that were bad: those that were refused."""


def some(count: int) -> settings:
    """Examples drawn the same way every time; what fails is not made smaller, as every try takes seconds."""
    return settings(
        max_examples=count, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[Path]:
    """A folder with finished runs, made when they are first asked for; the current folder is an empty one beside them."""
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        (folder / "here").mkdir()
        patch.chdir(folder / "here")
        yield folder


def finished(runs: Path, name: str) -> Path:
    if not (runs / name).exists():
        (runs / f"making-{name}").mkdir()
        result = typed(*RUNS[name], cwd=runs / f"making-{name}")
        assert result.returncode == 0, result.stderr
        shutil.copytree(runs / f"making-{name}" / "x", runs / name)
    return runs / name


def emptied(folder: Path) -> Path:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return folder


def judge(words: list[str], here: Path, tried: object) -> int:
    """Run a command that may be refused; if it is, it says so in a line or two, and every file is as it was."""
    before = contents(here)
    result = typed(*words, cwd=here, drawn=True)
    said = [line for line in result.stderr.splitlines() if line.strip()]
    assert not (here / "marker").exists(), "code from a file was executed"
    assert result.returncode in (0, 2) and "Traceback" not in result.stdout + result.stderr
    if result.returncode == 2:
        assert 1 <= len(said) <= 2 and said[0].startswith("policyskip"), said
        assert contents(here) == before
        TRIED.add(tried)
    return result.returncode


def try_damage(runs: Path, name: str, file: str, damage: str, reader: str, seed: int) -> None:
    """Damage one file of a run, and read the run."""
    here = emptied(runs / "here")
    shutil.copytree(finished(runs, name), here / "x")
    path, chance = here / "x" / file, random.Random(seed)
    if damage == "swap":
        path.write_bytes((runs / name / chance.choice([f for f in FILES if (runs / name / f).exists()])).read_bytes())
    else:
        path.write_bytes(DAMAGE[damage](path.read_bytes() if path.exists() else b"", chance))
    tried = (name, file, path.read_bytes(), reader)
    if reader != "load":
        judge(READERS[reader], here, tried)
        return
    try:
        predictor = policyskip.load("x")
    except UserError as error:
        assert len(str(error).splitlines()) <= 2
        TRIED.add(tried)
    else:
        if tuple(predictor.image_shape) == (3, 20, 20):
            predictor.predict(torch.zeros(2, 3, 20, 20, dtype=torch.uint8))
    assert not (here / "marker").exists(), "code from a file was executed"


damages = st.tuples(
    st.sampled_from(FILES), st.sampled_from([*DAMAGE, "swap"]), st.sampled_from(list(READERS)), st.integers(0, 10**9)
)


@some(12)
@given(what=st.tuples(st.sampled_from(FILES[:5]), st.sampled_from(list(DAMAGE)), st.integers(0, 10**9)))
def test_some_damage_to_a_run(runs, what):
    file, damage, seed = what
    try_damage(runs, "blocks", file, damage, "load", seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
@some(110)
@given(what=damages)
def test_much_damage_to_runs(runs, name, what):
    try_damage(runs, name, *what)


# A pickle in every place where one could hide


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("file", FILES)
def test_no_pickle_in_a_run_is_executed(runs, file, bomb):
    here = emptied(runs / "here")
    shutil.copytree(finished(runs, "blocks"), here / "x")
    (here / "x" / file).write_bytes(BOMBS[bomb]())
    try:
        policyskip.load("x")
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    if file == "checkpoint.pt":
        assert judge(READERS["resume"], here, (file, bomb)) == 2
    assert not (here / "marker").exists()


@pytest.mark.parametrize("bomb", list(BOMBS)[:4])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin", ""])
def test_no_pickle_given_as_a_checkpoint_is_executed(suffix, bomb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(f"net{suffix}").write_bytes(BOMBS[bomb]())
    for build in (policyskip.backbones.load, policyskip.backbones.load_exits):
        with pytest.raises(UserError, match="net") as refused:
            build(f"net{suffix}")
        assert len(str(refused.value).splitlines()) == 1
    assert not Path("marker").exists()


# Arguments


def keys_of(command: str, *overrides: str) -> list[str]:
    """Every key of a command's configuration."""
    with initialize_config_module("policyskip.configs", version_base="1.3"):
        config = OmegaConf.to_container(compose(command, list(overrides)), resolve=False)

    def leaves(node: object, place: str) -> Iterator[str]:
        for key, value in node.items() if isinstance(node, dict) else ():
            yield f"{place}{key}"
            yield from leaves(value, f"{place}{key}.")

    # Where a run is written, and what is waited for or takes memory without end, are the user's own affair.
    return [key for key in leaves(config, "") if key not in ("run", "run.dir", "run.resume", "output")]


COMMANDS = {
    "train": RUNS["blocks"],
    "train exits": RUNS["exits"],
    "train gates": RUNS["gates"],
    "pretrain": ["pretrain", "backbone=resnet20", *DATA, *STEPS],
    "evaluate": ["evaluate", "run=x"],
    "calibrate": ["calibrate", "run=x"],
    "front": ["front", *DATA[:5], *FRONT, *RANDOM],
}
numbers = st.sampled_from(
    ["-1", "0", "1", "2", "-1.5", "0.5", "1e-9", "nan", "inf", "-inf", "1e999", "-99999999999999"]
)
words = st.text(alphabet="abzXÄ中 \t'\"\\[]{}()$:,;=.#@!*&|<>%~+-_09é\u200b", min_size=0, max_size=12)
others = st.sampled_from(
    ["null", "true", "[]", "[1,2]", "{}", "{a:1}", "???", "${seed}", "${nothing}", "'1'", "[[[", "!!python/name:os.system",
     "os.system", "policyskip.errors.UserError", "\u202e", "1_000", "0x10", "x" * 5000]
)  # fmt: skip
values = st.one_of(numbers, words, others).filter(lambda value: "/" not in value and ".." not in value)
SIGNS = st.sampled_from(["", "", "", "+", "++", "~"])


def try_argument(runs: Path, command: str, sign: str, key: str, value: str) -> None:
    here = emptied(runs / "here")
    if COMMANDS[command][-1] == "run=x":
        shutil.copytree(finished(runs, "exits"), here / "x")
    argument = f"{sign}{key}" if sign == "~" else f"{sign}{key}={value}"
    judge([*COMMANDS[command], argument], here, (command, argument))


def all_keys(command: str) -> list[str]:
    first, *words = COMMANDS[command]
    keys = keys_of(first, *(word for word in words if "=" in word))
    return [*keys, *(f"{key}z" for key in keys[::4]), "", ".", "agent.", "=", "a=b=c", "hydra", "__class__"]


@st.composite
def arguments(draw: st.DrawFn, commands: list[str]) -> tuple[str, str, str, str]:
    command = draw(st.sampled_from(commands))
    return command, draw(SIGNS), draw(st.sampled_from(all_keys(command))), draw(values)


@some(8)
@given(what=arguments(["train"]))
def test_some_arguments(runs, what):
    try_argument(runs, *what)


@pytest.mark.slow
@some(250)
@given(what=arguments(list(COMMANDS)))
def test_many_arguments(runs, what):
    try_argument(runs, *what)


@pytest.mark.slow
def test_hundreds_of_bad_inputs_were_tried():
    """The last test of this file: how many distinct inputs were bad and refused as they should be."""
    print(f"{len(TRIED)} distinct bad inputs refused")
    assert len(TRIED) >= 300, json.dumps(len(TRIED))
