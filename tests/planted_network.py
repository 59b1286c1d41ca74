"""A planted network: what each of its blocks puts right is set by hand, so that the best choice is known.

This file is copied into a user's folder and named in commands, as ``data._target_=planted_network.images`` and so on.

Four classes, two halves of them, and as many blocks. Each image shows its class, whether it is hard, and which block it
needs. An easy image is right without any block. A hard one is taken for the other class of its half, unless the one
block that it needs is kept: images of the first half need one of the first two blocks, the others one of the last two.
No block does any harm. Keeping the two blocks of an image's half is therefore as right as the whole network, for half of
its cost; of the fixed choices of that cost, none is right on more than half of the hard images.

Shapes: N images, B images in a batch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from policyskip.agents.fixed import FixedAgent
from policyskip.backbones import Backbone, Block
from policyskip.data import Data, from_arrays
from policyskip.policies.base import Policy
from policyskip.policies.fixed import image_hashes

CLASSES, BLOCKS = 4, 4
HARD, NEEDS = CLASSES, CLASSES + 1
"""Places in an image: four pixels say the class, one whether it is hard, four which block it needs; the rest is noise."""


def images(device: torch.device, count: int = 1000, hard: float = 0.2, seed: int = 0) -> Data:
    """Draw data whose splits have ``count`` images each."""

    def split(number: int) -> tuple[np.ndarray, np.ndarray]:
        generator = np.random.default_rng((seed, number))
        label_N = generator.integers(0, CLASSES, count)
        pixel_NP = generator.integers(0, 256, (count, 64), dtype=np.uint8)
        pixel_NP[:, : NEEDS + BLOCKS] = 0
        rows = np.arange(count)
        pixel_NP[rows, label_N] = 255
        is_hard_N = generator.random(count) < hard
        pixel_NP[is_hard_N, HARD] = 255
        needs_N = 2 * (label_N // 2) + generator.integers(0, 2, count)
        pixel_NP[rows[is_hard_N], NEEDS + needs_N[is_hard_N]] = 255
        return pixel_NP.reshape(count, 8, 8), label_N

    return from_arrays(*split(0), validation=split(1), test=split(2), classes=CLASSES, name="planted", device=device)


class Shown(nn.Module):
    """The stem, which costs nothing: what an image shows, and one more number for each class, what it is taken for."""

    def forward(self, pixels: Tensor) -> Tensor:
        shown_BP = pixels[:, 0].flatten(1)[:, : NEEDS + BLOCKS]
        label_BC, hard_B1 = shown_BP[:, :CLASSES], shown_BP[:, HARD, None]
        other_BC = label_BC.view(-1, CLASSES // 2, 2).flip(2).flatten(1)
        taken_for_BC = (1 - hard_B1) * label_BC + 0.5 * hard_B1 * other_BC
        return torch.cat([shown_BP, taken_for_BC], 1)[:, :, None, None]


class PlantedNetwork(Backbone):
    """A hidden unit of block k says "this class, and needs block k", and adds 1 to what the image is taken for."""

    def __init__(self) -> None:
        width, place = NEEDS + BLOCKS + CLASSES, NEEDS + BLOCKS
        head = nn.Linear(width, CLASSES, bias=False)
        layers = [(nn.Conv2d(width, CLASSES, 1), nn.Conv2d(CLASSES, width, 1, bias=False)) for _ in range(BLOCKS)]
        for parameter in [*head.parameters(), *(p for pair in layers for module in pair for p in module.parameters())]:
            nn.init.zeros_(parameter)
        with torch.no_grad():
            for label in range(CLASSES):
                head.weight[label, place + label] = 1.0
                for k, (reads, writes) in enumerate(layers):
                    reads.weight[label, [label, NEEDS + k]] = torch.ones(2, 1, 1)
                    reads.bias[label] = -1.0
                    writes.weight[place + label, label] = 1.0
        blocks = [Block(nn.Sequential(reads, nn.ReLU(), writes), nn.Identity()) for reads, writes in layers]
        end = nn.Sequential(nn.Flatten(), head)
        super().__init__(Shown(), blocks, end, CLASSES, mean=[0.0] * 3, std=[1.0] * 3, stages=[2, 2])


class Planted(Policy):
    """A policy of one of four kinds.

    Args:
        kind: "halves" keeps the two blocks that an image's half may need; "one set" the first two blocks for all;
            "two sets" deals the first two and the last two, without a look at what the image shows; "more for some"
            keeps all blocks or none, likewise.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def decide(self, images: Tensor) -> Tensor:
        first_B = (images[:, 0].flatten(1)[:, :2] > 0).any(1)
        if self.kind == "one set":
            first_B = torch.ones_like(first_B)
        elif self.kind != "halves":
            first_B = image_hashes(images, 1, seed=0)[:, 0] > 0
        last_B = first_B if self.kind == "more for some" else ~first_B
        return torch.stack([first_B, first_B, last_B, last_B], 1)


def agent(env: object, kind: str) -> FixedAgent:
    """Make the agent whose policy is of this kind; deciding costs nothing."""
    return FixedAgent(kind, Planted(kind))
