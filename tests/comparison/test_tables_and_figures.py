"""The figures of a comparison, each in a case that is small enough to work out by hand."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from policyskip.comparison import figures, plots
from policyskip.comparison.answers import answers_of
from policyskip.comparison.collect import collect
from policyskip.comparison.fixed_lines import best_of_lines, fixed_lines
from policyskip.comparison.rows import Row, rows_of
from policyskip.comparison.series import front_of, gallery, use
from policyskip.comparison.tables import agreement, differences, disagreement_table, disagreements, table
from policyskip.fronts import pareto
from tests.comparison.test_compare import two_agents
from tests.made_up import made_up_decisions, made_up_run


def rows_in(folder: Path) -> list[Row]:
    return rows_of(collect([str(folder)]).results)


@pytest.fixture
def hundred(tmp_path) -> list[Row]:
    """a is right on ninety of 100 images, b on one more; the full network is right where a is."""
    keep, full = [[1, 0]] * 100, [True] * 90 + [False] * 10
    for name, right in (("a", 90), ("b", 91)):
        made_up_run(tmp_path / name, made_up_decisions(keep, [0] * right + [1] * (100 - right), full=full), name)
    return rows_in(tmp_path)


def test_intervals_pair_images(hundred):
    a, _ = table(hundred, answers_of(hundred), "g")
    assert (a["change_images_low"], a["change_images_high"]) == (0, 0)
    (found,) = differences(hundred, "g")
    assert found["accuracy"] == pytest.approx(-0.01)
    assert -0.031 <= found["images_low"] <= -0.02 and found["images_high"] == 0


def test_images_are_paired_by_place(tmp_path):
    """Both are right on ninety of a hundred, but not on the same ninety."""
    for name, wrong in (("a", range(10)), ("b", range(90, 100))):
        made_up_run(tmp_path / name, made_up_decisions([[1, 0]] * 100, [int(n in wrong) for n in range(100)]), name)
    (found,) = differences(rows_in(tmp_path), "g")
    assert found["accuracy"] == 0 and found["images_low"] <= -0.07 and found["images_high"] >= 0.07


@pytest.mark.parametrize("knows", ["ab", "a", "b"])
def test_intervals_draw_groups_of_images(knows, tmp_path):
    """In ten groups of ten, b is right on one group more. A draw of the ten groups leaves it out once in three times,
    and has it twice in four; a draw of 100 images has 5 to 16 of its ten. One run may know what an older one does not.
    """
    keep, full, group_N = [[1, 0]] * 100, [True] * 80 + [False] * 20, torch.arange(100) // 10
    for name, right in (("a", 80), ("b", 90)):
        made_up = made_up_decisions(keep, [0] * right + [1] * (100 - right), full=full)
        made_up_run(tmp_path / name, dataclasses.replace(made_up, group_N=group_N if name in knows else None), name)
    rows = rows_in(tmp_path)
    (found,) = differences(rows, "g")
    assert found["images_low"] == pytest.approx(-0.3) and found["images_high"] == 0
    cells = {cell["row"]: cell for cell in table(rows, [], "g")}
    low, high = cells["b"]["change_images_low"], cells["b"]["change_images_high"]
    assert (low, high) == pytest.approx((0, 0.3)) if "b" in knows else (0 < low < high < 0.2)


def test_a_difference_is_written_both_ways_round(hundred):
    text = figures.differences(hundred, differences(hundred, "g"))["data"][0]["text"]
    assert text[0][1].startswith("-1.00 points (95 % over images: -3.00 to +0.00)")
    assert text[1][0].startswith("+1.00 points (95 % over images: +0.00 to +3.00)")


def test_agreement_by_hand(tmp_path):
    """a has two seeds, b one; what b spends is the same on all images, so it has no rank."""
    rows = rows_in(two_agents(tmp_path))
    found = {(cell["row"], cell["with"]): cell for cell in agreement(rows, "g")}
    same_seeds = {"same_choices": 1, "same_answers": 0.75, "same_spending": pytest.approx(1)}
    assert found["a", "a"] == {"group": "g", "row": "a", "with": "a", **same_seeds}
    assert found["a", "b"]["same_choices"] == 5 / 8 and found["a", "b"]["same_answers"] == (2 / 4 + 1 / 4) / 2
    assert found["a", "b"]["same_spending"] is None and found["b", "b"]["same_answers"] is None


def test_opposite_spending_over_other_networks(tmp_path):
    made_up_run(tmp_path / "a", made_up_decisions([[0, 0], [1, 0], [1, 1]]), "a")
    made_up_run(tmp_path / "b", made_up_decisions([[1, 1], [1, 0], [0, 0]]), "b", summary={"backbone": "other"})
    _, found, _ = agreement(rows_in(tmp_path), "g")
    assert found["same_spending"] == pytest.approx(-1) and found["same_choices"] is None


def test_disagreements_by_hand(tmp_path):
    """Image 2 comes before 1: the answers differ as much on both, and what is spent differs more on 2, nothing and all."""
    rows = rows_in(two_agents(tmp_path))
    assert rows[0].share_N.tolist() == [0.5, 1, 0, 1] and disagreements(rows) == [2, 1, 3]
    line_a, line_b, *_ = disagreement_table(rows, [2, 1, 3], "g")
    image = {"group": "g", "image": 2, "label": "0"}
    assert line_a == image | {"row": "a", "answer": "0", "right_share_of_seeds": 1.0, "macs_share": 0.0}
    assert line_b["answer"] == "1"


def test_fronts_by_hand(tmp_path):
    oracle, agent = ({"macs": macs, "accuracy": 0.9 + macs / 100, "sees_the_label": macs == 1.0} for macs in (1.0, 2.0))
    assert front_of([oracle, agent]) == [1] and pareto([1.0, 1.0], [0.4, 0.5]) == [1]
    fixed_F2 = torch.tensor([[1.0, 0.5], [1.5, 0.6], [1.8, 0.4], [2.0, 0.9]], dtype=torch.float64)
    made_up_run(tmp_path / "a", dataclasses.replace(made_up_decisions([[1, 0]]), static_F2=fixed_F2), "a")
    assert [point[:2] for point in best_of_lines(fixed_lines(rows_in(tmp_path)))] == [
        (1.0, 0.5),
        (2.0, 0.9),
    ]  # below a mixture: out


def test_examples_and_exits_by_hand(tmp_path):
    exits = made_up_decisions([[1, 1], [1, 0], [1, 1], [1, 0]], [0, 0, 1, 0], kind="exits")
    made_up_run(tmp_path / "a", exits, "a")
    (row,) = rows_in(tmp_path)
    assert use(row) == ("exits", [0.5, 0.5])
    parts = {part["title"]: [item["image"] for item in part["items"]] for part in gallery(row.results[0], range(4), 1)}
    assert parts == {"least computed": [1], "most computed": [0], "wrong": [2]}


@pytest.mark.parametrize(("devices", "expected"), [(("A", "A"), 1.5), (("A", "B"), None)])
def test_latencies_of_two_machines_are_not_averaged(devices, expected, tmp_path):
    for seed, device in enumerate(devices):
        measured = {"latency_ms": 1.0 + seed, "latency_device": device, "latency_threads": 2, "latency_batch": 256}
        made_up_run(tmp_path / f"a{seed}", made_up_decisions([[1, 0]]), "a", seed, summary=measured)
    (line,) = table(rows_in(tmp_path), [], "g")
    assert line["latency_ms"] == expected


def test_a_row_is_the_mean_of_its_seeds(tmp_path):
    """Seed 0 is right on four images of four with one block of two, seed 1 on two with both; the full network is right on
    three. The deviation of 1 and ½ is ½/√2, and t(0.975, 1) = 12.7062."""
    full = [True, True, True, False]
    for name, seed, keep, prediction in (
        ("a", 0, [1, 0], [0] * 4),
        ("a", 1, [1, 1], [0, 0, 1, 1]),
        ("b", 0, [1, 1], [0] * 4),
    ):
        made_up_run(tmp_path / f"{name}{seed}", made_up_decisions([keep] * 4, prediction, full=full), name, seed)
    rows = rows_in(tmp_path)
    a, b = table(rows, answers_of(rows), "g")
    expected = {"accuracy": 0.75, "full_accuracy": 0.75, "change": 0.0, "macs": 1.5, "macs_share": 0.75, "kept": 1.5}
    assert {key: a[key] for key in expected} == expected and a["seconds"] == 10.5 and b["change"] == 0.25
    assert a["accuracy_t95"] == pytest.approx(12.7062 * 0.25, rel=1e-5) and b["accuracy_t95"] is None
    assert rows[0].correct_N.tolist() == [1, 1, 0.5, 0.5] and rows[0].share_N.tolist() == [0.75] * 4
    (found,) = differences(rows, "g")
    assert found["accuracy"] == -0.25 and found["macs"] == -0.5


def test_the_mean_exit_by_hand(tmp_path):
    """Of four images, one leaves at exit 0, one at 1 and two at 2."""
    exits = made_up_decisions([[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1]], kind="exits")
    made_up_run(tmp_path / "a", exits, "a")
    (line,) = table(rows_in(tmp_path), [], "g")
    assert (line["kept"], line["of"], line["choice"]) == (1.25, 3, "exits")


def test_an_oracle_has_no_say_in_what_agents_disagree_about(tmp_path):
    for name, prediction, sees in (("a", [0, 0], False), ("oracle", [0, 1], True)):
        summary = {"test/sees_the_label": sees}
        made_up_run(tmp_path / name, made_up_decisions([[1, 0]] * 2, prediction), name, summary=summary)
    rows = rows_in(tmp_path)
    assert [row.oracle for row in rows] == [False, True] and disagreements(rows) == []


def test_pictures_of_agreement_say_why_they_are_empty_and_what_each_colour_means(tmp_path, monkeypatch):
    for seed, prediction in enumerate(([0, 0, 0], [0, 1, 0])):
        made_up_run(tmp_path / f"a{seed}", made_up_decisions([[1, 0]] * 3, prediction), "a", seed)
    made_up_run(tmp_path / "b", made_up_decisions([[1, 1, 0]] * 3, [1, 1, 1]), "b")
    rows = rows_in(tmp_path)
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, caption, path: drawn.append((figure, caption)))
    plots.agreement(rows, agreement(rows, "g"), tmp_path / "x.png")
    (figure, caption) = drawn.pop()
    *_, spending = figure.axes[:3]
    assert "all images cost" in " ".join(text.get_text() for text in spending.texts)
    assert not re.search(r":[^.]*:", caption) and all(axes.get_title()[0].isupper() for axes in figure.axes[:3])
    plots.disagreement(rows, [1], {1: np.zeros((4, 4, 3), np.uint8)}, tmp_path / "x.png")
    (figure, caption) = drawn.pop()
    assert "yellow or orange, right in some seeds" in caption and len(figure.axes[1].lines) == len(rows) - 1


def test_older_runs_without_a_precision_are_of_the_usual_one(tmp_path):
    """The way of execution is no setting either."""
    added = ("", '"execution": "auto", "precision": "float32"', '"execution": "gather", "precision": "bfloat16"')
    for seed, keys in enumerate(added):
        file = made_up_run(tmp_path / str(seed), made_up_decisions([[1, 0]] * 4), "a", seed) / "config.yaml"
        file.write_text(file.read_text().replace('{"seed"', f'{{{keys}{", " if keys else ""}"seed"'))
    rows = rows_in(tmp_path)
    assert sorted(len(row.results) for row in rows) == [1, 2]
    assert any("precision=bfloat16" in row.label for row in rows)
