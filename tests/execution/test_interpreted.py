"""Real kernels, in Triton's interpreter, behind exits, gates, blocks one by one, and a whole command."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from policyskip.backbones.gated import GatedNetwork
from policyskip.backbones.resnet_exits import ResNetExits
from policyskip.execution.exits import ExitExecution
from policyskip.execution.gates import GateExecution
from policyskip.execution.ways import Execution
from tests.conftest import small_backbone, small_images, typed

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")
SHAPE = (3, 8, 8)
IMAGES = small_images(3, size=8).images


def assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_block_by_block():
    backbone = small_backbone(8)
    keep_BK = torch.tensor([[True, False, True], [False, True, False], [True, True, True]])
    ways = [Execution(backbone, SHAPE, way) for way in ("kernel", "gather")]
    assert (ways[0].way, ways[0].why) == ("kernel", "a residual stage in one kernel")
    features = [way.advance(way.advance(way.features(IMAGES), keep_BK[:, :1], 0), keep_BK[:, 1:], 1) for way in ways]
    assert_same(*features)
    assert_same(*(way.head(x) for way, x in zip(ways, features, strict=True)))
    assert_same(*(way.logits(IMAGES, keep_BK) for way in ways))


@torch.no_grad()
def test_exits():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = ResNetExits(small_backbone(8), [0, 1], "linear", SHAPE).eval()
    (kernel_BC, kernel_B), (gather_BC, gather_B) = (
        ExitExecution(network, SHAPE, way).run_until(IMAGES, lambda n, logits_BC, rows: rows == n)
        for way in ("kernel", "gather")
    )
    assert kernel_B.tolist() == gather_B.tolist() == [0, 1, 2]
    assert_same(kernel_BC, gather_BC)


@torch.no_grad()
def test_gates():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = GatedNetwork(small_backbone(8), "ff1", SHAPE).eval()
        for parameter in network.gates.parameters():
            nn.init.normal_(parameter, 0, 0.5)
    kernel, gather = (GateExecution(network, SHAPE, way).greedy(IMAGES) for way in ("kernel", "gather"))
    assert torch.equal(kernel.keep_BK, gather.keep_BK)
    assert_same(kernel.logits_BC, gather.logits_BC)


@pytest.mark.slow
def test_a_whole_command(tmp_path):
    net = ["backbone=cifar_resnet", "backbone.depth=8", "backbone.width=4", "backbone.checkpoint=random"]
    small = ["data.batch_size=4", "data.train=16", "data.validation=8", "data.test=8", "front.images=4"]
    steps = ["train.steps=2", "train.validate_every=2", "train.log_every=1", "front.budget=40"]
    options = ["tracking=none", "device=cpu", "execution=kernel", "run.dir=runs/x"]
    done = typed("train", *net, *small, *steps, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    judged = typed("evaluate", "run=runs/x", "device=cpu", "execution=gather", cwd=tmp_path)
    assert judged.returncode == 0, judged.stderr
    assert '"execution": "kernel"' in (tmp_path / "runs/x/summary.json").read_text()
