"""Images and labels: uint8 on the device, seeded splits, augmentation in batches.

Small sets live on the device as one tensor (``TensorImages``); large ones are read from files as
they are needed (``FileImages``). Both give the same two things: a stream of batches and a length.
Every batch follows from (seed, batch number) alone, so a run can go on anywhere in the stream.

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
"""Validation images are the same in every run, whatever its seed: weights and thresholds were chosen on them."""
IN_MEMORY_BYTES = 2**30
"""Image folders up to this size, decoded, are held in memory."""


Order = Literal["shuffled", "sequential"]
WHOLE = slice(None)


@dataclass(frozen=True)
class Batch:
    """Images uint8 (B, 3, H, W), labels int64 (B,), and their places in the set, int64 (B,) on the CPU."""

    images: Tensor
    label_B: Tensor
    index_B: Tensor

    def __len__(self) -> int:
        return len(self.label_B)

    def empty(self) -> Batch:
        """A batch like this one, with no images in it."""
        return Batch(self.images[:0], self.label_B[:0], self.index_B[:0])


class Images(Protocol):
    """A set of labelled images that can be streamed."""

    difficulty: Tensor | None
    label_N: Tensor

    def __len__(self) -> int: ...

    def stream(self, orders: Iterable[tuple[Tensor, int]], part: slice = WHOLE) -> Iterator[Batch]:
        """A batch for each (index int64 (B,), augmentation seed), or that part of it."""
        ...

    def plain(self) -> Images:
        """The same set without augmentation."""
        ...

    def fingerprint(self) -> str:
        """Hash of what is in the set."""
        ...


@dataclass(frozen=True)
class Data:
    """Three splits of one data set. ``image_shape`` is (3, H, W)."""

    name: str
    train: Images
    validation: Images
    test: Images
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]

    def split(self, name: str) -> Images:
        """The split of that name: train, validation or test."""
        if name not in ("train", "validation", "test"):
            raise UserError(f"split must be train, validation or test, got {name!r}")
        split: Images = getattr(self, name)
        return split


def shuffled(length: int, batch_size: int, seed: int, start: int = 0) -> Iterator[tuple[Tensor, int]]:
    """Endless batches of indices: one random order of the set after another, from batch number ``start`` on."""
    number, epoch, order = start, -1, torch.empty(0, dtype=torch.int64)
    while True:
        position, parts, needed = number * batch_size, [], batch_size
        while needed:
            if position // length != epoch:
                epoch = position // length
                order = torch.randperm(length, generator=torch.Generator().manual_seed(mix(seed, epoch)))
            part = order[position % length :][:needed]
            parts.append(part)
            position += len(part)
            needed -= len(part)
        yield torch.cat(parts), mix(seed, -1 - number)
        number += 1


def sequential(length: int, batch_size: int, start: int = 0) -> Iterator[tuple[Tensor, int]]:
    """Each index once, in order; the last batch may be short."""
    for low in range(start * batch_size, length, batch_size):
        yield torch.arange(low, min(low + batch_size, length)), 0


def spread_index(length: int, limit: int) -> Tensor:
    """Return at most ``limit`` indices spread evenly over a set, int64 (M,), because folders are sorted by class."""
    return torch.linspace(0, length - 1, min(length, limit)).round().long()


def mix(*numbers: int) -> int:
    """A 63-bit seed that depends on every number."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little") >> 1


class Feed:
    """Batches of a set, one at a time. ``cursor``, the number of the batch shown, is all the state there is.

    Args:
        order: "shuffled" goes on without end; "sequential" shows each image once, with a short last batch and then
            an empty one.
    """

    def __init__(self, images: Images, batch_size: int, order: Order = "shuffled", seed: int = 0) -> None:
        if batch_size < 1:
            raise UserError(f"a batch must hold at least 1 image, got {batch_size}")
        if order not in ("shuffled", "sequential"):
            raise UserError(f"order must be shuffled or sequential, got {order!r}")
        self.images, self.batch_size, self.order, self.seed = images, batch_size, order, seed
        self.part = WHOLE
        self.seek(0)

    def divide(self) -> None:
        """From now on show this process's part of each batch; the parts of all, side by side, are the batch."""
        size = processes.per_process_batch_size(self.batch_size)
        self.part = slice(processes.rank() * size, (processes.rank() + 1) * size)
        self.seek(self.cursor)

    def seek(self, cursor: int, seed: int | None = None) -> None:
        """Show batch number ``cursor`` of the order (of that seed)."""
        self.seed = self.seed if seed is None else seed
        self.cursor = cursor
        if self.order == "shuffled":
            orders = shuffled(len(self.images), self.batch_size, self.seed, cursor)
        else:
            orders = sequential(len(self.images), self.batch_size, cursor)
        self._stream = self.images.stream(orders, self.part)
        self.batch = next(self._stream)

    def advance(self) -> Batch:
        """Show the next batch and return it; an empty one after the last of a sequential order."""
        self.cursor += 1
        self.batch = next(self._stream, self.batch.empty())
        return self.batch


Augment = Callable[[Tensor, torch.Generator], Tensor]


def crop_and_flip(images: Tensor, generator: torch.Generator, pad: int = 4) -> Tensor:
    """Random crops of zero-padded images and random mirror images, each image its own; uint8 in, uint8 out."""
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
    """A set that lives on the device: images uint8 (N, 3, H, W), labels int64 (N,)."""

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
        self.recipe = recipe  # of rendered images, whose last bit may differ between machines

    def __len__(self) -> int:
        return len(self.label_N)

    def stream(self, orders: Iterable[tuple[Tensor, int]], part: slice = WHOLE) -> Iterator[Batch]:
        for index_B, seed in orders:
            on_device = index_B.to(self.images.device)
            images = self.images[on_device]
            if self.augment is not None:
                images = self.augment(images, torch.Generator().manual_seed(seed))
            yield Batch(images[part], self.label_N[on_device[part]], index_B[part])

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


def hold_out(count: int, share: float) -> tuple[Tensor, Tensor]:
    """Indices (validation, training), the same on every call; ``share`` of them is held out, at least one each."""
    if not 0 < share < 1:
        raise UserError(f"data.validation must be a share between 0 and 1, got {share}")
    if count < 2:
        raise UserError(f"the training split needs at least 2 images, one of them for validation; it has {count}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED))
    cut = min(max(1, round(count * share)), count - 1)
    return order[:cut].sort().values, order[cut:].sort().values
