"""SkipNet's losses by hand, what learns in each stage, and that an image's gradient depends on that image alone."""

from __future__ import annotations

import io
import math

import pytest
import torch

from policyskip.agents.skipnet import SkipNet, hybrid_loss, log_probability, skipnet_returns
from policyskip.data import Feed, TensorImages
from policyskip.errors import UserError
from policyskip.evaluation.evaluate import evaluate_gates
from tests.conftest import small_backbone, small_images

IMAGE = (3, 12, 12)


def make_agent(total_steps: int = 10, **kwargs) -> SkipNet:
    return SkipNet(small_backbone(), IMAGE, total_steps, **{"lr": 0.01, "hybrid_lr": 0.01, **kwargs})


def weights_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def scatter_gates(agent: SkipNet) -> None:
    """Let gates decide differently from image to image."""
    generator = torch.Generator().manual_seed(0)
    for layer in (*agent.network.gates.reads, agent.network.gates.answer):
        torch.nn.init.normal_(layer.weight, 0, 5, generator=generator)


def changed(module: torch.nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


def test_returns_by_hand():
    """Three gates, α = 0.6, costs 0.5, 1, 1.5: skipping gate i is worth 0.1, 0.2, 0.3. The first image (CE 2) skips 0 and
    2: −2 + 0.4, −2 + 0.3, −2 + 0.3. The second (CE 1) skips 1 only."""
    keep = torch.tensor([[False, True, False], [True, False, True]])
    returns = skipnet_returns(torch.tensor([2.0, 1.0]), keep, torch.tensor([0.5, 1.0, 1.5]), 0.6)
    torch.testing.assert_close(returns, torch.tensor([[-1.6, -1.7, -1.7], [-0.8, -0.8, -1.0]]))


def test_the_loss_by_hand():
    """One image, two gates with p = 3/4 and 1/3, both kept: log p = ln 3/4, ln 1/3. CE 1, R = (2, 1), b = (1, 3)."""
    gate = torch.tensor([[math.log(3.0), -math.log(2.0)]])
    log_p = log_probability(gate, torch.tensor([[True, True]]))
    torch.testing.assert_close(log_p, torch.tensor([[0.75, 1 / 3]]).log())
    torch.testing.assert_close(
        log_probability(gate, torch.tensor([[False, False]])), torch.tensor([[0.25, 2 / 3]]).log()
    )
    loss = hybrid_loss(torch.tensor([1.0]), log_p, torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 3.0]]), 0.5)
    assert loss.item() == pytest.approx(1 - 0.5 * (math.log(0.75) - 2 * math.log(1 / 3)))


@pytest.mark.parametrize("shape", [(4, 1), (1,), (3,), ()])
def test_the_published_broadcast_cannot_happen(shape):
    """(B,) against (B, 1) gave (B, B): every image was credited with every other's return."""
    keep, costs = torch.ones(4, 2, dtype=torch.bool), torch.ones(2)
    with pytest.raises(ValueError, match="expected"):
        skipnet_returns(torch.zeros(shape), keep, costs, 0.1)
    good = [torch.zeros(4), torch.zeros(4, 2), torch.zeros(4, 2), torch.zeros(4, 2)]
    for i in (0, 1, 3):
        wrong = [*good[:i], torch.zeros(shape), *good[i + 1 :]]
        with pytest.raises(ValueError, match="expected"):
            hybrid_loss(*wrong, 1.0)
    with pytest.raises(ValueError, match="expected"):
        log_probability(torch.zeros(4, 2), torch.ones(4, dtype=torch.bool))


@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_expected_gradient_is_that_of_the_expected_objective(baseline):
    """All 2³ decisions of one image, each weighted with its probability: E[∇ hybrid loss] = ∇ E[L], baseline or none."""
    generator = torch.Generator().manual_seed(0)
    gate = torch.randn(1, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    every = torch.cartesian_prod(*[torch.tensor([False, True])] * 3)
    ce = torch.rand(8, generator=generator, dtype=torch.float64)
    costs = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)
    log_p = log_probability(gate.expand(8, 3), every)
    pi = log_p.sum(1).exp()
    objective = ce - (0.3 / 3) * (~every * costs).sum(1)
    (expected,) = torch.autograd.grad((pi * objective).sum(), gate, retain_graph=True)
    returns = skipnet_returns(ce, every, costs, 0.3)
    losses = [
        hybrid_loss(ce[i : i + 1], log_p[i : i + 1], returns[i : i + 1], torch.full((1, 3), baseline), 1.0)
        for i in range(8)
    ]
    (gradient,) = torch.autograd.grad(sum(p.detach() * loss for p, loss in zip(pi, losses)), gate)
    torch.testing.assert_close(gradient, expected)


def test_an_image_s_gradient_is_independent_of_the_others_rewards():
    generator = torch.Generator().manual_seed(0)
    gate = torch.randn(4, 3, generator=generator, requires_grad=True)
    keep = torch.rand(4, 3, generator=generator) < 0.5
    ce, baseline = torch.rand(4, generator=generator), torch.rand(4, 3, generator=generator)

    def gradient(ce: torch.Tensor) -> torch.Tensor:
        returns = skipnet_returns(ce, keep, torch.ones(3), 0.3)
        loss = hybrid_loss(ce, log_probability(gate, keep), returns, baseline, 1.0)
        return torch.autograd.grad(loss, gate)[0]

    other = gradient(ce + torch.tensor([0.0, 5.0, 0.0, 0.0])) - gradient(ce)
    assert other[1].abs().min() > 0 and other[[0, 2, 3]].abs().max() == 0


def test_returns_carry_no_gradient():
    ce = torch.rand(2, requires_grad=True)
    assert not skipnet_returns(ce, torch.ones(2, 3, dtype=torch.bool), torch.ones(3), 0.1).requires_grad


def test_stage_one_teaches_gates_and_blocks_by_cross_entropy():
    agent, feed = make_agent(supervised=1.0, initial_keep=0.9), Feed(small_images(), 16)
    gates, blocks = weights_of(agent.network.gates), weights_of(agent.network.backbone)
    metrics = agent.update(feed)
    assert metrics["hybrid"] == 0 and metrics["loss"] == pytest.approx(metrics["cross_entropy"])
    assert "answer.weight" in changed(agent.network.gates, gates)
    assert "blocks.0.residual.conv1.weight" in changed(agent.network.backbone, blocks)
    assert feed.cursor == 1


@pytest.mark.parametrize("baseline", ["none", "greedy"])
def test_in_stage_two_gates_learn_from_returns_only(baseline):
    """With weight 0 of the REINFORCE term, nothing else moves a gate."""
    feed = Feed(small_images(), 16)
    for rl_weight, moved in ((1.0, True), (0.0, False)):
        agent = make_agent(supervised=0.0, baseline=baseline, rl_weight=rl_weight, weight_decay=0.0)
        gates, blocks = weights_of(agent.network.gates), weights_of(agent.network.backbone)
        assert agent.update(feed)["hybrid"] == 1
        assert ("answer.weight" in changed(agent.network.gates, gates)) == moved
        assert "blocks.0.residual.conv1.weight" in changed(agent.network.backbone, blocks)


@pytest.mark.parametrize("supervised", [0.0, 1.0])
def test_frozen_means_bit_identical(supervised):
    agent, feed = make_agent(frozen=True, supervised=supervised, initial_keep=0.9), Feed(small_images(), 16)
    gates, blocks = weights_of(agent.network.gates), weights_of(agent.network.backbone)
    for _ in range(3):
        agent.update(feed)
    assert not changed(agent.network.backbone, blocks) and changed(agent.network.gates, gates)


def test_the_backbone_that_is_copied_stays_as_it_is():
    backbone = small_backbone()
    before = weights_of(backbone)
    agent = SkipNet(backbone, IMAGE, 10, supervised=0.5)
    agent.update(Feed(small_images(), 16))
    assert not changed(backbone, before)


def test_learning_rates_of_both_stages():
    agent, feed = make_agent(4, supervised=0.5, lr=0.1, hybrid_lr=0.001, schedule="constant", backbone_lr=0.5), None
    feed = Feed(small_images(), 16)
    rates = []
    for _ in range(4):
        rates.append([group["lr"] for group in agent.optimizer.param_groups])
        agent.update(feed)
    assert rates == [pytest.approx(r) for r in ([0.1, 0.05], [0.1, 0.05], [0.001, 0.0005], [0.001, 0.0005])]


def test_costs_are_one_on_average():
    agent = make_agent(cost="macs")
    assert agent.cost_G.mean().item() == pytest.approx(1) and len(agent.cost_G.unique()) > 1
    torch.testing.assert_close(agent.cost_G * agent.costs.block_K[1:].mean().float(), agent.costs.block_K[1:].float())
    assert make_agent(cost="ones").cost_G.tolist() == [1] * 5


def test_a_restored_state_goes_on_where_it_stopped():
    feed, twin_feed = (Feed(small_images(), 16) for _ in range(2))
    options = dict(supervised=0.3, baseline="greedy", optimizer="adam", initial_keep=0.7)
    agent, twin = make_agent(**options), make_agent(**options)
    for _ in range(4):
        agent.update(feed)
    file = io.BytesIO()
    torch.save(agent.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True))
    twin_feed.seek(feed.cursor)
    assert [agent.update(feed) for _ in range(2)] == [twin.update(twin_feed) for _ in range(2)]


def test_evaluation_is_the_gates_own_pass():
    agent, images = make_agent(alpha=0.5), small_images()
    scatter_gates(agent)
    result = evaluate_gates(agent, images, 16)
    keep_NK = agent.act(images.images)
    assert len(keep_NK.unique(dim=0)) > 1
    assert torch.equal(result.ran_NK, keep_NK) and torch.equal(result.label_N, images.label_N)
    assert torch.equal(result.macs_N, agent.costs.of(keep_NK) + agent.decision_macs)
    with torch.no_grad():
        full = agent.network.backbone(images.images).argmax(1) == images.label_N
        logits = agent.network.backbone(images.images, keep_NK)
    assert torch.equal(result.full_correct_N, full)
    ce = torch.nn.functional.cross_entropy(logits, images.label_N, reduction="none")
    torch.testing.assert_close(result.reward_N, -ce + 0.5 * (~keep_NK).sum(1) / 5, rtol=1e-4, atol=1e-5)


def test_it_learns_to_skip_what_does_not_matter():
    """Every image has one class, so any network is right once its head says so; skipping is then the only gain."""
    images = TensorImages(small_images(64).images, torch.zeros(64, dtype=torch.int64))
    options = dict(supervised=0.2, alpha=1.0, initial_keep=0.9, optimizer="adam", baseline="greedy", seed=1)
    agent, feed = make_agent(60, **{**options, "lr": 0.02, "hybrid_lr": 0.05, "schedule": "constant"}), Feed(images, 32)
    for _ in range(60):
        agent.update(feed)
    result = evaluate_gates(agent, images, 32)
    assert result.accuracy == 1.0 and result.ran_NK.sum(1).float().mean() < 2.5  # it started with 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "lstm"}, "agent.gate"),
        ({"cost": "flops"}, "agent.cost"),
        ({"baseline": "mean"}, "agent.baseline"),
        ({"optimizer": "lion"}, "agent.optimizer"),
        ({"schedule": "never"}, "agent.schedule"),
        ({"alpha": -1.0}, "agent.alpha"),
        ({"supervised": 1.5}, "agent.supervised"),
        ({"backbone_lr": 0.0}, "agent.backbone_lr"),
        ({"initial_keep": 0.0}, "agent.initial_keep"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(UserError, match=message):
        make_agent(**options)


def test_no_gradient_flows_into_returns_or_baseline():
    log_p, returns, baseline = (torch.rand(4, 3, requires_grad=True) for _ in range(3))
    hybrid_loss(torch.zeros(4), log_p, returns, baseline, 1.0).backward()
    assert log_p.grad is not None and returns.grad is None and baseline.grad is None


def test_the_seed_decides_first_gates_and_samples():
    first, same, other = (make_agent(seed=seed) for seed in (1, 1, 2))
    weights = [agent.network.gates.answer.weight for agent in (first, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    drawn = [agent._uniform(16) for agent in (first, same, other)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_the_baseline_is_the_return_of_the_greedy_decisions():
    """In evaluation mode, as batch normalisation of a batch would mix the images."""
    images, label_B = small_images(16).images, small_images(16).label_N
    agent = make_agent(baseline="greedy", alpha=0.6)
    scatter_gates(agent)
    agent.network.train()
    baseline_BG = agent._baseline(images, label_B)
    with torch.no_grad():
        keep_BK = agent.network.eval().greedy(images).keep_BK
        ce_B = torch.nn.functional.cross_entropy(agent.network.backbone(images, keep_BK), label_B, reduction="none")
    by_hand = [[0.12 * float((~keep[g:]).sum()) for g in range(5)] for keep in keep_BK[:, 1:]]  # α / G = 0.6 / 5
    torch.testing.assert_close(baseline_BG, torch.tensor(by_hand) - ce_B.unsqueeze(1), rtol=1e-4, atol=1e-5)
    assert len(keep_BK.unique(dim=0)) > 1 and not make_agent()._baseline(images, label_B).any()


def test_schedules_go_by_each_stage_s_own_progress():
    """Each stage has two updates: its second one is half-way, where "steps" has divided the rate by ten."""
    agent, feed, rates = make_agent(4, supervised=0.5, schedule="steps", hybrid_lr=0.002), Feed(small_images(), 16), []
    for _ in range(4):
        rates.append(agent.optimizer.param_groups[0]["lr"])
        agent.update(feed)
    assert rates == pytest.approx([0.01, 0.001, 0.002, 0.0002])


@pytest.mark.parametrize("supervised", [0.0, 1.0])
def test_the_figures_of_an_update_by_hand(supervised):
    """Gates without weights keep their block with the probability of their bias, whatever they see: 3/4, or never."""
    feed = Feed(small_images(), 16)
    for bias, keep_probability, kept in ((math.log(3), 0.75, 6.0), (-50.0, 0.0, 1.0)):
        agent = make_agent(supervised=supervised, alpha=0.5, baseline="none")
        for parameter in agent.network.gates.parameters():
            torch.nn.init.zeros_(parameter)
        torch.nn.init.constant_(agent.network.gates.answer.bias, bias)
        metrics = agent.update(feed)
        assert metrics["keep_probability"] == pytest.approx(keep_probability, abs=1e-6)
        if supervised or not keep_probability:  # no sample
            assert metrics["kept"] == kept
            assert metrics["reward"] == pytest.approx(0.5 * (6 - kept) / 5 - metrics["cross_entropy"], rel=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_settings_reach_the_optimizer(optimizer):
    agent = make_agent(optimizer=optimizer, weight_decay=0.03)
    assert {group["weight_decay"] for group in agent.optimizer.param_groups} == {0.03}
    assert optimizer == "adam" or agent.optimizer.defaults["momentum"] == 0.9
    assert agent.decision_macs == agent.network.gate_macs > 0
