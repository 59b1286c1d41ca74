"""The learners of the early-exit systems: losses by hand, what learns and what is frozen, CDL's admission."""

from __future__ import annotations

import io
import math

import pytest
import torch

from policyskip.agents.branchynet import BranchyNet
from policyskip.agents.cdl import CDL
from policyskip.agents.distiller import Distiller
from policyskip.agents.early_exit import EarlyExitAgent, joint_loss
from policyskip.agents.msdnet import MSDNetAgent
from policyskip.agents.schedules import SCHEDULES
from policyskip.backbones import ExitCosts
from policyskip.backbones.branchynet import BranchyLeNet
from policyskip.backbones.resnet_exits import ResNetExits
from policyskip.data import Feed, TensorImages
from policyskip.envs.exit_sources import observe
from policyskip.errors import UserError
from policyskip.exits.cache import CachedExits, cache_exits
from policyskip.exits.placement import Stage
from policyskip.policies.thresholds import ThresholdPolicy
from tests.conftest import small_backbone, small_images


def network(exits=(1, 3), heads="pooled", classes=5) -> ResNetExits:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ResNetExits(small_backbone(classes=classes), list(exits), heads, (3, 12, 12))


def weights_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_joint_loss_by_hand():
    """Two images, two exits. At even odds of two classes the cross-entropy is ln 2; at odds 3 to 1 it is ln 4/3."""
    even, sure = [0.0, 0.0], [math.log(3), 0.0]
    logits = torch.tensor([[even, sure], [even, sure]])
    loss = joint_loss(logits, torch.tensor([0, 0]), torch.tensor([2.0, 0.5]))
    assert loss.item() == pytest.approx(2 * math.log(2) + 0.5 * math.log(4 / 3))
    wrong = joint_loss(logits, torch.tensor([0, 1]), torch.tensor([0.0, 1.0]))
    assert wrong.item() == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)


def test_misshapen_losses_are_refused():
    with pytest.raises(ValueError, match="weights"):
        joint_loss(torch.zeros(2, 3, 5), torch.zeros(2).long(), torch.ones(2))


def test_weights_of_each_system():
    net = network()
    assert MSDNetAgent(net, 10).weights().tolist() == [1, 1, 1]
    assert Distiller(net, 10, lossweights=[0.1, 0.3]).weights().tolist() == pytest.approx([0.1, 0.3, 0.6])
    assert Distiller(net, 10).weights().tolist() == pytest.approx([1 / 3] * 3)
    assert CDL(network(), 10).weights().tolist() == [1, 1, 0]  # the network's own head is frozen
    branchy = BranchyNet(net, 10, trunk_share=0.3)
    assert branchy.weights().tolist() == [0, 0, 1]
    branchy.step = 3
    assert branchy.weights().tolist() == pytest.approx([1.0, 0.65, 0.3])
    assert BranchyNet(net, 10, trunk_share=0.0, exit_weights=[3, 2, 1]).weights().tolist() == [3, 2, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda n: Distiller(n, 10, lossweights=[0.5, 0.5]), "sum to less than 1"),
        (lambda n: Distiller(n, 10, lossweights=[0.5]), "2 early exits"),
        (lambda n: Distiller(n, 10, lossweights=[0.5, 0.1, 0.1]), "2 early exits"),
        (lambda n: BranchyNet(n, 10, exit_weights=[1.0]), "3 exits"),
        (lambda n: BranchyNet(n, 10, exit_weights=[0, 0, 0]), "not all 0"),
        (lambda n: BranchyNet(n, 10, trunk_share=1.0), "trunk_share"),
        (lambda n: MSDNetAgent(n, 10, lr=0.0), "agent.lr"),
        (lambda n: MSDNetAgent(n, 10, schedule="never"), "agent.schedule"),
        (lambda n: MSDNetAgent(n, 10, rule="luck"), "luck"),
        (lambda n: CDL(n, 10, delta=0.0), "agent.delta"),
        (lambda n: MSDNetAgent(n.freeze(), 10), "nothing is left to learn"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make(network())


def test_an_update_is_a_step_down_the_joint_loss():
    """One step of plain SGD by hand: w - lr · gradient, on every parameter."""
    net, feed = network(), Feed(small_images(), 16, "shuffled", 0)
    agent = Distiller(net, 10, lr=0.1, weight_decay=0.0, schedule="constant", lossweights=[0.2, 0.3])
    for group in agent.optimizer.param_groups:
        group.update(momentum=0.0, nesterov=False)
    batch = feed.batch
    net.train()
    loss = joint_loss(net(batch.images), batch.label_B, torch.tensor([0.2, 0.3, 0.5]))
    gradients = torch.autograd.grad(loss, list(net.parameters()))
    expected = [parameter.detach() - 0.1 * gradient for parameter, gradient in zip(net.parameters(), gradients)]
    metrics = agent.update(feed)
    for parameter, value in zip(net.parameters(), expected):
        torch.testing.assert_close(parameter.detach(), value)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert feed.cursor == 1


def test_branchynet_trains_the_trunk_alone_first():
    net, feed = network(), Feed(small_images(), 16, "shuffled", 0)
    agent = BranchyNet(net, 4, trunk_share=0.5)
    heads, trunk = weights_of(net.exit_heads), weights_of(net.backbone.blocks[0].residual)
    for _ in range(2):
        agent.update(feed)
    assert all(torch.equal(value, net.exit_heads.state_dict()[name]) for name, value in heads.items())
    assert not torch.equal(trunk["conv1.weight"], net.backbone.blocks[0].residual.conv1.weight)
    agent.update(feed)
    assert not torch.equal(heads["0.2.weight"], net.exit_heads.state_dict()["0.2.weight"])


def test_cdl_leaves_the_trunk_bit_identical():
    net, feed = network(), Feed(small_images(), 16, "shuffled", 0)
    net.train()
    agent = CDL(net, 5)
    before, heads = weights_of(net.backbone), weights_of(net.exit_heads)
    for _ in range(5):
        agent.update(feed)
    assert all(torch.equal(value, net.backbone.state_dict()[name]) for name, value in before.items())
    assert not torch.equal(heads["0.2.weight"], net.exit_heads.state_dict()["0.2.weight"])


def test_cdl_drops_a_head_that_saves_nothing():
    """Dark images are class 0 and bright ones class 1; the first head learns that, so no image leaves at a later one."""
    generator = torch.Generator().manual_seed(0)
    label_N = torch.arange(64) % 2
    pixels = torch.randint(0, 60, (64, 3, 12, 12), generator=generator) + 180 * label_N.view(-1, 1, 1, 1)
    images = TensorImages(pixels.to(torch.uint8), label_N)
    net, feed = network(classes=2), Feed(images, 32, "shuffled", 0)
    agent = CDL(net, 100, lr=0.05, delta=0.7)
    for _ in range(100):
        agent.update(feed)
    admitted = agent.admit_heads(cache_exits(net, images))
    assert admitted == [0] and [stage.admitted for stage in agent.stages] == [True, False]
    assert agent.stages[0].resolved == 64 and agent.stages[1].resolved == 0
    fewer = net.only(admitted)
    assert fewer.num_exits == 2
    torch.testing.assert_close(fewer(images.images)[:, 0], net(images.images)[:, 0])
    torch.testing.assert_close(fewer(images.images)[:, 1], net(images.images)[:, 2])


def test_cdl_says_which_exit_each_head_becomes(monkeypatch):
    agent = CDL(network(), 5)
    agent.stages = [Stage(3, 5, -2e6, False), Stage(4, 4, 1e6, True)]
    monkeypatch.setattr(agent, "admit_heads", lambda validation: [1])
    fewer, lines = agent.network_to_deploy(lambda: None)
    assert fewer.exits == (3,) and [line.partition(": ")[0] for line in lines] == [
        "exit 0 after block 1",
        "exit 1 after block 3",
    ]
    assert lines[0].endswith(": dropped") and lines[1].endswith(
        "gain +1.000 M MACs an image: admitted, deployed as exit 0"
    )


def test_cdl_needs_a_residual_network():
    with pytest.raises(UserError, match="resnet32_exits"):
        CDL(BranchyLeNet(5, (3, 12, 12)), 10)


@pytest.mark.parametrize("rule", ["confidence", "entropy", "delta"])
def test_the_policy_decides_alike_in_the_environment_and_in_the_network(rule):
    """In the environment the policy sees probabilities in an observation, in the deployed network logits."""
    logits_BC = 3 * torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    policy = ThresholdPolicy(rule, [0.6, 0.8])
    for n in (0, 1):
        observation = observe(logits_BC, torch.full((50,), n), 3)
        leaves = policy.leave(n, logits_BC, torch.arange(50))
        assert torch.equal(policy.decide(observation), leaves)
        assert 0 < leaves.sum() < 50
    assert policy.decide(observe(logits_BC, torch.full((50,), 2), 3)).all()


def test_an_agent_without_thresholds_says_so():
    agent: EarlyExitAgent = MSDNetAgent(network(), 10)
    with pytest.raises(UserError, match="calibrate"):
        agent.act(torch.zeros(1, 11))


def test_a_restored_state_goes_on_where_it_stopped():
    feed, twin_feed = (Feed(small_images(), 16, "shuffled", 0) for _ in range(2))
    agent, twin = MSDNetAgent(network(), 10), MSDNetAgent(network(), 10)
    for _ in range(3):
        agent.update(feed)
    file = io.BytesIO()
    torch.save(agent.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True))
    twin_feed.seek(feed.cursor)
    assert [agent.update(feed) for _ in range(2)] == [twin.update(twin_feed) for _ in range(2)]


def test_schedules_by_hand():
    """A one-cycle begins at a hundredth of the training, a tenth of its warm-up, and stays at 0 beyond its end."""
    progress = (0.0, 0.49, 0.5, 0.74, 0.75, 1.0)
    assert [SCHEDULES["steps"](p) for p in progress] == [1, 1, 0.1, 0.1, 0.01, 0.01]
    assert [SCHEDULES["constant"](p) for p in progress] == [1] * 6
    assert [SCHEDULES["onecycle"](p) for p in (0.0, 0.05, 0.1, 0.55, 1.0, 1.4)] == pytest.approx(
        [0.1, 0.5, 1, 0.5, 0, 0]
    )


def test_learning_rates_and_figures_of_updates():
    """Of four updates the third is half-way, and the fourth three quarters of the way."""
    net, feed, rates = network(), Feed(small_images(), 16, "shuffled", 0), []
    agent = MSDNetAgent(net, 4, lr=0.1)
    for _ in range(4):
        rates.append(agent.optimizer.param_groups[0]["lr"])
        with torch.no_grad():
            correct_N = (net.train()(feed.batch.images).argmax(-1) == feed.batch.label_B.unsqueeze(1)).float().mean(0)
        metrics = agent.update(feed)
        assert [metrics[f"accuracy_exit{n}"] for n in range(3)] == pytest.approx(correct_N.tolist())
        assert metrics["accuracy"] == metrics["accuracy_exit2"]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.001])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_settings_reach_the_optimizer(optimizer):
    agent = MSDNetAgent(network(), 10, lr=0.02, optimizer=optimizer, weight_decay=0.03)
    (group,) = agent.optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.02, 0.03)
    assert optimizer == "adam" or (group["momentum"], group["nesterov"]) == (0.9, True)


def test_delta_and_epsilon_decide_which_heads_are_admitted():
    """Trunk 2, 3, 4 and heads 1, 2, 1; of four images three have a top probability of 0.8 at exit 0, and one at exit 1.
    At δ = 0.7 head 0 saves 3 · (3 + 4 + 1 − 1) − 1 · 1 = 20 MACs, 5 an image; head 1, where one image is left, 1 · (4 + 1
    − 2) = 3, 0.75 an image. At δ = 0.9 no image leaves."""
    top_MN = torch.tensor([[0.8, 0.8, 0.8], [0.8, 0.8, 0.8], [0.8, 0.8, 0.8], [0.5, 0.8, 0.8]])
    costs = ExitCosts(torch.tensor([2.0, 3, 4]).double(), torch.tensor([1.0, 2, 1]).double())
    cache = CachedExits(torch.stack([top_MN, 1 - top_MN], 2).log(), torch.zeros(4, dtype=torch.int64), costs)
    for delta, epsilon, admitted in ((0.7, 0.0, [0, 1]), (0.7, 1.0, [0]), (0.7, 6.0, []), (0.9, 0.0, [])):
        assert CDL(network(), 10, delta=delta, epsilon=epsilon).admit_heads(cache) == admitted
