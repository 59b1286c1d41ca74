"""Checkpoints of MSDNet's PyTorch port: equal logits to a plain computation by the port's names and rules."""

from __future__ import annotations

import math
from itertools import count
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from policyskip.backbones import multi_scale_densenet
from policyskip.backbones.builders import load_exits
from policyskip.backbones.checkpoints import save
from policyskip.errors import UserError
from tests.conftest import small_images

State = dict[str, Tensor]
SMALL: dict[str, Any] = dict(
    num_classes=5,
    num_exits=3,
    base=1,
    step=1,
    step_mode="lin_grow",
    channels=4,
    growth_rate=2,
    growth_factors=[1, 2, 4],
    bottleneck_factors=[1, 2, 4],
)
NORMALISED = dict(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])


class Port:
    """Random weights of the port's MSDNet, made by its rules for channels and scales."""

    def __init__(self, seed: int = 0, prune: str = "max", stem: str = "cifar", **a: Any) -> None:
        self.generator, self.state = torch.Generator().manual_seed(seed), {}
        growth, bottleneck, S = a["growth_factors"], a["bottleneck_factors"], len(a["growth_factors"])
        steps = [a["base"]] + [
            a["step"] if a["step_mode"] == "even" else a["step"] * n + 1 for n in range(1, a["num_exits"])
        ]
        L, width, done = sum(steps), a["channels"], 0
        for block, step in enumerate(steps):
            j = count()
            if not block:
                before, p = 3, f"blocks.0.{next(j)}.layers."
                for s in range(S):
                    kernel, net = (7, "") if stem == "imagenet" and not s else (3, "net.")
                    self.conv(f"{p}{s}.{net}", 0, before, width * growth[s], kernel, bias=kernel == 7)
                    before = width * growth[s]
            for layer in range(done + 1, done + step + 1):
                if prune == "max":
                    interval = math.ceil(L / S)
                    inner, outer = S - max(0, layer - 2) // interval, S - (layer - 1) // interval
                else:
                    inner, outer = min(S, L - layer + 2), min(S, L - layer + 1)
                p = f"blocks.{block}.{next(j)}.layers."
                for i, s in enumerate(range(S - outer, S)):
                    downs = [s - 1] if i or inner > outer else []
                    out = a["growth_rate"] * growth[s] // (2 if downs else 1)
                    for branch, read in [("normal", s), *(("down", d) for d in downs)]:
                        middle = min(width * growth[read], bottleneck[read] * out)
                        self.conv(f"{p}{i}.conv_{branch}.net.", 0, width * growth[read], middle, 1)
                        self.conv(f"{p}{i}.conv_{branch}.net.", 3, middle, out, 3)
                width += a["growth_rate"]
                if inner > outer if prune == "max" else layer in (L // 3, 2 * L // 3):
                    p, narrow = f"blocks.{block}.{next(j)}.m.", width // 2
                    for i, s in enumerate(range(S - outer, S)):
                        self.conv(f"{p}{i}.net.", 0, width * growth[s], narrow * growth[s], 1)
                    width = narrow
            done += step
            channels = width * growth[-1]
            head = 128 if stem == "cifar" else channels
            self.conv(f"classifier.{block}.m.0.net.", 0, channels, head, 3)
            self.conv(f"classifier.{block}.m.1.net.", 0, head, head, 3)
            self.state[f"classifier.{block}.linear.weight"] = self.normal(a["num_classes"], head) / head**0.5
            self.state[f"classifier.{block}.linear.bias"] = self.normal(a["num_classes"])

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def conv(self, prefix: str, number: int, before: int, after: int, kernel: int, bias: bool = False) -> None:
        """A convolution, and batch normalisation behind it."""
        self.state[f"{prefix}{number}.weight"] = self.normal(after, before, kernel, kernel) / (before * kernel) ** 0.5
        if bias:
            self.state[f"{prefix}{number}.bias"] = self.normal(after)
        for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0)):
            self.state[f"{prefix}{number + 1}.{name}"] = value + 0.2 * self.normal(after)
        self.state[f"{prefix}{number + 1}.running_var"] = 0.5 + self.normal(after).abs()
        self.state[f"{prefix}{number + 1}.num_batches_tracked"] = torch.tensor(7)


def convolved(state: State, prefix: str, number: int, x: Tensor, stride: int = 1) -> Tensor:
    weight = state[f"{prefix}{number}.weight"]
    x = F.conv2d(x, weight, state.get(f"{prefix}{number}.bias"), stride, weight.shape[-1] // 2)
    mean, var, scale, shift = (
        state[f"{prefix}{number + 1}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")
    )
    return F.relu(F.batch_norm(x, mean, var, scale, shift))


def branch(state: State, prefix: str, x: Tensor, stride: int) -> Tensor:
    return convolved(state, prefix, 3, convolved(state, prefix, 0, x), stride)


def port_logits(state: State, x: Tensor) -> Tensor:
    """Every exit's logits, (B, N, C), of normalised images (B, 3, H, W), module after module as the port counts them."""
    scales: list[Tensor] = []
    logits = []
    for block in count():
        if f"classifier.{block}.linear.weight" not in state:
            return torch.stack(logits, 1)
        for j in count():
            p = f"blocks.{block}.{j}."
            if block == j == 0:
                large = f"{p}layers.0.0.weight" in state
                x = convolved(state, f"{p}layers.0.{'' if large else 'net.'}", 0, x, 2 if large else 1)
                scales = [F.max_pool2d(x, 3, 2, 1) if large else x]
                while f"{p}layers.{len(scales)}.net.0.weight" in state:
                    scales.append(convolved(state, f"{p}layers.{len(scales)}.net.", 0, scales[-1], 2))
            elif f"{p}m.0.net.0.weight" in state:
                scales = [convolved(state, f"{p}m.{i}.net.", 0, scale) for i, scale in enumerate(scales)]
            elif f"{p}layers.0.conv_normal.net.0.weight" in state:
                drops = f"{p}layers.0.conv_down.net.0.weight" in state
                new = []
                for i in range(len(scales) - drops):
                    same, parts = scales[i + drops], []
                    if i or drops:
                        parts = [branch(state, f"{p}layers.{i}.conv_down.net.", scales[i + drops - 1], 2)]
                    new.append(torch.cat([same, *parts, branch(state, f"{p}layers.{i}.conv_normal.net.", same, 1)], 1))
                scales = new
            else:
                break
        read = convolved(state, f"classifier.{block}.m.0.net.", 0, scales[-1], 2)
        read = F.avg_pool2d(convolved(state, f"classifier.{block}.m.1.net.", 0, read, 2), 2).flatten(1)
        logits.append(F.linear(read, *(state[f"classifier.{block}.linear.{name}"] for name in ("weight", "bias"))))
    raise AssertionError


LARGE = dict(stem="imagenet", growth_factors=[1, 2, 4, 4], bottleneck_factors=[1, 2, 4, 4], head_channels=0)
CHANGES: dict[str, dict[str, Any]] = {
    "budgeted": {},
    "one transition": dict(num_exits=2, base=2, step_mode="even"),
    "anytime": dict(step_mode="even", base=4, step=2),
    "pruned late": dict(prune="min", step_mode="even", base=2, step=2),
    "scales that nobody needs": dict(step_mode="even", num_exits=2, base=2, step=2),
    "ImageNet": dict(step_mode="even", base=2, step=2, num_exits=2, **LARGE),
}


SLOW = ("budgeted", "anytime", "pruned late")


@pytest.mark.parametrize(
    "changed",
    [pytest.param(value, id=key, marks=[pytest.mark.slow] * (key in SLOW)) for key, value in CHANGES.items()],
)
def test_the_logits_are_those_of_the_port(tmp_path, changed):
    arguments = SMALL | changed
    port = Port(**{key: value for key, value in arguments.items() if key != "head_channels"})
    state = {f"module.{name}": value for name, value in port.state.items()}
    torch.save({"epoch": 3, "arch": "msdnet", "state_dict": state, "best_prec1": 71.5}, tmp_path / "net.pth.tar")
    network = multi_scale_densenet(checkpoint=str(tmp_path / "net.pth.tar"), **NORMALISED, **arguments).eval()
    images = small_images(3, size=224 if "stem" in changed else 32).images
    x = (images / 255 - torch.tensor(NORMALISED["mean"]).view(3, 1, 1)) / torch.tensor(NORMALISED["std"]).view(3, 1, 1)
    expected_BNC = port_logits(port.state, x)
    assert expected_BNC.shape == (3, arguments["num_exits"], 5)
    with torch.no_grad():
        torch.testing.assert_close(network(images), expected_BNC, rtol=1e-4, atol=1e-4 * float(expected_BNC.std()))
    assert network.stated_accuracy == pytest.approx(0.715)
    save(network, tmp_path / "ours.safetensors")
    assert load_exits(str(tmp_path / "ours.safetensors")).content_hash() == network.content_hash()


@pytest.mark.parametrize(
    ("classes", "mean"), [(10, [0.4914, 0.4824, 0.4467]), (100, [0.5071, 0.4867, 0.4408]), (5, [0.485, 0.456, 0.406])]
)
def test_the_normalisation_is_the_port_s_and_is_said_to_be_guessed(tmp_path, classes, mean):
    arguments = SMALL | dict(num_classes=classes)
    torch.save({"state_dict": Port(**arguments).state}, tmp_path / "net.pth")
    network = multi_scale_densenet(checkpoint=str(tmp_path / "net.pth"), **arguments)
    assert network.mean.flatten().tolist() == pytest.approx(mean)
    assert f"guessed, as the file does not say: mean {mean}" in network.remark
    typed = multi_scale_densenet(checkpoint=str(tmp_path / "net.pth"), **NORMALISED, **arguments)
    assert typed.mean.flatten().tolist() == pytest.approx(NORMALISED["mean"]) and "guessed" not in typed.remark


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(num_exits=2), "holds an MSDNet of 3 exits, not of 2"),
        (dict(step=2), r"of another shape: it lacks the module blocks\.1\.3 .*step_mode"),
        (dict(num_classes=3), "has 5 classes, the data has 3"),
        (dict(channels=8), "is damaged: it holds|has shape"),
        (dict(growth_rate=4), "has shape"),
        (dict(prune="min"), "does not fit msdnet3"),
    ],
)
def test_another_msdnet_than_the_one_asked_for_is_refused(tmp_path, changed, message):
    torch.save(Port(**SMALL).state, tmp_path / "net.pth")
    with pytest.raises(UserError, match=message) as refused:
        multi_scale_densenet(checkpoint=str(tmp_path / "net.pth"), **(SMALL | changed))
    assert "net.pth" in str(refused.value) and "\n" not in str(refused.value)
