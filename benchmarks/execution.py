"""Is skipping really faster? Sparse execution beside the masked execution of earlier systems, and beside the ideal.

    python benchmarks/execution.py [--run runs/x …] [--depth 110] [--repeats 9]      (a CPU; minutes)
    python benchmarks/execution.py --device cuda                                     (runs gpu_execution.py)

Every figure is a median of ratios, measured in turn in one process. All but those of ``predict`` are measured with a
ResNet-110 on images of 32×32 pixels, and with random decisions for each image that keep 31 % of the blocks:

- rollouts_vs_masked: images a second, against masked execution as the originals do it (``published``);
  rollouts_vs_masked_folded: against ``dense`` with the folded network, its memory layout, and convolutions that include
  the ReLU and the shortcut;
- rollouts_vs_ideal, rollouts_vs_ideal_batch1: against the fastest forward of the whole network, divided by the share of
  the MACs that are kept;
- step_vs_masked, step_vs_masked_folded: a BlockDrop update (one sample), against an update with masked rollouts in two
  passes, of the same two kinds; at alpha 0.95, where samples keep 34 %, and (…_alpha80) at 0.8, where they keep 39 %;
- predict_time_over_macs_batch1, …256: ``predict`` of a run (with the time of its policy) against its whole network, as
  the ratio of times over the ratio of MACs; keys of further runs end in the names of their folders;
- env_overhead: the time of a vector step beyond that of the forward pass in it;
- peak_memory_vs_dense: the peak memory of a sparse forward pass, against ``dense`` with the same network.

Writes benchmarks/results/execution-<machine>.json with these keys and the raw repeats.
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
from policyskip.data import TensorImages, batch_at, spread_indices
from policyskip.deployment.predictors import Predictor
from policyskip.deployment.profiling import device_name, side_by_side
from policyskip.envs.block_selection import BlockSelectionVectorEnv
from policyskip.memory import keep_freed_memory
from policyskip.rewards import Outcome

RESULTS = Path(__file__).parent / "results"
KEPT = 0.31
"""The share of the blocks that run."""


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """Return the median of the ratios of times that were measured side by side."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def random_keep(B: int, K: int) -> Tensor:
    """Draw decisions, bool (B, K), that keep a share ``KEPT`` of the blocks."""
    return torch.rand(B, K) < KEPT


def published(network: Backbone, images: Tensor, keep_BK: Tensor) -> Tensor:
    """Return logits (B, C) by the originals' formula: every block for every image, then blended by multiplication."""
    x = network.features(images)
    for block, keep_B in zip(network.blocks, keep_BK.float().unbind(1), strict=True):
        shortcut, mask = block.shortcut(x), keep_B.view(-1, 1, 1, 1)
        x = torch.relu(shortcut + block.residual(x)) * mask + shortcut * (1 - mask)
    return network.head(x)


def random_images(B: int, device: torch.device, size: int = 32) -> Tensor:
    """Draw images, uint8 (B, 3, H, W)."""
    return torch.randint(0, 256, (B, 3, size, size), dtype=torch.uint8, device=device)


@torch.no_grad()
def rollouts(
    network: Backbone, batch: int, rounds: int, repeats: int, masked: bool = True
) -> tuple[dict[str, list[float]], float]:
    """Measure the seconds of ``rounds`` batches with sparse, whole and masked execution.

    Returns: the seconds of each repeat, by the way of execution; and the share of the MACs that the decisions need.
    """
    device, K = network.mean.device, network.num_blocks
    fast, images = folded(network), random_images(batch, network.mean.device)
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
    """An environment with the originals' execution: a pass for each rollout, and every block for every image."""

    @torch.no_grad()
    def score(self, keep: Tensor) -> Outcome:
        images, label_B = self.feed.batch.images, self.feed.batch.label_B
        keep_SBK = keep if keep.dim() == 3 else keep.unsqueeze(0)
        logits_BC = torch.cat([self.masked(images, keep_BK) for keep_BK in keep_SBK])
        return self._outcome(logits_BC, label_B.repeat(len(keep_SBK)), keep_SBK.flatten(0, 1))

    def masked(self, images: Tensor, keep_BK: Tensor) -> Tensor:
        return published(self.backbone, images, keep_BK)


class MaskedFoldedEnv(MaskedEnv):
    """An environment with masked execution of the folded network."""

    def masked(self, images: Tensor, keep_BK: Tensor) -> Tensor:
        return dense(self.executed, images, keep_BK)


def training_step(
    network: Backbone, batch: int, alpha: float, repeats: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Measure the seconds of BlockDrop updates whose greedy decisions are random for each image and keep 31 %.

    Returns: the seconds of each repeat, and the share of the blocks that was kept, both by the way of execution.
    """
    device, K = network.mean.device, network.num_blocks
    images = TensorImages(random_images(4 * batch, device), torch.randint(0, 10, (4 * batch,), device=device))
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
    """Measure the seconds of a run's ``predict`` and of its whole network on ``count`` test images.

    Returns: the seconds of each repeat, and the MACs of ``predict`` as a share of the whole network's.
    """
    predictor = policyskip.load(run, device=str(device))
    assert isinstance(predictor, Predictor)
    data, _ = build_data(yaml.safe_load((run / "config.yaml").read_text())["data"], device)
    images = batch_at(data.test.plain(), spread_indices(count, len(data.test))).images
    batches = images.split(batch)
    calls: dict[str, Callable[[], object]] = {
        "predict": lambda: [predictor.predict(batch_images) for batch_images in batches],
        "whole": lambda: [predictor.backbone(batch_images) for batch_images in batches],
    }
    macs = float(predictor.predict(images).macs_B.mean()) / predictor.costs.full
    return side_by_side(calls, repeats, device), macs


@torch.no_grad()
def stepping(network: Backbone, batch: int, repeats: int) -> dict[str, list[float]]:
    """Measure the seconds of vector steps, and of their forward passes alone."""
    device = network.mean.device
    images = TensorImages(random_images(4 * batch, device), torch.randint(0, 10, (4 * batch,), device=device))
    env = BlockSelectionVectorEnv(batch, backbone=network, images=images)
    keep_BK = random_keep(batch, network.num_blocks).to(device)
    calls: dict[str, Callable[[], object]] = {
        "step": lambda: env.step(keep_BK),
        "forward": lambda: sparse(env.executed, env.observation, keep_BK),
    }
    return side_by_side(calls, repeats, device)


@torch.no_grad()
def peak(way: str, depth: int, batch: int, device: str) -> float:
    """Return the peak memory of one forward pass in bytes, without network and images. Call it in a fresh process."""
    network = cifar_resnet(10, depth, checkpoint="random").freeze().to(device)
    images, keep_BK = random_images(batch, torch.device(device)), random_keep(batch, network.num_blocks).to(device)
    fast = folded(network)
    execute: Callable[[], Tensor] = {
        "sparse": lambda: sparse(fast, images, keep_BK),
        "dense": lambda: dense(fast, images, keep_BK),
    }[way]
    fast(images[:1])
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak that the system remembers
    execute()
    return resident("VmHWM") - before


def resident(key: str) -> float:
    """Return the bytes of this process that are in memory now ("VmRSS"), or were at the peak ("VmHWM")."""
    status = Path("/proc/self/status").read_text().split(key + ":")[1]
    return 1024.0 * float(status.split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--run", nargs="+", default=["runs/benchmark-blockdrop-0"])
    parser.add_argument("--depth", type=int, default=110)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--peak", choices=("sparse", "dense"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device.startswith("cuda"):
        script = Path(__file__).with_name("gpu_execution.py")
        given = ["--device", options.device, "--repeats", str(options.repeats)]
        raise SystemExit(subprocess.run([sys.executable, script, *given]).returncode)
    keep_freed_memory()
    torch.manual_seed(0)
    if options.peak:
        print(peak(options.peak, options.depth, options.batch, options.device))
        return
    device = torch.device(options.device)
    network = cifar_resnet(10, options.depth, checkpoint="random").freeze()
    network = network.to(device)  # in torch's own memory layout, with which masked execution was published
    figures: dict[str, Any] = {}
    raw: dict[str, Any] = {}

    raw["rollouts"], share = rollouts(network, options.batch, 1, options.repeats)
    figures["rollouts_vs_masked"] = median_ratio(raw["rollouts"]["masked"], raw["rollouts"]["sparse"])
    figures["rollouts_vs_masked_folded"] = median_ratio(raw["rollouts"]["masked_folded"], raw["rollouts"]["sparse"])
    figures["rollouts_vs_ideal"] = share * median_ratio(raw["rollouts"]["whole"], raw["rollouts"]["sparse"])
    raw["rollouts_batch1"], share = rollouts(network, 1, 20, options.repeats, masked=False)
    figures["rollouts_vs_ideal_batch1"] = share * median_ratio(
        raw["rollouts_batch1"]["whole"], raw["rollouts_batch1"]["sparse"]
    )
    for alpha, suffix in ((0.95, ""), (0.8, "_alpha80")):
        raw[f"step{suffix}"], raw[f"step{suffix}_kept"] = training_step(network, options.batch, alpha, options.repeats)
        for way in ("masked", "masked_folded"):
            ratio = median_ratio(raw[f"step{suffix}"][way], raw[f"step{suffix}"]["sparse"])
            figures[f"step_vs_{way}{suffix}"] = ratio
    for n, run in enumerate(map(Path, options.run)):
        if not (run / "policy.json").is_file():
            print(f"no run {run}, so its predict is not measured; make it with `policyskip train run.dir={run}`")
            continue
        for batch, count in ((1, 300), (256, 2048)):
            name = f"batch{batch}" + (f"_{run.name}" if n else "")
            raw[f"predict_{name}"], macs = predict(run, batch, count, options.repeats, device)
            ratio = median_ratio(*(raw[f"predict_{name}"][way] for way in ("predict", "whole")))
            raw[f"predict_{name}"]["macs"] = macs
            figures[f"predict_time_over_macs_{name}"] = ratio / macs
    raw["stepping"] = stepping(network, options.batch, 3 * options.repeats)
    figures["env_overhead"] = median_ratio(raw["stepping"]["step"], raw["stepping"]["forward"]) - 1
    same_options = ["--device", options.device, "--depth", str(options.depth), "--batch", str(options.batch)]
    command = [sys.executable, __file__, *same_options]
    peak_bytes = {
        way: float(subprocess.run([*command, "--peak", way], check=True, capture_output=True, text=True).stdout)
        for way in ("sparse", "dense")
    }
    raw["peak_bytes"] = peak_bytes
    figures["peak_memory_vs_dense"] = peak_bytes["sparse"] / peak_bytes["dense"]

    about = {"machine": device_name(device), "threads": torch.get_num_threads(), "torch": torch.__version__}
    content = {**figures, **about, "depth": options.depth, "batch": options.batch, "kept": KEPT, "raw": raw}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"execution-{platform.machine()}.json").write_text(json.dumps(content, indent=1) + "\n")
    print("| figure | value |\n|---|---|")
    for key, value in figures.items():
        print(f"| {key} | {value:.3f} |")


if __name__ == "__main__":
    main()
