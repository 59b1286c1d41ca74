"""A finished run has one writer, which writes its record, summary, pictures, and the files that deployment loads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from policyskip.build import Setup
from policyskip.deployment.policy_files import Family, PolicyFile
from policyskip.evaluation.decisions import Decisions, collapse_warnings, examples, save_decisions
from policyskip.runs.folder import Run
from policyskip.runs.tracking import Tracker
from policyskip.tasks.base import Judgement


def completed(
    decisions: Decisions, setup: Setup, split: str, static: Sequence[Sequence[float]], frozen_network: str
) -> Decisions:
    """Return a record with what comparisons need beside the decisions themselves.

    Args:
        static: MACs and accuracy of each fixed choice on the split.
        frozen_network: content hash of the network if the run left it as it was, else "".
    """
    return replace(
        decisions,
        static_F2=torch.tensor(static, dtype=torch.float64).reshape(-1, 2),
        images=setup.data.test.fingerprint() if split == "test" else "",
        network=frozen_network,
        classes=setup.data.classes,
    )


def head_of(setup: Setup, names: dict[str, str], seconds: float) -> dict[str, Any]:
    """Return the keys that a summary begins with."""
    steps, seed = setup.config["train"]["steps"], setup.config["seed"]
    return {**names, "seed": seed, "steps": steps, "seconds": round(seconds, 1)}


def write_finished(
    setup: Setup,
    run: Run,
    tracker: Tracker,
    head: dict[str, Any],
    judgement: Judgement,
    family: Family,
    described: dict[str, Any],
    draw: Callable[..., list[Path]],
    chosen: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a finished run into its folder, and close the tracker.

    ``policy.json`` is written last: a run that has it is finished, and what is deployed has figures.

    Args:
        setup: names the data.
        head: see :func:`head_of`.
        judgement: of the best weights on test.
        family: of the run's agent.
        described: the entries ``policy`` and ``network`` of ``policy.json`` (see ``deployment/policy_files.py``).
        draw: draws every picture, and returns their paths; it takes a folder, and ``metrics``, ``decisions``,
            ``images``, ``figures`` and ``choose_after`` (the first update whose weights may be kept) by keyword.
        chosen: what was chosen on validation images, for the summary.

    Returns: the summary.
    """
    data, record = setup.data, judgement.decisions
    figures = {f"test/{key}": value for key, value in judgement.figures.items()}
    summary = {**head, **save_decisions(record, run), **(chosen or {}), **figures}
    if head["steps"]:
        summary["warnings"] = collapse_warnings(record)
    run.save_json("summary.json", summary)
    schedule = setup.config["train"]
    shown = {"figures": judgement.figures, "choose_after": schedule.get("choose_after", 0.0) * schedule["steps"]}
    pictures = draw(run.folder / "plots", metrics=run.metrics(), decisions=record, images=data.test, **shown)
    policy = PolicyFile(family, **described, classes=data.classes, image_shape=data.image_shape)
    policy.save(run, head["steps"])
    files = [run.folder / name for name in (*policy.files, "policy.json", "summary.json", "config.yaml")]
    tracker.finish(summary, pictures, files, examples(record, data.test))
    return summary
