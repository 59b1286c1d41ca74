"""Data sets are loaded here by name."""

from __future__ import annotations

from typing import Any

import torch

from policyskip.data.base import Data
from policyskip.data.cluttered import digits
from policyskip.data.folders import imagefolder
from policyskip.data.torchvision_sets import torchvision_data


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
