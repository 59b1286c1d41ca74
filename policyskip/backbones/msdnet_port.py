"""Checkpoints of the common PyTorch port of MSDNet (kalviny/MSDNet-PyTorch) get the names that the package has.

The port counts modules where the package names nodes of the grid: ``blocks.E.J.layers.I`` is the I-th live scale of the
J-th module before exit E; a module is the stem, a layer, or, as ``blocks.E.J.m.I``, the transition behind a layer.

Shapes: C classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from policyskip.backbones.msdnet import MSDNet, name_of
from policyskip.backbones.translation import CIFAR_MEAN, CIFAR_STD, Imported, renamed
from policyskip.backbones.weight_files import State
from policyskip.errors import UserError
from policyskip.texts import one_line

CONVOLUTIONS = (("0", "0.0"), ("1", "0.1"), ("3", "1.0"), ("4", "1.1"))
"""The names of the layers of a 1×1 and a 3×3 convolution, each with batch normalisation, in the port and here."""

NORMALISATIONS = {
    10: {"mean": CIFAR_MEAN, "std": CIFAR_STD},
    100: {"mean": (0.5071, 0.4867, 0.4408), "std": (0.2675, 0.2565, 0.2761)},
}
"""What the port normalises images of CIFAR-10 and CIFAR-100 by, by C; other images by ImageNet's mean and deviation."""


def is_msdnet_port(tensors: State) -> bool:
    """Return whether tensors have the port's names."""
    return "classifier.0.linear.weight" in tensors and any(n.startswith("blocks.0.0.layers.0.") for n in tensors)


def from_msdnet_port(tensors: State, network: MSDNet, source: str) -> Imported:
    """Rename the port's tensors as :class:`~policyskip.backbones.msdnet.MSDNet` does.

    The bias of the port's first convolution for ImageNet becomes a part of the running mean behind it. Tensors of grid
    nodes that no exit needs, which the port computes all the same, are left out.

    Args:
        network: of the arguments that the checkpoint is to have.
        source: the name of the file.

    Raises:
        UserError: the file's network has another number of exits or of modules between them.
    """
    exits = 1 + max(int(m[1]) for m in map(re.compile(r"classifier\.(\d{1,3})\..+").fullmatch, tensors) if m)
    if exits != network.num_exits:
        raise UserError(f"{one_line(source)} holds an MSDNet of {exits} exits, not of {network.num_exits}")
    prefixes = dict(_prefixes(network))
    modules = {match[0] for name in tensors if (match := re.match(r"blocks\.\d+\.\d+\.", name))}
    expected = {match[0] for name in prefixes if (match := re.match(r"blocks\.\d+\.\d+\.", name))}
    if odd := sorted(modules ^ expected):
        what = "has" if odd[0] in modules else "lacks"
        raise UserError(
            f"{one_line(source)} holds an MSDNet of another shape: it {what} the module {one_line(odd[0][:-1], 40)} "
            "(backbone.base, step, step_mode, growth_factors and prune decide the modules)"
        )

    def rename(name: str) -> str:
        prefix = next((p for p in _beginnings(name) if p in prefixes), None)
        return name if prefix is None else prefixes[prefix] + name.removeprefix(prefix)

    state = renamed(tensors, rename, source)
    bias, average = (state.get(f"nodes.layer0_scale0.0.{name}") for name in ("0.bias", "1.running_mean"))
    if bias is not None and average is not None and bias.shape == average.shape:
        del state["nodes.layer0_scale0.0.0.bias"]
        state["nodes.layer0_scale0.0.1.running_mean"] = (average.double() - bias.double()).to(average.dtype)
    unused = tuple(f"nodes.{name}." for name in _live_names(network) - set(network.nodes))
    state = {name: value for name, value in state.items() if not name.startswith(unused)} if unused else state
    guesses = {"mean": "the port's for these classes; backbone.mean=[…]", "std": "backbone.std=[…]"}
    arguments = {"mean": network.architecture["mean"], "std": network.architecture["std"]}
    return Imported(state, arguments, f"the PyTorch port's MSDNet of {exits} exits", guesses)


def _live_names(network: MSDNet) -> set[str]:
    """Return the names of all nodes that the port computes."""
    grid = network.grid
    return {name_of((layer, scale)) for layer in range(grid.exit_layers[-1] + 1) for scale in grid.live(layer)}


def _beginnings(name: str) -> Iterator[str]:
    """Yield the beginnings of a name that end in a dot, the longest first."""
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        yield ".".join(parts[:count]) + "."


def _prefixes(network: MSDNet) -> Iterator[tuple[str, str]]:
    """Yield the beginning of the names of each of the port's modules that has weights, and what it is here."""
    grid, first = network.grid, 1
    for exit_, last in enumerate(grid.exit_layers):
        number = 0
        if exit_ == 0:
            for scale in grid.live(0):
                pooled = scale == 0 and network.architecture["stem"] == "imagenet"
                theirs, ours = ("", "0.") if pooled else ("net.", "")
                yield f"blocks.0.0.layers.{scale}.{theirs}", f"nodes.{name_of((0, scale))}.{ours}"
            number = 1
        for layer in range(first, last + 1):
            for place, scale in enumerate(grid.live(layer)):
                node = f"nodes.{name_of((layer, scale))}."
                module = f"blocks.{exit_}.{number}.layers.{place}."
                for branch in ("normal", "down"):
                    for theirs, ours in CONVOLUTIONS:
                        yield f"{module}conv_{branch}.net.{theirs}.", f"{node}{branch}.{ours}."
                if layer in grid.transitions:
                    yield f"blocks.{exit_}.{number + 1}.m.{place}.net.", f"{node}transition."
            number += 1 + (layer in grid.transitions)
        for convolution in (0, 1):
            yield f"classifier.{exit_}.m.{convolution}.net.", f"heads.{exit_}.{convolution}."
        yield f"classifier.{exit_}.linear.", f"heads.{exit_}.4."
        first = last + 1
