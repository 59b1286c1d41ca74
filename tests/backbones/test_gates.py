"""Gates and networks with gates: shapes and costs as published, straight-through gradients, what is really skipped."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from policyskip.backbones import count_costs, dense
from policyskip.backbones.costs import count_macs
from policyskip.backbones.gated import GatedNetwork
from policyskip.backbones.gates import GATES, straight_through
from policyskip.backbones.resnet import CifarResNet
from policyskip.errors import UserError
from tests.conftest import small_backbone, small_images, with_statistics

KINDS = ["rnn", "ff1", "ff2"]
IMAGES = (small_images(20).images * torch.linspace(0.1, 1, 20).view(-1, 1, 1, 1)).to(torch.uint8)  # dark to bright


def gated(kind: str = "rnn", **kwargs) -> GatedNetwork:
    """A small network whose gates answer differently from image to image, some yes and some no."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = GatedNetwork(small_backbone(**kwargs), kind, (3, 12, 12)).eval()
        with_statistics(network.gates)
        for layer in network.gates.reads if kind == "rnn" else network.gates.answers:
            nn.init.normal_(layer.weight, 0, 3)
    with torch.no_grad():  # each gate's answers are centred in turn
        for g, layer in enumerate(network.gates.reads if kind == "rnn" else network.gates.answers):
            answer_B = network.greedy(IMAGES).gate_BG[:, g].sort().values
            middle = (answer_B[9] + answer_B[10]) / 2  # no image is at ½, where rounding would decide
            if kind == "rnn":
                network.gates.answer.bias -= middle
            else:
                layer.bias[1] -= middle
    return network


@pytest.mark.parametrize(("kind", "share"), [("ff1", 0.15625), ("ff2", 0.125), ("rnn", 0.0002)])
@pytest.mark.parametrize(("channels", "size"), [(16, 32), (32, 16), (64, 8)])
def test_a_gate_costs_the_published_share_of_a_block(kind, share, channels, size):
    """A basic block costs 18 C² P²; FFGate-I (9/4 + 9/16) C² P², FFGate-II 9/4 C² P², both 2C for the last layer; the
    RNN 10 C for reading, 4 · 10 · (10 + 10) for its step and 10 for the answer."""
    shape = (channels, size, size)
    (macs,) = GATES[kind]([shape], 0.5).macs([shape])
    convolutions = {"ff1": 45 / 16, "ff2": 9 / 4, "rnn": 0}[kind] * channels**2 * size**2
    last = 10 * channels + 800 + 10 if kind == "rnn" else 2 * channels
    assert macs == convolutions + last
    if (channels, size) == (16, 32):
        assert macs / (18 * channels**2 * size**2) == pytest.approx(share, rel=0.05)


def test_layers_are_those_of_the_published_gates():
    shapes = [(16, 32, 32), (32, 16, 16)]
    first = [type(layer).__name__ for layer in GATES["ff1"](shapes, 0.5).features[1]]
    conv = ["Conv2d", "BatchNorm2d", "ReLU"]
    assert first == ["MaxPool2d", *conv, *conv, "AdaptiveAvgPool2d", "Flatten"]
    assert [layer.stride for layer in GATES["ff1"](shapes, 0.5).features[1] if isinstance(layer, nn.Conv2d)] == [
        (1, 1),
        (2, 2),
    ]
    assert [type(layer).__name__ for layer in GATES["ff2"](shapes, 0.5).features[0]] == [*conv, *first[-2:]]
    shared = {name: tuple(value.shape) for name, value in GATES["rnn"](shapes, 0.5).state_dict().items()}
    assert shared == {
        "reads.0.weight": (10, 16),
        "reads.0.bias": (10,),
        "reads.1.weight": (10, 32),
        "reads.1.bias": (10,),
        "cell.weight_ih": (40, 10),
        "cell.weight_hh": (40, 10),
        "cell.bias_ih": (40,),
        "cell.bias_hh": (40,),
        "answer.weight": (1, 10),
        "answer.bias": (1,),
    }


def test_the_rnn_remembers_and_the_others_do_not():
    x, other = torch.randn(2, 1, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    for kind in KINDS:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            gates = GATES[kind]([(8, 6, 6)] * 2, 0.5).eval()
        after = [gates.logit(1, x, gates.logit(0, seen, None)[1])[0] for seen in (x, other)]
        assert torch.equal(*after) == (kind != "rnn")


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_gate_keeps_with_the_first_probability(kind):
    gates = GATES[kind]([(8, 6, 6)], 0.9).eval()
    logit_B, _ = gates.logit(0, torch.zeros(3, 8, 6, 6), None)
    torch.testing.assert_close(logit_B.sigmoid(), torch.full((3,), 0.9), atol=0.08, rtol=0)


def test_straight_through_by_hand():
    """Two images of one channel and two pixels. The first runs (p = 0.6): its output is the block's, and its gradient goes
    there. p's gradient is Σ grad · (kept − skipped): 1·(3−1) + 10·(5−2) = 32 and 1·(7−4) + 10·(0−1) = −7."""
    kept = torch.tensor([[3.0, 5.0], [7.0, 0.0]]).view(2, 1, 1, 2).requires_grad_()
    skipped = torch.tensor([[1.0, 2.0], [4.0, 1.0]]).view(2, 1, 1, 2).requires_grad_()
    p = torch.tensor([0.6, 0.5], requires_grad=True)
    out = straight_through(kept, skipped, p)
    assert out.flatten(1).tolist() == [[3.0, 5.0], [4.0, 1.0]]
    (out * torch.tensor([1.0, 10.0])).sum().backward()
    assert p.grad.tolist() == [32.0, -7.0]
    assert kept.grad.flatten(1).tolist() == [[1.0, 10.0], [0.0, 0.0]]
    assert skipped.grad.flatten(1).tolist() == [[0.0, 0.0], [1.0, 10.0]]
    with pytest.raises(ValueError, match="probability"):
        straight_through(kept, skipped, p.unsqueeze(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shortcut", ["pool", "B"])
def test_sparse_straight_through_and_dense_give_the_same_logits(kind, shortcut):
    network, images = gated(kind, shortcut=shortcut), IMAGES
    with torch.no_grad():
        run = network.greedy(images)
        assert run.keep_BK[:, 0].all() and run.keep_BK.shape == (20, 6) and run.gate_BG.shape == (20, 5)
        assert len(run.keep_BK.unique(dim=0)) > 1
        assert torch.equal(run.keep_BK[:, 1:], run.gate_BG > 0)
        torch.testing.assert_close(run.logits_BC, dense(network.backbone, images, run.keep_BK))
        through = network.straight_through(images)
        assert torch.equal(through.keep_BK, run.keep_BK)
        torch.testing.assert_close(through.logits_BC, run.logits_BC)
        one_by_one = torch.cat([network.greedy(images[i : i + 1]).logits_BC for i in range(20)])
        torch.testing.assert_close(one_by_one, run.logits_BC)
        assert network.greedy(images[:0]).keep_BK.shape == (0, 6)


def test_what_is_counted_is_what_runs():
    network = gated()
    image = IMAGES[9:10]
    costs, keep_BK = count_costs(network.backbone, (3, 12, 12)), network.greedy(image).keep_BK
    assert count_macs(network, image) == costs.of(keep_BK).item() + network.gate_macs


def test_a_nan_in_a_skipped_block_stays_there():
    network, images = gated(), IMAGES
    keep_BK = network.greedy(images).keep_BK
    block = int(keep_BK.float().mean(0).sub(0.5).abs().argmin())
    nn.init.constant_(network.backbone.blocks[block].residual.conv1.weight, float("nan"))
    for logits_BC in (network.greedy(images).logits_BC, network.straight_through(images).logits_BC):
        clean_B = logits_BC.isfinite().all(1)
        assert torch.equal(clean_B, ~keep_BK[:, block]) and 0 < clean_B.sum() < 20


def test_samples_follow_the_uniform_numbers():
    network, images = gated(), IMAGES
    zeros, ones = torch.zeros(20, 5), torch.ones(20, 5)
    assert network.sampled(images, zeros).keep_BK.all()
    assert not network.sampled(images, ones).keep_BK[:, 1:].any()


def test_sampled_gates_leave_the_blocks_to_the_cross_entropy():
    network = gated()
    network.sampled(IMAGES, torch.zeros(20, 5)).gate_BG.sum().backward()
    assert all(parameter.grad is None for parameter in network.backbone.parameters())
    assert network.gates.answer.weight.grad.abs().sum() > 0
    network.straight_through(IMAGES).gate_BG.sum().backward()
    assert network.backbone.blocks[0].residual.conv1.weight.grad.abs().sum() > 0


def test_batch_statistics_come_from_the_images_that_ran():
    """Skipped images may hold anything: the running statistics of their blocks do not move."""
    network, images = gated(), IMAGES
    for layer in network.gates.parameters():
        nn.init.zeros_(layer)
    network.gates.answer.bias.data.fill_(-1.0)
    network.train()
    before = {name: value.clone() for name, value in network.backbone.blocks[1:].state_dict().items()}
    network.straight_through(images)
    assert all(torch.equal(value, network.backbone.blocks[1:].state_dict()[name]) for name, value in before.items())
    assert all(module.training for module in network.backbone.modules())


def test_unfit_gates_are_refused():
    with pytest.raises(UserError, match=r"agent\.gate must be one of rnn, ff1, ff2"):
        GatedNetwork(small_backbone(), "lstm", (3, 12, 12))
    with pytest.raises(UserError, match="initial_keep"):
        GatedNetwork(small_backbone(), "rnn", (3, 12, 12), initial_keep=1.0)
    with pytest.raises(UserError, match="at least 2×2"):
        GatedNetwork(CifarResNet(14, 5, width=4), "ff1", (3, 4, 4))


def test_a_gate_stays_shut_where_its_probability_is_the_number_drawn():
    """Gates without weights have p = ½ exactly: that opens them for u below ½, and not for ½, which is greedy's too."""
    network = gated()
    for parameter in network.gates.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        half, below = torch.full((20, 5), 0.5), torch.full((20, 5), 0.4999)
        assert network.sampled(IMAGES, below).keep_BK.all()
        for run in (network.sampled(IMAGES, half), network.greedy(IMAGES), network.straight_through(IMAGES)):
            assert (run.gate_BG == 0).all() and not run.keep_BK[:, 1:].any()


def test_the_rnn_sees_the_mean_over_the_pixels():
    gates, x = GATES["rnn"]([(2, 2, 2)], 0.5), torch.tensor([1.0, 1.0, 1.0, 1.0])
    features = torch.stack([x, x.cumsum(0) - 1.5]).view(2, 1, 2, 2).expand(-1, 2, -1, -1)  # 1, and −0.5 to 2.5
    logit_B, _ = gates.logit(0, features, None)
    torch.testing.assert_close(logit_B[0], logit_B[1])
    other_B, _ = gates.logit(0, features + 1, None)
    assert (other_B - logit_B).abs().min() > 1e-4


def test_images_that_skip_a_block_give_it_no_gradient():
    network = gated().train()
    for parameter in network.gates.parameters():
        nn.init.zeros_(parameter)
    network.straight_through(IMAGES).logits_BC.sum().backward()
    first, *skipped = network.backbone.blocks
    assert first.residual.conv1.weight.grad is not None
    assert all(parameter.grad is None for block in skipped for parameter in block.residual.parameters())
