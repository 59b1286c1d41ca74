"""Intervals, fronts and agreement against numbers worked out by hand, and how often a bootstrap interval is right."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from policyskip.comparison.agreement import cost_ranks, mean_over_pairs, same_answers, same_choices
from policyskip.fronts import concave_hull, knee, pareto
from policyskip.intervals import bootstrap, mean_and_half_interval
from tests.made_up import made_up_decisions


def test_the_t_interval_is_that_of_the_tables():
    mean, half = mean_and_half_interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.302653 / 3**0.5, rel=1e-6)  # t(0.975, 2) = 4.302653
    mean, half = mean_and_half_interval([0.5, 0.7, 0.6, 0.8])
    assert half == pytest.approx(3.182446 * np.std([0.5, 0.7, 0.6, 0.8], ddof=1) / 2, rel=1e-6)
    assert mean_and_half_interval([0.25]) == (0.25, None)


def test_the_bootstrap_is_that_of_resampled_images():
    generator = np.random.default_rng(1)
    value_N = generator.choice([-1.0, 0.0, 1.0], size=300, p=[0.1, 0.7, 0.2])
    means = value_N[generator.integers(0, 300, size=(20_000, 300))].mean(1)
    assert bootstrap(value_N) == pytest.approx(np.quantile(means, [0.025, 0.975]).tolist(), abs=0.004)
    assert bootstrap(np.full(50, 0.5)) == (0.5, 0.5) and bootstrap(np.full(4, 0.02)) == (0.02, 0.02)
    assert bootstrap(value_N) == bootstrap(value_N)


def test_pairing_narrows_the_interval_of_a_difference():
    generator = np.random.default_rng(2)
    hard_N = generator.random(1000) < 0.3  # both fail on the same images
    a_N, b_N = (np.where(hard_N, 0.0, 1.0 * (generator.random(1000) < p)) for p in (0.99, 0.97))
    low, high = bootstrap(a_N - b_N)
    unpaired = np.hypot(*(np.diff(bootstrap(x)) for x in (a_N, b_N)))
    assert high - low < 0.5 * unpaired


@pytest.mark.slow
def test_the_bootstrap_covers_the_truth_as_often_as_it_says():
    """Two agents whose answers are drawn with a known difference: of 1,000 intervals, 93 to 97 % hold it. (Of 6,000,
    95.5 % did; a thousand of them vary by 0.7.)"""
    generator, truth, hits = np.random.default_rng(1), 0.06 - 0.04, 0
    for redraw in range(1000):
        difference_N = generator.choice([1.0, 0.0, -1.0], size=1000, p=[0.06, 0.90, 0.04])
        low, high = bootstrap(difference_N, draws=2000, seed=redraw)
        hits += low - 1e-12 <= truth <= high + 1e-12
    assert 930 <= hits <= 970


def test_the_front_holds_what_nothing_beats():
    macs, accuracy = [3.0, 1.0, 2.0, 2.0, 4.0, 1.0], [0.9, 0.5, 0.8, 0.7, 0.9, 0.4]
    assert pareto(macs, accuracy) == [1, 2, 0]
    assert pareto([], []) == []


def test_agreement_is_counted_image_by_image():
    a = made_up_decisions(keep=[[1, 0], [1, 1], [0, 0], [1, 1]], prediction=[0, 1, 2, 0])
    b = made_up_decisions(keep=[[1, 0], [0, 1], [0, 1], [1, 1]], prediction=[0, 1, 1, 1])
    assert same_answers(a, b) == 0.5
    assert same_choices(a, b) == 6 / 8
    exits_a, exits_b = (dataclasses.replace(x, kind="exits") for x in (a, b))
    assert same_choices(exits_a, exits_b) == 2 / 4  # image 1 leaves later in a, image 2 earlier
    assert same_choices(a, exits_b) is None
    wide = dataclasses.replace(b, ran_NK=torch.ones(4, 3, dtype=torch.bool))
    assert same_choices(a, wide) is None


def test_spending_is_compared_by_rank():
    a = made_up_decisions(keep=[[1, 0], [1, 1], [0, 0], [1, 1]])
    rank_N = cost_ranks(a)
    assert rank_N is not None and float(np.mean(rank_N * rank_N)) == pytest.approx(1)
    assert np.argsort(rank_N)[0] == 2
    assert cost_ranks(dataclasses.replace(a, macs_N=torch.ones(4).double())) is None
    assert mean_over_pairs([0.5, None]) is None and mean_over_pairs([]) is None and mean_over_pairs([0.5, 1.0]) == 0.75


def test_the_bootstrap_draws_by_its_seed():
    value_N = np.arange(30.0)
    assert bootstrap(value_N, draws=50, seed=1) == bootstrap(value_N, draws=50, seed=1)
    assert bootstrap(value_N, draws=50, seed=1) != bootstrap(value_N, draws=50, seed=2)


def test_the_concave_hull_by_hand():
    """In order of cost: the third point lies under the line from the second to the fourth, and the last costs more for
    less. Of three on a line only the ends count, and of two of one cost the more accurate."""
    macs, accuracy = [40.0, 10.0, 30.0, 50.0, 20.0], [0.9, 0.1, 0.75, 0.8, 0.7]
    assert concave_hull(macs, accuracy) == [1, 4, 0]
    assert concave_hull([1.0, 2.0, 3.0], [0.25, 0.5, 0.75]) == [0, 2]
    assert concave_hull([1.0, 1.0, 2.0], [0.3, 0.1, 0.4]) == [0, 2]


def test_the_knee_by_hand():
    """Scaled, the costs are 0, 0.1, 0.3, 1 and the accuracies 0, 0.6, 0.78, 1: 0.5 and 0.48 above the line."""
    assert knee([100.0, 110.0, 130.0, 200.0], [0.5, 0.8, 0.89, 1.0]) == 1
    assert knee([5.0], [0.3]) == knee([5.0, 6.0], [0.3, 0.4]) == 0


def test_ranks_ignore_by_how_much_costs_differ():
    """The ranks 1, 2 and 3 have a variance of 2/3."""
    made_up = dataclasses.replace(made_up_decisions(keep=[[1]] * 3), macs_N=torch.tensor([1.0, 2.0, 100.0]).double())
    assert cost_ranks(made_up).tolist() == pytest.approx([-(1.5**0.5), 0, 1.5**0.5])
