"""Folders of images as people have them: other endings, hidden files, numbers as names, files that are something else."""

from __future__ import annotations

import io
import os
import signal
import time
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from policyskip.data import Feed, imagefolder, read_image, sequential
from policyskip.data import workers as workers_module
from policyskip.data.files import FORMATS, IMAGE_SUFFIXES
from policyskip.data.workers import answers
from policyskip.errors import UserError

CPU = torch.device("cpu")
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n0 0 8 8 rectfill\nshowpage\n%%EOF\n"


def write_folders(root: Path, classes=("cat", "dog"), splits=("train", "test"), count: int = 3, size: int = 8) -> Path:
    """A folder of images; image i of class number c has the colour (10 · c, i, 0)."""
    for split in splits:
        for c, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (size, size), (10 * c, i, 0)).save(root / split / name / f"{i}.png")
    return root


def labels_by_colour(images) -> dict[int, int]:
    """The label of each class, by the number that its colour says."""
    [batch] = images.stream(sequential(len(images), len(images)))
    return dict(zip((batch.images[:, 0, 0, 0] // 10).tolist(), batch.label_B.tolist(), strict=True))


# Formats


def test_no_picture_starts_a_program(tmp_path, monkeypatch):
    """Pillow opens EPS files by calling gs, whatever their names say."""
    gs = tmp_path / "bin" / "gs"
    gs.parent.mkdir()
    gs.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{gs.parent}:{os.environ['PATH']}")
    (tmp_path / "0.png").write_bytes(EPS)
    with pytest.raises(UserError, match=r"0\.png: it is none of PNG, JPEG, MPO, BMP, .*, whatever its name says$"):
        read_image(tmp_path / "0.png", None)
    assert not (tmp_path / "started").exists()


@pytest.mark.filterwarnings("ignore:.* image format is deprecated:DeprecationWarning")
def test_every_format_that_pillow_writes_is_read_by_its_content_or_refused(tmp_path):
    """Those of the list are read under the name of another one; all others are refused."""
    Image.init()
    image, read = Image.new("RGB", (8, 8), (200, 10, 10)), set()
    for kind in sorted(set(Image.SAVE) & set(Image.OPEN)):
        buffer = io.BytesIO()  # rather than the path: where SPIDER is saved, Pillow takes its ending for SPIDER's
        try:
            image.save(buffer, format=kind)
        except (OSError, ValueError, KeyError):  # this format has no colours, or this Pillow no library for it
            continue
        (tmp_path / "0.bmp").write_bytes(buffer.getvalue())
        try:
            assert read_image(tmp_path / "0.bmp", None).shape == (8, 8, 3)
            read.add(kind)
        except UserError as error:
            assert kind not in FORMATS, (kind, error)
    assert {"PNG", "JPEG", "BMP", "GIF", "TIFF", "PPM"} <= read <= {*FORMATS, "DIB"}


@pytest.mark.parametrize("suffix", [".jfif", ".JPG", ".jpe", ".apng", ".dib"])
def test_every_usual_ending_of_images_counts(suffix, tmp_path):
    root = write_folders(tmp_path)
    for file in list((root / "train" / "cat").iterdir()):
        file.rename(file.with_suffix(suffix))
    assert suffix.lower() in IMAGE_SUFFIXES
    data = imagefolder(CPU, str(root))
    assert len(data.train) + len(data.validation) == 6


def test_a_pipe_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "0.png")
    with pytest.raises(UserError, match=r"0\.png: it is no file"):
        read_image(tmp_path / "0.png", None)


def test_the_orientation_of_a_camera_is_not_applied(tmp_path):
    image, exif = Image.new("RGB", (8, 4), (9, 9, 9)), Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "0.jpg", exif=exif)
    assert read_image(tmp_path / "0.jpg", None).shape == (4, 8, 3)


# What a folder holds


def test_what_is_left_out_is_counted_by_ending(tmp_path, capsys):
    root = write_folders(tmp_path)
    for name in (
        "train/cat/a.npy",
        "train/cat/b.npy",
        "train/dog/deep/readme",
        "train/labels.csv",
        "test/dog/[b]x.txt",
    ):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("no image")
    for name in ("train/.DS_Store", "train/cat/._0.png", "test/dog/.hidden.txt"):
        (root / name).write_text("hidden")
    (root / "train" / "dog" / "linked").symlink_to(root / "train")
    imagefolder(CPU, str(root))
    train, test = capsys.readouterr().out.splitlines()
    assert train.startswith(f"warning: 5 files of {root}/train are left out, which do not end as images do: 2 .npy, ")
    assert all(f"1 {ending}" in train for ending in ("readme", ".csv", "linked")) and "DS_Store" not in train
    assert test.endswith(f"1 .txt; the first: {root}/test/dog/[b]x.txt")


def test_names_that_begin_with_a_dot_are_left_out_everywhere(tmp_path, capsys):
    root = write_folders(tmp_path)
    for split in ("train", "test"):
        (root / split / ".ipynb_checkpoints").mkdir()
        (root / split / "cat" / ".ipynb_checkpoints").mkdir()
        for folder in (root / split / ".ipynb_checkpoints", root / split / "cat" / ".ipynb_checkpoints"):
            Image.new("RGB", (8, 8)).save(folder / "0.png")
        (root / split / "dog" / ".9.png").write_text("no image")
    data = imagefolder(CPU, str(root))
    assert data.classes == ("cat", "dog") and len(data.test) == 6 and not capsys.readouterr().out


@pytest.mark.parametrize("split", ["test", "val", "valid", "validation"])
def test_test_images_are_found_under_every_usual_name(split, tmp_path):
    assert len(imagefolder(CPU, str(write_folders(tmp_path, splits=("train", split)))).test) == 6


def test_a_second_folder_of_test_images_is_said_not_to_be_read(tmp_path, capsys):
    root = write_folders(tmp_path, splits=("train", "test", "val"))
    imagefolder(CPU, str(root))
    assert f"warning: val of {root} is not read: test holds the test images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "numbers", "text"),
    [
        (["1", "2", "10"], ("1", "2", "10"), ("1", "10", "2")),
        (["01", "2", "10"], ("01", "2", "10"), ("01", "10", "2")),
        (["1", "2", "ten"], ("1", "2", "ten"), ("1", "2", "ten")),
        (["n02", "n1", "n10"], ("n02", "n1", "n10"), ("n02", "n1", "n10")),
    ],
)
def test_class_folders_of_numbers_are_in_the_order_of_the_numbers(names, numbers, text, tmp_path, capsys):
    root = write_folders(tmp_path, classes=names)
    data = imagefolder(CPU, str(root), class_order="numbers")
    assert data.classes == numbers and not capsys.readouterr().out
    assert labels_by_colour(data.test) == {c: numbers.index(name) for c, name in enumerate(names)}
    old = imagefolder(CPU, str(root))  # as runs of earlier versions, whose configuration has no such key
    assert old.classes == text and labels_by_colour(old.test) == {c: text.index(name) for c, name in enumerate(names)}
    assert ("data.class_order=numbers takes them as numbers" in capsys.readouterr().out) == (text != numbers)


def test_images_whose_names_are_not_utf_8_are_images(tmp_path):
    root = write_folders(tmp_path)
    for split in ("train", "test"):
        odd = os.fsencode(root / split / "cat") + b"/\xff.png"
        os.rename(os.fsencode(root / split / "cat" / "0.png"), odd)
    data = imagefolder(CPU, str(root), image_size=6, workers=0)
    assert len(data.train.fingerprint()) == 16
    Path(os.fsdecode(os.fsencode(root / "test" / "cat") + b"/\xff.png")).write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cannot read the image \S*/\\udcff\.png") as refused:
        list(data.test.stream(sequential(6, 6)))
    assert str(refused.value).isprintable()
    for split in ("train", "test"):
        os.rename(os.fsencode(root / split / "cat"), os.fsencode(root / split) + b"/\xfe")
    with pytest.raises(UserError, match=r"train/\\udcfe is not UTF-8: rename it"):
        imagefolder(CPU, str(root))


WRONG = {
    "workers below 0": ({"workers": -1}, r"data\.workers must be a whole number from 0 to 512, got -1"),
    "10⁹ workers": ({"workers": 10**9}, r"data\.workers must be .*, got 1000000000"),
    "half a worker": ({"workers": 0.5}, r"data\.workers must be .*, got 0\.5"),
    "a size below 0": (
        {"image_size": -5},
        r"data\.image_size must be a whole number from 4 to 8192, or null .* got -5",
    ),
    "no size": ({"image_size": 0}, r"data\.image_size must be .* got 0"),
    "size True": ({"image_size": True}, r"data\.image_size must be .* got True"),
    "a huge size": ({"image_size": 10**6}, r"data\.image_size must be .* got 1000000"),
    "another order": ({"class_order": "letters"}, r"data\.class_order must be one of text, numbers, got 'letters'"),
    "no root": ({"root": ""}, r"there is no folder ''; data\.root must hold train"),
    "nobody's root": ({"root": "~nobody_of_that_name/x"}, "there is no folder '~nobody_of_that_name/x'"),
    "a root of escapes": ({"root": "\x1b[2J\n"}, r"there is no folder '\\\\x1b\[2J '"),
}


@pytest.mark.parametrize(("given", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_settings_are_refused_before_anything_is_read(given, message, tmp_path):
    with pytest.raises(UserError, match=message) as refused:
        imagefolder(CPU, **{"root": str(tmp_path), **given})
    assert str(refused.value).isprintable()


def test_images_of_one_pixel_are_refused_and_huge_ones_are_announced(tmp_path, capsys):
    with pytest.raises(UserError, match=r"the images of imagefolder have 1×1 pixels; they must be .* at least 4×4"):
        imagefolder(CPU, str(write_folders(tmp_path / "small", size=1)))
    imagefolder(CPU, str(write_folders(tmp_path / "large", size=1024, count=1)), validation=0.5)
    line = "warning: images of 1024×1024 pixels are not scaled, and cost 21 times as much as those of 224×224"
    assert capsys.readouterr().out.startswith(line)


# Processes that decode


def test_more_processes_than_four_a_cpu_are_not_started(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    data = imagefolder(CPU, str(write_folders(tmp_path)), image_size=6, workers=500)
    assert data.train.workers == 4
    assert capsys.readouterr().out == "warning: data.workers=500 is more than four a CPU; 4 processes decode images\n"


def test_processes_answer_in_order_and_end():
    before = set(active_children())
    computed = answers(lambda number: (number, os.getpid()), range(20), workers=3)
    first = next(computed)
    assert len(set(active_children()) - before) == 3
    found = [first, *computed]
    assert [number for number, _ in found] == list(range(20))
    assert len({pid for _, pid in found}) == 3 and os.getpid() not in {pid for _, pid in found}
    assert set(active_children()) <= before
    assert [number for number, pid in answers(lambda number: (number, os.getpid()), range(3), workers=0)] == [0, 1, 2]
    endless = answers(lambda number: number, iter(int, 1), workers=2)
    assert next(endless) == 0
    endless.close()
    assert set(active_children()) <= before


def test_a_process_that_is_killed_in_the_middle_of_an_answer_is_one_line():
    before = set(active_children())
    computed = answers(lambda number: np.zeros(10**6, np.uint8), range(20), workers=2)
    next(computed)
    time.sleep(0.1)  # both are writing answers that no pipe can hold
    victim = (set(active_children()) - before).pop()
    os.kill(victim.pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"^a process that decodes images was killed, .*; data\.workers=0 decodes in"):
        list(computed)
    assert set(active_children()) <= before


def test_without_processes_the_main_one_decodes(tmp_path, monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise OSError(28, "No space left on device")

    data = imagefolder(CPU, str(write_folders(tmp_path)), image_size=6, workers=2)
    monkeypatch.setattr(workers_module.multiprocessing, "Pipe", fails)
    assert len(Feed(data.test, 6, "sequential").batch) == 6
    line = "warning: no processes to decode images ([Errno 28] No space left on device); the main one does\n"
    assert capsys.readouterr().out == line


def test_an_exception_of_a_process_says_what_it_is():
    def divide(number: int) -> float:
        return 1 / number

    with pytest.raises(RuntimeError, match="^ZeroDivisionError: division by zero$"):
        list(answers(divide, [1, 0], workers=1))
