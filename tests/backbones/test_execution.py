"""Sparse and dense execution are one network; a dropped block costs nothing and leaves no trace."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from policyskip import memory
from policyskip.backbones import count_costs, dense, folding, sparse, sparse_many
from policyskip.backbones.base import Backbone, Block
from policyskip.backbones.costs import count_macs
from policyskip.backbones.execution import append, leaders, put_, take
from policyskip.backbones.folding import folded
from policyskip.backbones.resnet import CifarResNet, PoolShortcut, SubsampleShortcut, TorchvisionResNet
from policyskip.errors import UserError
from tests.conftest import small_backbone, with_statistics

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def random_keep(B: int, K: int, rate: float = 0.5) -> Tensor:
    return torch.rand(B, K, generator=torch.Generator().manual_seed(1)) < rate


def plain_forward(backbone: Backbone, images: Tensor) -> Tensor:
    """The network as its authors would write it, with no word about keeping."""
    x = backbone.stem((images / 255 - backbone.mean) / backbone.std)
    for block in backbone.blocks:
        x = torch.relu(block.residual(x) + block.shortcut(x))
    return backbone.head(x)


@pytest.mark.parametrize("shortcut", ["A", "pool", "B"])
@pytest.mark.parametrize("execute", [dense, sparse])
def test_all_ones_is_the_plain_network(shortcut, execute, images):
    backbone = small_backbone(shortcut=shortcut)
    keep_BK = torch.ones(len(images), backbone.num_blocks, dtype=torch.bool)
    with torch.no_grad():
        torch.testing.assert_close(execute(backbone, images, keep_BK), plain_forward(backbone, images), **TOLERANCE)
        torch.testing.assert_close(backbone(images), plain_forward(backbone, images), **TOLERANCE)


@pytest.mark.parametrize("shortcut", ["A", "pool", "B"])
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.7, 1.0])
def test_sparse_is_dense(shortcut, rate, images):
    backbone = small_backbone(shortcut=shortcut)
    keep_BK = random_keep(len(images), backbone.num_blocks, rate)
    with torch.no_grad():
        torch.testing.assert_close(sparse(backbone, images, keep_BK), dense(backbone, images, keep_BK), **TOLERANCE)


@pytest.mark.parametrize("depth", [18, 50])
def test_sparse_is_dense_in_torchvision_networks(depth):
    torch.manual_seed(0)
    backbone = TorchvisionResNet(depth, 4).eval()
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    keep_BK = random_keep(3, backbone.num_blocks)
    with torch.no_grad():
        torch.testing.assert_close(sparse(backbone, images, keep_BK), dense(backbone, images, keep_BK), **TOLERANCE)


def test_one_image_and_batch_composition_do_not_matter(backbone, images):
    keep_BK = random_keep(len(images), backbone.num_blocks)
    with torch.no_grad():
        together = sparse(backbone, images, keep_BK)
        alone = torch.cat([sparse(backbone, images[i : i + 1], keep_BK[i : i + 1]) for i in range(len(images))])
    torch.testing.assert_close(together, alone, **TOLERANCE)


def test_many_decisions_in_one_pass(backbone, images):
    keep_SBK = torch.stack([random_keep(len(images), backbone.num_blocks, rate) for rate in (0.2, 0.8, 1.0)])
    with torch.no_grad():
        together = sparse_many(backbone, images, keep_SBK)
        apart = torch.stack([sparse(backbone, images, keep_BK) for keep_BK in keep_SBK])
    torch.testing.assert_close(together, apart, **TOLERANCE)


def test_what_decisions_have_in_common_is_computed_once(backbone, images):
    """Image 0: three equal decisions. Image 1: they part at block 2. Image 2: one is alone from block 0 on."""
    rows = [[] for _ in backbone.blocks]
    for block, seen in zip(backbone.blocks, rows, strict=True):
        block.residual.register_forward_hook(lambda module, args, output, seen=seen: seen.append(len(output)))
    keep_SBK = torch.ones(3, 3, backbone.num_blocks, dtype=torch.bool)
    keep_SBK[2, 1, 2] = False
    keep_SBK[1, 2, 0] = False
    with torch.no_grad():
        together = sparse_many(backbone, images[:3], keep_SBK)
        assert rows == [[3], [4], [4], *[[5]] * (backbone.num_blocks - 3)]
        apart = torch.stack([sparse(backbone, images[:3], keep_BK) for keep_BK in keep_SBK])
    torch.testing.assert_close(together, apart, **TOLERANCE)


@pytest.mark.parametrize("fold", [False, True])
def test_many_decisions_are_dense_with_their_gradients(fold, images):
    """Some begin alike and part later; channels last, where the network is folded."""
    backbone = small_backbone(shortcut="B")
    backbone = folded(backbone) if fold else backbone
    keep_SBK = torch.stack([random_keep(len(images), backbone.num_blocks)] * 3)
    keep_SBK[1, :4, 3:] ^= True
    keep_SBK[2, 2:, 1] ^= True
    x = (images.float() / 255).requires_grad_()
    logits, gradients = [], []
    for run in (sparse_many, lambda b, i, keep: torch.stack([dense(b, i, keep_BK) for keep_BK in keep])):
        logits_SBC = run(backbone, x, keep_SBK)
        logits.append(logits_SBC.detach())
        gradients.append(torch.autograd.grad(logits_SBC.square().sum(), x)[0])
    torch.testing.assert_close(*logits, **TOLERANCE)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_leaders_by_hand():
    keep_SBK = torch.tensor([[[1, 1, 0]], [[1, 0, 0]], [[0, 1, 0]], [[1, 0, 1]]], dtype=torch.bool)  # one image
    leader_SB, leaders_by_block = torch.zeros(4, 1, dtype=torch.int64), []
    for keep_SB in keep_SBK.unbind(2):
        leader_SB = leaders(leader_SB, keep_SB)
        leaders_by_block.append(leader_SB.flatten().tolist())
    assert leaders_by_block == [[0, 0, 2, 0], [0, 1, 2, 1], [0, 1, 2, 3]]


def test_a_dropped_block_leaves_the_shortcut_without_relu():
    """By hand: drop everything in a network whose only strided shortcuts are projections that give negative values."""
    backbone = small_backbone(depth=8, shortcut="B")
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        x = backbone.features(images)
        x = backbone.blocks[1].shortcut(x)
        assert (x < 0).any(), "the test needs negative values that a ReLU would remove"
        expected = backbone.head(backbone.blocks[2].shortcut(x))
        none = torch.zeros(2, 3, dtype=torch.bool)
        torch.testing.assert_close(sparse(backbone, images, none), expected, **TOLERANCE)
        torch.testing.assert_close(dense(backbone, images, none), expected, **TOLERANCE)


@pytest.mark.parametrize("execute", [dense, sparse])
def test_nan_in_a_dropped_block_does_not_reach_the_output(execute, backbone, images):
    nn.init.constant_(backbone.blocks[2].residual.conv1.weight, float("nan"))
    keep_BK = torch.ones(len(images), backbone.num_blocks, dtype=torch.bool)
    keep_BK[:3, 2] = False
    with torch.no_grad():
        finite = torch.isfinite(execute(backbone, images, keep_BK)).all(1)
    assert finite.tolist() == [True] * 3 + [False] * (len(images) - 3)


def test_gradients_of_both_ways_agree(backbone, images):
    keep_BK = random_keep(len(images), backbone.num_blocks)
    gradients = []
    for execute in (dense, sparse):
        backbone.zero_grad()
        execute(backbone, images, keep_BK).square().sum().backward()
        gradients.append([p.grad.clone() for p in backbone.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_dropped_block_is_not_computed(backbone, images):
    rows = []
    backbone.blocks[1].residual.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    keep_BK = torch.zeros(len(images), backbone.num_blocks, dtype=torch.bool)
    keep_BK[[0, 4], 1] = True
    with torch.no_grad():
        sparse(backbone, images, keep_BK)
    assert rows == [2]


@pytest.mark.parametrize(
    "keep", [torch.ones(7, 5, dtype=torch.bool), torch.ones(6, 6, dtype=torch.bool), torch.ones(7, 6)]
)
def test_a_wrong_keep_matrix_is_refused(keep, backbone, images):
    with pytest.raises(ValueError, match="keep must be bool of shape"):
        sparse(backbone, images, keep)


def test_depths(images):
    assert [CifarResNet(depth, 10).num_blocks for depth in (8, 20, 32, 110)] == [3, 9, 15, 54]
    for depth in (7, 21, 2):
        with pytest.raises(ValueError, match="6n\\+2"):
            CifarResNet(depth, 10)


def test_frozen_stays_frozen(backbone, images):
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    hash_before = backbone.content_hash()
    backbone.freeze().train()
    sparse(backbone, images, random_keep(len(images), backbone.num_blocks))
    assert not backbone.training and not any(p.requires_grad for p in backbone.parameters())
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())
    assert backbone.content_hash() == hash_before
    with torch.no_grad():
        backbone.head.linear.bias[0] += 1e-6
    assert backbone.content_hash() != hash_before


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_sparse_is_dense_in_every_precision(dtype, tolerance, images):
    backbone = small_backbone(shortcut="B").to(dtype)
    keep_BK = random_keep(len(images), backbone.num_blocks)
    with torch.no_grad():
        logits_BC = sparse(backbone, images, keep_BK)
        assert logits_BC.dtype == dtype
        torch.testing.assert_close(logits_BC, dense(backbone, images, keep_BK), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shortcut", ["A", "pool", "B"])
def test_a_folded_copy_gives_the_same_and_leaves_the_network_alone(shortcut, images):
    backbone = with_statistics(small_backbone(shortcut=shortcut))
    before, keep_BK = backbone.content_hash(), random_keep(len(images), backbone.num_blocks)
    copy = folded(backbone)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in copy.modules())
    with torch.no_grad():
        for execute in (sparse, dense):
            expected = execute(backbone, images, keep_BK)
            torch.testing.assert_close(execute(copy, images, keep_BK), expected, rtol=1e-4, atol=1e-4)
    assert backbone.content_hash() == before and backbone.blocks[0].residual.relu.inplace is False


def test_what_follows_a_convolution_in_one_pass_is_the_same_and_costs_the_same(monkeypatch, images):
    """Where torch has no such operation, it is done in several; the counter of MACs sees either."""
    monkeypatch.setattr(folding, "LARGE", 0)
    for kind in ("A", "B"):
        backbone = with_statistics(small_backbone(shortcut=kind))
        copy, keep_BK = folded(backbone), random_keep(len(images), backbone.num_blocks)
        ways, costs = [], []
        for has in (True, False):
            monkeypatch.setattr(folding, "_has_one_pass", lambda dtype, has=has: has)
            with torch.no_grad():
                ways.append([copy(images), sparse(copy, images, keep_BK), sparse(copy, images[:1], keep_BK[:1])])
                ways[-1].append(torch.tensor(count_macs(copy, images[:1])))
            costs.append(count_costs(copy, (3, *images.shape[2:])))
        torch.testing.assert_close(*ways, rtol=1e-5, atol=1e-5)
        expected = count_costs(backbone, (3, *images.shape[2:]))
        for cost in costs:
            assert cost.always == expected.always and torch.equal(cost.block_K, expected.block_K)


def test_one_image_that_drops_blocks_keeps_their_shortcuts_as_they_are():
    """A projection, with no ReLU behind it."""
    backbone = small_backbone(depth=8, shortcut="B")
    image = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    nothing = torch.zeros(1, backbone.num_blocks, dtype=torch.bool)
    with torch.no_grad():
        torch.testing.assert_close(sparse(backbone, image, nothing), dense(backbone, image, nothing))


class Doubled(nn.Conv2d):
    """A convolution that does something of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_gradients_and_unusual_padding_take_the_long_way(monkeypatch, images):
    monkeypatch.setattr(folding, "LARGE", 0)
    copy = folded(with_statistics(small_backbone(shortcut="B")))
    x = (images.float() / 255).requires_grad_()
    assert torch.autograd.grad(copy(x).sum(), x)[0].abs().sum() > 0
    doubled = nn.Sequential(Doubled(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval()
    own = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()).eval()
    for layers in (doubled, own):
        torch.testing.assert_close(folded(layers)(x), layers(x))
    for padding in ({"padding": 1, "padding_mode": "reflect"}, {"padding": "same"}):
        layers = nn.Sequential(nn.Conv2d(3, 4, 3, **padding), nn.BatchNorm2d(4), nn.ReLU()).eval()
        with torch.no_grad():
            expected = layers(x)
            torch.testing.assert_close(folded(layers)(x), expected, rtol=1e-5, atol=1e-5)


def test_features_that_grow_keep_what_they_were(backbone, images):
    """Rows are appended; in a buffer that has room for them, the features are not copied again."""
    with torch.no_grad():
        x = backbone.features(images).to(memory_format=torch.channels_last)
        rows = torch.tensor([2, 2, 0])
        grown, buffer = append(x, rows, None, 12)
        assert torch.equal(grown, torch.cat([x, x[rows]])) and buffer.shape[0] == 12
        longer, same = append(grown, torch.tensor([8]), buffer, 12)
        assert same is buffer and longer.data_ptr() == grown.data_ptr()
        assert torch.equal(longer, torch.cat([grown, x[2:3]]))
    grown, buffer = append(x.requires_grad_(), rows, None, 12)
    assert buffer is None and grown.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(6, 16, 3, 3), (6, 3, 3, 3), (6, 1, 4, 4), (6, 5, 1, 1)], ids=str)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_rows_are_moved_to_the_bit(dtype, shape, layout):
    """Of any size and type, where sixteen bytes can be moved at a time and where they cannot; NaN and all."""
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(shape, dtype=dtype, generator=draw).contiguous(memory_format=layout) for _ in range(2))
    x[1, 0, 0, 0], y[4, 0, 0, 0] = torch.nan, torch.inf
    rows = torch.tensor([4, 1, 2])
    for source in (x, x[1:]):  # the second begins within its memory
        expected = source.clone()
        expected[rows] = y[rows]
        with torch.no_grad():
            moved = put_(source, rows, take(y, rows))
            assert take(y, rows[:0]).shape == (0, *shape[1:])
        assert moved.data_ptr() == source.data_ptr()
        torch.testing.assert_close(moved, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("largest", "expected"), [(2**40, [2**30, 2**30]), (2**25, [2**30, 2**25, 2**30]), (0, [2**30, 2**25])]
)
def test_freed_memory_is_kept_as_far_as_the_system_lets(monkeypatch, largest, expected):
    """Where no size for tensors in the heap is accepted, trimming must stay as it was: setting it freezes that size."""
    calls = []

    def mallopt(option: int, value: int) -> int:
        calls.append((option, value))
        return int(value <= largest)

    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    memory.keep_freed_memory()
    assert [value for _, value in calls] == expected
    options = [-3] * (len(expected) - bool(largest)) + [-1] * bool(largest)  # as in malloc.h
    assert [option for option, _ in calls] == options


def test_a_network_that_is_not_finite_is_not_folded(backbone):
    """oneDNN's ReLU would hide it, and only in large batches."""
    backbone.blocks[1].residual[0].weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match=r"its blocks\.1\.residual\.conv1\.weight holds numbers that are not finite"):
        folded(backbone)


def test_a_network_in_half_the_bits_is_counted_and_hashed(backbone):
    """With the same costs, and as another network."""
    rough = copy.deepcopy(backbone).bfloat16()
    assert torch.equal(count_costs(rough, (3, 12, 12)).block_K, count_costs(backbone, (3, 12, 12)).block_K)
    assert rough.content_hash() != backbone.content_hash()


@pytest.mark.parametrize("large", [0, 2**40])
def test_features_that_are_needed_are_left_alone(monkeypatch, images, large):
    """Features that are not needed are overwritten, and the results are the same; also where the residual is a single
    convolution, which must not read what it has written."""
    monkeypatch.setattr(folding, "LARGE", large)
    alone = Block(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)), nn.Identity())
    network = nn.ModuleList([alone, *small_backbone(shortcut="B").blocks])
    x = torch.rand(len(images), 4, 12, 12)
    for block in folded(network):
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            before, after = x.clone(), block(x)
            assert torch.equal(x, before)
            written_over = block(x.clone(memory_format=torch.preserve_format), inplace=True)
            torch.testing.assert_close(written_over, after, rtol=0, atol=0)
            torch.testing.assert_close(after, torch.relu(block.shortcut(x) + block.residual(x)), **TOLERANCE)
        x = after


def test_shortcuts_without_weights_by_hand():
    """Two channels of 3×3 pixels become five of 2×2. "pool" averages windows of 2×2, fewer at the edge, and adds the zero
    channels behind; "A" takes every second pixel, and adds one zero channel in front and two behind."""
    x = torch.arange(18.0).view(1, 2, 3, 3)
    pooled = [[[2.0, 3.5], [6.5, 8.0]], [[11.0, 12.5], [15.5, 17.0]]]
    taken = [[[0.0, 2.0], [6.0, 8.0]], [[9.0, 11.0], [15.0, 17.0]]]
    nothing = [[0.0, 0.0], [0.0, 0.0]]
    assert PoolShortcut(2, 5, 2)(x)[0].tolist() == [*pooled, nothing, nothing, nothing]
    assert SubsampleShortcut(2, 5, 2)(x)[0].tolist() == [nothing, *taken, nothing, nothing]


def test_stages_halve_the_size_and_double_the_channels_at_their_first_block():
    convolutions = [block.residual.conv1 for block in CifarResNet(20, 10, width=4).blocks]
    assert [conv.stride[0] for conv in convolutions] == [1, 1, 1, 2, 1, 1, 2, 1, 1]
    assert [conv.out_channels for conv in convolutions] == [4, 4, 4, 8, 8, 8, 16, 16, 16]


def test_fresh_convolutions_are_scaled_by_their_fan_out():
    """He et al. (2015): √(2 / (9 · 64)) for a 3×3 convolution to 64 channels, whatever it reads."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stem = CifarResNet(8, 10, width=64).stem.conv
    assert stem.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.1)
