"""The one writer of a finished run: record, summary, pictures and the files that deployment loads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from policyskip.build import Setup
from policyskip.evaluation import decisions, plots
from policyskip.evaluation.decisions import Decisions, collapse_warnings
from policyskip.evaluation.figures import block_figures
from policyskip.runs.folder import Run
from policyskip.runs.tracking import Tracker
from policyskip.static_front import StaticFront
from policyskip.tasks.fronts import static_figures


def report(
    setup: Setup,
    names: dict[str, str],
    result: Decisions,
    front: StaticFront,
    policy: dict[str, Any],
    run: Run,
    tracker: Tracker,
    seconds: float,
    frozen: str = "",
    **more: float,
) -> dict[str, Any]:
    """Write ``policy`` (the content of ``policy.json``), front, decisions, summary and pictures of a result on test,
    and close the tracker. ``frozen`` is the network's content hash unless the run trained it; ``more`` are other
    figures on test.

    Returns: the summary.
    """
    data, steps, seed = setup.data, setup.config["train"]["steps"], setup.config["seed"]
    static, curve = static_figures(setup, result, front)
    figures = {f"test/{key}": value for key, value in {**block_figures(result), **more, **static}.items()}
    judged = replace(
        result,
        static_F2=torch.tensor(curve, dtype=torch.float64).reshape(-1, 2),
        images=data.test.fingerprint(),
        network=frozen,
        classes=data.classes,
    )
    told = decisions.save_decisions(judged, run)
    summary = {**names, "seed": seed, "steps": steps, "seconds": round(seconds, 1), **told, **figures}
    if steps:
        summary["warnings"] = collapse_warnings(result)
    front.save(run.folder / "front.json")
    run.save_json("summary.json", summary)
    pictures = plots.block_pictures(run.folder / "plots", run.metrics(), judged, data.test, setup.backbone.stages)
    run.save_json("policy.json", policy | {"steps": steps})  # the last: with it, the run is finished
    written = ("best.safetensors", "network.safetensors", "policy.json", "summary.json", "config.yaml")
    files = [path for path in (run.folder / name for name in written) if path.is_file()]
    tracker.finish(summary, pictures, files, decisions.examples(judged, data.test))
    return summary
