"""The configuration in a run folder is read here, as plain values: whoever made the folder may be a stranger.

A text such as ``${oc.env:HOME}`` stays the text that it is: the configuration was resolved when it was written. What a
file may ask for is bounded (:data:`BOUNDS`); what a user types is not.
"""

from __future__ import annotations

import inspect
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from omegaconf._utils import get_omega_conf_dumper, get_yaml_loader

from policyskip import files, registry
from policyskip.errors import UserError
from policyskip.files import damaged

LARGEST_FILE, MOST_VALUES, DEEPEST = 2**20, 10_000, 20
"""Bytes of a ``config.yaml``, values in it, and how deep they may be nested."""
MILLION = 10**6
BOUNDS: dict[str, float] = {
    "train.steps": 10**9,
    "front.budget": 10**12,
    "data.train": MILLION // 2,
    "data.validation": MILLION // 2,
    "data.test": MILLION // 2,
    "data.workers": 64,
    "data.image_size": 2048,
    "batch_size": 2**16,
    "depth": 2000,
    "width": 1024,
    "channels": 1024,
    "head_channels": 1024,
    "growth_rate": 512,
    "num_exits": 64,
    "base": 64,
    "step": 64,
    "blocks": 512,
    "samples": 4096,
}
"""The highest number of a key that a file may ask for, by the key's whole name or its last part."""
LARGEST = 10 * MILLION
"""The highest number of every other key of a group, such as ``agent.buffer_size``."""
LARGEST_NETWORK = 4 * MILLION
"""The highest depth · width² of a network: about a gigabyte of weights."""
UNBOUNDED = ("seed",)
MOST_BITS = 128
"""Bits of the largest whole number that is no bound's affair, such as a seed: Python prints no number of thousands."""
PATHS = ("root", "checkpoint", "table")
"""The keys of groups that hold a path."""


class _PlainLoader(get_yaml_loader()):  # type: ignore[misc]  # as OmegaConf reads numbers
    """Reads YAML without anchors, merges and tags, and not more of it than a configuration can need."""

    depth = values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise ValueError("it has anchors, which no configuration of policyskip has")
        if event.tag is not None:
            raise ValueError("it has tags, which no configuration of policyskip has")
        self.depth, self.values = self.depth + 1, self.values + 1
        if self.depth > DEEPEST or self.values > MOST_VALUES:
            raise ValueError(f"it is nested deeper than {DEEPEST} levels or has more than {MOST_VALUES} values")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if node.tag == "tag:yaml.org,2002:merge":
            raise ValueError("it merges keys (<<), which no configuration of policyskip does")
        return node


class _PlainDumper(get_omega_conf_dumper()):  # type: ignore[misc]
    """Writes YAML as OmegaConf does, with a list that stands at two places written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def read(path: Path) -> dict[str, Any]:
    """Read a run's ``config.yaml`` as plain dictionaries, lists, texts, numbers, true, false and null.

    Raises:
        UserError: the file is damaged, or holds what no configuration of policyskip holds.
    """
    with damaged(path):
        document = yaml.load(files.read(path, LARGEST_FILE).decode(), Loader=_PlainLoader)
        document = {} if document is None else document
        if not isinstance(document, dict):
            raise ValueError("it must hold keys and values")
        for key, value in _leaves(document):
            if isinstance(value, str):
                value.encode()  # a lone surrogate cannot be written or printed
            if isinstance(value, dict):
                raise ValueError(f"{key or 'it'} has keys that are no texts")
        return document


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the keys of nested dictionaries and lists, joined by dots, with their values; lists' items have their key.

    A dictionary with a key that is no text is yielded as it is.
    """
    if isinstance(node, dict) and all(isinstance(key, str) for key in node):
        for key, value in node.items():
            yield f"{prefix}.{key}".lstrip("."), key
            yield from _leaves(value, f"{prefix}.{key}".lstrip("."))
    elif isinstance(node, list):
        for value in node:
            yield from _leaves(value, prefix)
    else:
        yield prefix, node


def to_yaml(content: dict[str, Any]) -> str:
    """Return a configuration as YAML that :func:`read` reads as the same values."""
    written: str = yaml.dump(
        content, Dumper=_PlainDumper, default_flow_style=False, allow_unicode=True, sort_keys=False
    )
    return written


def buildable(content: dict[str, Any], trust: bool, typed: dict[str, Any]) -> dict[str, Any]:
    """Return a run's configuration with what was typed for it, if what remains of it is no more than a file may ask.

    Nothing is downloaded because a file says so: only because of ``trust``, or where the user types ``data.root``.

    Args:
        content: the configuration, as :func:`read` reads it.
        trust: whether the folder may ask for anything.
        typed: what the user typed of the groups ``data`` and ``backbone``.

    Raises:
        UserError: the configuration asks for more than a file may ask, or names a pipe or a device as a file.
    """
    merged = dict(content)
    for group, keys in typed.items():
        node = merged.get(group)
        merged[group] = {**node, **keys} if isinstance(node, dict) else keys
    check_paths(merged)
    if trust:
        return merged
    typed_keys = {f"{group}.{key}" for group, keys in typed.items() for key in keys}
    for key, value in _leaves(merged):
        if key not in typed_keys:
            _check_bound(key, value)
    _check_network_size(merged.get("backbone"))
    data = merged.get("data")
    if isinstance(data, dict) and _may_download(data) and typed_keys.isdisjoint(("data.root", "data.download")):
        merged["data"] = {**data, "download": False}
    return merged


def _may_download(data: dict[str, Any]) -> bool:
    """Return whether a stored data set could be downloaded: where ``download`` is left out, it may be true."""
    with suppress(UserError, TypeError, ValueError):  # what cannot be imported is refused by who builds it
        target = registry.resolve("data", str(data.get("_target_")), trusted=False)
        return "download" in data or "download" in inspect.signature(target).parameters
    return "download" in data


def _check_bound(key: str, value: Any) -> None:
    """Refuse (UserError) a number that is above what a file may ask for; values of other types pass."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    if value != value or (isinstance(value, int) and value.bit_length() > MOST_BITS):
        raise UserError(f"the run's {key} is no number that a run could have")
    if key in UNBOUNDED:
        return
    highest = BOUNDS.get(key) or BOUNDS.get(key.rpartition(".")[2]) or LARGEST
    if abs(value) > highest and (value != float("inf") or key in BOUNDS):
        raise UserError(_too_much(key, f"{value:.4g}" if isinstance(value, float) else str(value), highest))


def _check_network_size(node: Any) -> None:
    """Refuse (UserError) a stored network whose depth and width make it too large together."""
    if isinstance(node, dict):
        depth, width = node.get("depth"), node.get("width")
        if isinstance(depth, int) and isinstance(width, int) and depth * width**2 > LARGEST_NETWORK:
            raise UserError(_too_much("backbone.depth · backbone.width²", str(depth * width**2), LARGEST_NETWORK))


def _too_much(key: str, value: str, highest: float) -> str:
    """Return the message for a number that is above what a run folder may ask for."""
    shown = value if len(value) < 20 else f"a number of {len(value)} digits"
    return (
        f"the run's {key} is {shown}, and a run folder may ask for {highest:g} at most; if you trust the folder, say "
        "trust=true (when resuming: run.trust=true)"
    )


def check_paths(content: dict[str, Any]) -> None:
    """Refuse a path of a configuration that is there and is neither a file nor a folder: reading a pipe never ends.

    Raises:
        UserError: naming the key and the path.
    """
    for group, node in content.items():
        for key in PATHS if isinstance(node, dict) else ():
            value, mode = node.get(key), stat.S_IFREG
            if isinstance(value, str):
                with suppress(OSError, ValueError):  # what is not there is reported by who reads it
                    mode = Path(os.path.expanduser(value)).stat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise UserError(f"{group}.{key}={value} is neither a file nor a folder")
