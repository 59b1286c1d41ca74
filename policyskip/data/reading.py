"""Sets that are too large for memory: images are decoded when they are needed, by worker processes, batch by batch.

Shapes: N images in a set, B images in a batch, H W pixels.
"""

from __future__ import annotations

import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from policyskip.data.base import SMALLEST_SIDE, WHOLE, Batch
from policyskip.errors import UserError, in_one_line

LARGEST_SIDE = 2**13
"""The largest height and width that images may be scaled to, in pixels."""
MOST_WORKERS = 512
"""The most processes that ``data.workers`` may ask for; of these, four a CPU are used at most."""


class ReadImages(ABC):
    """A set whose images ``workers`` processes read when they are needed; a subclass says how one is read.

    Args:
        label_N: int64 (N,).
        workers: 0 reads the images in this process.
    """

    def __init__(self, label_N: Tensor, device: torch.device, workers: int) -> None:
        self.label_N = label_N
        self.device = device
        self.workers = workers
        self.difficulty: Tensor | None = None

    @abstractmethod
    def read(self, index: int, seed: int) -> np.ndarray:
        """Read an image, uint8 (H, W, 3), augmented by this seed if the set is augmented.

        Raises:
            UserError: the image cannot be read.
        """

    def __len__(self) -> int:
        return len(self.label_N)

    def __getitem__(self, item: tuple[int, int]) -> tuple[np.ndarray, int]:
        return self.read(*item), item[0]

    def stream(self, orders: Iterable[tuple[Tensor, int]], rows: slice = WHOLE) -> Iterator[Batch]:
        """Yield a batch for each pair of indices, int64 (B,), and augmentation seed; worker processes read the images.

        Raises:
            UserError: an image cannot be read, or a worker process was killed.
        """
        batches = ([(int(i), seed) for i in index_B[rows]] for index_B, seed in orders)
        try:
            for images, index_B in _begun(lambda workers: _loader(self, batches, workers), self.workers):
                pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(self.device)
                yield Batch(pixels.contiguous(), self.label_N[index_B].to(self.device), index_B)
        except UserError as error:  # raised in a worker, whose traceback is put in front of the message
            raise UserError(str(error).strip().splitlines()[-1].removeprefix("policyskip.errors.UserError: ")) from None
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise UserError(
                "a process that decodes images was killed, perhaps for want of memory; data.workers=0 decodes in the "
                f"main process ({in_one_line(error)})"
            ) from None


def _loader(images: ReadImages, batches: Iterable[list[tuple[int, int]]], workers: int) -> Iterator[Any]:
    """Begin to read batches."""
    loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
        images,  # type: ignore[arg-type]
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_stacked,
        generator=torch.Generator(),  # by default it would draw from the global one
    )
    return iter(loader)


def _begun(begin: Callable[[int], Iterator[Any]], workers: int) -> Iterator[Any]:
    """Begin to read with worker processes, or without them where the system gives none."""
    if not workers:
        return begin(0)
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGCHLD) if in_main_thread and hasattr(signal, "SIGCHLD") else None
    try:
        return begin(workers)
    except OSError as error:  # no room in /dev/shm, no more processes or open files
        print(f"warning: no processes to decode images ({in_one_line(error)}); the main one does", flush=True)
        return begin(0)
    finally:
        if handler is not None:  # torch's own raises wherever the program is; a killed worker is found by waiting, too
            signal.signal(signal.SIGCHLD, handler)


def _stacked(items: list[tuple[np.ndarray, int]]) -> tuple[np.ndarray, Tensor]:
    """Stack images and indices; the images as an array, because tensors would need room in /dev/shm."""
    images, indices = zip(*items, strict=True)
    return np.stack(images), torch.tensor(indices)


def check_workers(workers: Any) -> int:
    """Return the number of processes to use: what is asked for, but four a CPU at most, with a warning.

    Raises:
        UserError: it is no whole number from 0 to ``MOST_WORKERS``.
    """
    if type(workers) is not int or not 0 <= workers <= MOST_WORKERS:
        raise UserError(f"data.workers must be a whole number from 0 to {MOST_WORKERS}, got {workers!r:.80}")
    cpus = os.cpu_count() or 1
    if workers > 4 * cpus:
        print(
            f"warning: data.workers={workers} is more than four a CPU; {4 * cpus} processes decode images", flush=True
        )
    return min(workers, 4 * cpus)


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
    """Scale an image in RGB to uint8 (size, size, 3).

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
