"""Every command and every Python snippet of the README and the docs runs, with small settings."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from policyskip.backbones.resnet import CifarResNet
from tests.conftest import typed

ROOT = Path(__file__).parent.parent
ALL_PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in ALL_PAGES if page.name != "extending.md"]
"""The pages whose commands and snippets run here; those of extending.md belong together, and test_extending.py runs them."""
SMALL = [
    "device=cpu",
    "tracking=none",
    "data.batch_size=16",
    "train.steps=2",
    "train.validate_every=1",
    "train.log_every=1",
]
EARLY = ["agent=msdnet", "agent=branchynet", "agent=cdl", "agent=distiller"]
RESTING = [f"agent={name}" for name in ("full", "first", "distributed", "random", "best_static", "oracle")]
FRONT = ["front.budget=4e3", "front.images=20"]
DIGITS = ["data.train=64", "data.validation=32", "data.test=32"]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands() -> list[str]:
    lines = [line for page in PAGES for block in blocks(page, "bash") for line in block.splitlines()]
    return sorted({re.sub(r"\s+#.*", "", part).strip() for line in lines for part in line.split("&&")} - {""})


def policyskip(*arguments: str, cwd: Path) -> None:
    done = typed(*arguments, cwd=cwd)
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """A folder that has what the docs assume: images, checkpoints, my_rewards.py, a run in runs/x."""
    folder = tmp_path_factory.mktemp("docs")
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for name in "ab":
            (folder / "FOLDER" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "FOLDER" / split / name / f"{i}.png")
    net = CifarResNet(20, 2, "A")
    renamed = {}
    for name, value in net.state_dict().items():
        match = re.fullmatch(r"blocks\.(\d+)\.residual\.(.+)", name)
        if match:
            name = f"layer{int(match[1]) // 3 + 1}.{int(match[1]) % 3}.{match[2]}"
        if name not in ("mean", "std"):
            name = name.replace("stem.conv", "conv1").replace("stem.bn", "bn1").replace("head.linear", "linear")
            renamed[f"module.{name}"] = value
    torch.save({"state_dict": renamed}, folder / "resnet20.th")
    from torchvision.models import resnet50

    torch.save(resnet50(weights=None, num_classes=2).state_dict(), folder / "weights.pth")
    (folder / "my_rewards.py").write_text(blocks(ROOT / "docs" / "rewards.md", "python")[0])
    arguments = [*SMALL, *DIGITS, "backbone=resnet20", "backbone.checkpoint=random"]
    policyskip("train", *arguments, *FRONT, "run.dir=runs/x", cwd=folder)
    policyskip("train", "agent=distiller", *SMALL, *DIGITS, "run.dir=runs/early", cwd=folder)
    return folder


@pytest.mark.parametrize("command", commands())
def test_every_command_runs(command, workshop):
    words = shlex.split(command)
    if words[0] in ("pip", "pytest", "make"):
        return  # what .ci/run does
    assert words[0] == "policyskip"
    verb, arguments = words[1], words[2:]
    small = []
    if verb in ("train", "pretrain", "front") and not any(word.startswith("run.resume") for word in arguments):
        small = [word for word in SMALL if verb != "front" or word.startswith(("device", "data"))]
        early = any(word in (*EARLY, "env=early_exit") for word in arguments) or any(
            "_cifar10" in word for word in arguments
        )
        digits = not any(word.startswith("data=") for word in arguments)
        small += DIGITS if digits else []
        if not early and not any(word.startswith("backbone") for word in arguments):
            small += ["backbone=resnet20", "backbone.checkpoint=random"]  # the shipped network is tested elsewhere
        if verb != "pretrain" and not early:
            small += FRONT
        if any(word in RESTING for word in arguments):
            small.remove("train.steps=2")  # they learn nothing
        if "agent=cdl" in arguments:
            small += ["agent.epsilon=-1e9"]  # two updates make no head that saves anything
        if any("torchvision" in word for word in arguments):
            small += ["data.image_size=32", "data.workers=0", "front.images=4", "front.budget=100"]
    if any("cifar10" in word for word in arguments):  # no download in a test
        arguments = [*(word for word in arguments if not word.startswith("data=")), "data=digits", *DIGITS]
    if verb == "profile":
        small = ["device=cpu", "repeats=1", "batch_sizes=[1,2]", *([] if "run=runs/x" in arguments else DIGITS)]
    if "reward=latency" in arguments:  # of the network that small runs have
        arguments = [word.replace("profile-resnet32.json", "table.json") for word in arguments]
        table = ["backbone=resnet20", "backbone.checkpoint=random", "output=table.json", *DIGITS]
        policyskip("profile", "device=cpu", "repeats=1", "batch_sizes=[2]", *table, cwd=workshop)
    if verb == "calibrate":  # in the docs, runs/x is whatever run one has
        arguments = ["device=cpu", *(word.replace("run=runs/x", "run=runs/early") for word in arguments)]
    policyskip(verb, *arguments, *small, cwd=workshop)


RUN_SNIPPETS = """
import json, os, sys, traceback
import gymnasium, sklearn.datasets, stable_baselines3, torch, torch._dynamo
for name, code in json.load(sys.stdin):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), 2)
        failed = 1
        try:
            exec(compile(code, name, "exec"), {"__name__": "__main__"})
            failed = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(failed)  # an ordinary end takes the large libraries apart, which takes more than a second
    _, status = os.waitpid(child, 0)
    with open(name, "a") as file:
        file.write(f"exit code {os.waitstatus_to_exitcode(status)}")
"""
PREAMBLE = """
import torch
from policyskip.data import digits
digits.__wrapped__.__defaults__ = (256, 256, 256)  # a decorator is around it
images = torch.zeros(3, 3, 20, 20, dtype=torch.uint8)
"""


@pytest.fixture(scope="module")
def snippet_outcomes(workshop) -> dict[Path, list[str]]:
    """For every page, what each of its snippets wrote to stderr, and the snippet's exit code.

    Each runs in a process of its own, forked from one that has imported the large libraries but nothing of this package.
    """
    names = {
        page: [f"{page.parent.name}-{page.stem}-{n}" for n, _ in enumerate(blocks(page, "python"))] for page in PAGES
    }
    snippets = [
        (name, PREAMBLE + code)
        for page in PAGES
        for name, code in zip(names[page], blocks(page, "python"), strict=True)
    ]
    subprocess.run(
        [sys.executable, "-c", RUN_SNIPPETS], cwd=workshop, input=json.dumps(snippets), text=True, check=True
    )
    return {page: [(workshop / name).read_text() for name in names[page]] for page in PAGES}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_every_snippet_runs(page, snippet_outcomes):
    for outcome in snippet_outcomes[page]:
        assert outcome.endswith("exit code 0"), outcome


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("agent", ["blockdrop", "skipnet"])
def test_the_table_of_keys_states_the_defaults_of_the_configuration(agent):
    config = yaml.safe_load((ROOT / "policyskip" / "configs" / "agent" / f"{agent}.yaml").read_text())
    config = config.get("agent", config)
    page = (ROOT / "docs" / "agents" / f"{agent}.md").read_text()
    rows = re.findall(r"^\| ([^|]*`agent\.[^|]*) \| ([^|]*) \| [^|]* \| ", page, re.MULTILINE)
    assert len(rows) >= 8
    for keys, values in rows:
        for key, value in zip(re.findall(r"`agent\.(\w+)`", keys), values.split(", "), strict=True):
            assert yaml.safe_load(value) == config[key] or float(value) == config[key], key
