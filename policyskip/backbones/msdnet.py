"""Multi-Scale DenseNet (Huang et al., *Multi-Scale Dense Networks for Resource Efficient Image Classification*,
ICLR 2018, arXiv 1703.09844): a grid of L layers and S scales, and exits that read the coarsest scale.

A node (l, s) of the grid is the output of layer l, 1 to L, at scale s, 0 (finest) to S-1; layer 0 is the stem. The cone
of an exit is the nodes that lead to (the exit's layer, S-1). The paper's lazy evaluation computes the cone of the next
exit and defers all other nodes until an exit needs them; the published tables, and ``lazy=False``, compute all live
scales.

Shapes: B images, N exits, C classes, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from policyskip.backbones.base import IMAGENET_MEAN, IMAGENET_STD, he_init
from policyskip.backbones.exits import ExitCosts, ExitNetwork, State, count_exit_costs, in_millions
from policyskip.errors import UserError
from policyskip.texts import percent

Node = tuple[int, int]
StepMode = Literal["even", "lin_grow"]
Prune = Literal["max", "min"]
Stem = Literal["cifar", "imagenet"]
MOST_LAYERS, MOST_SCALES = 500, 8
"""Far more than any published network has; what is larger would be planned for hours."""


@dataclass(frozen=True)
class Grid:
    """Describes the nodes of the grid, and the nodes that each of them reads.

    Args:
        exit_layers: the layer, from 1, that each exit follows; the last one is L.
        num_scales: S.
        prune: as in :class:`MSDNet`.
    """

    exit_layers: tuple[int, ...]
    num_scales: int
    prune: Prune

    def live(self, layer: int) -> range:
        """Return the live scales of a layer, which it computes: the coarsest ones."""
        L, S = self.exit_layers[-1], self.num_scales
        if layer == 0:
            return range(S)
        interval = -(-L // S)
        return range((layer - 1) // interval if self.prune == "max" else max(0, S - (L - layer + 1)), S)

    def inputs(self, node: Node) -> list[Node]:
        """Return the nodes that a node reads, in the layer before: the same scale, and the next finer one if it is
        live there."""
        layer, scale = node
        if layer == 0:
            return [(0, scale - 1)] if scale else []
        return [(layer - 1, s) for s in (scale, scale - 1) if s in self.live(layer - 1)]

    def cone(self, node: Node) -> set[Node]:
        """Return all nodes that lead to a node, and the node itself."""
        cone, open_nodes = set(), [node]
        while open_nodes:
            node = open_nodes.pop()
            if node not in cone:
                cone.add(node)
                open_nodes += self.inputs(node)
        return cone

    @property
    def exit_nodes(self) -> list[Node]:
        """Return the node that each exit reads."""
        return [(layer, self.num_scales - 1) for layer in self.exit_layers]

    @property
    def nodes(self) -> list[Node]:
        """Return all nodes that some exit needs, each behind the nodes that it reads."""
        return sorted(self.cone(self.exit_nodes[-1]))

    @property
    def transitions(self) -> set[int]:
        """Return the layers that end in a transition."""
        L = self.exit_layers[-1]
        if self.prune == "min":
            return {L // 3, 2 * L // 3} - {0}
        return {layer for layer in range(1, L + 1) if len(self.live(layer)) < len(self.live(layer - 1))}

    def plan(self, lazy: bool) -> list[tuple[list[Node], set[Node]]]:
        """Plan, for each exit, the nodes to compute for it, in order, and those to remember for it and later exits.

        Args:
            lazy: whether only the exit's cone is computed, and not all live scales.
        """
        new_N: list[list[Node]] = []
        done = {(0, 0)}
        for exit_node in self.exit_nodes:
            needed = self.cone(exit_node) if lazy else {node for node in self.nodes if node[0] <= exit_node[0]}
            new_N.append(sorted(needed - done))
            done |= needed
        plan = []
        later: set[Node] = set()
        for new, exit_node in zip(reversed(new_N), reversed(self.exit_nodes)):
            plan.append((new, later | {exit_node}))
            later = (later | {read for node in new for read in self.inputs(node)}) - set(new)
        return plan[::-1]


class GridNode(nn.Module):
    """A layer at one scale that concatenates its input, features from the next finer scale, and new features.

    Args:
        normal: computes new features from the same scale.
        down: computes features from the next finer scale, with stride; None if there is no finer scale.
        transition: a 1×1 convolution that narrows the result; None in most layers.
    """

    def __init__(self, normal: nn.Module, down: nn.Module | None, transition: nn.Module | None) -> None:
        super().__init__()
        self.normal, self.down, self.transition = normal, down, transition

    def forward(self, same: Tensor, finer: Tensor | None = None) -> Tensor:
        inputs = [same] if self.down is None else [same, self.down(finer)]
        x = torch.cat([*inputs, self.normal(same)], 1)
        return x if self.transition is None else self.transition(x)


class MSDNet(ExitNetwork):
    """The network MSDNet, whose arguments have the names of the authors' options in brackets.

    Args:
        num_classes: C.
        num_exits: N; an exit ends each block of layers [nBlocks].
        base: layers before exit 0.
        step, step_mode: layers from exit n-1 to exit n: ``step`` if "even", ``step · n + 1`` if "lin_grow" [stepmode].
        channels: channels of the stem [nChannels]; at each scale, times the scale's growth factor.
        growth_rate: channels that each layer adds [growthRate]; at each scale, times the scale's growth factor.
        growth_factors: one for each of the S scales [grFactor].
        bottleneck_factors: one for each of the S scales [bnFactor]: the width of the 1×1 convolutions that read the
            scale is this factor times the channels of the 3×3 convolutions behind them.
        prune: "max" drops the finest scale S-1 times, at even intervals, with a transition each time; "min" keeps each
            scale as long as an exit can use it, and has its transitions after layers ⌊L/3⌋ and ⌊2L/3⌋.
        reduction: the share of the channels that remain after a transition.
        stem: "cifar", or "imagenet", which makes the finest scale a quarter of the image.
        head_channels: channels of the two convolutions in each head, 128 for CIFAR; 0, for ImageNet, is as many as the
            head reads.
        lazy: whether nodes that the next exit does not need are deferred. It changes no logits, and may be set between
            two batches.
        mean, std: pixel normalisation, per channel, for pixels in [0, 1].

    Raises:
        UserError: an argument is out of range, or two do not fit together.
    """

    def __init__(
        self,
        num_classes: int,
        num_exits: int = 5,
        base: int = 1,
        step: int = 1,
        step_mode: StepMode = "lin_grow",
        channels: int = 16,
        growth_rate: int = 6,
        growth_factors: Sequence[int] = (1, 2, 4),
        bottleneck_factors: Sequence[int] = (1, 2, 4),
        prune: Prune = "max",
        reduction: float = 0.5,
        stem: Stem = "cifar",
        head_channels: int = 128,
        lazy: bool = True,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        for name, value, allowed in (
            ("step_mode", step_mode, ("even", "lin_grow")),
            ("prune", prune, ("max", "min")),
            ("stem", stem, ("cifar", "imagenet")),
        ):
            if value not in allowed:
                raise UserError(f"{name} must be {' or '.join(allowed)}, got {value!r}")
        counts = [num_exits, base, step, channels, growth_rate]
        if min(counts) < 1 or head_channels < 0 or not 0 < reduction <= 1:
            raise UserError(
                "num_exits, base, step, channels and growth_rate must be at least 1, head_channels at least 0, and "
                f"reduction in (0, 1]; got {', '.join(map(str, [*counts, head_channels]))} and {reduction}"
            )
        S = len(growth_factors)
        if not S or len(bottleneck_factors) != S or min(*growth_factors, *bottleneck_factors) < 1:
            raise UserError(
                "growth_factors and bottleneck_factors must be one positive number for each scale, got "
                f"{list(growth_factors)} and {list(bottleneck_factors)}"
            )
        if any(growth_rate * factor % 2 for factor in growth_factors[1:]):
            raise UserError(
                "growth_rate times each growth factor but the first must be even (half comes from the finer scale), "
                f"got {growth_rate} and {list(growth_factors)}"
            )
        super().__init__(num_classes, num_exits, mean, std)
        counted = range(1, min(num_exits, MOST_LAYERS + 1))
        layers = [base, *(step if step_mode == "even" else step * n + 1 for n in counted)]
        if sum(layers) > MOST_LAYERS or S > MOST_SCALES:
            raise UserError(
                f"an MSDNet of {num_exits} exits, base {base}, step {step} and {S} scales is too large; it may have "
                f"{MOST_LAYERS} layers and {MOST_SCALES} scales"
            )
        self.grid = Grid(tuple(sum(layers[: n + 1]) for n in range(num_exits)), S, prune)
        self.lazy = lazy
        self._plans = {choice: self.grid.plan(choice) for choice in (False, True)}

        # The channels after each layer, at a growth factor of 1.
        width = [channels]
        for layer in range(1, self.grid.exit_layers[-1] + 1):
            wide = width[-1] + growth_rate
            width.append(max(1, int(reduction * wide)) if layer in self.grid.transitions else wide)

        def channels_of(node: Node) -> int:
            return width[node[0]] * growth_factors[node[1]]

        def stem_node(node: Node) -> nn.Module:
            if node[1]:
                return conv_bn_relu(channels_of((0, node[1] - 1)), channels_of(node), 3, stride=2)
            if stem == "cifar":
                return conv_bn_relu(3, channels_of(node), 3)
            return nn.Sequential(conv_bn_relu(3, channels_of(node), 7, stride=2), nn.MaxPool2d(3, 2, padding=1))

        def grid_node(node: Node) -> nn.Module:
            (layer, scale), inputs = node, self.grid.inputs(node)
            new = growth_rate * growth_factors[scale] // len(inputs)
            normal, *down = (
                bottleneck(channels_of(read), new, bottleneck_factors[read[1]], stride=1 + (read[1] < scale))
                for read in inputs
            )
            grown = channels_of(inputs[0]) + growth_rate * growth_factors[scale]
            transition = conv_bn_relu(grown, channels_of(node), 1) if layer in self.grid.transitions else None
            return GridNode(normal, down[0] if down else None, transition)

        self.nodes = nn.ModuleDict(
            {name_of(node): grid_node(node) if node[0] else stem_node(node) for node in self.grid.nodes}
        )
        widths = [channels_of(node) for node in self.grid.exit_nodes]
        self.heads = nn.ModuleList(_head(c, head_channels or c, num_classes) for c in widths)
        self.name = f"msdnet{num_exits}"
        self.architecture = dict(
            network="msdnet",
            num_classes=num_classes,
            num_exits=num_exits,
            base=base,
            step=step,
            step_mode=step_mode,
            channels=channels,
            growth_rate=growth_rate,
            growth_factors=list(growth_factors),
            bottleneck_factors=list(bottleneck_factors),
            prune=prune,
            reduction=reduction,
            stem=stem,
            head_channels=head_channels,
            mean=list(mean),
            std=list(std),
        )
        he_init(self)

    def begin(self, images: Tensor) -> State:
        """Compute the finest scale of the stem for images (B, 3, H, W); coarser ones follow when an exit needs them."""
        return {(0, 0): self.nodes[name_of((0, 0))](self.normalise(images))}

    def segment(self, n: int, state: State) -> State:
        new, remembered = self._plans[self.lazy][n]
        state = dict(state)
        for node in new:
            state[node] = self.nodes[name_of(node)](*(state[read] for read in self.grid.inputs(node)))
        return {node: state[node] for node in remembered}

    def head(self, n: int, state: State) -> Tensor:
        return self.heads[n](state[self.grid.exit_nodes[n]])

    def remarks(self, image_shape: tuple[int, int, int]) -> list[str]:
        lazy, eager = count_with_and_without_lazy(self, image_shape)
        saved = ", ".join(percent(1 - fraction, 0) for fraction in (lazy.cumulative_N / eager.cumulative_N).tolist())
        return [
            f"without lazy evaluation: {in_millions(eager.cumulative_N)}; it saves {saved}"
            + ("" if self.lazy else ", and is switched off (backbone.lazy=true)")
        ]


def name_of(node: Node) -> str:
    """Return the name of a node's module."""
    return "layer{}_scale{}".format(*node)


def conv_bn_relu(channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Build a convolution with "same" padding and without bias – BN – ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


def bottleneck(channels_in: int, channels_out: int, factor: int, stride: int) -> nn.Sequential:
    """Build a 1×1 convolution to ``factor`` times the output's channels, but at most the input's, and a 3×3
    convolution."""
    width = min(channels_in, factor * channels_out)
    return nn.Sequential(conv_bn_relu(channels_in, width, 1), conv_bn_relu(width, channels_out, 3, stride))


def _head(channels: int, width: int, num_classes: int) -> nn.Sequential:
    """Build a head: two strided convolutions, the average over the remaining pixels (2×2 at the published image sizes),
    and a linear layer."""
    return nn.Sequential(
        conv_bn_relu(channels, width, 3, stride=2),
        conv_bn_relu(width, width, 3, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, num_classes),
    )


def count_with_and_without_lazy(network: MSDNet, image_shape: tuple[int, int, int]) -> tuple[ExitCosts, ExitCosts]:
    """Count the MACs of each exit with and without lazy evaluation, for one image of shape (3, H, W)."""
    lazy = network.lazy
    try:
        network.lazy = True
        with_lazy = count_exit_costs(network, image_shape)
        network.lazy = False
        return with_lazy, count_exit_costs(network, image_shape)
    finally:
        network.lazy = lazy
