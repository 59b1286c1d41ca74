"""A device that runs out of memory gets smaller parts, and the answers stay what they were."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from policyskip.backbones import execution
from policyskip.deployment.predictors import Predictor
from policyskip.envs import base
from policyskip.envs.block_selection import BlockSelectionVectorEnv
from policyskip.errors import UserError
from policyskip.memory import BatchSplitter
from policyskip.policies.networks import ConstantPolicy
from tests.conftest import small_backbone, small_images


def scarce(call: Callable, most: int, sizes: list[int]) -> Callable:
    """``call``, on a device whose memory holds ``most`` images; ``sizes`` is told what it was asked."""

    def limited(network, images, *rest):
        sizes.append(len(images))
        if len(images) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(network, images, *rest)

    return limited


def test_parts_halve_until_they_fit_and_stay_so(capsys):
    sizes, parts, numbers = [], BatchSplitter(), torch.arange(10)
    call = scarce(lambda network, part: part, 3, sizes)
    for expected in ([8, 4, 2, 2, 2, 2, 2], [2, 2, 2, 2, 2]):
        sizes.clear()
        assert torch.equal(torch.cat(parts(lambda of: call(None, numbers[of]), 10, 8)), numbers)
        assert sizes == expected
    assert capsys.readouterr().err.count("batches are split") == 1


def test_nothing_is_one_part_and_one_image_too_many_is_an_error():
    assert BatchSplitter()(lambda of: torch.ones(0)[of].shape, 0, 4) == [(0,)]
    with pytest.raises(UserError, match="batch_size must be a whole number, 1 at least, got 0"):
        BatchSplitter()(lambda of: of, 3, 0)
    with pytest.raises(torch.OutOfMemoryError):
        BatchSplitter()(lambda of: scarce(lambda network, part: part, 0, [])(None, torch.ones(4)[of]), 4, 4)


def test_environments_and_predictors_go_on(monkeypatch):
    backbone, sizes = small_backbone(), []
    env = BlockSelectionVectorEnv(16, backbone=backbone, images=small_images(32))
    keep_SBK = torch.rand(2, 16, backbone.num_blocks, generator=torch.Generator().manual_seed(0)) < 0.5
    whole = env.score(keep_SBK)
    monkeypatch.setattr(base, "sparse_many", scarce(execution.sparse_many, 5, sizes))
    split = env.score(keep_SBK)
    assert sizes == [16, 8, 4, 4, 4, 4]
    torch.testing.assert_close(split.logits_BC, whole.logits_BC)
    assert torch.equal(split.keep_BK, whole.keep_BK) and torch.equal(split.label_B, whole.label_B)

    images = small_images(9).images
    policy = ConstantPolicy(backbone.num_blocks)
    predictor = Predictor(policy, backbone, ["a"], tuple(images.shape[1:]), 0.0)
    expected, sizes = predictor.predict(images), []
    monkeypatch.setattr("policyskip.policies.base.sparse", scarce(execution.sparse, 5, sizes))
    torch.testing.assert_close(predictor.predict(images).logits_BC, expected.logits_BC)
    assert sizes == [9, 4, 4, 1] and predictor.predict(images[:0]).logits_BC.shape == (0, backbone.num_classes)
