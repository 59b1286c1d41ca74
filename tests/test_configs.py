"""Every configuration composes, every group option is sound, and the heavy libraries stay out of the core."""

from __future__ import annotations

import csv
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from policyskip.cli import with_own_classes
from policyskip.config import FrontSettings, PretrainSettings, Settings, plain, settings_of

CONFIGS = Path(__file__).parent.parent / "policyskip" / "configs"
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
OPTIONS = [
    (path.parent.name, path.stem)
    for path in sorted(CONFIGS.glob("*/*.yaml"))
    if path.parent.name not in ("experiment", "hydra")
]
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
NEEDED = {
    "imagefolder": ["data.root=somewhere"],
    "imagenet": ["data.root=somewhere"],
    "cifar_resnet": ["backbone.depth=26"],
    "torchvision_resnet": ["backbone.depth=34"],
    "latency": ["reward.table=somewhere.json"],
}
OWN_CLASSES = {
    "agent": "policyskip.agents.blockdrop.BlockDrop",
    "backbone": "policyskip.backbones.cifar_resnet",
    "data": "policyskip.data.digits",
    "env": "policyskip.envs.block_selection.BlockSelectionVectorEnv",
    "reward": "policyskip.rewards.Macs",
}
OWN = ["run.dir=runs/x"]  # the default asks Hydra's runtime, which compose does not have


def composed(command: str, *overrides: str) -> dict:
    with initialize_config_module("policyskip.configs", version_base="1.3"):
        return plain(compose(command, [*OWN, *overrides]))


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=lambda value: value)
def test_every_option_composes_and_its_keys_are_arguments_of_its_target(group, option):
    needed = [f"{group}._target_={OWN_CLASSES[group]}"] if option == "custom" else NEEDED.get(option, [])
    node = composed("train", f"{group}={option}", *needed)[group]
    if "_target_" not in node:
        return
    module, _, name = node.pop("_target_").rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    assert takes_any or set(node) - {"batch_size", "warm_start"} <= set(parameters)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes(experiment):
    assert composed("train", f"+experiment={experiment}")["agent"]["_target_"]


def test_every_published_row_has_its_experiment():
    """Of ``make results`` and of README's table: what the row's name says, all else as by default."""
    rows = {row["name"]: [] for row in csv.DictReader((RESULTS / "agents.csv").read_text().splitlines())}
    penalties = {row["penalty"] for row in csv.DictReader((RESULTS / "digits.csv").read_text().splitlines())} - {"12"}
    rows |= {f"blockdrop_{penalty}": [f"reward.penalty={penalty}"] for penalty in penalties}
    assert {f"digits_{name}" for name in rows} == {name for name in EXPERIMENTS if name.startswith("digits_")}
    for name, said in rows.items():
        agent, *_ = re.split("_(?=layer|early|[0-9])", name)
        said += [f"env={env}" for env in ("layer_skip", "early_exit") if name.endswith(env)]
        assert composed("train", f"+experiment=digits_{name}") == composed("train", f"agent={agent}", *said)


@pytest.mark.parametrize(("command", "section"), [("train", Settings), ("pretrain", PretrainSettings)])
def test_settings_are_typed(command, section):
    with initialize_config_module("policyskip.configs", version_base="1.3"):
        settings = settings_of(compose(command, OWN), section)
    assert settings.train.steps > 0 and settings.seed == 0


def test_the_front_s_settings_are_typed():
    with initialize_config_module("policyskip.configs", version_base="1.3"):
        front = settings_of(compose("front"), FrontSettings).front
        assert (front.images, front.budget) == (2000, None)


def test_the_default_is_blockdrop_on_digits():
    config = composed("train")
    assert config["agent"]["_target_"] == "policyskip.agents.blockdrop.BlockDrop"
    assert config["agent"]["alpha"] == 0.8 and config["backbone"]["checkpoint"] == "resnet32_digits"


@pytest.mark.parametrize("depth", [38, 74, 110])
def test_the_published_skipnet_takes_every_depth(depth):
    config = composed("train", "+experiment=skipnet_cifar10", f"backbone=resnet{depth}")
    assert config["backbone"]["depth"] == depth and config["backbone"]["shortcut"] == "B"
    assert config["agent"]["supervised"] * config["train"]["steps"] == pytest.approx(64_000, abs=20)
    assert not {"env", "reward"} & set(config)


def test_importing_the_core_needs_neither_hydra_nor_wandb():
    code = (
        "import sys, policyskip, policyskip.rewards, policyskip.backbones, policyskip.envs.block_selection, "
        "policyskip.envs.layer_skip, policyskip.envs.early_exit, "
        "policyskip.agents.blockdrop, policyskip.agents.skipnet, policyskip.static_front, policyskip.policies.perceptrons, "
        "policyskip.deployment.loading\n"
        "print([name for name in ('hydra', 'omegaconf', 'wandb', 'stable_baselines3', 'matplotlib') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "words"), [(["--help"], "policyskip train agent=blockdrop"), (["train", "--cfg", "job"], "seed: 0")]
)
def test_what_only_shows_text_needs_no_torch(arguments, words):
    code = (
        f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); sys.argv = ['policyskip', *{arguments}]"
        "; from policyskip.cli import main; main()"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert words in output and output.endswith("False\n")


@pytest.mark.parametrize("group", OWN_CLASSES)
def test_a_class_of_one_s_own_takes_the_place_of_the_default_and_any_keys(group):
    own = [f"{group}._target_=mine.Mine", f"{group}.beta=2"]
    assert composed("train", *with_own_classes(own))[group] == {"_target_": "mine.Mine", "beta": 2}
    assert with_own_classes(["--multirun", "seed=0,1", *own])[:2] == ["--multirun", f"{group}=custom"]
    for untouched in (["seed=1", f"{group}=x", f"{group}.beta=2"], [f"++{group}._target_=mine.Mine"]):
        assert with_own_classes(untouched) == untouched


def test_a_class_of_one_s_own_keeps_the_keys_of_the_group_that_is_chosen():
    agent = composed("train", *with_own_classes(["agent=skipnet", "agent._target_=mine.Skip", "agent.beta=2"]))["agent"]
    assert agent["_target_"] == "mine.Skip" and agent["beta"] == 2 and agent["gate"] == "rnn"
    own = composed("train", *with_own_classes(["agent._target_=mine.A", "agent.width=4", "data._target_=mine.D"]))
    assert own["agent"] == {"_target_": "mine.A", "width": 4} and own["data"] == {"_target_": "mine.D"}
    assert own["front"] == composed("train")["front"]
