"""The one writer of a finished run: record, summary, pictures and the files that deployment loads."""

from __future__ import annotations

from typing import Any

from policyskip.build import Setup
from policyskip.evaluation import decisions, plots
from policyskip.evaluation.decisions import Evaluation, block_warnings
from policyskip.runs.folder import Run
from policyskip.runs.tracking import Tracker
from policyskip.static_front import StaticFront
from policyskip.tasks.fronts import static_figures


def report(
    setup: Setup,
    names: dict[str, str],
    result: Evaluation,
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
    figures = {f"test/{key}": value for key, value in {**result.figures(), **more, **static}.items()}
    judged = decisions.of_blocks(result, curve, data.test.fingerprint(), frozen, data.classes)
    told = decisions.record(judged, run)
    summary = {**names, "seed": seed, "steps": steps, "seconds": round(seconds, 1), **told, **figures}
    if steps:
        summary["warnings"] = block_warnings(result.keep_NK)
    front.save(run.folder / "front.json")
    run.save_json("summary.json", summary)
    pictures = plots.all_plots(
        run.folder / "plots", run.metrics(), result, data.test, data.classes, setup.backbone.stages, curve
    )
    run.save_json("policy.json", policy | {"steps": steps})  # the last: with it, the run is finished
    written = ("best.safetensors", "network.safetensors", "policy.json", "summary.json", "config.yaml")
    files = [path for path in (run.folder / name for name in written) if path.is_file()]
    tracker.finish(summary, pictures, files, decisions.examples(judged, data.test))
    return summary
