"""The mathematics of BlockDrop, against enumeration and numbers worked out by hand."""

from __future__ import annotations

import dataclasses
import io
import itertools
import math

import pytest
import torch

from policyskip.agents.blockdrop import BlockDrop, bernoulli_entropy, bounded, log_probability, reinforce_loss
from policyskip.agents.schedules import one_cycle
from policyskip.envs.block_selection import BlockSelectionVectorEnv
from policyskip.errors import UserError
from policyskip.policies.networks import ConstantPolicy, PolicyNetwork
from tests.conftest import small_backbone, small_images

ALPHA = 0.8
K = 4
EVERY = torch.tensor(list(itertools.product([False, True], repeat=K)))  # all 2^K decisions, (16, K)


def make_env(batch_size: int = 16, **kwargs) -> BlockSelectionVectorEnv:
    return BlockSelectionVectorEnv(batch_size, backbone=small_backbone(), images=small_images(), **kwargs)


def make_agent(env: BlockSelectionVectorEnv, total_steps: int = 10, **kwargs) -> BlockDrop:
    return BlockDrop(env, total_steps, **{"width": 4, "curriculum": 0.0, **kwargs})


def test_bounded_by_hand():
    torch.testing.assert_close(bounded(torch.tensor([0.0, 0.25, 1.0]), 0.8), torch.tensor([0.2, 0.35, 0.8]))


def test_log_probability_is_that_of_the_bounded_bernoulli():
    logits = torch.tensor([[0.3, -2.0, 50.0, -200.0]])
    keep = torch.tensor([[[True, True, False, True]], [[False, False, True, False]]])
    s = bounded(logits.sigmoid(), ALPHA)
    expected = torch.where(keep, s, 1 - s).log()
    torch.testing.assert_close(log_probability(logits, keep, ALPHA), expected)
    unbounded = log_probability(logits, keep, 1.0)
    torch.testing.assert_close(unbounded[0, 0, 3], torch.tensor(-200.0))  # where log(sigmoid) would be -inf


def test_probabilities_of_all_decisions_sum_to_one():
    logits = torch.randn(3, K, generator=torch.Generator().manual_seed(0))
    log_pi = log_probability(logits, EVERY.unsqueeze(1).expand(-1, 3, -1), ALPHA).sum(2)
    torch.testing.assert_close(log_pi.exp().sum(0), torch.ones(3))


def test_entropy_by_hand():
    expected = torch.tensor([0.0, math.log(2), 0.0, -0.2 * math.log(0.2) - 0.8 * math.log(0.8)])
    torch.testing.assert_close(bernoulli_entropy(torch.tensor([0.0, 0.5, 1.0, 0.2])), expected)


@pytest.mark.parametrize("with_baseline", [False, True])
@pytest.mark.parametrize("free", [[True] * 4, [False, False, True, True]])
def test_expected_gradient_is_the_gradient_of_the_expected_reward(with_baseline, free):
    """Enumerate all 2^4 decisions of 3 images: E[REINFORCE gradient] = -∇ E[reward], greedy baseline or none."""
    B = 3
    free_K = torch.tensor(free)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(B, K, generator=generator, dtype=torch.float64, requires_grad=True)
    reward_of_code = torch.randn(2**K, B, generator=generator, dtype=torch.float64)

    keep_SBK = EVERY.unsqueeze(1).expand(-1, B, -1) | ~free_K  # blocks that are not free are kept
    code = (keep_SBK * torch.tensor([8, 4, 2, 1])).sum(2)
    reward_SB = reward_of_code.gather(0, code)
    s = bounded(logits.sigmoid(), ALPHA)
    # Only decisions over the free blocks are drawn; each appears once for each setting of the frozen ones.
    repeats = 2 ** int((~free_K).sum())
    pi_SB = torch.where(keep_SBK, s, 1 - s).masked_fill(~free_K, 1.0).prod(2) / repeats
    expected = torch.autograd.grad(-(pi_SB * reward_SB).sum(0).mean(), logits)[0]

    greedy = (logits.detach() >= 0) | ~free_K
    baseline_B = reward_of_code.gather(0, (greedy * torch.tensor([8, 4, 2, 1])).sum(1).unsqueeze(0))[0]
    advantage = reward_SB - baseline_B if with_baseline else reward_SB
    # The loss is a mean over samples; weighting each decision by S·π(u) makes that mean an expectation.
    loss = reinforce_loss(logits, keep_SBK, advantage * pi_SB.detach() * len(EVERY), free_K, ALPHA, beta=0.0)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], expected)
    assert expected.abs().max() > 1e-3


def test_loss_by_hand():
    """One image, one decision, K = 2, p = ½: s' = ½, so loss = -A·2·log ½ - β·2·log 2."""
    keep = torch.tensor([[[True, False]]])
    loss = reinforce_loss(torch.zeros(1, 2), keep, torch.tensor([[3.0]]), torch.ones(2, dtype=torch.bool), ALPHA, 0.1)
    assert loss.item() == pytest.approx(6 * math.log(2) - 0.2 * math.log(2))


def test_entropy_gradient_pushes_towards_one_half():
    logits = torch.tensor([[2.0, -2.0]], requires_grad=True)
    keep, free = torch.ones(1, 1, 2, dtype=torch.bool), torch.ones(2, dtype=torch.bool)
    gradient = torch.autograd.grad(reinforce_loss(logits, keep, torch.zeros(1, 1), free, ALPHA, 0.1), logits)[0]
    assert gradient[0, 0] > 0 > gradient[0, 1]


def test_frozen_blocks_get_no_gradient_from_either_term():
    logits = torch.randn(2, K, requires_grad=True)
    free = torch.tensor([False, False, False, True])
    loss = reinforce_loss(logits, EVERY[:2].unsqueeze(1).expand(-1, 2, -1), torch.ones(2, 2), free, ALPHA, 0.1)
    gradient = torch.autograd.grad(loss, logits)[0]
    assert (gradient[:, :3] == 0).all() and (gradient[:, 3] != 0).all()


def test_each_image_learns_from_its_own_reward_alone():
    logits = torch.zeros(3, K, requires_grad=True)
    keep, free = EVERY[5:7].unsqueeze(1).expand(-1, 3, -1), torch.ones(K, dtype=torch.bool)
    advantage = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    changed = advantage.clone()
    changed[:, 1] = -7
    before, after = (
        torch.autograd.grad(reinforce_loss(logits, keep, a, free, ALPHA, 0.0), logits)[0] for a in (advantage, changed)
    )
    assert torch.equal(before[[0, 2]], after[[0, 2]]) and not torch.equal(before[1], after[1])


def test_misshapen_advantages_are_refused():
    with pytest.raises(ValueError, match="advantage"):
        reinforce_loss(
            torch.zeros(2, K), torch.ones(1, 2, K).bool(), torch.zeros(2, 1), torch.ones(K).bool(), ALPHA, 0.0
        )


def test_update_compares_samples_with_the_greedy_decision(monkeypatch):
    """The loss that an update reports is the formula, applied to the decisions that the environment scored."""
    env = make_env()
    agent = make_agent(env, samples=3, beta=0.05)
    scored = []
    score = env.score
    monkeypatch.setattr(env, "score", lambda keep: scored.append(keep) or score(keep))
    agent.policy.train()
    with torch.no_grad():
        logits = agent.policy(env.observation)
    agent.policy.load_state_dict(make_agent(env, samples=3, beta=0.05).policy.state_dict())  # undo the statistics
    labels = env.feed.batch
    metrics = agent.update(env)

    (keep,) = scored
    assert keep.shape == (4, 16, env.backbone.num_blocks)
    assert torch.equal(keep[-1], logits >= 0)
    env.feed.batch = labels
    reward = env.rewards(score(keep)).view(4, 16)
    free = torch.ones(env.backbone.num_blocks, dtype=torch.bool)
    expected = reinforce_loss(logits, keep[:-1], reward[:-1] - reward[-1], free, 0.8, 0.05)
    assert metrics["loss"] == pytest.approx(expected.item(), abs=1e-6)
    assert metrics["reward"] == pytest.approx(reward[-1].mean().item())
    assert metrics["sampled_reward"] == pytest.approx(reward[:-1].mean().item())
    greedy = keep[-1]
    assert metrics["kept"] == pytest.approx(greedy.sum(1).float().mean().item())
    macs = env.costs.of(greedy).mean().item() + agent.decision_macs
    assert metrics["macs_fraction"] == pytest.approx(macs / env.costs.full)
    assert metrics["accuracy"] == score(keep).correct_B.view(4, 16)[-1].float().mean().item()


def test_samples_follow_the_bounded_probabilities():
    agent = make_agent(make_env(), samples=4000)
    probability = torch.tensor([[0.0, 0.1, 0.5, 0.7, 0.9, 1.0]])
    frequency = agent._sample(probability).float().mean(0)
    torch.testing.assert_close(frequency, bounded(probability, ALPHA), atol=0.03, rtol=0)


def test_curriculum_frees_the_last_blocks_first():
    env = make_env()  # K = 6
    agent = make_agent(env, total_steps=24, curriculum=0.5)  # two updates for each block
    freed = [int(agent.update(env)["free_blocks"]) for _ in range(14)]
    assert freed == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 6, 6]
    agent.step = 4
    agent._free_blocks()
    assert agent.policy.free_K.tolist() == [False, False, False, True, True, True]
    with torch.no_grad():
        agent.policy.keep_head.bias.fill_(-100.0)
    assert agent.act(env.observation)[0].tolist() == [True, True, True, False, False, False]


def test_the_bound_rises_to_its_end():
    env = make_env()
    agent = make_agent(env, total_steps=4, alpha=0.8, alpha_end=1.0)
    bounds = [agent.alpha]
    for _ in range(4):
        agent.update(env)
        bounds.append(agent.alpha)
    assert bounds == pytest.approx([0.8, 0.85, 0.9, 0.95, 1.0])


def test_schedule():
    assert [one_cycle(p) for p in (0.05, 0.1, 1.0)] == pytest.approx([0.5, 1.0, 0.0])
    assert one_cycle(0.55) == pytest.approx(0.5)


def test_a_fresh_policy_keeps_with_its_initial_probability():
    policy = PolicyNetwork(5, width=4, initial_keep=0.9)
    torch.testing.assert_close(policy.keep_head.bias.sigmoid(), torch.full((5,), 0.9))


def test_advantages_get_no_gradient():
    advantage = torch.ones(1, 2, requires_grad=True)
    loss = reinforce_loss(
        torch.zeros(2, K, requires_grad=True),
        EVERY[:1, None].expand(-1, 2, -1),
        advantage,
        torch.ones(K).bool(),
        ALPHA,
        0.1,
    )
    assert torch.autograd.grad(loss, advantage, allow_unused=True) == (None,)


def test_the_backbone_is_bit_identical_after_training():
    backbone = small_backbone().requires_grad_(True).train()  # as it comes from pretraining
    env = BlockSelectionVectorEnv(8, backbone=backbone, images=small_images())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    before = {name: value.clone() for name, value in env.backbone.state_dict().items()}
    agent = make_agent(env)
    for _ in range(3):
        agent.update(env)
    env.step(agent.act(env.observation))
    after = env.backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("options", [{}, {"baseline": "value", "samples": 3}])
def test_a_restored_state_goes_on_where_it_stopped(options):
    """The value head is part of the state."""
    env, twin_env = make_env(), make_env()
    agent, twin = make_agent(env, **options), make_agent(twin_env, seed=5, **options)
    for _ in range(3):
        agent.update(env)
    file = io.BytesIO()
    torch.save(agent.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True))
    twin_env.seek(env.cursor)
    assert [agent.update(env) for _ in range(3)] == [twin.update(twin_env) for _ in range(3)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"alpha": 0.5}, "alpha"),
        ({"alpha": 1.2}, "alpha"),
        ({"alpha_end": 0.4}, "alpha_end"),
        ({"samples": 0}, "samples"),
        ({"curriculum": 2.0}, "curriculum"),
        ({"lr": 0.0}, "lr"),
        ({"beta": -1.0}, "beta"),
        ({"policy": "mlp"}, "policy"),
        ({"width": 0}, "width"),
        ({"initial_keep": 1.0}, "initial_keep"),
    ],
)
def test_bad_hyperparameters_are_named(wrong, message):
    with pytest.raises(UserError, match=message):
        make_agent(make_env(), **wrong)


def test_the_entropy_is_that_of_the_bounded_probabilities():
    """At odds of 3 to 1 and α = 0.8, s' = 0.8 · 0.75 + 0.2 · 0.25 = 0.65. The block that is not free does not count."""
    logits = torch.tensor([[math.log(3), -5.0]])
    keep, free = torch.ones(1, 1, 2, dtype=torch.bool), torch.tensor([True, False])
    loss = reinforce_loss(logits, keep, torch.zeros(1, 1), free, ALPHA, 0.1)
    assert loss.item() == pytest.approx(0.1 * (0.65 * math.log(0.65) + 0.35 * math.log(0.35)))


def test_a_policy_that_is_sure_gets_finite_gradients():
    """Where s rounds to 0 or 1 the entropy's slope is infinite."""
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    keep, free = torch.ones(1, 1, 2, dtype=torch.bool), torch.ones(2, dtype=torch.bool)
    reinforce_loss(logits, keep, torch.ones(1, 1), free, 1.0, 0.1).backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_at_even_odds_the_greedy_decision_keeps():
    assert ConstantPolicy(3).greedy(torch.tensor([[0.0, -1e-6, 1e-6]])).tolist() == [[True, False, True]]


def test_samples_keep_the_blocks_that_are_not_free():
    """Of the others, at s = 0, a share of s' = 0.2 is kept."""
    agent = make_agent(
        make_env(), samples=1000, total_steps=12, curriculum=0.5
    )  # at first the last block alone is free
    frequency_K = agent._sample(torch.zeros(1, 6)).float().mean((0, 1))
    assert frequency_K[:5].tolist() == [1] * 5 and 0.15 < frequency_K[5] < 0.25


def test_the_seed_decides_first_weights_and_samples():
    first, same, other = (make_agent(make_env(), seed=seed, samples=2) for seed in (1, 1, 2))
    weights = [agent.policy.keep_head.weight for agent in (first, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    drawn = [agent._sample(torch.full((16, 6), 0.5)) for agent in (first, same, other)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("policy", [PolicyNetwork(3, width=4, initial_keep=0.9), ConstantPolicy(3, initial_keep=0.9)])
def test_a_policy_starts_from_a_fixed_set(policy):
    """The blocks of the set are kept with 0.9, the others with the complement."""
    policy.start_from([True, False, True])
    with torch.no_grad():
        logits_K = policy.keep_head.bias if isinstance(policy, PolicyNetwork) else policy.logits_K
        torch.testing.assert_close(logits_K.sigmoid(), torch.tensor([0.9, 0.1, 0.9]))


def test_learning_rates_follow_the_schedule():
    """Warm-up is over after a tenth of the training; after 1/4, (0.25 − 0.1)/0.9 = 1/6 of the cosine, 30°, is done, after
    1/2 80° and after 3/4 130°."""
    cosine = [0.5 * (1 + math.cos(math.radians(degrees))) for degrees in (30, 80, 130, 180)]
    for schedule, rates in (("onecycle", [0.1, *cosine]), ("constant", [1.0] * 5)):
        env = make_env()
        agent = make_agent(env, total_steps=4, lr=0.01, schedule=schedule)
        found = [agent.optimizer.param_groups[0]["lr"], *(agent.update(env)["lr"] for _ in range(4))]
        assert found == pytest.approx([0.01 * rate for rate in rates], abs=1e-9)


def test_the_policy_sees_normalised_pixels():
    """White is (1 − 0.485) / 0.229 in the red channel, black − 0.406 / 0.225 in the blue one."""
    policy, seen = PolicyNetwork(3, width=4), []
    policy.features[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    policy(torch.tensor([255, 0], dtype=torch.uint8).view(2, 1, 1, 1).expand(-1, 3, 8, 8))
    assert seen[0][0, 0, 0, 0].item() == pytest.approx(0.515 / 0.229, rel=1e-5)
    assert seen[0][1, 2, 0, 0].item() == pytest.approx(-0.406 / 0.225, rel=1e-5)


def test_the_accuracy_of_an_update_is_the_greedy_decision_s(monkeypatch):
    """Two samples for each of 16 images are scored as wrong, and the 16 greedy decisions behind them as right."""
    env = make_env()
    score = env.score
    monkeypatch.setattr(env, "score", lambda keep: dataclasses.replace(score(keep), correct_B=torch.arange(48) >= 32))
    assert make_agent(env, samples=2).update(env)["accuracy"] == 1.0
