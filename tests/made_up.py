"""Run folders without training: decisions, summary and metrics that say what a test wants them to say."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from policyskip.evaluation.decisions import Decisions, save_decisions
from policyskip.runs.folder import Run

DIGITS = {"_target_": "policyskip.data.digits", "batch_size": 32, "train": 1, "validation": 1, "test": 60}
CLASSES = tuple("0123456789")


def made_up_decisions(
    keep: list[list[int]],
    prediction: list[int] | None = None,
    label: list[int] | None = None,
    full: list[bool] | None = None,
    kind: str = "blocks",
    images: str = "made up",
    network: str = "frozen",
) -> Decisions:
    """Decisions of blocks that cost 1 MAC each, for a network of as many blocks."""
    keep_NK = torch.tensor(keep, dtype=torch.bool)
    count, blocks = keep_NK.shape
    return Decisions(
        label_N=torch.tensor(label or [0] * count),
        prediction_N=torch.tensor(prediction or [0] * count),
        full_correct_N=torch.tensor(full or [True] * count),
        ran_NK=keep_NK,
        macs_N=keep_NK.sum(1).double(),
        full_macs=float(blocks),
        static_F2=torch.tensor([[0.0, 0.1], [float(blocks), 0.9]], dtype=torch.float64),
        kind=kind,
        images=images,
        network=network,
        classes=CLASSES,
    )


def drawn(seed: int, agent: str = "blockdrop", count: int = 60, blocks: int = 6, **more: Any) -> Decisions:
    """Random decisions for images whose labels are the same for every seed and agent."""
    label_N = torch.randint(0, 10, (count,), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(100 * seed + len(agent))
    right_N, full_N = (torch.rand(count, generator=generator) < p for p in (0.8, 0.9))
    prediction_N = torch.where(right_N, label_N, (label_N + 1) % 10)
    keep_NK = torch.rand(count, blocks, generator=generator) < 0.6
    if more.get("kind") == "exits":
        exit_N = torch.randint(0, blocks, (count,), generator=generator)
        keep_NK = torch.arange(blocks) <= exit_N.unsqueeze(1)
    columns = (keep_NK.int().tolist(), prediction_N.tolist(), label_N.tolist(), full_N.tolist())
    return made_up_decisions(*columns, **more)


def judged(
    margin: float,
    low: float,
    high: float,
    rival: str = "2 evenly spread blocks",
    finished: bool = True,
    near: bool = True,
    family: str = "evenly spread blocks",
    families: dict[str, tuple[float, float, float | None]] | None = None,
) -> dict[str, Any]:
    """What a run's summary says of its policy against the strongest fixed choice.

    Args:
        margin, low, high: above the rival that is named, with the ends of its interval over images.
        family: of that rival.
        families: the same for further families of rivals, by name.
    """
    compared: dict[str, tuple[float, float, float | None]] = {family: (margin, low, high)} | (families or {})
    lines = [
        {"family": name, "name": rival if n == 0 else f"a choice of {name}", "accuracy": 0.8 - m, "macs": 1.0}
        | {"margin": m, "low": a, "high": b}
        for n, (name, (m, a, b)) in enumerate(compared.items())
    ]
    denied = any(end is not None and end < 0 for *_, end in compared.values())
    verdict = "does not pay" if denied else "pays" if low > 0 and finished and near else "not shown"
    figures: dict[str, Any] = {
        "verdict": verdict,
        "verdict_because": "as the test says" if near else "no choice is near",
    }
    figures |= {
        "rivals": lines,
        "rival": rival,
        "rival_accuracy": 0.8 - margin,
        "rival_macs": 1.0,
        "rival_finished": finished,
    }
    figures |= {"rival_margin": margin, "rival_low": low, "rival_high": high, "static_margin": None}
    return {f"test/{key}": value for key, value in figures.items()}


def made_up_run(
    folder: Path,
    decisions: Decisions,
    agent: str = "blockdrop",
    seed: int = 0,
    summary: dict[str, Any] | None = None,
    recorded: bool = True,
    **settings: Any,
) -> Path:
    """A finished run's folder that holds these decisions."""
    folder.mkdir(parents=True)
    config = {"seed": seed, "run": {"dir": str(folder)}, "data": DIGITS, "agent": {"name": agent, **settings}}
    written = re.sub(r"\\ud[89a-f]\w\w", "?", json.dumps(config))  # YAML has no lone surrogates
    (folder / "config.yaml").write_text(f"# policyskip train agent={ascii(agent)[1:-1]}\n{written}")
    from_record = save_decisions(decisions, Run(folder))
    if not recorded:
        (folder / "decisions.safetensors").unlink()
        from_record = {}
    blocks = decisions.kind == "blocks"
    share_K = [*decisions.ran_NK.double().mean(0).tolist(), 0.0]
    figures = {
        "accuracy": decisions.correct_N.double().mean().item(),
        "full_accuracy": decisions.full_correct_N.double().mean().item(),
        "macs_mean": decisions.macs_N.mean().item(),
        "full_macs": decisions.full_macs,
        "macs_fraction": decisions.macs_N.mean().item() / decisions.full_macs,
        "unique_decisions": len(decisions.ran_NK.unique(dim=0)),
        "static_margin": 0.01,
    }
    if blocks:
        figures |= {"kept_mean": decisions.ran_NK.sum(1).double().mean().item(), "blocks": decisions.ran_NK.shape[1]}
    else:
        figures |= {"exit_share": [a - b for a, b in pairwise(share_K)]}
        figures |= {"oracle_macs": 1.0, "oracle_accuracy": 0.99}
    content = {"agent": agent, "env": "BlockSelection-v0" if blocks else "EarlyExit-v0", "backbone": "net"}
    content |= {"data": "digits", "seed": seed, "seconds": 10.0 + seed, **from_record}
    content |= {f"test/{key}": value for key, value in figures.items()}
    (folder / "summary.json").write_text(json.dumps(content | (summary or {})))
    records = [{"step": s, "val/accuracy": 0.5 + s / 100 + seed / 100, "val/macs_fraction": 0.6} for s in (10, 20, 30)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder
