"""The schemas of the JSON files in a run's folder: what each key holds. They are checked once, where a file is read.

A folder may be somebody else's, so nothing in it is believed before that. Every key may be absent, as in runs of older
versions, and keys that no schema names may hold anything, because nothing reads them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
)

LARGEST = 1e300
"""The largest size of a number: what is computed with numbers up to this is still finite."""
MOST_BLOCKS, MOST_CLASSES, MOST_WARNINGS, MOST_RIVALS = 10_000, 100_000, 1_000, 1_000
LONGEST_NAME = 300
"""Letters of the name of a class, a network, an agent, …"""
_RULES = ConfigDict(strict=True, extra="ignore")


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number that a float can hold; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _number(value: Any) -> Any:
    """Refuse (ValueError) what is no number."""
    if not is_number(value):
        raise ValueError("it must be a finite number")
    return value


def _sums_to_one(values: list[float]) -> list[float]:
    """Refuse (ValueError) shares that are not those of a whole."""
    if abs(math.fsum(values) - 1) > 1e-3:
        raise ValueError("the shares must sum to 1")
    return values


def _at_most(longest: int) -> Callable[[Any], Any]:
    """Return a check (ValueError) that a value is a text of at most ``longest`` letters.

    As in names of files, the letters may be no valid Unicode, which pydantic's own type refuses.
    """

    def checked(value: Any) -> Any:
        if not isinstance(value, str) or len(value) > longest:
            raise ValueError(f"it must be a text of at most {longest} letters")
        return value

    return checked


Name = Annotated[Any, AfterValidator(_at_most(LONGEST_NAME))]
Line = Annotated[Any, AfterValidator(_at_most(3_000))]
LongText = Annotated[Any, AfterValidator(_at_most(10**6))]
Number = Annotated[float, BeforeValidator(_number)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=-1e-6, le=1 + 1e-6)]
Count = Annotated[int, Field(ge=0, le=10**15)]
Blocks = Annotated[int, Field(ge=0, le=MOST_BLOCKS)]
Shares = Annotated[list[Share], Field(min_length=1, max_length=MOST_BLOCKS)]
Numbers = Annotated[list[Number], Field(max_length=MOST_BLOCKS)]
Costs = Annotated[list[NotNegative], Field(min_length=1, max_length=MOST_BLOCKS)]


class Compared(BaseModel):
    """Holds what a policy's comparison with the rival of one family came to."""

    model_config = _RULES
    family: Line
    name: Line
    accuracy: Share
    macs: NotNegative
    margin: Number
    low: Number | None
    high: Number | None


class Recorded(BaseModel):
    """Holds a finished run that another run was compared with: for each test image, a 1 if it is right, or a 0."""

    model_config = _RULES
    name: Line
    macs: NotNegative
    correct: Annotated[str, Field(pattern="^[01]+$", max_length=10**8)]


_FIGURES: dict[str, Any] = {
    **dict.fromkeys(("accuracy", "full_accuracy", "static_accuracy", "random_accuracy", "oracle_accuracy"), Share),
    **dict.fromkeys(("label_oracle_accuracy", "before_accuracy"), Share),
    **dict.fromkeys(("macs_mean", "macs_sd", "macs_fraction", "policy_macs", "static_macs"), NotNegative),
    **dict.fromkeys(("random_macs", "oracle_macs", "label_oracle_macs", "kept_mean", "kept_sd"), NotNegative),
    **dict.fromkeys(("static_blocks", "static_margin_ci95"), NotNegative),
    **dict.fromkeys(("reward", "static_margin"), Number),
    "full_macs": Positive,
    "blocks": Blocks,
    "exits": Blocks,
    "unique_decisions": Count,
    **dict.fromkeys(("sees_the_label", "static_search_finished"), bool),
    "exit_share": Annotated[Shares, AfterValidator(_sums_to_one)],
    "exit_alone_accuracy": Shares,
    "exit_accuracy": Annotated[list[Share | None], Field(min_length=1, max_length=MOST_BLOCKS)],
    "exit_macs": Costs,
    "exit_alone_macs": Costs,
    "kept_by_difficulty": Annotated[list[NotNegative | None], Field(max_length=100)],
    "static_sets": Annotated[list[Line], Field(max_length=2)],
    "rival": Line,
    **dict.fromkeys(("rival_margin", "rival_low", "rival_high"), Number),
    "rival_accuracy": Share,
    "rival_macs": NotNegative,
    "rival_finished": bool,
    "rivals": Annotated[list[Compared], Field(max_length=MOST_RIVALS)],
    "rivals_dearer": Annotated[list[Line], Field(max_length=MOST_RIVALS)],
    "verdict": Literal["pays", "does not pay", "not shown"],
    "verdict_because": Line,
}
"""The figures of a split, by their keys without ``test/`` or ``val/``."""
_SUMMARY: dict[str, Any] = {
    **dict.fromkeys(("agent", "env", "backbone", "data", "version", "rule", "hash"), Name),
    **dict.fromkeys(("execution", "precision"), Name),
    **dict.fromkeys(("test_images", "frozen_network", "latency_device"), Name),
    "command": LongText,
    "seed": Annotated[int, Field(gt=-(2**64), lt=2**64)],
    "steps": Count,
    "seconds": NotNegative,
    "latency_ms": NotNegative,
    "latency_threads": Count,
    "latency_batch": Count,
    "warnings": Annotated[list[Line], Field(max_length=MOST_WARNINGS)],
    **{f"{split}/{key}": kind for split in ("test", "val") for key, kind in _FIGURES.items()},
}
_SAME_LENGTH = (
    *("test/exit_share", "test/exit_accuracy", "test/exit_macs", "test/exit_alone_accuracy", "test/exit_alone_macs"),
)


class Times(BaseModel):
    """Holds the times of one batch size in a profile."""

    model_config = _RULES
    always_ms: NotNegative | None = None
    whole_ms: NotNegative | None = None
    kept_ms: Numbers | None = None
    dropped_ms: Numbers | None = None
    break_even: Numbers | None = None


_FRONT: dict[str, Any] = {
    "sets": Annotated[
        list[Annotated[str, Field(pattern="^[01]+$", max_length=MOST_BLOCKS)]],
        Field(min_length=1, max_length=MOST_BLOCKS),
    ],
    "accuracy": Shares,
    "macs": Costs,
    "images": Count,
    "finished": bool,
    "backbone": Name,
    "data": Name,
}
_RIVALS: dict[str, Any] = {"runs": Annotated[list[Recorded], Field(max_length=MOST_RIVALS)]}
_FRONT_LATER: dict[str, Any] = {
    "kinds": Annotated[list[Name], Field(min_length=1, max_length=MOST_BLOCKS)],
    "correct": Annotated[list[Annotated[str, Field(pattern="^[0-9a-f]+$")]], Field(min_length=1)],
    "spent": Count,
    "tried": Count,
    "budget": NotNegative | None,
}
"""The keys that a front has besides, unless an older version wrote it."""
_COMPARISON: dict[str, Any] = {
    "version": Name,
    "command": LongText,
    "runs": list[LongText],
    "left_out": list[Any],
    "warnings": list[LongText],
}
_DECISIONS: dict[str, Any] = {
    "full_macs": Positive,
    "kind": Literal["blocks", "exits"],
    "images": Name,
    "network": Name,
    "classes": Annotated[list[Name], Field(max_length=MOST_CLASSES)],
}


def _schema(name: str, keys: dict[str, Any], null: bool = False) -> type[BaseModel]:
    """Make the schema of an object; ``null`` allows null for every key."""
    fields: dict[str, Any] = {
        f"f{n}": (kind | None if null else kind, Field(None, alias=key)) for n, (key, kind) in enumerate(keys.items())
    }
    return create_model(name, __config__=_RULES, **fields)


_PROFILE: dict[str, Any] = {
    "network": Name,
    "hash": Name,
    "device": Name,
    "threads": Count,
    "batches": dict[Annotated[str, Field(pattern="^[1-9][0-9]{0,8}$")], Times],
}
SCHEMAS: dict[str, type[BaseModel]] = {
    "summary.json": _schema("Summary", _SUMMARY, null=True),
    "profile.json": _schema("Profile", _PROFILE),
    "front.json": _schema("Front", _FRONT | _FRONT_LATER),
    "rivals.json": _schema("Rivals", _RIVALS | {"images": Name}),
    "comparison.json": _schema("Comparison", _COMPARISON),
    "decisions": _schema("Decisions", _DECISIONS),
}
"""By the name of the file; ``decisions`` is for the metadata of ``decisions.safetensors``."""
_NEEDED = {"front.json": _FRONT, "rivals.json": _RIVALS, "comparison.json": _COMPARISON, "decisions": _DECISIONS}


def check(name: str, content: Any) -> Any:
    """Check the content of a file of a run.

    Args:
        name: a key of :data:`SCHEMAS`; the content of any other file is not checked.
        content: what JSON gave.

    Returns: the same content.

    Raises:
        ValueError: it does not fit; the message names the key, what was found and what it must be.
    """
    if name not in SCHEMAS:
        return content
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    if missing := [key for key in _NEEDED.get(name, ()) if key not in content]:
        raise ValueError(f"it has no {missing[0]}")
    try:
        SCHEMAS[name].model_validate(content)
    except ValidationError as error:
        raise ValueError(_described(error)) from None
    if name == "summary.json":
        lengths = {key: len(content[key]) for key in _SAME_LENGTH if content.get(key) is not None}
        if len(set(lengths.values())) > 1:
            raise ValueError("; ".join(f"{key} has {length} numbers" for key, length in lengths.items()))
    return content


def _described(error: ValidationError) -> str:
    """Return the first fault that pydantic found, as one line."""
    fault = error.errors(include_url=False, include_context=False)[0]
    place = [str(part) for part in fault["loc"]]
    wanted = fault["msg"].removeprefix("Value error, ").replace("Input", "it").replace("Value should", "it should")
    return f"{'.'.join(place)} is {fault['input']!r:.80}; {wanted}"


def record(line: Any) -> dict[str, Any] | None:
    """Return a record of ``metrics.jsonl`` with those of its keys that hold a finite number, a list of them, or null.

    Args:
        line: what JSON gave for a line.

    Returns: the record; None if the line is none, because it has no ``step``.
    """
    step = line.get("step") if isinstance(line, dict) else None
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step <= 10**15:
        return None
    return {key: value for key, value in line.items() if _is_figure(value)}


def _is_figure(value: Any) -> bool:
    """Return whether a record may hold a value."""
    if isinstance(value, list):
        return all(part is None or is_number(part) for part in value)
    return value is None or isinstance(value, bool) or is_number(value)
