"""Tracking: a run's metrics go to ``metrics.jsonl`` and, with its pictures and files, to Weights & Biases.

This is the only module that imports wandb.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shlex
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from policyskip.config import first_problem
from policyskip.errors import UserError, check_choice, first_line, in_one_line
from policyskip.parallel import processes
from policyskip.runs import own_code
from policyskip.runs.folder import Run
from policyskip.runs.labels import LONGEST_LABEL, Labels
from policyskip.runs.progress import waiting
from policyskip.texts import one_line

if TYPE_CHECKING:
    import wandb

MODES = ("auto", "online", "offline", "none")
WANDB_RUN = "wandb.json"
"""The file of a run folder that names the run's W&B run, so that a run that goes on finds it."""
_Label = Annotated[str, Field(max_length=LONGEST_LABEL)]


class Tracker:
    """Writes a run's records to ``metrics.jsonl`` and to Weights & Biases (W&B).

    Agents never see it. Of several processes that make a run, only the first one writes.

    Args:
        run: the run folder.
        mode: "auto" is online when logged in and offline otherwise, without a question or a wait; "none" writes
            ``metrics.jsonl`` alone.
        config: the run's configuration.
        labels: what W&B shows the run under. A run that goes on keeps those that it began with, and its W&B run.

    Attributes:
        where: the address of the W&B run, or a line that says where its offline files are, or that there are none.
        chosen: the validation figures of the weights that were kept, such as ``val/accuracy``; W&B's own summary would
            have those of the last weights.

    Raises:
        UserError: there is no such mode.
    """

    def __init__(
        self,
        run: Run,
        mode: str,
        config: dict[str, Any],
        labels: Labels | None = None,
    ) -> None:
        check_choice("tracking.mode", mode, MODES)
        self.run = run
        self.wandb_run: wandb.Run | None = None
        self.where = "not tracked"
        self.chosen: dict[str, float] = {}
        if mode != "none" and processes.is_first():
            with waiting("starting Weights & Biases"):
                self._start_wandb(mode, config, labels or Labels())

    def log(self, step: int, seconds: float, metrics: dict[str, Any]) -> None:
        """Write one record: the step, the seconds of training so far, and the figures."""
        self.run.append_metrics({"step": step, "seconds": round(seconds, 3), **metrics})
        numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
        self._hand_over(lambda wandb_run: wandb_run.log({"step": step, **numbers}))

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

        def send(wandb_run: wandb.Run) -> None:
            _send_results(wandb_run, self.run, self.chosen | summary, pictures, files, examples, tables, artifact_type)
            wandb_run.finish()

        with waiting("handing everything to Weights & Biases"):
            self._hand_over(send)

    def close(self) -> None:
        """End the W&B run of a run that was stopped, as one that failed; after :meth:`finish` this changes nothing."""
        self._hand_over(lambda wandb_run: wandb_run.finish(exit_code=1))

    def _hand_over(self, action: Callable[[wandb.Run], object]) -> None:
        """Do something with the W&B run; if W&B fails, say so and go on without: the run's files have everything."""
        if self.wandb_run is None:
            return
        try:
            action(self.wandb_run)
        except Exception as error:  # its process may have ended, its disk may be full
            self.wandb_run = None
            self.where = f"not complete, because W&B failed: {one_line(in_one_line(error))}"
            print(self.where, flush=True)

    def _start_wandb(self, mode: str, config: dict[str, Any], labels: Labels) -> None:
        """Begin a W&B run in a mode that works here, or go on with the one that the folder names, and set ``where``."""
        os.environ.setdefault("WANDB_SILENT", "true")  # otherwise the search for a login asks the server for a name

        folder = self.run.folder.resolve()
        try:
            _read_settings()
            if (folder / "wandb").resolve() != folder / "wandb":
                raise UserError(f"{self.run.folder / 'wandb'} is a link, and nothing of a run is written through one")
            self.wandb_run = self._begun(mode, config, labels)
            if self.wandb_run is not None:
                self._describe(self.wandb_run)
        except Exception as error:  # of a variable such as WANDB_MODE=sideways, or because W&B's process has ended
            self.wandb_run = None
            reason = first_problem("", error) if isinstance(error, ValidationError) else in_one_line(error)
            self.where = f"not tracked: {one_line(reason)}"
            print(f"This run is {self.where}", flush=True)

    def _describe(self, wandb_run: wandb.Run) -> None:
        """Say what the steps of a W&B run are, add the user's own code to it, and set ``where``."""
        import wandb

        for prefix in ("train", "val"):
            wandb_run.define_metric(f"{prefix}/*", step_metric="step")
        wandb_run.define_metric("step")
        if code := own_code.kept(self.run):
            _log_files(wandb_run, wandb.Artifact(_artifact_name(f"code-{self.run.name}"), type="code"), code)
        offline = Path(str(wandb_run.settings.sync_dir))
        parts = sorted(offline.parent.glob(f"offline-run-*-{wandb_run.id}")) or [offline]
        folders = " ".join(shlex.quote(str(part)) for part in parts)
        self.where = wandb_run.url or f"offline; `wandb sync {folders}` uploads it"

    def _begun(self, mode: str, config: dict[str, Any], labels: Labels) -> wandb.Run | None:
        """Begin or go on with a W&B run; None if the user has disabled W&B."""
        import wandb

        if mode == "auto":
            mode = _pick_mode()
        if mode == "disabled":
            return None
        host = str(wandb.setup().settings.base_url)
        if mode != "offline" and not _server_answers(host):
            print(f"W&B cannot be reached (no answer from {host}); this run is written offline", flush=True)
            mode = "offline"
        settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=20,
            finish_timeout=60,
            disable_git=True,  # git executes what a repository's configuration says
            git_commit=own_code.commit_of(Path.cwd()),
            save_code=False,
        )
        known = self._known_run()
        options: dict[str, Any] = {
            "project": labels.project,
            "entity": labels.entity,
            "group": labels.group,
            "job_type": labels.job_type,
            "name": labels.name_of(Path(self.run.name)),
            "notes": labels.notes,
            "tags": labels.all_tags,
        }
        options |= known | ({"resume": "allow"} if known else {})
        # An absolute path, because W&B writes from a process of its own, whose current folder is that of the first run.
        folder = str(self.run.path("wandb").parent.resolve())
        options |= {"dir": folder, "config": _writable(config), "settings": settings}
        try:
            begun = wandb.init(mode=mode, **options)  # type: ignore[arg-type]
        except wandb.errors.Error as error:
            print(f"W&B cannot be reached ({one_line(first_line(error))}); this run is written offline", flush=True)
            begun = wandb.init(mode="offline", **options)
        if not known:
            kept = {key: options[key] for key in _WandbRun.model_fields if key in options}
            self.run.save_json(WANDB_RUN, kept | {"id": begun.id})
        return begun

    def _known_run(self) -> dict[str, Any]:
        """Return id and labels of the W&B run that this run began with; nothing if there is none, or no such file."""
        path = self.run.folder / WANDB_RUN
        if not path.is_file():
            return {}
        try:
            return _WandbRun.model_validate(self.run.load_json(WANDB_RUN)).model_dump()
        except (UserError, ValidationError):
            print(f"{path} is damaged; this run goes on as a new one in W&B", flush=True)
            return {}


def _send_results(
    wandb_run: wandb.Run,
    run: Run,
    summary: dict[str, Any],
    pictures: list[Path],
    files: list[Path],
    examples: Examples | None,
    tables: dict[str, list[dict[str, Any]]] | None,
    artifact_type: str,
) -> None:
    """Write a finished run's results to W&B; for the arguments see :meth:`Tracker.finish`."""
    import wandb

    scalars = {key: value for key, value in summary.items() if isinstance(value, str | int | float | None)}
    wandb_run.summary.update(scalars | {"warnings": "; ".join(summary.get("warnings", []))})
    wandb_run.log({f"plots/{name}": wandb.Image(str(path)) for name, path in _by_name(pictures).items()})
    if examples is not None:
        rows = [[wandb.Image(image), *cells] for image, *cells in examples.rows]
        wandb_run.log({"examples": wandb.Table(columns=["image", *examples.columns], data=rows)})
    for name, lines in (tables or {}).items():
        cells = [list(line.values()) for line in lines]
        wandb_run.log({name: wandb.Table(columns=list(lines[0]), data=cells, allow_mixed_types=True)})
    _log_files(wandb_run, wandb.Artifact(_artifact_name(run.name), type=artifact_type), {p.name: p for p in files})


def _log_files(wandb_run: wandb.Run, artifact: wandb.Artifact, files: dict[str, Path]) -> None:
    """Write files as one artifact of W&B, by their names in it."""
    for name, path in files.items():
        artifact.add_file(str(path), name=name)
    wandb_run.log_artifact(artifact)


class _WandbRun(BaseModel):
    """The content of the file that names a run's W&B run."""

    model_config = ConfigDict(extra="forbid", strict=True)
    id: Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")]
    project: Annotated[str, Field(pattern=r"^[^/\\#?%:]{1,128}$")]
    entity: _Label | None
    group: _Label | None
    job_type: _Label
    name: _Label
    notes: str | None
    tags: list[Annotated[str, Field(min_length=1, max_length=64)]]


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


def _read_settings() -> None:
    """Let W&B read the user's settings, but no ``wandb/settings`` of the current folder, which may be a stranger's.

    Such a file can name another server, to which W&B would then send the user's key.
    """
    import wandb

    with contextlib.chdir(Path(wandb.__file__).parent):
        wandb.setup()


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


def _artifact_name(name: str) -> str:
    """Return a name in the letters that W&B allows for artifacts."""
    return re.sub(r"[^\w.-]", "-", name, flags=re.ASCII)[:LONGEST_LABEL]


def _writable(content: Any) -> Any:
    """Return nested dictionaries and lists with texts that can be written as UTF-8."""
    if isinstance(content, dict):
        return {_writable(key): _writable(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_writable(value) for value in content]
    return content.encode("utf-8", "backslashreplace").decode() if isinstance(content, str) else content


def _by_name(pictures: list[Path]) -> dict[str, Path]:
    """Return pictures by the names of their files; those in a folder inside ``plots`` have its name in front."""
    return {path.stem if path.parent.name == "plots" else f"{path.parent.name}/{path.stem}": path for path in pictures}


def log_comparison(
    folder: Path,
    tables: dict[str, list[dict[str, Any]]],
    pictures: list[Path],
    mode: str,
    config: dict[str, Any],
    labels: Labels,
) -> str:
    """Write a comparison's tables, pictures and files to W&B, as a run of its own.

    Args:
        folder: of the comparison; all files in it are written.
        tables: rows of cells, by the name of the table; empty tables are left out.
        pictures: PNG files.
        mode, config, labels: as for :class:`Tracker`.

    Returns: the tracker's ``where``.
    """
    tracker = Tracker(Run(folder), mode, config, labels)
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    summary = {"rows": len(tables.get("comparison", [])), "runs": len(tables.get("runs", []))}
    filled_tables = {name: rows for name, rows in tables.items() if rows}
    tracker.finish(summary, pictures, files, None, filled_tables, artifact_type="comparison")
    return tracker.where
