"""The small data sets that torchvision knows: from its files, which it downloads, or from idx files in a folder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from policyskip.data.base import Data
from policyskip.data.idx import idx_folder, read_split
from policyskip.data.tensors import crop_and_flip, in_memory
from policyskip.errors import UserError, first_line
from policyskip.parallel import processes
from policyskip.parallel.devices import usual_defaults

IDX = ("mnist", "fashion_mnist")
"""The sets that are also read from four idx files that lie in a folder, as their authors and Debian have them."""
DEBIAN = {"fashion_mnist": " (Debian's package dataset-fashion-mnist puts it into /usr/share/datasets/fashion-mnist)"}
"""Where a set is to be had without torchvision's download."""
TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashion_mnist": "FashionMNIST", "mnist": "MNIST"}


@usual_defaults()
def torchvision_data(
    device: torch.device,
    name: str,
    root: str = "data",
    validation: float = 0.1,
    augment: bool = True,
    download: bool = True,
) -> Data:
    """Load one of torchvision's small sets, which torchvision downloads into ``root`` if it is not there.

    Args:
        root: torchvision's folder of data; for MNIST and Fashion-MNIST, it may be a folder of the four idx files,
            packed with gzip or not.
        validation: share of the training images that is held out.
        augment: whether training images are cropped at random and mirrored.
        download: whether the set may be downloaded.

    Raises:
        UserError: unknown name, or the files are not there and cannot be downloaded.
    """
    if name not in TORCHVISION:
        raise UserError(f"data.name must be one of {', '.join(TORCHVISION)}, got {name!r}")
    import torchvision.datasets

    make = getattr(torchvision.datasets, TORCHVISION[name])
    if name in IDX and (folder := idx_folder(root)) is not None:
        splits, classes = [read_split(folder, split) for split in ("train", "test")], make.classes
        if splits[0][0].shape[1:] != splits[1][0].shape[1:]:
            raise UserError(f"the training and the test images of {name} in {folder} are of different sizes")
    else:
        try:
            with processes.one_a_machine_first():
                sets = [make(root, train=is_train, download=download) for is_train in (True, False)]
        except Exception as error:  # torchvision raises RuntimeError, URLError, OSError, …
            raise UserError(
                f"{name} is not in {Path(root).resolve()} and could not be downloaded ({first_line(error)}); "
                f"put torchvision's files there, say data.root=FOLDER{DEBIAN.get(name, '')}, or use data=digits"
            ) from error
        splits = [(torch.as_tensor(images.data), torch.as_tensor(images.targets)) for images in sets]
        classes = sets[0].classes
    (train_images, train_labels), (test_images, test_labels) = splits
    return in_memory(
        name,
        *(_as_images(train_images), train_labels, _as_images(test_images), test_labels),
        classes=tuple(str(c) for c in classes),
        validation=validation,
        augment=crop_and_flip if augment else None,
        device=device,
    )


def _as_images(images: Tensor) -> Tensor:
    """Convert pixels (N, H, W) or (N, H, W, 3) to (N, 3, H, W)."""
    if images.dim() == 3:
        return images.unsqueeze(1).expand(-1, 3, -1, -1).contiguous()
    return images.permute(0, 3, 1, 2).contiguous()
