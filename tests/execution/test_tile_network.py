"""The tile kernels, in Triton's interpreter, against ``dense``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from policyskip.backbones.base import Backbone, Block
from policyskip.backbones.execution import dense
from policyskip.backbones.folding import ConvReLU, folded
from policyskip.backbones.resnet import TorchvisionResNet
from policyskip.execution.convolutions import packed
from policyskip.execution.tile_network import TileNetwork
from policyskip.execution.tilings import TILINGS, Tiling, choose, step_size
from tests.conftest import small_backbone, with_statistics
from tests.execution.residual import bottleneck, conv, network

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="runs in Triton's interpreter")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 3e-3}
"""Of logits about 1, against ``dense`` in float32; bfloat16 has 8 bits, and the interpreter cuts them off unrounded."""


def bottlenecks() -> Backbone:
    """Five bottlenecks of channels that are no powers of two: two projections, one of them strided."""
    return network(
        *(bottleneck(6, 5, 10), bottleneck(10, 5, 10), bottleneck(10, 5, 10)),
        *(bottleneck(10, 18, 36, 2), bottleneck(36, 18, 36)),
        out=36,
    )


def images(count: int = 3, height: int = 9, width: int = 7, seed: int = 0) -> Tensor:
    """Random images."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def decisions(*shape: int, seed: int = 1) -> Tensor:
    """Random decisions, half of the blocks kept."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def tiled(backbone: Backbone, dtype: torch.dtype = torch.float32) -> TileNetwork:
    """The network as tiles, in a precision."""
    fast = folded(backbone).to(dtype)
    assert TileNetwork.why_not(fast, (3, 9, 7)) == ""
    return TileNetwork(fast, (3, 9, 7), exact=True)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_bottlenecks_equal_dense_in_each_precision(dtype):
    backbone, pictures, keep_BK = bottlenecks(), images(), decisions(3, 5)
    expected = dense(folded(backbone), pictures, keep_BK)
    got = tiled(backbone, dtype).logits(pictures, keep_BK[None])[0]
    assert got.dtype == dtype and expected.abs().max() > 0.5
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=TOLERANCE[dtype] * float(expected.abs().max()))


@pytest.mark.parametrize("kept", [False, True])
def test_all_blocks_or_none(kept):
    backbone, pictures, keep_BK = bottlenecks(), images(2, 5, 6), torch.full((2, 5), kept)
    expected = dense(folded(backbone), pictures, keep_BK)
    torch.testing.assert_close(tiled(backbone).logits(pictures, keep_BK[None])[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shortcut", ["A", "pool", "B"])
def test_basic_blocks_equal_dense_with_every_shortcut(shortcut):
    backbone, pictures, keep_BK = small_backbone(8, shortcut=shortcut, width=6).freeze(), images(3), decisions(3, 3)
    expected = dense(folded(backbone), pictures, keep_BK)
    torch.testing.assert_close(tiled(backbone).logits(pictures, keep_BK[None])[0], expected, rtol=0, atol=1e-5)


def test_branches_of_other_shapes():
    """One convolution beside the identity, which reads what it would overwrite; beside a projection of three by
    three; uneven filters, strides and padding; no ReLU between two convolutions; a bias and no normalisation."""
    odd = nn.Sequential(
        *(nn.Conv2d(6, 20, (5, 2), (2, 1), (1, 0)), nn.Conv2d(20, 7, 1, padding=1), nn.ReLU(), nn.Conv2d(7, 7, 3)),
    )
    backbone = network(
        Block(nn.Sequential(*conv(6, 6, 3)), nn.Identity()),
        Block(nn.Sequential(*conv(6, 6)), nn.Identity()),
        Block(nn.Sequential(nn.Conv2d(6, 6, 3, padding=1)), nn.Conv2d(6, 6, 3, padding=1, bias=False)),
        Block(nn.Conv2d(6, 6, 1), nn.Sequential()),
        Block(odd, nn.Conv2d(6, 7, (5, 2), (2, 1), (1, 0))),
        out=7,
    )
    pictures = images(3)
    for keep_BK in (decisions(3, 5), torch.ones(3, 5, dtype=torch.bool)):
        expected = dense(folded(backbone), pictures, keep_BK)
        torch.testing.assert_close(tiled(backbone).logits(pictures, keep_BK[None])[0], expected, rtol=0, atol=1e-5)


def test_several_steps_of_input_and_several_tiles_of_output_channels():
    wide = nn.Sequential(*conv(6, 70), nn.ReLU(), *conv(70, 6, 3))
    backbone, pictures, keep_BK = network(Block(wide, nn.Identity()), out=6), images(2), torch.ones(2, 1) > 0
    expected = dense(folded(backbone), pictures, keep_BK)
    torch.testing.assert_close(tiled(backbone).logits(pictures, keep_BK[None])[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [1, 5, 1030], ids=["one", "few", "in two parts"])
def test_the_list_of_images(count):
    net, keep_BM = tiled(network(Block(nn.Conv2d(6, 6, 1), nn.Identity()), out=6)), decisions(count, 4)
    listing = net._list(keep_BM[:, 1:])  # a part of other decisions, not contiguous
    assert listing.counts.tolist() == keep_BM[:, 1:].sum(0).tolist() and listing.images == count
    for keep_B, rows_B in zip(keep_BM[:, 1:].T, listing.rows, strict=True):
        assert rows_B.tolist() == [*keep_B.nonzero()[:, 0].tolist(), *(~keep_B).nonzero()[:, 0].tolist()]


def test_several_decisions_an_image():
    backbone, pictures, keep_SBK = small_backbone(8, width=4).freeze(), images(2), decisions(3, 2, 3)
    expected = torch.stack([dense(folded(backbone), pictures, keep_BK) for keep_BK in keep_SBK])
    torch.testing.assert_close(tiled(backbone).logits(pictures, keep_SBK), expected, rtol=0, atol=1e-5)


def test_in_pieces_and_with_decisions_that_are_a_part_of_others():
    backbone, pictures, keep_BK = bottlenecks(), images(), decisions(3, 5)
    net = tiled(backbone)
    whole = net.advance(net.features(pictures), keep_BK, 0)
    x = net.features(pictures)
    for first, last in ((0, 2), (2, 3), (3, 3), (3, 5)):
        x = net.advance(x, keep_BK[:, first:last], first)
    assert torch.equal(x, whole)
    assert whole.is_contiguous(memory_format=torch.channels_last)


def test_a_result_depends_on_its_own_image_alone():
    """To the bit: beside other images with other decisions, in another place, and alone."""
    backbone = network(bottleneck(6, 5, 10, 2), bottleneck(10, 5, 10))
    pictures, keep_BK = images(4), torch.tensor([[1, 1], [0, 1], [1, 1], [1, 0]]) > 0
    net = tiled(backbone)
    x = net.features(pictures)
    whole = net.advance(x.clone(), keep_BK, 0)
    order = torch.tensor([3, 0, 2, 1])
    assert torch.equal(net.advance(x[order], keep_BK[order], 0), whole[order])
    for i in range(4):
        assert torch.equal(net.advance(x[i : i + 1].clone(), keep_BK[i : i + 1], 0), whole[i : i + 1])


@pytest.mark.parametrize("block", [1, 3], ids=["identity", "projection"])
def test_nan_in_a_skipped_branch_stays_out(block):
    backbone, pictures, keep_BK = bottlenecks(), images(3, 5, 6), decisions(3, 5)
    keep_BK[:, block] = torch.tensor([True, False, True])
    expected = dense(folded(backbone), pictures, keep_BK)
    fast = folded(backbone)
    for parameter in fast.blocks[block].residual.parameters():
        parameter.fill_(float("nan"))
    got = TileNetwork(fast, (3, 9, 7), exact=True).logits(pictures, keep_BK[None])[0]
    torch.testing.assert_close(got[1], expected[1], rtol=0, atol=1e-5)
    assert got[[0, 2]].isnan().all()  # and the kept branch was computed


def test_no_images():
    backbone = bottlenecks()
    net = tiled(backbone)
    x = net.advance(net.features(images(0)), decisions(0, 5), 0)
    assert x.shape == (0, 36, 5, 4)
    assert net.logits(images(0), decisions(2, 0, 5)).shape == (2, 0, 5)


@pytest.mark.parametrize("floats", [False, True])
@pytest.mark.parametrize(
    "pool",
    [nn.MaxPool2d(3, 2, 1), nn.MaxPool2d((3, 2), (1, 2)), nn.MaxPool2d(2, ceil_mode=True), nn.MaxPool2d(2, dilation=2)],
    ids=str,
)
def test_features_are_those_of_the_network(pool, floats):
    """With a stem that pools at its end, as torchvision's do."""
    backbone = network(Block(nn.Conv2d(6, 6, 1), nn.Identity()), out=6)
    backbone.stem.append(pool)
    pictures = images(2) / 255 if floats else images(2)
    fast = folded(backbone)
    assert [type(layer) for layer in fast.stem] == [ConvReLU, nn.MaxPool2d]
    got = TileNetwork(fast, (3, 9, 7)).features(pictures)
    torch.testing.assert_close(got, fast.features(pictures), rtol=0, atol=1e-5)
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_a_network_that_normalises_in_a_way_of_its_own_is_asked():
    class Halved(Backbone):
        def normalise(self, images: Tensor) -> Tensor:
            return images.float() / 2

    backbone = network(Block(nn.Conv2d(6, 6, 1), nn.Identity()), out=6)
    backbone.__class__ = Halved
    fast = folded(backbone)
    assert torch.equal(TileNetwork(fast, (3, 9, 7)).features(images()), fast.features(images()))


@pytest.mark.slow
@pytest.mark.parametrize("depth", [18, 50])
def test_torchvision_networks_equal_dense(depth):
    backbone = TorchvisionResNet(depth, 5)
    with_statistics(backbone).freeze()
    pictures, keep_BK = images(2, 33, 32), decisions(2, backbone.num_blocks)
    expected = dense(folded(backbone), pictures, keep_BK)
    got = tiled(backbone).logits(pictures, keep_BK[None])[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


# What does not fit


class OtherJoin(Block):
    """A block that joins its branch in a way of its own."""


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (Block(nn.Conv2d(6, 6, 1, groups=2), nn.Identity()), "the branch of its block 0 has a convolution in 2 groups"),
        (Block(nn.Conv2d(6, 6, 3, padding=2, dilation=2), nn.Identity()), "has a dilated convolution"),
        (Block(nn.Conv2d(6, 6, 3, padding="same"), nn.Identity()), "other than a number of zeros"),
        (Block(nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect"), nn.Identity()), "other than a number of zeros"),
        (Block(nn.Sequential(nn.Conv2d(6, 6, 1), nn.GELU(), nn.Conv2d(6, 6, 1)), nn.Identity()), "of type GELU"),
        (Block(nn.Sequential(nn.ReLU(), nn.Conv2d(6, 6, 1)), nn.Identity()), "that does not follow a convolution"),
        (Block(nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU()), nn.Identity()), "has a ReLU at its end"),
        (Block(nn.Sequential(), nn.Identity()), "has no convolution"),
        (OtherJoin(nn.Conv2d(6, 6, 1), nn.Identity()), "its block 0 is of the kind OtherJoin"),
    ],
)
def test_why_not_says_what_does_not_fit(block, reason):
    assert reason in TileNetwork.why_not(folded(network(block, out=6)), (3, 9, 7))


def test_why_not_says_that_weights_are_double():
    backbone = folded(network(Block(nn.Conv2d(6, 6, 1), nn.Identity()), out=6)).double()
    assert TileNetwork.why_not(backbone, (3, 9, 7)) == "its weights are float64"


# How it is cut into tiles


def test_the_tiling_is_that_whose_slowest_multiprocessor_ends_first():
    large, small = Tiling(128, 128, 64, 8, 3, 2, 1.0), Tiling(64, 64, 64, 4, 4, 2, 0.5)
    # 8 tiles of 128 by 128 in one round; 32 of 64 by 64 in four, at half the speed
    assert choose([large, small], 1024, 128, 8) == large
    # one large tile takes as long as four small ones, which are shared by four multiprocessors
    assert choose([large, small], 128, 128, 8) == small


def test_steps_waste_few_channels():
    assert [step_size(channels, 64) for channels in (3, 16, 17, 32, 48, 64, 96, 100, 512)] == [
        *(16, 16, 32, 32, 64, 64, 32, 64, 64),
    ]
    assert step_size(512, 32) == 32


def test_weights_are_packed_in_the_order_of_the_steps():
    layer = nn.Conv2d(20, 3, (1, 2))
    weights, bias = packed(layer, 16)
    assert weights.shape == (16, 4 * 16) and bias.shape == (16,)
    assert torch.equal(weights[:3, :16], layer.weight[:, :16, 0, 0])  # the first channels at the first place,
    assert torch.equal(weights[:3, 16:32], layer.weight[:, :16, 0, 1])  # at the second,
    assert torch.equal(weights[:3, 32:36], layer.weight[:, 16:, 0, 0])  # and then the next channels
    assert not weights[3:].any() and not weights[:, 36:48].any() and torch.equal(bias[:3], layer.bias)


def test_every_kind_of_precision_has_tiles_that_may_join():
    for tilings in TILINGS.values():
        assert any(tile.pixels * tile.channels <= 128 * 64 for tile in tilings)
        assert len({tile.inputs for tile in tilings}) == 1  # else the order of the sums would depend on the batch
