"""A residual network with a gate before each block but the first: it decides on its way, from what it has computed.

Shapes: B images, K blocks, G gates (K - 1), C classes, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from policyskip.backbones.base import Backbone, Block, Network
from policyskip.backbones.execution import run_block_together, some_process_runs
from policyskip.backbones.gates import GATES, Memory, straight_through
from policyskip.backbones.resnet_exits import feature_shapes
from policyskip.errors import UserError


@dataclass(frozen=True)
class GatedRun:
    """What a pass gave: ``logits_BC`` float; ``gate_BG`` float, the gates' logits; ``keep_BK`` bool, what ran (the
    first block always)."""

    logits_BC: Tensor
    gate_BG: Tensor
    keep_BK: Tensor


class GatedNetwork(Network):
    """A backbone and its gates. Gate g sees the features that enter block g + 1 and decides whether that block runs.

    The first block has no gate and always runs (as published). A skipped block gives its shortcut, with no ReLU.

    Args:
        backbone: the network; its weights are shared, not copied.
        gate: "rnn", "ff1" or "ff2" (see ``gates.py``).
        image_shape: (3, H, W), on which the shapes of the features depend.
        initial_keep: probability with which a fresh gate keeps its block, about.

    Attributes:
        gate_macs: MACs of all gates together, for one image; every image pays them.

    Raises:
        UserError: there is no such gate, or it does not fit the features.
    """

    def __init__(self, backbone: Backbone, gate: str, image_shape: Sequence[int], initial_keep: float = 0.5) -> None:
        if gate not in GATES:
            raise UserError(f"agent.gate must be one of {', '.join(GATES)}, got {gate!r}")
        mean, std = backbone.mean.flatten().tolist(), backbone.std.flatten().tolist()
        super().__init__(backbone.num_classes, mean, std)
        for name in ("mean", "std"):  # the backbone's, which are saved with it
            self.register_buffer(name, getattr(backbone, name), persistent=False)
        self.name = f"{backbone.name}_gated"
        self.backbone, self.gate = backbone, gate
        channels, height, width = image_shape
        shapes = feature_shapes(backbone, range(backbone.num_blocks - 1), (channels, height, width))
        self.gates = GATES[gate](shapes, initial_keep).to(backbone.mean.device)
        self.gate_macs = sum(self.gates.macs(shapes))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of images uint8 (B, 3, H, W), decided greedily."""
        return self.greedy(images).logits_BC

    def greedy(self, images: Tensor) -> GatedRun:
        """Blocks run where their gate says p > ½, for those images and for no others."""
        half_BG = torch.full((len(images), self.backbone.num_blocks - 1), 0.5, device=images.device)
        return self.sampled(images, half_BG)

    def sampled(self, images: Tensor, uniform_BG: Tensor) -> GatedRun:
        """Blocks run where p > u: with u uniform in [0, 1), float (B, G), each with its gate's probability.

        Blocks are computed for the images that run them and for no others. The gates' gradient does not flow on into
        the features that they saw: gates learn from their returns, and blocks from the cross-entropy.
        """
        return self._run(images, uniform_BG)

    def straight_through(self, images: Tensor) -> GatedRun:
        """As :meth:`greedy`, but what a skipped block would have given is computed too, for the gates' gradient (see
        :func:`~policyskip.backbones.gates.straight_through`)."""
        return self._run(images, None)

    def _run(self, images: Tensor, uniform_BG: Tensor | None) -> GatedRun:
        first, *others = self.backbone.blocks
        x = first(self.backbone.features(images))
        memory: Memory = None
        answers, kept = [], [torch.ones(len(images), dtype=torch.bool, device=x.device)]
        for g, block in enumerate(others):
            logit_B, memory = self.gates.ask(g, x if uniform_BG is None else x.detach(), memory)
            probability_B = logit_B.sigmoid()
            if uniform_BG is None:
                keep_B = probability_B > 0.5
                x = straight_through(*_both(block, x, keep_B), probability_B)
            else:
                keep_B = probability_B > uniform_BG[:, g]
                x = run_block_together(block, x, keep_B.nonzero().squeeze(1))
            answers.append(logit_B)
            kept.append(keep_B)
        return GatedRun(self.backbone.head(x), torch.stack(answers, 1), torch.stack(kept, 1))


def _both(block: Block, x: Tensor, keep_B: Tensor) -> tuple[Tensor, Tensor]:
    """A block's output where it runs and where it does not, for every image, each (B, C, H, W).

    Images that skip the block get no gradient through it, and they leave no trace in its batch normalisation: they are
    normalised by the running statistics, which come from the images that the block ran for.
    """
    rows, rest = keep_B.nonzero().squeeze(1), (~keep_B).nonzero().squeeze(1)
    shortcut = block.shortcut(x)
    kept = torch.zeros_like(shortcut)
    if some_process_runs(block, rows):
        kept = kept.index_copy(0, rows, torch.relu(shortcut[rows] + block.residual(x[rows])))
    if len(rest):
        learning = block.residual.training
        with torch.no_grad():
            would = torch.relu(shortcut[rest] + block.residual.eval()(x[rest]))
        block.residual.train(learning)
        kept = kept.index_copy(0, rest, would)
    return kept, shortcut
