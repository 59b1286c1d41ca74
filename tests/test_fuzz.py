"""Files that strangers made and arguments that nobody thought of: refused in a line or two, or taken for what they are.

``make fuzz`` (half an hour) tries a thousand; the default tests try a few. Of each input it is checked that nothing hangs,
no stack trace is shown, no code is executed that came in a file, no program is started and no network asked, that no file
outside the run changes, and that a refusal leaves every file as it was. The inputs follow from fixed seeds.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_module
from hypothesis import HealthCheck, Phase, given, settings
from omegaconf import OmegaConf

import policyskip
from policyskip import rewards
from policyskip.data import TensorImages, from_arrays, from_dataset
from policyskip.errors import UserError
from tests.conftest import small_backbone, small_images, typed
from tests.hostile import BOMBS, DAMAGE, IMAGES, NUMBERS, OBSTACLES, SECRET, TEXTS, WEIGHTS, contents, values_in

DATA = ["data.train=64", "data.validation=40", "data.test=40", "data.batch_size=32", "device=cpu", "tracking=none"]
STEPS = ["train.steps=2", "train.validate_every=1", "train.log_every=1", "run.dir=x"]
FRONT = ["front.budget=4e3", "front.images=20"]
RANDOM = ["backbone=resnet20", "backbone.checkpoint=random"]
RUNS = {
    "blocks": ["train", *DATA, *STEPS, *FRONT, *RANDOM, "+backbone.width=4", "agent.width=4"],
    "exits": ["train", "agent=branchynet", "backbone=branchy_lenet", *DATA, *STEPS, "target.macs_fraction=0.95"],
    "gates": ["train", "agent=skipnet", *DATA, *STEPS, *FRONT, *RANDOM, "+backbone.width=4"],
    "leaving": ["train", "agent=ppo", "env=early_exit", *DATA, *STEPS],
}
FILES = ["config.yaml", "policy.json", "best.safetensors", "network.safetensors", "checkpoint.pt"]
FILES += ["summary.json", "front.json", "metrics.jsonl", "decisions.safetensors", "curve.json"]
FILES += ["best-so-far.safetensors", "start.safetensors", "reward.json", "profile.json"]
READERS = {
    "load": [],
    "evaluate": ["evaluate", "run=x", "device=cpu"],
    "calibrate": ["calibrate", "run=x", "device=cpu", "target.knee=true"],
    "resume": ["train", "run.resume=x", "train.steps=3"],
    "finish": ["train", "run.resume=x"],
    "compare": ["compare", "runs=x", "output=out", "tracking=none"],
    "profile": ["profile", "run=x", "device=cpu", "repeats=1", "images=8", "batch_sizes=[4]"],
}
TRIED: dict[str, set[object]] = {}
"""The distinct inputs that were tried, by what they were tried on."""
REFUSED: set[object] = set()
"""Those of them that were refused."""
LONGEST = 30
"""Seconds that any input may take, on a machine that does nothing else."""


class HangError(BaseException):
    """An input took too long. (No Exception, so that nothing on the way catches it.)"""


@contextmanager
def watched(patch: pytest.MonkeyPatch, outside: Path | None = None) -> Iterator[None]:
    """Fail if the body hangs, asks the network, starts a program, executes code of a file, or changes files outside."""
    before = contents(outside) if outside else {}

    def connect(socket: socket.socket, address: Any) -> None:
        if not isinstance(address, str) and address[0] != "127.0.0.1":  # a path is of a process on this machine, too
            pytest.fail(f"the network was asked: {address}")

    def start(process: Any, words: Any, *arguments: Any, **options: Any) -> None:
        name = Path(words.split()[0] if isinstance(words, str) else os.fsdecode(words[0])).name
        if name not in ("git", "lscpu", "uname", "sysctl", "nvidia-smi", "ldconfig", "wandb-core"):
            pytest.fail(f"a program was started: {words}")
        popen(process, words, *arguments, **options)

    longest = round(LONGEST * max(1, os.getloadavg()[0] / (os.cpu_count() or 1)))

    def hang(*_: Any) -> None:
        raise HangError(f"no end after {longest} s")

    popen = subprocess.Popen.__init__
    former = signal.signal(signal.SIGALRM, hang)
    with patch.context() as inner:
        inner.setattr(socket.socket, "connect", connect)
        inner.setattr(subprocess.Popen, "__init__", start)
        inner.setenv("POLICYSKIP_SECRET", SECRET)
        signal.alarm(longest)
        try:
            yield
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, former)
    assert outside is None or contents(outside) == before, "a file outside the run was changed"


def note(group: str, tried: object, refused: bool) -> None:
    TRIED.setdefault(group, set()).add(tried)
    if refused:
        REFUSED.add((group, tried))


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


def judge(words: list[str], here: Path, tried: object, group: str = "files") -> int:
    """Run a command that may be refused; if it is, it says so in a line or two, and every file is as it was."""
    before, outside = contents(here), here.parent / "outside"
    outside.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch, watched(patch, outside):
        result = typed(*words, cwd=here, drawn=True)
    said = [line for line in result.stderr.splitlines() if line.strip()]
    printed = result.stdout + result.stderr
    assert not (here / "marker").exists(), "code from a file was executed"
    assert result.returncode in (0, 2) and "Traceback" not in printed, printed
    assert "\x1b" not in printed and SECRET not in printed
    if result.returncode == 2:
        assert 1 <= len(said) <= 2 and said[0].startswith("policyskip"), said
        assert all(len(line) < 2000 for line in said)
        assert contents(here) == before
    else:
        changed = {name: content for name, content in contents(here).items() if before.get(name) != content}
        assert not any(SECRET.encode() in content for content in changed.values() if isinstance(content, bytes))
    note(group, tried, result.returncode == 2)
    return result.returncode


def refuse_or_work(call: Callable[[], Any], tried: object, group: str) -> bool:
    """Call a function of Python; what it does not take is refused by us, in a line or two. Return whether it was."""
    with pytest.MonkeyPatch.context() as patch, watched(patch):
        try:
            call()
        except (UserError, TypeError) as error:
            assert isinstance(error, UserError) or "unexpected keyword argument" in str(error), traceback.format_exc()
            assert len(str(error).splitlines()) == 1 and "\x1b" not in str(error), error
            note(group, tried, True)
            return True
    note(group, tried, False)
    return False


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
    if reader == "load":
        refuse_or_work(load_and_predict, tried, "files")
    else:
        judge(READERS[reader], here, tried)
    assert not (here / "marker").exists(), "code from a file was executed"


def load_and_predict() -> None:
    predictor = policyskip.load("x")
    if tuple(predictor.image_shape) == (3, 20, 20):
        predictor.predict(torch.zeros(2, 3, 20, 20, dtype=torch.uint8))


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
@some(130)
@given(what=damages)
def test_much_damage_to_runs(runs, name, what):
    try_damage(runs, name, *what)


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", RUNS)
def test_every_reader_takes_a_run_that_nobody_damaged(runs, name, reader):
    here = emptied(runs / "here")
    shutil.copytree(finished(runs, name), here / "x")
    if reader == "load":
        assert not refuse_or_work(load_and_predict, (name, reader), "undamaged")
    else:
        without_thresholds = reader == "calibrate" and name != "exits"
        assert judge(READERS[reader], here, (name, reader), "undamaged") == (2 if without_thresholds else 0)


# A pickle in every place where one could hide


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("file", FILES[:10])
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


# A. Folders of strangers


PLACES = [
    *(*FILES, *(f"{file}.tmp" for file in FILES[:6])),
    *("plots", "plots/learning_curves.png", "profile.png", "wandb", "wandb.json", "own", "own/x.py"),
    *(".commit", ".commit/policy.json", ".commit/best.safetensors", ".commit/plots", ".policyskip-0123456789abcdef"),
]
"""The files and folders that a run has, or could have."""


def obstacles() -> st.SearchStrategy[tuple[str, str, str, str]]:
    """Draw a run, a place in it, what lies there, and a reader; but nothing that our own ``.commit`` could hold."""
    drawn = st.tuples(*(st.sampled_from(list(choice)) for choice in (RUNS, PLACES, OBSTACLES, READERS)))
    ours = ("a file", "a folder", "a gigabyte", "a terabyte")
    return drawn.filter(lambda what: not (what[1].startswith(".commit") and what[2] in ours))


def try_obstacle(runs: Path, name: str, place: str, obstacle: str, reader: str) -> None:
    """Put something else in the place of a run's file or folder, and read the run."""
    here = emptied(runs / "here")
    (runs / "outside").mkdir(exist_ok=True)
    (runs / "outside" / "victim").write_text("victim")
    shutil.copytree(finished(runs, name), here / "x")
    path = here / "x" / place
    path.parent.mkdir(exist_ok=True)
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    OBSTACLES[obstacle](path)
    tried = (name, place, obstacle, reader)
    if reader == "load":
        refuse_or_work(load_and_predict, tried, "obstacles")
    else:
        judge(READERS[reader], here, tried, "obstacles")


@pytest.mark.slow
@some(120)
@given(what=obstacles())
def test_what_lies_in_a_files_place_does_no_harm(runs, what):
    """No link is followed out of the run; nothing waits for a pipe, and no file fills the memory."""
    try_obstacle(runs, *what)


@pytest.mark.slow
@some(80)
@given(
    what=st.tuples(
        st.sampled_from(list(RUNS)), st.sampled_from(TEXTS), st.sampled_from(list(READERS)), st.integers(0, 10**6)
    )
)
def test_texts_of_a_run_are_shown_as_letters(runs, what):
    """One text of one of the run's files is hostile; whatever is printed, drawn and written has it as letters."""
    name, text, reader, seed = what
    here = emptied(runs / "here")
    shutil.copytree(finished(runs, name), here / "x")
    chance = random.Random(seed)
    file = chance.choice([f for f in ("config.yaml", "summary.json", "policy.json") if (here / "x" / f).exists()])
    with_text = values_in((here / "x" / file).read_bytes(), chance, text)
    (here / "x" / file).write_bytes(with_text)
    tried = (name, file, with_text, reader)
    if reader == "load":
        refuse_or_work(load_and_predict, tried, "texts")
        return
    judge(READERS[reader], here, tried, "texts")
    for page in (here / "out").glob("*.html"):
        assert b"<script>alert" not in page.read_bytes()


STORED = {
    "backbone": [
        *({"depth": 6 * 10**6 + 2}, {"width": 10**7}, {"checkpoint": "../outside/victim"}, {"checkpoint": "/dev/zero"}),
        *({"_target_": "os.system"}, {"_target_": "booby.trap"}, {"checkpoint": "${oc.env:POLICYSKIP_SECRET}"}),
    ],
    "data": [
        *({"train": 10**9}, {"test": 10**9}, {"batch_size": 10**12}, {"image_size": 10**6}, {"batch_size": -1}),
        *(
            {
                "_target_": "policyskip.data.torchvision_data",
                "name": "cifar10",
                "root": "../outside/new",
                "download": True,
            },
        ),
        *({"_target_": "policyskip.data.imagefolder", "root": "../outside"}, {"_target_": "booby.trap"}),
        *({"_target_": "policyskip.data.imagefolder", "root": "/", "workers": 10**6}, {"_target_": "policyskip.load"}),
    ],
    "reward": [
        *({"_target_": "policyskip.rewards.Latency", "table": "pipe"}, {"penalty": float("nan")}, {"penalty": 1e308}),
        *({"_target_": "booby.trap"}, {"_target_": "policyskip.files.write"}),
    ],
    "agent": [{"_target_": "booby.trap"}, {"width": 10**9}, {"samples": 10**12}, {"policy": "booby.trap"}, {"lr": "x"}],
    "train": [{"steps": 10**15}, {"validate_every": 0}, {"log_every": -1}, {"steps": "${oc.env:POLICYSKIP_SECRET}"}],
    "": [
        *(
            {"device": "meta"},
            {"seed": -1},
            {"seed": 10**30},
            {"device": "${oc.env:POLICYSKIP_SECRET}"},
            {"front": None},
        ),
        *(
            {"secret": "${oc.env:POLICYSKIP_SECRET}"},
            {"tracking": {"mode": ["online"], "entity": 5}},
            {"run": {"dir": "/", "resume": "/"}},
        ),
    ],
}
"""What a stored configuration may hold in a group, in the place of what the run had."""


@st.composite
def stored_configs(draw: st.DrawFn) -> tuple[str, str, int, str]:
    group = draw(st.sampled_from(list(STORED)))
    number = draw(st.integers(0, len(STORED[group]) - 1))
    return draw(st.sampled_from(list(RUNS))), group, number, draw(st.sampled_from(list(READERS)))


@pytest.mark.slow
@some(110)
@given(what=stored_configs())
def test_a_stored_configuration_harms_nobody(runs, what):
    name, group, number, reader = what
    here = emptied(runs / "here")
    (runs / "outside").mkdir(exist_ok=True)
    (runs / "outside" / "victim").write_text("victim")
    shutil.copytree(finished(runs, name), here / "x")
    (here / "booby.py").write_text("open('marker', 'w')\ntrap = None\n")
    os.mkfifo(here / "pipe")
    changes = STORED[group][number]
    path = here / "x" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    node = config.setdefault(group, {}) or {} if group else config
    if group and "_target_" in changes:
        node = config[group] = {}
    elif group:
        config[group] = node
    node |= changes
    path.write_text("# policyskip train\n" + yaml.safe_dump(config))
    if reader == "load":
        refuse_or_work(load_and_predict, what, "configurations")
        assert not (here / "marker").exists()
    else:
        judge(READERS[reader], here, what, "configurations")


# Images and weights that somebody gives


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".eps", ".jfif", ".gif", ""])
@pytest.mark.parametrize("image", IMAGES)
def test_an_image_file_is_an_image_or_refused(runs, image, suffix):
    here = emptied(runs / "here")
    for split in ("train", "test"):
        for label in ("a", "b"):
            (here / "images" / split / label).mkdir(parents=True)
            for number in range(3):
                (here / "images" / split / label / f"{number}.png").write_bytes(IMAGES["a picture"]())
    (here / "images" / "train" / "a" / f"odd{suffix}").write_bytes(IMAGES[image]())
    words = ["train", "agent=full", "data=imagefolder", "data.root=images", "train.steps=0", *RANDOM, *FRONT]
    judge([*words, "data.batch_size=2", "device=cpu", "tracking=none", "run.dir=x"], here, (image, suffix), "images")


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_weights_are_a_network_or_refused(weights, suffix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(f"net{suffix}").write_bytes(WEIGHTS[weights]())
    for build in (
        lambda: policyskip.backbones.load(f"net{suffix}"),
        lambda: policyskip.backbones.load_exits(f"net{suffix}"),
        lambda: policyskip.backbones.cifar_resnet(num_classes=10, depth=20, checkpoint=f"net{suffix}"),
    ):
        refuse_or_work(build, (weights, suffix, build.__code__.co_firstlineno), "weights")
    assert not Path("marker").exists()


# C. Arguments


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
    judge([*COMMANDS[command], argument], here, (command, argument), "arguments")


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


WORDS = """
evaluate run=null
evaluate run=[x]
evaluate run=true
evaluate run=\udcff
evaluate run=x data.train=5
evaluate run=x seed=1
profile run=x data=digits
profile output=pipe
front output=pipe
front output=/
compare runs=*
compare runs=nothing
compare runs=[]
compare runs=x output=/
train run.resume=0
train run.resume=[a]
train run.resume=true
train run.dir=
train run.dir=.
train run.dir=..
train run.dir=/
train run.dir=a/..
train run.dir=x/y/../..
train run.dir=/dev/null
train run.dir=\udcff
train --config-name evaluate
train --config-dir .
train --config-path /
train --package x
train --info nonsense
train agent
train =1
--seed=1
train agent=../agent/full
train agent=full.yaml
train agent={}
train agent._target_=\udcff.A
train reward._target_=a.\udcff
train hydra.searchpath=[file://nowhere]
train hydra.verbose=nonsense
train hydra.output_subdir=here
train hydra.run.dir=elsewhere
train hydra.job.chdir=true
train hydra/launcher=nothing
train --resolve
train data.name=[/b]
train data=cifar10 data.name=[/b]
train data.workers=-1
train data.root=\udcff
train data=imagefolder data.root=x data.image_size=-5
train data=imagefolder data.root=x data.workers=-1
train data=imagefolder data.root=x data.workers=500
train tracking.project=a/b tracking.mode=offline
train tracking.mode=sideways
""".strip()
"""Commands that have to be refused, each a line."""
TRACKING = f"""
WANDB_MODE=sideways
WANDB_RUN_ID=a/b
WANDB_PROJECT=a/b
WANDB_BASE_URL=nonsense
WANDB_TAGS=,,
tracking.tags=['']
tracking.tags=[{"x" * 65}]
tracking.name={"x" * 129}
tracking.group={"x" * 129}
tracking.entity=a/b
tracking.notes=\u202e
WANDB_DIR=/dev/null
""".strip()
"""What is said to W&B by the environment or by a word: a run is refused at once, or ends whole without it."""


@pytest.mark.slow
@pytest.mark.parametrize("line", WORDS.splitlines(), ids=ascii)
def test_odd_words_are_refused(runs, line):
    here = emptied(runs / "here")
    os.mkfifo(here / "pipe")
    assert judge(line.split(" "), here, line, "words") == 2


@pytest.mark.slow
@pytest.mark.parametrize("said", TRACKING.splitlines(), ids=ascii)
def test_a_run_is_refused_or_whole_whatever_wandb_is_told(runs, said, monkeypatch):
    here, words = emptied(runs / "here"), [*RUNS["blocks"], "tracking=wandb", "tracking.mode=offline"]
    words.remove("tracking=none")
    if said.startswith("WANDB"):
        monkeypatch.setenv(*said.split("=", 1))
    else:
        words.append(said)
    if judge(words, here, said, "tracking") == 0:
        policyskip.load(here / "x")


# D. Python


def frozen(images: torch.Tensor) -> np.ndarray:
    array = images.numpy().copy()
    array.flags.writeable = False
    return array


def odd_objects() -> dict[str, Any]:
    """Whatever a program may hand over in the place of images, actions or numbers."""
    images = small_images(4).images
    objects: dict[str, Any] = {
        "None": None, "a text": "images", "a list": [1, 2], "a dict": {"images": images}, "a number": 3, "an object": object(),
        "an empty list": [], "ragged lists": [[1], [1, 2]], "bytes": b"abc", "a set": {1}, "a function": len, "True": True,
        "images": images, "floats": images.float(), "float64": images.double() / 255, "int64": images.long(),
        "bool": images > 9, "half": images.half(), "complex": images.float().to(torch.complex64), "int8": images.to(torch.int8),
        "meta": images.to("meta"), "sparse": images.float().to_sparse(), "sparse uint8": images.to_sparse(),
        "nested": torch.nested.nested_tensor([torch.ones(3, 12, 12), torch.ones(3, 12, 11)]), "one image": images[0],
        "five dimensions": images[None], "grey": images[:, :1], "channels last": images.permute(0, 2, 3, 1),
        "no images": images[:0], "other size": images[:, :, :5], "no pixels": images[:, :, :0], "a scalar": torch.tensor(1),
        "NaN": torch.full(images.shape, float("nan")), "numpy": images.numpy(), "mirrored": images.numpy()[:, :, :, ::-1],
        "backwards": images.numpy()[::-1], "objects": np.array([object()] * 4), "texts": np.array(["a"] * 4),
        "Fortran": np.asfortranarray(images.numpy()), "float16": images.numpy().astype("float16"), "read-only": frozen(images),
        "structured": np.zeros(4, dtype=[("a", "u1")]), "masked": np.ma.masked_all(images.shape, dtype="u1"),
        "labels": torch.tensor([0, 1, 2, 3]), "actions": torch.ones(4, 6, dtype=torch.int8), "ones": torch.ones(4, 6),
        "twos": torch.full((4, 6), 2), "minus": -torch.ones(4, 6, dtype=torch.int64), "zeros": np.zeros((4, 6), dtype="int8"),
        "short": torch.ones(3, 6, dtype=torch.int8), "wide": torch.ones(4, 7, dtype=torch.int8), "lists": [[1] * 6] * 4,
        "a parameter": torch.nn.Parameter(images.float()), "a module": torch.nn.Linear(2, 2), "a class": torch.nn.Linear,
        "quantized": torch.quantize_per_tensor(images.float(), 1.0, 0, torch.quint8), "a set of images": small_images(4),
    }  # fmt: skip
    numbers = {f"number {number!r:.20}": number for number in NUMBERS}
    return objects | numbers | {"2.5": 2.5, "'3'": "3", "many": 10**9}


with warnings.catch_warnings(action="ignore"):  # torch warns of nested and quantized tensors
    ODD_OBJECTS = odd_objects()


ENVS = ("BlockSelection", "LayerSkip", "EarlyExit")


def environment(name: str, **arguments: Any) -> Any:
    return gymnasium.make_vec(f"policyskip/{name}-v0", **{**given_to(name), **arguments})


def given_to(name: str) -> dict[str, Any]:
    network = {"network": small_exits()} if name == "EarlyExit" else {"backbone": small_backbone()}
    return {"num_envs": 4, "images": small_images(20), **network}


def small_exits() -> Any:
    return policyskip.backbones.ResNetExits(small_backbone(), [0, 2])


@pytest.mark.slow
@pytest.mark.parametrize("name", ENVS)
@pytest.mark.parametrize("odd", ODD_OBJECTS)
def test_an_odd_object_in_python(name, odd):
    given = ODD_OBJECTS[odd]
    network = "network" if name == "EarlyExit" else "backbone"
    for key in (
        "num_envs",
        "images",
        "reward",
        "order",
        "seed",
        "device",
        "execution",
        "precision",
        network,
        "unknown",
    ):
        if key == "images" and given is None:
            continue  # all digits, which take seconds to draw
        refuse_or_work(lambda key=key: environment(name, **{key: given}), (name, odd, key), "environments")
    env = environment(name)
    env.reset(seed=0)
    refuse_or_work(lambda: env.step(given), (name, odd, "step"), "steps")
    refuse_or_work(lambda: env.unwrapped.score(given), (name, odd, "score"), "steps")
    refuse_or_work(lambda: env.reset(seed=given), (name, odd, "reset"), "steps")
    refuse_or_work(lambda: env.seek(given), (name, odd, "seek"), "steps")


class Pairs:
    """A data set of images and labels 0 and 1; ``image`` or ``label`` stands in every item in the usual one's place."""

    def __init__(self, count: int, **instead: Any) -> None:
        self.images, self.instead = small_images(count), instead

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return {"image": self.images.images[index].numpy(), "label": index % 2, **self.instead}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", RUNS)
def test_torch_s_defaults_change_nothing(runs, name, dtype, device):
    """What a user's own program has set, before a run is loaded, an environment is made, or data are."""
    run, images = finished(runs, name), torch.randint(0, 256, (3, 3, 20, 20), dtype=torch.uint8)
    made = {env: given_to(env) for env in ENVS}

    def work() -> tuple[torch.Tensor, ...]:
        data = from_arrays(np.zeros((20, 3, 12, 12), np.uint8), [0, 1] * 10)
        envs = [gymnasium.make_vec(f"policyskip/{env}-v0", **made[env]) for env in ENVS]
        steps = [env.step(np.ones(env.action_space.shape, dtype=int))[:2] for env in envs]
        found = policyskip.load(run).predict(images)
        return found.logits_BC, found.macs_B, data.train.images, *(value for step in steps for value in step)

    expected, given = work(), (torch.get_default_dtype(), torch.get_default_device())
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        answers = work()
    finally:
        torch.set_default_dtype(given[0])
        torch.set_default_device(None)
    note("defaults", (name, dtype, device), False)
    assert all(torch.equal(answer, usual) and answer.dtype == usual.dtype for answer, usual in zip(answers, expected))


@pytest.mark.slow
@pytest.mark.parametrize("odd", ODD_OBJECTS)
def test_odd_images_and_rewards_in_python(runs, odd):
    given = ODD_OBJECTS[odd]
    for name in RUNS:
        predictor = policyskip.load(finished(runs, name))
        refuse_or_work(lambda p=predictor: p.predict(given), (name, odd), "predict")
        refuse_or_work(
            lambda p=predictor: p.predict(torch.zeros(2, 3, 20, 20, dtype=torch.uint8), given),
            (name, odd, 1),
            "predict",
        )
    refuse_or_work(lambda: TensorImages(given, torch.zeros(4, dtype=torch.int64)), ("images", odd), "images in memory")
    refuse_or_work(lambda: TensorImages(small_images(4).images, given), ("labels", odd), "images in memory")
    images, labels = small_images(8).images, torch.arange(8) % 2
    for place, arguments in {"images": (given, labels), "labels": (images, given)}.items():
        refuse_or_work(lambda a=arguments: from_arrays(*a), (place, odd), "from_arrays")
    for key in ("validation", "test", "classes", "channels", "augment", "device"):
        refuse_or_work(lambda key=key: from_arrays(images, labels, **{key: given}), (key, odd), "from_arrays")
        refuse_or_work(lambda key=key: from_dataset(Pairs(8), **{key: given}), (key, odd), "from_dataset")
    for key in ("image_key", "label_key", "image_size", "workers"):
        refuse_or_work(lambda key=key: from_dataset(Pairs(8), **{key: given}), (key, odd), "from_dataset")
    sets = {"set": given, "items": [given] * 8, "images": Pairs(8, image=given), "labels": Pairs(8, label=given)}
    for place, dataset in sets.items():
        refuse_or_work(lambda dataset=dataset: from_dataset(dataset), (place, odd), "from_dataset")
    for make in (rewards.Utilization, rewards.Linear, rewards.Macs, rewards.Budget):
        refuse_or_work(lambda make=make: make(given), (make.__name__, odd), "rewards")
    refuse_or_work(lambda: policyskip.load(given), ("load", odd), "load")
    refuse_or_work(lambda: policyskip.load(finished(runs, "blocks"), device=given), ("device", odd), "load")
    refuse_or_work(lambda: policyskip.load(finished(runs, "blocks"), execution=given), ("execution", odd), "load")


# Streams and folders of the world


TRAPS = [
    "hydra",
    "torch",
    "yaml",
    "logging",
    "sklearn",
    "matplotlib",
    "rich",
    "pydantic",
    "numpy",
    "wandb",
    "omegaconf",
    "json",
    "scipy",
]


@pytest.mark.slow
@pytest.mark.parametrize("start", [["policyskip"], [sys.executable, "-m", "policyskip"]], ids=["script", "module"])
@pytest.mark.parametrize("reader", ["evaluate", "calibrate", "profile", "compare", "finish"])
def test_no_module_of_the_current_folder_is_imported(runs, reader, start):
    here = emptied(runs / "here")
    shutil.copytree(finished(runs, "exits"), here / "x")
    for name in TRAPS:
        (here / "x" / f"{name}.py").write_text("open('marker', 'w').close()\n")
    script = shutil.which("policyskip")
    words = [word.replace("=x", "=.") for word in READERS[reader]]
    command = [*([script] if start == ["policyskip"] and script else start), *words]
    result = subprocess.run(command, cwd=here / "x", capture_output=True, text=True, timeout=20 * LONGEST)
    note("modules", (reader, *start), False)
    assert not (here / "x" / "marker").exists()
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("how", [">&-", "> /dev/full", "2>&-", "| true", "> /dev/null < /dev/null"])
@pytest.mark.parametrize(
    "odd",
    [
        "PYTHONIOENCODING=ascii",
        "MPLBACKEND=nonsense",
        "MPLBACKEND=module://matplotlib_inline.backend_inline",
        "LC_ALL=C",
    ],
)
def test_a_run_is_finished_whatever_the_streams_are(runs, how, odd):
    here = emptied(runs / "here")
    script = shutil.which("policyskip") or f"{sys.executable} -m policyskip"
    words = " ".join(f"'{word}'" for word in RUNS["blocks"])
    result = subprocess.run(
        f"{odd} {script} {words} {how}", shell=True, cwd=here, capture_output=True, text=True, timeout=300
    )
    note("streams", (how, odd), False)
    assert "Traceback" not in result.stderr
    assert (here / "x" / "policy.json").exists()


@pytest.mark.slow
def test_a_thousand_inputs_were_tried():
    """The last test of this file: how many distinct inputs were tried, and refused as they should be."""
    groups = Counter({group: len(tried) for group, tried in TRIED.items()})
    print(f"{groups.total()} distinct inputs tried, {len(REFUSED)} of them refused: {dict(groups)}")
    assert groups.total() >= 1000 and len(REFUSED) >= 600
