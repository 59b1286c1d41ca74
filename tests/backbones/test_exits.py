"""The contract of every multi-exit network: carried forward, never recomputed, and gone once it has left."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policyskip.backbones import ExitCosts, ExitNetwork, costly_exits, count_exit_costs, rows_of, run_until
from policyskip.backbones.branchynet import BranchyAlexNet, BranchyLeNet, BranchyResNet
from policyskip.backbones.costs import count_macs
from policyskip.backbones.folding import folded
from policyskip.backbones.msdnet import MSDNet
from policyskip.backbones.resnet import CifarResNet, TorchvisionResNet
from policyskip.backbones.resnet_exits import HEADS, ResNetExits
from policyskip.errors import UserError
from tests.conftest import small_backbone, small_images, with_statistics

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
SHAPE = (3, 16, 16)
B, C = 7, 5


def grid(**changed: object) -> MSDNet:
    arguments = dict(num_classes=C, num_exits=3, channels=4, growth_rate=2, head_channels=8) | changed
    return MSDNet(**arguments)  # type: ignore[arg-type]


BUILD: dict[str, Callable[[], ExitNetwork]] = {
    "msdnet": grid,
    "msdnet, eager": lambda: grid(lazy=False),
    "msdnet, min": lambda: grid(prune="min", step_mode="even", base=2),
    "msdnet, two scales, imagenet": lambda: grid(
        growth_factors=(1, 2), bottleneck_factors=(1, 2), stem="imagenet", head_channels=0
    ),
    "lenet": lambda: BranchyLeNet(C, SHAPE),
    "alexnet": lambda: BranchyAlexNet(C, SHAPE),
    "resnet": lambda: BranchyResNet(C, SHAPE, 8),
    "linear": lambda: ResNetExits(small_backbone(), [0, 3], "linear", SHAPE),
    "conv": lambda: ResNetExits(small_backbone(shortcut="B"), [1, 2, 4], "conv", SHAPE),
    "distiller": lambda: ResNetExits(
        small_backbone(), ["layer1.1", 2], ["distiller_cifar", "distiller_imagenet"], SHAPE
    ),
}


def built(name: str) -> ExitNetwork:
    torch.manual_seed(0)
    return with_statistics(BUILD[name]()).eval()


@pytest.fixture(params=BUILD)
def network(request: pytest.FixtureRequest) -> ExitNetwork:
    return built(request.param)


@pytest.fixture
def images() -> Tensor:
    return small_images(B, size=16).images


def test_folding_changes_no_answer_and_not_the_network(network, images):
    before, expected = network.content_hash(), network(images)
    copy = folded(network)
    torch.testing.assert_close(copy(images), expected, **TOLERANCE)
    assert network.content_hash() == before
    assert nn.BatchNorm2d not in map(type, copy.modules())
    with torch.no_grad():  # where what follows a convolution is done in one pass
        torch.testing.assert_close(copy(images), expected, **TOLERANCE)
    _, exit_B = run_until(copy, images, lambda n, logits, rows: rows % 2 == n % 2)
    logits_BC, _ = run_until(copy, images, lambda n, logits, rows: exit_B[rows] == n)
    torch.testing.assert_close(logits_BC, expected[torch.arange(B), exit_B], **TOLERANCE)


def test_folding_leaves_alone_what_follows_no_convolution(images):
    norm = with_statistics(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.ReLU())).eval()
    x = torch.randn(2, 3, 5, 5)
    kept, expected = x.clone(), norm(x)
    torch.testing.assert_close(folded(norm)(x), expected)
    assert torch.equal(x, kept) and not folded(norm)[1].inplace
    first = nn.Sequential(nn.Identity(), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    folded(first.eval())(x)
    assert torch.equal(x, kept)  # a ReLU that reads what others read too


def watch(network: ExitNetwork, note: Callable[[str, int], object]) -> None:
    """Call ``note`` with the name and the number of images whenever a convolution or linear layer is computed."""

    def hook(name: str) -> Callable[..., None]:
        def noted(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            note(name, len(output))

        return noted

    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(hook(name))


def layers_by_exit(name: str, image: Tensor) -> dict[str, int]:
    """The exit that each convolution or linear layer is computed for."""
    network, computed_for, here = built(name), {}, 0
    watch(network, lambda layer, rows: computed_for.update({layer: here}))
    with torch.no_grad():
        state = network.begin(image)
        for n in range(network.num_exits):
            here = n
            state = network.segment(n, state)
            network.head(n, state)
    return computed_for


# Carried forward


def test_an_exit_is_what_it_would_be_alone(network, images):
    """No head on the way, and a beginning of its own: whatever is carried forward is no shortcut."""
    with torch.no_grad():
        logits_BNC = network(images)
        assert logits_BNC.shape == (B, network.num_exits, C)
        for last in range(network.num_exits):
            state = network.begin(images)
            for n in range(last + 1):
                state = network.segment(n, state)
            assert torch.equal(network.head(last, state), logits_BNC[:, last])
    assert not torch.allclose(logits_BNC[:, 0], logits_BNC[:, 1])


def test_nothing_is_computed_twice(network, images):
    computed = []
    watch(network, lambda layer, rows: computed.append(layer))
    with torch.no_grad():
        network(images)
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert sorted(computed) == sorted(layers)


def test_a_state_can_be_continued_twice(network, images):
    with torch.no_grad():
        state = network.segment(0, network.begin(images))
        before = {key: value.clone() for key, value in state.items()}
        once, again = (network.head(1, network.segment(1, state)) for _ in range(2))
    assert torch.equal(once, again)
    assert state.keys() == before.keys() and all(torch.equal(state[key], before[key]) for key in before)


def test_batch_composition_does_not_matter(network, images):
    with torch.no_grad():
        together = network(images)
        alone = torch.cat([network(images[i : i + 1]) for i in range(B)])
    torch.testing.assert_close(together, alone, **TOLERANCE)


def test_bytes_and_floats_are_one_image(network, images):
    with torch.no_grad():
        torch.testing.assert_close(network(images), network(images / 255), **TOLERANCE)


def test_gradients_reach_every_parameter(network, images):
    label_B = torch.arange(B) % C
    network.train()
    logits_BNC = network(images)
    sum(F.cross_entropy(logits_BC, label_B) for logits_BC in logits_BNC.unbind(1)).backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


def test_frozen_stays_frozen(network, images):
    before, hash_before = {k: v.clone() for k, v in network.state_dict().items()}, network.content_hash()
    assert network.freeze() is network
    network.train()
    network(images)
    assert not any(module.training for module in network.modules())
    assert not any(p.requires_grad for p in network.parameters())
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert network.content_hash() == hash_before


# Leaving


def pattern(num_exits: int) -> Tensor:
    """Which exit each of the B images takes; every exit is taken, out of order."""
    return torch.tensor([3, 0, 2, 0, 1, 3, 1]) % num_exits


def test_each_image_gets_the_logits_of_its_exit(network, images):
    expected_B, calls = pattern(network.num_exits), []
    with torch.no_grad():
        expected_BNC = network(images)

        def leave(n, logits_BC, rows):
            calls.append((n, rows.tolist()))
            torch.testing.assert_close(logits_BC, expected_BNC[rows, n], **TOLERANCE)
            return expected_B[rows] == n

        logits_BC, exit_B = run_until(network, images, leave)
    assert torch.equal(exit_B, expected_B)
    torch.testing.assert_close(logits_BC, expected_BNC[torch.arange(B), expected_B], **TOLERANCE)
    stayed = [(n, (expected_B >= n).nonzero().squeeze(1).tolist()) for n in range(network.num_exits - 1)]
    assert calls == stayed  # and never at the last exit


@pytest.mark.parametrize("name", BUILD)
def test_images_that_left_are_not_computed(name, images):
    """Every layer sees exactly the images that are still there at the exit that it is computed for."""
    network, seen = built(name), {}
    expected_B = pattern(network.num_exits)
    watch(network, lambda layer, rows: seen.update({layer: rows}))
    with torch.no_grad():
        run_until(network, images, lambda n, logits_BC, rows: expected_B[rows] == n)
    remaining_N = [int((expected_B >= n).sum()) for n in range(network.num_exits)]
    assert len(set(remaining_N)) == network.num_exits
    assert seen == {layer: remaining_N[n] for layer, n in layers_by_exit(name, images[:1]).items()}


def test_when_all_have_left_nothing_more_is_computed(images):
    network, seen = built("msdnet"), set()
    watch(network, lambda layer, rows: seen.add(layer))
    with torch.no_grad():
        _, exit_B = run_until(network, images, lambda n, logits_BC, rows: torch.full((len(rows),), n == 1))
    assert exit_B.tolist() == [1] * B
    assert seen == {layer for layer, n in layers_by_exit("msdnet", images[:1]).items() if n <= 1}


def test_when_none_leaves_all_reach_the_last_exit(network, images):
    with torch.no_grad():
        logits_BC, exit_B = run_until(network, images, lambda n, logits_BC, rows: torch.zeros(len(rows)).bool())
        torch.testing.assert_close(logits_BC, network(images)[:, -1], **TOLERANCE)
    assert exit_B.tolist() == [network.num_exits - 1] * B


def test_no_images(network, images):
    logits_BC, exit_B = run_until(
        network, images[:0], lambda n, logits_BC, rows: pytest.fail("no image is in the network")
    )
    assert logits_BC.shape == (0, C) and exit_B.shape == (0,) and exit_B.dtype == torch.int64


@pytest.mark.parametrize("answer", [torch.ones(B), torch.ones(B + 1).bool(), torch.ones(B, 1).bool()])
def test_an_answer_that_is_none_is_refused(answer, images):
    with pytest.raises(ValueError, match=rf"leave must give bool of shape \({B},\), gave torch"):
        run_until(built("lenet"), images, lambda n, logits_BC, rows: answer)


def test_rows_of_a_state():
    state = {"x": torch.arange(6).view(3, 2), (0, 1): torch.arange(3)}
    some = rows_of(state, torch.tensor([2, 0]))
    assert some["x"].tolist() == [[4, 5], [0, 1]] and some[0, 1].tolist() == [2, 0]


# Costs


def test_costs_by_hand():
    costs = ExitCosts(torch.tensor([3.0, 5.0, 1.0]), torch.tensor([1.0, 2.0, 4.0]))
    assert costs.cumulative_N.tolist() == [4, 11, 16]
    assert costs.straight_N.tolist() == [4, 10, 13]
    assert costs.full == 16
    assert costs.of(torch.tensor([2, 0, 0, 1])).tolist() == [16, 4, 4, 11]


def test_costs_sum_to_a_whole_forward(network):
    costs = count_exit_costs(network, SHAPE)
    assert costs.full == count_macs(network, torch.zeros(1, *SHAPE)) > 0
    assert costs.trunk_N.dtype == torch.float64 and (costs.trunk_N > 0).all() and (costs.head_N > 0).all()


def test_counting_leaves_the_network_alone():
    network = built("msdnet").train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    count_exit_costs(network, SHAPE)
    assert network.training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_heads_that_cannot_pay_are_named_with_both_figures():
    costs = ExitCosts(torch.tensor([5e6, 2e6, 3e6, 1e6]), torch.tensor([1e6, 3e6, 1.5e6, 9e6]))
    first, second = costly_exits(costs)
    assert first.startswith("the head of exit 1 costs 3.000 M MACs, going on to exit 2 3.000 M")
    assert second.startswith("the head of exit 2 costs 1.500 M MACs, going on to exit 3 1.000 M")
    assert costly_exits(ExitCosts(torch.tensor([5.0, 2.0]), torch.tensor([1.9, 9.0]))) == []


# Exits on a residual network


def test_exits_read_the_blocks_they_follow(images):
    backbone = small_backbone()
    network = ResNetExits(backbone, [1, 3], "pooled", SHAPE).eval()
    with torch.no_grad():
        logits_BNC, x, expected = network(images), backbone.features(images), []
        for k, block in enumerate(backbone.blocks):
            x = block(x)
            if k in (1, 3):
                expected.append(network.exit_heads[len(expected)][-1](x.mean((2, 3))))
        torch.testing.assert_close(logits_BNC[:, :2], torch.stack(expected, 1), **TOLERANCE)
        torch.testing.assert_close(logits_BNC[:, 2], backbone(images), **TOLERANCE)


@pytest.mark.parametrize(
    ("exits", "indices"),
    [
        ([0, 4], (0, 4)),
        (["layer1.1", "layer3.0"], (1, 4)),
        (["stage1.0", "stage2.1.relu2", 4], (0, 3, 4)),
    ],
)
def test_exits_go_by_index_or_by_name(exits, indices):
    assert ResNetExits(small_backbone(), exits, "pooled", SHAPE).exits == indices


@pytest.mark.parametrize(
    ("exits", "heads", "message"),
    [
        ([6], "pooled", "no block 6 in resnet14: exits follow blocks 0 to 4"),
        ([-1], "pooled", "no block -1 in resnet14"),
        ([1, 5], "pooled", "block 5 is the last of resnet14: its exit is the network's own head; .* 0 to 4"),
        (["layer3.1"], "pooled", "block 5 is the last"),
        ([3, 1], "pooled", r"ascending order, each once, got \[3, 1\]"),
        ([1, "layer1.1"], "pooled", "ascending order, each once"),
        (["layer4.0"], "pooled", "no block 'layer4.0' in resnet14: its blocks are layer1.0 to layer1.1, .* layer3.1"),
        (["layer1.2"], "pooled", "no block 'layer1.2'"),
        (["layer0.0"], "pooled", "no block 'layer0.0'"),
        (["conv1"], "pooled", "no block 'conv1'"),
        (["layer1.0.relu1"], "pooled", r"layer1\.0\.relu1 is no end of a block: .* such as layer1\.0"),
        ([1], "mlp", "no head 'mlp'; heads are linear, pooled, conv, distiller_cifar, distiller_imagenet"),
        ([1, 2], ["conv"], "2 exits need one kind of head or 2, got 1"),
    ],
)
def test_impossible_exits_are_refused(exits, heads, message):
    with pytest.raises(UserError, match=message) as refused:
        ResNetExits(small_backbone(), exits, heads, SHAPE)
    assert "\n" not in str(refused.value)


def test_a_head_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="distiller_cifar head needs features of at least 3×3, there are 2×2"):
        ResNetExits(small_backbone(), [4], "distiller_cifar", (3, 8, 8))


def test_earlier_heads_are_deeper():
    network = ResNetExits(small_backbone(), [0, 1, 2, 3, 4], "conv", SHAPE)
    convolutions = [[m for m in head.modules() if isinstance(m, nn.Conv2d)] for head in network.exit_heads]
    assert [len(convs) for convs in convolutions] == [3, 3, 3, 2, 1]
    assert [convs[0].weight.shape[:2] for convs in convolutions] == [(8, 4), (8, 4), (16, 8), (16, 8), (32, 16)]
    wide = ResNetExits(small_backbone(width=16), [4], "conv", SHAPE)
    assert wide.exit_heads[0][0].weight.shape[:2] == (64, 64)


def test_building_leaves_the_backbone_alone():
    backbone = small_backbone().train()
    before = backbone.content_hash()
    ResNetExits(backbone, [1, 3], "conv", SHAPE)
    assert backbone.training and backbone.content_hash() == before


def test_over_a_frozen_backbone_only_the_heads_learn(images):
    backbone = small_backbone().freeze()
    network = ResNetExits(backbone, [1, 3], "conv", SHAPE).train()
    before = backbone.content_hash()
    network(images).square().sum().backward()
    assert not backbone.training and network.exit_heads.training
    assert backbone.content_hash() == before
    assert {name.split(".")[0] for name, p in network.named_parameters() if p.grad is not None} == {"exit_heads"}


@pytest.mark.parametrize(("depth", "millions"), [(20, 40.83), (32, 69.14), (110, 253.17)])
def test_distiller_s_exits_on_cifar(depth, millions):
    """Cumulative MACs of its resnet*_cifar_earlyexit."""
    network = ResNetExits(CifarResNet(depth, 10, "B"), ["layer1.2.relu2"], "distiller_cifar")
    assert network.exit_heads[0][-1].in_features == 1600
    costs = count_exit_costs(network, (3, 32, 32))
    assert costs.cumulative_N.tolist() == pytest.approx([14.61e6, millions * 1e6], rel=0.001)


def test_distiller_s_exits_on_resnet50():
    """Cumulative MACs of its resnet50_earlyexit; without the exits it is torchvision's ResNet-50."""
    shape = (3, 224, 224)
    network = ResNetExits(
        TorchvisionResNet(50), ["layer1.2.relu3", "layer2.3.relu3"], "distiller_imagenet", image_shape=shape
    )
    assert network.exits == (2, 6)
    assert [head[-1].in_features for head in network.exit_heads] == [1960, 588]
    costs = count_exit_costs(network, shape)
    assert costs.cumulative_N.tolist() == pytest.approx([886.3e6, 1973.5e6, 4249.1e6], rel=0.001)
    assert costs.head_N[:2].tolist() == pytest.approx([100.3e6, 59.6e6], rel=0.001)
    assert costs.straight_N[-1].item() == pytest.approx(4089e6, rel=0.001)


def test_only_some_exits_keep_their_own_heads(images):
    network = with_statistics(ResNetExits(small_backbone(), [0, 2, 4], ["pooled", "conv", "linear"], SHAPE)).eval()
    fewer = network.only([1])
    assert fewer.exits == (2,) and fewer.architecture["exits"] == [2] and fewer.architecture["heads"] == ["conv"]
    assert torch.equal(fewer(images), network(images)[:, [1, 3]])
    assert network.num_exits == 4 and network.only([]).num_exits == 1


def test_distiller_s_imagenet_heads_widen_by_two_channels_from_exit_to_exit():
    heads = [HEADS["distiller_imagenet"]((8, 16, 16), 5, n, 1) for n in range(3)]
    assert [head[0].out_channels for head in heads] == [10, 12, 14]
