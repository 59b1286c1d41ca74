"""Folders of images are held in memory if they fit, and otherwise read from their files batch by batch.

Shapes: N images in a set, B images in a batch, H W pixels.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from policyskip.data.base import IN_MEMORY_BYTES, WHOLE, Batch, Data, crop_and_flip, hold_out, in_memory, mix
from policyskip.errors import UserError
from policyskip.runs.progress import waiting


def imagefolder(
    device: torch.device,
    root: str,
    image_size: int | None = None,
    validation: float = 0.1,
    augment: bool = True,
    workers: int = 2,
    name: str = "imagefolder",
    skip_damaged: bool = False,
) -> Data:
    """Read the data set ``root/train/<class>/*`` and ``root/test/<class>/*`` (or ``root/val``, as ImageNet has it).

    Args:
        image_size: height and width that the network sees; None takes the files as they are, if all are of one size.
        validation: share of ``root/train`` that is held out.
        augment: whether training images are cropped at random and mirrored.
        workers: processes that decode images when the set is too large for memory.
        skip_damaged: whether files that cannot be read are left out, and their number printed; every file is decoded
            once to find them.

    Raises:
        UserError: a folder is missing or empty, classes differ between the splits or are too few, or an image is bad.
    """
    # Pillow warns of images that are so large that decoding them may be an attack: refuse them.
    warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
    folder = Path(root).expanduser()
    test_folder = next((folder / split for split in ("test", "val") if (folder / split).is_dir()), folder / "test")
    classes, train_files, train_labels = _list_images(folder / "train", skip_damaged)
    test_classes, test_files, test_labels = _list_images(test_folder, skip_damaged)
    if classes != test_classes:
        odd = sorted(set(classes) ^ set(test_classes))
        raise UserError(
            f"{folder / 'train'} and {test_folder} must have the same classes; they differ in {', '.join(odd[:5])}"
        )
    if len(classes) < 2:
        raise UserError(f"{folder / 'train'} has one class, {classes[0]}; at least two are needed")
    height, width, _ = read_image(train_files[0], None).shape
    size = image_size or (height if height == width else None)
    if size is None:
        raise UserError(f"{train_files[0]} is {width}×{height}; say data.image_size=N, such as 224")
    if (len(train_files) + len(test_files)) * 3 * size * size <= IN_MEMORY_BYTES and (height, width) == (size, size):
        return in_memory(
            name,
            *(_decode(train_files, size, image_size), train_labels, _decode(test_files, size, image_size), test_labels),
            classes=classes,
            validation=validation,
            augment=crop_and_flip if augment else None,
            device=device,
        )
    held_out, kept = hold_out(len(train_files), validation)

    def files(chosen: Tensor, augment: bool) -> FileImages:
        return FileImages([train_files[i] for i in chosen], train_labels[chosen], size, device, augment, workers)

    return Data(
        name,
        train=files(kept, augment),
        validation=files(held_out, False),
        test=FileImages(test_files, test_labels, size, device, False, workers),
        classes=classes,
        image_shape=(3, size, size),
    )


LARGEST_IMAGE = 2**26
"""The most pixels that an image may have, 8192×8192: a small file can claim to hold an image of any size."""
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


def _list_images(folder: Path, skip_damaged: bool = False) -> tuple[tuple[str, ...], list[Path], Tensor]:
    """List class names, files and labels, int64 (N,), of ``folder/<class>/*``, in order of name.

    Raises:
        UserError: there is no such folder or no class in it, or a class has no images.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; data.root must hold train/<class>/* and test/<class>/*")
    classes = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))
    if not classes:
        raise UserError(f"{folder} holds no class folders; it must look like {folder}/<class>/*.png")
    files, labels = [], []
    for label, name in enumerate(classes):
        images = sorted(file for file in (folder / name).rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        if not images:
            raise UserError(f"the class folder {folder / name} holds no images ({', '.join(IMAGE_SUFFIXES)})")
        if skip_damaged:
            images = _readable(images, folder / name)
        files += images
        labels += [label] * len(images)
    return classes, files, torch.tensor(labels)


def _readable(files: list[Path], folder: Path) -> list[Path]:
    """Keep the files of a class folder that can be read, and print how many cannot.

    Raises:
        UserError: none of them can be read.
    """

    def problem(file: Path) -> UserError | None:
        try:
            read_image(file, None)
        except UserError as error:
            return error
        return None

    with ThreadPoolExecutor() as pool:
        problems = []
        with waiting("reading every image once, for data.skip_damaged=true", len(files)) as wait:
            for error in pool.map(problem, files):
                problems.append(error)
                wait.advance()
    good = [file for file, error in zip(files, problems) if error is None]
    errors = [error for error in problems if error is not None]
    if not good:
        raise UserError(f"the class folder {folder} holds no images that can be read ({errors[0]})")
    if errors:
        print(
            f"warning: {len(errors)} of {len(files)} images in {folder} are skipped; the first: {errors[0]}", flush=True
        )
    return good


def _decode(files: list[Path], size: int, scale_to: int | None) -> Tensor:
    """Decode all files to uint8 (N, 3, size, size); ``scale_to`` is the size to scale them to, or None.

    Raises:
        UserError: an image cannot be read, or is of another size and not scaled.
    """
    with ThreadPoolExecutor() as pool:
        pixels = []
        with waiting("reading images", len(files)) as wait:
            for image in pool.map(lambda file: read_image(file, scale_to), files):
                pixels.append(image)
                wait.advance()
    for file, image in zip(files, pixels):
        if image.shape != (size, size, 3):
            own_size = f"{image.shape[1]}×{image.shape[0]}"
            raise UserError(f"{file} is {own_size}, others are {size}×{size}; say data.image_size={size} to scale them")
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


class FileImages:
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
        self.files = files
        self.label_N = label_N
        self.size = size
        self.device = device
        self.augment = augment
        self.workers = workers
        self.difficulty: Tensor | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int, int]:
        index, seed = item
        image = read_image(self.files[index], self.size, mix(seed, index) if self.augment else None)
        return torch.from_numpy(image).permute(2, 0, 1), int(self.label_N[index]), index

    def stream(self, orders: Iterable[tuple[Tensor, int]], rows: slice = WHOLE) -> Iterator[Batch]:
        """Yield a batch for each pair of indices, int64 (B,), and augmentation seed; worker processes read the files.

        Raises:
            UserError: a file cannot be read.
        """
        batches = ([(int(i), seed) for i in index_B[rows]] for index_B, seed in orders)
        loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
            self,  # type: ignore[arg-type]
            batch_sampler=batches,
            num_workers=self.workers,
            generator=torch.Generator(),  # by default it would draw from the global one
        )
        try:
            for images, label_B, index_B in loader:
                yield Batch(images.to(self.device), label_B.to(self.device), index_B)
        except UserError as error:  # raised in a worker, whose traceback is put in front of the message
            raise UserError(str(error).strip().splitlines()[-1].removeprefix("policyskip.errors.UserError: ")) from None

    def plain(self) -> FileImages:
        return FileImages(self.files, self.label_N, self.size, self.device, workers=self.workers)

    def fingerprint(self) -> str:
        files = zip(self.files, self.label_N.tolist(), strict=True)
        names = "\n".join(f"{label} {file.parent.name}/{file.name} {file.stat().st_size}" for file, label in files)
        names += f" at {self.size}"
        return hashlib.sha256(names.encode()).hexdigest()[:16]


def _in_rgb(image: Image.Image) -> Image.Image:
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
        size: None leaves the image as it is. Otherwise the short side is scaled to 256/224 of ``size`` and the centre
            cut out (evaluation), or, with ``augment_seed``, a random part, scaled and perhaps mirrored (training).

    Raises:
        UserError: the file is not a readable image.
    """
    from torchvision.transforms import v2

    try:
        with Image.open(file) as opened:
            if opened.width * opened.height > LARGEST_IMAGE:
                raise ValueError(f"it is {opened.width}×{opened.height}, more than {LARGEST_IMAGE} pixels")
            image = _in_rgb(opened)
    except Exception as error:
        raise UserError(f"cannot read the image {file}: {' '.join(str(error).split())}") from error
    if size is None or (image.size == (size, size) and augment_seed is None):
        return np.array(image)

    if augment_seed is None:
        return np.array(v2.Compose([v2.Resize(size * 256 // 224), v2.CenterCrop(size)])(image))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(augment_seed)
        return np.array(v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()])(image))
