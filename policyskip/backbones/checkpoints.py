"""Weights in and out: shipped ones by name, our own files, and networks that others trained.

No file is ever unpickled freely: safetensors, or ``torch.load(weights_only=True)``, which refuses code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from policyskip import registry
from policyskip.backbones.architectures import RANDOM as RANDOM
from policyskip.backbones.architectures import build_again, is_users_own
from policyskip.backbones.base import IMAGENET_MEAN, IMAGENET_STD, Backbone, Network
from policyskip.backbones.resnet import CifarResNet, Shortcut, TorchvisionResNet
from policyskip.errors import UserError, first_line
from policyskip.files import damaged, write
from policyskip.sealed import largest_number, read_metadata, sealed, unsealed

WEIGHTS = Path(__file__).parent.parent / "weights"
"""Weights that ship with the package, each with the command and figures that made it beside it."""
LARGEST_NUMBER = 10_000
"""The largest number that a file may say of one of the package's own networks: of blocks, channels, classes, …"""

State = dict[str, Tensor]


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
    """A CIFAR ResNet with the weights of ``checkpoint``: a shipped name, a file, or "random".

    What is left None comes from the checkpoint: our files say it; in others it follows from their layout
    (see :func:`read_checkpoint`). With "random": the weights of ``seed``, shortcut "pool", width 16, ImageNet's
    normalisation.

    Raises:
        UserError: no such checkpoint, or one of another depth, width, number of classes or architecture.
    """
    asked: dict[str, Any] = dict(depth=depth, shortcut=shortcut, width=width, mean=mean, std=std)
    given = {name: value for name, value in asked.items() if value is not None}
    if checkpoint is None:
        raise UserError(
            f"backbone.checkpoint is not set: a frozen ResNet-{depth} needs trained weights; give a file, one of "
            f"{', '.join(shipped())}, make one with `policyskip pretrain`, or say backbone.checkpoint=random"
        )
    if checkpoint == RANDOM:
        with seeded(seed):
            return CifarResNet(**{"num_classes": num_classes, **given})
    state, found = read_checkpoint(checkpoint)
    own = read_architecture(checkpoint) is not None
    for name in ("depth", "width", "shortcut") if own else ("depth", "width"):
        if name in given and name in found and given[name] != found[name]:
            raise UserError(f"{checkpoint} holds a ResNet of {name} {found[name]}, not of {name} {given[name]}")
    if found["num_classes"] != num_classes:
        raise UserError(f"{checkpoint} has {found['num_classes']} classes, the data has {num_classes}")
    check_size(lambda: CifarResNet(**{**found, **given}), state, checkpoint)
    backbone = CifarResNet(**{**found, **given})
    load_into(backbone, state, checkpoint)
    return backbone


def torchvision_resnet(
    num_classes: int, depth: int, checkpoint: str | None = "DEFAULT", image_size: int = 224, seed: int = 0
) -> TorchvisionResNet:
    """torchvision's ImageNet ResNet: its own weights ("DEFAULT", "IMAGENET1K_V1", …, downloaded by torchvision),
    a file with a torchvision state dict of any number of classes, or "random" (those of ``seed``).

    ``image_size`` is what image folders are scaled to for it; the network itself takes any size.

    Raises:
        UserError: the weights cannot be had, or do not fit.
    """
    if checkpoint is None:
        raise UserError("backbone.checkpoint is not set: say DEFAULT (torchvision's weights), a file, or random")
    if checkpoint == RANDOM:
        with seeded(seed):
            return TorchvisionResNet(depth, num_classes)
    if Path(checkpoint).is_file():
        backbone = TorchvisionResNet(depth, num_classes)
        load_into(backbone, _from_torchvision_names(read_tensors(Path(checkpoint)), backbone), checkpoint)
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
    """Random weights that are the same every time, without touching the global generator."""
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
        state = read_tensors(find(name))
    else:
        state, architecture = read_checkpoint(name)
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
    """Write a network that ``backbone.checkpoint=`` takes: its weights, and the arguments that build it again."""
    write(path, sealed(network.state_dict(), network.architecture))


def shipped() -> list[str]:
    """Names of the weights that come with the package."""
    return sorted(file.stem for file in WEIGHTS.glob("*.safetensors"))


def find(checkpoint: str) -> Path:
    """The file that a checkpoint's name or path stands for."""
    for path in (Path(checkpoint).expanduser(), WEIGHTS / f"{checkpoint}.safetensors"):
        if path.is_file():
            return path
    raise UserError(f"there is no checkpoint {checkpoint}: neither a file nor one of {', '.join(shipped())}")


def check_data(checkpoint: str | None, data: str) -> None:
    """UserError if ``checkpoint`` names shipped weights that were trained on other data than ``data``."""
    if checkpoint not in shipped() or find(checkpoint).parent != WEIGHTS:
        return
    trained_on = json.loads((WEIGHTS / f"{checkpoint}.json").read_bytes())["data"]
    if trained_on != data:
        raise UserError(
            f"backbone.checkpoint={checkpoint} was trained on {trained_on}, not on {data}: give weights of a network "
            "trained on it (policyskip pretrain makes some), or random where the agent trains the network"
        )


def read_checkpoint(checkpoint: str) -> tuple[State, dict[str, Any]]:
    """Tensors under our names, and the arguments of :class:`CifarResNet` that fit them.

    Other people's files are recognised by their names: ``layerL.B.…`` (torchvision, and the many CIFAR ResNets
    written after it; ImageNet normalisation, shortcut A unless there are projections) and ``blocks.S.B.…``
    (BlockDrop's; no normalisation, average-pool shortcut).
    """
    architecture = read_architecture(checkpoint)
    if architecture is None:
        return _translate(read_tensors(find(checkpoint)), checkpoint)
    if "network" in architecture:
        raise UserError(f"{checkpoint} holds a {architecture['network']}, not a CIFAR ResNet")
    return read_tensors(find(checkpoint)), architecture


def read_architecture(checkpoint: str) -> dict[str, Any] | None:
    """The arguments that :func:`save` wrote: those of the class named by "network" (without: :class:`CifarResNet`).
    None if the file is not ours."""
    path = find(checkpoint)
    if path.suffix != ".safetensors":
        return None
    try:
        architecture = read_metadata(path)
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"cannot read {path} as weights: {error}") from error
    if architecture is None or is_users_own(architecture):
        return architecture
    if (number := largest_number(architecture)) > LARGEST_NUMBER:
        raise UserError(f"cannot read {path} as weights: no network has a {number} in its architecture")
    return architecture


def check_size(make: Callable[[], Network], state: State, source: str) -> None:
    """UserError if a network's tensors, which are not made yet, would be larger than those that a file has for it."""
    try:
        with torch.device("meta"):
            needed = sum(value.numel() for value in make().state_dict().values())
    except (NotImplementedError, RuntimeError):  # of networks that look at numbers while they are made
        return
    given = sum(value.numel() for value in state.values())
    if needed > 2 * given + 10_000:
        raise UserError(f"{source} is damaged: it holds {given} numbers, its network needs {needed}")


def read_tensors(path: Path) -> State:
    """The tensors of a checkpoint file, ``module.`` prefixes removed; nothing in the file is executed."""
    try:
        if path.suffix == ".safetensors":
            content: Any = unsealed(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise whatever the reader stumbles over
        raise UserError(f"cannot read {path} as weights (files are never executed): {first_line(error)}") from error
    for key in ("state_dict", "resnet", "net", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} holds no weights: it must be a state dict, or a dictionary with one")
    tensors = {str(key).removeprefix("module."): value for key, value in content.items() if isinstance(value, Tensor)}
    return tensors


def _translate(tensors: State, source: str) -> tuple[State, dict[str, Any]]:
    """Other people's names to ours, and what architecture they imply."""
    torchvision_like = any(name.startswith("layer1.0.") for name in tensors)
    blockdrop = any(name.startswith("blocks.0.0.") for name in tensors)
    if not (torchvision_like or blockdrop) or "conv1.weight" not in tensors:
        some = ", ".join(list(tensors)[:3])
        raise UserError(f"{source} is not a CIFAR ResNet that is known here; its tensors are named {some}, …")
    pattern = re.compile(r"layer(\d+)\.(\d+)\.(.+)" if torchvision_like else r"blocks\.(\d+)\.(\d+)\.(.+)")
    first = 1 if torchvision_like else 0
    places = {(int(m[1]) - first, int(m[2])) for m in map(pattern.fullmatch, tensors) if m}
    sizes = [sum(stage == s for stage, _ in places) for s in range(max(stage for stage, _ in places) + 1)]
    if len(sizes) != 3 or len(set(sizes)) != 1:
        raise UserError(f"{source} is not a CIFAR ResNet: its stages have {sizes} blocks, not three times the same")
    n, state = sizes[0], {}
    for name, value in tensors.items():
        match = pattern.fullmatch(name)
        shortcut = re.fullmatch(r"ds\.(\d+)\.(.+)", name)
        if match:
            k, rest = (int(match[1]) - first) * n + int(match[2]), match[3]
            inner = re.sub(r"^(shortcut|downsample)\.", "", rest)
            state[f"blocks.{k}.{'residual' if inner == rest else 'shortcut'}.{inner}"] = value
        elif shortcut:
            state[f"blocks.{int(shortcut[1]) * n}.shortcut.{shortcut[2]}"] = value
        else:
            renamed = re.sub(r"^conv1\.", "stem.conv.", re.sub(r"^bn1\.", "stem.bn.", name))
            state[re.sub(r"^(fc|linear)\.", "head.linear.", renamed)] = value
    if "head.linear.weight" not in state:
        raise UserError(f"{source} has no classifier (fc or linear)")
    projections = any(".shortcut." in name for name in state)
    return state, {
        "depth": 6 * n + 2,
        "num_classes": len(state["head.linear.weight"]),
        "shortcut": "B" if projections else "A" if torchvision_like else "pool",
        "width": len(tensors["conv1.weight"]),
        "mean": IMAGENET_MEAN if torchvision_like else (0.0, 0.0, 0.0),
        "std": IMAGENET_STD if torchvision_like else (1.0, 1.0, 1.0),
    }


def _from_torchvision_names(tensors: State, backbone: Backbone) -> State:
    """torchvision's names to those of a :class:`TorchvisionResNet`."""
    starts = [sum(backbone.stages[:s]) for s in range(len(backbone.stages))]
    state = {}
    for name, value in tensors.items():
        match = re.fullmatch(r"layer(\d)\.(\d+)\.(.+)", name)
        if match:
            k, rest = starts[int(match[1]) - 1] + int(match[2]), match[3]
            branch = "shortcut" if rest.startswith("downsample.") else "residual"
            name = f"blocks.{k}.{branch}.{rest.removeprefix('downsample.')}"
        else:
            name = re.sub(
                r"^fc\.", "head.linear.", re.sub(r"^bn1\.", "stem.bn.", re.sub(r"^conv1\.", "stem.conv.", name))
            )
        state[name] = value
    return state


def load_into(network: Network, state: State, source: str) -> None:
    """Load every tensor or none; the normalisation and old files' missing counters are the network's own.

    Raises:
        UserError: the first tensor that is missing, too many, or of another shape.
    """
    own = network.state_dict()
    normalisation = {name for name in own if name.split(".")[-1] in ("mean", "std")}
    optional = normalisation | {name for name in own if name.endswith("num_batches_tracked")}
    missing = sorted(set(own) - set(state) - optional)
    unexpected = sorted(set(state) - set(own))
    if missing or unexpected:
        what = f"misses {missing[0]}" if missing else f"has {unexpected[0]} too many"
        count = len(missing) + len(unexpected)
        raise UserError(
            f"{source} does not fit {network.name}: it {what}" + (f" ({count} differences)" if count > 1 else "")
        )
    for name, value in state.items():
        if value.shape != own[name].shape:
            shapes = f"{tuple(value.shape)}, not {tuple(own[name].shape)}"
            raise UserError(f"{source} does not fit {network.name}: {name} has shape {shapes}")
        if value.is_floating_point() != own[name].is_floating_point() or value.is_complex():
            kinds = f"{value.dtype}, not {own[name].dtype}".replace("torch.", "")
            raise UserError(f"{source} does not fit {network.name}: {name} is of {kinds}")
        if not torch.isfinite(value).all():
            raise UserError(f"{source} cannot be used: {name} holds numbers that are not finite")
    network.load_state_dict({**own, **{k: v for k, v in state.items() if k not in normalisation}})
