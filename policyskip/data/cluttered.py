"""Cluttered digits: images of real handwriting whose difficulty is known, and which need no download.

The 1,797 8×8 digits that ship inside scikit-learn (Alpaydin & Kaynak, 1998) are rendered larger among pieces cut from
other digits, after the cluttered task of Mnih et al. (2014, "Recurrent models of visual attention"). A difficulty in
[0, 1] is drawn for each image. Below ``PLAIN`` the digit stands alone, upright and centred. Above, it is smaller,
turned and moved, among clutter and noise; all of these start at the level ``EASIEST_CLUTTER`` and grow with the
difficulty. Digits are divided among the splits before anything is rendered, so that no digit of a test image, whether
target or clutter, appears in training. Images of one source digit are a group: they are alike, and 4,000 test images
of 397 digits say less than 4,000 digits would.

Shapes: N images, M source digits.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from policyskip.data.base import Data
from policyskip.data.tensors import TensorImages
from policyskip.errors import UserError
from policyskip.parallel.devices import usual_defaults

VERSION = 2
"""Number of the recipe below; a figure measured on these images holds for one version of them."""
PLAIN = 0.5
"""Share of the images that show a plain digit."""
EASIEST_CLUTTER = 0.35
"""The least clutter of the other images, on the scale from 0 (plain) to 1 (heaviest clutter)."""
MAX_PIECES = 8
"""The most pieces of other digits in an image."""
SIZE = 20
"""Height and width of an image, in pixels."""
SOURCES = {"train": 1100, "validation": 300, "test": 397}
"""Number of scikit-learn's digits from which each split is rendered."""
MOST_IMAGES = 2_000_000
"""The most images of a split: 2.4 GB."""
_SPLIT_SEED = 1998
_CHUNK = 4096


@usual_defaults()
def digits(device: torch.device, train: int = 20000, validation: int = 2000, test: int = 4000) -> Data:
    """Render a data set of cluttered digits, with any number of images in each split, in seconds.

    Raises:
        UserError: a split with less than one image, or more than ``MOST_IMAGES``.
    """
    splits = {}
    for split, count in {"train": train, "validation": validation, "test": test}.items():
        if not 1 <= count <= MOST_IMAGES:
            raise UserError(f"data.{split} must be at least 1 image, and at most {MOST_IMAGES:,}, got {count}")
        images, label_N, difficulty, source_N = _rendered(split, count, seed=0)
        recipe = f"digits {VERSION} {split} {count}"
        splits[split] = TensorImages(images.to(device), label_N.to(device), difficulty, recipe=recipe, group_N=source_N)
    return Data("digits", **splits, classes=tuple("0123456789"), image_shape=(3, 20, 20))


def render_digits(split: str, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Render ``count`` images of a split ("train", "validation" or "test").

    Returns: images uint8 (N, 3, 20, 20), labels int64 (N,), difficulty float32 (N,) in [0, 1].
    One split, count and seed give the same images on every call.
    """
    return _rendered(split, count, seed)[:3]


def _rendered(split: str, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Render images as :func:`render_digits` does, and return behind its three the source digit of each target, int64
    (N,), counted within the split."""
    digits, labels = _sources(split)
    generator = torch.Generator().manual_seed(seed * 3 + list(SOURCES).index(split))
    chunks = [_render(digits, labels, min(_CHUNK, count - i), generator) for i in range(0, count, _CHUNK)]
    images, label_N, difficulty, source_N = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    return images, label_N, difficulty, source_N


def _sources(split: str) -> tuple[Tensor, Tensor]:
    """Load the digits from which a split is rendered: float32 (M, 1, 8, 8) in [0, 1], and labels int64 (M,)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    index_M = dict(zip(SOURCES, order.split(list(SOURCES.values())), strict=True))[split]
    digits = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    return digits[index_M], torch.from_numpy(bunch.target).long()[index_M]


def _render(digits: Tensor, labels: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Render n images from digits float32 (M, 1, 8, 8) and labels (M,); returns as :func:`_rendered`."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(n, generator=generator) * (high - low) + low

    difficulty = uniform(0, 1)
    hard = torch.where(
        difficulty < PLAIN, 0.0, EASIEST_CLUTTER + (1 - EASIEST_CLUTTER) * (difficulty - PLAIN) / (1 - PLAIN)
    )
    target = torch.randint(len(digits), (n,), generator=generator)
    size = uniform(15, 17) - hard * uniform(0, 6)
    canvas = _place(
        digits[target],
        size,
        angle=uniform(-1, 1) * (0.08 + 0.5 * hard),
        dx=uniform(-1, 1) * (0.5 + 3.5 * hard),
        dy=uniform(-1, 1) * (0.5 + 3.5 * hard),
    )
    pieces = torch.where(hard > 0, 2 + hard * (MAX_PIECES - 2), 0).round()
    for slot in range(MAX_PIECES):
        piece = digits[torch.randint(len(digits), (n,), generator=generator)] * _window(n, generator)
        reach = SIZE / 2
        drawn = _place(piece, size, uniform(-math.pi, math.pi), uniform(-reach, reach), uniform(-reach, reach))
        canvas = torch.maximum(canvas, drawn * (uniform(0.6, 0.95) * (pieces > slot)).view(-1, 1, 1, 1))
    noise = torch.randn(canvas.shape, generator=generator) * (0.03 + 0.08 * hard).view(-1, 1, 1, 1)
    images = ((canvas + noise).clamp(0, 1) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    return images.contiguous(), labels[target], difficulty, target


def _place(digits: Tensor, size: Tensor, angle: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """Draw digits (N, 1, 8, 8) ``size`` pixels large, turned by ``angle`` (radians) and moved by ``dx, dy`` pixels."""
    zoom = SIZE / size
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    tx, ty = -2 * dx / SIZE, -2 * dy / SIZE
    rows = [torch.stack([cos, sin, cos * tx + sin * ty], 1), torch.stack([-sin, cos, -sin * tx + cos * ty], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), [len(digits), 1, SIZE, SIZE], align_corners=False)
    return F.grid_sample(digits, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _window(n: int, generator: torch.Generator) -> Tensor:
    """Draw masks, float32 (n, 1, 8, 8), that leave a random 4×4 piece of a digit."""
    corner = torch.randint(0, 5, (2, n, 1), generator=generator)
    inside = (torch.arange(8) >= corner) & (torch.arange(8) < corner + 4)
    return (inside[0].unsqueeze(2) & inside[1].unsqueeze(1)).unsqueeze(1).float()
