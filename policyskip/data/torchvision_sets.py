"""The small data sets that torchvision downloads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from policyskip.data.base import Data
from policyskip.data.tensors import crop_and_flip, in_memory
from policyskip.errors import UserError, first_line
from policyskip.parallel import processes
from policyskip.parallel.devices import usual_defaults

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
    try:
        with processes.one_a_machine_first():
            train, test = (make(root, train=is_train, download=download) for is_train in (True, False))
    except Exception as error:  # torchvision raises RuntimeError, URLError, OSError, …
        raise UserError(
            f"{name} is not in {Path(root).resolve()} and could not be downloaded ({first_line(error)}); "
            f"put torchvision's files there, say data.root=FOLDER, or use data=digits"
        ) from error
    return in_memory(
        name,
        *(_as_images(train.data), torch.as_tensor(train.targets), _as_images(test.data), torch.as_tensor(test.targets)),
        classes=tuple(str(c) for c in train.classes),
        validation=validation,
        augment=crop_and_flip if augment else None,
        device=device,
    )


def _as_images(pixels: Tensor | np.ndarray) -> Tensor:
    """Convert pixels (N, H, W) or (N, H, W, 3) to (N, 3, H, W)."""
    images = torch.as_tensor(pixels)
    if images.dim() == 3:
        return images.unsqueeze(1).expand(-1, 3, -1, -1).contiguous()
    return images.permute(0, 3, 1, 2).contiguous()
