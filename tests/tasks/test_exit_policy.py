"""PPO, A2C and DQN on the command line: train, evaluate, resume, load; what is deployed does what was judged."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import policyskip
from policyskip.data import digits
from policyskip.envs.block_selection import BlockSelectionVectorEnv
from policyskip.envs.early_exit import EarlyExitVectorEnv
from policyskip.envs.layer_skip import LayerSkipVectorEnv
from policyskip.errors import UserError
from tests.backbones.test_checkpoints import Bomb
from tests.conftest import typed

SMALL = ["data.train=200", "data.validation=60", "data.test=50", "data.batch_size=32", "device=cpu", "tracking=none"]
STEPS = ["train.steps=3", "train.validate_every=2", "train.log_every=1", "train.choose_after=0"]
FRONT = ["front.budget=4e3", "front.images=20"]
SETTINGS = {"dqn": ["agent.learning_starts=100"], "ppo": [], "a2c": []}
PAIRS = [
    *(("ppo", env) for env in ("block_selection", "layer_skip", "early_exit")),
    *(("a2c", env) for env in ("block_selection", "layer_skip", "early_exit")),
    *(("dqn", env) for env in ("layer_skip", "early_exit")),
]
PLAIN = ["agent", "env", "backbone", "data", "seed", "steps", "seconds"]
TEST = ["accuracy", "full_accuracy", "macs_mean", "macs_sd", "full_macs", "macs_fraction", "policy_macs"]
TEST += ["unique_decisions", "rival_accuracy", "rival_margin", "verdict"]


def arguments(agent: str, env: str) -> list[str]:
    return [f"agent={agent}", f"env={env}", *SMALL, *STEPS, *SETTINGS[agent], *(FRONT if env != "early_exit" else [])]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with a trained run of every pair in runs/<agent>-<env>."""
    folder = tmp_path_factory.mktemp("sb3")
    for agent, env in PAIRS:
        drawn = (agent, env) == ("ppo", "early_exit")
        result = typed("train", *arguments(agent, env), f"run.dir=runs/{agent}-{env}", cwd=folder, drawn=drawn)
        assert result.returncode == 0, result.stderr
        words = "own cost included" if env != "early_exit" else "heads and policy included"
        assert words in result.stdout and "this policy" in result.stdout.lower()
    return folder


@pytest.mark.parametrize(("agent", "env"), PAIRS)
def test_the_run_folder_is_whole(runs, agent, env):
    run = runs / "runs" / f"{agent}-{env}"
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "checkpoint.pt", "best.safetensors", "policy.json", "plots"}
    summary = json.loads((run / "summary.json").read_text())
    ids = {"block_selection": "BlockSelection-v0", "layer_skip": "LayerSkip-v0", "early_exit": "EarlyExit-v0"}
    assert set(PLAIN) <= set(summary) and {f"test/{key}" for key in TEST} <= set(summary)
    assert (summary["agent"], summary["env"]) == (agent, ids[env]) and summary["test/policy_macs"] > 0
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"train/reward", "train/accuracy", "train/macs_fraction", "train/lr"} <= set(records[0])
    assert any("val/reward" in record for record in records)
    torch.load(run / "checkpoint.pt", weights_only=True)


@pytest.mark.parametrize(("agent", "env"), PAIRS)
def test_evaluate_repeats_the_figures_exactly(runs, agent, env):
    result = typed("evaluate", f"run=runs/{agent}-{env}", "device=cpu", cwd=runs)
    assert result.returncode == 0, result.stderr
    assert "Every figure is that of summary.json." in result.stdout


@pytest.mark.parametrize(("agent", "env"), PAIRS)
def test_what_is_deployed_does_what_the_environment_does_image_by_image(runs, agent, env):
    run = runs / "runs" / f"{agent}-{env}"
    predictor = policyskip.load(run)
    test = digits(torch.device("cpu"), 1, 1, 50).test
    summary = json.loads((run / "summary.json").read_text())
    for batch_size in (7, 50):
        result = predictor.predict(test.images, batch_size)
        assert (result.label_B == test.label_N).double().mean().item() == pytest.approx(summary["test/accuracy"])
        assert result.macs_B.mean().item() == pytest.approx(summary["test/macs_mean"])
    assert predictor.predict(test.images[:0]).label_B.shape == (0,)
    if env == "early_exit":
        stepped = EarlyExitVectorEnv(50, network=predictor.network, images=test, order="sequential")
        left = torch.full((50,), -1)
        observation, _ = stepped.reset()
        while len(observation):
            index_B, exit_B = stepped.index_B, stepped.exit_B
            observation, _, over_B, *_ = stepped.step(predictor.policy.decide(observation))
            left[index_B[over_B]] = exit_B[over_B]
        assert torch.equal(result.exit_B, left)
        return
    kind = BlockSelectionVectorEnv if env == "block_selection" else LayerSkipVectorEnv
    stepped = kind(50, backbone=predictor.backbone, images=test, order="sequential")
    over = False
    while not over:
        observation, _, over_B, *_ = stepped.step(predictor.policy.decide(stepped.observation))
        over = bool(over_B.all())
    assert torch.equal(result.keep_BK, stepped.outcome.keep_BK)
    assert torch.equal(result.label_B, stepped.outcome.logits_BC.argmax(1))


def test_what_is_deployed_needs_no_sb3(runs):
    code = (
        "import sys, torch, policyskip\n"
        "for name in ('ppo-block_selection', 'a2c-layer_skip', 'dqn-early_exit'):\n"
        "    policyskip.load(f'runs/{name}').predict(torch.zeros(2, 3, 20, 20, dtype=torch.uint8))\n"
        "print('stable_baselines3' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=runs, capture_output=True, text=True, check=False)
    assert done.stdout == "False\n", done.stderr


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(runs, tmp_path):
    """Episodes of one step end with every rollout, so that not a number differs."""
    shutil.copytree(runs / "runs" / "ppo-block_selection", tmp_path / "x")
    steady = [*arguments("ppo", "block_selection"), "agent.schedule=constant"]
    for steps, folder in ((2, "stopped"), (3, "whole")):
        result = typed("train", *steady, f"train.steps={steps}", f"run.dir={folder}", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    result = typed("train", "run.resume=stopped", "train.steps=3", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    stopped, whole = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("stopped", "whole"))
    policies = [state["learner"]["policy"] for state in (stopped, whole)]
    assert all(torch.equal(policies[0][key], policies[1][key]) for key in policies[1])


def test_dqn_goes_on_with_an_empty_buffer(runs, tmp_path):
    shutil.copytree(runs / "runs" / "dqn-early_exit", tmp_path / "x")
    result = typed("train", "run.resume=x", "train.steps=4", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert torch.load(tmp_path / "x/checkpoint.pt", weights_only=True)["learner"]["step"] == 4


@pytest.mark.parametrize("name", ["checkpoint.pt", "best.safetensors"])
@pytest.mark.parametrize("run", ["ppo-block_selection", "dqn-early_exit"])
def test_nothing_in_a_run_folder_is_executed(runs, tmp_path, run, name):
    shutil.copytree(runs / "runs" / run, tmp_path / "x")
    marker = tmp_path / "marker"
    (tmp_path / "x" / name).write_bytes(pickle.dumps({"step": Bomb(marker)}))
    (tmp_path / "x" / "model.zip").write_bytes(pickle.dumps(Bomb(marker)))
    command = ("train", "run.resume=x", "train.steps=4") if name == "checkpoint.pt" else ("evaluate", "run=x")
    result = typed(*command, cwd=tmp_path)
    assert result.returncode == 2 and f"{name} is damaged or not ours" in result.stderr
    if name == "best.safetensors":
        with pytest.raises(UserError, match="damaged or not ours"):
            policyskip.load(tmp_path / "x")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["agent=dqn"], "agent=dqn cannot act in BlockSelection-v0; it can with env=layer_skip or env=early_exit"),
        (
            ["agent=blockdrop", "env=layer_skip"],
            "agent=blockdrop cannot act in LayerSkip-v0; it can with env=block_sel",
        ),
        (
            ["agent=blockdrop", "env=early_exit"],
            "agent=blockdrop cannot act in EarlyExit-v0; it can with env=block_sel",
        ),
        (["agent=msdnet", "env=layer_skip"], "agent=msdnet cannot act in LayerSkip-v0; it can with env=early_exit"),
        (
            ["agent=ppo", "env=early_exit", "backbone=resnet32_digits"],
            "has no early exits; say backbone=resnet32_digits_e",
        ),
        (["agent=ppo", "env=early_exit", "target.knee=true"], "target is for thresholds; a learned policy has none"),
        (["agent=ppo", "env=layer_skip", "backbone=resnet32_digits_exits"], "has exits, not blocks to skip"),
        (["agent=ppo", "+agent.colour=3"], "agent has no key colour; PPO takes"),
        (["agent=ppo", "agent.batch_size=-1"], "agent: policyskip.agents.sb3.PPO failed with"),
        (["agent=ppo", "agent.gamma={a: 1}"], "agent.gamma must be a number, got {'a': 1}"),
        (["agent=ppo", "agent.ent_coef=much"], "agent.ent_coef must be a number, got 'much'"),
        (["agent=ppo", "agent.n_epochs=1.5"], "agent.n_epochs must be a whole number, got 1.5"),
        (["agent=ppo", "agent.normalize_advantage=1"], "agent.normalize_advantage must be true or false, got 1"),
        (["agent=ppo", "agent.clip_range=null"], "agent.clip_range must be a number, got None"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(tmp_path, words, said):
    result = typed("train", *words, *SMALL, *STEPS, "run.dir=x", cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert said in result.stderr and not (tmp_path / "x").exists()


def test_a_learned_policy_has_no_thresholds_to_calibrate(runs):
    result = typed("calibrate", "run=runs/ppo-early_exit", "device=cpu", cwd=runs)
    assert result.returncode == 2 and "by a learned policy; it has no thresholds" in result.stderr


def test_any_trained_network_with_exits_will_do(tmp_path):
    chosen = ["backbone=msdnet_digits", "backbone.checkpoint=msdnet_digits", "env.cached=false"]
    result = typed("train", *arguments("ppo", "early_exit"), *chosen, "train.steps=1", "run.dir=x", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "whose 5 exits are right on" in result.stdout
