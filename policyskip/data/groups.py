"""Which images of a set belong together, and how a set is divided among the splits.

Images that belong together (photographs of one object, frames of one video, crops of one picture) are a group. What is
right about one of them is likely right about the others, so that 1,000 images of 50 objects say little more than 50
images do. Groups are therefore drawn together wherever an interval is computed, and stay together where images are held
out.

Shapes: N images in a set.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policyskip.data.base import Images, described
from policyskip.errors import UserError

SPLIT_SEED = 0
"""Decides which images are held out for validation. It is the same in every run, whatever the run's seed, because
weights and thresholds were chosen on these images."""


def groups_of(images: Images) -> Tensor | None:
    """Return which images of a set belong together, int64 (N,) on the CPU; None if each is its own group.

    Raises:
        UserError: the set's ``group_N`` is not as :class:`policyskip.data.Images` says.
    """
    group_N: Any = getattr(images, "group_N", None)  # a set that somebody else wrote may know nothing of groups
    if group_N is not None:
        check_groups(group_N, len(images))
    return None if group_N is None else group_N.cpu()


def check_groups(group_N: Any, count: int) -> None:
    """Refuse (UserError) what is not the number of a group for each of ``count`` images, int64 (N,)."""
    dense = isinstance(group_N, Tensor) and not group_N.is_nested and group_N.layout == torch.strided
    if not dense or group_N.device.type == "meta" or group_N.dtype != torch.int64 or group_N.shape != (count,):
        allowed = f"a tensor of int64 ({count},), the number of each image's group, or None"
        raise UserError(f"group_N must be {allowed}, got {described(group_N)}")


def named_groups(groups: Any, sizes: dict[str, int]) -> dict[str, Tensor]:
    """Return the number of each image's group, for groups that a user names.

    Args:
        groups: for each training image the name or number of its group, (N,); or a dictionary of such by split.
        sizes: number of images of each split that the user gives.

    Returns: int64 (N,) for each split that has groups, numbered from 0 within it.

    Raises:
        UserError: there is not one name or number for each image, or a split that is not given is named.
    """
    numbered = {}
    for split, names in (groups if isinstance(groups, Mapping) else {"train": groups}).items():
        if names is None:
            continue
        if split not in sizes:
            given = ", ".join(sizes)
            raise UserError(f"groups are of splits whose images are given, {given}, got groups of {split!r:.40}")
        number_N = _numbered(names, f"groups of {split} images")
        if len(number_N) != sizes[split]:
            found = f"{sizes[split]} {split} images and {len(number_N)} groups"
            raise UserError(f"there are {found}; there must be the name or number of a group for each image")
        numbered[split] = number_N
    return numbered


def _numbered(names: Any, what: str) -> Tensor:
    """Replace names, or whole numbers, (N,), by numbers from 0 on, int64 (N,).

    Raises:
        UserError: they are something else.
    """
    allowed = f"{what} must be names or whole numbers (N,)"
    try:
        array = names.detach().cpu().numpy() if isinstance(names, Tensor) else np.asarray(names)
        number_N = np.unique(array, return_inverse=True)[1]
    except Exception as error:  # lists of two lengths, sparse tensors, objects: each fails in its own way
        raise UserError(f"{allowed}, got {described(names)}") from error
    if array.dtype.kind not in "iuU" or array.ndim != 1:
        raise UserError(f"{allowed}, got {described(names)}")
    return torch.from_numpy(number_N.astype(np.int64))


def hold_out(count: int, fraction: float, group_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Divide ``count`` images into validation images, ``fraction`` of them and at least one, and training images.

    Args:
        group_N: int64 (N,), which images belong together; they stay together, and ``fraction`` of the groups is held
            out. None: every image is its own group.

    Returns: the indices of the validation and of the training images, int64, ascending, the same on every call.

    Raises:
        UserError: ``fraction`` is not above 0 and below 1, or there are fewer than two images or groups.
    """
    if not 0 < fraction < 1:
        raise UserError(f"data.validation must be a share above 0 and below 1, got {fraction}")
    if count < 2:
        raise UserError(f"the training split needs at least 2 images, one of them for validation; it has {count}")
    if group_N is not None:
        names_G, number_N = group_N.unique(return_inverse=True)
        if len(names_G) < 2:
            raise UserError(f"all {count} images are of one group, which cannot be divided among the splits")
        held_out_N = torch.isin(number_N, hold_out(len(names_G), fraction)[0])
        return held_out_N.nonzero()[:, 0], held_out_N.logical_not().nonzero()[:, 0]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED))
    cut = min(max(1, round(count * fraction)), count - 1)
    return order[:cut].sort().values, order[cut:].sort().values


def divided(count: int, shares: dict[str, float], group_N: Tensor | None = None) -> dict[str, Tensor]:
    """Divide ``count`` images into training images and the shares that are held out, one after the other.

    Args:
        group_N: int64 (N,), which images belong together, and stay together; None: every image is its own group.

    Returns: the indices of each split, int64, ascending, the same on every call.

    Raises:
        UserError: there are too few images or groups.
    """
    if count <= len(shares):
        raise UserError(f"{count} images are too few for training and {' and '.join(shares)}")
    left_N, rows = torch.arange(count), {}
    for split, share in shares.items():
        held_out, kept = hold_out(len(left_N), share, None if group_N is None else group_N[left_N])
        rows[split], left_N = left_N[held_out], left_N[kept]
    return {**rows, "train": left_N}
