"""Small sets of images are held on the device as one tensor, and augmented there.

Shapes: N images in a set, B images in a batch, H W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor

from policyskip.data.base import WHOLE, Batch, Data, described
from policyskip.data.groups import check_groups, hold_out
from policyskip.errors import UserError
from policyskip.parallel.deferred import sent

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
    rows, columns = sent(rows, device), sent(columns, device)
    return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


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
        group_N: int64 (N,), which images belong together; None: every image is its own group.

    Raises:
        UserError: images, labels or groups are of another type or shape, or a label is negative.
    """

    def __init__(
        self,
        images: Tensor,
        label_N: Tensor,
        difficulty: Tensor | None = None,
        augment: Augment | None = None,
        recipe: str | None = None,
        group_N: Tensor | None = None,
    ) -> None:
        _check(images, label_N, difficulty, group_N)
        self.images = images
        self.label_N = label_N
        self.difficulty = difficulty
        self.augment = augment
        self.recipe = recipe
        self.group_N = None if group_N is None else group_N.cpu()

    def __len__(self) -> int:
        return len(self.label_N)

    def stream(self, orders: Iterable[tuple[Tensor, int]], rows: slice = WHOLE) -> Iterator[Batch]:
        for index_B, seed in orders:
            on_device = sent(index_B, self.images.device)
            images = self.images[on_device]
            if self.augment is not None:
                images = self.augment(images, torch.Generator().manual_seed(seed))
            yield Batch(images[rows], self.label_N[on_device[rows]], index_B[rows])

    def plain(self) -> TensorImages:
        return TensorImages(self.images, self.label_N, self.difficulty, recipe=self.recipe, group_N=self.group_N)

    def fingerprint(self) -> str:
        content = self.recipe.encode() if self.recipe else self.images.cpu().contiguous().numpy().tobytes()
        digest = hashlib.sha256(content)
        digest.update(self.label_N.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def _check(images: Tensor, label_N: Tensor, difficulty: Tensor | None, group_N: Tensor | None) -> None:
    """Refuse (UserError) what is no set of images uint8 (N, 3, H, W), labels int64 (N,), difficulties (N,) and groups
    int64 (N,)."""
    found = described(images)
    if is_dense(images) and images.is_floating_point():
        raise UserError(f"images must be uint8, 0 to 255, got {found}: {FROM_FLOATS}")
    if not is_dense(images) or images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
        other = "policyskip.data.from_arrays takes arrays of other layouts"
        raise UserError(f"images must be a tensor of uint8 (N, 3, H, W), got {found}; {other}")
    shape = f"({len(images)},)"
    if not is_dense(label_N) or label_N.dtype != torch.int64 or tuple(label_N.shape) != (len(images),):
        raise UserError(f"labels must be a tensor of int64 {shape}, one for each image, got {described(label_N)}")
    if len(label_N) and int(label_N.min()) < 0:
        raise UserError(f"labels must not be negative, got {int(label_N.min())}")
    if difficulty is not None and (not is_dense(difficulty) or tuple(difficulty.shape) != (len(images),)):
        raise UserError(f"difficulty must be a tensor of float32 {shape}, or None, got {described(difficulty)}")
    if group_N is not None:
        check_groups(group_N, len(images))


FROM_FLOATS = "for values from 0 to 1, give (255 * images).round() as uint8, and leave torchvision's ToTensor out"


def is_dense(value: Any) -> TypeGuard[Tensor]:
    """Return whether a value is a tensor that holds a number for each element: not sparse, nested or meta."""
    if not isinstance(value, Tensor) or value.is_nested or value.is_quantized:
        return False
    return value.layout == torch.strided and value.device.type != "meta"


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
