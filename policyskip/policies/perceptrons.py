"""The policies that PPO, A2C and DQN train, without Stable-Baselines3 (SB3): one class per environment.

``agents/sb3.py`` lets SB3 train their layers; deployment builds them from plain arguments, without SB3.

Shapes: B images, B' of them still in the network, K blocks, F channels of the widest features that enter a block,
N exits, C classes, A actions, D numbers of an observation, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from policyskip.envs import exit_sources, layer_skip
from policyskip.envs.base import DecisionEnv
from policyskip.errors import UserError
from policyskip.execution.ways import Execution
from policyskip.policies.base import Policy


def convolutions(channels: Sequence[int]) -> nn.Sequential:
    """Make strided 3×3 convolutions with these output channels, and a mean over the pixels after them: images float
    (B, 3, H, W) to features float (B, channels[-1])."""
    layers = nn.Sequential()
    for inputs, outputs in zip((3, *channels), channels):
        layers += nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.ReLU())
    return layers + nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def perceptron(inputs: int, hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """Make linear layers with a ReLU between them: float (B, inputs) to float (B, outputs)."""
    layers = nn.Sequential()
    for width in hidden:
        layers += nn.Sequential(nn.Linear(inputs, width), nn.ReLU())
        inputs = width
    return layers + nn.Sequential(nn.Linear(inputs, outputs))


def check_widths(**widths: Sequence[int]) -> None:
    """Check the widths of layers, by their keys of ``agent``.

    Raises:
        UserError: a width is no positive integer.
    """
    for name, values in widths.items():
        if any(isinstance(value, bool) or not isinstance(value, int) or value < 1 for value in values):
            raise UserError(f"agent.{name} must list positive integers, got {list(values)}")


class GreedyPolicy(Policy):
    """A policy of plain layers that takes the action whose logit or value is the highest.

    Args:
        arguments: those of the subclass's constructor, from which the policy can be built again.

    Attributes:
        layers: features to logits or values of the actions, float (B, A).
    """

    layers: nn.Sequential

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.arguments = arguments

    def spec(self) -> dict[str, Any]:
        return self.arguments

    def forward(self, observation: Tensor) -> Tensor:
        """Return logits, or values, of the actions, float (B, A)."""
        value_BA: Tensor = self.layers(observation)
        return value_BA

    def decide(self, observation: Tensor) -> Tensor:
        """Return whether the second of two actions is the better one, bool (B,)."""
        return self(observation).argmax(1).bool()


class LookPolicy(GreedyPolicy):
    """The policy for ``BlockSelection-v0``: from an image it decides which blocks run.

    Raises:
        UserError: ``channels`` is empty, or a width is not positive.
    """

    def __init__(self, num_blocks: int, channels: Sequence[int], net_arch: Sequence[int]) -> None:
        check_widths(channels=channels, net_arch=net_arch)
        if not channels:
            raise UserError("agent.channels must list the channels of one convolution at least")
        super().__init__(num_blocks=num_blocks, channels=list(channels), net_arch=list(net_arch))
        self.features = convolutions(channels)
        self.layers = perceptron(channels[-1], net_arch, num_blocks)

    def forward(self, observation: Tensor) -> Tensor:
        logits_BK: Tensor = self.layers(self.features(observation.float() / 255))
        return logits_BK

    def decide(self, observation: Tensor) -> Tensor:
        """Return which blocks run, bool (B, K), rounded as SB3 does: a block with a probability of ½ is skipped."""
        return self(observation).sigmoid().round().bool()


class BlockPolicy(GreedyPolicy):
    """The policy for ``LayerSkip-v0``: from the features that enter a block it decides whether the block runs."""

    block_KK: Tensor

    def __init__(self, num_blocks: int, width: int, net_arch: Sequence[int]) -> None:
        check_widths(net_arch=net_arch)
        super().__init__(num_blocks=num_blocks, width=width, net_arch=list(net_arch))
        self.layers = perceptron(width + num_blocks, net_arch, 2)
        self.register_buffer("block_KK", torch.eye(num_blocks), persistent=False)

    def run(
        self, execution: Execution, images: Tensor, break_even_K: Sequence[float] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Decide and run block after block. Shapes as in :meth:`Policy.run`.

        A block is computed only for the images that run it, whatever ``break_even_K`` says.
        """
        x, keep = execution.features(images), []
        for block, block_K in enumerate(self.block_KK):
            keep.append(self.decide(layer_skip.observe(x, block_K, self.arguments["width"])))
            x = execution.advance(x, keep[-1].unsqueeze(1), block)
        return execution.head(x), torch.stack(keep, 1)


class ExitPolicy(GreedyPolicy):
    """The policy for ``EarlyExit-v0``: from an exit's logits it decides whether the image leaves there."""

    def __init__(self, num_exits: int, num_classes: int, net_arch: Sequence[int]) -> None:
        check_widths(net_arch=net_arch)
        super().__init__(num_exits=num_exits, num_classes=num_classes, net_arch=list(net_arch))
        self.layers = perceptron(num_classes + 3 + num_exits, net_arch, 2)

    def leave(self, n: int, logits_BC: Tensor, rows: Tensor) -> Tensor:
        """Return which of the B' images at exit n leave, bool (B',), for :func:`~policyskip.backbones.exits.run_until`.

        Args:
            n: the exit, counted from 0.
            logits_BC: float (B', C), the exit's.
            rows: int64 (B',), the images' rows in the batch; not used.
        """
        exit_B = torch.full((len(logits_BC),), n, device=logits_BC.device)
        return self.decide(exit_sources.observe(logits_BC, exit_B, self.arguments["num_exits"]))


Build = Callable[[Any, Sequence[int], Sequence[int]], GreedyPolicy]
"""Builds a fresh policy from an environment, ``net_arch`` and ``channels``."""
POLICIES: dict[str, Build] = {
    "block_selection": lambda env, net_arch, channels: LookPolicy(env.backbone.num_blocks, channels, net_arch),
    "layer_skip": lambda env, net_arch, channels: BlockPolicy(env.num_blocks, env.width, net_arch),
    "early_exit": lambda env, net_arch, channels: ExitPolicy(env.num_exits, env.num_classes, net_arch),
}
"""A policy for each environment, by the environment's ``key``."""


def policy_for(env: DecisionEnv, net_arch: Sequence[int], channels: Sequence[int]) -> GreedyPolicy:
    """Build a fresh policy that can act in the environment.

    Args:
        net_arch: widths of the hidden layers.
        channels: of the convolutions, where images are observed.

    Raises:
        UserError: there is no such policy for the environment.
    """
    key = getattr(env, "key", None)
    if key not in POLICIES:
        raise UserError(
            f"there is no policy of plain layers for {type(env).__name__}, whose key is {key!r}; "
            f"it must derive from the environment of {', '.join(POLICIES)}"
        )
    return POLICIES[key](env, net_arch, channels)
