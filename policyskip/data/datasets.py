"""Data sets of others, such as a torch ``Dataset`` or one of Hugging Face, are read once or when they are needed.

Shapes: N images in a set, H W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policyskip.data.arrays import Channels, class_names, from_arrays, separate
from policyskip.data.base import IN_MEMORY_BYTES, Data, check_types, mix, spread_indices
from policyskip.data.groups import divided, named_groups
from policyskip.data.items import SAMPLE, Items
from policyskip.data.reading import ReadImages, check_size
from policyskip.data.tensors import crop_and_flip
from policyskip.data.workers import check_workers
from policyskip.parallel.devices import find_device, usual_defaults


@usual_defaults()
def from_dataset(
    dataset: Any,
    *,
    validation: Any = 0.1,
    test: Any = 0.2,
    classes: Sequence[str] | int | None = None,
    name: str = "dataset",
    image_key: str | None = None,
    label_key: str | None = None,
    image_size: int | None = None,
    channels: Channels | None = None,
    augment: bool = False,
    workers: int = 0,
    groups: Any = None,
    device: torch.device | str = "cpu",
) -> Data:
    """Make a data set of anything that has a length and gives an image and its label for a number from 0 on.

    Sets whose images take at most 1 GiB are read once and held in memory; others are read when they are needed.

    Args:
        dataset: a torch ``Dataset`` of pairs, a Hugging Face ``Dataset`` of dictionaries, a list of pairs, …. Images
            are Pillow's or uint8 arrays, and have no random transform.
        validation, test: another such set, or a share, as in :func:`policyskip.data.from_arrays`.
        classes: the names of the classes or their number; None takes those that the set declares, or counts the labels.
        name: what runs call the data set.
        image_key, label_key: where dictionaries hold image and label; None finds them under the usual names.
        image_size: height and width that images are scaled to, short side to 256/224 of it and the centre cut out; None
            takes them as they are, if all are of one size.
        channels: where the channels of arrays are, "first" or "last", if the shape does not tell.
        augment: whether training images are cropped at random, padded by 4 pixels, and mirrored.
        workers: processes that read images when the set is too large for memory; 0 reads in this one.
        groups: which images belong together, as in :func:`policyskip.data.from_arrays`; such as a column of the set.
        device: where the images are used.

    Raises:
        UserError: the set is none, an argument is not as described, or there is no such device.
    """
    check_types(image_key=(image_key, str | None), label_key=(label_key, str | None), name=(name, str))
    check_types(augment=(augment, bool))
    size, workers, where = check_size(image_size), check_workers(workers), find_device(str(device))
    given, shares = separate(validation, test)
    sets = {
        split: Items(items, split, image_key, label_key, size, channels)
        for split, items in {"train": dataset, **given}.items()
    }
    classes = sets["train"].class_names() if classes is None else classes
    shape = sets["train"].shape
    if sum(map(len, sets.values())) * int(np.prod(shape)) <= IN_MEMORY_BYTES:
        pairs: dict[str, Any] = {**shares, **{split: items.in_memory() for split, items in sets.items()}}
        pixels, labels = pairs.pop("train")
        fixed: dict[str, Any] = dict(classes=classes, name=name, channels="last", augment=augment)
        return from_arrays(pixels, labels, **pairs, **fixed, groups=groups, device=device)
    labels_of = {split: items.labels() for split, items in sets.items()}
    names = class_names(classes, labels_of.values())
    group_of = named_groups(groups, {split: len(items) for split, items in sets.items()})
    rows = divided(len(sets["train"]), shares, group_of.get("train"))
    rows |= {split: torch.arange(len(sets[split])) for split in given}

    def chosen(split: str) -> DatasetImages:
        source = split if split in given else "train"
        label_N, augmented = labels_of[source][rows[split]], augment and split == "train"
        group_N = group_of[source][rows[split]] if source in group_of else None
        return DatasetImages(sets[source], rows[split], label_N, where, augmented, workers, group_N)

    splits = {split: chosen(split) for split in ("train", "validation", "test")}
    return Data(name, **splits, classes=names, image_shape=(3, shape[0], shape[1]))


class DatasetImages(ReadImages):
    """A set whose images are read from another library's data set when they are needed.

    Args:
        items: the data set.
        row_N: int64 (N,), the numbers of the images in it.
        label_N: int64 (N,).
        augment: whether each image is cropped at random and mirrored.
        group_N: int64 (N,), which images belong together; None: every image is its own group.
    """

    def __init__(
        self,
        items: Items,
        row_N: Tensor,
        label_N: Tensor,
        device: torch.device,
        augment: bool,
        workers: int,
        group_N: Tensor | None = None,
    ) -> None:
        super().__init__(label_N, device, workers, group_N)
        self.items, self.row_N, self.augment = items, row_N, augment

    def read(self, index: int, seed: int) -> np.ndarray:
        """Read an image, uint8 (H, W, 3), augmented by this seed if the set is augmented.

        Raises:
            UserError: the image cannot be read.
        """
        image = self.items.image(int(self.row_N[index]))
        if not self.augment:
            return image
        pixels = torch.from_numpy(image).permute(2, 0, 1).unsqueeze(0)
        cropped = crop_and_flip(pixels, torch.Generator().manual_seed(mix(seed, index)))
        return cropped[0].permute(1, 2, 0).contiguous().numpy()

    def plain(self) -> DatasetImages:
        return DatasetImages(self.items, self.row_N, self.label_N, self.device, False, self.workers, self.group_N)

    def fingerprint(self) -> str:
        """Return a hash of the labels and of some of the images: all of them would take too long."""
        digest = hashlib.sha256(self.label_N.cpu().numpy().tobytes())
        for index in spread_indices(SAMPLE, len(self)).tolist():
            digest.update(self.items.image(int(self.row_N[index])).tobytes())
        return digest.hexdigest()[:16]
