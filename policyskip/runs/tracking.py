"""Tracking: a run's metrics go to ``metrics.jsonl`` and, with its pictures and files, to Weights & Biases.

This is the only module that imports wandb.
"""

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
from typing import TYPE_CHECKING, Any

from policyskip.errors import check_choice, first_line
from policyskip.parallel import processes
from policyskip.runs.folder import Run

if TYPE_CHECKING:
    import wandb

MODES = ("auto", "online", "offline", "none")


class Tracker:
    """Writes a run's records to ``metrics.jsonl`` and to Weights & Biases (W&B).

    Agents never see it. Of several processes that make a run, only the first one writes.

    Args:
        run: the run folder.
        mode: "auto" is online when logged in and offline otherwise, without a question or a wait; "none" writes
            ``metrics.jsonl`` alone.
        config: the run's configuration.
        project: of W&B.
        group: W&B shows the runs of one group together.
        job_type: the command that makes the run.
        tags: words by which W&B finds the run.

    Attributes:
        where: the address of the W&B run, or a line that says where its offline files are, or that there are none.

    Raises:
        UserError: there is no such mode.
    """

    def __init__(
        self,
        run: Run,
        mode: str,
        config: dict[str, Any],
        project: str = "policyskip",
        group: str | None = None,
        job_type: str = "train",
        tags: Sequence[str] = (),
    ) -> None:
        check_choice("tracking.mode", mode, MODES)
        self.run = run
        self.wandb_run: wandb.Run | None = None
        self.where = "not tracked"
        if mode != "none" and processes.is_first():
            names = {"project": project, "group": group, "job_type": job_type, "tags": [tag[:64] for tag in tags]}
            self._start_wandb(mode, config, names)

    def log(self, step: int, seconds: float, metrics: dict[str, Any]) -> None:
        """Write one record: the step, the seconds of training so far, and the figures."""
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
        artifact_type: str = "policy",
    ) -> None:
        """Write a finished run's results to W&B and end the W&B run.

        Args:
            summary: W&B gets its numbers and texts, by which runs can be sorted; lists are only in the files.
            pictures: PNG files.
            files: they become one W&B artifact.
            examples: example images, or None.
            tables: each a list of rows with the same keys, by the name of the table.
            artifact_type: W&B's word for the kind of the artifact.
        """
        if self.wandb_run is None:
            return
        import wandb

        scalars = {key: value for key, value in summary.items() if isinstance(value, str | int | float | None)}
        self.wandb_run.summary.update(scalars | {"warnings": "; ".join(summary.get("warnings", []))})
        self.wandb_run.log({f"plots/{name}": wandb.Image(str(path)) for name, path in _by_name(pictures).items()})
        if examples is not None:
            rows = [[wandb.Image(image), *cells] for image, *cells in examples.rows]
            self.wandb_run.log({"examples": wandb.Table(columns=["image", *examples.columns], data=rows)})
        for name, lines in (tables or {}).items():
            cells = [list(line.values()) for line in lines]
            self.wandb_run.log({name: wandb.Table(columns=list(lines[0]), data=cells, allow_mixed_types=True)})
        artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", self.run.name, flags=re.ASCII), type=artifact_type)
        for path in files:
            artifact.add_file(str(path))
        self.wandb_run.log_artifact(artifact)
        self.wandb_run.finish()

    def close(self) -> None:
        """End the W&B run of a run that was stopped, as one that failed; after :meth:`finish` this changes nothing."""
        if self.wandb_run is not None:
            self.wandb_run.finish(exit_code=1)

    def _start_wandb(self, mode: str, config: dict[str, Any], names: dict[str, Any]) -> None:
        """Begin a W&B run in a mode that works here, and set ``where``."""
        os.environ.setdefault("WANDB_SILENT", "true")  # otherwise the search for a login asks the server for a name
        import wandb

        if mode == "auto":
            mode = _pick_mode()
        if mode == "disabled":
            return
        host = str(wandb.setup().settings.base_url)
        if mode != "offline" and not _server_answers(host):
            print(f"W&B cannot be reached (no answer from {host}); this run is written offline", flush=True)
            mode = "offline"
        settings = wandb.Settings(
            silent=True, console="off", init_timeout=20, finish_timeout=60, disable_git=True, save_code=False
        )
        # An absolute path, because W&B writes from a process of its own, whose current folder is that of the first run.
        options = dict(
            name=self.run.name,
            dir=str(self.run.path("wandb").parent.resolve()),
            config=config,
            settings=settings,
            **names,
        )
        try:
            self.wandb_run = wandb.init(mode=mode, **options)  # type: ignore[arg-type]
        except wandb.errors.Error as error:
            print(f"W&B cannot be reached ({first_line(error)}); this run is written offline", flush=True)
            self.wandb_run = wandb.init(mode="offline", **options)
        self.wandb_run.define_metric("step")
        for prefix in ("train", "val"):
            self.wandb_run.define_metric(f"{prefix}/*", step_metric="step")
        self.where = (
            self.wandb_run.url
            or f"offline; `wandb sync {shlex.quote(str(self.wandb_run.settings.sync_dir))}` brings it up"
        )


class Examples:
    """A table of example images: each of ``rows`` is an image, uint8 (H, W, 3), and a cell for each of ``columns``."""

    def __init__(self, columns: list[str], rows: list[list[Any]]) -> None:
        self.columns, self.rows = columns, rows


def _server_answers(host: str, seconds: float = 8.0) -> bool:
    """Return whether a server answers, if only with an error: W&B itself would wait much longer, also at the end."""
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
    """Return the mode that the user set (WANDB_MODE, ``wandb offline``), else online if logged in, else offline."""
    import wandb

    chosen = wandb.setup().settings.mode
    if chosen not in ("online", "run"):
        return str(chosen)
    try:
        return "online" if wandb.login(prompt=False, verify=False) else "offline"
    except wandb.errors.Error:
        return "offline"


def _by_name(pictures: list[Path]) -> dict[str, Path]:
    """Return pictures by the names of their files; those in a folder inside ``plots`` have its name in front."""
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
    """Write a comparison's tables, pictures and files to W&B, as a run of its own.

    Args:
        folder: of the comparison; all files in it are written.
        tables: rows of cells, by the name of the table; empty tables are left out.
        pictures: PNG files.
        mode, config, project, group: as for :class:`Tracker`.

    Returns: the tracker's ``where``.
    """
    tracker = Tracker(Run(folder), mode, config, project, group, "compare", ["comparison"])
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    summary = {"rows": len(tables.get("comparison", [])), "runs": len(tables.get("runs", []))}
    filled_tables = {name: rows for name, rows in tables.items() if rows}
    tracker.finish(summary, pictures, files, None, filled_tables, artifact_type="comparison")
    return tracker.where
