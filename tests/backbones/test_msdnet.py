"""MSDNet against the published tables, by hand, and against a plain recursion over its grid."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from policyskip.backbones.msdnet import Grid, MSDNet, bottleneck, count_with_and_without_lazy
from policyskip.errors import UserError
from tests.conftest import small_images, with_statistics

CIFAR, IMAGENET = (3, 32, 32), (3, 224, 224)
FOUR_SCALES: dict[str, Any] = dict(
    step_mode="even",
    channels=32,
    growth_rate=16,
    growth_factors=(1, 2, 4, 4),
    bottleneck_factors=(1, 2, 4, 4),
    stem="imagenet",
    head_channels=0,
)


def small(**changed: Any) -> MSDNet:
    torch.manual_seed(0)
    arguments = dict(num_classes=5, num_exits=3, channels=4, growth_rate=2, head_channels=8) | changed
    return with_statistics(MSDNet(**arguments)).eval()  # type: ignore[return-value]


# Costs


def operations(network: MSDNet, image_shape: tuple[int, int, int]) -> list[float]:
    """Millions of operations to each exit as the authors' counter has them, all live scales and heads on the way in:
    MACs of convolutions and linear layers, the biases of the latter, every ReLU's elements, every pooled pixel."""
    count, cumulative = 0, []

    def add(module: Any, args: tuple[Tensor], output: Tensor) -> None:
        nonlocal count
        match module:
            case nn.Conv2d():
                count += output.numel() * module.in_channels * module.kernel_size[0] ** 2
            case nn.Linear():
                count += (module.in_features + 1) * module.out_features
            case nn.MaxPool2d():
                count += output.numel() * 9
            case nn.ReLU() | nn.AdaptiveAvgPool2d():
                count += args[0].numel()

    for module in network.modules():
        module.register_forward_hook(add)
    network.eval().lazy = False
    with torch.no_grad():
        state = network.begin(torch.zeros(1, *image_shape))
        for n in range(network.num_exits):
            state = network.segment(n, state)
            network.head(n, state)
            cumulative.append(count / 1e6)
    return cumulative


@pytest.mark.parametrize(
    ("arguments", "layers", "parameters", "millions"),
    [
        (
            dict(num_classes=100, num_exits=7, base=4, step=2, step_mode="even"),
            (4, 6, 8, 10, 12, 14, 16),
            3.068,
            [15.14, 25.51, 37.10, 46.33, 57.34, 66.96, 75.94],
        ),
        (
            dict(num_classes=10, num_exits=10, base=4, step=2, step_mode="even"),
            (4, 6, 8, 10, 12, 14, 16, 18, 20, 22),
            4.840,
            [15.13, 25.48, 37.75, 52.02, 62.12, 74.00, 87.65, 99.95, 110.02, 121.56],
        ),
        (
            dict(num_classes=100, num_exits=5),
            (1, 3, 6, 10, 15),
            2.079,
            [6.86, 14.35, 27.54, 41.71, 58.48],
        ),
        (
            dict(num_classes=10, num_exits=7),
            (1, 3, 6, 10, 15, 21, 28),
            3.885,
            [6.85, 14.33, 27.26, 48.40, 76.37, 108.78, 137.20],
        ),
    ],
    ids=["CIFAR-100 anytime", "CIFAR-10 anytime", "CIFAR-100 budgeted", "CIFAR-10 budgeted"],
)
def test_published_cifar_networks(arguments, layers, parameters, millions):
    network = MSDNet(**arguments)
    assert network.grid.exit_layers == layers
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(parameters * 1e6, rel=0.001)
    assert operations(network, CIFAR) == pytest.approx(millions, rel=0.001)


@pytest.mark.parametrize(
    ("k", "parameters", "millions"),
    [
        (4, 23.958, [339.90, 685.46, 1008.16, 1254.47, 1360.53]),
        pytest.param(6, 56.529, [514.66, 1171.18, 1844.52, 2501.40, 2742.06], marks=pytest.mark.slow),
        pytest.param(7, 62.314, [615.69, 1436.39, 2283.21, 2967.42, 3253.79], marks=pytest.mark.slow),
    ],
)
def test_published_imagenet_networks(k, parameters, millions):
    network = MSDNet(num_classes=1000, num_exits=5, base=k, step=k, **FOUR_SCALES)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(parameters * 1e6, rel=0.001)
    assert operations(network, IMAGENET) == pytest.approx(millions, rel=0.001)


def test_macs_with_and_without_lazy_evaluation():
    """The CIFAR-100 network of five exits: MACs alone. At the last exit nothing is left to be deferred."""
    lazy, eager = count_with_and_without_lazy(MSDNet(num_classes=100, num_exits=5), CIFAR)
    assert (eager.cumulative_N / 1e6).tolist() == pytest.approx([6.79, 14.21, 27.28, 41.37, 58.09], rel=0.001)
    assert (lazy.trunk_N.cumsum(0) / 1e6).tolist() == pytest.approx([3.69, 7.31, 16.65, 28.03, 41.51], rel=0.001)
    for costs in (lazy, eager):
        assert (costs.head_N / 1e6).tolist() == pytest.approx([2.22, 3.11, 2.52, 4.29, 4.44], rel=0.003)
    assert (lazy.cumulative_N < eager.cumulative_N).tolist() == [True] * 4 + [False]
    assert lazy.full == eager.full


def test_counting_leaves_the_choice_of_lazy_alone():
    for choice in (True, False):
        network = small(lazy=choice, num_exits=1)
        count_with_and_without_lazy(network, (3, 8, 8))
        assert network.lazy is choice


# The grid


def test_exits_sit_where_the_step_modes_say():
    assert small(base=3, step=2, step_mode="even").grid.exit_layers == (3, 5, 7)
    assert small(base=3, step=2, step_mode="lin_grow").grid.exit_layers == (3, 6, 11)


def test_scales_are_dropped_at_even_intervals():
    """Prune max, 8 layers, 3 scales: an interval of 3, and a transition after each layer that loses a scale."""
    grid = Grid((2, 5, 8), 3, "max")
    assert [list(grid.live(layer)) for layer in range(9)] == [[0, 1, 2]] * 4 + [[1, 2]] * 3 + [[2]] * 2
    assert grid.transitions == {4, 7}
    assert grid.inputs((3, 0)) == [(2, 0)]
    assert grid.inputs((3, 1)) == [(2, 1), (2, 0)]
    assert grid.inputs((4, 1)) == [(3, 1), (3, 0)]  # the dropped scale is read once more
    assert grid.inputs((5, 1)) == [(4, 1)]
    assert grid.inputs((0, 2)) == [(0, 1)]


def test_scales_are_dropped_as_late_as_possible():
    """Prune min, 7 layers, 3 scales: layer L keeps the coarsest, L-1 two; transitions after ⌊7/3⌋ and ⌊14/3⌋."""
    grid = Grid((3, 7), 3, "min")
    assert [list(grid.live(layer)) for layer in range(8)] == [[0, 1, 2]] * 6 + [[1, 2], [2]]
    assert grid.transitions == {2, 4}
    assert grid.inputs((6, 1)) == [(5, 1), (5, 0)] and grid.inputs((7, 2)) == [(6, 2), (6, 1)]


def test_the_plan_of_a_small_grid_by_hand():
    """Two scales, exits after layers 1 and 3; an interval of 2, so layer 3 has lost the finest scale."""
    grid = Grid((1, 3), 2, "max")
    first, second = grid.plan(lazy=True)
    assert first == ([(0, 1), (1, 1)], {(0, 0), (1, 1)})  # the stem's finest scale is needed again
    assert second == ([(1, 0), (2, 0), (2, 1), (3, 1)], {(3, 1)})
    first, second = grid.plan(lazy=False)
    assert first == ([(0, 1), (1, 0), (1, 1)], {(1, 0), (1, 1)})
    assert second == ([(2, 0), (2, 1), (3, 1)], {(3, 1)})


def test_nodes_that_no_exit_needs_do_not_exist():
    """Four layers of three scales: intervals of 2, so two scales are live to the end, and the finer one ends early."""
    grid = Grid((4,), 3, "max")
    assert list(grid.live(4)) == [1, 2]
    assert (4, 1) not in grid.nodes and (3, 1) in grid.nodes and grid.nodes[-1] == (4, 2)


def test_widths_by_hand():
    """Channels 4, growth 2, factors 1-2-4, one exit after each of 6 layers: transitions after layers 3 and 5 halve."""
    network = small(num_exits=6, step_mode="even", bottleneck_factors=(1, 2, 4))
    width = [4, 6, 8, (8 + 2) // 2, 7, (7 + 2) // 2, 6]
    assert [head[0][0].in_channels for head in network.heads] == [4 * w for w in width[1:]]
    node = network.nodes["layer2_scale1"]
    # 2·2 new channels, half from each side; a bottleneck is the reading scale's factor wide, the input's at most
    assert [(conv[0].in_channels, conv[0].out_channels) for conv in node.down] == [(6, 2), (2, 2)]
    assert [(conv[0].in_channels, conv[0].out_channels) for conv in node.normal] == [(12, 4), (4, 2)]
    assert node.down[1][0].stride == (2, 2) and node.normal[1][0].stride == (1, 1) and node.transition is None
    finest = network.nodes["layer2_scale0"]
    assert finest.down is None and finest.normal[1][0].out_channels == 2
    assert network.nodes["layer3_scale2"].transition[0].weight.shape == (20, 40, 1, 1)
    doubled = small(growth_factors=(2, 4, 8))
    assert [doubled.nodes[f"layer0_scale{s}"][0].weight.shape[:2] for s in range(3)] == [(8, 3), (16, 8), (32, 16)]


# What it computes


def recursive(network: MSDNet, images: Tensor, layer: int, scale: int, L: int) -> Tensor:
    """The output of a node by the definition, with nothing remembered: layer ``layer`` of L at ``scale``."""
    S, interval = 3, -(-L // 3)

    def finest(layer: int) -> int:
        return max(0, layer - 1) // interval

    module = network.nodes[f"layer{layer}_scale{scale}"]
    if layer == 0:
        x = (images / 255 - network.mean) / network.std
        for s in range(scale + 1):
            x = network.nodes[f"layer0_scale{s}"](x)
        return x
    same = recursive(network, images, layer - 1, scale, L)
    parts = [same]
    if scale > finest(layer - 1):
        parts.append(module.down(recursive(network, images, layer - 1, scale - 1, L)))
    x = torch.cat([*parts, module.normal(same)], 1)
    dropped = finest(layer) > finest(layer - 1)
    assert (module.transition is not None) == dropped and scale < S
    return module.transition(x) if dropped else x


@pytest.mark.parametrize("lazy", [True, False])
def test_the_grid_is_its_definition(lazy):
    network, images = small(lazy=lazy, num_exits=3, base=2, step=2, step_mode="even"), small_images(3, size=12).images
    with torch.no_grad():
        expected = [network.heads[n](recursive(network, images, layer, 2, 6)) for n, layer in enumerate((2, 4, 6))]
        torch.testing.assert_close(network(images), torch.stack(expected, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prune", ["max", "min"])
@pytest.mark.parametrize("step_mode", ["even", "lin_grow"])
def test_lazy_or_not_the_logits_are_the_same_to_the_bit(prune, step_mode):
    network, images = small(prune=prune, step_mode=step_mode), small_images(4).images
    with torch.no_grad():
        lazy = network(images)
        network.lazy = False
        assert torch.equal(network(images), lazy)
    network.train()
    eager = network(images)
    network.lazy = True
    assert torch.equal(network(images), eager)  # also with the statistics of the batch


def test_the_first_exit_computes_its_cone_and_no_more():
    network, computed = small(), []
    for name, module in network.nodes.items():
        module.register_forward_hook(lambda module, args, output, name=name: computed.append(name))
    with torch.no_grad():
        state = network.segment(0, network.begin(small_images(2).images))
        assert computed == ["layer0_scale0", "layer0_scale1", "layer0_scale2", "layer1_scale2"]
        # What is deferred needs the stem's two finer scales; its coarsest has been read for the last time.
        assert set(state) == {(0, 0), (0, 1), (1, 2)}
        assert set(network.segment(2, network.segment(1, state))) == {(6, 2)}


@pytest.mark.parametrize("kind", ["three scales", "four scales"])
def test_images_of_any_size(kind):
    network = small(num_exits=2) if kind == "three scales" else small(**FOUR_SCALES | dict(num_exits=2, channels=4))
    for size in ((4, 4), (7, 7), (20, 20), (33, 33), (12, 20), (1, 1)):
        with torch.no_grad():
            logits_BNC = network(torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8))
        assert logits_BNC.shape == (2, 2, 5) and logits_BNC.isfinite().all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(step_mode="odd"), "step_mode must be even or lin_grow, got 'odd'"),
        (dict(prune="mean"), "prune must be max or min, got 'mean'"),
        (dict(stem="mnist"), "stem must be cifar or imagenet, got 'mnist'"),
        (dict(num_exits=0), "must be at least 1, .* got 0, 1, 1, 4, 2, 8 and 0.5"),
        (dict(head_channels=-1), "head_channels at least 0, .* got 3, 1, 1, 4, 2, -1 and"),
        (dict(reduction=0.0), r"reduction in \(0, 1\]; got .* and 0\.0"),
        (dict(mean=[0.5]), r"three numbers, .* got \[0\.5\]"),
        (dict(std=[1, 0, 1]), r"positive; got .* and \[1, 0, 1\]"),
        (dict(growth_factors=(1, 2)), r"one positive number for each scale, got \[1, 2\] and \[1, 2, 4\]"),
        (dict(growth_factors=(), bottleneck_factors=()), r"for each scale, got \[\] and \[\]"),
        (dict(growth_rate=3, growth_factors=(1, 3, 4)), r"must be even .* got 3 and \[1, 3, 4\]"),
    ],
)
def test_an_impossible_architecture_is_refused(changed, message):
    with pytest.raises(UserError, match=message) as refused:
        small(**changed)
    assert "\n" not in str(refused.value)


def test_a_bottleneck_is_no_wider_than_its_input():
    """Twice the eight channels of the output, but at most what it reads."""
    assert [bottleneck(read, 8, 2, 1)[0][0].out_channels for read in (4, 16, 64)] == [4, 16, 16]
