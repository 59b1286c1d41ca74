"""Fashion-MNIST and MNIST from the four idx files that their authors publish, and Debian packages."""

from __future__ import annotations

import gzip
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision

from policyskip.data import load_data
from policyskip.errors import UserError

CPU = torch.device("cpu")


def idx(path: Path, values: np.ndarray) -> None:
    """Write values as an idx file of bytes, packed with gzip if the name says so."""
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    content = header + values.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def idx_files(tmp_path):
    """Six training and two test images of 5×4 pixels, whose first pixel is their number; some files are packed."""
    for part, count, packed in (("train", 6, ".gz"), ("t10k", 2, "")):
        pixels = np.arange(count, dtype=np.uint8)[:, None, None].repeat(5, 1).repeat(4, 2)
        pixels[:, 4, 0] = 77  # the last row
        idx(tmp_path / f"{part}-images-idx3-ubyte{packed}", pixels)
        idx(tmp_path / f"{part}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10)
    return tmp_path


def test_idx_files_are_read_as_they_lie_in_a_folder(idx_files):
    data = load_data("fashion_mnist", CPU, root=str(idx_files), validation=0.34)
    assert (data.name, data.image_shape, data.classes[9]) == ("fashion_mnist", (3, 5, 4), "Ankle boot")
    assert [len(data.train), len(data.validation), len(data.test)] == [4, 2, 2]
    for images in (data.train, data.validation, data.test):
        assert torch.equal(images.images[:, 2, 3, 3].long(), images.label_N)
        assert (images.images[:, 1, 4, 0] == 77).all()


def test_idx_files_that_are_missing_or_damaged_are_named(idx_files):
    labels = idx_files / "t10k-labels-idx1-ubyte"
    for content, problem in {
        b"": "no idx file of bytes with 1 dimensions",
        bytes([0, 0, 8, 1, 0, 0, 0, 9, 1, 2]): r"it says \(9,\), and holds 2 bytes",
        bytes([0, 0, 8, 1, 0, 0, 0, 1, 1]): "2 images and 1 labels for the split test",
        bytes([0, 0, 8, 1, 0, 0, 0, 2, 9, 10]): "a label of 10 for the split test; there are ten classes, 0 to 9",
    }.items():
        labels.write_bytes(content)
        with pytest.raises(UserError, match=problem):
            load_data("mnist", CPU, root=str(idx_files))
    labels.unlink()
    with pytest.raises(UserError, match="neither t10k-labels-idx1-ubyte nor t10k-labels-idx1-ubyte.gz"):
        load_data("mnist", CPU, root=str(idx_files))


def test_idx_files_of_images_of_two_sizes_are_refused(idx_files):
    idx(idx_files / "t10k-images-idx3-ubyte", np.zeros((2, 7, 7), np.uint8))
    with pytest.raises(UserError, match="training and the test images of mnist in .* are of different sizes"):
        load_data("mnist", CPU, root=str(idx_files))


def test_fashion_mnist_that_is_not_there_is_one_line_that_names_debians_package(monkeypatch, tmp_path):
    def fails(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision, "datasets", SimpleNamespace(FashionMNIST=fails))
    with pytest.raises(UserError, match="dataset-fashion-mnist puts it into /usr/share/datasets/fashion-mnist"):
        load_data("fashion_mnist", CPU, root=str(tmp_path))
