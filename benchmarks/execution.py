"""Is skipping really faster? Sparse execution beside the masked one of earlier systems, and beside what is ideal.

    python benchmarks/execution.py [--device cpu|cuda] [--run runs/x …] [--depth 110] [--repeats 9]      (minutes)

Every ratio is a median of ratios, measured interleaved in one process; all but predict over a ResNet-110, 32×32, and
random decisions for each image that keep 31 % of the blocks:

- rollouts_vs_masked: images a second, against the originals' way (``published``); rollouts_vs_masked_folded: against
  ``dense``, with the folded network, its memory layout, and a ReLU and a shortcut that convolutions take in;
- rollouts_vs_ideal, rollouts_vs_ideal_batch1: against the whole network's fastest forward over the share of MACs kept;
- step_vs_masked, step_vs_masked_folded: a BlockDrop update (one sample), against the same with masked rollouts in two
  passes, of these two kinds; at alpha 0.95, where samples keep 34 %, and (…_alpha80) at 0.8, where they keep 39 %;
- predict_time_over_macs_batch1, …256: ``predict`` of a run (the policy's time in it) against its whole network, time
  ratio over MAC ratio; of more runs after the first, the same keys with their folders' names;
- env_overhead: time of a vector step beyond that of the forward it asks for;
- peak_memory_vs_dense: of a sparse forward, against ``dense`` with the same network.

Writes benchmarks/results/execution-<machine>.json: these keys, and the raw repeats.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

import policyskip
from policyskip.agents.blockdrop import BlockDrop
from policyskip.backbones import Backbone, cifar_resnet, count_costs, dense, sparse
from policyskip.backbones.folding import folded
from policyskip.build import build_data
from policyskip.data.base import TensorImages
from policyskip.deployment.predictors import Predictor
from policyskip.deployment.profiling import device_name, side_by_side
from policyskip.envs.block_selection import BlockSelectionVectorEnv
from policyskip.memory import keep_freed_memory
from policyskip.rewards import Outcome

RESULTS = Path(__file__).parent / "results"
KEPT = 0.31
"""Share of the blocks that run."""


def median_ratio(over: list[float], under: list[float]) -> float:
    """Median of the ratios of what was measured side by side."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def random_keep(B: int, K: int) -> Tensor:
    return torch.rand(B, K) < KEPT


def published(network: Backbone, images: Tensor, keep_BK: Tensor) -> Tensor:
    """Logits (B, C) by the originals' formula: every block for every image, then blended by multiplication."""
    x = network.features(images)
    for block, keep_B in zip(network.blocks, keep_BK.float().unbind(1), strict=True):
        shortcut, mask = block.shortcut(x), keep_B.view(-1, 1, 1, 1)
        x = torch.relu(shortcut + block.residual(x)) * mask + shortcut * (1 - mask)
    return network.head(x)


def pictures(B: int, device: torch.device, size: int = 32) -> Tensor:
    return torch.randint(0, 256, (B, 3, size, size), dtype=torch.uint8, device=device)


@torch.no_grad()
def rollouts(
    network: Backbone, batch: int, rounds: int, repeats: int, masked: bool = True
) -> tuple[dict[str, list[float]], float]:
    """Seconds of ``rounds`` batches, sparse, whole and masked, and the share of MACs that the keep matrices need."""
    device, K = network.mean.device, network.num_blocks
    fast, images = folded(network), pictures(batch, network.mean.device)
    costs = count_costs(network, (3, 32, 32))
    keep = [random_keep(batch, K).to(device) for _ in range(rounds)]
    calls: dict[str, Callable[[], object]] = {
        "sparse": lambda: [sparse(fast, images, keep_BK) for keep_BK in keep],
        "whole": lambda: [fast(images) for _ in keep],
    }
    if masked:
        calls["masked"] = lambda: [published(network, images, keep_BK) for keep_BK in keep]
        calls["masked_folded"] = lambda: [dense(fast, images, keep_BK) for keep_BK in keep]
    share = float(costs.of(torch.cat(keep).cpu()).mean()) / costs.full
    return side_by_side(calls, repeats, device), share


class MaskedEnv(BlockSelectionVectorEnv):
    """The originals' execution: each rollout in a pass of its own, every block for every image, then blended."""

    @torch.no_grad()
    def score(self, keep: Tensor) -> Outcome:
        images, label_B = self.feed.batch.images, self.feed.batch.label_B
        keep_SBK = keep if keep.dim() == 3 else keep.unsqueeze(0)
        logits_BC = torch.cat([self.masked(images, keep_BK) for keep_BK in keep_SBK])
        return self._outcome(logits_BC, label_B.repeat(len(keep_SBK)), keep_SBK.flatten(0, 1))

    def masked(self, images: Tensor, keep_BK: Tensor) -> Tensor:
        return published(self.backbone, images, keep_BK)


class MaskedFoldedEnv(MaskedEnv):
    """The same with the folded network."""

    def masked(self, images: Tensor, keep_BK: Tensor) -> Tensor:
        return dense(self.executed, images, keep_BK)


def training_step(
    network: Backbone, batch: int, alpha: float, repeats: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of BlockDrop updates whose greedy decisions, each image's its own, keep 31 %, and what they kept."""
    device, K = network.mean.device, network.num_blocks
    images = TensorImages(pictures(4 * batch, device), torch.randint(0, 10, (4 * batch,), device=device))
    decided_BK = torch.where(random_keep(batch, K), 10.0, -10.0).to(device)
    calls: dict[str, Callable[[], object]] = {}
    kept: dict[str, float] = {}
    kinds = {"sparse": BlockSelectionVectorEnv, "masked": MaskedEnv, "masked_folded": MaskedFoldedEnv}
    for name, kind in kinds.items():
        env = kind(batch, backbone=network, images=images)
        agent = BlockDrop(env, 10**6, alpha=alpha, alpha_end=alpha, lr=1e-9, curriculum=0.0)
        agent.policy.keep_head.register_forward_hook(lambda module, inputs, logits: logits + decided_BK)
        kept[name] = agent.act(env.observation).float().mean().item()
        calls[name] = lambda agent=agent, env=env: agent.update(env)  # type: ignore[misc]
    return side_by_side(calls, repeats, device), kept


@torch.no_grad()
def predict(run: Path, batch: int, count: int, repeats: int, device: torch.device) -> tuple[dict[str, Any], float]:
    """Seconds of a run's ``predict`` and of its whole network on test images, and the MAC ratio."""
    predictor = policyskip.load(run, device=str(device))
    assert isinstance(predictor, Predictor)
    data, _ = build_data(yaml.safe_load((run / "config.yaml").read_text())["data"], device)
    spread_N = torch.linspace(0, len(data.test) - 1, count).round().long()  # folders come class by class
    images = next(iter(data.test.plain().stream([(spread_N, 0)]))).images
    parts = images.split(batch)
    calls: dict[str, Callable[[], object]] = {
        "predict": lambda: [predictor.predict(part) for part in parts],
        "whole": lambda: [predictor.backbone(part) for part in parts],
    }
    macs = float(predictor.predict(images).macs_B.mean()) / predictor.costs.full
    return side_by_side(calls, repeats, device), macs


@torch.no_grad()
def stepping(network: Backbone, batch: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of vector steps, and of the forwards alone."""
    device = network.mean.device
    images = TensorImages(pictures(4 * batch, device), torch.randint(0, 10, (4 * batch,), device=device))
    env = BlockSelectionVectorEnv(batch, backbone=network, images=images)
    keep_BK = random_keep(batch, network.num_blocks).to(device)
    calls: dict[str, Callable[[], object]] = {
        "step": lambda: env.step(keep_BK),
        "forward": lambda: sparse(env.executed, env.observation, keep_BK),
    }
    return side_by_side(calls, repeats, device)


@torch.no_grad()
def peak(way: str, depth: int, batch: int, device: str) -> float:
    """Bytes that one forward needs at most, beyond network and images; call it in a fresh process."""
    network = cifar_resnet(10, depth, checkpoint="random").freeze().to(device)
    images, keep_BK = pictures(batch, torch.device(device)), random_keep(batch, network.num_blocks).to(device)
    fast = folded(network)
    execute: Callable[[], Tensor] = {
        "sparse": lambda: sparse(fast, images, keep_BK),
        "dense": lambda: dense(fast, images, keep_BK),
    }[way]
    fast(images[:1])
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        execute()
        return float(torch.cuda.max_memory_allocated() - before)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    execute()
    return resident("VmHWM") - before


def resident(what: str) -> float:
    """Bytes of this process in memory: now ("VmRSS") or at most ("VmHWM")."""
    status = Path("/proc/self/status").read_text().split(what + ":")[1]
    return 1024.0 * float(status.split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--run", nargs="+", default=["runs/benchmark-blockdrop-0"])
    parser.add_argument("--depth", type=int, default=110)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--peak", choices=("sparse", "dense"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    if asked.peak:
        print(peak(asked.peak, asked.depth, asked.batch, asked.device))
        return
    device = torch.device(asked.device)
    network = cifar_resnet(10, asked.depth, checkpoint="random").freeze()
    network = network.to(device)  # laid out in memory as torch does it, which is how the masked way was published
    figures: dict[str, Any] = {}
    raw: dict[str, Any] = {}

    raw["rollouts"], share = rollouts(network, asked.batch, 1, asked.repeats)
    figures["rollouts_vs_masked"] = median_ratio(raw["rollouts"]["masked"], raw["rollouts"]["sparse"])
    figures["rollouts_vs_masked_folded"] = median_ratio(raw["rollouts"]["masked_folded"], raw["rollouts"]["sparse"])
    figures["rollouts_vs_ideal"] = share * median_ratio(raw["rollouts"]["whole"], raw["rollouts"]["sparse"])
    raw["rollouts_batch1"], share = rollouts(network, 1, 20, asked.repeats, masked=False)
    figures["rollouts_vs_ideal_batch1"] = share * median_ratio(
        raw["rollouts_batch1"]["whole"], raw["rollouts_batch1"]["sparse"]
    )
    for alpha, suffix in ((0.95, ""), (0.8, "_alpha80")):
        raw[f"step{suffix}"], raw[f"step{suffix}_kept"] = training_step(network, asked.batch, alpha, asked.repeats)
        for way in ("masked", "masked_folded"):
            ratio = median_ratio(raw[f"step{suffix}"][way], raw[f"step{suffix}"]["sparse"])
            figures[f"step_vs_{way}{suffix}"] = ratio
    for n, run in enumerate(map(Path, asked.run)):
        if not (run / "policy.json").is_file():
            print(f"no run {run}, so its predict is not measured; make it with `policyskip train run.dir={run}`")
            continue
        for batch, count in ((1, 300), (256, 2048)):
            name = f"batch{batch}" + (f"_{run.name}" if n else "")
            raw[f"predict_{name}"], macs = predict(run, batch, count, asked.repeats, device)
            ratio = median_ratio(*(raw[f"predict_{name}"][way] for way in ("predict", "whole")))
            raw[f"predict_{name}"]["macs"] = macs
            figures[f"predict_time_over_macs_{name}"] = ratio / macs
    raw["stepping"] = stepping(network, asked.batch, 3 * asked.repeats)
    figures["env_overhead"] = median_ratio(raw["stepping"]["step"], raw["stepping"]["forward"]) - 1
    same = ["--device", asked.device, "--depth", str(asked.depth), "--batch", str(asked.batch)]
    command = [sys.executable, __file__, *same]
    needed = {
        way: float(subprocess.run([*command, "--peak", way], check=True, capture_output=True, text=True).stdout)
        for way in ("sparse", "dense")
    }
    raw["peak_bytes"] = needed
    figures["peak_memory_vs_dense"] = needed["sparse"] / needed["dense"]

    name = platform.machine() if device.type == "cpu" else device_name(device).replace(" ", "-")
    about = {"machine": device_name(device), "threads": torch.get_num_threads(), "torch": torch.__version__}
    content = {**figures, **about, "depth": asked.depth, "batch": asked.batch, "kept": KEPT, "raw": raw}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"execution-{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    print("| figure | value |\n|---|---|")
    for key, value in figures.items():
        print(f"| {key} | {value:.3f} |")


if __name__ == "__main__":
    main()
