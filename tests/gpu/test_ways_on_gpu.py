"""Every way to execute a network gives the logits of the dense way, and keeps the promises of ``execution/ways.py``."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from policyskip.backbones import Backbone, dense
from policyskip.backbones.folding import folded
from policyskip.backbones.resnet import TorchvisionResNet
from policyskip.envs.block_selection import BlockSelectionVectorEnv
from tests.conftest import small_backbone, small_images, with_statistics

pytestmark = pytest.mark.gpu

TOLERANCE = {"float32_exact": 1e-4, "float32": 1e-2, "float16": 1e-2, "bfloat16": 5e-2}
"""The largest difference from logits in float64, as a share of the largest of these, which three times torch's own
difference in this precision may exceed."""
NETWORKS = [  # shortcut, width, side, precision
    ("pool", 16, 32, "float32"),
    ("pool", 16, 32, "float32_exact"),
    ("pool", 16, 32, "bfloat16"),
    ("pool", 16, 32, "float16"),
    ("A", 16, 33, "float32_exact"),
    ("B", 16, 28, "float32_exact"),
    ("B", 16, 20, "bfloat16"),
    ("A", 32, 32, "bfloat16"),
    ("pool", 32, 64, "float32"),
    ("B", 32, 33, "float16"),
    ("A", 8, 20, "float32"),
    ("pool", 8, 33, "float32_exact"),
    ("pool", 12, 28, "float32_exact"),
    ("B", 12, 20, "bfloat16"),
]


def kernels(backbone: Backbone, side: int, precision: str = "float32") -> Any:
    """The execution by kernels."""
    from policyskip.execution.ways import Execution

    execution = Execution(backbone, (3, side, side), "kernel", precision)
    assert execution.way == "kernel" and execution.why
    return execution


def on(device: torch.device, shortcut: str = "pool", width: int = 16) -> Backbone:
    """A network of six blocks, two a stage."""
    return small_backbone(14, shortcut=shortcut, width=width).freeze().to(device)


def batch(device: torch.device, side: int, count: int = 7, K: int = 6, S: int = 3) -> tuple[Tensor, Tensor]:
    """Random images uint8 (B, 3, H, W), and decisions bool (S, B, K), of which some keep all blocks and some none."""
    keep_SBK = torch.rand(S, count, K, generator=torch.Generator().manual_seed(1)) < 0.5
    keep_SBK[0, 0], keep_SBK[-1, -1] = True, False
    return small_images(count, size=side).images.to(device), keep_SBK.to(device)


@torch.no_grad()
def truth(backbone: Backbone, images: Tensor, keep_SBK: Tensor) -> Tensor:
    """Logits (S, B, C) of the dense way in float64, on the CPU."""
    exact = copy.deepcopy(backbone).cpu().double()
    return torch.stack([dense(exact, images.cpu(), keep_BK) for keep_BK in keep_SBK.cpu()])


@torch.no_grad()
def check_equal(found: Tensor, images: Tensor, keep_SBK: Tensor, backbone: Backbone, precision: str) -> None:
    """Compare logits (S, B, C) with the dense way in float64, and with what torch loses in this precision."""
    from policyskip.execution.ways import Execution

    expected = truth(backbone, images, keep_SBK)
    scale = expected.abs().max()
    own = Execution(backbone, tuple(images.shape[1:]), "dense", precision).logits_many(images, keep_SBK)  # type: ignore[arg-type]
    error, own_error = ((logits.cpu().double() - expected).abs().max() / scale for logits in (found, own))
    allowed = max(TOLERANCE[precision], 3 * own_error)
    assert error <= allowed, f"{error:.2e} of the largest logit; torch {own_error:.2e}"


@pytest.mark.parametrize(("shortcut", "width", "side", "precision"), NETWORKS)
@torch.no_grad()
def test_kernels_give_what_dense_gives(device, shortcut, width, side, precision):
    backbone = on(device, shortcut, width)
    execution = kernels(backbone, side, precision)
    images, keep_SBK = batch(device, side, 7 if device.type == "cuda" else 2)  # the interpreter takes long
    check_equal(execution.logits_many(images, keep_SBK), images, keep_SBK, backbone, precision)
    check_equal(execution.whole(images).unsqueeze(0), images, torch.ones_like(keep_SBK[:1]), backbone, precision)


@pytest.mark.parametrize(("shortcut", "width", "side", "precision"), NETWORKS[4:7])
@torch.no_grad()
def test_kernels_of_tiles_do_too(device, shortcut, width, side, precision):
    """They are for networks that the kernels of whole stages are not for, and run these as well."""
    from policyskip.execution.tile_network import TileNetwork
    from policyskip.execution.ways import PRECISIONS

    backbone = on(device, shortcut, width)
    network = TileNetwork(folded(backbone).to(PRECISIONS[precision]), (3, side, side), precision == "float32_exact")
    images, keep_SBK = batch(device, side, 7 if device.type == "cuda" else 2)
    check_equal(network.logits(images, keep_SBK), images, keep_SBK, backbone, precision)


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("way", ["gather", "dense"])
@torch.no_grad()
def test_the_other_ways_give_what_dense_gives(device, way, precision):
    from policyskip.execution.ways import Execution

    backbone, (images, keep_SBK) = on(device), batch(device, 32)
    execution = Execution(backbone, (3, 32, 32), way, precision)
    assert execution.way == way
    check_equal(execution.logits_many(images, keep_SBK), images, keep_SBK, backbone, precision)
    check_equal(execution.logits(images, keep_SBK[0]).unsqueeze(0), images, keep_SBK[:1], backbone, precision)


@pytest.mark.parametrize("precision", ["float32_exact", "bfloat16"])
@pytest.mark.parametrize("depth", [18, 50])
@torch.no_grad()
def test_torchvisions_networks_run_in_kernels(gpu, depth, precision):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = with_statistics(TorchvisionResNet(depth, 10)).eval()
    assert isinstance(network, TorchvisionResNet)
    backbone = network.freeze().to(gpu)
    images, keep_SBK = batch(gpu, 224, 4, backbone.num_blocks, 2)
    execution = kernels(backbone, 224, precision)
    check_equal(execution.logits_many(images, keep_SBK), images, keep_SBK, backbone, precision)


def test_auto_takes_kernels_on_a_gpu(gpu):
    from policyskip.execution.ways import Execution

    execution = Execution(on(gpu), (3, 32, 32))
    assert execution.way == "kernel", execution.why
    env = BlockSelectionVectorEnv(16, backbone=on(gpu), images=there(small_images(32, size=32), gpu))
    assert env.execution.way == "kernel"  # type: ignore[attr-defined]


def there(images: Any, device: torch.device) -> Any:
    """A set of images on a device."""
    return type(images)(images.images.to(device), images.label_N.to(device))


@pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")  # numpy, in Triton's interpreter
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@torch.no_grad()
def test_what_a_skipped_block_would_compute_stays_out(device, precision):
    """Weights of 10^38 make infinities, and NaN of two of them; a block that is kept shows that they would be seen."""
    backbone = on(device)
    images, keep_SBK = batch(device, 20)
    keep_BK = keep_SBK[0]
    keep_BK[:, 3] = False
    before = kernels(backbone, 20, precision).logits(images, keep_BK)
    torch.nn.init.uniform_(backbone.blocks[3].residual.conv1.weight, -1e38, 1e38)  # type: ignore[union-attr,arg-type]
    torch.nn.init.uniform_(backbone.blocks[3].residual.conv2.weight, -1e38, 1e38)  # type: ignore[union-attr,arg-type]
    spoiled = kernels(backbone, 20, precision)
    assert torch.equal(spoiled.logits(images, keep_BK), before)
    keep_BK[2, 3] = True
    after = spoiled.logits(images, keep_BK)
    others = torch.arange(len(images), device=device) != 2
    assert torch.equal(after[others], before[others]) and not torch.isfinite(after[2]).all()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@torch.no_grad()
def test_an_image_does_not_depend_on_its_neighbours_to_the_bit(device, precision):
    execution = kernels(on(device), 20, precision)
    images, keep_SBK = batch(device, 20)
    logits = execution.logits(images, keep_SBK[0])
    others, other_keep = images.flip(0).clone(), keep_SBK[1].flip(0).clone()
    others[3], other_keep[3] = images[5], keep_SBK[0, 5]
    assert torch.equal(execution.logits(others, other_keep)[3], logits[5])
    x = execution.features(images)
    alone = execution.advance(x[5:6].clone(memory_format=torch.channels_last), keep_SBK[0, 5:6], 0)
    assert torch.equal(execution.advance(x.clone(), keep_SBK[0], 0)[5:6], alone)


def test_gradients_are_refused_in_one_line(device):
    execution = kernels(on(device), 20)
    images, keep_SBK = batch(device, 20)
    with pytest.raises(ValueError, match=r"^kernels give no gradients.*") as refused:
        execution.logits((images.float() / 255).requires_grad_(), keep_SBK[0])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("S", [1, 3])
@torch.no_grad()
def test_one_cuda_graph_serves_all_decisions(gpu, S):
    """It is recorded once, asks the host nothing, and gives other decisions other, right logits."""
    backbone = on(gpu)
    execution = kernels(backbone, 32)
    images, keep_SBK = batch(gpu, 32, S=S)
    direct = execution.kernels.logits(images, keep_SBK)
    stream, graph, given = torch.cuda.Stream(), torch.cuda.CUDAGraph(), keep_SBK.clone()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        execution.kernels.logits(images, given)
    stream.synchronize()
    with torch.cuda.graph(graph):
        recorded = execution.kernels.logits(images, given)
    graph.replay()
    assert torch.equal(recorded, direct)
    given.copy_(~keep_SBK)
    graph.replay()
    assert torch.equal(recorded, execution.kernels.logits(images, ~keep_SBK)) and not torch.equal(recorded, direct)
    check_equal(recorded, images, ~keep_SBK, backbone, "float32")


@torch.no_grad()
def test_between_images_and_logits_nothing_asks_the_gpu(gpu, no_asking):
    execution = kernels(on(gpu), 32)
    images, keep_SBK = batch(gpu, 32)
    for _ in range(3):  # compiles, and records a graph
        expected = execution.logits_many(images, keep_SBK)
    with no_asking():
        again = execution.logits_many(images, keep_SBK)
    assert torch.equal(again, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs")
@torch.no_grad()
def test_a_second_gpu_has_graphs_of_its_own(gpu):
    """Graphs that were recorded on one GPU and replayed on another would give the answers of the recording again."""
    backbone, (images, keep_SBK) = on(gpu), batch(gpu, 32)
    execution = kernels(backbone, 32)
    expected = [execution.logits_many(images, keep).cpu() for keep in (keep_SBK, keep_SBK, ~keep_SBK)]
    there = torch.device("cuda", 1)
    execution.to(there)
    for keep, logits in zip((keep_SBK, keep_SBK, ~keep_SBK), expected, strict=True):
        found = execution.logits_many(images.to(there), keep.to(there)).cpu()
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-2 * float(logits.abs().max()))


@pytest.mark.parametrize("way", ["kernel", "gather"])
def test_a_full_gpu_splits_batches(little_memory, way, capsys):
    """2,048 images of 64×64 need 537 MB for the first features alone, and 160 MB are there."""
    images = there(small_images(2048, size=64), little_memory)
    env = BlockSelectionVectorEnv(2048, backbone=on(little_memory), images=images, order="sequential", execution=way)  # type: ignore[call-arg]
    keep_BK = torch.rand(2048, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    split = env.score(keep_BK).logits_BC
    assert capsys.readouterr().err.count("batches are split from now on") == 1
    assert env.splitter.largest_batch is not None and env.splitter.largest_batch < 2048
    expected = truth(env.backbone, images.images[:8], keep_BK[None, :8])[0]
    torch.testing.assert_close(split[:8].cpu().double(), expected, rtol=0, atol=1e-2 * float(expected.abs().max()))
