"""The labels of a run in Weights & Biases (W&B): a key that was typed beats W&B's variable, which beats a default."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from policyskip.errors import UserError
from policyskip.texts import one_line

if TYPE_CHECKING:
    from policyskip.config import TrackingSection

PROJECT = "policyskip"
LONGEST_TAG, LONGEST_LABEL = 64, 128
"""Letters that W&B takes."""
FORBIDDEN_IN_PROJECT = "/\\#?%:"
UNLABELLED_KEYS = ("run.", "tracking.", "hydra.", "device")
"""The beginnings of keys that say nothing about what a run does."""


@dataclass(frozen=True)
class Labels:
    """Holds what W&B shows a run under.

    Attributes:
        project, entity: where the run is; the entity is a user or a team, None: the one that is logged in.
        group: W&B shows the runs of one group together.
        job_type: the command that makes the run.
        name: None: the run folder's name, and what was changed.
        notes: a text beside the run.
        tags: words by which W&B finds the run.
        changes: what was changed on the command line, such as "reward.penalty=2"; they become tags too.
    """

    project: str = PROJECT
    entity: str | None = None
    group: str | None = None
    job_type: str = "train"
    name: str | None = None
    notes: str | None = None
    tags: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()

    def name_of(self, folder: Path) -> str:
        """Return the name of the run in a folder: the folder's, and the changes that it does not show."""
        if self.name:
            return self.name
        parts = [folder.name]
        for change in self.changes:
            key, _, value = change.removeprefix("~").partition("=")
            if not (value and value in folder.name):
                parts.append(f"{key.removesuffix('._target_').rpartition('.')[2]}={value}")
        return _short(" ".join(parts), LONGEST_LABEL)

    @property
    def all_tags(self) -> list[str]:
        """Return the tags and the changes, each once, as W&B takes them."""
        tags = (_short(tag, LONGEST_TAG) for tag in (*self.tags, *self.changes))
        return [tag for tag in dict.fromkeys(tags) if tag.strip()]


def labels_of(
    section: TrackingSection, group: str | None, job_type: str, tags: Iterable[str] = (), changes: Sequence[str] = ()
) -> Labels:
    """Make the labels of a run.

    Args:
        section: what was typed; a key that was not is None.
        group, job_type: used if neither a key nor a variable names another.
        tags: added to those of the user.
        changes: what was typed; keys that say nothing about what a run does are left out.

    Raises:
        UserError: W&B would not take a label.
    """
    if section.mode == "none":
        return Labels()
    typed_tags = section.tags or _variable("TAGS", "").split(",")
    return Labels(
        project=_project(section.project or _variable("PROJECT", PROJECT)),
        entity=_label("tracking.entity", section.entity or _variable("ENTITY")) or None,
        group=_label("tracking.group", section.group or _variable("RUN_GROUP", group or "")) or None,
        job_type=_label("WANDB_JOB_TYPE", _variable("JOB_TYPE", job_type)),
        name=_label("tracking.name", section.name or _variable("NAME")) or None,
        notes=_writable(section.notes or _variable("NOTES")) or None,
        tags=(*map(_checked_tag, filter(None, map(str.strip, typed_tags))), *tags),
        changes=tuple(filter(_is_telling, (change.lstrip("+") for change in changes))),
    )


def _is_telling(change: str) -> bool:
    """Return whether a change says what a run does; ``GROUP=custom`` stands beside the class that it is for."""
    return not change.startswith(UNLABELLED_KEYS) and not change.endswith("=custom")


def _variable(name: str, default: str = "") -> str:
    """Return the value of one of W&B's variables, which begin with WANDB_, or what stands for it if it is not set."""
    return os.environ.get(f"WANDB_{name}") or default


def _project(name: str) -> str:
    """Return the name of a project that W&B takes, or refuse (UserError) it."""
    if any(letter in name for letter in FORBIDDEN_IN_PROJECT):
        entity, _, project = name.partition("/")
        hint = one_line(f"; say tracking.entity={entity} tracking.project={project}") if entity and project else ""
        forbidden = " ".join(FORBIDDEN_IN_PROJECT)
        key = "the project of W&B (tracking.project or WANDB_PROJECT)"
        raise UserError(f"{key} must not have any of {forbidden}, got {one_line(name)!r}{hint}")
    return _label("tracking.project", name)


def _label(key: str, label: str) -> str:
    """Return a label that W&B takes, or refuse (UserError) one that is too long."""
    if len(label) > LONGEST_LABEL:
        raise UserError(f"{key} must have at most {LONGEST_LABEL} letters, got {len(label)}: {one_line(label, 40)!r}")
    return one_line(label)


def _checked_tag(tag: str) -> str:
    """Return a tag of the user's that W&B takes, or refuse (UserError) one that is too long."""
    if len(tag) > LONGEST_TAG:
        key = "a tag of W&B (tracking.tags or WANDB_TAGS)"
        raise UserError(f"{key} must have at most {LONGEST_TAG} letters, got {len(tag)}: {one_line(tag, 40)!r}")
    return one_line(tag)


def _short(text: str, longest: int) -> str:
    return one_line(text, longest)[:longest]


def _writable(text: str) -> str:
    """Return a text of several lines in letters that can be written as UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
