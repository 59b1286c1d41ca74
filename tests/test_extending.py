"""What docs/extending.md shows: parts of the user's own, from a file and installed, from training to prediction."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import policyskip
from policyskip.errors import UserError
from tests.conftest import typed
from tests.installing import install

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()
SMALL = [
    *("device=cpu", "tracking=none", "data.batch_size=32", "data.train=96", "data.validation=64", "data.test=64"),
    *("train.validate_every=2", "train.log_every=1"),
]
FRONT = ["front.images=32", "front.budget=2e3"]


@dataclass(frozen=True)
class Part:
    """One part of the page: the file that the user writes, and the commands that are typed."""

    file: str
    code: str
    commands: list[str]

    @property
    def run(self) -> str:
        """Its run folder, so that each has its own."""
        return f"runs/{self.file.removeprefix('my_').removesuffix('.py')}"


def sections() -> dict[str, str]:
    return dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def parts() -> dict[str, Part]:
    found = {}
    for text in sections().values():
        for file, code, commands in re.findall(
            r"`(my_\w+\.py)`:\n\n```python\n(.*?)```\n\n```bash\n(.*?)```", text, re.DOTALL
        ):
            found[file] = Part(file, code, commands.strip().splitlines())
    return found


PARTS = parts()
FILES = [pytest.param(part, id=part.file) for part in PARTS.values()]
STORED = {"my_fixed.py", "my_policies.py", "my_networks.py", "my_rules.py"}
"""The files of which a run deploys something."""


def policyskip_(*arguments: str, cwd: Path) -> str:
    done = typed(*arguments, cwd=cwd)
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def refused(*arguments: str, cwd: Path) -> str:
    done = typed(*arguments, cwd=cwd)
    assert done.returncode == 2 and "Traceback" not in done.stderr, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stderr


def train(part: Part, folder: Path) -> None:
    """Type the commands of a part, with little data and few updates."""
    for command in part.commands:
        words = [word.replace("runs/mine", part.run) for word in command.split()[1:]]
        small = [*SMALL, *([] if any(word.startswith("train.steps") for word in words) else ["train.steps=3"])]
        if words[0] == "train" and "agent=msdnet" not in words:
            small += FRONT
        if "agent=msdnet" in words:
            small += ["backbone=branchy_lenet", "data=digits"]
        elif not any(word.startswith("backbone") for word in words):
            small += ["backbone=resnet20", "backbone.checkpoint=random", "backbone.width=4"]
        policyskip_(*words, *small, cwd=folder)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Iterator[Path]:
    """A folder with the page's files, and a run of each."""
    folder = tmp_path_factory.mktemp("extending") / "here"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        for part in PARTS.values():
            (folder / part.file).write_text(part.code)
            train(part, folder)
        yield folder
    forget()


def forget() -> None:
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


def size(run: Path) -> int:
    return json.loads((run / "policy.json").read_text())["image_shape"][1]


def predict(run: Path, trust: bool) -> None:
    predictor = policyskip.load(run, trust=trust)
    answer = predictor.predict(torch.zeros(2, 3, size(run), size(run), dtype=torch.uint8))
    assert answer.label_B.shape == (2,)


def test_the_page_shows_every_part_in_thirty_lines():
    assert [part.file for part in PARTS.values()] == [
        *("my_rewards.py", "my_agents.py", "my_fixed.py", "my_skipnet.py"),
        *("my_policies.py", "my_networks.py", "my_data.py", "my_rules.py"),
    ]
    for part in PARTS.values():
        lines = [line for line in [*part.code.splitlines(), *part.commands] if line.strip()]
        assert len(lines) <= 30, part.file


def test_the_links_within_the_page_lead_somewhere():
    headings = {heading.lower().replace(" ", "-") for heading in sections()}
    assert set(re.findall(r"\]\(#(.*?)\)", PAGE)) <= headings


@pytest.mark.parametrize("part", FILES)
def test_a_part_is_evaluated_and_loaded_if_it_is_trusted(part, workshop):
    evaluate = ("evaluate", f"run={part.run}", "device=cpu")
    assert "Every figure is that of summary.json." in policyskip_(*evaluate, "trust=true", cwd=workshop)
    said = refused(*evaluate, cwd=workshop)
    own = r"the run's \w+ my_\w+\.\w+ is not one of policyskip's own; say trust=true"
    assert re.search(
        own if part.file != "my_rules.py" else "this exit rule is my_rules.margin, which is not inst", said
    )
    predict(workshop / part.run, trust=True)
    if part.file in STORED:
        with pytest.raises(
            UserError, match=r"^this [\w ]+ is my_\w+\.\w+, which is not installed here .* say trust=True"
        ):
            predict(workshop / part.run, trust=False)
    else:
        predict(workshop / part.run, trust=False)


@pytest.mark.parametrize("part", FILES)
def test_a_part_goes_on_if_it_is_trusted(part, workshop, tmp_path):
    run = shutil.copytree(workshop / part.run, workshop / "resumed" / part.file)
    resume = ("train", f"run.resume={run}", *(["train.steps=4"] if part.file != "my_fixed.py" else []))
    assert part.file == "my_fixed.py" or "is not one of policyskip's own" in refused(*resume, cwd=workshop)
    policyskip_(*resume, "run.trust=true", cwd=workshop)
    predict(run, trust=True)


def test_parts_are_compared(workshop):
    policyskip_("compare", "runs=runs", "trust=true", "device=cpu", "tracking=none", "output=comparison", cwd=workshop)
    with (workshop / "comparison" / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {"climber", "brightness", "impatient", "blockdrop", "skipnet", "msdnet"} <= {row["agent"] for row in rows}
    assert {"Flat"} <= {row["backbone"] for row in rows} and {"bars"} <= {row["data"] for row in rows}


@pytest.fixture
def elsewhere(workshop, tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder with the workshop's runs but not its files, which are installed instead."""
    [declared] = fenced(sections()["Installed parts"], "toml")
    points = tomllib.loads(declared)["project"]["entry-points"]
    modules = {part.file.removesuffix(".py"): part.code for part in PARTS.values()}
    site = install(tmp_path / "site", "my_package", points, **modules)
    folder = tmp_path / "elsewhere"
    shutil.copytree(workshop / "runs", folder / "runs")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [str(site), *(entry for entry in sys.path if entry != str(workshop))])
    forget()
    yield folder
    forget()


def test_installed_parts_are_named_by_their_paths_without_trust(elsewhere):
    for part in PARTS.values():
        policyskip_("evaluate", f"run={part.run}", "device=cpu", cwd=elsewhere)
        predict(elsewhere / part.run, trust=False)


INSTALLED = {
    "blocks": ["reward._target_=mine", "data._target_=bars", "backbone._target_=flat", "agent.policy=glance"],
    "fixed": ["agent._target_=brightness", "train.steps=0"],
    "gates": ["agent=skipnet", "agent._target_=impatient", "backbone._target_=flat"],
    "thresholds": ["agent=branchynet", "backbone=branchy_lenet", "agent.rule=margin"],
}


@pytest.mark.parametrize("words", INSTALLED.values(), ids=INSTALLED.keys())
def test_installed_parts_are_typed_by_their_names(words, elsewhere):
    steps = [] if "train.steps=0" in words else ["train.steps=2"]
    front = [] if "agent=branchynet" in words else FRONT
    policyskip_("train", *SMALL, *front, *steps, *words, "run.dir=x", cwd=elsewhere)
    policyskip_("evaluate", "run=x", "device=cpu", cwd=elsewhere)
    if steps:
        policyskip_("train", "run.resume=x", "train.steps=3", cwd=elsewhere)
    predict(elsewhere / "x", trust=False)


def test_a_run_says_what_it_needs_where_nothing_is_installed(workshop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    forget()
    run = shutil.copytree(workshop / "runs" / "policies", tmp_path / "x")
    with pytest.raises(UserError, match=r"^this policy is my_policies\.Glance, which is not installed here"):
        policyskip.load(run)
    assert "my_policies" not in sys.modules
