"""Weights are read and written here: shipped weights by name, the package's own files, and files that others made.

No file is ever unpickled freely: safetensors, or ``torch.load(weights_only=True)``, which refuses code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from policyskip import registry
from policyskip.backbones.architectures import RANDOM as RANDOM
from policyskip.backbones.architectures import build_again, is_users_own
from policyskip.backbones.base import Backbone, Network
from policyskip.backbones.resnet import CifarResNet, Shortcut, TorchvisionResNet
from policyskip.backbones.translation import Imported, from_cifar_names, from_torchvision_names
from policyskip.backbones.weight_files import State, read_content, read_weights
from policyskip.errors import UserError
from policyskip.files import damaged, write
from policyskip.sealed import largest_number, sealed
from policyskip.texts import one_line

WEIGHTS = Path(__file__).parent.parent / "weights"
"""Weights that ship with the package, each with the command and figures that made it beside it."""
LARGEST_NUMBER = 10_000
"""The largest number that a file may say of one of the package's own networks: of blocks, channels, classes, …"""
MOST_NUMBERS = 500_000_000
"""The numbers that a network of random weights may hold, which no file bounds: 2 GB."""


def cifar_resnet(
    num_classes: int,
    depth: int,
    checkpoint: str | None,
    shortcut: Shortcut | None = None,
    width: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
) -> CifarResNet:
    """Build a CIFAR ResNet with the weights of ``checkpoint``: a shipped name, a file, or "random".

    Arguments that are None are taken from the checkpoint: the package's own files state them, and in others they follow
    from the tensors (see :func:`read_checkpoint`). With "random", the weights are those of ``seed``, and the defaults
    are shortcut "pool", width 16 and ImageNet's normalisation.

    Raises:
        UserError: no such checkpoint, or one of another depth, width, number of classes or architecture.
    """
    arguments = dict(depth=depth, shortcut=shortcut, width=width, mean=mean, std=std)
    chosen: dict[str, Any] = {name: value for name, value in arguments.items() if value is not None}
    if checkpoint is None:
        raise UserError(
            f"backbone.checkpoint is not set, and a ResNet-{depth} needs weights: give a file (`policyskip pretrain` "
            f"makes one), or random where the agent trains the network; {', '.join(shipped())} come with the package"
        )
    if checkpoint == RANDOM:
        check_memory(lambda: CifarResNet(**{"num_classes": num_classes, **chosen}))
        with seeded(seed):
            return CifarResNet(**{"num_classes": num_classes, **chosen})
    found = read_checkpoint(checkpoint)
    stored = found.arguments
    for name in ("depth", "width", "shortcut") if found.own else ("depth", "width"):
        if name in chosen and name in stored and chosen[name] != stored[name]:
            raise UserError(f"{checkpoint} holds a ResNet of {name} {stored[name]}, not of {name} {chosen[name]}")
    check_classes(checkpoint, stored.get("num_classes"), num_classes)
    backbone: CifarResNet = rebuilt({**stored, **chosen}, found.tensors, checkpoint)  # type: ignore[assignment]
    if not found.own:
        backbone.remark, backbone.stated_accuracy = found.remark(checkpoint, chosen), found.accuracy
    return backbone


def torchvision_resnet(
    num_classes: int, depth: int, checkpoint: str | None = "DEFAULT", image_size: int = 224, seed: int = 0
) -> TorchvisionResNet:
    """Build torchvision's ImageNet ResNet.

    Args:
        num_classes: C.
        depth: 18, 34, 50, 101 or 152.
        checkpoint: torchvision's weights, which it downloads ("DEFAULT", "IMAGENET1K_V1", …), a file with a torchvision
            state dict, or "random".
        image_size: the size to which image folders are scaled for the network, which itself takes any size.
        seed: decides random weights.

    Raises:
        UserError: the weights cannot be had, or do not fit.
    """
    if checkpoint is None:
        raise UserError("backbone.checkpoint is not set: say DEFAULT (torchvision's weights), a file, or random")
    if checkpoint == RANDOM:
        with seeded(seed):
            return TorchvisionResNet(depth, num_classes)
    if (path := Path(os.path.expanduser(checkpoint))).is_file():
        weights = read_weights(path)
        backbone = TorchvisionResNet(depth, num_classes)
        found = from_torchvision_names(weights.tensors, backbone, checkpoint)
        load_into(backbone, found.tensors, checkpoint)
        if read_architecture(checkpoint) is None:
            backbone.remark, backbone.stated_accuracy = found.remark(checkpoint, ()), weights.accuracy
        return backbone
    try:
        return TorchvisionResNet(depth, num_classes, checkpoint)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(
            f"no weights {checkpoint} for torchvision's resnet{depth} ({error}); give backbone.checkpoint=FILE"
        ) from error


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Make the random numbers drawn inside follow from ``seed`` alone, and leave the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def load(name: str, trusted: bool = False) -> Backbone:
    """Read a frozen backbone: shipped weights by name, or a file that :func:`save` wrote.

    Args:
        name: the shipped weights' name, or the file's.
        trusted: whether a network that is neither the package's own nor installed may be imported.

    Raises:
        UserError: there is no such file, it holds something else, or its network is not installed here.
    """
    architecture = read_architecture(name) or {}
    if architecture.get("network") == "torchvision_resnet" or is_users_own(architecture):
        state = read_weights(find(name)).tensors
    else:
        found = read_checkpoint(name)
        state, architecture = found.tensors, found.arguments
    network = rebuilt(architecture, state, name, trusted)
    if not isinstance(network, Backbone):
        raise UserError(f"{name} holds a {architecture['network']}, which has exits and no blocks to skip")
    return network.freeze()


def rebuilt(architecture: dict[str, Any], state: State, source: str, trusted: bool = False) -> Network:
    """Build the network that a file describes, with the tensors ``state`` of that file.

    Args:
        source: the file's name, or that of shipped weights.
        trusted: as for :func:`load`.

    Raises:
        UserError: the network is not installed here, fails while it is built, or does not fit its weights.
    """
    if is_users_own(architecture):
        with registry.naming_failures(f"{source}: {architecture['network']}"), seeded(0):
            check_size(lambda: build_again(architecture, trusted), state, source)
            network = build_again(architecture, trusted)
    else:
        with damaged(find(source)):
            try:
                check_size(lambda: build_again(architecture), state, source)
                network = build_again(architecture)
            except TypeError as error:
                raise UserError(f"{source} is damaged or of another version: {error}") from error
    load_into(network, state, source)
    return network


def save(network: Network, path: Path) -> None:
    """Write a network's weights, and the arguments that build it again, into a file for ``backbone.checkpoint=``."""
    write(path, sealed(network.state_dict(), network.architecture))


def shipped() -> list[str]:
    """List the names of the weights that come with the package."""
    return sorted(file.stem for file in WEIGHTS.glob("*.safetensors"))


def find(checkpoint: str) -> Path:
    """Find the file of a checkpoint's name or path.

    Raises:
        UserError: there is none.
    """
    for path in (Path(os.path.expanduser(checkpoint)), WEIGHTS / f"{checkpoint}.safetensors"):
        if path.is_file():
            return path
    raise UserError(f"there is no checkpoint {checkpoint}: neither a file nor one of {', '.join(shipped())}")


def check_data(checkpoint: str | None, data: str) -> None:
    """Refuse shipped weights for other data than they were trained on.

    Raises:
        UserError: ``checkpoint`` names shipped weights, and ``data`` another data set than theirs.
    """
    if checkpoint not in shipped() or find(checkpoint).parent != WEIGHTS:
        return
    trained_on = json.loads((WEIGHTS / f"{checkpoint}.json").read_bytes())["data"]
    if trained_on != data:
        raise UserError(
            f"backbone.checkpoint={checkpoint} was trained on {trained_on}, not on {data}: give weights of a network "
            "trained on it (policyskip pretrain makes some), or random where the agent trains the network"
        )


def read_checkpoint(checkpoint: str) -> Imported:
    """Read a CIFAR ResNet: tensors under the package's names, and the arguments of :class:`CifarResNet` that fit them.

    Files that others made are recognised by the names of their tensors: ``layerL.B.…`` (torchvision, and the many CIFAR
    ResNets written after it; ImageNet normalisation, shortcut A unless there are projections) and ``blocks.S.B.…``
    (BlockDrop's; no normalisation, average-pool shortcut).

    Raises:
        UserError: the file holds another network, or cannot be read.
    """
    architecture = read_architecture(checkpoint)
    if architecture is None:
        weights = read_weights(find(checkpoint))
        return replace(from_cifar_names(weights.tensors, checkpoint), accuracy=weights.accuracy)
    if "network" in architecture:
        raise UserError(f"{checkpoint} holds a {one_line(architecture['network'], 80)}, not a CIFAR ResNet")
    return Imported(read_weights(find(checkpoint)).tensors, architecture)


def read_architecture(checkpoint: str) -> dict[str, Any] | None:
    """Read the arguments that :func:`save` wrote into a file beside the weights: the network's ``architecture``.

    Returns: None if the file was made by others.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    path = find(checkpoint)
    architecture = read_content(path)
    if architecture is None or is_users_own(architecture):
        return architecture
    if (number := largest_number(architecture)) > LARGEST_NUMBER:
        raise UserError(f"cannot read {one_line(path)} as weights: no network has a {number:.3g} in its architecture")
    return architecture


def check_classes(checkpoint: str, stored: Any, wanted: int) -> None:
    """Refuse (UserError) a file whose network has another number of classes than the data."""
    if stored != wanted:
        raise UserError(f"{checkpoint} has {one_line(stored, 40)} classes, the data has {wanted}")


def check_size(make: Callable[[], Network], state: State, source: str) -> None:
    """Refuse a file whose network would need far more memory than its tensors do, before the network is made.

    Args:
        make: makes the network.
        state: the file's tensors.
        source: the file's name.

    Raises:
        UserError: the network's tensors would hold more numbers than the file does.
    """
    needed, stored = numbers_of(make), sum(value.numel() for value in state.values())
    if needed > 2 * stored + 10_000:
        raise UserError(f"{source} is damaged: it holds {stored} numbers, its network needs {needed}")


def check_memory(make: Callable[[], Network]) -> None:
    """Refuse a network of random weights that would not fit into memory, before it is made.

    Raises:
        UserError: it would hold more than ``MOST_NUMBERS``.
    """
    if (needed := numbers_of(make)) > MOST_NUMBERS:
        raise UserError(f"this network would hold {needed:,} numbers; {MOST_NUMBERS:,} are allowed: make it smaller")


def numbers_of(make: Callable[[], Network]) -> int:
    """Count the numbers that a network's tensors would hold, without making them; 0 if that cannot be known.

    Raises:
        UserError: ``make`` refuses its arguments.
    """
    try:
        with torch.device("meta"):
            return sum(value.numel() for value in make().state_dict().values())
    except UserError:
        raise
    except Exception:  # networks that look at numbers while they are made cannot be made without memory
        return 0


def load_checkpoint(network: Network, checkpoint: str) -> None:
    """Load the weights of a file into a network of the user's own; with "random", the network keeps those it has.

    Raises:
        UserError: there is no such file, or its tensors are not the network's.
    """
    if checkpoint != RANDOM:
        load_into(network, read_weights(find(checkpoint)).tensors, checkpoint)


def load_into(network: Network, state: State, source: str) -> None:
    """Load a file's tensors into a network, all or none. The normalisation, and counters that old files lack, stay.

    Raises:
        UserError: the first tensor that is missing, too many, or of another shape.
    """
    own = network.state_dict()
    normalisation = {name for name in own if name.split(".")[-1] in ("mean", "std")}
    optional = normalisation | {name for name in own if name.endswith("num_batches_tracked")}
    missing = sorted(set(own) - set(state) - optional)
    unexpected = sorted(set(state) - set(own))
    if missing or unexpected:
        what = f"misses {missing[0]}" if missing else f"has {one_line(unexpected[0], 80)} too many"
        count = len(missing) + len(unexpected)
        raise UserError(
            f"{source} does not fit {network.name}: it {what}" + (f" ({count} differences)" if count > 1 else "")
        )
    for name, value in state.items():
        if value.shape != own[name].shape:
            shapes = f"{tuple(value.shape)}, not {tuple(own[name].shape)}"
            raise UserError(f"{source} does not fit {network.name}: {name} has shape {one_line(shapes, 120)}")
        if value.is_floating_point() != own[name].is_floating_point():
            kinds = f"{value.dtype}, not {own[name].dtype}".replace("torch.", "")
            raise UserError(f"{source} does not fit {network.name}: {name} is of {kinds}")
        if not torch.isfinite(value.to(own[name].dtype)).all():
            raise UserError(f"{source} cannot be used: {name} holds numbers that are not finite")
    network.load_state_dict({**own, **{k: v for k, v in state.items() if k not in normalisation}})
