"""Several processes make one run: the same weights as one process makes, one writer, and nothing lost when one dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from policyskip.data import Feed, imagefolder
from policyskip.data.folders import FileImages
from policyskip.envs.block_selection import BlockSelectionVectorEnv
from policyskip.errors import UserError
from policyskip.parallel import processes
from policyskip.runs.folder import Run, create
from tests.conftest import small_backbone, small_images, typed, without_waits
from tests.learners import LEARNERS, augmented, learn

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
DEBUG = ["train", "+experiment=debug", "device=cpu", "train.log_every=1", "run.dir=x"]
RANDOM = ["backbone=resnet20", "backbone.checkpoint=random", "front.budget=2e3"]
LONG = [*DEBUG, "train.steps=30", "train.validate_every=4", "data.validation=16"]


def start(*module: str, cwd: Path, processes: int = 2) -> subprocess.Popen[str]:
    """``python -m`` with these words in several processes."""
    own = {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cwd.parent / "cache"), "COLUMNS": "200"}
    own["MPLCONFIGDIR"] = matplotlib.get_cachedir()  # where fonts have been looked for already
    environment = {**os.environ, **own, "PYTHONPATH": str(Path(__file__).parents[2])}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*TORCHRUN, str(processes), "-m", *module], cwd=cwd, env=environment, **pipes)


def together(*module: str, cwd: Path, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Start the processes and wait for their end."""
    with start(*module, cwd=cwd, processes=processes) as process:
        try:
            printed, errors = process.communicate(timeout=120)
        finally:
            process.terminate()  # torchrun ends those that it started
    return subprocess.CompletedProcess(module, process.returncode, printed, errors)


def ours(errors: str) -> list[str]:
    """Return the lines that policyskip printed, of all those that torchrun printed."""
    return [line for line in errors.splitlines() if line.startswith("policyskip train: ")]


def close(a: Any, b: Any, tolerance: float = 1e-5) -> bool:
    """Whether two states are equal, their floats to a tolerance, relative where they are larger than 1."""
    if isinstance(a, torch.Tensor):
        return torch.allclose(a.double(), b.double(), tolerance, tolerance)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key], tolerance) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(close(x, y, tolerance) for x, y in zip(a, b))
    return a == b or (isinstance(a, float) and abs(a - b) <= tolerance * max(1.0, abs(a)))


def learned(run: Run) -> dict[str, Any]:
    """The weights and statistics in a run's checkpoint."""
    state = run.load_checkpoint()["learner"]
    return {key: value for key, value in state.items() if key in ("policy", "value_head", "network", "backbone")}


def records(run: Run) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in run.metrics()]


# The same weights and figures

NAMES = [name for name in LEARNERS if name != "branchynet"]  # Adam makes steps out of gradients that are but rounding


@pytest.fixture(scope="module")
def divided(tmp_path_factory) -> Path:
    """A run of every learner by two processes, each of which sees half of every batch."""
    folder = tmp_path_factory.mktemp("divided")
    result = together("tests.divided", str(folder), *NAMES, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_come_to_the_weights_and_figures_of_one(name, divided, tmp_path):
    one, two = create(str(tmp_path / "one"), "policyskip train", ""), Run(divided / name)
    assert learn(name, one)
    assert learned(two) and close(learned(one), learned(two))
    assert close(records(one), records(two), 1e-4)  # val/score is the sum of all weights


@pytest.mark.slow
def test_four_processes_do_too(tmp_path):
    names = ["blockdrop", "pretrain with blocks that hardly run"]
    assert together("tests.divided", str(tmp_path), *names, cwd=tmp_path, processes=4).returncode == 0
    for name in names:
        one = create(str(tmp_path / f"{name} by one"), "policyskip train", "")
        assert learn(name, one) and close(learned(one), learned(Run(tmp_path / name)))


# Slices of a batch


def in_three_processes(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return what ``make`` returns in each of three processes."""
    monkeypatch.setattr(processes, "world", lambda: 3)
    made = []
    for rank in range(3):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        made.append(make())
    monkeypatch.undo()
    return made


def files(folder: Path) -> FileImages:
    """Training images that are decoded as they are needed."""
    for number in range(20):
        pixels = np.random.default_rng(number).integers(0, 256, (9, 9, 3), dtype=np.uint8)
        for split in ("train", "test"):
            path = folder / split / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    images = imagefolder(torch.device("cpu"), str(folder), image_size=8, workers=0).train
    assert isinstance(images, FileImages)
    return images


@pytest.mark.parametrize("kind", ["in memory", "files"])
def test_the_slices_side_by_side_are_the_batch(kind, tmp_path, monkeypatch):
    images = augmented() if kind == "in memory" else files(tmp_path)

    def feed() -> Feed:
        made = Feed(images, 12, "shuffled", 5)
        made.advance()
        return made

    def divided_feed() -> Feed:
        made = feed()
        made.divide()
        made.advance()
        return made

    whole, divided = feed().advance(), [made.batch for made in in_three_processes(divided_feed, monkeypatch)]
    assert [len(batch) for batch in divided] == [4, 4, 4]
    for name in ("images", "label_B", "index_B"):
        assert torch.equal(torch.cat([getattr(batch, name) for batch in divided]), getattr(whole, name)), name
    assert len({int(i) for batch in divided for i in batch.index_B}) == 12  # no image twice


def test_an_environment_shows_its_slice(monkeypatch):
    def env() -> BlockSelectionVectorEnv:
        made = BlockSelectionVectorEnv(12, backbone=small_backbone(), images=small_images())
        made.divide()
        return made

    divided = in_three_processes(env, monkeypatch)
    whole = BlockSelectionVectorEnv(12, backbone=small_backbone(), images=small_images())
    assert torch.equal(torch.cat([made.observation for made in divided]), whole.observation)
    assert all(made.num_envs == 4 and made.action_space.shape[0] == 4 for made in divided)
    assert torch.equal(
        torch.cat(in_three_processes(lambda: processes.this_process_slice(torch.arange(6)), monkeypatch)),
        torch.arange(6),
    )


def test_a_batch_that_cannot_be_divided_is_refused(monkeypatch):
    with pytest.raises(UserError, match="must be a multiple of their number, 3; got 16"):
        in_three_processes(lambda: Feed(small_images(), 16).divide(), monkeypatch)


# From the command line


@pytest.fixture
def folder(tmp_path) -> Path:
    """An empty folder to work in; what is remembered goes beside it."""
    (tmp_path / "w").mkdir()
    return tmp_path / "w"


def same_run(one: Run, two: Run) -> bool:
    """Whether two finished runs came to the same weights and figures."""
    figures = [{k: v for k, v in run.load_json("summary.json").items() if k != "seconds"} for run in (one, two)]
    return close(learned(one), learned(two)) and close(records(one), records(two)) and close(*figures)


@pytest.mark.parametrize("command", [DEBUG], ids=["train"])
def test_a_command_comes_to_the_figures_of_one_process_and_one_process_writes(command, folder, tmp_path):
    """Ten updates: after more, a sampled decision that is within rounding of its probability may fall otherwise."""
    words = [*command, "train.steps=10", "train.validate_every=5", *RANDOM]
    if command[0] == "pretrain":
        words = [word for word in words if "experiment" not in word] + [
            "tracking=none",
            "data.train=256",
            "data.batch_size=32",
        ]
    assert typed(*words, cwd=tmp_path).returncode == 0
    result = together("policyskip", *words, cwd=folder)
    assert result.returncode == 0 and not without_waits(result.stderr), result.stderr
    assert same_run(Run(tmp_path / "x"), Run(folder / "x"))
    assert result.stdout.count("step 10/10") == 1 and [path.name for path in folder.iterdir()] == ["x"]
    records_of_updates = [record["step"] for record in Run(folder / "x").metrics() if "train/loss" in record]
    assert records_of_updates == list(range(1, 11))


@pytest.mark.slow
def test_another_number_of_processes_can_go_on(folder, tmp_path):
    """Four updates by two processes and four by one, or the other way round, are eight by one."""
    go_on = ["train", "run.resume=x", "train.steps=8"]
    for cwd in (tmp_path / "one", tmp_path / "two"):
        cwd.mkdir()
        assert typed(*DEBUG, "train.steps=4", cwd=cwd).returncode == 0
    assert together("policyskip", *DEBUG, "train.steps=4", cwd=folder).returncode == 0
    assert typed(*go_on, cwd=tmp_path / "one").returncode == 0
    assert typed(*go_on, cwd=folder).returncode == 0
    assert together("policyskip", *go_on, cwd=tmp_path / "two").returncode == 0
    for cwd in (folder, tmp_path / "two"):
        assert same_run(Run(tmp_path / "one/x"), Run(cwd / "x"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run by two processes that was not stopped."""
    folder = tmp_path_factory.mktemp("whole") / "w"
    folder.mkdir()
    assert together("policyskip", *LONG, cwd=folder).returncode == 0
    return folder


def worker(process: subprocess.Popen[str], rank: int) -> int:
    """The id of a process that torchrun started."""
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError("there is no such worker")


def stopped(cwd: Path, stop: Callable[[subprocess.Popen[str]], None]) -> subprocess.CompletedProcess[str]:
    """A run by two processes that is stopped once it has a checkpoint."""
    deadline = time.monotonic() + 90
    with start("policyskip", *LONG, cwd=cwd) as process:
        try:
            while not (cwd / "x/checkpoint.pt").exists():
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)
            stop(process)
            printed, errors = process.communicate(timeout=90)
        finally:
            process.terminate()
    assert not (cwd / "x/policy.json").exists(), "it had ended before it was stopped"
    return subprocess.CompletedProcess(LONG, process.returncode, printed, errors)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_run_and_the_folder_goes_on(rank, whole, folder):
    result = stopped(folder, lambda process: os.kill(worker(process, rank), signal.SIGKILL))
    assert result.returncode != 0
    (line,) = ours(result.stderr)
    assert "another process of this run has ended" in line and "the last good checkpoint is x/checkpoint.pt" in line
    assert Run(folder / "x").load_checkpoint()["step"] < 30
    assert together("policyskip", "train", "run.resume=x", cwd=folder).returncode == 0
    assert same_run(Run(folder / "x"), Run(whole / "x"))


@pytest.mark.slow
@pytest.mark.parametrize("signalled", ["one process", "torchrun"])
def test_sigterm_saves_first_and_all_stop_at_one_update(signalled, folder):
    def stop(process: subprocess.Popen[str]) -> None:
        os.kill(process.pid if signalled == "torchrun" else worker(process, 1), signal.SIGTERM)

    result = stopped(folder, stop)
    assert result.returncode != 0 and ours(result.stderr) == []
    assert result.stdout.count("Stopped and saved. Go on with:  policyskip train run.resume=x") == 1
    last = Run(folder / "x").metrics()[-1]["step"]
    assert Run(folder / "x").load_checkpoint()["step"] == last < 30  # every update is recorded, and saved


REFUSED = {
    "train +experiment=debug data.batch_size=33": "must be a multiple of their number, 2; got 33",
    "train +experiment=debug agent=ppo": "the agent PPO learns in one process; start it without torchrun",
    "train +experiment=debug agent=full train.steps=0": "learns in one process",
    "train +experiment=debug agent=branchynet backbone=branchy_alexnet": "a network with Dropout learns in one process",
    "train +experiment=debug agent=nobody": "there is no agent/nobody",
    "train +experiment=debug agent.alpha=7": "agent.alpha and agent.alpha_end must be",
    "train +experiment=debug --multirun seed=0,1": "--multirun makes several runs",
    "train run.resume=y": "the run folder y does not exist",
}


@pytest.mark.parametrize(
    "words", [words if n < 1 else pytest.param(words, marks=pytest.mark.slow) for n, words in enumerate(REFUSED)]
)
def test_what_is_refused_is_said_once_and_leaves_nothing(words, folder):
    result = together("policyskip", *words.split(), cwd=folder)
    (line,) = ours(result.stderr)
    assert REFUSED[words] in line and "exitcode  : 2" in result.stderr and result.returncode != 0
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_what_goes_wrong_in_one_process_ends_all_and_is_said_once(folder):
    (folder / "my_rewards.py").write_text(
        "import os\n\n\nclass Mine:\n    calls = 0\n\n    def __call__(self, outcome):\n        self.calls += 1\n"
        "        wrong = os.environ['RANK'] == '1' and self.calls == 9\n"
        "        return outcome.correct_B.float() / (0 if wrong else 1)\n"
    )
    words = [*DEBUG, "reward._target_=my_rewards.Mine", "train.steps=30"]
    result = together("policyskip", *words, cwd=folder)
    (line,) = ours(result.stderr)
    assert "the reward Mine returned" in line and "the last good checkpoint is x/checkpoint.pt" in line
    assert result.returncode != 0 and Run(folder / "x").load_checkpoint()["step"] < 30
