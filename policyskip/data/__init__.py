"""Data sets: images and labels, their splits, and their batches."""

from __future__ import annotations

from typing import Any

import torch

from policyskip.data.base import (
    Augment,
    Batch,
    Data,
    Feed,
    Images,
    Order,
    TensorImages,
    batch_at,
    crop_and_flip,
    hold_out,
    sequential,
    spread_indices,
)
from policyskip.data.cluttered import digits
from policyskip.data.folders import FileImages, imagefolder, read_image
from policyskip.data.torchvision_sets import torchvision_data

__all__ = [
    "Augment",
    "Batch",
    "Data",
    "Feed",
    "FileImages",
    "Images",
    "Order",
    "TensorImages",
    "batch_at",
    "crop_and_flip",
    "digits",
    "hold_out",
    "imagefolder",
    "load_data",
    "read_image",
    "sequential",
    "spread_indices",
    "torchvision_data",
]


def load_data(name: str, device: torch.device, **options: Any) -> Data:
    """Load a data set by name: digits, imagefolder, or one of torchvision's small sets.

    Raises:
        UserError: unknown name, bad options, or images that are missing or cannot be read.
    """
    if name == "digits":
        return digits(device, **options)
    if name == "imagefolder":
        return imagefolder(device, **options)
    return torchvision_data(device, name, **options)
