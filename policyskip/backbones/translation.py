"""Tensors of networks that others trained get the names that the package has for them."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from policyskip.backbones.base import IMAGENET_MEAN, IMAGENET_STD, Backbone
from policyskip.errors import UserError

State = dict[str, Tensor]


def from_cifar_names(tensors: State, source: str) -> tuple[State, dict[str, Any]]:
    """Rename the tensors of a CIFAR ResNet that others trained as the package does.

    Args:
        tensors: under the names of torchvision, of the many CIFAR ResNets written after it, or of BlockDrop.
        source: the name of their file.

    Returns: the tensors, and the arguments of :class:`~policyskip.backbones.resnet.CifarResNet` that fit them.

    Raises:
        UserError: they are no CIFAR ResNet's.
    """
    torchvision_like = any(name.startswith("layer1.0.") for name in tensors)
    blockdrop = any(name.startswith("blocks.0.0.") for name in tensors)
    if not (torchvision_like or blockdrop) or "conv1.weight" not in tensors:
        some = ", ".join(list(tensors)[:3])
        raise UserError(f"{source} is not a CIFAR ResNet that is known here; its tensors are named {some}, …")
    pattern = re.compile(r"layer(\d+)\.(\d+)\.(.+)" if torchvision_like else r"blocks\.(\d+)\.(\d+)\.(.+)")
    first_stage = 1 if torchvision_like else 0
    blocks = {(int(m[1]) - first_stage, int(m[2])) for m in map(pattern.fullmatch, tensors) if m}
    sizes = [sum(stage == s for stage, _ in blocks) for s in range(max(stage for stage, _ in blocks) + 1)]
    if len(sizes) != 3 or len(set(sizes)) != 1:
        raise UserError(f"{source} is not a CIFAR ResNet: its stages have {sizes} blocks, not three times the same")
    n, state = sizes[0], {}
    for name, value in tensors.items():
        match = pattern.fullmatch(name)
        shortcut = re.fullmatch(r"ds\.(\d+)\.(.+)", name)
        if match:
            k, path = (int(match[1]) - first_stage) * n + int(match[2]), match[3]
            inner = re.sub(r"^(shortcut|downsample)\.", "", path)
            state[f"blocks.{k}.{'residual' if inner == path else 'shortcut'}.{inner}"] = value
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


def from_torchvision_names(tensors: State, backbone: Backbone) -> State:
    """Rename torchvision's tensors as :class:`TorchvisionResNet` does."""
    first_blocks = [sum(backbone.stages[:s]) for s in range(len(backbone.stages))]
    state = {}
    for name, value in tensors.items():
        match = re.fullmatch(r"layer(\d)\.(\d+)\.(.+)", name)
        if match:
            k, path = first_blocks[int(match[1]) - 1] + int(match[2]), match[3]
            branch = "shortcut" if path.startswith("downsample.") else "residual"
            name = f"blocks.{k}.{branch}.{path.removeprefix('downsample.')}"
        else:
            name = re.sub(
                r"^fc\.", "head.linear.", re.sub(r"^bn1\.", "stem.bn.", re.sub(r"^conv1\.", "stem.conv.", name))
            )
        state[name] = value
    return state
