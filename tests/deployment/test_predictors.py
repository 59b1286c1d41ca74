"""What predictors say that their answers cost, by hand."""

from __future__ import annotations

from torch import Tensor, nn

from policyskip.backbones.gated import GatedNetwork
from policyskip.backbones.resnet_exits import ResNetExits
from policyskip.deployment.predictors import ExitPredictor, GatedPredictor, Predictor
from policyskip.policies.networks import ConstantPolicy
from tests.conftest import small_backbone, small_images

SHAPE, CLASSES = (3, 12, 12), list("abcde")
IMAGES = small_images(4).images


class LeavesInTurn(nn.Module):
    """Image n leaves at exit n."""

    def leave(self, n: int, logits_BC: Tensor, rows: Tensor) -> Tensor:
        return rows == n


def test_the_policy_is_paid_for_once():
    """The policy drops block 1 and costs 7 MACs."""
    policy = ConstantPolicy(6, initial_keep=0.9)
    policy.start_from([True, False, True, True, True, True])
    predictor = Predictor(policy, small_backbone(), CLASSES, SHAPE, policy_macs=7.0)
    answer = predictor.predict(IMAGES, batch_size=3)
    assert answer.keep_BK.tolist() == [[True, False, True, True, True, True]] * 4
    assert answer.macs_B.tolist() == [predictor.costs.full - float(predictor.costs.block_K[1]) + 7.0] * 4


def test_every_image_pays_for_all_gates():
    network = GatedNetwork(small_backbone(), "rnn", SHAPE)
    for parameter in network.gates.parameters():
        nn.init.zeros_(parameter)  # p = ½: shut
    predictor = GatedPredictor(network, CLASSES, SHAPE)
    answer = predictor.predict(IMAGES)
    costs = predictor.costs
    assert answer.keep_BK.sum(1).tolist() == [1] * 4 and network.gate_macs > 0
    assert answer.macs_B.tolist() == [costs.always + float(costs.block_K[0]) + network.gate_macs] * 4


def test_a_decision_is_paid_for_at_every_exit_but_the_last():
    """Images leave at exits 0, 1, 2 and 2 of three, after 1, 2, 2 and 2 decisions of 0.5 MACs."""
    predictor = ExitPredictor(
        LeavesInTurn(), ResNetExits(small_backbone(), [1, 3], "pooled", SHAPE), CLASSES, SHAPE, 0.5
    )
    answer = predictor.predict(IMAGES)
    cost = predictor.costs.cumulative_N.tolist()
    assert answer.exit_B.tolist() == [0, 1, 2, 2]
    assert answer.macs_B.tolist() == [cost[0] + 0.5, cost[1] + 1, cost[2] + 1, cost[2] + 1]
    assert predictor.ran(answer).tolist() == [[True, False, False], [True, True, False], [True] * 3, [True] * 3]
