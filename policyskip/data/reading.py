"""Sets that are too large for memory: images are decoded when they are needed, by worker processes, batch by batch.

Shapes: N images in a set, B images in a batch, H W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from policyskip.data.base import SMALLEST_SIDE, WHOLE, Batch
from policyskip.data.workers import answers
from policyskip.errors import UserError
from policyskip.parallel.deferred import sent

LARGEST_SIDE = 2**13
"""The largest height and width that images may be scaled to, in pixels."""


class ReadImages(ABC):
    """A set whose images ``workers`` processes read when they are needed; a subclass says how one is read.

    Args:
        label_N: int64 (N,).
        group_N: int64 (N,), which images belong together; None: every image is its own group.
        workers: 0 reads the images in this process.
    """

    def __init__(self, label_N: Tensor, device: torch.device, workers: int, group_N: Tensor | None = None) -> None:
        self.label_N = label_N
        self.device = device
        self.workers = workers
        self.difficulty: Tensor | None = None
        self.group_N = group_N

    @abstractmethod
    def read(self, index: int, seed: int) -> np.ndarray:
        """Read an image, uint8 (H, W, 3), augmented by this seed if the set is augmented.

        Raises:
            UserError: the image cannot be read.
        """

    def __len__(self) -> int:
        return len(self.label_N)

    def stream(self, orders: Iterable[tuple[Tensor, int]], rows: slice = WHOLE) -> Iterator[Batch]:
        """Yield a batch for each pair of indices, int64 (B,), and augmentation seed; worker processes read the images.

        Raises:
            UserError: an image cannot be read, or a worker process was killed.
        """
        requests = ((index_B[rows].tolist(), seed) for index_B, seed in orders)
        for index_B, images in answers(self._read_batch, requests, self.workers):
            pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
            index = torch.tensor(index_B)
            yield Batch(sent(pixels, self.device), sent(self.label_N[index], self.device), index)

    def _read_batch(self, request: tuple[list[int], int]) -> tuple[list[int], np.ndarray]:
        """Read the images of these indices to uint8 (B, H, W, 3), and return them behind the indices."""
        index_B, seed = request
        return index_B, np.stack([self.read(index, seed) for index in index_B])


def check_size(size: Any) -> int | None:
    """Return the height and width to scale images to; None leaves them as they are.

    Raises:
        UserError: it is neither None nor a whole number from ``SMALLEST_SIDE`` to ``LARGEST_SIDE``.
    """
    if size is not None and (type(size) is not int or not SMALLEST_SIDE <= size <= LARGEST_SIDE):
        allowed = f"a whole number from {SMALLEST_SIDE} to {LARGEST_SIDE}, or null for images as they are"
        raise UserError(f"data.image_size must be {allowed}; got {size!r:.80}")
    return size


def scaled(image: Image.Image, size: int, augment_seed: int | None = None) -> np.ndarray:
    """Return an image in RGB, scaled, as uint8 (size, size, 3).

    Args:
        augment_seed: None scales the short side to 256/224 of ``size`` and cuts out the centre (evaluation). Otherwise
            it draws a part of the image, which is scaled and perhaps mirrored (training).
    """
    from torchvision.transforms import v2

    if augment_seed is None:
        return np.array(v2.Compose([v2.Resize(size * 256 // 224), v2.CenterCrop(size)])(image))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(augment_seed)
        return np.array(v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()])(image))
