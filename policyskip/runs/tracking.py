"""Metrics, pictures and files to Weights & Biases and to ``metrics.jsonl``. The only module that imports wandb."""

from __future__ import annotations

import http.client
import os
import re
import shlex
import ssl
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from policyskip.errors import UserError
from policyskip.parallel import processes
from policyskip.runs.folder import Run

MODES = ("auto", "online", "offline", "none")


class Tracker:
    """Where a run's records go. Agents never see it. Of several processes that make a run, the first one tracks it.

    Args:
        mode: "auto" is online when logged in and offline otherwise, without a question or a wait; "none" writes
            ``metrics.jsonl`` alone.
        group: runs of one group are shown together.
        kind: the command, which W&B calls the type of the job.
        tags: what to find the run by.
    """

    def __init__(
        self,
        run: Run,
        mode: str,
        config: dict[str, Any],
        project: str = "policyskip",
        group: str | None = None,
        kind: str = "train",
        tags: Sequence[str] = (),
    ) -> None:
        if mode not in MODES:
            raise UserError(f"tracking.mode must be one of {', '.join(MODES)}, got {mode!r}")
        self.run = run
        self.wandb_run: Any = None
        self.where = "not tracked"
        if mode != "none" and processes.is_first():
            names = {"project": project, "group": group, "job_type": kind, "tags": [tag[:64] for tag in tags]}
            self._start_wandb(mode, config, names)

    def log(self, step: int, seconds: float, metrics: dict[str, Any]) -> None:
        """One record: the step, the seconds of training so far, and the figures."""
        self.run.append_metrics({"step": step, "seconds": round(seconds, 3), **metrics})
        if self.wandb_run is not None:
            self.wandb_run.log({"step": step, **{k: v for k, v in metrics.items() if isinstance(v, int | float)}})

    def finish(
        self,
        summary: dict[str, Any],
        pictures: list[Path],
        files: list[Path],
        examples: Examples | None,
        tables: dict[str, list[dict[str, Any]]] | None = None,
        kind: str = "policy",
    ) -> None:
        """Close the run with its summary, pictures, example images, tables (by their names), and an artifact of a
        ``kind`` with its files. W&B's summary gets the figures that runs can be sorted by; lists are in the files."""
        if self.wandb_run is None:
            return
        import wandb

        plain = (str, int, float, type(None))
        scalars = {key: value for key, value in summary.items() if isinstance(value, plain)}
        self.wandb_run.summary.update(scalars | {"warnings": "; ".join(summary.get("warnings", []))})
        self.wandb_run.log({f"plots/{name}": wandb.Image(str(path)) for name, path in _named(pictures).items()})
        if examples is not None:
            rows = [[wandb.Image(image), *cells] for image, *cells in examples.rows]
            self.wandb_run.log({"examples": wandb.Table(columns=["image", *examples.columns], data=rows)})
        for name, lines in (tables or {}).items():
            content = [list(line.values()) for line in lines]
            self.wandb_run.log({name: wandb.Table(columns=list(lines[0]), data=content, allow_mixed_types=True)})
        artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", self.run.name, flags=re.ASCII), type=kind)
        for path in files:
            artifact.add_file(str(path))
        self.wandb_run.log_artifact(artifact)
        self.wandb_run.finish()

    def close(self) -> None:
        """End the W&B run of a run that was stopped."""
        if self.wandb_run is not None:
            self.wandb_run.finish(exit_code=1)

    def _start_wandb(self, mode: str, config: dict[str, Any], names: dict[str, Any]) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")  # without it, looking for a login asks the network for a name
        import wandb

        if mode == "auto":
            mode = _pick_mode()
        if mode == "disabled":
            return
        host = str(wandb.setup().settings.base_url)
        if mode != "offline" and not _answers(host):
            print(f"W&B cannot be reached (no answer from {host}); this run is written offline", flush=True)
            mode = "offline"
        settings = wandb.Settings(
            silent=True, console="off", init_timeout=20, finish_timeout=60, disable_git=True, save_code=False
        )
        # Absolute: W&B writes from a process of its own, which stays where the first run of this one was.
        start = dict(name=self.run.name, dir=str(self.run.folder.resolve()), config=config, settings=settings, **names)
        try:
            self.wandb_run = wandb.init(mode=mode, **start)  # type: ignore[arg-type]
        except wandb.errors.Error as error:
            print(f"W&B cannot be reached ({str(error).splitlines()[0]}); this run is written offline", flush=True)
            self.wandb_run = wandb.init(mode="offline", **start)
        self.wandb_run.define_metric("step")
        for prefix in ("train", "val"):
            self.wandb_run.define_metric(f"{prefix}/*", step_metric="step")
        self.where = (
            self.wandb_run.url
            or f"offline; `wandb sync {shlex.quote(str(self.wandb_run.settings.sync_dir))}` brings it up"
        )


class Examples:
    """Example images for a table: ``rows`` of an image, uint8 (H, W, 3), and one cell for each of ``columns``."""

    def __init__(self, columns: list[str], rows: list[list[Any]]) -> None:
        self.columns, self.rows = columns, rows


def _answers(host: str, seconds: float = 8.0) -> bool:
    """Whether a server answers, whatever it says: without this look W&B waits much longer, and again at the end."""
    try:
        with urllib.request.urlopen(host, timeout=seconds):
            return True
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # W&B has its own settings for certificates
    except (OSError, ValueError, http.client.HTTPException):
        return False


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


def _named(pictures: list[Path]) -> dict[str, Path]:
    """Pictures by their names; those in a folder of their own inside ``plots`` with the folder's."""
    return {path.stem if path.parent.name == "plots" else f"{path.parent.name}/{path.stem}": path for path in pictures}


def log_comparison(
    folder: Path,
    tables: dict[str, list[dict[str, Any]]],
    pictures: list[Path],
    mode: str,
    config: dict[str, Any],
    project: str,
    group: str | None,
) -> str:
    """A comparison's tables, pictures and files as a W&B run of its own.

    Returns: where it is.
    """
    tracker = Tracker(Run(folder), mode, config, project, group, "compare", ["comparison"])
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    summary = {"rows": len(tables.get("comparison", [])), "runs": len(tables.get("runs", []))}
    tracker.finish(
        summary, pictures, files, None, {name: lines for name, lines in tables.items() if lines}, "comparison"
    )
    return tracker.where
