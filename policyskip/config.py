"""The settings that can be typed, with their types. This module must not import torch, which takes seconds."""

from __future__ import annotations

import os
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from omegaconf import DictConfig, ListConfig, OmegaConf
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
)
from pydantic_core import PydanticCustomError

from policyskip.errors import UserError
from policyskip.texts import represented


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    groups: ClassVar[tuple[str, ...]] = ()
    """The groups of a command's configuration, which are checked when they are built."""
    required_group: ClassVar[str | None] = None
    """A group that tells the command's configuration from those of other commands."""


Way = Literal["auto", "kernel", "gather", "dense"]
Precision = Literal["float32", "float32_exact", "bfloat16", "float16"]


class TrainSection(_Section):
    steps: NonNegativeInt  # 0 for agents that have nothing to learn; see tasks/dispatch.py
    validate_every: PositiveInt
    log_every: PositiveInt
    choose_after: Annotated[float, Field(ge=0, le=1, strict=False)]


class RunSection(_Section):
    dir: str
    resume: str | None
    trust: bool = False


class FrontSection(_Section):
    budget: NonNegativeFloat | None
    images: PositiveInt
    seconds: NonNegativeFloat | None = None
    learner_steps: NonNegativeInt | None = None  # in runs of older versions, whose search had a learner; not read


class RivalsSection(FrontSection):
    rivals: list[str] = []  # finished runs that decide the same for every image


def _no_rivals(rivals: list[str]) -> list[str]:
    """Refuse rivals where there is no policy to compare with them."""
    if rivals:
        raise PydanticCustomError("rivals", "train compares rivals with a policy, and here is none")
    return rivals


class SearchSection(FrontSection):
    rivals: Annotated[list[str], AfterValidator(_no_rivals)] = []


class TargetSection(_Section):
    accuracy_drop: float | None
    macs_fraction: float | None
    knee: bool

    @property
    def chosen(self) -> dict[str, Any]:
        """Return the targets that were set; an empty dictionary if none was."""
        return {key: value for key, value in self.model_dump().items() if value is not None and value is not False}


class TrackingSection(_Section):
    mode: Literal["auto", "online", "offline", "none"]
    project: str | None = None
    group: str | None = None
    entity: str | None = None
    name: str | None = None
    tags: list[str] = []
    notes: str | None = None


class Settings(_Section):
    """The settings that ``train`` takes."""

    groups: ClassVar[tuple[str, ...]] = ("data", "backbone", "reward", "env", "agent")
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    device: str
    execution: Way = "auto"  # runs of older versions say nothing of it, nor of the precision
    precision: Precision = "float32"
    train: TrainSection
    run: RunSection
    tracking: TrackingSection
    front: RivalsSection | None = None
    target: TargetSection | None = None


class PretrainSettings(Settings):
    """The settings that ``pretrain`` takes."""

    groups = ("data", "backbone", "pretrain")
    required_group = "pretrain"
    precision: Literal["float32"] = "float32"  # the network learns, and is judged as it is


MOVABLE = ("data", "backbone")
"""The groups of a run of which keys can be typed beside ``run=``, such as ``data.root``."""


class CalibrateSettings(_Section):
    """The settings that ``calibrate`` takes."""

    groups = MOVABLE
    run: str
    device: str
    execution: Way
    precision: Precision | None
    trust: bool
    target: TargetSection


class FrontSettings(_Section):
    """The settings that ``front`` takes."""

    groups = ("data", "backbone", "env")
    device: str
    execution: Way
    precision: Precision
    front: SearchSection
    output: str | None


class CompareSettings(_Section):
    """The settings that ``compare`` takes."""

    groups = MOVABLE
    runs: str | list[str]
    output: str
    overwrite: bool
    recompute: bool
    images: bool
    device: str
    execution: Way
    precision: Precision | None
    trust: bool
    tracking: TrackingSection


class EvaluateSettings(_Section):
    """The settings that ``evaluate`` takes."""

    groups = MOVABLE
    run: str
    split: Literal["train", "validation", "test"]
    device: str
    execution: Way
    precision: Precision | None
    trust: bool


class ProfileSettings(_Section):
    """The settings that ``profile`` takes."""

    groups = ("data", "backbone")
    run: str | None
    trust: bool
    batch_sizes: Annotated[list[PositiveInt], Field(min_length=1)]
    repeats: PositiveInt
    images: PositiveInt
    device: str
    execution: Way
    precision: Precision | None
    output: str | None


Checked = TypeVar("Checked", bound=_Section)


def settings_of(config: DictConfig | dict[str, Any], section: type[Checked]) -> Checked:
    """Check the settings of a configuration; its groups are left to those who build them.

    Raises:
        UserError: naming the first key that is unknown or has a wrong value, or the group that is missing.
    """
    content = plain(config) if isinstance(config, DictConfig) else config
    if section.required_group is not None:
        group_of(content, section.required_group)
    content = {key: value for key, value in content.items() if key not in section.groups}
    try:
        return section.model_validate(content)
    except ValidationError as error:
        raise UserError(first_problem("", error)) from error


def plain(config: DictConfig) -> dict[str, Any]:
    """Resolve a configuration into plain dictionaries.

    Raises:
        UserError: a key that has no default is not set.
    """
    missing = OmegaConf.missing_keys(config)
    if missing:
        raise UserError(f"{min(missing)} is not set; add {min(missing)}=… to the command")
    content = OmegaConf.to_container(config, resolve=True)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


PATHS = (
    *("run", "runs", "output", "run.dir", "run.resume", "front.rivals"),
    *("data.root", "backbone.checkpoint", "reward.table"),
)
"""The keys of configurations that name files and folders."""


def expand_home(config: DictConfig) -> None:
    """Replace a ``~`` at the beginning of a path by the user's folder, which no shell does behind a ``=``."""
    for key in PATHS:
        value = OmegaConf.select(config, key, throw_on_missing=False)
        if isinstance(value, str) and value.startswith("~"):
            OmegaConf.update(config, key, os.path.expanduser(value))
        elif isinstance(value, ListConfig):
            OmegaConf.update(config, key, [os.path.expanduser(str(path)) for path in value])


def group_of(content: dict[str, Any], group: str) -> dict[str, Any]:
    """Return a group's part of a configuration.

    Raises:
        UserError: the configuration does not have the group.
    """
    node = content.get(group)
    if not isinstance(node, dict):
        raise UserError(f"the configuration has no {group}, and this command needs one")
    return node


def first_problem(prefix: str, error: ValidationError) -> str:
    """Describe the first problem that pydantic found with the values below the key ``prefix``."""
    problem = error.errors()[0]
    names = [str(name) for name in problem["loc"] if not isinstance(name, int)]
    key = ".".join([prefix, *names] if prefix else names)
    if problem["type"] == "extra_forbidden":
        return f"there is no key {key}"
    if problem["type"] == "missing":
        return f"there must be a key {key}"
    return f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}, got {represented(problem['input'])}"
