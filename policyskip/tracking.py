"""Metrics, pictures and files to Weights & Biases and to ``metrics.jsonl``. The only module that imports wandb."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from policyskip.errors import UserError
from policyskip.runs import Run

MODES = ("auto", "online", "offline", "none")


class Tracker:
    """Where a run's records go. Agents never see it.

    Args:
        mode: "auto" is online when logged in and offline otherwise, without a question or a wait; "none" writes
            ``metrics.jsonl`` alone.
        group: runs of one group are shown together.
    """

    def __init__(
        self, run: Run, mode: str, config: dict[str, Any], project: str = "policyskip", group: str | None = None
    ) -> None:
        if mode not in MODES:
            raise UserError(f"tracking.mode must be one of {', '.join(MODES)}, got {mode!r}")
        self.run = run
        self.wandb_run: Any = None
        self.where = "not tracked"
        if mode != "none":
            self._start_wandb(mode, config, project, group)

    def log(self, step: int, seconds: float, metrics: dict[str, Any]) -> None:
        """One record: the step, the seconds of training so far, and the figures."""
        self.run.append_metrics({"step": step, "seconds": round(seconds, 3), **metrics})
        if self.wandb_run is not None:
            self.wandb_run.log({"step": step, **{k: v for k, v in metrics.items() if isinstance(v, int | float)}})

    def finish(
        self, summary: dict[str, Any], pictures: list[Path], files: list[Path], examples: Examples | None
    ) -> None:
        """Close the run with its summary, pictures, deployable files and example images."""
        if self.wandb_run is None:
            return
        import wandb

        self.wandb_run.summary.update(summary)
        self.wandb_run.log({f"plots/{path.stem}": wandb.Image(str(path)) for path in pictures})
        if examples is not None:
            rows = [[wandb.Image(image), *cells] for image, *cells in examples.rows]
            self.wandb_run.log({"examples": wandb.Table(columns=["image", *examples.columns], data=rows)})
        artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", self.run.name), type="policy")
        for path in files:
            artifact.add_file(str(path))
        self.wandb_run.log_artifact(artifact)
        self.wandb_run.finish()

    def close(self) -> None:
        """End the W&B run of a run that was stopped."""
        if self.wandb_run is not None:
            self.wandb_run.finish(exit_code=1)

    def _start_wandb(self, mode: str, config: dict[str, Any], project: str, group: str | None) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")  # without it, looking for a login asks the network for a name
        import wandb

        if mode == "auto":
            mode = _pick_mode()
        if mode == "disabled":
            return
        settings = wandb.Settings(
            silent=True, console="off", init_timeout=20, finish_timeout=60, disable_git=True, save_code=False
        )
        start = dict(
            project=project, group=group, name=self.run.name, dir=str(self.run.folder), config=config, settings=settings
        )
        try:
            self.wandb_run = wandb.init(mode=mode, **start)  # type: ignore[arg-type]
        except wandb.errors.Error as error:
            print(f"W&B cannot be reached ({str(error).splitlines()[0]}); this run is written offline")
            self.wandb_run = wandb.init(mode="offline", **start)  # type: ignore[arg-type]
        self.wandb_run.define_metric("step")
        for prefix in ("train", "val"):
            self.wandb_run.define_metric(f"{prefix}/*", step_metric="step")
        self.where = self.wandb_run.url or f"offline; `wandb sync {self.wandb_run.settings.sync_dir}` brings it up"


class Examples:
    """Example images for a table: ``rows`` of an image, uint8 (H, W, 3), and one cell for each of ``columns``."""

    def __init__(self, columns: list[str], rows: list[list[Any]]) -> None:
        self.columns, self.rows = columns, rows


def _pick_mode() -> str:
    """What the user set (WANDB_MODE, ``wandb offline``); otherwise online if logged in, else offline."""
    import wandb

    chosen = wandb.setup().settings.mode
    if chosen not in ("online", "run"):
        return str(chosen)
    try:
        return "online" if wandb.login(prompt=False, verify=False) else "offline"
    except wandb.errors.Error:
        return "offline"


def log_comparison(made: Any, mode: str, config: dict[str, Any], project: str, group: str | None) -> str:
    return "not tracked"
