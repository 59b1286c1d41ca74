"""A finished run has one writer, which writes its record, summary, pictures, and the files that deployment loads."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from policyskip.build import Setup
from policyskip.data import groups_of
from policyskip.deployment.policy_files import Family, PolicyFile
from policyskip.errors import UserError, in_one_line, traceback_wanted
from policyskip.evaluation.decisions import Decisions, collapse_warnings, examples, save_decisions
from policyskip.rewards import Adaptive
from policyskip.runs.folder import REWARD, Run
from policyskip.runs.progress import waiting
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
        group_N=groups_of(setup.data.split(split)),
        network=frozen_network,
        classes=setup.data.classes,
    )


def head_of(setup: Setup, names: dict[str, str], seconds: float, way: str) -> dict[str, Any]:
    """Return the keys that a summary begins with.

    Args:
        way: in which the network was executed when the run was judged.
    """
    head = {"seed": setup.config["seed"], "steps": setup.config["train"]["steps"], "seconds": round(seconds, 1)}
    return {**names, **head, "execution": way, "precision": setup.how.precision}


def write_finished(
    setup: Setup,
    run: Run,
    tracker: Tracker,
    head: dict[str, Any],
    judgement: Judgement,
    family: Family,
    described: dict[str, Any],
    draw: Callable[..., list[Path]],
    write_more: Callable[[Run], None],
    chosen: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a finished run into its folder, all at once, and close the tracker.

    A run that has ``policy.json`` is finished, and what is deployed has these figures.

    Args:
        setup: names the data.
        head: see :func:`head_of`.
        judgement: of the best weights on test.
        family: of the run's agent.
        described: the entries ``policy`` and ``network`` of ``policy.json`` (see ``deployment/policy_files.py``).
        draw: draws every picture, and returns their paths; it takes a folder, and ``metrics``, ``decisions``,
            ``images``, ``figures`` and ``choose_after`` (the first update whose weights may be kept) by keyword.
        write_more: writes the files that only some families have, such as the network; it takes a run whose files
            become those of the finished one, together with all others.
        chosen: what was chosen on validation images, for the summary.

    Returns: the summary.
    """
    data, record = setup.data, judgement.decisions
    figures = {f"test/{key}": value for key, value in judgement.figures.items()}
    schedule = setup.config["train"]
    shown = {"figures": judgement.figures, "choose_after": schedule.get("choose_after", 0.0) * schedule["steps"]}
    policy = PolicyFile(family, **described, classes=data.classes, image_shape=data.image_shape)
    with run.generation() as new:
        write_more(new)
        if isinstance(setup.reward, Adaptive):
            new.save_json(REWARD, dict(setup.reward.state_dict()))
        summary = {**head, **save_decisions(record, new), **(chosen or {}), **figures}
        if head["steps"] or setup.warnings:
            summary["warnings"] = [*setup.warnings, *(collapse_warnings(record) if head["steps"] else [])]
        new.save_json("summary.json", summary)
        policy.save(new, head["steps"])
        with waiting("drawing pictures"), _going_on_without():
            draw(new.folder / "plots", metrics=run.metrics(), decisions=record, images=data.test, **shown)
        names = sorted(path.relative_to(new.folder) for path in new.folder.glob("plots/*.png"))
    files = [run.folder / name for name in (*policy.files, "policy.json", "summary.json", "config.yaml")]
    tracker.finish(summary, [run.folder / name for name in names], files, examples(record, data.test))
    return summary


@contextmanager
def _going_on_without() -> Iterator[None]:
    """Say it if a picture cannot be drawn, and go on: what a run has learned is worth more than its pictures."""
    try:
        yield
    except UserError:  # the disk is full: nothing else could be written either
        raise
    except Exception as error:
        if traceback_wanted():
            traceback.print_exception(error)
        print(f"warning: a picture could not be drawn ({in_one_line(error)}); all figures are there", flush=True)
