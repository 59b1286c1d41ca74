"""On a GPU: kernels are chosen without asking, in CUDA graphs that hold any decisions, with the answers of ``dense``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from policyskip.backbones import dense
from policyskip.backbones.gated import GatedNetwork
from policyskip.backbones.resnet_exits import ResNetExits
from policyskip.data import TensorImages
from policyskip.envs.layer_skip import LayerSkipVectorEnv
from policyskip.execution.exits import ExitExecution
from policyskip.execution.gates import GateExecution
from policyskip.execution.ways import PRECISIONS, Execution
from policyskip.exits.rules import entropy
from policyskip.policies.thresholds import ThresholdPolicy
from tests.conftest import small_backbone, small_images, typed, with_statistics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]
SHAPE, B, K = (3, 12, 12), 9, 6
TOLERANCE = {"float32": 2e-2, "float32_exact": 1e-4, "bfloat16": 0.1, "float16": 2e-2}


@contextmanager
def without_waiting() -> Iterator[None]:
    """Refuse whatever makes the host wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_gpu() -> TensorImages:
    images = small_images(8)
    return TensorImages(images.images.cuda(), images.label_N.cuda())


def images() -> Tensor:
    return small_images(B).images.cuda()


def keeps(seed: int, samples: int = 1) -> Tensor:
    return (torch.rand(samples, B, K, generator=torch.Generator().manual_seed(seed)) < 0.5).cuda()


def assert_same(one: Tensor, other: Tensor, precision: str = "float32_exact") -> None:
    torch.testing.assert_close(one.float().cpu(), other.float().cpu(), rtol=1e-3, atol=TOLERANCE[precision])


@pytest.mark.parametrize("precision", PRECISIONS)
@torch.no_grad()
def test_one_graph_holds_any_decisions(precision):
    backbone = small_backbone()
    execution = Execution(small_backbone().cuda(), SHAPE, precision=precision)
    assert execution.way == "kernel", execution.why
    seen = images()
    for seed in range(4):  # made directly and checked, recorded, replayed, replayed
        keep_SBK = keeps(seed, 3)
        if seed < 2:
            logits_SBC = execution.logits_many(seen, keep_SBK)
        else:
            with without_waiting():
                logits_SBC = execution.logits_many(seen, keep_SBK)
        for logits_BC, keep_BK in zip(logits_SBC, keep_SBK, strict=True):
            assert_same(logits_BC, dense(backbone, seen.cpu(), keep_BK.cpu()), precision)
    (graphs,) = execution._graphs.values()
    assert len(graphs.graphs) == 1


@torch.no_grad()
def test_exits_and_gates_wait_for_nothing():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = with_statistics(ResNetExits(small_backbone(), [0, 1, 3], "conv", SHAPE)).eval()
        gated = GatedNetwork(small_backbone(), "rnn", SHAPE).eval()
        for parameter in gated.gates.parameters():
            nn.init.normal_(parameter, 0, 0.5)
    sorted_BE = entropy(network(images().cpu())[:, :-1].softmax(-1)).sort(0).values
    policy = ThresholdPolicy("entropy", sorted_BE[3:5].mean(0).tolist()).cuda()
    expected_BC, expected_B = ExitExecution(network, SHAPE).run_until(images().cpu(), policy.cpu().leave)
    by_gates = gated.greedy(images().cpu())
    exits = ExitExecution(network.cuda(), SHAPE, "kernel", "float32_exact")
    gates, seen, policy = GateExecution(gated.cuda(), SHAPE, "kernel", "float32_exact"), images(), policy.cuda()
    for call in range(4):
        logits_BC, exit_B = exits.run_until(seen, policy.leave, may_record=True)
        assert exit_B.tolist() == expected_B.tolist()
        assert_same(logits_BC, expected_BC)
        run = gates.greedy(seen)
        assert torch.equal(run.keep_BK.cpu(), by_gates.keep_BK)
        assert_same(run.logits_BC, by_gates.logits_BC)
        if call == 2:
            with without_waiting():
                exits.run_until(seen, policy.leave, may_record=True)
                gates.greedy(seen)
    assert [len(graphs.graphs) for graphs in (*exits._graphs.values(), *gates._graphs.values())] == [1, 1]


def test_block_by_block_in_the_environment():
    envs = [
        LayerSkipVectorEnv(
            4, backbone=small_backbone().cuda(), images=on_gpu(), execution=way, precision="float32_exact"
        )
        for way in ("kernel", "gather")
    ]
    generator = torch.Generator().manual_seed(0)
    for _ in range(2 * K):
        action = torch.rand(4, generator=generator) < 0.5
        (a, reward_a, *_), (b, reward_b, *_) = (env.step(action) for env in envs)
        assert_same(a, b)
        assert_same(reward_a, reward_b)


def test_a_whole_command(tmp_path):
    done = typed("train", "+experiment=debug", "device=cuda", "execution=kernel", "run.dir=runs/x", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "runs/x/summary.json").read_text())["execution"] == "kernel"
    again = typed("evaluate", "run=runs/x", "device=cuda", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
