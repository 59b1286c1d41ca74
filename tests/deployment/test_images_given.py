"""What a predictor is given: images of every kind, a batch size, a device."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from policyskip.backbones import ResNetExits
from policyskip.deployment.predictors import ExitPredictor, GatedPredictor, Predictor
from policyskip.errors import UserError
from policyskip.finite import plain_tensor
from policyskip.parallel import processes
from policyskip.parallel.devices import device_named, find_device
from policyskip.policies.networks import ConstantPolicy
from policyskip.policies.thresholds import ThresholdPolicy
from tests.conftest import small_backbone, small_images

SHAPE = (3, 12, 12)
IMAGES = small_images(4).images
ARRAY = IMAGES.numpy()


@pytest.fixture(params=["blocks", "exits"])
def predictor(request) -> Any:
    if request.param == "blocks":
        return Predictor(ConstantPolicy(3), small_backbone(8), list("abcde"), SHAPE, 0.0)
    network = ResNetExits(small_backbone(8), [0, 1], image_shape=SHAPE)
    return ExitPredictor(ThresholdPolicy("confidence", [0.3, 0.3]), network, list("abcde"), SHAPE)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # nested tensors are a prototype
    WRONG: dict[str, tuple[Any, str]] = {
        "None": (None, "images must be a tensor or an array of numbers, got None"),
        "a dict": ({}, "an array of numbers, got dict"),
        "a text": ("x.png\n", r"an array of numbers, got 'x\.png\\n'"),
        "bytes": (b"abc", "got bytes"),
        "an object": (object(), "got object"),
        "ragged": ([[1], [1, 2]], "images cannot be read as numbers"),
        "texts": (np.full((1, *SHAPE), "1"), "images cannot be read as numbers"),
        "objects": (ARRAY.astype(object), "images cannot be read as numbers"),
        "sparse": (IMAGES.to_sparse(), "dense tensor of real numbers, got a sparse_coo one"),
        "meta": (IMAGES.to("meta"), "got a meta one"),
        "complex": (IMAGES.to(torch.complex64), "got a complex one"),
        "complex array": (ARRAY.astype(complex), "got a complex one"),
        "nested": (torch.nested.nested_tensor(list(IMAGES)), "got a nested one"),
        "quantized": (torch.quantize_per_tensor(IMAGES.float(), 1.0, 0, torch.quint8), "got a quantized one"),
        "floats": (IMAGES / 255, r"images must be uint8 of shape \(B, 3, 12, 12\), got float32 \(4, 3, 12, 12\)"),
        "one image": (ARRAY[0], r"got uint8 \(3, 12, 12\); one image is images\[None\]"),
        "channels last": (np.moveaxis(ARRAY, 1, -1), r"channels come first, which numpy\.moveaxis\(images, -1, 1\)"),
        "other size": (ARRAY[..., :10], r"got uint8 \(4, 3, 12, 10\)$"),
        "a number": (3, r"got int64 \(\)"),
    }


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_batch_of_images_is_refused_in_one_line(predictor, name):
    given, message = WRONG[name]
    with pytest.raises(UserError, match=message) as error:
        predictor.predict(given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, True, "3", None])
def test_a_batch_size_is_a_positive_whole_number(predictor, batch_size):
    with pytest.raises(UserError, match="batch_size must be a whole number, 1 or more, got"):
        predictor.predict(IMAGES, batch_size)


def read_only() -> np.ndarray:
    array = ARRAY.copy()
    array.setflags(write=False)
    return array


def test_images_in_any_order_of_memory_are_images(predictor):
    expected = predictor.predict(IMAGES).logits_BC
    mirrored = predictor.predict(IMAGES.flip(-1)).logits_BC
    same = (ARRAY, read_only(), np.asfortranarray(ARRAY), IMAGES.to(memory_format=torch.channels_last), ARRAY.tolist())
    for given in same[:4]:
        torch.testing.assert_close(predictor.predict(given).logits_BC, expected)
    torch.testing.assert_close(predictor.predict(ARRAY[..., ::-1]).logits_BC, mirrored)
    torch.testing.assert_close(predictor.predict(ARRAY[:1][::-1]).logits_BC, expected[:1])  # one row, negative stride
    torch.testing.assert_close(predictor.predict(ARRAY[::-1]).logits_BC, expected.flip(0))
    assert predictor.predict(ARRAY[:0]).logits_BC.shape == (0, 5)


def test_images_that_are_read_only_are_not_copied():
    """A file that is mapped to memory may be larger than the memory."""
    array = read_only()
    assert np.shares_memory(plain_tensor(array, "images").numpy(), array)


def test_a_program_of_several_processes_names_its_devices(monkeypatch):
    """In a command, each process has a GPU of its own; a program that uses us knows better, and has its own settings."""
    monkeypatch.setattr(processes, "world", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    assert device_named("cuda:1") == torch.device("cuda:1") and not torch.backends.cudnn.deterministic
    with pytest.raises(UserError, match=r"cuda:1 is one GPU, and each of 2 processes needs its own"):
        find_device("cuda:1")
    assert find_device("cuda") == torch.device("cuda:0") and torch.backends.cudnn.deterministic


def test_a_predictor_moves(predictor):
    expected = predictor.predict(IMAGES)
    assert predictor.to("cpu") is predictor.to(torch.device("cpu")) is predictor
    assert torch.equal(predictor.predict(IMAGES).logits_BC, expected.logits_BC)
    for device in ("gpu", "meta", 5, None):
        with pytest.raises(UserError, match="device must be auto, cpu, cuda or cuda:N, got"):
            predictor.to(device)


def test_all_of_a_predictor_moves(predictor, monkeypatch):
    """There is no second device here but meta, on which nothing can be computed."""
    monkeypatch.setattr("policyskip.deployment.predictors.device_named", torch.device)
    if isinstance(predictor, Predictor):
        predictor.plan = {1: [0.5] * 3}
    predictor.to("meta")
    tensors = [value for value in vars(predictor).values() if isinstance(value, torch.Tensor)]
    for part in (predictor.network, predictor.policy):
        tensors += [*part.parameters(), *part.buffers()]
    assert tensors and {tensor.device.type for tensor in tensors} == {"meta"}
    assert getattr(predictor, "plan", {}) == {} and GatedPredictor.to is not ExitPredictor.to
