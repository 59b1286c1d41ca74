"""Loading a run that somebody else made, or made elsewhere: what ``policy.json`` may say, and what a program has set."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import policyskip
from policyskip.errors import UserError
from policyskip.policies.base import Policy
from policyskip.policies.networks import KeepPolicy, PolicyNetwork, check_policy
from policyskip.sealed import sealed
from tests.conftest import small_images

STORED = Path(__file__).parent.parent / "stored" / "runs"
IMAGES = small_images(3, size=20).images


def changed_run(tmp_path: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a stored run, of whose ``policy.json`` something was changed."""
    run = tmp_path / name
    shutil.copytree(STORED / name, run)
    content = json.loads((run / "policy.json").read_text())
    change(content)
    (run / "policy.json").write_text(json.dumps(content))
    return run


def put(path: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    """A change that sets the value at a path of keys."""

    def change(content: dict[str, Any]) -> None:
        *keys, last = path.split("/")
        for key in keys:
            content = content[key]
        content[last] = value

    return change


TEN_THOUSAND = ["c"] * 100_001
CHANGES: list[tuple[str, str, Any, str]] = [
    # every family
    *((name, "version", True, "version: must be 1") for name in ("blockdrop", "msdnet")),
    ("blockdrop", "version", 2, "version 2"),
    ("blockdrop", "version", "1", "version 1"),
    *((name, "classes", [], "classes: list should have at least 1") for name in ("skipnet", "a2c-exit", "random")),
    *((n, "classes", ["a"] * 9, "the network has 10, the file names 9|9 classes|has 10 classes") for n in ("skipnet", "msdnet", "a2c-exit", "blockdrop")),
    ("blockdrop", "classes", "0123456789", "classes: input should be a valid list"),
    ("blockdrop", "classes", [1] * 10, r"classes\.0: input should be a valid string, got 1"),
    ("blockdrop", "classes", TEN_THOUSAND, "classes: list should have at most 100000"),
    ("blockdrop", "image_shape", [3, 20.5, 20], r"image_shape\.1: input should be a valid integer"),
    ("blockdrop", "image_shape", [3, True, 20], r"image_shape\.1: "),
    ("blockdrop", "image_shape", [1, 20, 20], "image_shape: must be 3 channels"),
    ("blockdrop", "image_shape", [3, 10_000, 10_000], "image_shape: must be 3 channels of at most 16,777,216 pixels"),
    ("blockdrop", "image_shape", [3, 10**9, 1], r"image_shape\.1: input should be less than"),
    ("blockdrop", "image_shape", [3, 20], "image_shape: list should have at least 3"),
    ("msdnet", "steps", -1, "steps: input should be greater"),
    ("msdnet", "steps", "4", "steps: input should be a valid integer"),
    ("msdnet", "network", {}, r"network\.hash: field required"),
    ("msdnet", "network", [], "network: input should be"),
    ("msdnet", "network/hash", 5, r"network\.hash: input should be a valid string"),
    # costs
    *((name, f"{key}/macs", macs, rf"{key}\.macs: input should be") for name, key in (("blockdrop", "policy"), ("skipnet", "gates"), ("a2c-exit", "leaves")) for macs in (float("nan"), -1e300, float("inf"), "1", None, True, [1])),
    # blocks
    ("blockdrop", "policy/arguments/num_blocks", -1, "num_blocks: the network has 15, got -1"),
    ("blockdrop", "policy/arguments/num_blocks", 3, "num_blocks: the network has 15, got 3"),
    ("random", "policy/arguments/num_blocks", 10**9, "num_blocks: the network has 15, got 1000000000"),
    ("best_static", "policy/arguments/num_blocks", 15.0, "num_blocks: the network has 15, got 15.0"),
    ("blockdrop", "policy/arguments/pool", 2.5, "pool: input should be a valid integer"),
    ("blockdrop", "policy/arguments/pool", 50, "the policy cannot decide for an image"),
    ("blockdrop", "policy/arguments/width", 10**9, "width: no number may be above 10,000"),
    ("blockdrop", "policy/arguments/width", 10**4, "does not fit policy.json: it holds"),
    ("blockdrop", "policy/arguments/initial_keep", float("nan"), "initial_keep: numbers must be finite"),
    ("blockdrop", "policy/arguments/initial_keep", 2, "above 0 and below 1"),
    ("blockdrop", "policy/arguments/family", "other", "family: input should be 'cifar' or 'imagenet'"),
    ("blockdrop", "policy/arguments/depth", 3, "depth: there is no such argument"),
    ("blockdrop", "policy/arguments", [], r"policy\.arguments: input should be a valid dictionary"),
    ("blockdrop", "policy/name", "", r"policy\.name: string should have at least 1"),
    ("blockdrop", "policy/name", 7, r"policy\.name: input should be a valid string"),
    ("random", "policy/arguments/seed", "0", "seed: input should be a valid integer"),
    ("random", "policy/arguments/seed", 2**64, "seed: input should be less than"),
    ("ppo", "policy/arguments/net_arch", [1] * 10**5, "net_arch: at most 100 entries are allowed, got 100000"),
    ("ppo", "policy/arguments/channels", ["x"], "channels: input should be a valid integer"),
    ("ppo-layer", "policy/arguments/width", 3.5, "width: input should be a valid integer"),
    ("ppo-layer", "policy/arguments/width", 65, "does not fit policy.json"),
    # networks
    ("blockdrop", "backbone/seed", "0", r"backbone\.seed: input should be a valid integer"),
    ("blockdrop", "backbone/seed", 2**70, r"backbone\.seed: input should be"),
    ("blockdrop", "backbone/config/depth", 6 * 10**9 + 2, "depth: no number may be above 10,000"),
    ("blockdrop", "backbone/config/depth", "32", "depth: input should be a valid integer"),
    ("blockdrop", "backbone/config/mean", [float("nan")] * 3, "mean: numbers must be finite"),
    ("blockdrop", "backbone/config/checkpoint", ["a"], "checkpoint: input should be a valid string"),
    ("blockdrop", "backbone/config/more", 1, "more: there is no such argument"),
    # thresholds
    ("msdnet", "exits/thresholds", ["0.5", "0.5"], "threshold"),
    ("msdnet", "exits/thresholds", [], "threshold"),
    ("msdnet", "exits/thresholds", ["nan"], r"exits\.thresholds\.0: .*must not be nan"),
    ("msdnet", "exits/thresholds", ["x"], r"exits\.thresholds\.0: .*could not convert"),
    ("msdnet", "exits/thresholds", [0.5], r"exits\.thresholds\.0: input should be a valid string"),
    ("msdnet", "exits/thresholds", "0.5", r"exits\.thresholds: input should be a valid list"),
    ("msdnet", "exits/rule", 3, r"exits\.rule: input should be a valid string"),
    ("a2c-exit", "leaves/arguments/num_exits", 3, "num_exits: the network has 2, got 3"),
    ("a2c-exit", "leaves/arguments/num_classes", 9, "num_classes: the network has 10, got 9"),
    ("a2c-exit", "leaves/arguments/net_arch", [10**9], "net_arch: no number may be above 10,000"),
    ("skipnet", "gates/kind", ["rnn"], r"gates\.kind: input should be a valid string"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "path", "value", "message"), CHANGES, ids=[f"{c[0]} {c[1]} {str(c[2])[:20]}" for c in CHANGES]
)
def test_a_policy_file_that_says_what_cannot_be_is_refused_in_one_line(tmp_path, name, path, value, message):
    run, begun = changed_run(tmp_path, name, put(path, value)), time.monotonic()
    with pytest.raises(UserError, match=message) as refused:
        policyskip.load(run)
    assert time.monotonic() - begun < 10
    assert str(refused.value).isprintable() and len(str(refused.value)) < 500


def test_a_random_network_of_a_file_is_bounded(tmp_path):
    huge = dict(_target_="policyskip.backbones.cifar_resnet", depth=602, width=9999, checkpoint="random")
    run = changed_run(tmp_path, "blockdrop", put("backbone/config", huge))
    with pytest.raises(UserError, match="would hold .* numbers; 500,000,000 are allowed"):
        policyskip.load(run)


def test_weights_that_have_moved_are_named_with_the_argument_that_finds_them(tmp_path):
    moved = put("backbone/config/checkpoint", str(tmp_path / "gone.th"))
    run = changed_run(tmp_path, "blockdrop", moved)
    with pytest.raises(UserError, match=r"there is no checkpoint .*gone\.th.*policyskip\.load\('.*', backbone=FILE\)"):
        policyskip.load(run)
    assert policyskip.load(run, backbone="resnet32_digits").predict(IMAGES).label_B.shape == (3,)


# What a program has set


@contextmanager
def defaults(dtype: torch.dtype, device: str) -> Any:
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
        assert torch.get_default_dtype() == dtype and torch.get_default_device().type == device
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("ppo", "random", "budget", "a2c-exit", "calibrated")]


@pytest.mark.parametrize("name", ["blockdrop", "skipnet", "msdnet", "ppo-layer", *SLOW])
def test_loading_and_predicting_do_not_depend_on_torch_s_defaults(name):
    usual = policyskip.load(STORED / name)
    expected = usual.predict(IMAGES)
    for dtype, device in ((torch.float64, "cpu"), (torch.float16, "meta")):
        with defaults(dtype, device):
            loaded = policyskip.load(STORED / name)
            answers = [
                predictor.predict(images) for predictor in (usual, loaded) for images in (IMAGES, IMAGES.numpy())
            ]
        for answer in answers:
            assert answer.logits_BC.dtype == torch.float32 and torch.equal(answer.logits_BC, expected.logits_BC)
            assert torch.equal(answer.macs_B, expected.macs_B)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("meta", "the device meta holds no numbers, .*say cpu or cuda"),
        ("xpu:99", "there is no device xpu:99 here"),
        ("\x1b[2J", r"there is no device \\x1b\[2J here"),
        (5.5, "there is no device 5.5 here"),
    ],
)
def test_a_device_without_numbers_is_refused_by_name(device, message):
    with pytest.raises(UserError, match=message) as refused:
        policyskip.load(STORED / "blockdrop", device=device)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(
            ({"run": run}, r"run must be of type str \| pathlib\.\w*\.?Path, got")
            for run in (None, 3, b"run", [], torch.zeros(3, 3), small_images(2))
        ),
        ({"run": "\0"}, "does not exist"),
        ({"precision": torch.zeros(3, 3)}, "precision must be one of float32, float32_exact, bfloat16, float16, got"),
        ({"backbone": torch.zeros(3, 3)}, "backbone must be of type .*, got a Tensor of float32"),
        ({"trust": 1}, "trust must be of type bool, got 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_no_argument_of_load_is_refused_in_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as refused:
        policyskip.load(**{"run": STORED / "blockdrop", **arguments})
    assert str(refused.value).isprintable()


# Policies of the user's own


class OnlyLogits(KeepPolicy):
    def features_and_logits(self, images):
        return torch.zeros(len(images), 6)


class Three(KeepPolicy):
    def features_and_logits(self, images):
        return images, images, images


@pytest.mark.parametrize("kind", [OnlyLogits, Three])
def test_a_policy_network_that_returns_something_else_is_told_what_to_return(kind):
    with pytest.raises(UserError, match=rf"{kind.__name__} must return features \(B, D\) and logits .*define forward"):
        check_policy(kind(6), IMAGES, 6)
    assert check_policy(PolicyNetwork(6, width=2), IMAGES, 6) == 8


class WholeNumbers(Policy):
    """Decides with numbers in place of bool."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.num_blocks = num_blocks

    def decide(self, observation):
        return torch.ones(len(observation), self.num_blocks, dtype=torch.int64)


def test_a_policy_that_decides_with_something_else_is_refused_when_it_is_loaded(tmp_path):
    def change(content: dict[str, Any]) -> None:
        name = f"{WholeNumbers.__module__}.{WholeNumbers.__name__}"
        content["policy"] = {"name": name, "arguments": {"num_blocks": 15}, "macs": 0.0}

    run = changed_run(tmp_path, "best_static", change)
    (run / "best.safetensors").write_bytes(sealed({}))
    with pytest.raises(UserError, match=r"must decide with bool \(1, 15\)|WholeNumbers failed with|cannot decide"):
        policyskip.load(run, trust=True)


def test_a_run_is_loaded_in_the_precision_that_it_was_judged_in(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(STORED / "blockdrop", run)
    assert policyskip.load(run).execution.precision == "float32"  # of an older version, which knew no other
    config = run / "config.yaml"
    config.write_text(config.read_text() + "precision: bfloat16\n")
    assert policyskip.load(run).execution.precision == "bfloat16"
    assert policyskip.load(run, precision="float32").execution.precision == "float32"
    config.write_text("precision: [")
    with pytest.raises(UserError, match=r"config\.yaml"):
        policyskip.load(run)
