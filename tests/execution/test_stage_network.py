"""A residual network in stage kernels is the network of ``dense``, whatever its shape; here in Triton's interpreter."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

pytest.importorskip("triton")

from policyskip.backbones.base import Backbone, Block
from policyskip.backbones.execution import dense
from policyskip.backbones.folding import folded
from policyskip.backbones.resnet import CifarResNet, TorchvisionResNet, basic_block
from policyskip.execution.stage_network import StageNetwork
from policyskip.execution.stage_tilings import EXACT, OLDER, TILINGS, Tiling, tilings_for
from policyskip.execution.stage_weights import spread
from tests.conftest import small_backbone, with_statistics

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
# Of logits of about 1. Products in TF32 have 10 bits; the interpreter cuts bfloat16 off, where a GPU rounds it.
TOLERANCES = {
    torch.float32: {"rtol": 1e-2, "atol": 1e-2} if DEVICE.type == "cuda" else TOLERANCE,
    torch.float16: {"rtol": 5e-3, "atol": 5e-3},
    torch.bfloat16: {"rtol": 6e-2, "atol": 6e-2},
}
ONE, THREE = ((float("inf"), Tiling(warps=(8,), one_launch=one)) for one in (True, False))
AHEAD = (float("inf"), Tiling(warps=(8, 4, 4), sums=8, ahead=True))
FEW = {"entries": 512}  # few products: quicker in the interpreter
KEEP_SK = torch.tensor([[True] * 3, [False] * 3, [True, False, True]])


@pytest.fixture(autouse=True)
def full_products() -> Iterator[None]:
    """On a GPU, what is compared with is computed in full float32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def network(shortcut: str = "pool", width: int = 4, depth: int = 8, dtype: torch.dtype = torch.float32) -> Backbone:
    """A frozen, folded network."""
    return folded(small_backbone(depth, shortcut=shortcut, width=width).freeze()).to(DEVICE, dtype)


def pictures(count: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8).to(DEVICE)


def kept(*shape: int, seed: int = 0) -> Tensor:
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.5).to(DEVICE)


@pytest.mark.parametrize(
    ("shortcut", "width", "size", "dtype", "floats"),
    [
        ("pool", 4, (8, 8), torch.float32, False),
        ("A", 12, (9, 7), torch.float32, True),
        ("B", 16, (5, 10), torch.float32, False),
        ("pool", 5, (7, 7), torch.float16, True),
        ("B", 4, (9, 8), torch.bfloat16, False),
        ("A", 4, (1, 3), torch.float32, False),
    ],
)
def test_it_is_the_network_of_dense_for_every_decision(shortcut, width, size, dtype, floats):
    """All blocks, none and some of them, for every image: S = 3 decisions."""
    backbone, images = network(shortcut, width), pictures(2, *size)
    images = images / 255 if floats else images
    keep_SBK = torch.stack([KEEP_SK, KEEP_SK.flip(0)], 1).to(DEVICE)
    ours = StageNetwork(network(shortcut, width, dtype=dtype), (3, *size), **FEW)
    logits = ours.logits(images, keep_SBK)
    assert logits.shape == (3, 2, 5) and logits.dtype == dtype
    for keep_BK, logits_BC in zip(keep_SBK, logits.float(), strict=True):
        torch.testing.assert_close(logits_BC, dense(backbone, images, keep_BK), **TOLERANCES[dtype])


@pytest.mark.parametrize(
    ("tiling", "patch", "entries", "exact"),
    [(ONE, 1, 256, False), (THREE, 2, 256, False), (AHEAD, 1, 64, False), (AHEAD, 2, 128, False), (ONE, 2, 64, True)],
)
def test_every_way_to_divide_the_work_gives_the_same(tiling, patch, entries, exact):
    backbone, images, keep_BK = network(), pictures(1, 9, 9), torch.ones(1, 3, dtype=torch.bool, device=DEVICE)
    ours = StageNetwork(backbone, (3, 9, 9), exact, [tiling], patch, entries)
    assert len(ours.launches(0, 3, True, True, tiling[1])) == (1 if tiling is ONE else 3)
    logits = ours.logits(images, keep_BK.unsqueeze(0))[0]
    tolerance = TOLERANCE if exact else TOLERANCES[torch.float32]
    torch.testing.assert_close(logits, dense(backbone, images, keep_BK), **tolerance)


def test_pieces_are_the_whole_to_the_bit():
    """Block by block, in two pieces that part in the middle of a stage, in one, and joined with stem and head."""
    backbone, images = network("B", depth=14), pictures(2, 6, 6)
    keep_BK = torch.tensor([[1, 1, 0, 1, 1, 0], [1, 0, 1, 0, 0, 0]]).bool().to(DEVICE)
    ours = StageNetwork(backbone, (3, 6, 6), **FEW)
    x = ours.features(images)
    torch.testing.assert_close(x, backbone.features(images), **TOLERANCES[torch.float32])
    assert x.is_contiguous(memory_format=torch.channels_last)
    whole = ours.advance(x.clone(memory_format=torch.preserve_format), keep_BK, 0)
    in_two, by_block = x.clone(), x.clone()
    for first, last in ((0, 3), (3, 6)):
        in_two = ours.advance(in_two, keep_BK[:, first:last], first)
    for k in range(6):
        by_block = ours.advance(by_block, keep_BK[:, k : k + 1], k)
    assert torch.equal(in_two, whole) and torch.equal(by_block, whole) and whole.shape == (2, 16, 2, 2)
    assert torch.equal(ours.advance(whole.clone(), keep_BK[:, :0], 6), whole)
    logits = ours.head(whole)
    assert torch.equal(ours.logits(images, keep_BK.unsqueeze(0))[0], logits)
    torch.testing.assert_close(logits, dense(backbone, images, keep_BK), **TOLERANCES[torch.float32])


@pytest.mark.parametrize("shortcut", ["pool", "B"])
def test_a_nan_in_a_skipped_branch_stays_out_and_one_in_a_kept_branch_does_not(shortcut):
    backbone, images = network(shortcut), pictures(1, 6, 6)
    broken = copy.deepcopy(backbone)
    for k in (0, 1):  # a block with the identity, and one that changes the shape
        for conv in broken.blocks[k].residual.children():
            nn.init.constant_(conv.weight, float("nan"))
    keep_SBK = torch.ones(3, 1, 3, dtype=torch.bool, device=DEVICE)
    keep_SBK[0, 0, :2] = keep_SBK[1, 0, 0] = keep_SBK[2, 0, 1] = False
    ours, theirs = (StageNetwork(n, (3, 6, 6), **FEW).logits(images, keep_SBK) for n in (broken, backbone))
    assert torch.equal(ours[0], theirs[0])
    assert ours[1:].isnan().all()


def test_a_row_depends_on_its_image_and_decision_alone_to_the_bit():
    """Whatever stands beside it, and however many: other numbers of rows are divided and ordered otherwise."""
    backbone, images, keep_BK = network(), pictures(5, 6, 6), kept(5, 3)
    ours = StageNetwork(backbone, (3, 6, 6), tilings=[(1, ONE[1]), (3, AHEAD[1]), THREE], **FEW)
    ours.multiprocessors = 1
    whole = ours.logits(images, keep_BK.unsqueeze(0))[0]
    backwards = ours.logits(images.flip(0), keep_BK.flip(0).unsqueeze(0))[0]
    assert torch.equal(backwards.flip(0), whole)
    assert torch.equal(ours.logits(images[2:4], keep_BK[2:4].unsqueeze(0))[0], whole[2:4])
    assert torch.equal(ours.logits(images[4:], keep_BK[4:].unsqueeze(0))[0], whole[4:])


def test_no_images():
    ours = StageNetwork(network("B"), (3, 8, 6))
    nothing = torch.zeros(0, 3, dtype=torch.bool, device=DEVICE)
    assert ours.logits(pictures(0, 8, 6), nothing.expand(2, 0, 3)).shape == (2, 0, 5)
    x = ours.features(pictures(0, 8, 6))
    assert x.shape == (0, 4, 8, 6)
    x = ours.advance(x, nothing, 0)
    assert x.shape == (0, 16, 2, 2) and ours.head(x).shape == (0, 5)


def test_blocks_that_change_channels_and_not_pixels():
    """Networks of a user's own: the first block may change the shape, and any block after it."""
    torch.manual_seed(0)
    net = CifarResNet(8, 5, "pool", 4)
    sizes = [(4, 6, 1), (6, 6, 1), (6, 20, 2), (20, 20, 1)]
    blocks = [basic_block(*size, shortcut) for size, shortcut in zip(sizes, ("A", "pool", "B", "pool"), strict=True)]
    net = Backbone(net.stem, blocks, net.head, 5, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), [4])
    net.head[2] = nn.Linear(20, 5)
    backbone = folded(with_statistics(net).eval()).to(DEVICE)
    images, keep_BK = pictures(3, 6, 7), torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]]).bool().to(DEVICE)
    logits = StageNetwork(backbone, (3, 6, 7), **FEW).logits(images, keep_BK.unsqueeze(0))[0]
    torch.testing.assert_close(logits, dense(backbone, images, keep_BK), **TOLERANCES[torch.float32])


@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("resident", [1, 2])
def test_the_costliest_rows_are_first_and_share_with_the_cheapest(rows, resident):
    ours = StageNetwork(network(depth=14), (3, 8, 8))
    ours.multiprocessors = together = 4
    (launch,) = ours.launches(0, 6, True, True, ONE[1])
    keep = kept(rows, 6).to(torch.uint8)
    order = ours._order(keep, launch, Tiling((4,), resident=resident))
    if rows <= together:
        assert order is None
        return
    costs = (keep * ours.costs).sum(1)
    expected = sorted(range(rows), key=lambda row: (-int(costs[row]), row))
    if resident == 2:  # the second group begins beside the first, and the cheapest of it beside the costliest
        expected[together : 2 * together] = expected[together : 2 * together][::-1]
    assert order.tolist() == expected


def test_what_blocks_cost():
    """By hand: of 4, 8 and 16 channels, all are padded to 16; 64, 16 and 4 pixels; the first of a stage reads less."""
    assert StageNetwork(network(depth=14), (3, 8, 8)).costs.tolist() == [64, 64, 16, 16, 4, 4]
    wide = StageNetwork(network(depth=14, width=16), (3, 8, 8)).costs.tolist()
    assert wide == [64, 64, (64 + 32) // 2, 64, (64 + 32) // 2, 64]


def test_weights_of_patches_by_hand():
    """An output pixel at (y, x) of a patch depends on the window's pixels from (y, x) on."""
    weight = torch.arange(9.0).view(1, 1, 3, 3) + 1
    rows = spread(weight, 2)
    assert rows.shape == (2, 2, 16, 4, 4, 16)
    expected = torch.zeros(4, 4)
    expected[1:, :3] = weight[0, 0]
    assert torch.equal(rows[1, 0, 0, :, :, 0], expected)
    assert rows.sum() == 4 * weight.sum()


class OfItsOwn(CifarResNet):
    def forward(self, images: Tensor, keep_BK: Tensor | None = None) -> Tensor:
        return super().forward(images) * 2


class Brighter(CifarResNet):
    def normalise(self, images: Tensor) -> Tensor:
        return super().normalise(images) * 2


class Doubled(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Halved(Block):
    def join(self, shortcut: Tensor, x: Tensor, inplace: bool = False) -> Tensor:
        return torch.relu(shortcut + self.residual(x) / 2)


def changed(place: str, layer: nn.Module) -> Backbone:
    """A small folded network with another layer in one place."""
    net = small_backbone(8).freeze()
    parent, _, name = place.rpartition(".")
    setattr(net.get_submodule(parent), name, layer)
    return folded(net)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: folded(OfItsOwn(8, 5, width=4).eval()), "code of its own"),
        (lambda: folded(Brighter(8, 5, width=4).eval()), "code of its own"),
        (lambda: changed("stem", Doubled(*small_backbone(8).stem)), "its stem or its head is no plain sequence"),
        (lambda: changed("head", Doubled(*small_backbone(8).head)), "its stem or its head is no plain sequence"),
        (
            lambda: changed("blocks.1", Halved(nn.Sequential(), nn.Identity())),
            "block 1 is of the kind Halved, which may join",
        ),
        (lambda: folded(TorchvisionResNet(18, 5).eval()), "does not begin with one 3×3 convolution"),
        (lambda: network().double(), "its weights are float64"),
        (lambda: changed("stem.conv", nn.Conv2d(3, 4, 3, 2, 1)), "does not begin with one 3×3"),
        (lambda: changed("head.pool", nn.AdaptiveAvgPool2d(2)), "the average over all pixels"),
        (lambda: changed("head.flatten", nn.Dropout()), "does not end with the average over pixels and one"),
        (lambda: changed("blocks.1.residual.relu", nn.GELU()), "block 1 is no basic block"),
        (lambda: changed("blocks.2.residual.conv1", nn.Conv2d(8, 16, 5, 2, 2)), "block 2 has other convolutions"),
        (lambda: changed("blocks.1.shortcut", nn.Conv2d(4, 8, 1, 2)), "block 1 has a shortcut of another kind"),
        (lambda: changed("blocks.1.shortcut", nn.Identity()), "block 1 has a shortcut of another shape"),
        (lambda: folded(CifarResNet(8, 5, width=80).eval()), "block 2 has 320 channels, more than 256"),
    ],
)
def test_networks_that_it_refuses(make, reason):
    backbone = make()
    assert reason in StageNetwork.why_not(backbone, (3, 8, 8))
    with pytest.raises(ValueError, match="cannot run in stage kernels"):
        StageNetwork(backbone, (3, 8, 8))


def test_images_of_another_shape_are_refused():
    """Kernels would read other memory than that of the images."""
    kernels, keep_1BK = StageNetwork(network(), (3, 8, 8)), torch.ones(1, 2, 3, dtype=torch.bool, device=DEVICE)
    for shape in ((2, 3, 8, 7), (2, 4, 8, 8), (2, 1, 8, 8)):
        images = torch.zeros(shape, dtype=torch.uint8, device=DEVICE)
        with pytest.raises(ValueError, match=r"images must be of shape \(B, 3, 8, 8\), got \(2, "):
            kernels.features(images)
        with pytest.raises(ValueError, match="images must be of shape"):
            kernels.logits(images, keep_1BK)


def test_images_and_blocks_that_it_refuses():
    backbone = network()
    assert StageNetwork.why_not(backbone, (3, 64, 64)) == StageNetwork.why_not(backbone, (3, 28, 20)) == ""
    assert StageNetwork.why_not(backbone, (3, 224, 224)) == "images of 3 × 224 × 224 do not fit one multiprocessor"
    bottleneck = TorchvisionResNet(50, 5).eval().blocks[1]
    net = small_backbone(8)
    net.blocks[1] = Block(bottleneck.residual, bottleneck.shortcut)
    assert "block 1 is no basic block" in StageNetwork.why_not(folded(net.freeze()), (3, 8, 8))


def test_tilings_end_with_one_for_any_number_of_rows():
    assert TILINGS[-1][0] == OLDER[-1][0] == EXACT[-1][0] == float("inf")
    assert tilings_for(DEVICE, True) == EXACT and tilings_for(torch.device("cpu"), False) == TILINGS
