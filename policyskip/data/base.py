"""Labelled images, which are uint8 on the device, split by a seed, and augmented batch by batch.

A small set is one tensor on the device (``TensorImages``); a large one is read from files as it is needed
(``FileImages``). Both keep the contract of ``Images``. A batch depends on the seed and the batch number alone, so that
a run can go on from any batch.

Shapes: N images in a set, B images in a batch, H W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from policyskip.errors import UserError
from policyskip.parallel import processes

SPLIT_SEED = 0
"""Decides which images are held out for validation. It is the same in every run, whatever the run's seed, because
weights and thresholds were chosen on these images."""
IN_MEMORY_BYTES = 2**30
"""Image folders whose decoded images take at most this many bytes are held in memory."""


Order = Literal["shuffled", "sequential"]
WHOLE = slice(None)
"""All rows of a batch."""


@dataclass(frozen=True)
class Batch:
    """Holds images uint8 (B, 3, H, W), labels int64 (B,), and the images' indices in the set, int64 (B,) on the CPU."""

    images: Tensor
    label_B: Tensor
    index_B: Tensor

    def __len__(self) -> int:
        return len(self.label_B)

    def empty(self) -> Batch:
        """Make a batch with the shapes and devices of this one, and with no images in it."""
        return Batch(self.images[:0], self.label_B[:0], self.index_B[:0])


class Images(Protocol):
    """A set of N labelled images that is read batch by batch.

    Attributes:
        difficulty: float32 (N,) on the CPU, from 0 (easy) to 1, or None where it is not known.
        label_N: int64 (N,).
    """

    difficulty: Tensor | None
    label_N: Tensor

    def __len__(self) -> int: ...

    def stream(self, orders: Iterable[tuple[Tensor, int]], rows: slice = WHOLE) -> Iterator[Batch]:
        """Yield a batch for each pair of indices, int64 (B,), and augmentation seed.

        Args:
            rows: the rows of each batch to yield; augmentation is drawn for the whole batch all the same.
        """
        ...

    def plain(self) -> Images:
        """Return this set without augmentation."""
        ...

    def fingerprint(self) -> str:
        """Return a hash of the set's content, as text."""
        ...


def batch_at(images: Images, index_B: Tensor) -> Batch:
    """Read the images with these indices, int64 (B,) on the CPU, as one batch; a random augmentation uses seed 0."""
    return next(iter(images.stream([(index_B, 0)])))


def spread_indices(count: int, size: int) -> Tensor:
    """Choose ``count`` indices, int64, spread evenly over a set of ``size`` images, or all if the set is smaller.

    The first ``count`` images would not do: folders are sorted by class.

    Returns: int64 (min(count, size),), ascending.
    """
    return torch.linspace(0, size - 1, min(count, size)).round().long()


@dataclass(frozen=True)
class Data:
    """Holds the three splits of a data set, its class names, and ``image_shape``, which is (3, H, W)."""

    name: str
    train: Images
    validation: Images
    test: Images
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]

    def split(self, name: str) -> Images:
        """Return the split of that name: train, validation or test.

        Raises:
            UserError: another name.
        """
        if name not in ("train", "validation", "test"):
            raise UserError(f"split must be train, validation or test, got {name!r}")
        split: Images = getattr(self, name)
        return split


def shuffled(length: int, batch_size: int, seed: int, first_batch: int = 0) -> Iterator[tuple[Tensor, int]]:
    """Yield batches of indices, int64 (B,), and their augmentation seeds, from batch number ``first_batch`` on and
    without end: one random order of the set after another."""
    number, epoch, order = first_batch, -1, torch.empty(0, dtype=torch.int64)
    while True:
        position, pieces, needed = number * batch_size, [], batch_size
        while needed:
            if position // length != epoch:
                epoch = position // length
                order = torch.randperm(length, generator=torch.Generator().manual_seed(mix(seed, epoch)))
            piece = order[position % length :][:needed]
            pieces.append(piece)
            position += len(piece)
            needed -= len(piece)
        yield torch.cat(pieces), mix(seed, -1 - number)
        number += 1


def sequential(length: int, batch_size: int, first_batch: int = 0) -> Iterator[tuple[Tensor, int]]:
    """Yield batches of indices, int64 (B,), in order, each index once, from batch number ``first_batch`` on; the
    augmentation seed is 0, and the last batch may be short."""
    for low in range(first_batch * batch_size, length, batch_size):
        yield torch.arange(low, min(low + batch_size, length)), 0


def mix(*numbers: int) -> int:
    """Mix numbers into one seed of 63 bits that depends on each of them."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little") >> 1


class Feed:
    """Shows the batches of a set one at a time. ``cursor``, the number of the batch shown, is its whole state.

    Args:
        order: "shuffled" goes on without end; "sequential" shows each image once, with a short last batch and then
            an empty one.
        seed: decides the shuffled order.

    Attributes:
        batch: the batch shown.

    Raises:
        UserError: ``batch_size`` is below 1, or there is no such order.
    """

    def __init__(self, images: Images, batch_size: int, order: Order = "shuffled", seed: int = 0) -> None:
        if batch_size < 1:
            raise UserError(f"a batch must hold at least 1 image, got {batch_size}")
        if order not in ("shuffled", "sequential"):
            raise UserError(f"order must be shuffled or sequential, got {order!r}")
        self.images, self.batch_size, self.order, self.seed = images, batch_size, order, seed
        self._rows = WHOLE
        self.seek(0)

    def divide(self) -> None:
        """Show only this process's slice of each batch from now on; the slices of all processes make up the batch.

        Raises:
            UserError: the batch cannot be divided evenly among the processes.
        """
        size = processes.per_process_batch_size(self.batch_size)
        self._rows = slice(processes.rank() * size, (processes.rank() + 1) * size)
        self.seek(self.cursor)

    def seek(self, cursor: int, seed: int | None = None) -> None:
        """Show batch number ``cursor``, in the order of ``seed``, or in the present order if that is None."""
        self.seed = self.seed if seed is None else seed
        self.cursor = cursor
        if self.order == "shuffled":
            orders = shuffled(len(self.images), self.batch_size, self.seed, cursor)
        else:
            orders = sequential(len(self.images), self.batch_size, cursor)
        self._stream = self.images.stream(orders, self._rows)
        self.batch = next(self._stream)

    def advance(self) -> Batch:
        """Show the next batch and return it; after the last batch of a sequential order, an empty one."""
        self.cursor += 1
        self.batch = next(self._stream, self.batch.empty())
        return self.batch


Augment = Callable[[Tensor, torch.Generator], Tensor]
"""Augmentation of a batch: images uint8 (B, 3, H, W) to images of the same shape and dtype."""


def crop_and_flip(images: Tensor, generator: torch.Generator, pad: int = 4) -> Tensor:
    """Crop zero-padded images, uint8 (B, 3, H, W), at random and mirror half of them, independently for each image."""
    B, _, H, W = images.shape
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
    dy, dx = torch.randint(0, 2 * pad + 1, (2, B, 1), generator=generator)
    columns = torch.arange(W).expand(B, W)
    flip = torch.rand(B, 1, generator=generator) < 0.5
    columns = torch.where(flip, columns.flip(1), columns) + dx
    rows = torch.arange(H) + dy
    device = images.device
    batch = torch.arange(B, device=device).view(B, 1, 1)
    return padded.permute(0, 2, 3, 1)[batch, rows.to(device)[:, :, None], columns.to(device)[:, None, :]].permute(
        0, 3, 1, 2
    )


class TensorImages:
    """A set that is held on the device.

    Args:
        images: uint8 (N, 3, H, W).
        label_N: int64 (N,).
        difficulty: float32 (N,) on the CPU, or None.
        augment: applied to each batch; None leaves the images as they are.
        recipe: a text that says from what the images were rendered. The fingerprint is computed from the recipe instead
            of the pixels, because the last bit of a pixel may differ between machines. If it is
            None, the fingerprint is computed from the pixels.
    """

    def __init__(
        self,
        images: Tensor,
        label_N: Tensor,
        difficulty: Tensor | None = None,
        augment: Augment | None = None,
        recipe: str | None = None,
    ) -> None:
        self.images = images
        self.label_N = label_N
        self.difficulty = difficulty
        self.augment = augment
        self.recipe = recipe

    def __len__(self) -> int:
        return len(self.label_N)

    def stream(self, orders: Iterable[tuple[Tensor, int]], rows: slice = WHOLE) -> Iterator[Batch]:
        for index_B, seed in orders:
            on_device = index_B.to(self.images.device)
            images = self.images[on_device]
            if self.augment is not None:
                images = self.augment(images, torch.Generator().manual_seed(seed))
            yield Batch(images[rows], self.label_N[on_device[rows]], index_B[rows])

    def plain(self) -> TensorImages:
        return TensorImages(self.images, self.label_N, self.difficulty, recipe=self.recipe)

    def fingerprint(self) -> str:
        content = self.recipe.encode() if self.recipe else self.images.cpu().contiguous().numpy().tobytes()
        digest = hashlib.sha256(content)
        digest.update(self.label_N.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def in_memory(
    name: str,
    train_images: Tensor,
    train_labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    classes: tuple[str, ...],
    validation: float,
    augment: Augment | None,
    device: torch.device,
) -> Data:
    """Make a data set of images held on the device, with ``validation`` of the training images held out.

    Args:
        train_images, test_images: uint8 (N, 3, H, W).
        train_labels, test_labels: integers (N,).
        validation: share of the training images, between 0 and 1.
        augment: applied to training batches.

    Raises:
        UserError: ``validation`` is not between 0 and 1, or there is only one training image.
    """
    held_out, kept = hold_out(len(train_labels), validation)
    images, labels = train_images.to(device), train_labels.long().to(device)
    return Data(
        name,
        train=TensorImages(images[kept.to(device)], labels[kept.to(device)], augment=augment),
        validation=TensorImages(images[held_out.to(device)], labels[held_out.to(device)]),
        test=TensorImages(test_images.to(device), test_labels.long().to(device)),
        classes=classes,
        image_shape=(3, *train_images.shape[2:]),
    )


def hold_out(count: int, fraction: float) -> tuple[Tensor, Tensor]:
    """Divide ``count`` images into validation images, ``fraction`` of them and at least one, and training images.

    Returns: the indices of the validation and of the training images, int64, ascending, the same on every call.

    Raises:
        UserError: ``fraction`` is not between 0 and 1, or there are fewer than two images.
    """
    if not 0 < fraction < 1:
        raise UserError(f"data.validation must be a share between 0 and 1, got {fraction}")
    if count < 2:
        raise UserError(f"the training split needs at least 2 images, one of them for validation; it has {count}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED))
    cut = min(max(1, round(count * fraction)), count - 1)
    return order[:cut].sort().values, order[cut:].sort().values
