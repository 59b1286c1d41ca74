"""What environments are given is checked here: arguments of their constructors, seeds, actions.

Shapes: B images side by side, N images of a set, H W pixels.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import gymnasium
import torch
from torch import Tensor

from policyskip.backbones import Backbone, ExitNetwork
from policyskip.data.base import described
from policyskip.errors import UserError
from policyskip.finite import plain_tensor, whole_number
from policyskip.texts import one_line

MOST_IMAGES = 2**20
"""The most images that an environment shows at once."""

Constructor = Callable[..., None]


def naming_arguments(constructor: Constructor) -> Constructor:
    """Return a constructor that refuses an argument that it does not take, and names those that it takes.

    Raises:
        UserError: when the constructor is called with such an argument.
    """
    signature = inspect.signature(constructor)
    names = ", ".join(list(signature.parameters)[1:])

    @functools.wraps(constructor)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        """Make an environment.

        Raises:
            UserError: the constructor does not take these arguments, or refuses them.
        """
        try:
            signature.bind(self, *args, **kwargs)
        except TypeError as error:
            raise UserError(f"{type(self).__name__}: {one_line(error)}; it takes {names}") from None
        constructor(self, *args, **kwargs)

    return checked


def seed_or_none(given: Any) -> int | None:
    """Return the seed of a ``reset``; None is no seed.

    Raises:
        UserError: it is neither None nor a whole number, or is negative.
    """
    return None if given is None else whole_number("seed", given, 0)


def check_reward(reward: Any) -> None:
    """Refuse a reward that cannot be called.

    Raises:
        UserError: saying what a reward is.
    """
    if not callable(reward):
        raise UserError(f"reward must be a function from an outcome to a float tensor (B,), got {described(reward)}")


def check_network(name: str, network: Any, kind: type[Backbone] | type[ExitNetwork]) -> None:
    """Refuse a network of another kind than an environment is for.

    Raises:
        UserError: saying what was given, and which environment is for it, if any is.
    """
    if isinstance(network, kind):
        return
    hint = "or the name of shipped weights"
    if isinstance(network, ExitNetwork):
        hint += " (EarlyExit-v0 takes a network with exits)"
    elif isinstance(network, Backbone):
        hint += " (BlockSelection-v0 and LayerSkip-v0 take a network whose blocks are skipped)"
    elif isinstance(network, torch.nn.Module):
        hint += "; docs/extending.md shows how to make one of a network of your own"
    raise UserError(f"{name} must be a policyskip.backbones.{kind.__name__}, {hint}; got {described(network)}")


def check_fit(network: Backbone | ExitNetwork, image: Tensor, label_N: Tensor) -> None:
    """Check that a network takes images like ``image``, uint8 (1, 3, H, W), and has a class for every label.

    Raises:
        UserError: it does not.
    """
    channels = network.mean.shape[1]
    if image.dtype != torch.uint8 or image.dim() != 4 or image.shape[1] != channels:
        found = f"{str(image.dtype).removeprefix('torch.')} of shape (N, {', '.join(map(str, image.shape[1:]))})"
        raise UserError(f"images must be uint8 of shape (N, {channels}, H, W), got {found}")
    if image.device != network.mean.device:
        raise UserError(f"the images are on {image.device} and the network is on {network.mean.device}: move one")
    size = "×".join(map(str, image.shape[1:]))
    try:
        with torch.no_grad():
            network(image)
    except RuntimeError as error:
        other = [str(weight.dtype) for weight in network.parameters() if weight.dtype != torch.float32]
        if other:
            kind = other[0].removeprefix("torch.")
            raise UserError(f"{network.name} has weights of {kind}: give network.float()") from error
        raise UserError(f"{network.name} does not take images of {size}; give images=… that it was made for") from error
    if len(label_N) and int(label_N.max()) >= network.num_classes:
        raise UserError(f"{network.name} has {network.num_classes} classes, the images have more; give its own images")
    if len(label_N) and int(label_N.min()) < 0:
        raise UserError(f"labels must be from 0 to {network.num_classes - 1}, got {int(label_N.min())}")


def decisions(
    actions: Any, shape: tuple[int, ...], device: torch.device | None = None, name: str = "actions"
) -> Tensor:
    """Convert actions of 0 and 1, of any real dtype, to bool of the shape, on the device.

    Raises:
        UserError: they are no ordinary numbers, of another shape, or neither 0 nor 1.
    """
    chosen = plain_tensor(actions, name)
    if chosen.shape != shape:
        raise UserError(f"{name} must be of shape {shape}, got {tuple(chosen.shape)}")
    chosen = chosen.to(device) if device is not None else chosen
    if chosen.dtype != torch.bool and not ((chosen == 0) | (chosen == 1)).all():
        other = chosen[(chosen != 0) & (chosen != 1)]
        raise UserError(f"{name} must be 0 or 1, got {other[0].item()}")
    return chosen.bool()


def one_row(action: Any, space: gymnasium.Space[Any]) -> Tensor:
    """Return the action for one image as a row of actions, (1, …), if it has as many numbers as the space has.

    Raises:
        UserError: it is no ordinary number or array.
    """
    row, shape = plain_tensor(action, "actions"), space.shape or ()
    return row.reshape(1, *shape) if row.numel() == math.prod(shape) else row
