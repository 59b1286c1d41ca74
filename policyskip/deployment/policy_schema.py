"""What ``policy.json`` may hold, for each family, before anything is built from it.

A run folder may be anybody's: every value has a type and a range, and what a policy says of its network is compared
with the network.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from policyskip.backbones import Backbone, ExitNetwork, Network
from policyskip.backbones.checkpoints import LARGEST_NUMBER
from policyskip.runs.schemas import MOST_CLASSES
from policyskip.sealed import largest_number
from policyskip.texts import one_line

LONGEST_SIDE = 10_000
"""Pixels of an image's longest side that a file may name."""
MOST_PIXELS = 4096**2
"""Pixels of an image that a file may name: a network is tried on one such image when it is loaded."""
MOST_LAYERS = 100
"""The longest list that a file may give to one of them."""


def _threshold(text: str) -> str:
    """Refuse (ValueError) a text that is no number, or NaN."""
    if math.isnan(float(text)):
        raise ValueError("must not be NaN")
    return text


Macs = Annotated[float, Field(ge=0, le=1e18, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
Side = Annotated[int, Field(ge=1, le=LONGEST_SIDE)]
Name = Annotated[str, Field(min_length=1, max_length=1000)]


class Entry(BaseModel):
    """The base of the parts of ``policy.json``; keys that this version does not know are left alone."""

    model_config = ConfigDict(strict=True, extra="allow")


class BlockPolicyEntry(Entry):
    """Describes a policy that decides which blocks run."""

    name: Name
    arguments: dict[str, Any]
    macs: Macs


class GatesEntry(Entry):
    """Describes the gates of a network."""

    kind: Name
    macs: Macs


class ThresholdsEntry(Entry):
    """Describes a rule and its thresholds, which are text because JSON has no infinity."""

    rule: Name
    search: Name
    thresholds: Annotated[list[Annotated[str, AfterValidator(_threshold)]], Field(max_length=LARGEST_NUMBER)]


class ExitPolicyEntry(Entry):
    """Describes a learned policy at exits."""

    arguments: dict[str, Any]
    macs: Macs
    name: Name = "ExitPolicy"


class NetworkEntry(Entry):
    """Describes a network that the run folder holds."""

    hash: Name


class OutsideNetworkEntry(NetworkEntry):
    """Describes a network that the run folder only names."""

    config: dict[str, Any]
    seed: Seed = 0


class Head(Entry):
    """Describes what every family's ``policy.json`` has."""

    version: Literal[1]
    classes: Annotated[list[Name], Field(min_length=1, max_length=MOST_CLASSES)]
    image_shape: Annotated[list[Side], Field(min_length=3, max_length=3)]
    steps: Annotated[int, Field(ge=0)] | None = None


ENTRIES: dict[str, tuple[type[Entry], str, type[NetworkEntry]]] = {
    "policy": (BlockPolicyEntry, "backbone", OutsideNetworkEntry),
    "gates": (GatesEntry, "network", NetworkEntry),
    "exits": (ThresholdsEntry, "network", NetworkEntry),
    "leaves": (ExitPolicyEntry, "network", NetworkEntry),
}
"""For the key under which a family describes its policy: how it does, and where and how its network is described."""


def check_content(content: dict[str, Any], key: str) -> None:
    """Check the content of ``policy.json`` whose policy is described under ``key``.

    Raises:
        ValueError: names the first value that is wrong.
    """
    entry, place, network = ENTRIES[key]
    for where, kind, value in (("", Head, content), (key, entry, content[key]), (place, network, content.get(place))):
        try:
            kind.model_validate(value)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            path = ".".join(map(str, (*filter(None, [where]), *first["loc"])))
            raise ValueError(f"{path}: {first['msg'].lower()}, got {one_line(repr(first['input']), 60)}") from error
    if isinstance(content["version"], bool):
        raise ValueError("version: must be 1, got True")
    channels, height, width = content["image_shape"]
    if channels != 3 or height * width > MOST_PIXELS:
        raise ValueError(
            f"image_shape: must be 3 channels of at most {MOST_PIXELS:,} pixels, got {content['image_shape']}"
        )


def check_arguments(make: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Check arguments from a file for one of the package's own classes or functions.

    Raises:
        ValueError: there is no such argument, it is of another type, or it is far too large.
    """
    hints = get_type_hints(make.__init__ if inspect.isclass(make) else make)
    for name, value in arguments.items():
        if name not in hints or name == "return":
            raise ValueError(f"{one_line(name, 60)}: there is no such argument")
        if name != "seed" and largest_number(value) > LARGEST_NUMBER:
            raise ValueError(f"{name}: no number may be above {LARGEST_NUMBER:,}, got {one_line(repr(value), 60)}")
        if isinstance(value, list) and len(value) > MOST_LAYERS:
            raise ValueError(f"{name}: at most {MOST_LAYERS} entries are allowed, got {len(value)}")
        if not all(map(math.isfinite, _floats(value))):
            raise ValueError(f"{name}: numbers must be finite, got {one_line(repr(value), 60)}")
        kind = Seed if name == "seed" else hints[name]
        try:
            TypeAdapter(kind, config=ConfigDict(strict=True)).validate_python(value)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]["msg"].lower()
            raise ValueError(f"{name}: {problem}, got {one_line(repr(value), 60)}") from error


def _floats(value: Any) -> list[float]:
    """Return the floats in a value, or in a list."""
    return [number for number in (value if isinstance(value, list) else [value]) if isinstance(number, float)]


def check_agreement(arguments: dict[str, Any], network: Network, classes: int) -> None:
    """Check what a policy's arguments, and the file, say of the network that the policy is for.

    Raises:
        ValueError: the network has another number of classes, blocks or exits.
    """
    facts = {"num_classes": network.num_classes}
    if isinstance(network, Backbone):
        facts["num_blocks"] = network.num_blocks
    if isinstance(network, ExitNetwork):
        facts["num_exits"] = network.num_exits
    if classes != network.num_classes:
        raise ValueError(f"classes: the network has {network.num_classes}, the file names {classes}")
    for name, number in facts.items():
        if name in arguments and (type(arguments[name]) is not int or arguments[name] != number):
            raise ValueError(f"{name}: the network has {number}, got {one_line(repr(arguments[name]), 60)}")
