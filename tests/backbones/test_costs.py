"""MACs against published figures, by hand, and against a whole forward."""

from __future__ import annotations

import pytest
import torch

from policyskip.backbones import Costs, count_costs, sparse
from policyskip.backbones.base import evaluation_mode
from policyskip.backbones.costs import count_macs
from policyskip.backbones.resnet import CifarResNet, TorchvisionResNet
from policyskip.policies.networks import PolicyNetwork
from tests.conftest import small_backbone

IMAGE = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)


@pytest.mark.parametrize(("depth", "millions"), [(20, 40.6), (32, 68.9), (56, 125.5), (110, 252.9)])
def test_cifar_resnets(depth, millions):
    assert count_costs(CifarResNet(depth, 10), (3, 32, 32)).full == pytest.approx(millions * 1e6, rel=0.005)


def test_resnet101():
    assert count_costs(TorchvisionResNet(101), (3, 224, 224)).full == pytest.approx(7.80e9, rel=0.005)


def test_policies():
    assert count_macs(PolicyNetwork(15).eval(), IMAGE) == pytest.approx(12.2e6, rel=0.005)
    large = PolicyNetwork(33, "imagenet", width=64, pool=2).eval()
    assert count_macs(large, torch.zeros(1, 3, 224, 224, dtype=torch.uint8)) == pytest.approx(0.236e9, rel=0.005)


def test_a_narrow_pooled_policy_by_hand():
    """Width 8, input 32 pooled to 16: stem 3·8·9·256, then 2 convolutions a stage on 16², 8², 4², then 32·15."""
    stages = 256 * 9 * (8 * 8 + 8 * 8) + 64 * 9 * (8 * 16 + 16 * 16) + 16 * 9 * (16 * 32 + 32 * 32)
    assert count_macs(PolicyNetwork(15, width=8, pool=2).eval(), IMAGE) == 3 * 8 * 9 * 256 + stages + 32 * 15


@pytest.mark.parametrize("shortcut", ["A", "pool", "B"])
def test_blocks_sum_to_a_whole_forward(shortcut):
    backbone = small_backbone(shortcut=shortcut)
    image = torch.zeros(1, 3, 12, 12, dtype=torch.uint8)
    costs = count_costs(backbone, (3, 12, 12))
    assert costs.full == count_macs(backbone, image)
    keep_BK = torch.tensor([[True, False, True, True, False, False]])
    assert costs.of(keep_BK).tolist() == [count_macs(lambda x: sparse(backbone, x, keep_BK), image)]


@pytest.mark.parametrize("mode", [True, False])
def test_a_network_returns_to_its_mode_also_after_an_error(mode):
    backbone = small_backbone().train(mode)
    with pytest.raises(ZeroDivisionError), evaluation_mode(backbone):
        assert not any(module.training for module in backbone.modules())
        raise ZeroDivisionError
    assert all(module.training is mode for module in backbone.modules())


def test_counting_leaves_the_network_alone():
    backbone = small_backbone().train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    count_costs(backbone, (3, 12, 12))
    assert backbone.training
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())


def test_only_blocks_that_are_kept_cost():
    costs = Costs(10.0, torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
    keep_BK = torch.tensor([[True, False, True], [False, False, False], [False, True, False]])
    assert costs.of(keep_BK).tolist() == [15, 10, 12] and costs.full == 17
