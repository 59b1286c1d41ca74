"""What a comparison says in words, in cases that are small enough to work out by hand."""

from __future__ import annotations

from policyskip.comparison.answers import answers_of
from policyskip.comparison.collect import collect
from policyskip.comparison.formats import display_table, fitting
from policyskip.comparison.rows import rows_of
from policyskip.comparison.tables import differences, table
from policyskip.comparison.verdict import sentences
from tests.made_up import made_up_decisions, made_up_run


def said(folder) -> list[str]:
    rows = rows_of(collect([str(folder)]).results)
    return sentences(rows, differences(rows, "g"))


def run(folder, right, blocks=2, **summary):
    """A run that is right on so many of 100 images, and computes 1 or 2 of 2 blocks."""
    keep = [[1, int(blocks == 2)]] * 100
    figures = {f"test/{key}": value for key, value in summary.items()}
    made_up_run(folder, made_up_decisions(keep, [0] * right + [1] * (100 - right)), folder.name, summary=figures)


def test_the_cheapest_row_that_is_not_shown_to_be_worse_is_named(tmp_path):
    run(tmp_path / "a", 96)
    run(tmp_path / "b", 95, blocks=1)
    run(tmp_path / "c", 50, blocks=1)
    first, second = said(tmp_path)
    assert first == "Most accurate is a: 96.00 % at 1.000 of its network's MACs."
    assert second.startswith("That it is more accurate than b (95.00 % at 0.500 of its network's MACs) is not shown")


def test_rows_that_are_shown_to_be_worse_are_not_called_as_good(tmp_path):
    run(tmp_path / "a", 96)
    run(tmp_path / "c", 50, blocks=1)
    assert said(tmp_path)[1] == "Every cheaper row is less accurate, by intervals over the same images."


def test_an_oracle_is_not_the_most_accurate(tmp_path):
    run(tmp_path / "a", 90)
    run(tmp_path / "oracle", 100, sees_the_label=True)
    assert said(tmp_path)[0].startswith("a: 90.00 %")


def test_rows_that_are_alike_are_said_to_be_alike_and_cost_decides_openly(tmp_path):
    for name, blocks in (("a", 1), ("b", 2), ("c", 2), ("d", 2)):
        run(tmp_path / name, 96, blocks)
    first, few = said(tmp_path)
    assert (
        first == "All 4 rows are equally accurate: 96.00 %; the cheapest of them is a, at 0.500 of its network's MACs."
    )
    assert few == "The test images are few: one of 100 is 1.00 points."
    run(tmp_path / "e", 90, 1)
    assert said(tmp_path)[0].startswith("Most accurate are a, b, c and d, alike: 96.00 %; the cheapest of them is a,")
    assert not any("No other row" in sentence for sentence in said(tmp_path))


def test_a_row_that_learned_nothing_and_is_most_accurate_is_called_that(tmp_path):
    run(tmp_path / "a", 95)
    made_up_run(tmp_path / "r", made_up_decisions([[1, 1]] * 100, [0] * 97 + [1] * 3), "r", summary={"steps": 0})
    first, few, *_ = said(tmp_path)
    assert first.startswith("Most accurate is r, which learned nothing: 97.00 %") and "one of 100" in few


def test_of_many_rows_it_is_said_how_many_more(tmp_path):
    for n in range(7):
        run(tmp_path / f"r{n}", 90)
    run(tmp_path / "s", 80)
    assert said(tmp_path)[0].startswith("Most accurate are r0, r1, r2, r3 and 3 more, alike: 90.00 %")


def test_rows_are_told_apart_by_the_keys_that_differ_and_by_no_others(tmp_path):
    """Three settings differ in `a` and `b` alike, and all six in `penalty`; the many other keys are the same."""
    same = {f"key{n}": n for n in range(20)}
    for n in range(6):
        made_up_run(tmp_path / f"{n}", made_up_decisions([[1, 0]] * 4), a=n // 2, b=n // 2, z={"penalty": n}, **same)
    labels = {row.label for row in rows_of(collect([str(tmp_path)]).results)}
    assert labels == {f"blockdrop penalty={n}" for n in range(6)}


def test_two_keys_of_one_name_are_written_in_full(tmp_path):
    for n in range(4):
        settings = {"net": {"width": n % 2}, "policy": {"width": n // 2}}
        made_up_run(tmp_path / f"{n}", made_up_decisions([[1, 0]] * 4), **settings)
    labels = {row.label for row in rows_of(collect([str(tmp_path)]).results)}
    expected = {f"blockdrop agent.net.width={n % 2} agent.policy.width={n // 2}" for n in range(4)}
    assert labels == expected


def test_nothing_is_printed_as_minus_zero_and_a_narrow_table_keeps_what_matters(tmp_path):
    made_up_run(tmp_path / "a", made_up_decisions([[1, 0]] * 4), summary={"test/static_margin": -0.00001})
    rows = rows_of(collect([str(tmp_path)]).results)
    shown = display_table(table(rows, answers_of(rows), "g"))
    assert "-0.00" not in str(shown)
    header, (line,), left_out = fitting(*shown, 80)
    assert {"row", "accuracy, %", "MACs, share", "against fixed choice, older runs"} <= set(header) and left_out
    assert 1 + sum(max(len(cell), 5) + 3 for cell in line) <= 80
    assert fitting(*shown, 1000)[0] == shown[0]
