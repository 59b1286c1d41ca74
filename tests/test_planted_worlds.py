"""The verdict cannot be fooled: worlds in which it is known whether deciding per image pays, drawn anew many times.

What is drawn are the worlds themselves, their validation images, and their test images (``worlds.py``). The slow tests
measure the rates that docs/agents/static.md states: ``pytest -m slow -n 0 -s tests/test_planted_worlds.py``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from policyskip.build import Setup
from policyskip.config import FrontSection
from policyskip.rewards import Utilization
from policyskip.rivals import DRAWS, Verdict
from policyskip.tasks.blocks import judge_policy
from policyskip.tasks.fronts import static_front, with_block_selection
from tests import planted_network
from tests.conftest import typed
from tests.worlds import (
    Images,
    Policy,
    World,
    a_world,
    best_by_half,
    best_mixture,
    best_of_twenty,
    by_half,
    more_for_one_half,
    one_set,
    unrelated,
    verdict,
)

FLAT = {"cheapest": 0.8, "dearest": 0.8}


@dataclass(frozen=True)
class Plan:
    """Says how a world and a policy are drawn and judged."""

    policy: Callable[[World, Images, np.random.Generator], Policy]
    world: dict[str, Any] = field(default_factory=dict)
    validation: int = 300
    test: int = 600
    groups: int | None = None
    by_group: bool = True
    finished: bool = True
    searched: Callable[[World], np.ndarray] | None = None
    draws: int = 150

    def drawn(self, redraw: int) -> tuple[Verdict, float]:
        """Draw a world and judge its policy: the verdict, and the true margin against the truly best fixed choice."""
        generator = np.random.default_rng(redraw)
        world = a_world(generator, **self.world)
        validation, test = (world.images(count, generator, self.groups) for count in (self.validation, self.test))
        policy = self.policy(world, validation, generator)
        searched = None if self.searched is None else self.searched(world)
        options = {"draws": self.draws, "seed": redraw, "by_group": self.by_group, "finished": self.finished}
        found = verdict(world, policy, validation, test, generator, searched=searched, **options)
        return found, policy.accuracy - world.best_at(policy.macs)[0]


def few(world: World) -> np.ndarray:
    """A search that has found poor sets only."""
    return world.true_F.argsort()[: len(world.true_F) // 3]


def two_alike(world: World, validation: Images, generator: np.random.Generator) -> Policy:
    """Two sets of medium cost, one for each half of the images."""
    medium = world.macs_F.argsort()[len(world.macs_F) // 2 :]
    return by_half(world, int(medium[0]), int(medium[1]))


SMALL = {"sets": 24, "blocks": 8, "spread": 0.02}
NO_GAIN = {
    "the truly best set, which validation may not have chosen": Plan(one_set, SMALL),
    "the truly best mixture of two sets": Plan(best_mixture, SMALL),
    "a mixture over a flat front": Plan(best_mixture, SMALL | FLAT),
    "a mixture of sets that are all alike": Plan(best_mixture, SMALL | FLAT | {"spread": 0.0}),
    "a mixture, where few validation images choose and many judge": Plan(
        best_mixture, SMALL, validation=100, test=2000
    ),
    "that mixture, which the search has not found": Plan(best_mixture, SMALL, searched=few),
    "good sets, dealt by what is not in the image": Plan(unrelated, SMALL),
    "good sets that the search has not found, likewise": Plan(unrelated, SMALL, searched=few),
    "the best of twenty on validation": Plan(best_of_twenty, SMALL),
    "more blocks for one half, where they bring as much on either": Plan(
        more_for_one_half, SMALL | {"curved": False, "spread": 0.0}
    ),
    "images in 50 groups": Plan(two_alike, SMALL | FLAT | {"spread": 0.0}, groups=50),
}


def test_a_policy_that_gains_nothing_is_hardly_ever_said_to_pay():
    """220 redraws, twenty of each kind. (Of 11,000, none to one in a hundred of a kind, see below.)"""
    plans = list(NO_GAIN.values())
    found = [plans[redraw % len(plans)].drawn(redraw) for redraw in range(20 * len(plans))]
    assert sum(outcome.answer == "pays" for outcome, _ in found) <= 0.05 * len(found) / 2
    equal = [outcome for outcome, truth in found if abs(truth) < 1e-9]
    assert len(equal) > 100 and sum(outcome.answer == "does not pay" for outcome in equal) <= 0.06 * len(equal)
    worse = [outcome for outcome, truth in found if truth < -0.03]
    assert len(worse) > 5 and not any(outcome.answer == "pays" for outcome in worse)


@pytest.mark.slow
@pytest.mark.parametrize("kind", NO_GAIN)
def test_how_often_pays_is_said_of_no_gain(kind):
    """Of 1,000 redraws of each kind, "pays" is said in at most 2.5 % (5 % are allowed), and "does not pay" of policies
    that are exactly as good as the best fixed choice in at most 7 %."""
    found = [NO_GAIN[kind].drawn(redraw) for redraw in range(1000)]
    pays = np.mean([outcome.answer == "pays" for outcome, _ in found])
    equal = [outcome.answer == "does not pay" for outcome, truth in found if abs(truth) < 1e-9]
    denied = np.mean(equal) if equal else 0.0
    print(f"\n{kind}: pays {pays:.1%}; does not pay {denied:.1%} of {len(equal)} exactly as good")
    assert pays <= 0.025 and denied <= 0.07


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["a mixture of sets that are all alike", "images in 50 groups"])
def test_as_many_draws_as_a_run_has_deny_less_often(kind):
    """2,000 draws of the bootstrap instead of 150, in 300 redraws: the ends of intervals are more exact."""
    found = {
        draws: [replace(NO_GAIN[kind], draws=draws).drawn(redraw)[0].answer for redraw in range(300)]
        for draws in (150, DRAWS)
    }
    denied = {draws: np.mean([answer == "does not pay" for answer in answers]) for draws, answers in found.items()}
    print(f"\n{kind}: does not pay {denied[150]:.1%} with 150 draws, {denied[DRAWS]:.1%} with {DRAWS}")
    assert denied[DRAWS] <= 0.045 and denied[DRAWS] < denied[150] and "pays" not in found[DRAWS]


def test_intervals_that_take_images_of_a_group_for_independent_are_fooled():
    """3,000 images in 50 groups, and no gain. Whoever does not know the groups finds gains and losses everywhere."""
    plan = {"world": {"sets": 20, "blocks": 6, "spread": 0.0} | FLAT, "validation": 600, "test": 1500, "groups": 50}
    found = {
        known: [Plan(two_alike, **plan, by_group=known).drawn(redraw)[0] for redraw in range(40)]
        for known in (True, False)
    }
    missed = {known: np.mean([not o.rival.low <= 0 <= o.rival.high for o in found[known]]) for known in found}
    assert missed[False] > 0.3 and missed[True] < 0.12
    assert not any(outcome.answer == "pays" for outcome in found[True])


@pytest.mark.slow
def test_how_often_groups_that_are_not_known_fool_the_verdict():
    plan = {"world": {"sets": 20, "blocks": 6, "spread": 0.0} | FLAT, "validation": 1500, "test": 3000, "groups": 50}
    rates = {}
    for known in (True, False):
        answers = [Plan(two_alike, **plan, by_group=known).drawn(redraw)[0].answer for redraw in range(500)]
        rates[known] = np.mean([answer == "pays" for answer in answers])
    print(f"\n50 groups, no gain: pays {rates[True]:.1%}; where groups are not known {rates[False]:.1%}")
    assert rates[True] <= 0.025 and rates[False] > 0.05


# Gains


HALVES = {"sets": 24, "blocks": 8, "spread": 0.005, "leaning": 0.06}


def test_two_halves_that_need_two_sets_pay():
    """The interval holds the true margin, about 5.5 points, against the truly best fixed choice."""
    found = [Plan(best_by_half, HALVES, validation=1500, test=2500).drawn(redraw) for redraw in range(20)]
    assert all(truth > 0.04 for _, truth in found)
    assert sum(outcome.answer == "pays" for outcome, _ in found) >= 18
    assert sum(outcome.rival.low <= truth <= outcome.rival.high for outcome, truth in found) >= 18


def test_an_unfinished_search_and_a_gap_never_pay():
    """The same policies, of which most truly gain."""

    def far(world: World) -> np.ndarray:
        return np.flatnonzero((world.macs_F < 0.3) | (world.macs_F > 0.8))

    sizes = {"validation": 800, "test": 1500}
    for redraw in range(10):
        cut_off, _ = Plan(best_by_half, HALVES, **sizes, finished=False).drawn(redraw)
        assert cut_off.answer == "not shown" and "search" in cut_off.because
        policy_without_own_sets = Plan(without_own(best_by_half), HALVES, **sizes, searched=far)
        gap, _ = policy_without_own_sets.drawn(redraw)
        assert gap.answer == "not shown" and "costs nearly as much" in gap.because


def without_own(policy: Callable[..., Policy]) -> Callable[..., Policy]:
    """The same policy, whose decisions are so many that no set is its own."""

    def many(*arguments: Any) -> Policy:
        made = policy(*arguments)
        return Policy(made.accuracy, made.macs, made.chooses)

    return many


def test_blocks_for_the_hard_images_alone_pay():
    """Easy images are right after a quarter of the blocks, 95 % of them; hard ones gain with every block, from 50 to
    85 %. A quarter for the easy and all for the hard ones are right on 90 %, for 5/8 of the cost; fixed choices of that
    cost on 0.475 + (0.50 + 0.35 · 5/8)/2 = 83.4 % at most."""
    blocks = 8
    keep_FK = np.arange(blocks) < np.arange(blocks + 1)[:, None]
    share_F = keep_FK.mean(1)
    easy_F = np.where(share_F >= 0.25, 0.95, 0.5)
    world = World(keep_FK, np.stack([easy_F, 0.50 + 0.35 * share_F], 1))
    policy = by_half(world, 2, blocks)
    assert policy.accuracy - world.best_at(policy.macs)[0] == pytest.approx(0.065625)
    answers = []
    for redraw in range(10):
        generator = np.random.default_rng(redraw)
        validation, test = world.images(800, generator), world.images(1500, generator)
        found = verdict(world, policy, validation, test, generator, seed=redraw)
        answers.append(found.answer)
        assert found.rival.low <= 0.065625 <= found.rival.high
    assert answers.count("pays") == 10


def test_the_margin_by_hand():
    """Without chance: one set is right on the first half of 100 images only, for 0.4; the other on the second half, for
    0.6. At 0.5, each of them is right on half of the images, and so is every mixture of the two; by half, all are
    right. Of the fixed choices that are equally right, the cheapest is named."""
    half_N = np.arange(100) // 50
    images = Images(np.stack([half_N == 0, half_N == 1]), half_N, None)
    keep_FK = np.array([[1, 1, 0, 0, 0], [0, 0, 1, 1, 1]], dtype=bool)
    world = World(keep_FK, np.eye(2))
    found = verdict(world, by_half(world, 0, 1), images, images, np.random.default_rng(0), draws=2000)
    searched = next(line for line in found.comparisons if line.family == "searched blocks")
    assert (searched.accuracy, searched.margin) == pytest.approx((0.5, 0.5))
    assert found.answer == "pays" and searched.name == "set 0"
    assert (searched.low, searched.high) == pytest.approx((0.4, 0.61), abs=0.02)  # of 100 images, 50 on average


# Real networks, whose weights are set by hand

NETWORK = [
    *("data._target_=planted_network.images", "data.count=600", "data.batch_size=600"),
    *("backbone._target_=planted_network.PlantedNetwork", "agent._target_=planted_network.agent", "+agent.kind=halves"),
    *("train.steps=0", "tracking=none", "device=cpu", "run.dir=runs/halves"),
]
"""The network of planted_network.py: four blocks, each of which puts right a quarter of the hard images."""


def test_a_run_whose_policy_knows_the_half_of_an_image_pays(tmp_path):
    """All 600 images are right, for two of four blocks; a fixed choice of two blocks leaves half of the hard ones, a
    tenth of all. Judging the run again gives the same figures."""
    shutil.copy(planted_network.__file__, tmp_path / "planted_network.py")
    done = typed("train", *NETWORK, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "runs/halves/summary.json").read_text())
    assert summary["test/verdict"] == "pays" and summary["test/accuracy"] == 1.0 and summary["test/kept_mean"] == 2.0
    assert summary["test/rival_low"] <= 0.1 <= summary["test/rival_high"]
    for line in summary["test/rivals"]:
        assert line["macs"] == summary["test/macs_mean"] and line["low"] > 0.05
        assert line["margin"] == pytest.approx(1 - line["accuracy"]) == pytest.approx(0.1, abs=0.03)
    again = typed("evaluate", "run=runs/halves", "split=test", "device=cpu", "trust=true", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "test/verdict: pays" in again.stdout and "Every figure is that of summary.json." in again.stdout


def judged(kind: str, budget: float = 1e9) -> dict[str, Any]:
    """Return the figures of a policy of planted_network.py, judged as a run does, its search bounded by ``budget``."""
    data, backbone = planted_network.images(torch.device("cpu"), 600), planted_network.PlantedNetwork()
    setup = with_block_selection(Setup({}, torch.device("cpu"), data, backbone, Utilization(1.0), 600))
    settings = FrontSection(budget=budget, images=600)
    return judge_policy(setup, planted_network.agent(None, kind), static_front(setup, settings), "test").figures


@pytest.mark.parametrize("kind", ["one set", "two sets", "more for some"])
def test_a_policy_of_a_network_that_gains_nothing_is_not_said_to_pay(kind, tmp_path, monkeypatch):
    """One set in disguise; two sets, or all blocks and none, dealt by a hash of the pixels. All are right on 90 % of
    the images, as every fixed choice of that cost is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    figures = judged(kind)
    assert figures["verdict"] == "not shown" and figures["rival_low"] <= 0 <= figures["rival_high"]
    assert abs(figures["rival_margin"]) < 0.05
    assert abs(figures["accuracy"] - 0.8 - 0.2 * figures["kept_mean"] / 4) < 0.04


def test_a_search_that_is_cut_off_shows_nothing(tmp_path, monkeypatch):
    """The policy that pays, beside a search that has not tried what it would have."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    figures = judged("halves", budget=1)
    assert figures["rival_low"] > 0 and figures["rival_finished"] is False
    assert figures["verdict"] == "not shown" and "search" in figures["verdict_because"]


# Rates of gains that are found


@pytest.mark.slow
def test_how_often_a_gain_of_a_point_and_a_half_is_found():
    """10,000 test images and 5,000 validation images: "pays" in most of 100 redraws, and the interval holds the true
    margin against the truly best fixed choice in at least 93 of them."""
    world = {"sets": 60, "blocks": 12, "spread": 0.005, "leaning": 0.0185}
    plan = Plan(best_by_half, world, validation=5000, test=10_000, draws=400)
    found = [plan.drawn(redraw) for redraw in range(100)]
    truths = np.array([truth for _, truth in found])
    pays = sum(outcome.answer == "pays" for outcome, _ in found)
    held = sum(outcome.rival.low <= truth <= outcome.rival.high for outcome, truth in found)
    print(f"\ntrue margin {truths.mean():.2%} ± {truths.std():.2%}: pays {pays} %, interval holds it {held} %")
    assert 0.013 < truths.mean() < 0.017 and pays > 60 and held >= 93


@pytest.mark.slow
@pytest.mark.parametrize(("validation", "test"), [(2000, 4000), (2000, 10_000), (5000, 4000), (5000, 10_000)])
def test_the_margin_that_is_found_in_four_of_five_redraws(validation, test):
    """Where the low end lies below the truth by at most m in 80 % of the redraws, a true margin of m is found in 80 %."""
    world = {"sets": 60, "blocks": 12, "spread": 0.005, "leaning": 0.0185}
    plan = Plan(best_by_half, world, validation=validation, test=test, draws=400)
    found = [plan.drawn(redraw) for redraw in range(60)]
    needed = float(np.quantile([truth - outcome.rival.low for outcome, truth in found], 0.8))
    print(f"\n{validation} validation and {test} test images: a true margin of {needed:.2%} is found in 80 %")
    assert 0.005 < needed < 0.025


@pytest.mark.slow
def test_how_often_the_low_end_lies_too_high_where_the_best_of_many_sets_is_hard_to_tell():
    """400 sets whose accuracies spread as widely as the noise of 1,000 validation images: the chosen rival is half a
    point worse than the truly best one, on average, and the allowance for that is a little too small."""
    world = {"sets": 400, "blocks": 10, "spread": 0.01, "leaning": 0.05}
    plan = Plan(without_own(best_by_half), world, validation=1000, test=4000)
    found = [plan.drawn(redraw) for redraw in range(100)]
    too_high = sum(truth < outcome.rival.low for outcome, truth in found)
    print(f"\n400 sets, 1,000 validation images: the low end lies above the true margin in {too_high} %")
    assert too_high <= 10
