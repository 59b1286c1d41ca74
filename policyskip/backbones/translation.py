"""Networks that others trained: which layout a file has, and the names that the package has for its tensors.

Where a layout does not decide the shortcut or the normalisation, they are guessed, and the guess is said.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from policyskip.backbones.base import IMAGENET_MEAN, IMAGENET_STD, Backbone
from policyskip.backbones.weight_files import State
from policyskip.errors import UserError
from policyskip.texts import one_line

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4824, 0.4467), (0.2471, 0.2435, 0.2616)
"""The normalisation of BlockDrop's ResNet-32 for CIFAR-10, and of the PyTorch port of MSDNet for CIFAR-10."""


@dataclass(frozen=True)
class Imported:
    """Holds what a file says of a network, in the package's words.

    Attributes:
        tensors: by the package's names.
        arguments: of the network's class.
        layout: what the file was recognised as, if others made it; empty for the package's own files.
        guesses: for each argument that the file does not decide, what else it could be.
        accuracy: what the file says that the network reaches, as a share; None if it says nothing.
    """

    tensors: State
    arguments: dict[str, Any]
    layout: str = ""
    guesses: dict[str, str] = field(default_factory=dict)
    accuracy: float | None = None

    @property
    def own(self) -> bool:
        """Return whether the package made the file, which then says all of this itself."""
        return not self.layout

    def remark(self, source: str, chosen: Collection[str]) -> str:
        """Say in one line as what a file is read, and what of that is guessed.

        Args:
            source: the file's name.
            chosen: the arguments that were typed, which are not guessed.
        """
        guessed = [
            f"{name} {_listed(self.arguments[name])} ({other})"
            for name, other in self.guesses.items()
            if name not in chosen
        ]
        line = f"{one_line(source)} is read as {self.layout}"
        return f"{line}; guessed, as the file does not say: {', '.join(guessed)}" if guessed else line


def _listed(value: Any) -> str:
    """Return a value as it is typed on the command line."""
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple | list) else str(value)


def _has(pattern: str) -> Callable[[Collection[str]], bool]:
    """Return a function that says whether one of the names begins with a regular expression."""
    return lambda names: any(re.match(pattern, name) for name in names)


LAYOUTS: tuple[tuple[Callable[[Collection[str]], bool], str], ...] = (
    (_has(r"group\d+_gate|control\.rnn"), "SkipNet's network with gates (group1_layer0, …), which cannot be read yet"),
    (_has(r"group\d+_layer\d"), "SkipNet's ResNet (group1_layer0, …), which cannot be read yet"),
    (
        _has(r".*\.branch(_net|ed_module)\."),
        "Distiller's ResNet with early exits (branch_net), which cannot be read yet",
    ),
    (_has(r"blocks\.\d+\.\d+\.(layers|m)\.\d"), "MSDNet of the PyTorch port; say backbone=msdnet_cifar"),
    (
        lambda names: any(name.startswith("logit.") for name in names) and _has(r"features\.")(names),
        "BlockDrop's policy network, and not the network that it decides for",
    ),
    (
        _has(r"blocks\.3\.\d|blocks\.\d\.\d+\.conv3\."),
        "BlockDrop's ResNet-101 (blocks.S.B, ds.S.N), which cannot be read yet; backbone=torchvision_resnet101 reads "
        "the names of torchvision",
    ),
    (
        _has(r"stem\.|blocks\.\d+\.residual\.|nodes\.layer\d|segments\.\d|exit_heads\.\d"),
        "network of policyskip without the description that builds it; write it with "
        "policyskip.backbones.checkpoints.save",
    ),
    (_has(r"layer4\.0\."), "ResNet of four stages, as torchvision has; say backbone=torchvision_resnet18, 34, 50, …"),
    (_has(r"layer1\.0\."), "ResNet in the names of torchvision (layer1.0.conv1, …)"),
    (_has(r"blocks\.0\.0\."), "BlockDrop's ResNet (blocks.0.0.conv1, …)"),
)
"""The layouts of other programs, first match first: whether names are of the layout, and what it is."""


def layout_of(names: Collection[str]) -> str | None:
    """Say what network a file holds, from the names of its tensors; None if they are not known."""
    return next((layout for fits, layout in LAYOUTS if fits(names)), None)


def but_a(names: Collection[str]) -> str:
    """Return the end of a message that says what network others' tensors are, or how they are named."""
    if (layout := layout_of(names)) is not None:
        return f"but a {layout}"
    return f"that is known here; its tensors are named {one_line(', '.join(list(names)[:3]), 100)}, …"


def renamed(tensors: State, rename: Callable[[str], str], source: str) -> State:
    """Return tensors by other names.

    Raises:
        UserError: two of them would have the same name.
    """
    state: State = {}
    for name, value in tensors.items():
        other = rename(name)
        if other in state:
            raise UserError(f"{one_line(source)} cannot be used: it holds {one_line(name, 80)} twice, by two names")
        state[other] = value
    return state


def from_cifar_names(tensors: State, source: str) -> Imported:
    """Rename the tensors of a CIFAR ResNet that others trained as the package does.

    Args:
        tensors: under the names of torchvision, of the many CIFAR ResNets written after it, or of BlockDrop.
        source: the name of their file.

    Returns: the network, with the arguments of :class:`~policyskip.backbones.resnet.CifarResNet` that fit it.

    Raises:
        UserError: they are no CIFAR ResNet's.
    """
    layer_named = any(name.startswith("layer1.0.") for name in tensors)
    blockdrop = any(name.startswith("blocks.0.0.") for name in tensors)
    known = (layout_of(tensors) or "").startswith(("ResNet in the names", "BlockDrop's ResNet (", "ResNet of four"))
    if not (known and (layer_named or blockdrop)) or "conv1.weight" not in tensors:
        raise UserError(f"{one_line(source)} is not a CIFAR ResNet {but_a(tensors)}")
    pattern = re.compile(r"layer(\d{1,3})\.(\d{1,3})\.(.+)" if layer_named else r"blocks\.(\d{1,3})\.(\d{1,3})\.(.+)")
    first_stage = 1 if layer_named else 0
    blocks = {(int(m[1]) - first_stage, int(m[2])) for m in map(pattern.fullmatch, tensors) if m}
    sizes = [sum(stage == s for stage, _ in blocks) for s in range(max(stage for stage, _ in blocks) + 1)]
    if len(sizes) != 3 or len(set(sizes)) != 1:
        shown = one_line(sizes, 60)
        hint = f"; it holds a {layout_of(tensors)}" if len(sizes) == 4 else ""
        raise UserError(
            f"{one_line(source)} is not a CIFAR ResNet: its stages have {shown} blocks, not three times the same{hint}"
        )
    n = sizes[0]

    def rename(name: str) -> str:
        if match := pattern.fullmatch(name):
            k, path = (int(match[1]) - first_stage) * n + int(match[2]), match[3]
            inner = re.sub(r"^(shortcut|downsample)\.", "", path)
            return f"blocks.{k}.{'residual' if inner == path else 'shortcut'}.{inner}"
        if shortcut := re.fullmatch(r"ds\.(\d{1,3})\.(.+)", name):
            return f"blocks.{int(shortcut[1]) * n}.shortcut.{shortcut[2]}"
        name = re.sub(r"^conv1\.", "stem.conv.", re.sub(r"^bn1\.", "stem.bn.", name))
        return re.sub(r"^(fc|linear)\.", "head.linear.", name)

    state = renamed(tensors, rename, source)
    if "head.linear.weight" not in state:
        raise UserError(f"{one_line(source)} has no classifier (fc or linear)")
    for name, dimensions in (("stem.conv.weight", 4), ("head.linear.weight", 2)):
        if state[name].dim() != dimensions:
            raise UserError(
                f"{one_line(source)} is not a CIFAR ResNet: its {name} has shape {tuple(state[name].shape)}"
            )
    projections = any(".shortcut." in name for name in state)
    depth, num_classes = 6 * n + 2, len(state["head.linear.weight"])
    shortcut = "B" if projections else "A" if layer_named else "pool"
    guesses = {} if projections else {"shortcut": f"backbone.shortcut={'pool' if layer_named else 'A'} is the other"}
    guesses["mean"], guesses["std"] = ("backbone.mean=[…]", "backbone.std=[…]")
    if blockdrop and (depth, num_classes) == (32, 10):
        guesses["mean"] = f"BlockDrop's own ResNet-32 for CIFAR-10 needs backbone.mean={_listed(CIFAR_MEAN)}"
        guesses["std"] = f"and backbone.std={_listed(CIFAR_STD)}"
    names = "the names of torchvision (layer1.0.conv1, …)" if layer_named else "BlockDrop's names (blocks.0.0.conv1, …)"
    arguments = {
        "depth": depth,
        "num_classes": num_classes,
        "shortcut": shortcut,
        "width": len(state["stem.conv.weight"]),
        "mean": IMAGENET_MEAN if layer_named else (0.0, 0.0, 0.0),
        "std": IMAGENET_STD if layer_named else (1.0, 1.0, 1.0),
    }
    return Imported(
        state, arguments, f"a CIFAR ResNet-{depth}{' with shortcut B' if projections else ''} in {names}", guesses
    )


def from_torchvision_names(tensors: State, backbone: Backbone, source: str) -> Imported:
    """Rename torchvision's tensors as :class:`TorchvisionResNet` does.

    Raises:
        UserError: they have other names.
    """
    if not (layout_of(tensors) or "").startswith(("ResNet of four", "ResNet in the names", "network of policyskip")):
        raise UserError(f"{one_line(source)} does not fit {backbone.name}: it is not torchvision's {but_a(tensors)}")
    first_blocks = [sum(backbone.stages[:s]) for s in range(len(backbone.stages))]

    def rename(name: str) -> str:
        match = re.fullmatch(r"layer([1-4])\.(\d{1,3})\.(.+)", name)
        if match and int(match[2]) < backbone.stages[int(match[1]) - 1]:
            k, path = first_blocks[int(match[1]) - 1] + int(match[2]), match[3]
            branch = "shortcut" if path.startswith("downsample.") else "residual"
            return f"blocks.{k}.{branch}.{path.removeprefix('downsample.')}"
        name = re.sub(r"^bn1\.", "stem.bn.", re.sub(r"^conv1\.", "stem.conv.", name))
        return re.sub(r"^fc\.", "head.linear.", name)

    mean = {"normalisation": "ImageNet's"}
    layout = f"torchvision's {backbone.name.removeprefix('torchvision_')}"
    return Imported(renamed(tensors, rename, source), mean, layout, {"normalisation": "the only one of this network"})
