"""A residual network with gates: before each block but the first, a gate decides from the features whether it runs.

Shapes: B images, K blocks, G gates (K - 1), C classes, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from policyskip.backbones.base import Backbone, Block, Network, evaluation_mode
from policyskip.backbones.execution import run_block_together, some_process_runs
from policyskip.backbones.gates import GATES, Memory, straight_through
from policyskip.backbones.resnet_exits import feature_shapes
from policyskip.errors import UserError


@dataclass(frozen=True)
class GatedRun:
    """Holds the results of one pass: logits float (B, C), the gates' logits float (B, G), and the blocks that ran, bool
    (B, K), the first of them always."""

    logits_BC: Tensor
    gate_BG: Tensor
    keep_BK: Tensor


class GatedNetwork(Network):
    """A backbone with its gates: gate g sees the features that enter block g + 1 and decides whether that block runs.

    The first block has no gate and always runs (as published). A skipped block gives its shortcut, with no ReLU.

    Args:
        backbone: the network; its weights are shared, not copied.
        gate: "rnn", "ff1" or "ff2" (see ``gates.py``).
        image_shape: (3, H, W), on which the shapes of the features depend.
        initial_keep: approximate probability with which an untrained gate keeps its block.

    Attributes:
        gate_macs: MACs of all gates together for one image; every image runs all gates.

    Raises:
        UserError: there is no such gate, or it does not fit the features.
    """

    def __init__(self, backbone: Backbone, gate: str, image_shape: Sequence[int], initial_keep: float = 0.5) -> None:
        if gate not in GATES:
            raise UserError(f"agent.gate must be one of {', '.join(GATES)}, got {gate!r}")
        mean, std = backbone.mean.flatten().tolist(), backbone.std.flatten().tolist()
        super().__init__(backbone.num_classes, mean, std)
        for name in ("mean", "std"):  # the backbone's own, which are saved as part of it
            self.register_buffer(name, getattr(backbone, name), persistent=False)
        self.name = f"{backbone.name}_gated"
        self.backbone, self.gate = backbone, gate
        channels, height, width = image_shape
        shapes = feature_shapes(backbone, range(backbone.num_blocks - 1), (channels, height, width))
        self.gates = GATES[gate](shapes, initial_keep).to(backbone.mean.device)
        self.gate_macs = sum(self.gates.macs(shapes))

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits (B, C) of images uint8 (B, 3, H, W), with the gates' greedy decisions."""
        return self.greedy(images).logits_BC

    def greedy(self, images: Tensor) -> GatedRun:
        """Run images, uint8 (B, 3, H, W): each block for those where its gate says p > ½, and for no others."""
        half_BG = torch.full((len(images), self.backbone.num_blocks - 1), 0.5, device=images.device)
        return self.sampled(images, half_BG)

    def sampled(self, images: Tensor, uniform_BG: Tensor) -> GatedRun:
        """Run images, each block for those where p > u and for no others: with its gate's probability p, if u is drawn
        uniformly from [0, 1).

        The gradient of the gates' logits does not flow back into the features: gates learn from their returns, and
        blocks from the cross-entropy.

        Args:
            images: uint8 (B, 3, H, W).
            uniform_BG: u, float (B, G).
        """
        return self._run(images, uniform_BG)

    def straight_through(self, images: Tensor) -> GatedRun:
        """Run images uint8 (B, 3, H, W) as :meth:`greedy` does, but compute skipped blocks too, for the gates' gradient
        (see :func:`~policyskip.backbones.gates.straight_through`)."""
        return self._run(images, None)

    def _run(self, images: Tensor, uniform_BG: Tensor | None) -> GatedRun:
        """Run images uint8 (B, 3, H, W) as :meth:`sampled` does or, if ``uniform_BG`` is None, as
        :meth:`straight_through` does."""
        first_block, *gated_blocks = self.backbone.blocks
        x = first_block(self.backbone.features(images))
        memory: Memory = None
        logits, kept = [], [torch.ones(len(images), dtype=torch.bool, device=x.device)]
        for g, block in enumerate(gated_blocks):
            logit_B, memory = self.gates.logit(g, x if uniform_BG is None else x.detach(), memory)
            probability_B = logit_B.sigmoid()
            if uniform_BG is None:
                keep_B = probability_B > 0.5
                x = straight_through(*_both(block, x, keep_B), probability_B)
            else:
                keep_B = probability_B > uniform_BG[:, g]
                x = run_block_together(block, x, keep_B.nonzero().squeeze(1))
            logits.append(logit_B)
            kept.append(keep_B)
        return GatedRun(self.backbone.head(x), torch.stack(logits, 1), torch.stack(kept, 1))


def _both(block: Block, x: Tensor, keep_B: Tensor) -> tuple[Tensor, Tensor]:
    """Compute, for every image, a block's output if it runs and if it is skipped, each (B, C, H, W).

    Images that skip the block, where ``keep_B`` is false, give it no gradient and do not count in its batch
    normalisation: they are normalised by the running statistics, which come from the images that keep the block.
    """
    rows, skipping = keep_B.nonzero().squeeze(1), (~keep_B).nonzero().squeeze(1)
    shortcut = block.shortcut(x)
    kept = torch.zeros_like(shortcut)
    if some_process_runs(block, rows):
        kept = kept.index_copy(0, rows, torch.relu(shortcut[rows] + block.residual(x[rows])))
    if len(skipping):
        with torch.no_grad(), evaluation_mode(block.residual):
            output = torch.relu(shortcut[skipping] + block.residual(x[skipping]))
        kept = kept.index_copy(0, skipping, output)
    return kept, shortcut
