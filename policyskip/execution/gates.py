"""Networks with gates are executed here: each gate decides on the device, and nothing is asked of the host.

Shapes: B images, K blocks, G gates (K - 1), C classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from policyskip.backbones.base import Backbone
from policyskip.backbones.gated import GatedNetwork, GatedRun
from policyskip.backbones.gates import Memory
from policyskip.execution.cuda_graphs import Tensors
from policyskip.execution.ways import Execution, NetworkExecution


class GateExecution(NetworkExecution):
    """Executes a network with gates, without gradients. For the arguments see
    :class:`~policyskip.execution.ways.NetworkExecution`.

    With ``dense``, each block is computed for all images.
    """

    network: GatedNetwork

    def _backbone(self, network: Any) -> Backbone | None:
        return network.backbone if isinstance(network, GatedNetwork) else None

    def greedy(self, images: Tensor) -> GatedRun:
        """Run images (B, 3, H, W): each block for those where its gate says p > ½."""
        half_BG = torch.full((len(images), self.network.backbone.num_blocks - 1), 0.5, device=images.device)
        return self.sampled(images, half_BG)

    def sampled(self, images: Tensor, uniform_BG: Tensor) -> GatedRun:
        """Run images (B, 3, H, W), each block for those where its gate's probability p > u.

        Args:
            uniform_BG: u, float (B, G), in [0, 1).

        Raises:
            ValueError: gradients are wanted of kernels.
        """
        if (found := self.by_kernels("gates", self._block_by_block, images, uniform_BG)) is not None:
            return GatedRun(*found)
        with torch.no_grad(), self.exactly():
            if self.way == "dense" and len(images):
                return GatedRun(*self._block_by_block(images, uniform_BG))
            return self.network.sampled(images, uniform_BG)

    def whole(self, images: Tensor) -> Tensor:
        """Compute logits (B, C) of images (B, 3, H, W) with all blocks and no gates.

        Raises:
            ValueError: gradients are wanted of kernels.
        """
        if (found := self.by_kernels("whole", self._whole, images)) is not None:
            return found[0]
        with self.exactly():
            return self.network.backbone(images)

    def _whole(self, images: Tensor) -> Tensors:
        assert self.kernels is not None
        shape = (1, len(images), self.network.backbone.num_blocks)
        return (self.kernels.logits(images, torch.ones(shape, dtype=torch.bool, device=images.device))[0],)

    def _block_by_block(self, images: Tensor, uniform_BG: Tensor) -> Tensors:
        """Compute the three tensors of a :class:`GatedRun`; a gate's decision goes straight to the next block."""
        gates, blocks = self.network.gates, self.kernels or self._every_block()
        keep_B = torch.ones(len(images), dtype=torch.bool, device=images.device)
        x = blocks.advance(blocks.features(images), keep_B.unsqueeze(1), 0)
        memory: Memory = None
        logits, kept = [], [keep_B]
        for g, uniform_B in enumerate(uniform_BG.unbind(1)):
            logit_B, memory = gates.logit(g, x, memory)
            keep_B = logit_B.sigmoid() > uniform_B
            x = blocks.advance(x, keep_B.unsqueeze(1), g + 1)
            logits.append(logit_B)
            kept.append(keep_B)
        return blocks.head(x), torch.stack(logits, 1), torch.stack(kept, 1)

    def _every_block(self) -> Execution:
        """Return what computes every block for all images."""
        return Execution(self.network.backbone, self.image_shape, "dense", as_it_is=True)
