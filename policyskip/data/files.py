"""Image files: which formats are read, how one is decoded, and sets that are read from their files batch by batch."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from policyskip.data.base import mix
from policyskip.data.reading import ReadImages, scaled
from policyskip.errors import UserError, in_one_line
from policyskip.texts import one_line

LARGEST_IMAGE = 2**26
"""The most pixels that an image may have, 8192×8192: a small file can claim to hold an image of any size."""
FORMATS = ("PNG", "JPEG", "MPO", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF")
"""The formats that are read, by Pillow's names, whatever a file's ending says. Pillow knows others, such as EPS, for
which it starts another program."""
IMAGE_SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif"),
)
"""The endings of files that are taken for images, in small or capital letters."""


class FileImages(ReadImages):
    """A set whose images ``workers`` processes read from their files, batch by batch.

    Args:
        label_N: int64 (N,).
        size: height and width to which images are scaled.
        augment: whether each image is cropped at random and mirrored.
    """

    def __init__(
        self,
        files: list[Path],
        label_N: Tensor,
        size: int,
        device: torch.device,
        augment: bool = False,
        workers: int = 2,
    ) -> None:
        super().__init__(label_N, device, workers)
        self.files = files
        self.size = size
        self.augment = augment

    def read(self, index: int, seed: int) -> np.ndarray:
        """Read an image file to uint8 (size, size, 3), augmented by this seed if the set is augmented.

        Raises:
            UserError: the file is not a readable image.
        """
        return read_image(self.files[index], self.size, mix(seed, index) if self.augment else None)

    def plain(self) -> FileImages:
        return FileImages(self.files, self.label_N, self.size, self.device, workers=self.workers)

    def fingerprint(self) -> str:
        files = zip(self.files, self.label_N.tolist(), strict=True)
        names = "\n".join(f"{label} {file.parent.name}/{file.name} {file.stat().st_size}" for file, label in files)
        names += f" at {self.size}"
        return hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()[:16]  # a name need not be UTF-8


def in_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB with 8 bits per channel; of 16 bits, the upper 8 are kept.

    Raises:
        ValueError: the image's values are neither of 8 nor of 16 bits.
    """
    if not image.mode.startswith(("I", "F")):
        return image.convert("RGB")
    values = np.asarray(image)  # Pillow's own conversion makes everything above 255 white
    if image.mode.startswith("F") or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its values are not of 8 or 16 bits (mode {image.mode})")
    return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")


def read_image(file: Path, size: int | None, augment_seed: int | None = None) -> np.ndarray:
    """Read an image file to uint8 (H, W, 3).

    Args:
        size: None leaves the image as it is; otherwise it is scaled as :func:`policyskip.data.reading.scaled` says.

    Raises:
        UserError: the file is not a readable image.
    """
    try:
        if not file.is_file():  # opening a pipe would wait for ever
            raise ValueError("it is no file")
        with Image.open(file, formats=_known_formats()) as opened:
            if opened.width * opened.height > LARGEST_IMAGE:
                raise ValueError(f"it is {opened.width}×{opened.height}, more than {LARGEST_IMAGE} pixels")
            image = in_rgb(opened)
    except UnidentifiedImageError as error:
        known = f"it is none of {', '.join(FORMATS)}, whatever its name says"
        raise UserError(f"cannot read the image {one_line(file)}: {known}") from error
    except Exception as error:
        raise UserError(f"cannot read the image {one_line(file)}: {one_line(in_one_line(error))}") from error
    if size is None or (image.size == (size, size) and augment_seed is None):
        return np.array(image)
    return scaled(image, size, augment_seed)


def _known_formats() -> list[str]:
    """Return those of ``FORMATS`` that this Pillow was built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]
