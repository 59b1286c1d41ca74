"""Planted worlds: what fixed sets and policies get right is drawn at random, and the truth is known in closed form.

A world has F fixed sets of K blocks. Images are of two halves, such as two halves of the classes; a set's true accuracy
on each half is what the world says. An image has a difficulty, and a liking for each block, so that sets which share
blocks are right on the same images. Images may come in groups, which have much of both in common.

Shapes: F sets, K blocks, H = 2 halves, N images, V validation images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri
from torch import Tensor

from policyskip.rivals import Family, Rival, Verdict, choose, judge

LIKING, NOISE = 1.0, 0.5
"""Deviations of an image's liking for blocks, and of what is a set's own, beside difficulty, whose deviation is 1."""
IN_COMMON = 0.8
"""The share of the variance that images of one group have in common."""


@dataclass(frozen=True)
class Images:
    """Holds what the sets get right on some images: bool (F, N); the images' halves, int (N,); and groups or None."""

    correct_FN: NDArray[np.bool_]
    half_N: NDArray[np.int64]
    group_N: NDArray[np.int64] | None


@dataclass(frozen=True)
class World:
    """Holds fixed sets whose true accuracy on each half of the images is known.

    Attributes:
        keep_FK: bool (F, K).
        true_FH: float64 (F, 2), accuracy of each set on each half.
    """

    keep_FK: NDArray[np.bool_]
    true_FH: NDArray[np.float64]

    @property
    def macs_F(self) -> NDArray[np.float64]:
        """Return the cost of each set as a share of the whole network's."""
        return self.keep_FK.mean(1)

    @property
    def true_F(self) -> NDArray[np.float64]:
        """Return the accuracy of each set over all images."""
        return self.true_FH.mean(1)

    def images(self, count: int, generator: np.random.Generator, groups: int | None = None) -> Images:
        """Draw images, in ``groups`` groups if that is a number."""
        F, K = self.keep_FK.shape
        number_N = np.arange(count) if groups is None else generator.integers(0, groups, count)
        common, own = (0.0, 1.0) if groups is None else (IN_COMMON**0.5, (1 - IN_COMMON) ** 0.5)

        def normal(rows: int) -> NDArray[np.float32]:
            """Draw numbers (rows, N) of mean 0 and deviation 1, which images of a group have in common in part."""
            drawn = own * generator.standard_normal((rows, count), dtype=np.float32)
            if common:
                drawn += common * generator.standard_normal((rows, groups or 1), dtype=np.float32)[:, number_N]
            return drawn

        half_N = generator.integers(0, 2, number_N.max() + 1)[number_N]
        liked_FN = LIKING * (self.keep_FK / K**0.5).astype(np.float32) @ normal(K)
        deviation_F = (1 + LIKING**2 * self.macs_F + NOISE**2) ** 0.5
        needed_FH = (ndtri(self.true_FH) * deviation_F[:, None]).astype(np.float32)
        correct_FN = liked_FN + np.float32(NOISE) * normal(F) - normal(1) + needed_FH[:, half_N] > 0
        return Images(correct_FN, half_N, None if groups is None else number_N)

    def best_at(self, macs: float) -> tuple[float, int, int, float]:
        """Find the truly best fixed choice at a cost: its accuracy, two sets, and the weight of the second."""
        cheap_I, dear_J = np.flatnonzero(self.macs_F <= macs + 1e-9), np.flatnonzero(self.macs_F > macs + 1e-9)
        cost_I1 = self.macs_F[cheap_I, None]
        weight_IJ = np.hstack([0 * cost_I1, (macs - cost_I1) / (self.macs_F[dear_J] - cost_I1)])  # first: no partner
        true_IJ = (1 - weight_IJ) * self.true_F[cheap_I, None] + weight_IJ * self.true_F[np.append(0, dear_J)]
        i, j = np.unravel_index(true_IJ.argmax(), true_IJ.shape)
        return true_IJ[i, j], int(cheap_I[i]), int(dear_J[j - 1] if j else cheap_I[i]), weight_IJ[i, j]


@dataclass(frozen=True)
class Policy:
    """Holds a policy's true accuracy and cost, and chooses a set for each image.

    Attributes:
        chooses: from images and a generator to the index of each image's set, int (N,).
        own: the sets that it keeps most often, if it has such.
    """

    accuracy: float
    macs: float
    chooses: Callable[[Images, np.random.Generator], NDArray[np.int64]]
    own: tuple[int, ...] = ()


def a_world(
    generator: np.random.Generator,
    sets: int = 40,
    blocks: int = 12,
    spread: float = 0.02,
    cheapest: float = 0.7,
    dearest: float = 0.9,
    curved: bool = True,
    leaning: float = 0.0,
) -> World:
    """Make a world of sets of every size.

    Args:
        spread: deviation of the sets' accuracies from the smooth function of their cost.
        cheapest, dearest: accuracy of no block and of all.
        curved: whether more blocks bring less and less, or each as much as the one before.
        leaning: by how much each set is better on one half than on average, and worse on the other, in turns.
    """
    size_F = np.concatenate([np.arange(blocks + 1), generator.integers(1, blocks, sets - blocks - 1)])
    keep_FK = np.stack([generator.permutation(blocks) < size for size in size_F])
    share_F = keep_FK.mean(1)
    risen_F = 1 - (1 - share_F) ** 2 if curved else share_F
    true_F = cheapest + (dearest - cheapest) * risen_F + spread * generator.standard_normal(sets)
    side_F = leaning * (1 - 2 * (np.arange(sets) % 2))
    return World(keep_FK, np.clip(np.stack([true_F + side_F, true_F - side_F], 1), 0.02, 0.995))


def verdict(
    world: World,
    policy: Policy,
    validation: Images,
    test: Images,
    generator: np.random.Generator,
    finished: bool = True,
    searched: NDArray[np.int64] | None = None,
    draws: int = 200,
    seed: int = 0,
    by_group: bool = True,
) -> Verdict:
    """Judge a policy as a run does: against all sets, its own sets, and its decisions dealt at random.

    Args:
        searched: the sets that the search has found; None: all.
        by_group: whether groups of images are known to who judges.
    """
    choice_N = policy.chooses(test, generator)
    rows = np.arange(len(choice_N))
    correct_N, macs_N = test.correct_FN[choice_N, rows], world.macs_F[choice_N]
    cost, kinds = (
        float(macs_N.mean()),
        {"searched blocks": np.arange(len(world.macs_F)) if searched is None else searched},
    )
    if policy.own:
        kinds["the policy's own blocks, fixed"] = np.array(policy.own)
    groups = [None if x.group_N is None or not by_group else torch.from_numpy(x.group_N) for x in (validation, test)]
    rivals, slope = [], 0.0
    for name, index_F in kinds.items():
        macs_F = torch.from_numpy(world.macs_F[index_F])
        labels = [f"set {i}" for i in index_F]
        correct_FV, whole = torch.from_numpy(validation.correct_FN[index_F]), len(index_F) == len(world.macs_F)
        family = Family(name, labels, macs_F, correct_FV, whole, groups[0])
        if (choice := choose(family, cost)) is not None:
            right = [torch.from_numpy(test.correct_FN[index_F[i]]) for i, _ in choice.parts]
            rivals.append(Rival(family, choice, choice.mixed(right)))
            slope = slope or choice.slope
    dealt_N = generator.permutation(choice_N)
    family = Family(
        "the policy's decisions, dealt at random",
        ["dealt"],
        torch.tensor([cost], dtype=torch.float64),
        None,
        slope=slope,
    )
    chosen = choose(family, cost)
    assert chosen is not None
    rivals.append(Rival(family, chosen, torch.from_numpy(test.correct_FN[dealt_N, rows]).double()))
    columns: tuple[Tensor, Tensor] = torch.from_numpy(correct_N), torch.from_numpy(macs_N)
    return judge(
        *columns,
        rivals,
        1.0,
        unfinished="" if finished else "the search was cut off",
        group_N=groups[1],
        draws=draws,
        seed=seed,
    )


# Policies that gain nothing


def one_set(world: World, validation: Images, generator: np.random.Generator) -> Policy:
    """Keep the truly best set of medium cost for every image; validation need not have chosen it."""
    macs = np.sort(world.macs_F)[len(world.macs_F) // 2]
    same = np.flatnonzero(abs(world.macs_F - macs) < 1e-9)
    best = int(same[world.true_F[same].argmax()])
    return Policy(world.true_F[best], world.macs_F[best], lambda images, _: np.full(len(images.half_N), best), (best,))


def best_mixture(world: World, validation: Images, generator: np.random.Generator, macs: float = 0.55) -> Policy:
    """Deal the two sets of the truly best mixture at a cost, without a look at the image."""
    accuracy, i, j, weight = world.best_at(macs)
    return Policy(accuracy, macs, lambda images, g: np.where(g.random(len(images.half_N)) < weight, j, i), (i, j))


def unrelated(world: World, validation: Images, generator: np.random.Generator, sets: int = 8) -> Policy:
    """Choose among good sets of medium cost by something that has nothing to do with the image."""
    medium = np.flatnonzero((world.macs_F > 0.3) & (world.macs_F < 0.8))
    some = medium[world.true_F[medium].argsort()[-sets:]]
    means = float(world.true_F[some].mean()), float(world.macs_F[some].mean())
    return Policy(*means, lambda images, g: g.choice(some, len(images.half_N)))


def best_of_twenty(world: World, validation: Images, generator: np.random.Generator) -> Policy:
    """Of twenty policies without any gain, take the one that is best on validation images at its cost."""
    medium = np.flatnonzero((world.macs_F > 0.3) & (world.macs_F < 0.8))
    found = []
    for _ in range(20):
        policy = by_half(world, *generator.choice(medium, 2))
        choice_V = policy.chooses(validation, generator)
        accuracy = validation.correct_FN[choice_V, np.arange(len(choice_V))].mean()
        found.append((accuracy - world.best_at(policy.macs)[0], len(found), policy))
    return max(found)[2]


def more_for_one_half(world: World, validation: Images, generator: np.random.Generator) -> Policy:
    """Spend much on one half of the images and little on the other, where every block brings as much on either."""
    macs, order = world.macs_F, world.macs_F.argsort()
    return by_half(world, int(order[len(macs) // 4]), int(order[3 * len(macs) // 4]))


# Policies that gain


def by_half(world: World, first: int, second: int) -> Policy:
    """Keep one set for the first half of the images, another one for the second."""
    accuracy = (world.true_FH[first, 0] + world.true_FH[second, 1]) / 2
    macs = (world.macs_F[first] + world.macs_F[second]) / 2
    return Policy(accuracy, macs, lambda images, _: np.where(images.half_N == 0, first, second), (first, second))


def best_by_half(world: World, validation: Images, generator: np.random.Generator) -> Policy:
    """Keep, for either half of the images, the truly best of the sets that cost half of the network at most."""
    medium = np.flatnonzero((world.macs_F > 0.3) & (world.macs_F <= 0.5))
    return by_half(world, *(int(medium[world.true_FH[medium, half].argmax()]) for half in (0, 1)))
