"""Data sets hold labelled images in three splits, which are read batch by batch."""

from __future__ import annotations

from policyskip.data.arrays import from_arrays
from policyskip.data.base import (
    Batch,
    Data,
    Feed,
    Images,
    Order,
    batch_at,
    check_images,
    sequential,
    spread_indices,
)
from policyskip.data.by_name import load_data
from policyskip.data.cluttered import digits
from policyskip.data.datasets import from_dataset
from policyskip.data.files import FileImages, read_image
from policyskip.data.folders import imagefolder
from policyskip.data.groups import groups_of, hold_out
from policyskip.data.tensors import Augment, TensorImages, crop_and_flip
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
    "check_images",
    "crop_and_flip",
    "digits",
    "from_arrays",
    "from_dataset",
    "groups_of",
    "hold_out",
    "imagefolder",
    "load_data",
    "read_image",
    "sequential",
    "spread_indices",
    "torchvision_data",
]
