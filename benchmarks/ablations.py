"""The tables of docs/why.md: what deciding per image could gain over a network, and what a policy can learn of it.

    python benchmarks/ablations.py FOLDER CHECKPOINT DEPTH [--device cuda] [--images N] [--steps N]

FOLDER holds images as ``data=imagefolder`` reads them, CHECKPOINT the weights of a CIFAR ResNet of that depth. Sets of
blocks are chosen, and prices and thresholds read, on half A of the validation images; every figure is of half B. The
test images are not read. ``--images N`` takes N training and N validation images, to try the script; ``--steps`` is the
number of updates of each policy. Writes benchmarks/results/ablations-resnet<DEPTH>.json and prints what it writes.

A *margin* is the accuracy minus that of the best fixed set or mixture of two sets that costs as much, in points, with
half of its 95 % interval over the images of half B. Costs are shares of the network's MACs, the policy's own included.

Shapes: F sets of blocks, M of them on the menu, N images, D features, K blocks, C classes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policyskip.agents.blockdrop import BlockDrop
from policyskip.backbones import Backbone, cifar_resnet, count_costs
from policyskip.backbones.costs import count_macs
from policyskip.backbones.folding import folded
from policyskip.data import imagefolder
from policyskip.data.tensors import TensorImages, crop_and_flip
from policyskip.envs.block_selection import BlockSelectionVectorEnv
from policyskip.evaluation.evaluate import evaluate
from policyskip.policies.networks import PolicyNetwork
from policyskip.rewards import Outcome, Utilization

RESULTS = Path(__file__).parent / "results"
COSTS = (0.3, 0.4, 0.5, 0.6, 0.75)  # at which policies over a menu are reported
PRICES = [0.0, *(0.005 * 1.22**i for i in range(32))]  # of the whole network's MACs, in accuracy
Figures = dict[str, Any]


class Likelihood:
    """A reward like ``Utilization`` with the probability of the label in place of right or wrong."""

    def __init__(self, penalty: float) -> None:
        self.penalty = penalty

    def __call__(self, outcome: Outcome) -> Tensor:
        likely_B = outcome.logits_BC.softmax(1).gather(1, outcome.label_B[:, None])[:, 0]
        return likely_B * (1 - outcome.kept_fraction_B**2) - (1 - likely_B) * self.penalty


class World:
    """Holds a frozen network, its costs and its images: training images, the same cropped and mirrored, and both halves
    of the validation images."""

    def __init__(self, folder: str, checkpoint: str, depth: int, device: torch.device, count: int | None) -> None:
        data = imagefolder(device, folder)
        train, validation = data.train, data.validation
        assert isinstance(train, TensorImages) and isinstance(validation, TensorImages), "the images fit into memory"
        self.network = cifar_resnet(len(data.classes), depth, checkpoint=checkpoint).freeze().to(device)
        self.fast: Backbone = folded(self.network)
        costs = count_costs(self.network, data.image_shape)
        self.device, self.full, self.K = device, costs.full, self.network.num_blocks
        self.always, self.block_K = costs.always / costs.full, (costs.block_K / costs.full).to(device)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))[:count].to(device)
        held_out = torch.randperm(len(validation), generator=torch.Generator().manual_seed(7))[:count].to(device)
        plain = train.images[order]
        changed = crop_and_flip(plain, torch.Generator().manual_seed(2))
        self.images = torch.cat([plain, changed, validation.images[held_out]])
        self.label_N = torch.cat([train.label_N[order], train.label_N[order], validation.label_N[held_out]])
        n, everything = len(order), torch.arange(len(self.images), device=device)
        ends = (n, 2 * n, 2 * n + len(held_out) // 2)
        self.plain, self.changed, self.half_a, self.half_b = everything.tensor_split(ends)
        self.train, self.everything = everything[: 2 * n], everything

    def cost(self, keep: Tensor) -> Tensor:
        """Return the share of the network's MACs, float64 (…), of sets or decisions, bool (…, K)."""
        return self.always + (keep * self.block_K).sum(-1)

    @torch.no_grad()
    def features(self, index_N: Tensor, keep_K: list[bool]) -> Tensor:
        """Compute the features (N, …) after the first blocks, as many as ``keep_K`` is long."""
        pieces = []
        for index in index_N.split(500):
            x = self.fast.features(self.images[index])
            for block, kept in zip(self.fast.blocks, keep_K):
                x = block(x) if kept else block.shortcut(x)
            pieces.append(x)
        return torch.cat(pieces)

    @torch.no_grad()
    def probabilities(self, index_N: Tensor, sets_FK: Tensor) -> Tensor:
        """Compute the softmax (F, N, C) of every set on images. Sets that begin alike share their first blocks."""
        order = sorted(range(len(sets_FK)), key=lambda i: sets_FK[i].tolist())
        out = torch.empty(len(sets_FK), len(index_N), self.network.num_classes, device=self.device)
        for rows in torch.arange(len(index_N), device=self.device).split(250 if self.device.type == "cpu" else 2000):
            trail, before = [self.fast.features(self.images[index_N[rows]])], [None] * self.K
            for i in order:
                keep = sets_FK[i].tolist()
                shared = next((k for k in range(self.K) if keep[k] != before[k]), self.K)
                del trail[shared + 1 :]
                for k in range(shared, self.K):
                    block = self.fast.blocks[k]
                    trail.append(block(trail[-1]) if keep[k] else block.shortcut(trail[-1]))
                out[i, rows], before = self.fast.head(trail[-1]).softmax(1), keep
        return out

    def of_label(self, probability_FNC: Tensor, index_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return whether the top class is the label, and the label's probability, both float (F, N)."""
        label_N = self.label_N[index_N]
        soft = probability_FNC.gather(2, label_N.view(1, -1, 1).expand(len(probability_FNC), -1, 1)).squeeze(2)
        return (probability_FNC.argmax(2) == label_N).float(), soft


def strong_sets(world: World, prefix_K: list[bool], levels: int, tries: int, rounds: int) -> Tensor:
    """Search strong sets, bool (≤ levels, K), spread over the costs, by accuracy and probability on half A.

    All sets begin with the blocks of ``prefix_K``. Sets that are evenly spread within each stage, and random ones, are
    tried on 600 images; the six best of each level on all; then swaps of two blocks that help are made.
    """
    generator, K, cut = torch.Generator().manual_seed(0), world.K, len(prefix_K)
    stage = -(-K // 3)

    def score(sets_FK: Tensor, count: int) -> Tensor:
        index = world.half_a[torch.randperm(len(world.half_a), generator=generator)[:count].to(world.device)]
        right, soft = world.of_label(world.probabilities(index, sets_FK), index)
        return (right.mean(1) + soft.mean(1)).cpu() / 2

    pool = (
        torch.rand(tries, K, generator=generator)
        < torch.rand(tries, 3, generator=generator).repeat_interleave(stage, 1)[:, :K]
    )
    evenly = []
    for counts in itertools.product(*[sorted({round(stage * f) for f in (0, 0.12, 0.25, 0.4, 0.6, 0.8, 1)})] * 3):
        keep = torch.zeros(K, dtype=torch.bool)
        for s, m in enumerate(counts):
            keep[s * stage + torch.linspace(0, stage - 1, m).round().long()] = True
        evenly.append(keep)
    pool = torch.cat([pool, torch.stack(evenly), torch.ones(1, K, dtype=torch.bool)])
    pool[:, :cut] = torch.tensor(prefix_K, dtype=torch.bool)
    pool = torch.unique(pool, dim=0)
    cost = world.cost(pool.to(world.device)).cpu()
    level = (cost[:, None] - torch.linspace(float(cost.min()), 1, levels)).abs().argmin(1)
    quality = score(pool, 600)
    kept = torch.cat(
        [(level == i).nonzero()[:, 0][quality[level == i].argsort(descending=True)[:6]] for i in level.unique()]
    )
    pool, level, quality = pool[kept], level[kept], score(pool[kept], len(world.half_a))
    best = {
        int(i): (float(quality[level == i].max()), pool[level == i][quality[level == i].argmax()])
        for i in level.unique()
    }
    for _ in range(rounds):
        swaps, levels_of = [], []
        for i, (_, keep) in best.items():
            on, off = (keep[cut:] == state for state in (True, False))
            if on.any() and off.any():
                for _ in range(4):
                    swapped = keep.clone()
                    swapped[cut + torch.multinomial(on.float(), 1, generator=generator)] = False
                    swapped[cut + torch.multinomial(off.float(), 1, generator=generator)] = True
                    swaps.append(swapped)
                    levels_of.append(i)
        for value, keep, i in zip(score(torch.stack(swaps), len(world.half_a)).tolist(), swaps, levels_of):
            best[i] = max(best[i], (value, keep), key=lambda pair: pair[0])
    return torch.stack([best[i][1] for i in sorted(best)]).to(world.device)


class Rival:
    """The best fixed set or mixture of two sets at any cost: chosen on half A, judged on half B.

    Args:
        cost_F, right_a, right_b: cost of each set, and what it gets right, float (F, N), on either half.
    """

    def __init__(self, cost_F: Tensor, right_a: Tensor, right_b: Tensor) -> None:
        self.right_b, self.hull = right_b.double(), list[tuple[float, float, int]]()
        for c, a, i in sorted(zip(cost_F.tolist(), right_a.double().mean(1).tolist(), range(len(cost_F)))):
            if self.hull and a <= self.hull[-1][1]:
                continue
            while len(self.hull) > 1 and self._slope(-2, -1) <= (a - self.hull[-2][1]) / (c - self.hull[-2][0]):
                self.hull.pop()
            self.hull.append((c, a, i))

    def _slope(self, i: int, j: int) -> float:
        return (self.hull[j][1] - self.hull[i][1]) / (self.hull[j][0] - self.hull[i][0])

    def judge(self, right_N: Tensor, cost_N: Tensor) -> Figures:
        """Return accuracy, cost and margin on half B of decisions that are right or not, and cost so much."""
        cost_N = cost_N.double().expand(len(right_N))
        cost = min(max(float(cost_N.mean()), self.hull[0][0]), self.hull[-1][0])
        j = next((j for j in range(1, len(self.hull)) if self.hull[j][0] >= cost), len(self.hull) - 1)
        (c, _, first), (d, _, second) = self.hull[j - 1], self.hull[j]
        weight = (d - cost) / (d - c)
        fixed_N = weight * self.right_b[first] + (1 - weight) * self.right_b[second]
        margin_N = right_N.double() - fixed_N - self._slope(j - 1, j) * (cost_N - cost_N.mean())
        half = 1.96 * float(margin_N.std()) / math.sqrt(len(margin_N))
        return {
            "cost": round(float(cost_N.mean()), 3),
            "accuracy": round(100 * float(right_N.double().mean()), 2),
            "margin": round(100 * float(margin_N.mean()), 2),
            "ci95": round(100 * half, 2),
        }

    def by_value(self, value_NM: Tensor, cost_M: Tensor, right_MN: Tensor, own: float) -> dict[str, Figures]:
        """Choose the set with the highest ``value − price · cost`` for each image; report at the price whose cost comes
        nearest to each of ``COSTS``, and nothing where none comes within 0.06."""
        rows = []
        for price in PRICES:
            choice_N = (value_NM - price * cost_M).argmax(1)
            rows.append(self.judge(right_MN.gather(0, choice_N[None])[0], cost_M[choice_N] + own))
        nearest = {str(goal): min(rows, key=lambda row: abs(row["cost"] - goal)) for goal in COSTS}
        return {goal: row for goal, row in nearest.items() if abs(row["cost"] - float(goal)) < 0.06}


def fit(network: nn.Module, inputs: Tensor, target_NM: Tensor, steps: int) -> None:
    """Teach a network the outcome of every set on the menu, by binary cross-entropy: no decision is sampled."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2)
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        last.bias.copy_(target_NM.mean(0).clamp(0.01, 0.99).logit())
    network.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
        index = torch.randint(len(inputs), (512,), generator=generator).to(inputs.device)
        loss = F.binary_cross_entropy_with_logits(network(inputs[index]), target_NM[index])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    network.eval()


class Pixels(nn.Module):
    """The package's policy network, with one output for each set on the menu."""

    def __init__(self, num_sets: int, width: int, pool: int) -> None:
        super().__init__()
        self.network = PolicyNetwork(num_sets, "cifar", width, pool)

    def forward(self, images: Tensor) -> Tensor:
        return self.network.features_and_logits(images)[1]


def perceptron(num_features: int, num_sets: int) -> nn.Module:
    return nn.Sequential(
        nn.BatchNorm1d(num_features), nn.Linear(num_features, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, num_sets)
    )


def pooled(features: Tensor) -> Tensor:
    """Average features (N, …, H, W) over 4×4 fields, float (N, D)."""
    return torch.cat([F.adaptive_avg_pool2d(x, 4).flatten(1) for x in features.split(2000)])


class Menu:
    """A menu of strong sets, their outcomes on all images, and the rival made of them."""

    def __init__(self, world: World, sets_MK: Tensor) -> None:
        self.world, self.sets_MK, self.cost_M = world, sets_MK, world.cost(sets_MK)
        self.probability_MNC = world.probabilities(world.everything, sets_MK)
        self.right_MN, self.soft_MN = world.of_label(self.probability_MNC, world.everything)
        self.rival = Rival(self.cost_M, self.right_MN[:, world.half_a], self.right_MN[:, world.half_b])


def by_heart(menu: Menu) -> list[Figures]:
    """Compare accuracy and confidence of each set on training images, cropped and mirrored ones, and validation."""
    world = menu.world
    held_out, top = torch.cat([world.half_a, world.half_b]), menu.probability_MNC.amax(2)
    columns = {
        "accuracy_training": menu.right_MN[:, world.plain],
        "accuracy_training_changed": menu.right_MN[:, world.changed],
        "accuracy_validation": menu.right_MN[:, held_out],
        "confidence_training": top[:, world.plain],
        "confidence_validation": top[:, held_out],
    }
    figures = {key: value.mean(1).mul(100).tolist() for key, value in columns.items()}
    return [
        {"cost": round(float(menu.cost_M[i]), 3), "blocks": int(menu.sets_MK[i].sum())}
        | {key: round(values[i], 2) for key, values in figures.items()}
        for i in menu.cost_M.argsort().tolist()
    ]


def headroom(menu: Menu, samples: int = 32) -> Figures:
    """Return the oracle's margin, that of one who knows the true class, and that of one who knows how likely each image
    is to be right under random sets of each size (which is judged by other random sets)."""
    world, rival = menu.world, menu.rival
    right_b = menu.right_MN[:, world.half_b]
    result: Figures = {}
    for least in (0.0, 0.25, 0.4):
        ordered = menu.cost_M.argsort()
        ordered = ordered[menu.cost_M[ordered] >= least]
        cheapest = ordered[right_b[ordered].argmax(0)]  # the cheapest set of all where none is right
        result[f"oracle over sets from {least} on"] = rival.judge(right_b[ordered].amax(0), menu.cost_M[cheapest])
    label_a, label_b = world.label_N[world.half_a], world.label_N[world.half_b]
    of_class = torch.stack(
        [menu.right_MN[:, world.half_a[label_a == c]].mean(1) for c in range(world.network.num_classes)], 1
    ).nan_to_num()
    result["class known"] = rival.by_value(of_class[:, label_b].T, menu.cost_M, right_b, 0.0)
    generator = torch.Generator().manual_seed(5)
    sizes = [round(world.K * share) for share in (0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.8, 1)]
    random = torch.stack([torch.randperm(world.K, generator=generator).argsort() for _ in range(samples * len(sizes))])
    random_FK = random < torch.tensor(sizes).repeat_interleave(samples)[:, None]
    index = torch.cat([world.half_a, world.half_b])
    right, _ = world.of_label(world.probabilities(index, random_FK.to(world.device)), index)
    right_LSN = right.view(len(sizes), samples, -1)
    cost_L = torch.stack(
        [world.cost(random_FK.to(world.device))[i * samples :][:samples].mean() for i in range(len(sizes))]
    )
    first, second = right_LSN[:, ::2].mean(1), right_LSN[:, 1::2].mean(1)
    amount = Rival(cost_L, right_LSN.mean(1), second)
    result["random sets"] = [
        {
            "blocks": size,
            "cost": round(float(cost_L[i]), 3),
            "accuracy": round(100 * float(right_LSN[i].mean()), 2),
            "share of the variance that other sets share": round(
                float(torch.cov(torch.stack([first[i], second[i]]))[0, 1] / right_LSN[i].var()), 3
            ),
            "right under 10 to 90 % of the sets": round(
                float(((right_LSN[i].mean(0) > 0.1) & (right_LSN[i].mean(0) < 0.9)).float().mean()), 3
            ),
        }
        for i, size in enumerate(sizes)
    ]
    result["amount known"] = amount.by_value(first.T, cost_L, second, 0.0)
    result["amount known, same sets"] = Rival(cost_L, right_LSN.mean(1), first).by_value(first.T, cost_L, first, 0.0)
    return result


def changes(menu: Menu) -> list[Figures]:
    """Count the validation images that become right, and those that become wrong, from one set to a dearer one."""
    held_out = torch.cat([menu.world.half_a, menu.world.half_b])
    nearest = [int((menu.cost_M - goal).abs().argmin()) for goal in (0.28, 0.41, 0.53, 0.66, 0.8, 1.0)]
    rows = []
    for cheap, dear in itertools.pairwise(nearest):
        before, after = menu.right_MN[cheap, held_out], menu.right_MN[dear, held_out]
        shares = {"right before": before, "right after": after, "become right": after * (1 - before)}
        shares["become wrong"] = before * (1 - after)
        costs = {"from": round(float(menu.cost_M[cheap]), 3), "to": round(float(menu.cost_M[dear]), 3)}
        rows.append(costs | {key: round(100 * float(share.mean()), 2) for key, share in shares.items()})
    return rows


def predictable(menu: Menu, cut: int, steps: int) -> dict[str, dict[str, Figures]]:
    """Teach policies over a menu, whose sets begin with the same ``cut`` blocks, what each set does to each image.

    They see the pixels (if nothing is shared), the features after those blocks, or the answer of a cheap set of the
    menu, which is paid for: what it shares with the set that runs afterwards is paid for once. They learn on training
    images, or on half A; they are taught whether each set is right, or the label's probability.

    Returns: margins by what is seen, learned on and taught.
    """
    world, result = menu.world, dict[str, dict[str, Figures]]()
    right_b = menu.right_MN[:, world.half_b]
    taught = {"right or wrong": menu.right_MN.T, "probability": menu.soft_MN.T}

    def learn(name: str, make: Callable[[], nn.Module], inputs: Tensor, cost_M: Tensor, shared: float = 0.0) -> None:
        for target, target_NM in taught.items():
            for source, index in (("training images", world.train), ("half A", world.half_a)):
                torch.manual_seed(0)
                network = make().to(world.device)
                few = steps if source == "training images" else steps // 3  # half A is seen often enough
                fit(network, inputs[index], target_NM[index], few)
                with torch.no_grad():
                    value_NM = torch.cat([network(x) for x in inputs[world.half_b].split(1000)])
                own = count_macs(network, inputs[:1]) / world.full + shared
                figures = menu.rival.by_value(value_NM.sigmoid(), cost_M, right_b, own)
                result[f"{name} | {source} | {target}"] = figures
                print(name, source, target, figures, flush=True)

    M = len(menu.cost_M)
    if cut == 0:
        for width, pool in ((8, 2), (16, 1)):
            seen = f"pixels, width {width}, pool {pool}"
            learn(seen, partial(Pixels, M, width, pool), world.images, menu.cost_M)
    features = pooled(world.features(world.everything, menu.sets_MK[0, :cut].tolist()))
    learn(f"features after block {cut}", lambda: perceptron(features.shape[1], M), features, menu.cost_M)
    first = int((menu.cost_M - 0.3).abs().argmin())
    likely_NC = menu.probability_MNC[first]
    top_NC = likely_NC.sort(1, descending=True).values
    answer = torch.cat([(likely_NC + 1e-3).log(), top_NC[:, :3], top_NC[:, :1] - top_NC[:, 1:2]], 1)
    differs_MK = (menu.sets_MK != menu.sets_MK[first]).cumsum(1) > 0  # from the first block on that is another
    again_M = menu.cost_M - world.always - (menu.sets_MK & ~differs_MK).double() @ world.block_K
    again_M[first] = 0
    cost_M = menu.cost_M[first] + again_M
    learn(
        f"answer of the set of cost {float(menu.cost_M[first]):.2f}",
        lambda: perceptron(answer.shape[1], M),
        answer,
        cost_M,
    )
    return result


def by_reinforce(menu: Menu, steps: int, penalty: float = 4.0) -> dict[str, Figures]:
    """Train BlockDrop as the package does, and with one thing changed at a time; return margins on half B."""
    world = menu.world
    used_M = menu.sets_MK.float().mean(1)
    reward_M = menu.right_MN[:, world.half_a].mean(1) * (1 - used_M**2 + penalty)
    start = menu.sets_MK[int(reward_M.argmax())].tolist()
    variants: dict[str, dict[str, Any]] = {
        "as the package does": {},
        "training images as they are": {"changed": False},
        "learned on half A": {"index": world.half_a},
        "probability of the label": {"reward": Likelihood(penalty)},
        "16 samples, leave one out": {"samples": 16, "baseline": "leave_one_out"},
        "width 16, pool 1": {"width": 16, "pool": 1},
        "cannot see the image": {"policy": "constant", "lr": 0.05},
    }
    result = {}
    for name, options in variants.items():
        index = options.pop("index", world.plain)
        change = crop_and_flip if options.pop("changed", True) else None
        reward = options.pop("reward", Utilization(penalty))
        images = TensorImages(world.images[index], world.label_N[index], augment=change)
        env = BlockSelectionVectorEnv(min(256, len(index)), backbone=world.network, images=images, reward=reward)
        settings: dict[str, Any] = dict(
            lr=3e-3, schedule="onecycle", alpha_end=0.98, beta=0.01, samples=3, curriculum=0, width=8, pool=2
        )
        agent = BlockDrop(env, steps, initial_keep=0.9, start=start, **(settings | options))
        for _ in range(steps):
            agent.update(env)
        judged = TensorImages(world.images[world.half_b], world.label_N[world.half_b])
        judged_env = BlockSelectionVectorEnv(len(judged), backbone=world.network, images=judged, order="sequential")
        decisions = evaluate(agent, judged_env, full=False)
        correct_N, cost_N = decisions.correct_N.to(world.device), decisions.macs_N.to(world.device) / world.full
        ran_NK = decisions.ran_NK[torch.randperm(len(correct_N), generator=torch.Generator().manual_seed(0))]
        judged_env.reset()
        dealt = judged_env.score(ran_NK.to(world.device)).correct_B  # the same decisions, for other images
        result[name] = menu.rival.judge(correct_N.double(), cost_N)
        result[name]["dealt at random"] = round(100 * float(dealt.double().mean()), 2)
        print(name, result[name], flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("checkpoint")
    parser.add_argument("depth", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int)
    parser.add_argument("--steps", type=int, default=400)
    given = parser.parse_args()
    world = World(given.folder, given.checkpoint, given.depth, torch.device(given.device), given.images)
    stage = world.K // 3
    searched = strong_sets(world, [], 24, tries=700, rounds=12)
    menu = Menu(world, searched)
    prefix = searched[int((menu.cost_M - 0.3).abs().argmin()), :stage].tolist()
    alike = Menu(world, strong_sets(world, prefix, 16, tries=300, rounds=6))
    alike.rival = menu.rival  # the rival need not share its first blocks
    results = {
        "menu": by_heart(menu),
        "headroom": headroom(menu),
        "changes": changes(menu),
        "predictable": predictable(menu, 0, given.steps) | predictable(alike, stage, given.steps),
        "reinforce": by_reinforce(menu, given.steps),
    }
    text = json.dumps(results, indent=1)
    (RESULTS / f"ablations-resnet{given.depth}.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
