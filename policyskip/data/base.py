"""Labelled images, which are uint8 on the device, split by a seed, and augmented batch by batch.

A small set is one tensor on the device (``TensorImages``); a large one is read from files as it is needed
(``FileImages``). Both keep the contract of ``Images``. A batch depends on the seed and the batch number alone, so that
a run can go on from any batch.

Shapes: N images in a set, B images in a batch, H W pixels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from policyskip.errors import UserError, check_choice
from policyskip.finite import whole_number
from policyskip.parallel import processes
from policyskip.parallel.devices import usual_defaults
from policyskip.runs.schemas import LONGEST_NAME
from policyskip.texts import a_type, one_line

SMALLEST_SIDE = 4
"""The least height and width of images, in pixels: crops of smaller ones would show little but padding."""
LARGEST_BATCH_BYTES = 2**32
"""The most bytes that the pixels of a batch may take; a network's features take many times as much."""
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
        group_N: int64 (N,) on the CPU; images of one number belong together, such as photographs of one object, and
            intervals draw them together. None: every image is its own group.
        label_N: int64 (N,).
    """

    difficulty: Tensor | None
    group_N: Tensor | None
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


_IMAGES = ("stream", "plain", "fingerprint", "label_N", "__len__")
"""What every set of images has."""


def check_images(images: Any, name: str = "images") -> None:
    """Refuse what is no set of images, such as an array, a torch ``Dataset`` or a ``Data``, or a set without an image.

    Raises:
        UserError: saying what was given, and what makes a set of it.
    """
    if isinstance(images, Data):
        raise UserError(f"{name} must be one split of the data, such as data.train, got all of the data")
    if isinstance(images, type) or not all(hasattr(images, attribute) for attribute in _IMAGES):
        way = "from_arrays(images, labels)" if _shape(images) else "from_dataset(dataset)"
        found = described(images)
        raise UserError(f"{name} must be a policyskip.data.Images (policyskip.data.{way}.train is one), got {found}")
    if len(images) < 1:
        raise UserError(f"{name} must hold at least one image, got none")


def check_types(**arguments: tuple[Any, Any]) -> None:
    """Refuse (UserError) an argument, by its name, whose value is not of its type."""
    for name, (value, kind) in arguments.items():
        if not isinstance(value, kind):
            raise UserError(f"{name} must be of type {getattr(kind, '__name__', kind)}, got {described(value)}")


def described(value: Any) -> str:
    """Describe a value in a few words: the type and shape of an array, the type and length of a collection, ….

    Returns: one line that is safe to print.
    """
    kind = a_type(value)
    if value is None or isinstance(value, bool | int | float | str | Path):
        return one_line(repr(value), 80)
    if shape := _shape(value):
        dtype = str(getattr(value, "dtype", "")).removeprefix("torch.")
        return one_line(" ".join(filter(None, [f"{kind} of", dtype, shape])), 120)
    try:
        return one_line(f"{kind} of length {len(value)}", 120)
    except Exception:  # a stranger's __len__ may raise anything
        return one_line(kind, 120)


def _shape(value: Any) -> str:
    """Return the shape of an array as text; nothing for other values."""
    try:
        return str(tuple(value.shape))
    except Exception:  # a nested tensor raises a RuntimeError, and a stranger's class can have anything
        return "unknown shape" if isinstance(value, Tensor) else ""


def _is_name(value: Any) -> bool:
    """Return whether a value can be the name of a class, as the files of a run hold it."""
    return isinstance(value, str) and 0 < len(value) <= LONGEST_NAME


@usual_defaults()
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
    """Holds the three splits of a data set, its class names, and ``image_shape``, which is (3, H, W).

    Raises:
        UserError: a split is no set of images or empty, or the images are smaller than the networks can take.
    """

    name: str
    train: Images
    validation: Images
    test: Images
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]

    def __post_init__(self) -> None:
        for name in ("train", "validation", "test"):
            check_images(getattr(self, name), name)
        if isinstance(self.classes, str) or not all(map(_is_name, self.classes)):
            found, allowed = one_line(repr(self.classes), 80), f"1 to {LONGEST_NAME} letters each"
            raise UserError(f"classes must be names, such as ('cat', 'dog'), {allowed}, got {found}")
        shape, least = tuple(self.image_shape), SMALLEST_SIDE
        if len(shape) != 3 or shape[0] != 3 or min(shape[1:]) < least:
            found = f"{shape[2]}×{shape[1]} pixels" if len(shape) == 3 and shape[0] == 3 else f"the shape {shape}"
            raise UserError(
                f"the images of {one_line(self.name, 80)} have {found}; they must be (3, H, W), of at least "
                f"{least}×{least} pixels"
            )

    def check_batch(self, batch_size: int) -> None:
        """Refuse a batch that takes more memory than any machine has for it.

        Raises:
            UserError: its images take more than ``LARGEST_BATCH_BYTES``.
        """
        needed = batch_size * math.prod(self.image_shape)
        if needed > LARGEST_BATCH_BYTES:
            side = f"{self.image_shape[1]}×{self.image_shape[2]}"
            raise UserError(
                f"data.batch_size={batch_size} images of {side} pixels are {needed / 1e9:,.1f} GB, more than the "
                f"{LARGEST_BATCH_BYTES / 1e9:.1f} GB that a batch may take; a smaller data.batch_size, or "
                "data.image_size for a folder of images, helps"
            )

    def split(self, name: str) -> Images:
        """Return the split of that name: train, validation or test.

        Raises:
            UserError: another name.
        """
        check_choice("split", name, ("train", "validation", "test"))
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
        check_choice("order", order, ("shuffled", "sequential"))
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
        """Show batch number ``cursor``, in the order of ``seed``, or in the present order if that is None; behind the
        last batch of a sequential order, an empty one.

        Raises:
            UserError: ``cursor`` or ``seed`` is no whole number, or negative.
        """
        cursor = whole_number("cursor", cursor, 0)
        self.seed = self.seed if seed is None else whole_number("seed", seed, 0)
        self.cursor = cursor
        self._stream = self._from(cursor)
        batch = next(self._stream, None)
        self.batch = batch_at(self.images, torch.tensor([0])).empty() if batch is None else batch

    def _from(self, cursor: int) -> Iterator[Batch]:
        """Yield the batches from number ``cursor`` on."""
        if self.order == "shuffled":
            orders = shuffled(len(self.images), self.batch_size, self.seed, cursor)
        else:
            orders = sequential(len(self.images), self.batch_size, cursor)
        return self.images.stream(orders, self._rows)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy is made of, which is all but the stream: it follows from the cursor."""
        return {key: value for key, value in self.__dict__.items() if key != "_stream"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._stream = self._from(self.cursor + 1)

    def advance(self) -> Batch:
        """Show the next batch and return it; after the last batch of a sequential order, an empty one."""
        self.cursor += 1
        self.batch = next(self._stream, self.batch.empty())
        return self.batch
