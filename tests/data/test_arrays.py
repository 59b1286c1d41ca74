"""Data that are in memory, or in another library's data set: converted, divided and checked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from policyskip.data import (
    Data,
    Feed,
    TensorImages,
    batch_at,
    check_images,
    crop_and_flip,
    from_arrays,
    from_dataset,
    sequential,
)
from policyskip.data import datasets as datasets_module
from policyskip.data.datasets import DatasetImages
from policyskip.errors import UserError

LABELS = np.arange(40) % 2
GREY = np.random.default_rng(0).integers(0, 256, (40, 8, 9), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (40, 8, 9, 3), dtype=np.uint8)
PAIRS = [(Image.fromarray(image), int(label)) for image, label in zip(COLOUR, LABELS, strict=True)]
FIRST = np.ascontiguousarray(COLOUR.transpose(0, 3, 1, 2))


def rows(data: Data) -> dict[bytes, int]:
    """Every image of the three splits, as bytes, with its label."""
    found = {}
    for split in ("train", "validation", "test"):
        images = data.split(split)
        for batch in images.stream(sequential(len(images), 7)):
            found |= {image.numpy().tobytes(): int(label) for image, label in zip(batch.images, batch.label_B)}
    return found


# Arrays


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (GREY, GREY[:, None].repeat(3, 1)),
        (GREY[..., None], GREY[:, None].repeat(3, 1)),
        (GREY[:, None], GREY[:, None].repeat(3, 1)),
        (COLOUR, FIRST),
        (FIRST, FIRST),
        (torch.from_numpy(FIRST), FIRST),
        (list(COLOUR), FIRST),
        (COLOUR[:, ::-1], FIRST[:, :, ::-1]),
    ],
    ids=["grey", "grey, last", "grey, first", "last", "first", "torch", "list", "a view"],
)
def test_arrays_of_every_layout_are_the_same_images_with_their_labels(images, expected):
    data = from_arrays(images, LABELS)
    assert [len(data.split(name)) for name in ("train", "validation", "test")] == [29, 3, 8]
    assert data.image_shape == (3, 8, 9) and data.classes == ("0", "1") and data.name == "arrays"
    assert rows(data) == {image.tobytes(): int(label) for image, label in zip(expected, LABELS)}


def test_shares_are_held_out_the_same_on_every_call_and_pairs_are_taken_as_they_are():
    torch.manual_seed(0)
    one = from_arrays(GREY, LABELS)
    torch.manual_seed(1)
    two = from_arrays(GREY, torch.from_numpy(LABELS).int())
    for split in ("train", "validation", "test"):
        assert one.split(split).fingerprint() == two.split(split).fingerprint()
    given = from_arrays(GREY, LABELS, test=(GREY[:5], [1] * 5), validation=[GREY[:4], LABELS[:4].reshape(-1, 1)])
    assert [len(given.split(name)) for name in ("train", "validation", "test")] == [40, 4, 5]
    assert given.test.label_N.tolist() == [1] * 5 and given.validation.label_N.tolist() == [0, 1, 0, 1]


def test_training_images_alone_are_augmented_and_only_if_asked():
    data = from_arrays(GREY, LABELS, augment=True, classes=["cat", "dog"], name="pets")
    assert data.train.augment is crop_and_flip and data.test.augment is None and data.validation.augment is None
    assert data.classes == ("cat", "dog") and data.name == "pets" and from_arrays(GREY, LABELS).train.augment is None


WRONG_ARRAYS: dict[str, tuple[dict[str, Any], str]] = {
    "floats": (
        {"images": GREY / 255},
        r"uint8, 0 to 255, got an ndarray of float64 \(40, 8, 9\): for values from 0 to 1",
    ),
    "whole numbers": ({"images": GREY.astype(int)}, "must be uint8, 0 to 255, got an ndarray of int64"),
    "two readings": ({"images": FIRST[..., :3]}, r"\(40, 3, 8, 3\) can be read in two ways; say channels='first' or"),
    "four channels": (
        {"images": np.zeros((40, 8, 9, 4), np.uint8)},
        r"must be of shape \(N, H, W\), .*\(40, 8, 9, 4\)",
    ),
    "one image": ({"images": COLOUR[0]}, r"must be of shape .*, got an ndarray of uint8 \(8, 9, 3\)"),
    "no image": ({"images": GREY[:0], "labels": []}, r"must be of shape .*\(0, 8, 9\)"),
    "one pixel": ({"images": np.zeros((40, 1, 1), np.uint8)}, "must be of shape"),
    "three pixels": (
        {"images": np.zeros((40, 3, 2), np.uint8)},
        r"images of arrays have 2×3 pixels; .* at least 4×4 pixels",
    ),
    "None": ({"images": None}, "train images must be an array, got None"),
    "text": ({"images": "mnist"}, "train images must be an array, got 'mnist'"),
    "ragged": ({"images": [[1], [1, 2]]}, "must be an array of numbers, got a list of length 2"),
    "meta": ({"images": torch.from_numpy(GREY).to("meta")}, "must be a dense array"),
    "sparse": ({"images": torch.from_numpy(GREY).to_sparse()}, "must be a dense array"),
    "10⁹ images": (
        {"images": np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), (10**9, 32, 32), (0, 0, 0))},
        r"would take 1024\.0 GB, more than 8\.6 GB; policyskip\.data\.from_dataset reads",
    ),
    "channels": ({"channels": "middle"}, "channels must be one of first, last, got 'middle'"),
    "too few labels": ({"labels": LABELS[:39]}, "there are 40 train images and 39 labels"),
    "labels from 1": ({"labels": LABELS + 1}, "labels must be 0, 1, 2, …, each with an image, got 1, 2, the largest 2"),
    "negative labels": ({"labels": LABELS - 1, "classes": 3}, "labels must be 0 to 2 for 3 classes, got -1 to 0"),
    "huge labels": ({"labels": LABELS * 10**12}, "got 0, 1000000000000, the largest 1000000000000"),
    "labels out of range": (
        {"labels": LABELS * 2, "classes": ["a", "b"]},
        "labels must be 0 to 1 for 2 classes, got 0 to 2",
    ),
    "float labels": (
        {"labels": LABELS * 1.0},
        r"whole numbers \(N,\), got .*float64 \(40,\); such as labels\.astype\(int\)",
    ),
    "text labels": ({"labels": ["cat"] * 40}, "train labels must be an array of numbers, got a list of length 40"),
    "one-hot labels": ({"labels": np.eye(2, dtype=int)[LABELS]}, r"labels\.argmax\(1\) numbers the classes"),
    "one class": ({"labels": LABELS * 0}, r"classes must be two or more, with names that differ, got \('0',\)"),
    "two names alike": ({"classes": ["a", "a"]}, "with names that differ"),
    "classes of text": ({"classes": "ab"}, "classes must be names or a number, got 'ab'"),
    "10⁹ classes": ({"classes": 10**9}, "classes must be at most 100000, got 1000000000"),
    "a share of 1": ({"test": 1.0}, r"test must be a share above 0 and below 1, or images of its own; got 1\.0"),
    "a share of NaN": ({"validation": float("nan")}, "validation must be a share above 0 and below 1.* got nan"),
    "a share of 10⁴⁰⁰": ({"test": 10**400}, "test must be a share above 0 and below 1.* got 1000"),
    "no test": ({"test": None}, r"test must be a pair \(images, labels\) or a share, got None"),
    "test without labels": ({"test": GREY}, r"test must be a pair .*, got an ndarray of uint8 \(40, 8, 9\)"),
    "test of another size": (
        {"test": (GREY[:, :7], LABELS)},
        r"test images are \(3, 7, 9\), training images \(3, 8, 9\)",
    ),
    "a device": ({"device": ["cpu"]}, "device must be auto, cpu, cuda or cuda:N, got"),
    "a device without numbers": ({"device": "meta"}, "device must be auto, cpu, cuda or cuda:N, got 'meta'"),
    "augment of an array": ({"augment": GREY}, r"augment must be of type bool, got an ndarray of uint8 \(40, 8, 9\)"),
    "two images": ({"images": GREY[:2], "labels": [0, 1]}, "2 images are too few for training and test and validation"),
}


@pytest.mark.parametrize(("given", "message"), WRONG_ARRAYS.values(), ids=WRONG_ARRAYS.keys())
def test_wrong_arrays_are_refused_in_one_line(given, message):
    with pytest.raises(UserError, match=message) as refused:
        from_arrays(**{"images": GREY, "labels": LABELS, **given})
    assert "\n" not in str(refused.value)


# Data sets of other libraries


class Declared(list):
    """What torchvision's sets declare beside their items."""

    targets, classes = LABELS.tolist(), ["no", "yes"]


class Changed(Declared):
    """A set that gives other labels than it declares, as torchvision's do with a target_transform."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image, 1 - label


class Columns(list):
    """What Hugging Face's sets have beside their items."""

    column_names, features = ("img", "label"), {"label": type("ClassLabel", (), {"names": ["no", "yes"]})}

    def __getitem__(self, key):
        return [item["label"] for item in self] if key == "label" else super().__getitem__(key)


DATASETS = {
    "pairs": (PAIRS, {}, ("0", "1")),
    "tensors": (TensorDataset(torch.from_numpy(FIRST), torch.from_numpy(LABELS)), {}, ("0", "1")),
    "dictionaries": ([{"img": image, "label": label} for image, label in PAIRS], {}, ("0", "1")),
    "own keys": (
        [{"x": image, "y": label} for image, label in PAIRS],
        {"image_key": "x", "label_key": "y"},
        ("0", "1"),
    ),
    "torchvision": (Declared(PAIRS), {}, ("no", "yes")),
    "Hugging Face": (Columns([{"img": image, "label": label} for image, label in PAIRS]), {}, ("no", "yes")),
}


@pytest.mark.parametrize("bytes_in_memory", [2**30, 0], ids=["in memory", "when needed"])
@pytest.mark.parametrize(("dataset", "options", "classes"), DATASETS.values(), ids=DATASETS.keys())
def test_data_sets_of_others_are_the_same_images_as_arrays(dataset, options, classes, bytes_in_memory, monkeypatch):
    monkeypatch.setattr(datasets_module, "IN_MEMORY_BYTES", bytes_in_memory)
    data, arrays = from_dataset(dataset, **options), from_arrays(COLOUR, LABELS)
    assert isinstance(data.train, TensorImages if bytes_in_memory else DatasetImages)
    assert data.classes == classes and data.image_shape == (3, 8, 9)
    for split in ("train", "validation", "test"):
        one, other = (
            next(iter(kind.split(split).stream([(torch.arange(len(kind.split(split))), 0)]))) for kind in (data, arrays)
        )
        assert torch.equal(one.images, other.images) and torch.equal(one.label_B, other.label_B)


def test_declared_labels_are_believed_only_if_items_say_the_same(monkeypatch, capsys):
    monkeypatch.setattr(datasets_module, "IN_MEMORY_BYTES", 0)
    assert torch.equal(from_dataset(Changed(PAIRS)).test.label_N, 1 - from_dataset(Declared(PAIRS)).test.label_N)
    assert capsys.readouterr().out == "reading the labels of 40 train images, one by one\n"


def test_images_that_are_read_when_needed_are_augmented_by_batch_and_come_again(monkeypatch):
    monkeypatch.setattr(datasets_module, "IN_MEMORY_BYTES", 0)
    data = from_dataset(Declared(PAIRS), augment=True)
    feed = Feed(data.train, 6, seed=1)
    shown = [feed.batch, feed.advance()]
    assert not torch.equal(feed.batch.images, batch_at(data.train.plain(), feed.batch.index_B).images)
    feed.seek(1)
    assert torch.equal(feed.batch.images, shown[1].images)
    assert data.train.fingerprint() == data.train.plain().fingerprint() != data.test.fingerprint()


def test_a_random_transform_is_found(capsys):
    class Random(list):
        def __getitem__(self, index):
            return np.random.default_rng().integers(0, 256, (8, 8, 3), dtype=np.uint8), index % 2

    from_dataset(Random(PAIRS[:9]))
    assert "warning: image 0 of train differs when it is read again" in capsys.readouterr().out


class Failing(list):
    def __getitem__(self, index):
        raise KeyError("gone\nand more")


WRONG_DATASETS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "None": (None, {}, "train must have a length and give an item for a number, got None"),
    "an iterator": (iter(PAIRS), {}, r"of what can only be iterated over, list\(…\) makes such a set"),
    "splits": ({"train": PAIRS, "test": PAIRS}, {}, r"a data set is one split, got a dict of 'train', 'test'; from_dataset\("),
    "nothing": ([], {}, "train must hold at least one image, got none"),
    "images alone": ([image for image, _ in PAIRS], {}, r"item 0 of train must be a pair \(image, label\) or a dictionary"),
    "other keys": ([{"x": 1, "y": 2}], {}, "item 0 of train has no image or img or pixel_values, but 'x', 'y'; say image_key="),
    "ToTensor": (TensorDataset(torch.rand(4, 3, 8, 8), torch.arange(4)), {}, "image 0 of train must be uint8.*leave .*ToTensor out"),
    "text": ([("x", 1)], {}, "image 0 of train must be"),
    "text as label": ([(image, "cat") for image, _ in PAIRS], {}, "label 0 of train must be a whole number from 0 on, got 'cat'"),
    "a fraction as label": ([(image, 0.5) for image, _ in PAIRS], {}, r"must be a whole number from 0 on, got 0\.5"),
    "another size": ([*PAIRS, (Image.new("RGB", (5, 6)), 1)], {}, "image 40 of train is 5×6, the first 9×8; image_size=N"),
    "floats of Pillow's": ([(Image.new("F", (8, 8)), 1)], {}, "image 0 of train cannot be read: its values are not of 8"),
    "what fails": (Failing(PAIRS), {}, "item 0 of train cannot be read: KeyError: 'gone"),
    "a bad size": (PAIRS, {"image_size": -5}, "image_size must be a whole number from 4 to 8192, .* got -5"),
    "a device": (PAIRS, {"device": 3.5}, "device must be auto, cpu, cuda or cuda:N, got '3.5'"),
    "a list as key": (PAIRS, {"image_key": ["image"]}, r"image_key must be of type str \| None, got a list of length 1"),
    "augment of text": (PAIRS, {"augment": "yes"}, "augment must be of type bool, got 'yes'"),
    "no test": (PAIRS, {"test": "x"}, "test must have a length and give an item for a number, got 'x'"),
}  # fmt: skip


@pytest.mark.parametrize(("dataset", "options", "message"), WRONG_DATASETS.values(), ids=WRONG_DATASETS.keys())
def test_wrong_data_sets_are_refused_in_one_line(dataset, options, message):
    with pytest.raises(UserError, match=message) as refused:
        from_dataset(dataset, **options)
    assert "\n" not in str(refused.value)


def test_images_of_many_sizes_are_scaled():
    odd = [*PAIRS, (Image.new("L", (30, 12)), 1), (np.zeros((3, 20, 50), np.uint8), 0)]
    assert from_dataset(odd, image_size=6).image_shape == (3, 6, 6)


# Sets of images


PIXELS = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
WRONG_IMAGES = {
    "floats": (PIXELS.float(), torch.zeros(4).long(), "images must be uint8, 0 to 255, got a Tensor of float32"),
    "grey": (
        PIXELS[:, 0],
        torch.zeros(4).long(),
        r"tensor of uint8 \(N, 3, H, W\), got .*; policyskip\.data\.from_arrays",
    ),
    "an array": (PIXELS.numpy(), torch.zeros(4).long(), "images must be a tensor of uint8"),
    "meta": (PIXELS.to("meta"), torch.zeros(4).long(), "images must be a tensor of uint8"),
    "too few labels": (
        PIXELS,
        torch.zeros(3).long(),
        r"labels must be a tensor of int64 \(4,\), one for each image, got",
    ),
    "float labels": (PIXELS, torch.zeros(4), r"labels must be a tensor of int64 \(4,\)"),
    "a list of labels": (PIXELS, [0] * 4, r"labels must be a tensor of int64 \(4,\), .* got a list of length 4"),
    "negative labels": (PIXELS, torch.tensor([0, 1, -1, 0]), "labels must not be negative, got -1"),
}


@pytest.mark.parametrize(("images", "labels", "message"), WRONG_IMAGES.values(), ids=WRONG_IMAGES.keys())
def test_a_set_is_made_of_uint8_images_and_their_labels(images, labels, message):
    with pytest.raises(UserError, match=message):
        TensorImages(images, labels)
    with pytest.raises(UserError, match=r"difficulty must be a tensor of float32 \(4,\), or None"):
        TensorImages(PIXELS, torch.zeros(4).long(), torch.zeros(3))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (GREY, r"from_arrays\(images, labels\)\.train is one\), got an ndarray of uint8 \(40, 8, 9\)"),
        (PAIRS, r"from_dataset\(dataset\)\.train is one\), got a list of length 40"),
        ("digits", "got 'digits'"),
        (None, "got None"),
        (TensorImages, "got a type"),
        (from_arrays(GREY, LABELS), r"must be one split of the data, such as data\.train"),
        (TensorImages(PIXELS[:0], torch.zeros(0).long()), "must hold at least one image"),
    ],
)  # fmt: skip
def test_what_is_no_set_of_images_is_refused_with_what_makes_one(images, message):
    with pytest.raises(UserError, match=message) as refused:
        check_images(images)
    assert "\n" not in str(refused.value)
    check_images(from_arrays(GREY, LABELS).train)


def test_data_hold_images_that_networks_can_take():
    images = TensorImages(PIXELS, torch.arange(4))
    for wrong, message in (
        ({"train": GREY}, "train must be a policyskip.data.Images"),
        ({"classes": "ab"}, "classes must be names"),
        ({"classes": ("", "b")}, "classes must be names, .* 1 to 300 letters each"),  # policy.json has no such class
        ({"classes": ("a", "b" * 301)}, "classes must be names, .* 1 to 300 letters each"),
        (
            {"image_shape": (3, 1, 1)},
            r"the images of pets have 1×1 pixels; they must be \(3, H, W\), of at least 4×4 pixels",
        ),
    ):
        arguments = dict(name="pets", train=images, validation=images, test=images, classes=("a", "b"))
        with pytest.raises(UserError, match=message):
            Data(**{**arguments, "image_shape": (3, 8, 8), **wrong})
    with pytest.raises(UserError, match=r"data\.batch_size=1000000000000 images of 8×8 pixels are 192,000\.0 GB"):
        Data(**arguments, image_shape=(3, 8, 8)).check_batch(10**12)
