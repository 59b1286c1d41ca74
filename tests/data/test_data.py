"""Where images come from: rendered digits, torchvision's sets, folders; and the streams of batches over them."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from policyskip.data import (
    Feed,
    FileImages,
    TensorImages,
    batch_at,
    crop_and_flip,
    digits,
    from_arrays,
    from_dataset,
    hold_out,
    imagefolder,
    load_data,
    read_image,
    sequential,
    spread_indices,
    torchvision_data,
)
from policyskip.data import cluttered as digits_module
from policyskip.data.base import shuffled
from policyskip.data.cluttered import PLAIN, SIZE, SOURCES, render_digits
from policyskip.errors import UserError

CPU = torch.device("cpu")


# Digits


def test_digits_are_the_same_for_the_same_seed_only():
    one, other = render_digits("train", 20, seed=3), render_digits("train", 20, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one[0], render_digits("train", 20, seed=4)[0])
    assert not torch.equal(one[0], render_digits("test", 20, seed=3)[0])


def test_digits_have_the_promised_shapes_and_ranges(monkeypatch):
    monkeypatch.setattr(digits_module, "_CHUNK", 128)  # several chunks, the last one short
    images, label_N, difficulty_N = render_digits("validation", 300, seed=0)
    assert images.shape == (300, 3, SIZE, SIZE) and images.dtype == torch.uint8
    assert label_N.shape == (300,) and label_N.dtype == torch.int64
    assert set(label_N.tolist()) == set(range(10))
    assert difficulty_N.shape == (300,) and difficulty_N.dtype == torch.float32
    assert 0 <= difficulty_N.min() < 0.05 and 0.95 < difficulty_N.max() <= 1


def test_no_source_digit_is_in_two_splits():
    sources = {split: {image.numpy().tobytes() for image in digits_module._sources(split)[0]} for split in SOURCES}
    assert {split: len(images) for split, images in sources.items()} == SOURCES  # all digits differ from one another
    assert sum(SOURCES.values()) == 1797
    assert len(set().union(*sources.values())) == 1797


def test_everything_drawn_comes_from_the_split_s_own_digits(monkeypatch):
    blank = (torch.zeros(2, 1, 8, 8), torch.tensor([7, 7]))
    monkeypatch.setattr(digits_module, "_sources", {"test": blank}.__getitem__)
    images, label_N, _ = render_digits("test", 50, seed=0)
    assert (label_N == 7).all()
    assert (images > 200).float().mean() < 1e-3  # nothing but noise


def test_the_label_is_that_of_the_digit_in_the_middle(monkeypatch):
    dark_and_bright = (torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)]), torch.tensor([0, 1]))
    monkeypatch.setattr(digits_module, "_sources", lambda split: dark_and_bright)
    images, label_N, difficulty_N = render_digits("train", 200, seed=0)
    plain = difficulty_N < PLAIN
    middle = images[plain, :, 8:12, 8:12].float().mean((1, 2, 3)) / 255
    assert torch.equal(middle > 0.5, label_N[plain] == 1)


def test_difficulty_is_clutter():
    images, _, difficulty_N = render_digits("train", 400, seed=0)
    border = torch.ones(SIZE, SIZE, dtype=torch.bool)
    border[3:-3, 3:-3] = False
    brightness_N = images[:, 0, border].float().mean(1)
    assert brightness_N[difficulty_N > 0.9].mean() > 2 * brightness_N[difficulty_N < PLAIN].mean()


def test_the_digits_data_set_is_the_same_in_every_run():
    data = digits(CPU, train=12, validation=8, test=4)
    assert [len(data.split(name)) for name in ("train", "validation", "test")] == [12, 8, 4]
    assert data.image_shape == (3, SIZE, SIZE) and data.classes == tuple("0123456789")
    same = load_data("digits", CPU, train=12, validation=8, test=4)
    assert data.train.fingerprint() == same.train.fingerprint() != data.validation.fingerprint()
    for count in (0, 10**9):
        with pytest.raises(
            UserError, match=rf"data\.test must be at least 1 image, and at most 2,000,000, got {count}"
        ):
            digits(CPU, train=1, validation=1, test=count)
    with pytest.raises(UserError, match="split must be one of train, validation, test, got 'val'"):
        data.split("val")


# Orders


def test_shuffled_shows_every_index_once_an_epoch():
    batches = list(islice(shuffled(10, 4, seed=0), 10))
    epochs = torch.cat([index_B for index_B, _ in batches]).view(4, 10)
    assert all(len(index_B) == 4 for index_B, _ in batches)
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4
    assert len({seed for _, seed in batches}) == 10  # each batch is augmented in its own way


def test_shuffled_goes_on_from_any_batch():
    whole = list(islice(shuffled(10, 4, seed=1), 12))
    for start in range(9):
        for (index_B, seed), (expected_B, expected_seed) in zip(
            islice(shuffled(10, 4, seed=1, first_batch=start), 3), whole[start:], strict=False
        ):
            assert torch.equal(index_B, expected_B) and seed == expected_seed


def test_shuffled_depends_on_the_seed():
    (one, seed_of_one), (two, seed_of_two) = next(shuffled(50, 50, seed=1)), next(shuffled(50, 50, seed=2))
    assert not torch.equal(one, two) and seed_of_one != seed_of_two


def test_a_batch_may_be_larger_than_the_set():
    batches = [index_B for index_B, _ in islice(shuffled(3, 8, seed=0), 3)]
    assert [len(index_B) for index_B in batches] == [8, 8, 8]
    assert all(sorted(epoch.tolist()) == [0, 1, 2] for epoch in torch.cat(batches).view(8, 3))


def test_sequential_shows_each_index_once_in_order():
    assert [index_B.tolist() for index_B, _ in sequential(7, 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [index_B.tolist() for index_B, _ in sequential(7, 3, first_batch=2)] == [[6]]
    assert list(sequential(7, 3, first_batch=3)) == []


# Feeds


def numbered(count: int, augment=None) -> TensorImages:
    """Images of 6×6 pixels, no two alike; the label of image i is i."""
    images = torch.randint(1, 256, (count, 3, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return TensorImages(images, torch.arange(count), augment=augment)


def test_a_feed_shows_the_images_with_their_labels():
    images = numbered(7)
    feed = Feed(images, 3, "sequential")
    shown = [feed.batch, feed.advance(), feed.advance()]
    assert torch.cat([batch.label_B for batch in shown]).tolist() == list(range(7))
    assert torch.equal(torch.cat([batch.images for batch in shown]), images.images)
    assert [len(feed.advance()), len(feed.advance())] == [0, 0]
    assert feed.batch.images.shape == (0, 3, 6, 6)


def test_seek_shows_the_same_batch_again_augmentation_included():
    feed = Feed(numbered(10, crop_and_flip), 4, seed=5)
    shown = [feed.batch] + [feed.advance() for _ in range(6)]
    assert feed.cursor == 6
    for cursor in (4, 0, 6):
        feed.seek(cursor)
        assert torch.equal(feed.batch.index_B, shown[cursor].index_B)
        assert torch.equal(feed.batch.images, shown[cursor].images)
        assert torch.equal(feed.batch.label_B, shown[cursor].index_B)
    feed.seek(3)
    assert torch.equal(feed.advance().images, shown[4].images)
    feed.seek(0, seed=6)
    assert not torch.equal(feed.batch.index_B, shown[0].index_B)


def test_images_are_read_by_index():
    images, index_B = numbered(7), torch.tensor([5, 0, 5])
    batch = batch_at(images, index_B)
    assert batch.label_B.tolist() == batch.index_B.tolist() == [5, 0, 5]
    assert torch.equal(batch.images, images.images[index_B])


def test_indices_are_spread_over_the_whole_set():
    assert spread_indices(3, 11).tolist() == [0, 5, 10]
    assert spread_indices(4, 11).tolist() == [0, 3, 7, 10]
    assert spread_indices(5, 3).tolist() == [0, 1, 2]
    assert spread_indices(1, 9).tolist() == [0] and spread_indices(1, 9).dtype == torch.int64


def test_a_feed_refuses_what_it_cannot_do():
    with pytest.raises(UserError, match="at least 1 image, got 0"):
        Feed(numbered(3), 0)
    with pytest.raises(UserError, match="shuffled, sequential, got 'random'"):
        Feed(numbered(3), 1, "random")  # type: ignore[arg-type]


# Augmentation


def test_each_output_is_a_crop_of_its_own_padded_image_or_its_mirror():
    """One pixel of padding around 2×3 pixels: nine crops, each plain or mirrored."""
    image = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.uint8)
    padded = torch.tensor([[0, 0, 0, 0, 0], [0, 1, 2, 3, 0], [0, 4, 5, 6, 0], [0, 0, 0, 0, 0]], dtype=torch.uint8)
    crops = [padded[y : y + 2, x : x + 3] for y in range(3) for x in range(3)]
    allowed = {tuple(c.flatten().tolist()) for crop in crops for c in (crop, crop.flip(1))}
    assert (0, 0, 0, 0, 1, 2) in allowed and (0, 0, 0, 2, 1, 0) in allowed  # upper left, and its mirror
    B = 400
    batch = (image + torch.arange(B).remainder(40).view(B, 1, 1) * 6).unsqueeze(1).to(torch.uint8).repeat(1, 3, 1, 1)
    out = crop_and_flip(batch, torch.Generator().manual_seed(0), pad=1)
    assert out.shape == batch.shape and out.dtype == torch.uint8
    assert torch.equal(out[:, 0], out[:, 1]) and torch.equal(out[:, 0], out[:, 2])
    own = torch.where(out[:, 0] > 0, out[:, 0].int() - torch.arange(B).remainder(40).view(B, 1, 1) * 6, 0)
    seen = {tuple(one.flatten().tolist()) for one in own}
    assert seen == allowed  # nothing else, and nothing left out


def test_augmentation_follows_its_generator():
    images = numbered(8).images
    one, same, other = (crop_and_flip(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


# Splits


@pytest.mark.parametrize(("count", "share", "held"), [(10, 0.3, 3), (2, 0.01, 1), (5, 0.99, 4), (1000, 0.1, 100)])
def test_hold_out_is_disjoint_complete_and_stable(count, share, held):
    validation, train = hold_out(count, share)
    assert len(validation) == held
    assert sorted(torch.cat([validation, train]).tolist()) == list(range(count))
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(hold_out(count, share), (validation, train), strict=True))


def test_hold_out_takes_from_everywhere():
    validation, _ = hold_out(1000, 0.1)
    assert validation.min() < 100 and validation.max() > 900  # files come sorted by class


def test_hold_out_refuses_shares_that_leave_nothing():
    for share in (0, 1, -0.1, 2):
        with pytest.raises(UserError, match=r"data\.validation must be a share above 0 and below 1"):
            hold_out(10, share)
    with pytest.raises(UserError, match="at least 2 images"):
        hold_out(1, 0.5)


# Folders


def write_folders(root: Path, per_class: int = 4, size: int = 8, splits=("train", "test")) -> None:
    """Classes cat and dog; image i of a class is one colour: (100 · class, 10 · i, 1 in train and 2 elsewhere)."""
    for split in splits:
        for c, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for i in range(per_class):
                colour = (100 * c, 10 * i, 1 if split == "train" else 2)
                Image.new("RGB", (size, size), colour).save(root / split / name / f"{i}.png")


def colours(images) -> list[tuple[int, int, int]]:
    """The colour of each image of a set, in order, and that its label is its colour's class."""
    batches = list(images.stream(sequential(len(images), 3)))
    pixels = torch.cat([batch.images for batch in batches])
    assert pixels.dtype == torch.uint8 and (pixels == pixels[:, :, :1, :1]).all()
    assert torch.equal(torch.cat([batch.label_B for batch in batches]), pixels[:, 0, 0, 0].long() // 100)
    assert torch.cat([batch.index_B for batch in batches]).tolist() == list(range(len(images)))
    return [tuple(pixel) for pixel in pixels[:, :, 0, 0].tolist()]


@pytest.mark.parametrize("image_size", [None, 6], ids=["in memory", "from files"])
@pytest.mark.parametrize("test_folder", ["test", "val"])
def test_image_folders_are_split_and_labelled(tmp_path, image_size, test_folder):
    write_folders(tmp_path, splits=("train", test_folder))
    data = imagefolder(CPU, str(tmp_path), image_size, validation=0.25, augment=False, workers=0)
    assert isinstance(data.train, TensorImages if image_size is None else FileImages)
    assert data.classes == ("cat", "dog")
    assert data.image_shape == (3, image_size or 8, image_size or 8)
    assert len(data.train) == 6 and len(data.validation) == 2
    assert sorted(colours(data.train) + colours(data.validation)) == [
        (100 * c, 10 * i, 1) for c in (0, 1) for i in range(4)
    ]
    assert colours(data.test) == [(100 * c, 10 * i, 2) for c in (0, 1) for i in range(4)]
    torch.testing.assert_close(data.test.label_N, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]))


def test_the_same_images_are_held_out_in_memory_and_from_files(tmp_path):
    write_folders(tmp_path)
    memory, files = (imagefolder(CPU, str(tmp_path), size, validation=0.25, workers=0) for size in (None, 6))
    assert colours(memory.validation) == colours(files.validation)


def test_images_from_files_are_augmented_by_batch_and_come_again(tmp_path):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            noise = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
            for i in range(2):
                Image.fromarray(noise).save(tmp_path / split / name / f"{i}.png")
    data = imagefolder(CPU, str(tmp_path), image_size=8, validation=0.25, workers=0)
    before = torch.random.get_rng_state()
    feed = Feed(data.train, 3, seed=1)
    shown = [feed.batch] + [feed.advance() for _ in range(3)]
    assert feed.batch.images.shape == (3, 3, 8, 8)
    assert len({image.numpy().tobytes() for batch in shown for image in batch.images}) > 6
    feed.seek(2)
    assert torch.equal(feed.batch.images, shown[2].images)
    assert torch.equal(torch.random.get_rng_state(), before)
    evaluated = {image.numpy().tobytes() for batch in data.test.stream(sequential(4, 2)) for image in batch.images}
    assert len(evaluated) == 1  # one photograph four times, and no chance in it


def test_grey_palette_and_transparent_files_are_read_as_rgb(tmp_path):
    red_and_blue = Image.new("RGB", (4, 4), (255, 0, 0))
    red_and_blue.paste((0, 0, 255), (0, 0, 2, 4))
    expected = np.array(red_and_blue)
    for mode in ("RGB", "P", "RGBA"):
        red_and_blue.convert(mode).save(tmp_path / f"{mode}.png")
        np.testing.assert_array_equal(read_image(tmp_path / f"{mode}.png", None), expected)
    Image.new("L", (4, 4), 77).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read_image(tmp_path / "grey.png", 4), np.full((4, 4, 3), 77))


def test_a_photograph_is_scaled_and_its_centre_cut_out(tmp_path):
    wide = Image.new("RGB", (64, 32), (0, 0, 0))
    wide.paste((255, 255, 255), (16, 0, 48, 32))  # the centre square is white
    wide.save(tmp_path / "wide.png")
    image = read_image(tmp_path / "wide.png", 14)
    assert image.shape == (14, 14, 3) and (image == 255).all()


def remove(path: Path) -> None:
    for child in path.iterdir() if path.is_dir() else ():
        remove(child)
    path.rmdir() if path.is_dir() else path.unlink()


def one_class(root: Path) -> None:
    for split in ("train", "test"):
        remove(root / split / "dog")


def unreadable(root: Path) -> None:
    (root / "train" / "cat" / "2.png").write_bytes(b"no image")


def cut_short(root: Path) -> None:
    whole = (root / "test" / "dog" / "1.png").read_bytes()
    (root / "test" / "dog" / "1.png").write_bytes(whole[: len(whole) // 2])


def of_other_size(root: Path) -> None:
    Image.new("RGB", (9, 7)).save(root / "train" / "dog" / "3.png")


DAMAGE = {
    "no train folder": (lambda root: remove(root / "train"), r"there is no folder .*train; data\.root must hold"),
    "no test folder": (lambda root: remove(root / "test"), r"there is no folder .*test; data\.root must hold"),
    "an empty train folder": (
        lambda root: (remove(root / "train"), (root / "train").mkdir()),
        "train holds no class folders",
    ),
    "an empty class": (
        lambda root: (remove(root / "train" / "dog"), (root / "train" / "dog").mkdir()),
        r"dog holds no images \(\.png",
    ),
    "one class": (one_class, "has one class, cat; at least two are needed"),
    "other classes in test": (
        lambda root: (root / "test" / "dog").rename(root / "test" / "wolf"),
        r"must have the same classes; only in one of them: \S*/train/dog, \S*/test/wolf$",
    ),
    "an unreadable image": (unreadable, "cannot read the image .*2.png"),
    "an image cut short": (cut_short, "cannot read the image .*1.png"),
    "an image of another size": (of_other_size, r"3\.png is 9×7, others are 8×8; say data\.image_size=8"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_bad_folders_are_refused_in_one_line(tmp_path, damage, message):
    write_folders(tmp_path)
    imagefolder(CPU, str(tmp_path))
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as refused:
        imagefolder(CPU, str(tmp_path))
    assert "\n" not in str(refused.value)


def test_files_that_are_not_square_need_a_size(tmp_path):
    write_folders(tmp_path)
    for file in tmp_path.rglob("*.png"):
        Image.new("RGB", (10, 8)).save(file)
    with pytest.raises(UserError, match=r"0\.png is 10×8, and a network sees squares: say data\.image_size=N"):
        imagefolder(CPU, str(tmp_path))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_in_a_stream_is_named_in_one_line(tmp_path, workers):
    write_folders(tmp_path)
    data = imagefolder(CPU, str(tmp_path), image_size=6, workers=workers)
    (tmp_path / "test" / "dog" / "3.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"^cannot read the image [^\n]*dog/3\.png[^\n]*$"):
        colours(data.test)


# torchvision


class Fake:
    """What torchvision's data sets have in common, with six training images and two test images."""

    calls: ClassVar[list[dict]] = []

    def __init__(self, root: str, train: bool, download: bool) -> None:
        Fake.calls.append(dict(root=root, train=train, download=download))
        count, first = (6, 0) if train else (2, 100)
        self.classes = ["no", "yes"]
        self.targets = [i % 2 for i in range(count)]
        self.values = torch.arange(first, first + count, dtype=torch.uint8)


class FakeCifar(Fake):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.data = self.values.view(-1, 1, 1, 1).repeat(1, 4, 4, 3).numpy()
        self.data[:, 0, 1, 2] = 200  # row 0, column 1, blue


class FakeMnist(Fake):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.data = self.values.view(-1, 1, 1).repeat(1, 4, 4)
        self.targets = torch.tensor(self.targets)


@pytest.fixture
def fake_torchvision(monkeypatch):
    fakes = dict(CIFAR10=FakeCifar, CIFAR100=FakeCifar, MNIST=FakeMnist, FashionMNIST=FakeMnist)
    monkeypatch.setattr(torchvision, "datasets", SimpleNamespace(**fakes))
    monkeypatch.setattr(Fake, "calls", [])


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion_mnist"])
def test_torchvision_sets_are_converted_and_split(fake_torchvision, name):
    data = torchvision_data(CPU, name, root="here", validation=0.34, augment=False, download=False)
    assert Fake.calls == [dict(root="here", train=train, download=False) for train in (True, False)]
    assert data.name == name and data.classes == ("no", "yes") and data.image_shape == (3, 4, 4)
    assert [len(data.train), len(data.validation), len(data.test)] == [4, 2, 2]
    numbers = []
    for images in (data.train, data.validation):
        (batch,) = images.stream(sequential(len(images), 10))
        assert batch.images.dtype == torch.uint8 and batch.label_B.dtype == torch.int64
        number_B = batch.images[:, 0, 3, 3].long()
        assert torch.equal(batch.label_B, number_B % 2)
        numbers += number_B.tolist()
        blue = batch.images[:, 2, 0, 1]
        assert (blue == 200).all() if "cifar" in name else torch.equal(blue.long(), number_B)
        assert torch.equal(batch.images[:, 1, 0, 1].long(), number_B)
    assert sorted(numbers) == list(range(6))
    assert data.test.images[:, 0, 3, 3].tolist() == [100, 101] and data.test.label_N.tolist() == [0, 1]


def test_training_images_alone_are_augmented(fake_torchvision):
    data = load_data("cifar10", CPU)
    assert data.train.augment is crop_and_flip
    assert data.validation.augment is None and data.test.augment is None


def test_a_download_that_fails_is_one_line_that_says_what_to_do(monkeypatch, tmp_path):
    def fails(*args, **kwargs):
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(torchvision, "datasets", SimpleNamespace(CIFAR10=fails))
    with pytest.raises(UserError, match=r"^cifar10 is not in .*no route to host\).*say data\.root=FOLDER") as refused:
        torchvision_data(CPU, "cifar10", root=str(tmp_path))
    assert "\n" not in str(refused.value) and str(tmp_path) in str(refused.value)


def test_an_unknown_set_lists_the_known_ones():
    with pytest.raises(UserError, match="one of cifar10, cifar100, fashion_mnist, mnist, got 'svhn'"):
        load_data("svhn", CPU)


def test_a_fingerprint_tells_sets_apart():
    images = numbered(4)
    same = TensorImages(images.images.clone(), images.label_N.clone())
    assert images.fingerprint() == same.fingerprint()
    same.label_N[0] = 3
    assert images.fingerprint() != same.fingerprint()
    same = TensorImages(images.images.clone(), images.label_N)
    same.images[0, 0, 0, 0] ^= 1
    assert images.fingerprint() != same.fingerprint()


def test_torch_s_defaults_do_not_change_data(tmp_path):
    """A program may have set another default dtype or device before it asks for data."""
    pictures = np.random.default_rng(0).integers(0, 256, (12, 9, 9, 3), dtype="uint8")
    for number, pixels in enumerate(pictures):
        folder = tmp_path / ("test" if number % 3 else "train") / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    pairs = [(pixels, number % 2) for number, pixels in enumerate(pictures)]
    makers = (
        lambda: digits(torch.device("cpu"), 32, 16, 16),
        lambda: from_arrays(pictures, np.arange(12) % 2),
        lambda: from_dataset(pairs),
        lambda: imagefolder(torch.device("cpu"), str(tmp_path)),
    )
    expected = [batch_at(make().train, torch.arange(2)) for make in makers]
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        found = [batch_at(make().train, torch.arange(2, device="cpu")) for make in makers]
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.label_B, other.label_B)
