"""Images and labels are taken out of data sets of other libraries here, whatever their items look like.

Shapes: N images in a set, H W pixels.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from policyskip.data.arrays import Channels, as_images
from policyskip.data.base import described, spread_indices
from policyskip.data.files import in_rgb
from policyskip.data.reading import scaled
from policyskip.errors import UserError, in_one_line, named
from policyskip.texts import a_type, one_line

IMAGE_KEYS = ("image", "img", "pixel_values")
LABEL_KEYS = ("label", "labels", "fine_label")
SAMPLE = 16
"""Images by which a data set is tried, and known again."""


class Items:
    """Reads images and labels of one split from what another library's data set gives.

    Attributes:
        shape: (H, W, 3) of the first image, which all others must have.

    Raises:
        UserError: the set has no length, no items or no images.
    """

    def __init__(
        self,
        items: Any,
        split: str,
        image_key: str | None,
        label_key: str | None,
        size: int | None,
        channels: Channels | None,
    ) -> None:
        self.items, self.split, self.size, self.channels = items, split, size, channels
        self.keys = {"image": image_key, "label": label_key}
        if isinstance(items, Mapping):
            some = ", ".join(one_line(repr(key), 20) for key in list(items)[:4])
            raise UserError(
                f"a data set is one split, got {a_type(items)} of {some}; "
                "from_dataset(splits['train'], test=splits['test']) takes two of them"
            )
        if isinstance(items, str | bytes | type) or not all(
            hasattr(items, name) for name in ("__len__", "__getitem__")
        ):
            raise UserError(
                f"{split} must have a length and give an item for a number, got {described(items)}; of what can only "
                "be iterated over, list(…) makes such a set"
            )
        try:
            self.count = len(items)
        except Exception as error:  # a data set that is not indexed yet, …
            raise UserError(f"{split} has no length: {in_one_line(error)}") from error
        if self.count < 1:
            raise UserError(f"{split} must hold at least one image, got none")
        first = self.image(0)
        self.shape: tuple[int, ...] = first.shape
        if not np.array_equal(first, self.image(0)):
            print(
                f"warning: image 0 of {split} differs when it is read again; leave random transforms out, because "
                "validation and test images must stay the same (augment=True augments training images)",
                flush=True,
            )

    def __len__(self) -> int:
        return self.count

    def image(self, index: int) -> np.ndarray:
        """Read an image, uint8 (H, W, 3).

        Raises:
            UserError: it cannot be read, or is of another size than the first.
        """
        return self._image(self._item(index)[0], index)

    def label(self, index: int) -> int:
        """Read a label.

        Raises:
            UserError: it is no whole number.
        """
        return self._label(self._item(index)[1], index)

    def labels(self) -> Tensor:
        """Return all labels, int64 (N,): those that the set holds as a column, else those of its items, one by one.

        Raises:
            UserError: a label is no whole number.
        """
        for column in self._columns():
            sample = spread_indices(SAMPLE, len(self)).tolist()
            with_column = isinstance(column, Sequence | np.ndarray | Tensor) and len(column) == len(self)
            if with_column and all(self._same(column[i], i) for i in sample):
                return torch.tensor([self._label(label, i) for i, label in enumerate(column)])
        print(f"reading the labels of {len(self)} {self.split} images, one by one", flush=True)
        return torch.tensor([self.label(i) for i in range(len(self))])

    def in_memory(self) -> tuple[np.ndarray, list[int]]:
        """Read all images, uint8 (N, H, W, 3), and labels, and say how long it takes if it takes long."""
        images, labels, begun, said = np.empty((len(self), *self.shape), np.uint8), [], time.monotonic(), False
        for i in range(len(self)):
            image, label = self._item(i)
            images[i] = self._image(image, i)
            labels.append(self._label(label, i))
            if not said and (passed := time.monotonic() - begun) > 2:
                seconds, said = passed / (i + 1) * len(self), True
                print(f"reading {len(self)} {self.split} images takes about {seconds:.0f} s", flush=True)
        return images, labels

    def class_names(self) -> Sequence[str] | None:
        """Return the names of the classes, if the set declares them as torchvision or Hugging Face do."""
        features = getattr(self.items, "features", None)
        declared = getattr(self.items, "classes", None)
        for key in (self.keys["label"], *LABEL_KEYS):
            if isinstance(features, Mapping) and key in features:
                declared = getattr(features[key], "names", declared)
        return declared if isinstance(declared, list | tuple) else None

    def _columns(self) -> list[Any]:
        """Return what may be the column of all labels."""
        columns = [getattr(self.items, name, None) for name in ("targets", "labels")]
        for key in (self.keys["label"], *LABEL_KEYS):
            if key is not None and key in (getattr(self.items, "column_names", None) or ()):
                columns.append(list(self.items[key]))
        return columns

    def _same(self, label: Any, index: int) -> bool:
        """Return whether a label of a column is that of the item: a set may change its targets as it gives them."""
        try:
            return self._label(label, index) == self.label(index)
        except UserError:
            return False

    def _item(self, index: int) -> tuple[Any, Any]:
        """Return an item's image and label, as the set gives them.

        Raises:
            UserError: the set raised an exception, or its item is neither a pair nor a dictionary that has both.
        """
        where = f"item {index} of {self.split}"
        try:
            item = self.items[index]
        except Exception as error:
            raise UserError(f"{where} cannot be read: {named(error)}") from error
        if isinstance(item, Mapping):
            return self._value(item, "image", IMAGE_KEYS, where), self._value(item, "label", LABEL_KEYS, where)
        if isinstance(item, tuple | list) and len(item) == 2:
            return item[0], item[1]
        raise UserError(f"{where} must be a pair (image, label) or a dictionary, got {described(item)}")

    def _value(self, item: Mapping[Any, Any], part: str, usual: Sequence[str], where: str) -> Any:
        """Return what a dictionary holds under the key for ``part``, or under a usual one (UserError)."""
        wanted = self.keys[part]
        for key in usual if wanted is None else (wanted,):
            if key in item:
                return item[key]
        named = ", ".join(one_line(repr(key), 30) for key in list(item)[:8])
        raise UserError(f"{where} has no {wanted or ' or '.join(usual)}, but {named}; say {part}_key='…'")

    def _image(self, value: Any, index: int) -> np.ndarray:
        """Convert an image to uint8 (H, W, 3).

        Raises:
            UserError: it is no image, or of another size than the first.
        """
        where = f"image {index} of {self.split}"
        if isinstance(value, Image.Image):
            picture = _converted(value, where)
        else:
            pixels = as_images(_alone(value, where), self.channels, where)[0].permute(1, 2, 0).contiguous().numpy()
            picture = Image.fromarray(pixels)
        image = np.array(picture) if self.size is None else scaled(picture, self.size)
        if image.shape != getattr(self, "shape", image.shape):
            sizes = f"{image.shape[1]}×{image.shape[0]}, the first {self.shape[1]}×{self.shape[0]}"
            raise UserError(f"{where} is {sizes}; image_size=N scales them")
        return image

    def _label(self, value: Any, index: int) -> int:
        """Convert a label to an integer.

        Raises:
            UserError: it is no whole number.
        """
        try:
            number = np.asarray(value)
            if number.dtype.kind not in "iu" or number.size != 1:
                raise TypeError
            return int(number.reshape(()))
        except (TypeError, ValueError, RuntimeError):
            found = described(value)
            raise UserError(f"label {index} of {self.split} must be a whole number from 0 on, got {found}") from None


def _alone(value: Any, where: str) -> Any:
    """Make an array of images of the one in ``value``.

    Raises:
        UserError: it is no array.
    """
    try:
        return value.unsqueeze(0) if isinstance(value, Tensor) else np.asarray(value)[None]
    except Exception as error:  # nested tensors and ragged lists raise exceptions of different types
        raise UserError(f"{where} must be Pillow's or an array, got {described(value)}") from error


def _converted(picture: Image.Image, where: str) -> Image.Image:
    """Convert a picture of Pillow's to RGB.

    Raises:
        UserError: it cannot be decoded, or its values are not of 8 or 16 bits.
    """
    try:
        return in_rgb(picture)
    except Exception as error:  # Pillow decodes here, and raises exceptions of every type
        raise UserError(f"{where} cannot be read: {in_one_line(error)}") from error
