"""Image files as they come: read right, refused by name, or skipped and counted."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from policyskip.data import imagefolder, read_image
from policyskip.errors import UserError

CPU = torch.device("cpu")
RED_AND_BLUE = np.array([[[255, 0, 0], [0, 0, 255]]] * 2, np.uint8).repeat(4, 0).repeat(4, 1)  # 8×8


def written(folder: Path, mode: str, suffix: str = ".png") -> Path:
    """The picture in a mode of Pillow's."""
    path = folder / f"{mode}{suffix}"
    Image.fromarray(RED_AND_BLUE).convert(mode).save(path, **({"quality": 100} if suffix == ".jpg" else {}))
    return path


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("RGB", ".png"),
        ("P", ".png"),
        ("P", ".gif"),
        ("RGBA", ".png"),
        ("CMYK", ".tif"),
        ("CMYK", ".jpg"),
        ("RGB", ".bmp"),
    ],
)
def test_every_way_to_store_colours_gives_the_same_picture(mode, suffix, tmp_path):
    image = read_image(written(tmp_path, mode, suffix), None)
    assert image.dtype == np.uint8 and image.shape == (8, 8, 3)
    tolerance = 40 if suffix == ".jpg" else 0
    assert np.abs(image.astype(int) - RED_AND_BLUE).max() <= tolerance


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_grey_is_the_same_in_every_channel(mode, tmp_path):
    image = read_image(written(tmp_path, mode), None)
    assert image.shape == (8, 8, 3) and (image == image[..., :1]).all()


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_sixteen_bits_keep_their_upper_eight(suffix, tmp_path):
    """Pillow's own conversion would make everything above 255 white."""
    values = (np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / f"deep{suffix}")
    np.testing.assert_array_equal(read_image(tmp_path / f"deep{suffix}", None), (values >> 8)[..., None].repeat(3, 2))


def huge(path: Path, side: int) -> None:
    """A PNG of a few bytes that claims to be ``side``×``side``."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    ends = chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + ends)


def spoil(path: Path, how: str) -> None:
    whole = path.read_bytes()
    if how == "cut short":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("no image")
    elif how == "floating point":
        Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(path, format="TIFF")
    elif how == "a folder":
        path.unlink()
        path.mkdir()
    else:
        huge(path, {"large": 9000, "larger": 12000, "huge": 60000}[how])


SPOILT = ["cut short", "empty", "text", "floating point", "a folder", "large", "larger", "huge"]


@pytest.mark.parametrize("how", SPOILT)
def test_what_cannot_be_read_is_refused_by_name(how, tmp_path):
    path = written(tmp_path, "RGB")
    spoil(path, how)
    with pytest.raises(UserError, match=r"cannot read the image .*RGB\.png: ") as refused:
        read_image(path, None)
    assert "\n" not in str(refused.value)


def write_folders(root: Path, count: int = 10) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8), (10 * i, 0, 0)).save(root / split / name / f"{i:02}.png")


@pytest.mark.parametrize("image_size", [None, 6], ids=["in memory", "from files"])
def test_damaged_files_are_skipped_and_counted_with_skip_damaged(image_size, tmp_path, capsys):
    write_folders(tmp_path)
    for number, how in enumerate(SPOILT):
        spoil(tmp_path / "train" / "cat" / f"{number:02}.png", how)
    with pytest.raises(UserError, match=r"cannot read the image .*cat.00\.png"):
        data = imagefolder(CPU, str(tmp_path), image_size, workers=0)
        list(data.train.stream([(torch.arange(len(data.train)), 0)]))
    capsys.readouterr()
    data = imagefolder(CPU, str(tmp_path), image_size, workers=0, skip_damaged=True)
    assert len(data.train) + len(data.validation) == 12 and len(data.test) == 20
    list(data.train.stream([(torch.arange(len(data.train)), 0)]))
    (line,) = capsys.readouterr().out.splitlines()
    assert f"7 of 9 images in {tmp_path / 'train' / 'cat'} are skipped; the first: cannot read the image" in line


def test_a_class_of_damaged_files_alone_is_refused(tmp_path):
    write_folders(tmp_path, count=2)
    for file in (tmp_path / "test" / "dog").iterdir():
        file.write_bytes(b"")
    with pytest.raises(UserError, match=r"test/dog holds no images that can be read \(cannot read the image"):
        imagefolder(CPU, str(tmp_path), workers=0, skip_damaged=True)
