"""Images and labels: uint8 on the device, seeded splits, augmentation in batches.

Small sets live on the device as one tensor (``TensorImages``); large ones are read from files as
they are needed (``FileImages``). Both give the same two things: a stream of batches and a length.
Every batch follows from (seed, batch number) alone, so a run can go on anywhere in the stream.

Shapes: N images in a set, B images in a batch, H W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from policyskip.errors import UserError

SPLIT_SEED = 0
"""Validation images are the same in every run, whatever its seed: weights and thresholds were chosen on them."""
IN_MEMORY_BYTES = 2**30
"""Image folders up to this size, decoded, are held in memory."""


Order = Literal["shuffled", "sequential"]


@dataclass(frozen=True)
class Batch:
    """Images uint8 (B, 3, H, W), labels int64 (B,), and their places in the set, int64 (B,) on the CPU."""

    images: Tensor
    label_B: Tensor
    index_B: Tensor

    def __len__(self) -> int:
        return len(self.label_B)

    def empty(self) -> Batch:
        """A batch like this one, with no images in it."""
        return Batch(self.images[:0], self.label_B[:0], self.index_B[:0])


class Images(Protocol):
    """A set of labelled images that can be streamed."""

    difficulty: Tensor | None
    label_N: Tensor

    def __len__(self) -> int: ...

    def stream(self, orders: Iterable[tuple[Tensor, int]]) -> Iterator[Batch]:
        """A batch for each (index int64 (B,), augmentation seed)."""
        ...

    def fingerprint(self) -> str:
        """Hash of what is in the set."""
        ...


@dataclass(frozen=True)
class Data:
    """Three splits of one data set. ``image_shape`` is (3, H, W)."""

    name: str
    train: Images
    validation: Images
    test: Images
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]

    def split(self, name: str) -> Images:
        """The split of that name: train, validation or test."""
        if name not in ("train", "validation", "test"):
            raise UserError(f"split must be train, validation or test, got {name!r}")
        split: Images = getattr(self, name)
        return split


def shuffled(length: int, batch_size: int, seed: int, start: int = 0) -> Iterator[tuple[Tensor, int]]:
    """Endless batches of indices: one random order of the set after another, from batch number ``start`` on."""
    number, epoch, order = start, -1, torch.empty(0, dtype=torch.int64)
    while True:
        position, parts, needed = number * batch_size, [], batch_size
        while needed:
            if position // length != epoch:
                epoch = position // length
                order = torch.randperm(length, generator=torch.Generator().manual_seed(_mix(seed, epoch)))
            part = order[position % length :][:needed]
            parts.append(part)
            position += len(part)
            needed -= len(part)
        yield torch.cat(parts), _mix(seed, -1 - number)
        number += 1


def sequential(length: int, batch_size: int, start: int = 0) -> Iterator[tuple[Tensor, int]]:
    """Each index once, in order; the last batch may be short."""
    for low in range(start * batch_size, length, batch_size):
        yield torch.arange(low, min(low + batch_size, length)), 0


def _mix(*numbers: int) -> int:
    """A 63-bit seed that depends on every number."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little") >> 1


class Feed:
    """Batches of a set, one at a time. ``cursor``, the number of the batch shown, is all the state there is.

    Args:
        order: "shuffled" goes on without end; "sequential" shows each image once, with a short last batch and then
            an empty one.
    """

    def __init__(self, images: Images, batch_size: int, order: Order = "shuffled", seed: int = 0) -> None:
        if batch_size < 1:
            raise UserError(f"a batch must hold at least 1 image, got {batch_size}")
        if order not in ("shuffled", "sequential"):
            raise UserError(f"order must be shuffled or sequential, got {order!r}")
        self.images, self.batch_size, self.order, self.seed = images, batch_size, order, seed
        self.seek(0)

    def seek(self, cursor: int, seed: int | None = None) -> None:
        """Show batch number ``cursor`` of the order (of that seed)."""
        self.seed = self.seed if seed is None else seed
        self.cursor = cursor
        if self.order == "shuffled":
            orders = shuffled(len(self.images), self.batch_size, self.seed, cursor)
        else:
            orders = sequential(len(self.images), self.batch_size, cursor)
        self._stream = self.images.stream(orders)
        self.batch = next(self._stream)

    def advance(self) -> Batch:
        """Show the next batch and return it; an empty one after the last of a sequential order."""
        self.cursor += 1
        self.batch = next(self._stream, self.batch.empty())
        return self.batch


Augment = Callable[[Tensor, torch.Generator], Tensor]


def crop_and_flip(images: Tensor, generator: torch.Generator, pad: int = 4) -> Tensor:
    """Random crops of zero-padded images and random mirror images, each image its own; uint8 in, uint8 out."""
    B, _, H, W = images.shape
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
    dy, dx = torch.randint(0, 2 * pad + 1, (2, B, 1), generator=generator)
    columns = torch.arange(W).expand(B, W)
    flip = torch.rand(B, 1, generator=generator) < 0.5
    columns = torch.where(flip, columns.flip(1), columns) + dx
    rows = torch.arange(H) + dy
    device = images.device
    batch = torch.arange(B, device=device).view(B, 1, 1)
    return padded.permute(0, 2, 3, 1)[batch, rows.to(device)[:, :, None], columns.to(device)[:, None, :]].permute(
        0, 3, 1, 2
    )


class TensorImages:
    """A set that lives on the device: images uint8 (N, 3, H, W), labels int64 (N,)."""

    def __init__(
        self,
        images: Tensor,
        label_N: Tensor,
        difficulty: Tensor | None = None,
        augment: Augment | None = None,
        recipe: str | None = None,
    ) -> None:
        self.images = images
        self.label_N = label_N
        self.difficulty = difficulty
        self.augment = augment
        self.recipe = recipe  # of rendered images, whose last bit may differ between machines

    def __len__(self) -> int:
        return len(self.label_N)

    def stream(self, orders: Iterable[tuple[Tensor, int]]) -> Iterator[Batch]:
        for index_B, seed in orders:
            on_device = index_B.to(self.images.device)
            images = self.images[on_device]
            if self.augment is not None:
                images = self.augment(images, torch.Generator().manual_seed(seed))
            yield Batch(images, self.label_N[on_device], index_B)

    def fingerprint(self) -> str:
        content = self.recipe.encode() if self.recipe else self.images.cpu().contiguous().numpy().tobytes()
        digest = hashlib.sha256(content)
        digest.update(self.label_N.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


class FileImages:
    """A set read from image files as it is needed, by ``workers`` processes."""

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
        image = read_image(self.files[index], self.size, _mix(seed, index) if self.augment else None)
        return torch.from_numpy(image).permute(2, 0, 1), int(self.label_N[index]), index

    def stream(self, orders: Iterable[tuple[Tensor, int]]) -> Iterator[Batch]:
        batches: Any = ([(int(i), seed) for i in index_B] for index_B, seed in orders)
        loader: Any = torch.utils.data.DataLoader(
            self,  # type: ignore[arg-type]
            batch_sampler=batches,
            num_workers=self.workers,
            generator=torch.Generator(),  # its own, so that the global one is left alone
        )
        try:
            for images, label_B, index_B in loader:
                yield Batch(images.to(self.device), label_B.to(self.device), index_B)
        except UserError as error:  # a worker's arrives with its traceback in front
            raise UserError(str(error).strip().splitlines()[-1].removeprefix("policyskip.errors.UserError: ")) from None

    def fingerprint(self) -> str:
        files = zip(self.files, self.label_N.tolist(), strict=True)
        names = "\n".join(f"{label} {file.parent.name}/{file.name} {file.stat().st_size}" for file, label in files)
        names += f" at {self.size}"
        return hashlib.sha256(names.encode()).hexdigest()[:16]


def read_image(file: Path, size: int | None, augment_seed: int | None = None) -> np.ndarray:
    """An image file as uint8 (H, W, 3).

    Args:
        size: None leaves the image as it is. Otherwise the short side is scaled to 256/224 of ``size`` and the centre
            cut out (evaluation), or, with ``augment_seed``, a random part, scaled and perhaps mirrored (training).

    Raises:
        UserError: the file is not a readable image.
    """
    from PIL import Image
    from torchvision.transforms import v2

    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except Exception as error:
        raise UserError(f"cannot read the image {file}: {error}") from error
    if size is None or (image.size == (size, size) and augment_seed is None):
        return np.array(image)

    if augment_seed is None:
        return np.array(v2.Compose([v2.Resize(size * 256 // 224), v2.CenterCrop(size)])(image))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(augment_seed)
        return np.array(v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()])(image))


def digits(device: torch.device, train: int = 20000, validation: int = 2000, test: int = 4000) -> Data:
    """Cluttered digits (see ``digits.py``): any number of images, made on the spot in seconds."""
    from policyskip.digits import VERSION, render_digits

    splits = {}
    for split, count in {"train": train, "validation": validation, "test": test}.items():
        if count < 1:
            raise UserError(f"data.{split} must be at least 1 image, got {count}")
        images, label_N, difficulty = render_digits(split, count, seed=0)
        recipe = f"digits {VERSION} {split} {count}"
        splits[split] = TensorImages(images.to(device), label_N.to(device), difficulty, recipe=recipe)
    return Data("digits", **splits, classes=tuple("0123456789"), image_shape=(3, 20, 20))


TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashion_mnist": "FashionMNIST", "mnist": "MNIST"}


def torchvision_data(
    device: torch.device,
    name: str,
    root: str = "data",
    validation: float = 0.1,
    augment: bool = True,
    download: bool = True,
) -> Data:
    """One of torchvision's small sets, downloaded by it into ``root`` when it is not there.

    ``validation`` is the share of the training images that is held out.

    Raises:
        UserError: unknown name, or the files are not there and cannot be downloaded.
    """
    if name not in TORCHVISION:
        raise UserError(f"data.name must be one of {', '.join(TORCHVISION)}, got {name!r}")
    import torchvision.datasets

    make = getattr(torchvision.datasets, TORCHVISION[name])
    try:
        train, test = (make(root, train=is_train, download=download) for is_train in (True, False))
    except Exception as error:  # torchvision raises RuntimeError, URLError, OSError, …
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{name} is not in {Path(root).resolve()} and could not be downloaded ({reason}); "
            f"put torchvision's files there, say data.root=FOLDER, or use data=digits"
        ) from error
    return _in_memory(
        name,
        *(_as_images(train.data), torch.as_tensor(train.targets), _as_images(test.data), torch.as_tensor(test.targets)),
        classes=tuple(str(c) for c in train.classes),
        validation=validation,
        augment=crop_and_flip if augment else None,
        device=device,
    )


def _as_images(pixels: Any) -> Tensor:
    """(N, H, W) or (N, H, W, 3) pixels to uint8 (N, 3, H, W)."""
    images = torch.as_tensor(pixels)
    if images.dim() == 3:
        return images.unsqueeze(1).expand(-1, 3, -1, -1).contiguous()
    return images.permute(0, 3, 1, 2).contiguous()


def _in_memory(
    name: str,
    train_images: Tensor,
    train_labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    classes: tuple[str, ...],
    validation: float,
    augment: Augment | None,
    device: torch.device,
) -> Data:
    held_out, kept = hold_out(len(train_labels), validation)
    images, labels = train_images.to(device), train_labels.long().to(device)
    return Data(
        name,
        train=TensorImages(images[kept.to(device)], labels[kept.to(device)], augment=augment),
        validation=TensorImages(images[held_out.to(device)], labels[held_out.to(device)]),
        test=TensorImages(test_images.to(device), test_labels.long().to(device)),
        classes=classes,
        image_shape=(3, *train_images.shape[2:]),
    )


def hold_out(count: int, share: float) -> tuple[Tensor, Tensor]:
    """Indices (validation, training), the same on every call; ``share`` of them is held out, at least one each."""
    if not 0 < share < 1:
        raise UserError(f"data.validation must be a share between 0 and 1, got {share}")
    if count < 2:
        raise UserError(f"the training split needs at least 2 images, one of them for validation; it has {count}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED))
    cut = min(max(1, round(count * share)), count - 1)
    return order[:cut].sort().values, order[cut:].sort().values


def imagefolder(
    device: torch.device,
    root: str,
    image_size: int | None = None,
    validation: float = 0.1,
    augment: bool = True,
    workers: int = 2,
    name: str = "imagefolder",
) -> Data:
    """Folders of images: ``root/train/<class>/*``, ``root/test/<class>/*`` (or ``root/val``, as ImageNet has it).

    Args:
        image_size: height and width that the network sees; None takes the files as they are, if all are of one size.
        validation: share of ``root/train`` that is held out.
        augment: random crops and mirror images in training.
        workers: processes that decode images when the set is too large for memory.

    Raises:
        UserError: a folder is missing or empty, classes differ between the splits or are too few, or an image is bad.
    """
    folder = Path(root).expanduser()
    test_folder = next((folder / split for split in ("test", "val") if (folder / split).is_dir()), folder / "test")
    classes, train_files, train_labels = _list_images(folder / "train")
    test_classes, test_files, test_labels = _list_images(test_folder)
    if classes != test_classes:
        odd = sorted(set(classes) ^ set(test_classes))
        raise UserError(
            f"{folder / 'train'} and {test_folder} must have the same classes; they differ in {', '.join(odd[:5])}"
        )
    if len(classes) < 2:
        raise UserError(f"{folder / 'train'} has one class, {classes[0]}; at least two are needed")
    first = read_image(train_files[0], None)
    size = image_size or (first.shape[0] if first.shape[0] == first.shape[1] else None)
    if size is None:
        raise UserError(f"{train_files[0]} is {first.shape[1]}×{first.shape[0]}; say data.image_size=N, such as 224")
    if (len(train_files) + len(test_files)) * 3 * size * size <= IN_MEMORY_BYTES and first.shape[:2] == (size, size):
        return _in_memory(
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


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


def _list_images(folder: Path) -> tuple[tuple[str, ...], list[Path], Tensor]:
    """Class names, files and labels int64 (N,) of ``folder/<class>/*``, in order of name."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; data.root must hold train/<class>/* and test/<class>/*")
    classes = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))
    if not classes:
        raise UserError(f"{folder} holds no class folders; it must look like {folder}/<class>/*.png")
    files, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(file for file in (folder / name).rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise UserError(f"the class folder {folder / name} holds no images ({', '.join(IMAGE_SUFFIXES)})")
        files += found
        labels += [label] * len(found)
    return classes, files, torch.tensor(labels)


def _decode(files: list[Path], size: int, scale_to: int | None) -> Tensor:
    """All files as uint8 (N, 3, size, size); those of another size are scaled, or refused when nobody asked for it."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor() as pool:
        pixels = list(pool.map(lambda file: read_image(file, scale_to), files))
    for file, image in zip(files, pixels):
        if image.shape != (size, size, 3):
            found = f"{image.shape[1]}×{image.shape[0]}"
            raise UserError(f"{file} is {found}, others are {size}×{size}; say data.image_size={size} to scale them")
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


def load_data(name: str, device: torch.device, **options: Any) -> Data:
    """A data set by name: digits, one of torchvision's small sets, or imagefolder."""
    if name == "digits":
        return digits(device, **options)
    if name == "imagefolder":
        return imagefolder(device, **options)
    return torchvision_data(device, name, **options)
