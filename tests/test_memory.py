"""Batches are halved where a device runs out of memory, and the answers stay the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from policyskip.backbones import execution
from policyskip.deployment.predictors import Predictor
from policyskip.envs.block_selection import BlockSelectionVectorEnv
from policyskip.errors import UserError
from policyskip.execution import ways
from policyskip.memory import BatchSplitter, is_out_of_memory
from policyskip.policies.networks import ConstantPolicy
from tests.conftest import small_backbone, small_images


def scarce(call: Callable, most: int, sizes: list[int]) -> Callable:
    """``call``, on a device whose memory holds ``most`` images; the size of every batch is appended to ``sizes``."""

    def limited(network, images, *arguments):
        sizes.append(len(images))
        if len(images) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(network, images, *arguments)

    return limited


def test_batches_are_halved_until_they_fit_and_stay_so(capsys):
    sizes, splitter, numbers = [], BatchSplitter(), torch.arange(10)
    call = scarce(lambda network, batch: batch, 3, sizes)
    for expected in ([8, 4, 2, 2, 2, 2, 2], [2, 2, 2, 2, 2]):
        sizes.clear()
        assert torch.equal(torch.cat(splitter(lambda rows: call(None, numbers[rows]), 10, 8)), numbers)
        assert sizes == expected
    assert capsys.readouterr().err.count("batches are split") == 1


def test_no_images_are_one_batch_and_one_image_too_large_is_an_error():
    assert BatchSplitter()(lambda rows: torch.ones(0)[rows].shape, 0, 4) == [(0,)]
    with pytest.raises(UserError, match="batch_size must be a whole number, 1 or more, got 0"):
        BatchSplitter()(lambda rows: rows, 3, 0)
    with pytest.raises(torch.OutOfMemoryError):
        BatchSplitter()(lambda rows: scarce(lambda network, batch: batch, 0, [])(None, torch.ones(4)[rows]), 4, 4)


def test_environments_and_predictors_go_on(monkeypatch):
    backbone, sizes = small_backbone(), []
    env = BlockSelectionVectorEnv(16, backbone=backbone, images=small_images(32))
    keep_SBK = torch.rand(2, 16, backbone.num_blocks, generator=torch.Generator().manual_seed(0)) < 0.5
    whole = env.score(keep_SBK)
    monkeypatch.setattr(ways, "sparse_many", scarce(execution.sparse_many, 5, sizes))
    split = env.score(keep_SBK)
    assert sizes == [16, 8, 4, 4, 4, 4]
    torch.testing.assert_close(split.logits_BC, whole.logits_BC)
    assert torch.equal(split.keep_BK, whole.keep_BK) and torch.equal(split.label_B, whole.label_B)

    images = small_images(9).images
    policy = ConstantPolicy(backbone.num_blocks)
    predictor = Predictor(policy, backbone, ["a"], tuple(images.shape[1:]), 0.0)
    expected, sizes = predictor.predict(images), []
    monkeypatch.setattr("policyskip.execution.ways.sparse", scarce(execution.sparse, 5, sizes))
    torch.testing.assert_close(predictor.predict(images).logits_BC, expected.logits_BC)
    assert sizes == [9, 4, 4, 1] and predictor.predict(images[:0]).logits_BC.shape == (0, backbone.num_classes)


def test_memory_that_does_not_suffice_is_recognised():
    allocator = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    assert is_out_of_memory(allocator) and is_out_of_memory(MemoryError()) and not is_out_of_memory(RuntimeError("x"))


@pytest.mark.parametrize(
    "words", ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling", "x"]
)
def test_a_library_of_cuda_that_finds_no_memory_halves_batches_too(words):
    def call(rows: slice) -> int:
        if rows.stop - rows.start > 2:
            raise RuntimeError(words)
        return rows.stop - rows.start

    if words == "x":
        with pytest.raises(RuntimeError, match="^x$"):
            BatchSplitter()(call, 4, 4)
    else:
        assert BatchSplitter()(call, 4, 4) == [2, 2] and is_out_of_memory(RuntimeError(words))
