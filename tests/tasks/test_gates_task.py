"""SkipNet on the command line: train, evaluate, load, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import policyskip
from policyskip.backbones import count_costs, dense
from policyskip.backbones import load as load_backbone
from policyskip.data import digits
from policyskip.errors import UserError
from tests.conftest import typed

SMALL = ["data.train=300", "data.validation=120", "data.test=90", "data.batch_size=32", "device=cpu", "tracking=none"]
STEPS = ["train.steps=30", "train.validate_every=10", "train.log_every=5", "front.budget=1e4", "front.images=20"]
RANDOM = ["backbone=resnet20", "backbone.checkpoint=random"]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """A folder with a SkipNet in runs/x."""
    folder = tmp_path_factory.mktemp("gates")
    words = ["agent=skipnet", *SMALL, *STEPS, *RANDOM, "agent.lr=0.03", "run.dir=runs/x"]
    result = typed("train", *words, cwd=folder, drawn=True)
    assert result.returncode == 0, result.stderr
    for words in ("gates that cost 0.009 M more", "policy, its own cost included", "Before training"):
        assert words in result.stdout
    return folder


def test_the_run_folder_is_whole(workshop):
    run = workshop / "runs" / "x"
    names = {path.name for path in run.iterdir()}
    assert names >= {"best.safetensors", "network.safetensors", "policy.json", "front.json", "summary.json"}
    pictures = {path.stem for path in (run / "plots").iterdir()}
    assert pictures >= {"learning_curves", "accuracy_against_macs", "block_use", "gallery", "kept_by_difficulty"}
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["agent"], summary["env"], summary["backbone"]) == ("skipnet", "LayerSkip-v0", "resnet20")
    names = ("accuracy", "full_accuracy", "kept_mean", "kept_sd", "blocks", "macs_mean", "full_macs", "macs_fraction")
    more = ("policy_macs", "unique_decisions", "rival_accuracy", "rival_margin", "verdict", "before_accuracy")
    assert {f"test/{name}" for name in (*names, *more)} <= set(summary)
    backbone = load_backbone(str(run / "network.safetensors"))
    assert summary["test/full_macs"] == count_costs(backbone, (3, 20, 20)).full


def test_the_static_front_knows_the_sets_that_the_gates_use(workshop):
    """Of its size, the set in use most often on validation images is in the front, or one that is at least as good."""
    run = workshop / "runs" / "x"
    predictor = policyskip.load(run)
    validation = digits(torch.device("cpu"), 1, 120, 1).validation
    sets, counts = predictor.predict(validation.images).keep_BK.unique(dim=0, return_counts=True)
    used = sets[counts.argmax()].unsqueeze(0)
    index = torch.linspace(0, 119, 20).round().long()  # the images that the search was given
    with torch.no_grad():
        logits = dense(predictor.network.backbone, validation.images[index], used.expand(20, -1))
    accuracy = (logits.argmax(1) == validation.label_N[index]).double().mean().item()
    front = json.loads((run / "front.json").read_text())
    by_size = [a for keep, a in zip(front["sets"], front["accuracy"]) if keep.count("1") == int(used.sum())]
    assert max(by_size) >= accuracy


def test_evaluate_repeats_the_figures_exactly(workshop):
    result = typed("evaluate", "run=runs/x", "device=cpu", cwd=workshop)
    assert result.returncode == 0, result.stderr
    assert "Every figure is that of summary.json." in result.stdout
    assert typed("evaluate", "run=runs/x", "split=validation", "device=cpu", cwd=workshop).returncode == 0


def test_the_loaded_run_does_what_was_judged(workshop):
    predictor = policyskip.load(workshop / "runs" / "x")
    test = digits(torch.device("cpu"), 1, 1, 90).test
    summary = json.loads((workshop / "runs/x/summary.json").read_text())
    backbone = load_backbone(str(workshop / "runs/x/network.safetensors"))
    for batch_size in (1, 7, 90):
        result = predictor.predict(test.images, batch_size)
        assert result.macs_B.mean().item() == pytest.approx(summary["test/macs_mean"])
        assert (result.label_B == test.label_N).double().mean().item() == pytest.approx(summary["test/accuracy"])
        assert result.keep_BK.sum(1).double().mean().item() == pytest.approx(summary["test/kept_mean"])
        with torch.no_grad():
            torch.testing.assert_close(
                result.logits_BC, dense(backbone, test.images, result.keep_BK), rtol=1e-3, atol=1e-4
            )
    costs = count_costs(backbone, (3, 20, 20))
    assert torch.equal(result.macs_B, costs.of(result.keep_BK) + summary["test/policy_macs"])
    assert summary["test/policy_macs"] > 0
    assert predictor.predict(test.images[:0]).keep_BK.shape == (0, 9)
    with pytest.raises(UserError, match="images must be uint8"):
        predictor.predict(test.images.float())


def test_the_trained_network_is_a_backbone_for_others(workshop):
    arguments = ["agent=blockdrop", *SMALL, "backbone=resnet20", "backbone.checkpoint=runs/x/network.safetensors"]
    arguments += ["train.steps=1", "agent.width=4", "front.budget=1e4", "front.images=20"]
    result = typed("train", *arguments, "run.dir=runs/b", cwd=workshop)
    assert result.returncode == 0, result.stderr


def damaged(workshop: Path, name: str) -> Path:
    shutil.copytree(workshop / "runs" / "x", workshop / name, dirs_exist_ok=True)
    return workshop / name


def test_loading_executes_nothing_and_trusts_nothing(workshop):
    """A configuration that names code, pickles in place of tensors, gates of another network: nothing runs."""
    run = damaged(workshop, "evil")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["agent"] = {"_target_": "os.mkdir", "path": "marker"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    policyskip.load(run)  # does not even read it
    refused = typed("evaluate", "run=evil", "device=cpu", cwd=workshop)
    assert refused.returncode == 2 and not (workshop / "marker").exists()

    class Evil:
        def __reduce__(self):
            return Path(workshop / "marker").mkdir, ()

    for name in ("best.safetensors", "network.safetensors"):
        run = damaged(workshop, f"pickled-{name}")
        torch.save({"a": Evil()}, run / name)
        with pytest.raises(UserError, match=name):
            policyskip.load(run)
    assert not (workshop / "marker").exists()


def test_other_weights_are_refused(workshop):
    run = damaged(workshop, "swapped")
    tensors = load_file(run / "best.safetensors")
    save_file(
        {n: t + 1 if n == "gates.answer.bias" else t.contiguous() for n, t in tensors.items()},
        run / "best.safetensors",
    )
    with pytest.raises(UserError, match="another network"):
        policyskip.load(run)
    policy = json.loads((run / "policy.json").read_text())
    policy["gates"]["kind"] = "ff2"
    (run / "policy.json").write_text(json.dumps(policy))
    with pytest.raises(UserError, match=r"does not fit policy\.json"):
        policyskip.load(run)
    (run / "policy.json").write_text(json.dumps({"gates": {}}))
    with pytest.raises(UserError, match="damaged"):
        policyskip.load(run)


@pytest.mark.parametrize(
    ("typed_words", "message"),
    [
        (["train", "agent=skipnet", "agent.gate=lstm", *SMALL, *RANDOM], "agent.gate"),
        (["train", "agent=skipnet", "agent.alpha=-1", *SMALL, *RANDOM], "agent.alpha"),
        (["train", "agent=skipnet", "agent.alpha=much", *SMALL, *RANDOM], "agent.alpha"),
        (["train", "agent=skipnet", "agent.speed=1", *SMALL, *RANDOM], "agent.speed"),
        (["train", "agent=skipnet", "reward=macs", *SMALL, *RANDOM], "takes no reward"),
        (["train", "agent=skipnet", "env=block_selection", *SMALL, *RANDOM], "takes no env"),
        (["train", "agent=skipnet", "backbone=resnet32_exits", *SMALL], "has exits, not blocks"),
        (["train", "agent=skipnet", "backbone=resnet38", *SMALL], "backbone.checkpoint is not set"),
        (["calibrate", "run=runs/x", "target.macs_fraction=0.5"], "it has no exits"),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(workshop, typed_words, message):
    before = {path: path.read_bytes() for path in sorted(workshop.rglob("*")) if path.is_file()}
    result = typed(*typed_words, cwd=workshop)
    assert result.returncode == 2, result.stdout
    assert message in result.stderr and len(result.stderr.strip().splitlines()) <= 2
    assert {path: path.read_bytes() for path in sorted(workshop.rglob("*")) if path.is_file()} == before


def test_a_stopped_run_goes_on_to_the_bit(workshop):
    arguments = ["agent=skipnet", *SMALL, *RANDOM, "train.validate_every=2", "train.log_every=1", "front.budget=1e3"]
    arguments += ["front.images=10"]
    assert typed("train", *arguments, "train.steps=4", "run.dir=whole", cwd=workshop).returncode == 0
    whole = json.loads((workshop / "whole/summary.json").read_text())
    again = typed("train", "run.resume=whole", "device=cpu", cwd=workshop)
    assert again.returncode == 0, again.stderr
    after = json.loads((workshop / "whole/summary.json").read_text())
    assert {k: v for k, v in after.items() if k != "seconds"} == {k: v for k, v in whole.items() if k != "seconds"}


@pytest.mark.parametrize("options", [["agent.gate=ff1", "agent.frozen=true"], ["agent.gate=ff2", "agent.cost=ones"]])
def test_every_gate_trains_and_is_judged(options, tmp_path):
    steps = ["train.steps=3", "train.validate_every=3", "front.budget=1e3", "front.images=10"]
    result = typed("train", "agent=skipnet", *options, *SMALL, *RANDOM, *steps, "run.dir=x", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    prediction = policyskip.load(tmp_path / "x").predict(torch.zeros(2, 3, 20, 20, dtype=torch.uint8))
    assert prediction.keep_BK.shape == (2, 9)
    summary = json.loads((tmp_path / "x/summary.json").read_text())
    assert "agent.frozen=false" in options or summary["test/policy_macs"] > 1e6
    if "agent.frozen=true" in options:
        assert summary["test/full_accuracy"] == summary["test/before_accuracy"]
