"""Folders of images are held in memory if they fit, and otherwise read from their files batch by batch.

Shapes: N images in a set.
"""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from policyskip.data.base import IN_MEMORY_BYTES, Data
from policyskip.data.files import IMAGE_SUFFIXES, FileImages, read_image
from policyskip.data.groups import hold_out
from policyskip.data.reading import check_size
from policyskip.data.tensors import crop_and_flip, in_memory
from policyskip.data.workers import check_workers
from policyskip.errors import UserError, check_choice
from policyskip.parallel import processes
from policyskip.parallel.devices import usual_defaults
from policyskip.runs.progress import waiting
from policyskip.texts import one_line

ClassOrder = Literal["text", "numbers"]
TEST_FOLDERS = ("test", "val", "valid", "validation")
"""The folder of test images is the first of these that is there."""
LAYOUT = "data.root must hold train/<class>/* and test/<class>/*"
LARGE_SIDE = 512
"""Images of more pixels a side that are not scaled are worth a warning: networks become slow."""


@usual_defaults()
def imagefolder(
    device: torch.device,
    root: str,
    image_size: int | None = None,
    validation: float = 0.1,
    augment: bool = True,
    workers: int = 2,
    name: str = "imagefolder",
    skip_damaged: bool = False,
    class_order: ClassOrder = "text",
) -> Data:
    """Read the data set ``root/train/<class>/*`` and ``root/test/<class>/*`` (or ``root/val``, as ImageNet has it).

    Args:
        image_size: height and width that the network sees; None takes the files as they are, if all are of one size.
        validation: share of ``root/train`` that is held out.
        augment: whether training images are cropped at random and mirrored.
        workers: processes that decode images when the set is too large for memory.
        skip_damaged: whether files that cannot be read are left out, and their number printed; every file is decoded
            once to find them.
        class_order: "numbers" takes class folders whose names are all numbers in the order of the numbers, and others
            by name; "text", the order that runs of earlier versions keep, takes 10 before 2.

    Raises:
        UserError: a folder is missing or empty, classes differ between the splits or are too few, or an image is bad.
    """
    check_choice("data.class_order", class_order, ("text", "numbers"))
    image_size, workers = check_size(image_size), check_workers(workers)
    # Pillow warns of images that are so large that decoding them may be an attack: refuse them.
    warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
    folder = _root(root)
    test_folder, *unread = [folder / name for name in TEST_FOLDERS if (folder / name).is_dir()] or [folder / "test"]
    if unread:
        names = " and ".join(path.name for path in unread)
        _say(
            f"{names} of {folder} is not read: {test_folder.name} holds the test images, validation images are "
            "a share of train"
        )
    classes, train_files, train_labels = _list_images(folder / "train", class_order, skip_damaged)
    test_classes, test_files, test_labels = _list_images(test_folder, class_order, skip_damaged)
    _check_classes(classes, test_classes, folder / "train", test_folder)
    height, width, _ = read_image(train_files[0], None).shape
    size = image_size or (height if height == width else None)
    if size is None:
        raise UserError(
            f"{one_line(train_files[0])} is {width}×{height}, and a network sees squares: say data.image_size=N, the "
            "side to scale all images to, such as 32 for CIFAR's networks or 224 for ImageNet's"
        )
    if image_size is None and size > LARGE_SIDE:
        _say(
            f"images of {size}×{size} pixels are not scaled, and cost {(size / 224) ** 2:.0f} times as much as those "
            "of 224×224; data.image_size=224 scales them"
        )
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


def _root(root: str) -> Path:
    """Return the folder of a data set; ``~`` stands for the user's own.

    Raises:
        UserError: there is no folder of that name.
    """
    try:
        folder = Path(os.path.expanduser(root))
        if root and folder.is_dir():
            return folder
    except (RuntimeError, TypeError, OSError):  # ~ of an unknown user, no text, or no permission
        pass
    raise UserError(f"there is no folder {one_line(root)!r}; {LAYOUT}")


def _say(text: str) -> None:
    """Print a warning about the folder, once where several processes train together."""
    if processes.is_first():
        print(f"warning: {one_line(text, 1000)}", flush=True)


def _check_classes(train: tuple[str, ...], test: tuple[str, ...], train_folder: Path, test_folder: Path) -> None:
    """Refuse (UserError) splits of other classes, naming the folders that have no counterpart; or of one class."""
    odd = [train_folder / name for name in train if name not in test]
    odd += [test_folder / name for name in test if name not in train]
    if odd:
        some = ", ".join(one_line(path) for path in odd[:4]) + (", …" if len(odd) > 4 else "")
        raise UserError(
            f"the folders {train_folder.name} and {test_folder.name} must have the same classes; only in one of them: "
            f"{some}"
        )
    if len(train) < 2:
        raise UserError(f"{one_line(train_folder)} has one class, {one_line(train[0])}; at least two are needed")


def _list_images(
    folder: Path, class_order: ClassOrder, skip_damaged: bool = False
) -> tuple[tuple[str, ...], list[Path], Tensor]:
    """List class names, files and labels, int64 (N,), of ``folder/<class>/*``, in order of class and name.

    Names that begin with a dot are left out. What else is left out is printed.

    Raises:
        UserError: there is no such folder or no class in it, or a class has no images.
    """
    if not folder.is_dir():
        raise UserError(
            f"there is no folder {one_line(folder)}; data.root must hold train/<class>/* and test/<class>/*"
        )
    classes = _classes(folder, class_order)
    files, labels = [], []
    odd = [entry for entry in folder.iterdir() if not entry.is_dir() and not entry.name.startswith(".")]
    for label, name in enumerate(classes):
        found = sorted(_visible_files(folder / name))
        images = [file for file in found if file.suffix.lower() in IMAGE_SUFFIXES]
        odd += [file for file in found if file.suffix.lower() not in IMAGE_SUFFIXES]
        if not images:
            endings = ", ".join(IMAGE_SUFFIXES)
            raise UserError(f"the class folder {one_line(folder / name)} holds no images ({endings})")
        if skip_damaged:
            images = _readable(images, folder / name)
        files += images
        labels += [label] * len(images)
    if odd:
        counts = Counter(file.suffix.lower() or file.name for file in odd).most_common(5)
        of_each = ", ".join(f"{count} {ending}" for ending, count in counts)
        _say(
            f"{len(odd)} files of {folder} are left out, which do not end as images do: {of_each}; "
            f"the first: {min(odd)}"
        )
    return classes, files, torch.tensor(labels)


def _classes(folder: Path, class_order: ClassOrder) -> tuple[str, ...]:
    """List the class folders in a folder, in their order.

    Raises:
        UserError: there is none, the folder cannot be read, or a name is not UTF-8.
    """
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"cannot read the folder {one_line(folder)}: {error.strerror}") from error
    if not names:
        raise UserError(
            f"{one_line(folder)} holds no class folders; it must look like {one_line(folder)}/<class>/*.png"
        )
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(f"the name of the class folder {one_line(folder / name)} is not UTF-8: rename it") from None
    by_number = sorted(names, key=lambda name: (int(name), name)) if all(map(_is_number, names)) else names
    if by_number != names and class_order == "text":
        order = ", ".join(names[:3])
        _say(
            f"the class folders of {folder} are taken in the order of their names as text: {order}, …; "
            "data.class_order=numbers takes them as numbers"
        )
    return tuple(by_number if class_order == "numbers" else names)


def _is_number(name: str) -> bool:
    return re.fullmatch(r"\d{1,18}", name, re.ASCII) is not None


def _visible_files(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder but those whose names, or whose folders' names, begin with a dot.

    Raises:
        UserError: a folder cannot be read.
    """

    def failed(error: OSError) -> None:
        raise UserError(f"cannot read the folder {one_line(error.filename)}: {error.strerror}") from error

    for parent, folders, names in os.walk(folder, onerror=failed):
        linked = [name for name in folders if os.path.islink(os.path.join(parent, name))]  # may lead in a circle
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in [*names, *linked] if not name.startswith("."))


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
        _say(f"{len(errors)} of {len(files)} images in {folder} are skipped; the first: {errors[0]}")
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
