"""The tile kernels on a GPU: torchvision's networks at 224 pixels, against ``dense``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from policyskip.backbones.base import Backbone
from policyskip.backbones.execution import dense
from policyskip.backbones.folding import folded
from policyskip.backbones.resnet import TorchvisionResNet
from policyskip.execution.tile_network import TileNetwork
from tests.conftest import with_statistics

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]
SHAPE = (3, 224, 224)
DEVICE = torch.device("cuda")


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    """What the kernels are compared with is computed in full float32."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    with torch.no_grad():
        yield
    torch.backends.cudnn.allow_tf32 = allowed


@pytest.fixture(scope="module", params=[18, 50])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    """A torchvision network with random weights and statistics, on the GPU."""
    torch.manual_seed(0)
    made = TorchvisionResNet(request.param, 10)
    with_statistics(made)
    return made.to(DEVICE).freeze()


def images(count: int, seed: int = 0) -> Tensor:
    """Random images."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, *SHAPE), generator=generator, dtype=torch.uint8).to(DEVICE)


def decisions(count: int, backbone: Backbone, seed: int = 1) -> Tensor:
    """Random decisions, half of the blocks kept."""
    return (torch.rand(count, backbone.num_blocks, generator=torch.Generator().manual_seed(seed)) < 0.5).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [1, 33])
def test_no_further_from_float32_than_cudnn(backbone, dtype, count):
    """In TF32, bfloat16 and float16; twice the distance of cuDNN's result in the same precision is allowed."""
    pictures, keep_BK = images(count), decisions(count, backbone)
    expected = dense(folded(backbone), pictures, keep_BK)
    fast = folded(backbone).to(dtype)
    torch.backends.cudnn.allow_tf32 = True
    theirs = (dense(fast, pictures, keep_BK).float() - expected).abs().max()
    ours = (TileNetwork(fast, SHAPE).logits(pictures, keep_BK[None])[0].float() - expected).abs().max()
    assert ours <= 2 * theirs + 1e-3 * expected.abs().max()


def test_exact_float32(backbone):
    pictures, keep_BK = images(9), decisions(9, backbone)
    expected = dense(folded(backbone), pictures, keep_BK)
    got = TileNetwork(folded(backbone), SHAPE, exact=True).logits(pictures, keep_BK[None])[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def test_one_graph_for_all_decisions(backbone):
    """Nothing asks the host: a graph that was recorded for some decisions and images computes others."""
    net = TileNetwork(folded(backbone).to(torch.bfloat16), SHAPE)
    pictures, keep_SBK = images(8), decisions(8, backbone)[None]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            net.logits(pictures, keep_SBK)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits_SBC = net.logits(pictures, keep_SBK)
    for seed in (2, 3):
        pictures.copy_(images(8, seed))
        keep_SBK.copy_(decisions(8, backbone, seed)[None])
        graph.replay()
        assert torch.equal(logits_SBC, net.logits(pictures, keep_SBK))
    for kept in (False, True):
        keep_SBK.fill_(kept)
        graph.replay()
        assert torch.equal(logits_SBC, net.logits(pictures, keep_SBK))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_result_depends_on_its_own_image_alone(backbone, dtype):
    """To the bit: in another place, and beside others that keep other blocks."""
    net = TileNetwork(folded(backbone).to(dtype), SHAPE)
    x, keep_BK = net.features(images(9)), decisions(9, backbone)
    whole = net.advance(x.clone(), keep_BK, 0)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert torch.equal(net.advance(x[order], keep_BK[order], 0), whole[order])
    others, keep_others = net.features(images(9, 5)), decisions(9, backbone, 6)
    others[4], keep_others[4] = x[4], keep_BK[4]
    assert torch.equal(net.advance(others, keep_others, 0)[4], whole[4])


def test_nan_in_a_skipped_branch_stays_out(backbone):
    keep_BK = torch.ones(4, backbone.num_blocks, dtype=torch.bool, device=DEVICE)
    keep_BK[0] = False
    expected = dense(folded(backbone), images(4), keep_BK)[0]
    fast = folded(backbone)
    for block in fast.blocks:
        for parameter in block.residual.parameters():
            parameter.fill_(float("nan"))
    got = TileNetwork(fast, SHAPE, exact=True).logits(images(4), keep_BK[None])[0]
    torch.testing.assert_close(got[0], expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    assert got[1:].isnan().all()
