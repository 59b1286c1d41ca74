"""The outputs of every exit of a frozen network are computed once for a set of images, and kept.

Thresholds are fitted to these outputs, policies are judged on them, and the exit environment replays them.

Shapes: M images of a set, N exits, C classes, P policies.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from policyskip.backbones.base import evaluation_mode
from policyskip.backbones.exits import ExitCosts, ExitNetwork, count_exit_costs
from policyskip.data import Images, batch_at, sequential
from policyskip.errors import UserError
from policyskip.execution.exits import ExitExecution
from policyskip.execution.ways import DEFAULT, How
from policyskip.memory import BatchSplitter
from policyskip.runs.progress import waiting

PIXELS_AT_ONCE = 2**20
"""Pixels of the images that are classified at once, so that they fit into memory."""


@dataclass(frozen=True)
class CachedExits:
    """Holds the outputs of every exit, image by image, in the order of the set.

    Attributes:
        logits_MNC: float32 (M, N, C).
        label_M: int64 (M,).
        costs: MACs of every exit for one image.
    """

    logits_MNC: Tensor
    label_M: Tensor
    costs: ExitCosts

    def __len__(self) -> int:
        return len(self.label_M)

    @property
    def num_exits(self) -> int:
        """Return N, the number of exits."""
        return self.logits_MNC.shape[1]

    @property
    def num_classes(self) -> int:
        """Return C, the number of classes."""
        return self.logits_MNC.shape[2]

    @cached_property
    def probability_MNC(self) -> Tensor:
        """Return the softmax of the logits, float32 (M, N, C)."""
        return self.logits_MNC.softmax(-1)

    @cached_property
    def correct_MN(self) -> Tensor:
        """Return whether each exit's top class is the label, bool (M, N)."""
        return self.logits_MNC.argmax(-1) == self.label_M.unsqueeze(1)

    @cached_property
    def macs_N(self) -> Tensor:
        """Return the MACs of leaving at each exit, float64 (N,), with every head on the way."""
        return self.costs.cumulative_N.to(self.label_M.device)

    def fingerprint(self) -> str:
        """Return a hash of the cache's content, as text."""
        digest = hashlib.sha256(self.logits_MNC.cpu().contiguous().numpy().tobytes())
        digest.update(self.label_M.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def judge(self, exit_M: Tensor) -> tuple[Tensor, Tensor]:
        """Compute accuracy and mean MACs per image.

        Args:
            exit_M: the exits at which the images leave, int64 (M,), or (P, M) for P policies.

        Returns: two float64 tensors, without a dimension or (P,).
        """
        exit_PM = exit_M.reshape(-1, len(self))
        correct_PM = self.correct_MN.T.gather(0, exit_PM)
        shape = exit_M.shape[:-1]
        return correct_PM.double().mean(1).view(shape), self.macs_N[exit_PM].mean(1).view(shape)


@torch.no_grad()
def cache_exits(network: ExitNetwork, images: Images, how: How = DEFAULT) -> CachedExits:
    """Run each of ``images`` through every exit of ``network`` once, in evaluation mode.

    Args:
        how: in which way and precision the network is executed.

    Raises:
        UserError: there are no images, or they are augmented at random, so that an image has no one output to keep, or
            the network cannot be executed so.
    """
    if getattr(images, "augment", None):
        raise UserError(
            "images that are augmented at random cannot be cached; say env.cached=false or data.augment=false"
        )
    if not len(images):
        raise UserError("there are no images to cache")
    _, channels, height, width = batch_at(images, torch.tensor([0])).images.shape
    batches = images.stream(sequential(len(images), max(1, PIXELS_AT_ONCE // (height * width))))
    logits, labels = [], []
    execution, splitter = ExitExecution(network, (channels, height, width), *how, as_it_is=True), BatchSplitter()

    def every_exit(rows: slice) -> Tensor:
        return execution.every_exit(batch.images[rows]).float()

    with evaluation_mode(network), waiting("computing the outputs of every exit", len(images)) as wait:
        for batch in batches:
            logits += splitter(every_exit, len(batch), len(batch))
            labels.append(batch.label_B)
            wait.advance(len(batch))
    return CachedExits(torch.cat(logits), torch.cat(labels), count_exit_costs(network, (channels, height, width)))
