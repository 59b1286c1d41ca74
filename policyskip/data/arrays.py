"""Data sets of images that are in memory already, as arrays of NumPy, torch or others that NumPy can read.

Shapes: N images in a set, C classes, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from policyskip.data.base import Data, check_types, described
from policyskip.data.groups import divided, named_groups
from policyskip.data.tensors import FROM_FLOATS, TensorImages, crop_and_flip, is_dense
from policyskip.errors import UserError, check_choice, in_one_line
from policyskip.parallel.devices import find_device, usual_defaults
from policyskip.runs.schemas import MOST_CLASSES
from policyskip.texts import one_line

Channels = Literal["first", "last"]
LARGEST_ARRAYS = 2**33
"""The most bytes of a data set in memory, three channels to a pixel."""
LAYOUTS = "(N, H, W), (N, H, W, 3), (N, 3, H, W), (N, H, W, 1) or (N, 1, H, W)"


@usual_defaults()
def from_arrays(
    images: Any,
    labels: Any,
    *,
    validation: float | tuple[Any, Any] = 0.1,
    test: float | tuple[Any, Any] = 0.2,
    classes: Sequence[str] | int | None = None,
    name: str = "arrays",
    channels: Channels | None = None,
    augment: bool = False,
    groups: Any = None,
    device: torch.device | str = "cpu",
) -> Data:
    """Make a data set of images and labels in memory.

    Args:
        images: uint8 (N, H, W), (N, H, W, 3), (N, 3, H, W), (N, H, W, 1) or (N, 1, H, W), from 0 to 255.
        labels: whole numbers from 0 to C - 1, (N,) or (N, 1).
        validation: images to choose by: a pair of images and labels, or a share of the training images, which is held
            out, the same on every call.
        test: images to judge by, likewise; a share is held out before that for validation.
        classes: the names of the classes or their number; None counts the labels, each of which must occur.
        name: what runs call the data set.
        channels: where the channels are, "first" or "last", if the shape does not tell.
        augment: whether training images are cropped at random, padded by 4 pixels, and mirrored.
        groups: which images belong together, such as frames of one video: a name or number for each image, (N,), or a
            dictionary of such by split where validation or test are images of their own. They stay in one split, and
            intervals draw them together. None: every image is its own group.
        device: where the images are held.

    Raises:
        UserError: an argument is not as described above, images take too much memory, or there is no such device.
    """
    check_types(name=(name, str), augment=(augment, bool))
    where = find_device(str(device))
    given, shares = separate(validation, test)
    sets = {}
    for split, pair in {"train": (images, labels), **given}.items():
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise UserError(f"{split} must be a pair (images, labels) or a share, got {described(pair)}")
        sets[split] = _checked(pair[0], pair[1], channels, split)
    shape = tuple(sets["train"][0].shape[1:])
    for split, (pixels, _) in sets.items():
        if tuple(pixels.shape[1:]) != shape:
            raise UserError(f"{split} images are {tuple(pixels.shape[1:])}, training images {shape}: scale them alike")
    names = class_names(classes, [label_N for _, label_N in sets.values()])
    group_of = named_groups(groups, {split: len(label_N) for split, (_, label_N) in sets.items()})
    all_pixels, all_labels = sets["train"]
    all_groups = group_of.get("train")
    for split, index_N in divided(len(all_labels), shares, all_groups).items():
        sets[split] = all_pixels[index_N], all_labels[index_N]
        if all_groups is not None:
            group_of[split] = all_groups[index_N]
    splits = {
        split: TensorImages(
            pixels.to(where),
            label_N.to(where),
            augment=crop_and_flip if augment and split == "train" else None,
            group_N=group_of.get(split),
        )
        for split, (pixels, label_N) in sets.items()
    }
    return Data(name, **splits, classes=names, image_shape=(3, *shape[1:]))  # type: ignore[arg-type]


def separate(validation: Any, test: Any) -> tuple[dict[str, Any], dict[str, float]]:
    """Divide ``validation`` and ``test`` into splits that are given and shares that are to be held out.

    Raises:
        UserError: a share is not above 0 and below 1.
    """
    given: dict[str, Any] = {}
    shares: dict[str, float] = {}
    for split, value in (("test", test), ("validation", validation)):
        if not isinstance(value, Real):
            given[split] = value
            continue
        if not 0 < value < 1:  # type: ignore[operator]
            found = one_line(value, 40)
            raise UserError(f"{split} must be a share above 0 and below 1, or images of its own; got {found}")
        shares[split] = float(value)
    return given, shares


def class_names(classes: Sequence[str] | int | None, labels: Iterable[Tensor]) -> tuple[str, ...]:
    """Return the names of the classes, and check the labels of all splits against them.

    Args:
        classes: names or number; None counts the labels.

    Raises:
        UserError: there are fewer than two classes, a label is out of range, or None and a class has no image.
    """
    found = torch.cat([label_N.unique() for label_N in labels]).unique()
    least, most = int(found[0]), int(found[-1])
    if classes is None:
        if least != 0 or len(found) != most + 1:
            some = ", ".join(map(str, found[:5].tolist())) + (", …" if len(found) > 5 else "")
            raise UserError(
                f"labels must be 0, 1, 2, …, each with an image, got {some}, the largest {most}; renumber them, or say "
                "how many classes there are (classes=…)"
            )
        classes = most + 1
    if isinstance(classes, bool) or not isinstance(classes, int | Sequence) or isinstance(classes, str):
        raise UserError(f"classes must be names or a number, got {described(classes)}")
    if isinstance(classes, int):
        if not 0 < classes <= MOST_CLASSES:
            raise UserError(f"classes must be at most {MOST_CLASSES}, got {classes}")
        classes = [str(number) for number in range(classes)]
    names = tuple(classes)
    if not all(isinstance(name, str) for name in names) or len(set(names)) < max(2, len(names)):
        raise UserError(f"classes must be two or more, with names that differ, got {one_line(repr(names), 120)}")
    if least < 0 or most >= len(names):
        raise UserError(f"labels must be 0 to {len(names) - 1} for {len(names)} classes, got {least} to {most}")
    return names


def _checked(images: Any, labels: Any, channels: Channels | None, split: str) -> tuple[Tensor, Tensor]:
    """Convert images and labels of a split to uint8 (N, 3, H, W) and int64 (N,).

    Raises:
        UserError: they cannot be.
    """
    pixels = as_images(images, channels, f"{split} images")
    label_N = _as_labels(labels, f"{split} labels")
    if len(pixels) != len(label_N):
        raise UserError(f"there are {len(pixels)} {split} images and {len(label_N)} labels; there must be one for each")
    return pixels, label_N


def as_images(images: Any, channels: Channels | None = None, what: str = "images") -> Tensor:
    """Convert an array of images to uint8 (N, 3, H, W).

    Raises:
        UserError: the array is of another type or shape, its shape does not tell where the channels are, or it takes
            too much memory.
    """
    if channels is not None:
        check_choice("channels", channels, ("first", "last"))
    array = _as_tensor(images, what)
    if array.is_floating_point():
        raise UserError(f"{what} must be uint8, 0 to 255, got {described(images)}: {FROM_FLOATS}")
    if array.dtype != torch.uint8:
        raise UserError(f"{what} must be uint8, 0 to 255, got {described(images)}")
    if array.dim() == 4:
        array = _channels_first(array, channels, what)
    elif array.dim() == 3 and array.shape[2] not in (1, 3):  # else it may be one image
        array = array.unsqueeze(1)
    if array.dim() != 4 or array.shape[1] not in (1, 3) or not array.numel():
        raise UserError(f"{what} must be of shape {LAYOUTS}, got {described(images)}")
    _check_bytes(3 * array.numel() // array.shape[1], what)
    return array.expand(-1, 3, -1, -1).contiguous()


def _channels_first(array: Tensor, channels: Channels | None, what: str) -> Tensor:
    """Return images (N, 3, H, W), (N, H, W, 3), or of one channel, in the first order, and others as they are.

    Raises:
        UserError: the shape can be read in two ways, and ``channels`` does not say in which.
    """
    first, last = (
        array.shape[axis] in (1, 3) and channels in (None, place) for axis, place in ((1, "first"), (3, "last"))
    )
    if first and last:
        raise UserError(f"{what} {tuple(array.shape)} can be read in two ways; say channels='first' or 'last'")
    return array.permute(0, 3, 1, 2) if last else array


def _check_bytes(count: int, what: str) -> None:
    """Refuse (UserError) arrays that would take more than ``LARGEST_ARRAYS`` bytes."""
    if count > LARGEST_ARRAYS:
        raise UserError(
            f"{what} would take {count / 1e9:.1f} GB, more than {LARGEST_ARRAYS / 1e9:.1f} GB; "
            "policyskip.data.from_dataset reads images when they are needed"
        )


def _as_labels(labels: Any, what: str) -> Tensor:
    """Convert labels to int64 (N,).

    Raises:
        UserError: they are no whole numbers, (N,) or (N, 1).
    """
    array = _as_tensor(labels, what)
    if array.dim() == 2 and array.shape[1] > 1:
        raise UserError(f"{what} must be of shape (N,), got {described(labels)}; labels.argmax(1) numbers the classes")
    if array.dtype == torch.bool or array.is_floating_point() or array.is_complex() or array.dim() not in (1, 2):
        raise UserError(f"{what} must be whole numbers (N,), got {described(labels)}; such as labels.astype(int)")
    return array.to(torch.int64).flatten()


def _as_tensor(value: Any, what: str) -> Tensor:
    """Convert an array of any library, or nested lists, to a dense tensor on the CPU.

    Raises:
        UserError: it is no array of numbers.
    """
    if isinstance(value, Tensor):
        if not is_dense(value):
            raise UserError(f"{what} must be a dense array, got {described(value)}")
        return value.detach().cpu()
    if value is None or isinstance(value, str | bytes | Mapping):
        raise UserError(f"{what} must be an array, got {described(value)}")
    _check_bytes(getattr(value, "nbytes", 0), what)  # a file that is mapped to memory may be of any size
    try:
        array = np.asarray(value)
        if array.dtype.kind not in "biufc":
            raise TypeError(f"they are of type {array.dtype}")
        if array.dtype.kind in "iu" and array.dtype != np.uint8:
            array = array.astype(np.int64)  # torch has fewer types of whole numbers, and none that are big-endian
        return torch.from_numpy(np.array(array, order="C"))
    except Exception as error:  # lists of two lengths, texts, objects: each fails in its own way
        raise UserError(f"{what} must be an array of numbers, got {described(value)} ({in_one_line(error)})") from error
