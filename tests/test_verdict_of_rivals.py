"""The verdict against numbers worked out by hand, and on simulated policies without any gain."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from policyskip.rivals import Choice, Family, Rival, allowances, choose, judge, mixture_name, redrawn_means


def bits(*rows: str) -> Tensor:
    """Right and wrong as bool (F, V), from texts such as "1101"."""
    return torch.tensor([[mark == "1" for mark in row] for row in rows])


def costs(*macs: float) -> Tensor:
    return torch.tensor(macs, dtype=torch.float64)


SETS = Family("sets", ["1 block", "2 blocks", "3 blocks"], costs(10, 20, 40), bits("1000", "1100", "1111"))
"""Three sets that cost 10, 20 and 40 and are right on a quarter, on half and on all of four validation images."""


def test_the_mixture_of_a_cost_lies_on_the_hull():
    """At 25 MACs, 10 and 40 mixed are right on ¼·½ + 1·½ = 0.625, and 20 and 40 on ½·¾ + 1·¼ = 0.625: the hull is a line
    of slope 1/40. With the middle set right on 3 of 4, its mixture is better: ¾·¾ + ¼ = 0.8125, of slope ¼ over 20."""
    assert choose(SETS, 25.0).macs == 25.0 and choose(SETS, 25.0).slope == pytest.approx(1 / 40)
    better = replace(SETS, correct_FV=bits("1000", "1110", "1111"))
    choice = choose(better, 25.0)
    assert choice.parts == [(1, 0.75), (2, 0.25)] and choice.name == "2 and 3 blocks, mixed"
    assert choice.slope == pytest.approx(0.25 / 20)
    assert choice.mixed([bits("10")[0], bits("01")[0]]).tolist() == [0.75, 0.25]


def test_the_choice_never_costs_more_and_may_cost_less():
    assert choose(SETS, 9.0) is None
    assert choose(SETS, 10 * (1 - 1e-12)) == Choice([(0, 1.0)], "1 block", 10.0, 0.0)  # a mean of tens, to rounding
    assert choose(SETS, 99.0) == Choice([(2, 1.0)], "3 blocks", 40.0, 0.0)
    worse_for_more = replace(SETS, correct_FV=bits("1110", "1100", "1000"))
    assert choose(worse_for_more, 30.0) == Choice([(0, 1.0)], "1 block", 10.0, 0.0)


@pytest.mark.parametrize(
    ("first", "second", "name"),
    [
        ("33 even blocks", "34 even blocks", "33 and 34 even blocks, mixed"),
        ("the 3 blocks kept most", "the 4 blocks kept most", "the 3 and the 4 blocks kept most, mixed"),
        ("exit 1", "exit 2", "exit 1 and exit 2, mixed"),
        ("none of the blocks", "all 9 blocks", "none of the blocks and all 9 blocks, mixed"),
        ("3 even blocks", "3 even blocks", "two choices of 3 even blocks, mixed"),
    ],
)
def test_a_mixture_is_named_in_words(first, second, name):
    assert mixture_name(first, second) == name


def test_the_margin_counts_that_the_cost_varies():
    """The policy spends 10 or 30 and is right on the images on which it spends 30: half of them. The rival is right on
    half, too, whatever the image. With a slope of ½ over 20 MACs, each image's difference is ½ − ¼ or −½ + ¼."""
    correct_N, macs_N = bits("1100" * 100)[0], costs(*[30, 30, 10, 10] * 100)
    half = torch.full((400,), 0.5, dtype=torch.float64)
    flat = Family("flat", ["one"], costs(20), None)
    level, steep = (Rival(replace(flat, slope=s), Choice([(0, 1.0)], "one", 20.0, s), half) for s in (0.0, 1 / 40))
    (first,), (second,) = (judge(correct_N, macs_N, [rival], 40.0).comparisons for rival in (level, steep))
    assert first.margin == second.margin == 0 and first.accuracy == 0.5 and first.macs == 20
    assert second.high - second.low == pytest.approx((first.high - first.low) / 2, rel=1e-9)
    assert first.high - first.low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.1)


def test_redrawn_means_are_those_of_whole_groups():
    """Of two groups, one of three wrong images and one of a right one, draws give both, the first or the second."""
    mean_D = redrawn_means(bits("0001"), torch.tensor([5, 5, 5, 7]), 400, seed=0)[:, 0]
    assert set(mean_D.tolist()) == {0.0, 0.25, 1.0}
    assert (mean_D == 0.25).double().mean().item() == pytest.approx(0.5, abs=0.1)
    assert set(redrawn_means(bits("01"), None, 400, seed=0)[:, 0].tolist()) == {0.0, 0.5, 1.0}


def test_the_allowance_is_what_another_choice_is_worse_by():
    """Two sets of one cost are right on two of three images and on the third. Drawn anew, the third is drawn at least twice in
    7 of 27 draws: then the other set is chosen, which is worse by a third on all three images."""
    family = Family("two", ["a", "b"], costs(10, 10), bits("110", "001"))
    allowance_D = allowances(family, 10.0, 3000, seed=0)
    assert sorted(set(allowance_D.tolist())) == [0.0, pytest.approx(1 / 3)]
    assert (allowance_D > 0).double().mean().item() == pytest.approx(7 / 27, abs=0.03)
    assert not allowances(replace(family, correct_FV=bits("111", "000")), 10.0, 50, seed=0).any()
    together = allowances(replace(family, group_V=torch.tensor([0, 0, 0])), 10.0, 50, seed=0)
    assert not together.any()  # there is one group, so every draw is the same


def rival_of(correct_N: Tensor, name: str = "sets", complete: bool = True, macs: float = 10.0) -> Rival:
    """A rival right on these images, the better by far of two on the validation images."""
    family = Family(name, ["good", "bad"], costs(macs, macs), bits("1" * 50, "0" * 50), complete)
    return Rival(family, choose(family, macs), correct_N.double())


def right(share: float, count: int = 1000) -> Tensor:
    """Right on the first images, wrong on the others."""
    return torch.arange(count) < share * count


def test_the_policy_pays_if_it_beats_every_rival_and_the_strongest_is_named():
    cost_N = torch.full((1000,), 10.0, dtype=torch.float64)
    weak, strong = rival_of(right(0.5), "weak"), rival_of(right(0.8), "strong")
    found = judge(right(0.9), cost_N, [weak, strong], 100.0)
    assert (found.answer, found.rival.family) == ("pays", "strong")
    assert found.rival.margin == pytest.approx(0.1) and 0 < found.rival.low < 0.1 < found.rival.high
    assert [line.family for line in found.comparisons] == ["strong", "weak"]
    figures = found.figures()
    assert figures["rival"] == "good" and figures["rival_low"] == found.rival.low and len(figures["rivals"]) == 2


def test_an_uncertain_choice_lowers_the_low_end_alone():
    """The two choices are right on two of three validation images and on the third: in 7 of 27 draws the other one is
    chosen, which is worse by a third, so a third is what the low end allows for. Of twelve such families, the high end
    lies farther out."""
    cost_N, sure = torch.full((1000,), 10.0, dtype=torch.float64), rival_of(right(0.8))
    unsure = replace(sure, family=replace(sure.family, correct_FV=bits("110", "001")))
    (certain,), (open_,) = (judge(right(0.9), cost_N, [rival], 100.0).comparisons for rival in (sure, unsure))
    assert open_.high == certain.high and open_.low == pytest.approx(certain.low - 1 / 3, abs=0.02)
    many = judge(right(0.9), cost_N, [sure] * 12, 100.0).comparisons[0]
    assert many.low == certain.low and many.high > certain.high + 0.005


def test_one_rival_that_is_better_decides():
    cost_N = torch.full((1000,), 10.0, dtype=torch.float64)
    found = judge(right(0.7), cost_N, [rival_of(right(0.5)), rival_of(right(0.8), "strong")], 100.0)
    assert (found.answer, found.rival.family) == ("does not pay", "strong") and found.rival.high < 0
    late = judge(right(0.7), cost_N, [rival_of(right(0.8))], 100.0, unfinished="cut off")
    assert late.answer == "does not pay"  # a longer search finds no weaker rival


@pytest.mark.parametrize(
    ("given", "because"),
    [
        ({"unfinished": "nobody searched"}, "nobody searched"),
        ({"rival": rival_of(right(0.8), complete=False, macs=4.0)}, "no fixed choice costs nearly as much"),
        ({"rival": rival_of(right(0.898))}, "the interval includes 0"),
        ({"group_N": torch.zeros(1000, dtype=torch.int64)}, "has no interval"),
    ],
)
def test_what_keeps_the_answer_open(given, because):
    """The policy is more accurate by ten points, or in one case by a fifth of a point, and nothing else is clear."""
    cost_N = torch.full((1000,), 10.0, dtype=torch.float64)
    rival = given.pop("rival", rival_of(right(0.8)))
    found = judge(right(0.9), cost_N, [rival], 100.0, **given)
    assert found.answer == "not shown" and because in found.because and found.rival is not None


def test_images_that_belong_together_make_the_interval_wide():
    """In 100 groups of ten images that are alike, the interval is √10 times as wide as in 1,000 images of their own."""
    correct_N, cost_N = right(0.5), torch.full((1000,), 10.0, dtype=torch.float64)
    groups = (None, torch.arange(1000) // 10)
    alone, together = (
        judge(correct_N, cost_N, [rival_of(right(0.2))], 100.0, group_N=group_N).comparisons[0] for group_N in groups
    )
    assert together.high - together.low == pytest.approx(10**0.5 * (alone.high - alone.low), rel=0.1)


@pytest.mark.parametrize("grouped", [False, True])
def test_fewer_than_40_images_or_groups_show_nothing_however_clear_they_are(grouped):
    for count, answers in ((39, ["not shown"] * 2), (40, ["pays", "does not pay"])):
        group_N = torch.arange(count).repeat_interleave(5) if grouped else None
        images = count if group_N is None else len(group_N)
        cost_N = torch.full((images,), 10.0, dtype=torch.float64)
        given = [(right(mine, images), rival_of(right(theirs, images))) for mine, theirs in ((1, 0), (0, 1))]
        assert [judge(mine, cost_N, [rival], 100.0, group_N=group_N).answer for mine, rival in given] == answers


def test_a_rival_that_is_hardly_cheaper_is_near():
    cost_N = torch.full((1000,), 10.0, dtype=torch.float64)
    assert judge(right(0.9), cost_N, [rival_of(right(0.8), complete=False, macs=5.1)], 100.0).answer == "pays"


def test_without_any_rival_and_with_one_image_nothing_is_shown():
    cost_N = costs(10.0)
    found = judge(bits("1")[0], cost_N, [], 100.0)
    assert found.answer == "not shown" and found.rival is None and "rival" not in found.figures()
    (line,) = judge(bits("1")[0], cost_N, [rival_of(bits("0")[0])], 100.0).comparisons
    assert line.margin == 1 and line.low is None and line.high is None


def test_a_family_that_makes_no_sense_is_refused():
    for given in (dict(labels=[]), dict(macs_F=costs(1)), dict(correct_FV=None), dict(correct_FV=bits("1"))):
        with pytest.raises(ValueError, match=r"choice|correct_FV"):
            replace(SETS, **given)


def test_the_same_images_give_the_same_verdict():
    torch.manual_seed(0)
    correct_N, macs_N = torch.rand(300) < 0.7, torch.rand(300, dtype=torch.float64) * 20
    found = [judge(correct_N, macs_N, [rival_of(right(0.6, 300), macs=5.0)], 40.0) for _ in range(2)]
    assert found[0] == found[1]
    assert judge(correct_N, macs_N, [rival_of(right(0.6, 300), macs=5.0)], 40.0, seed=9) != found[0]


def test_a_policy_without_any_gain_hardly_ever_pays():
    """Twenty sets of one cost are all right on an image with its own probability, and so is the policy. The set that is
    best on 200 validation images is no better elsewhere, so a margin is luck: it is to be called a gain in 2.5 % of 150
    worlds, and 9 or more has a chance below 2 %."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.rand(shape, generator=generator) < torch.linspace(0.4, 1, shape[-1])  # noqa: E731
    macs_F, cost_N = torch.full((20,), 10.0, dtype=torch.float64), torch.full((400,), 10.0, dtype=torch.float64)
    pays = 0
    for world in range(150):
        family = Family("sets", [str(n) for n in range(20)], macs_F, draw(20, 200), True)
        choice = choose(family, 10.0)
        rival = Rival(family, choice, draw(1, 400)[0].double())
        pays += judge(draw(1, 400)[0], cost_N, [rival], 20.0, draws=300, seed=world).answer == "pays"
    assert pays < 9


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_and_never_pay(odd):
    """Every comparison with NaN is false, so a lower end of NaN would be taken for one above 0."""
    cost_N, rival = torch.full((100,), 10.0, dtype=torch.float64), rival_of(right(0.5, 100))
    for columns in ((cost_N * odd, rival), (cost_N, replace(rival, correct_N=rival.correct_N + odd))):
        with pytest.raises(ValueError, match="100 finite numbers"):
            judge(right(0.9, 100), columns[0], [columns[1]], 100.0)
    for changes in ({"macs_F": costs(1, 2, odd)}, {"slope": odd}):
        with pytest.raises(ValueError, match="finite"):
            replace(SETS, **changes)


def test_columns_of_different_numbers_of_images_are_refused():
    cost_N, rival = torch.full((100,), 10.0, dtype=torch.float64), rival_of(right(0.5, 100))
    for macs_N, group_N in ((cost_N[:1], None), (cost_N, torch.arange(99))):
        with pytest.raises(ValueError, match="100 finite numbers, one for each judged image"):
            judge(right(0.9, 100), macs_N, [rival], 100.0, group_N=group_N)
