"""The settings that can be typed, and their types. Nothing here needs torch."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from omegaconf import DictConfig, OmegaConf
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
)

from policyskip.errors import UserError


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    groups: ClassVar[tuple[str, ...]] = ()
    """The groups that a command has beside its settings."""


class TrainSection(_Section):
    steps: NonNegativeInt  # 0 for agents that have nothing to learn; see tasks.start
    validate_every: PositiveInt
    log_every: PositiveInt
    choose_after: Annotated[float, Field(ge=0, le=1, strict=False)]


class RunSection(_Section):
    dir: str
    resume: str | None
    trust: bool = False


class FrontSection(_Section):
    budget: NonNegativeFloat
    images: PositiveInt
    learner_steps: NonNegativeInt


class TargetSection(_Section):
    accuracy_drop: float | None
    macs_fraction: float | None
    knee: bool

    @property
    def given(self) -> dict[str, Any]:
        """What was asked for; empty if nothing was."""
        return {key: value for key, value in self.model_dump().items() if value is not None and value is not False}


class TrackingSection(_Section):
    mode: Literal["auto", "online", "offline", "none"]
    project: str
    group: str | None


class Settings(_Section):
    """The keys of ``train`` that are no group, with their types."""

    groups: ClassVar[tuple[str, ...]] = ("data", "backbone", "reward", "env", "agent")
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    device: str
    train: TrainSection
    run: RunSection
    tracking: TrackingSection
    front: FrontSection | None = None
    target: TargetSection | None = None


class PretrainSettings(Settings):
    """Those of ``pretrain``."""

    groups = ("data", "backbone", "pretrain")


class CalibrateSettings(_Section):
    """Those of ``calibrate``."""

    run: str
    device: str
    trust: bool
    target: TargetSection


class FrontSettings(_Section):
    """Those of ``front``."""

    groups = ("data", "backbone", "env")
    device: str
    front: FrontSection
    output: str | None


class CompareSettings(_Section):
    """Those of ``compare``."""

    runs: str | list[str]
    output: str
    overwrite: bool
    recompute: bool
    images: bool
    device: str
    trust: bool
    tracking: TrackingSection


class EvaluateSettings(_Section):
    """Those of ``evaluate``."""

    run: str
    split: Literal["train", "validation", "test"]
    device: str
    trust: bool


class ProfileSettings(_Section):
    """Those of ``profile``."""

    groups = ("data", "backbone")
    run: str | None
    trust: bool
    batch_sizes: Annotated[list[PositiveInt], Field(min_length=1)]
    repeats: PositiveInt
    images: PositiveInt
    device: str
    output: str | None


Checked = TypeVar("Checked", bound=_Section)


def settings_of(config: DictConfig, section: type[Checked]) -> Checked:
    """The checked settings of a configuration, its command's groups aside.

    Raises:
        UserError: the first key that is unknown or has a wrong value.
    """
    content = {key: value for key, value in plain(config).items() if key not in section.groups}
    try:
        return section.model_validate(content)
    except ValidationError as error:
        raise UserError(_first_problem("", error)) from error


def plain(config: DictConfig) -> dict[str, Any]:
    """The resolved configuration as plain dictionaries.

    Raises:
        UserError: a key that has no default is not set.
    """
    missing = OmegaConf.missing_keys(config)
    if missing:
        raise UserError(f"{min(missing)} is not set; add {min(missing)}=… to the command")
    content = OmegaConf.to_container(config, resolve=True)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def group_of(content: dict[str, Any], group: str) -> dict[str, Any]:
    """A group's part of a configuration.

    Raises:
        UserError: it has none.
    """
    node = content.get(group)
    if not isinstance(node, dict):
        raise UserError(f"the configuration has no {group}, and this command needs one")
    return node


def _first_problem(prefix: str, error: ValidationError) -> str:
    problem = error.errors()[0]
    place = ".".join(
        [*([prefix] if prefix else []), *(str(part) for part in problem["loc"] if not isinstance(part, int))]
    )
    if problem["type"] == "extra_forbidden":
        return f"there is no key {place}"
    if problem["type"] == "missing":
        return f"there must be a key {place}"
    return f"{place}: {problem['msg'][0].lower()}{problem['msg'][1:]}, got {problem['input']!r}"
