"""Every answer of a row and every reason for it, by made-up runs whose figures are worked out by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from policyskip.comparison.answers import Answer, answers_of
from policyskip.comparison.collect import collect
from policyskip.comparison.fixed_lines import about_lines, best_of_lines, fixed_lines
from policyskip.comparison.formats import as_csv
from policyskip.comparison.rows import Row, rows_of
from policyskip.comparison.tables import run_table, table
from policyskip.comparison.verdict import answer_lines, counted
from policyskip.rivals import DOES_NOT_PAY, NOT_SHOWN, PAYS
from tests.made_up import judged, made_up_decisions, made_up_run

GOOD = ((0.020, 0.012, 0.028), (0.018, 0.010, 0.026), (0.022, 0.014, 0.030))
"""Margins of three seeds with the ends of their intervals over images: ±0.5 points over seeds, 1.2 to 2.8 over images."""
NAMED_SECOND = {"evenly spread blocks": (0.0201, 0.012, 0.028)}
WORSE = tuple((-margin, -high, -low) for margin, low, high in GOOD)


def seeds(folder: Path, *figures: dict[str, Any], agent: str = "a", **settings: Any) -> None:
    """Runs of one agent, a seed for each dictionary of figures; on 100 images, 90 are right with one block of two."""
    for seed, summary in enumerate(figures):
        decisions = made_up_decisions([[1, 0]] * 100, [0] * 90 + [1] * 10)
        made_up_run(folder / f"{agent}{seed}", decisions, agent, seed, summary=summary, **settings)


def rows_in(folder: Path) -> list[Row]:
    return rows_of(collect([str(folder)]).results)


def answer_in(folder: Path) -> Answer:
    (answer,) = answers_of(rows_in(folder))
    return answer


def test_it_pays_where_both_intervals_lie_above_0(tmp_path):
    """The seeds deviate by 0.2 points, and t(0.975, 2) = 4.30265."""
    seeds(tmp_path, *(judged(*figures) for figures in GOOD))
    answer = answer_in(tmp_path)
    assert (answer.verdict, answer.because, answer.other) == (PAYS, "", None)
    assert answer.margin.mean == pytest.approx(0.02) and answer.margin.t95 == pytest.approx(4.30265 * 0.002 / 3**0.5)
    assert (answer.margin.low, answer.margin.high) == (pytest.approx(0.012), pytest.approx(0.028))
    assert answer_lines([answer]) == ["a: pays (+2.00 points, +1.20 to +2.80, 3 seeds, against 2 evenly spread blocks)"]
    assert counted([answer]) == "Deciding per image pays for a, the one row that learned."


def test_the_outer_ends_of_both_intervals_are_shown(tmp_path):
    """Over seeds the interval is 2 ± 12.7062 · 0.1 points: wider than that over images."""
    seeds(tmp_path, judged(0.021, 0.015, 0.025), judged(0.019, 0.015, 0.025))
    assert answer_in(tmp_path).margin.ends == (pytest.approx(0.02 - 0.0127062), pytest.approx(0.02 + 0.0127062))


ONE_BAD = (*GOOD[:2], (-0.03, -0.04, 0.01))
WIDE = tuple((margin, -0.001, high) for margin, _, high in GOOD)
CASES: dict[str, tuple[list[dict[str, Any]], str]] = {
    "one seed": ([judged(*GOOD[0])], "one seed"),
    "one seed that loses": ([judged(*WORSE[0])], "one seed"),
    "a search cut off": (
        [judged(*figures, finished=n != 1) for n, figures in enumerate(GOOD)],
        "the search for fixed choices is unfinished in 1 of 3 runs",
    ),
    "all searches cut off": (
        [judged(*figures, finished=False) for figures in GOOD],
        "the search for fixed choices is unfinished",
    ),
    "no rival near": (
        [judged(*figures, near=n != 2) for n, figures in enumerate(GOOD)],
        "no choice is near in 1 of 3 runs",
    ),
    "few images": (
        [judged(*f) | {"test/verdict": NOT_SHOWN, "test/verdict_because": "9 images"} for f in WORSE],
        "9 images",
    ),
    "an end of the search that is not known": (
        [judged(*figures) | {"test/rival_finished": None} for figures in GOOD],
        "the search for fixed choices is unfinished",
    ),
    "one bad seed": ([judged(*figures) for figures in ONE_BAD], "the intervals over seeds and over images include 0"),
    "seeds": (
        [judged(0.05, 0.04, 0.06), judged(0.01, 0.005, 0.02)],
        "the interval over seeds includes 0",
    ),
    "images": ([judged(*figures) for figures in WIDE], "the interval over images includes 0"),
    "one seed, and images": ([judged(*WIDE[0])], "one seed; the interval over images includes 0"),
    "older runs": ([{}, {}], "judged by an older version"),
    "an older run": ([judged(*GOOD[0]), {}, judged(*GOOD[2])], "1 of 3 runs were judged by an older version"),
    "one image": ([judged(*GOOD[0]) | {"test/rival_low": None}, judged(*GOOD[1])], "as the test says"),
    "too few images to lose": (
        [judged(*figures) | {"test/verdict": "not shown", "test/verdict_because": "few images"} for figures in WORSE],
        "few images",
    ),
    "an end that is missing": (
        [judged(*f, families={"moves": (0.1, 0.05, None)}) for f in WIDE],
        "the interval over images includes 0",
    ),
    "ends that contradict each other": (
        [judged(-0.01, 0.02, 0.03), judged(-0.01, 0.02, 0.03)],
        "the intervals over seeds and over images contradict each other",
    ),
    "a family that seeds differ about": (
        [judged(*f, families={"moves": (m, 0.012, 0.05)}) for f, m in zip(GOOD, (0.1, 0.01, 0.01), strict=True)],
        "the interval over seeds includes 0",
    ),
}


@pytest.mark.parametrize(("figures", "because"), CASES.values(), ids=CASES.keys())
def test_it_is_not_shown_for_each_of_these_reasons(figures, because, tmp_path):
    seeds(tmp_path, *figures)
    answer = answer_in(tmp_path)
    assert (answer.verdict, answer.because) == (NOT_SHOWN, because)


def test_rows_of_one_answer_are_counted_as_all_or_as_none(tmp_path):
    for row, (figures, said) in enumerate(
        ((WIDE, "is not shown to pay, or not to, for any"), (WORSE, "does not pay for all"))
    ):
        folder = tmp_path / f"{row}"
        for agent in ("a", "b"):
            seeds(folder, *(judged(*f) for f in figures), agent=agent)
        assert counted(answers_of(rows_in(folder))) == f"Deciding per image {said} of the 2 rows that learned."


def test_it_does_not_pay_where_both_intervals_lie_below_0_also_if_the_search_was_cut_off(tmp_path):
    seeds(tmp_path, *(judged(*figures, finished=False) for figures in WORSE))
    answer = answer_in(tmp_path)
    assert (answer.verdict, answer.because) == (DOES_NOT_PAY, "")
    assert answer_lines([answer])[0].startswith(
        "a: does not pay (-2.00 points, -2.80 to -1.20, 3 seeds, against 2 even"
    )


def test_one_family_of_rivals_that_is_shown_to_be_better_is_enough_and_is_named(tmp_path):
    seeds(tmp_path, *(judged(0.001, -0.05, 0.02, families={"moves": figures}) for figures in WORSE))
    answer = answer_in(tmp_path)
    assert answer.verdict == DOES_NOT_PAY and answer.margin.rival == "a choice of moves"


def test_a_row_is_compared_with_one_family_over_all_seeds_whichever_rival_each_seed_names(tmp_path):
    """Seed 0 names a rival of one family, seed 1 of the other. The lower end over images is that of the moves."""
    moves = {"moves": (0.030, 0.008, 0.04)}
    seeds(tmp_path, judged(*GOOD[0], families=moves), judged(*moves["moves"], family="moves", families=NAMED_SECOND))
    answer = answer_in(tmp_path)
    assert answer.verdict == PAYS and answer.margin.mean == pytest.approx(0.030) and answer.margin.low == 0.008
    assert answer.margin.rival_seeds == 1


def test_a_family_that_some_seeds_lack_counts_by_the_rivals_that_runs_name(tmp_path):
    """Two seeds are better than the family that all have; the third is worse than one that it alone has."""
    beaten = judged(-0.05, -0.06, -0.04, family="moves", families={"evenly spread blocks": GOOD[2]})
    seeds(tmp_path, judged(*GOOD[0]), judged(*GOOD[1]), beaten)
    answer = answer_in(tmp_path)
    assert (answer.verdict, answer.because) == (NOT_SHOWN, "the intervals over seeds and over images include 0")
    assert answer.margin.mean == pytest.approx((0.02 + 0.018 - 0.05) / 3)


def test_of_two_runs_of_one_name_that_are_rivals_the_stronger_counts(tmp_path):
    """A run lists its rivals with the strongest first."""
    named = dict(family="the run full over net (seed0)", families={"moves": GOOD[0]})
    runs = [judged(*figures, **named) for figures in WIDE]
    for summary in runs:
        summary["test/rivals"].append(summary["test/rivals"][0] | {"margin": 0.5, "low": 0.4, "high": 0.6})
    seeds(tmp_path, *runs)
    answer = answer_in(tmp_path)
    assert answer.verdict == NOT_SHOWN and answer.margin.mean == pytest.approx(0.02)


def test_the_most_frequent_rival_is_named_with_how_many_seeds_have_it(tmp_path):
    for seed, (figures, rival) in enumerate(zip(GOOD, ("x", "y", "y"), strict=True)):
        seeds(tmp_path / f"{seed}", *[judged(*figures, rival=rival)] * (seed + 1))
    answer = answer_in(tmp_path)  # of the repeated seeds, the first is counted
    assert (answer.margin.rival, answer.margin.rival_seeds) == ("y", 2)
    assert "3 seeds, against y in 2 of them)" in answer_lines([answer])[0]


def test_oracles_and_agents_that_learned_nothing_have_no_verdict(tmp_path):
    seeds(tmp_path, judged(*GOOD[0]) | {"test/sees_the_label": True, "steps": 0}, agent="oracle")
    seeds(tmp_path, judged(*GOOD[0]) | {"steps": 0}, agent="random")
    rows = rows_in(tmp_path)
    assert answers_of(rows) == [] and answer_lines([]) == [] and counted([]) == ""
    assert all(line["verdict"] is line["margin"] is line["oracle_share"] is None for line in table(rows, [], "g"))


def test_rows_that_pay_stand_first_and_older_rows_share_the_last_line(tmp_path):
    seeds(tmp_path, {}, agent="old1")
    seeds(tmp_path, {}, {}, agent="old2")
    seeds(tmp_path, *(judged(*figures) for figures in WORSE), agent="loses")
    seeds(tmp_path, *(judged(*figures) for figures in WIDE), agent="open")
    seeds(tmp_path, *(judged(*figures) for figures in GOOD), agent="pays")
    answers = answers_of(rows_in(tmp_path))
    lines = answer_lines(answers)
    assert [line.partition(":")[0] for line in lines] == ["pays", "open", "loses", "old1 and old2"]
    assert lines[-1].startswith("old1 and old2: not shown: judged by an older version (train anew")
    assert counted(answers) == (
        "Of 5 rows that learned, deciding per image pays for 1, does not pay for 1 and is not shown to pay, or not to, "
        "for 3, against the strongest fixed choice of equal cost."
    )


def test_tables_have_the_answer_and_an_older_row_keeps_its_old_column(tmp_path):
    seeds(tmp_path, *(judged(*figures) for figures in GOOD), agent="a")
    seeds(tmp_path, {}, agent="old")
    rows = rows_in(tmp_path)
    new, old = table(rows, answers_of(rows), "g")
    expected = {"verdict": PAYS, "verdict_because": None, "rival": "2 evenly spread blocks", "rival_seeds": 3}
    assert {key: new[key] for key in expected} == expected and new["static_margin"] is None
    assert new["margin"] == pytest.approx(0.02) and new["margin_t95"] == pytest.approx(0.004968, rel=1e-3)
    assert (new["margin_images_low"], new["margin_images_high"]) == (pytest.approx(0.012), pytest.approx(0.028))
    assert (old["verdict"], old["margin"], old["static_margin"]) == (NOT_SHOWN, None, 0.01)
    first, *_ = run_table(rows, "g")
    assert (first["verdict"], first["rival"], first["rival_margin"], first["rival_low"], first["rival_high"]) == (
        *(PAYS, "2 evenly spread blocks"),
        *GOOD[0],
    )
    assert (first["rival_accuracy"], first["rival_macs"], first["rival_finished"]) == (pytest.approx(0.78), 1.0, True)
    assert "verdict_because,margin,margin_t95,margin_images_low" in as_csv(table(rows, answers_of(rows), "g"))


def over(folder: Path, network: str, fixed: list[list[float]], *figures: dict[str, Any], agent: str = "b") -> None:
    """Runs like those of :func:`seeds`, over another network, with these fixed choices on the test images."""
    for seed, summary in enumerate(figures):
        decisions = made_up_decisions([[1, 0]] * 100, [0] * 90 + [1] * 10, network=network)
        decisions = dataclasses.replace(decisions, static_F2=torch.tensor(fixed, dtype=torch.float64))
        made_up_run(folder / f"{agent}{seed}", decisions, agent, seed, summary=summary | {"backbone": network or "own"})


@pytest.mark.parametrize(
    ("fixed", "words", "macs", "accuracy"),
    [
        ([[0.5, 0.8], [0.8, 0.93]], "better for less", 0.8, 0.93),
        ([[0.5, 0.86], [1.5, 1.0]], "better at this cost", 1.0, 0.93),
        ([[0.5, 0.88], [0.7, 0.905]], "as accurate for less", 0.66, 0.9),
        ([[0.4, 0.9], [2.0, 0.9]], "as accurate for less", 0.4, 0.9),
    ],
)
def test_a_fixed_choice_over_another_network_that_is_the_better_buy_is_said(fixed, words, macs, accuracy, tmp_path):
    """The rows are right on 90 % with 1 MAC; half the interval over images is 0.8 points."""
    seeds(tmp_path, *(judged(*figures) for figures in GOOD))
    over(tmp_path, "other", fixed, judged(*GOOD[0]))
    answer, _ = answers_of(rows_in(tmp_path))
    assert answer.verdict == PAYS and (answer.other.name, answer.other.more_accurate) == ("other", "better" in words)
    assert (answer.other.macs, answer.other.accuracy) == (pytest.approx(macs), pytest.approx(accuracy))
    line = answer_lines([answer])[0]
    assert line.startswith("a: pays against the fixed choices of its own network (+2.00 points, ")
    assert line.endswith(f"; but a fixed choice over other is {words} ({100 * accuracy:.2f} % at 0.00 M MACs)")


@pytest.mark.parametrize("fixed", [[[0.5, 0.8], [1.5, 1.0]], [[0.92, 0.905]], [[1.5, 1.0]]])
def test_a_fixed_choice_over_another_network_that_is_not_shown_to_be_better_is_not_said(fixed, tmp_path):
    """At 1 MAC, where the row has 90 %: one is as accurate; one is better by 0.5 points for hardly less; one is dearer."""
    seeds(tmp_path, *(judged(*figures) for figures in GOOD))
    over(tmp_path, "other", fixed, judged(*GOOD[0]))
    answer, _ = answers_of(rows_in(tmp_path))
    assert answer.other is None and answer_lines([answer])[0].startswith("a: pays (")


def test_what_pays_against_its_own_network_alone_stands_behind_what_pays(tmp_path):
    seeds(tmp_path, *(judged(*figures) for figures in GOOD))
    over(tmp_path, "other", [[0.5, 0.95]], *(judged(0.9 * m, low, high) for m, low, high in GOOD))
    answers = answers_of(rows_in(tmp_path))
    assert [line.partition(":")[0] for line in answer_lines(answers)] == ["b", "a"]
    assert counted(answers).startswith(
        "Of 2 rows that learned, deciding per image pays for 2 (1 of them beaten by a fixed choice over another network)"
    )
    assert [line["other_network"] for line in table(rows_in(tmp_path), answers, "g")] == ["other", None]


def test_choices_that_are_the_best_on_test_images_do_not_count_as_the_better_buy(tmp_path):
    seeds(tmp_path, *(judged(*figures) for figures in GOOD))
    over(tmp_path, "other", [[0.5, 0.99]], {})
    assert answers_of(rows_in(tmp_path))[0].other is None


def test_lines_of_fixed_choices_by_hand(tmp_path):
    """Over the frozen network runs agree; over one that each run trains, accuracies are means at costs that all have."""
    chosen, luckiest = [[1.0, 0.5], [2.0, 0.4], [3.0, 0.9]], [[1.0, 0.5], [1.5, 0.1], [3.0, 0.9]]
    over(tmp_path, "frozen", chosen, judged(*GOOD[0]), judged(*GOOD[1]), agent="x")
    over(tmp_path, "older", luckiest, {}, agent="y")
    over(tmp_path, "", [[1.0, 0.2], [3.0, 0.4]], judged(*GOOD[0]), agent="z")
    trained = made_up_decisions([[1, 0]] * 100, [0] * 90 + [1] * 10, network="")
    trained = dataclasses.replace(trained, static_F2=torch.tensor([[2.0, 0.5], [4.0, 0.7]], dtype=torch.float64))
    made_up_run(tmp_path / "z1", trained, "z", 1, summary=judged(*GOOD[0]) | {"backbone": "own"})
    lines = fixed_lines(rows_in(tmp_path))
    assert {line.name: (line.points, line.on_validation) for line in lines} == {
        "frozen": ([(1.0, 0.5), (2.0, 0.4), (3.0, 0.9)], True),
        "older": ([(1.0, 0.5), (3.0, 0.9)], False),
        "own": ([(2.0, pytest.approx(0.4)), (3.0, pytest.approx(0.5))], True),
    }
    frozen = lines[0]
    assert frozen.at(0.9) is None and frozen.at(1.5) == (1.5, pytest.approx(0.45)) and frozen.at(9.0) == (3.0, 0.9)
    assert frozen.reaching(0.3) == (1.0, 0.5) and frozen.reaching(0.95) is None
    assert frozen.reaching(0.65) == (pytest.approx(2.5), 0.65)
    assert [point[:2] for point in best_of_lines(lines)] == [(1.0, 0.5), (3.0, 0.9)]
    assert "chosen on validation" in about_lines(lines) and "Those of older runs are the best" in about_lines(lines)
    assert "older" not in about_lines(lines[:1]) and "dotted" not in about_lines(lines[:1]) and about_lines([]) == ""


def test_two_rows_that_train_networks_of_one_name_have_a_line_each(tmp_path):
    over(tmp_path, "", [[1.0, 0.2]], judged(*GOOD[0]), agent="x")
    over(tmp_path, "", [[1.0, 0.3]], judged(*GOOD[0]), agent="y")
    assert [line.name for line in fixed_lines(rows_in(tmp_path))] == ["own as x trained it", "own as y trained it"]


def oracle(folder: Path, right: int, blocks: list[int], network: str = "frozen", name: str = "oracle") -> None:
    decisions = made_up_decisions([blocks] * 100, [0] * right + [1] * (100 - right), network=network)
    made_up_run(folder / name, decisions, name, summary={"steps": 0, "test/sees_the_label": True})


def test_the_share_of_the_oracles_gain_by_hand(tmp_path):
    """The rows have 90 %, the rival 88 %, the oracle 98 % for as much: 2 of 10 points are captured."""
    seeds(tmp_path, *(judged(*figures) for figures in GOOD))
    seeds(tmp_path, *(judged(*figures) for figures in WORSE), agent="b")
    oracle(tmp_path, 98, [1, 0])
    oracle(tmp_path, 93, [1, 0], name="weaker")
    oracle(tmp_path, 100, [1, 1], name="dearer")
    a, b = answers_of(rows_in(tmp_path))
    assert a.oracle_share == pytest.approx(0.2) and b.oracle_share == pytest.approx(-0.02 / 0.06)


@pytest.mark.parametrize(
    ("right", "blocks", "network"), [(98, [1, 1], "frozen"), (98, [1, 0], ""), (88, [1, 0], "frozen")]
)
def test_an_oracle_that_costs_more_or_has_another_network_or_no_gain_says_nothing(right, blocks, network, tmp_path):
    seeds(tmp_path, *(judged(*figures) for figures in GOOD))
    oracle(tmp_path, right, blocks, network)
    assert answer_in(tmp_path).oracle_share is None


def test_runs_that_leave_early_state_their_own_oracle(tmp_path):
    """The made-up oracle is right on 99 % for 1 MAC; the row has 90 % for 1.5, the rival 88 %."""
    for seed, figures in enumerate(GOOD):
        exits = made_up_decisions([[1, 0], [1, 1]] * 50, [0] * 90 + [1] * 10, kind="exits")
        made_up_run(tmp_path / f"{seed}", exits, "a", seed, summary=judged(*figures))
    assert answer_in(tmp_path).oracle_share == pytest.approx(0.02 / 0.11)
