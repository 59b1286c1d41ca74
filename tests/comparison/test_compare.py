"""``policyskip compare``: how runs are grouped, their figures worked out by hand, and what is refused."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from policyskip.comparison.answers import Answer, answers_of
from policyskip.comparison.collect import collect
from policyskip.comparison.compare import _said, compare
from policyskip.comparison.fixed_lines import best_of_lines, fixed_lines
from policyskip.comparison.formats import display_table
from policyskip.comparison.groups import groups_of
from policyskip.comparison.rows import rows_of
from policyskip.comparison.series import band, styles, use
from policyskip.comparison.tables import differences, disagreements, table
from policyskip.data import digits
from policyskip.errors import UserError
from policyskip.evaluation import decisions
from policyskip.rivals import NOT_SHOWN
from policyskip.runs.folder import Run
from tests.conftest import typed
from tests.made_up import drawn, judged, made_up_decisions, made_up_run

JUDGED = judged(0.02, 0.01, 0.03)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """A folder with runs of three agents, and a comparison of them in out."""
    folder = tmp_path_factory.mktemp("compared")
    images = digits(torch.device("cpu"), 1, 1, 60).test.fingerprint()
    for seed in range(3):
        made_up_run(folder / f"runs/blockdrop-{seed}", drawn(seed, images=images), seed=seed, summary=JUDGED)
        other = drawn(seed, "ppo", images=images)
        made_up_run(folder / f"runs/ppo-{seed}", other, "ppo", seed, learning_rate=0.01 if seed < 2 else 0.02)
    exits = drawn(0, "msdnet", kind="exits", network="", images=images)
    made_up_run(folder / "runs/msdnet-0", exits, "msdnet", summary={"backbone": "msdnet"})
    (folder / "runs/stopped").mkdir()
    (folder / "runs/stopped/config.yaml").write_text("seed: 0")
    result = typed("compare", "runs=runs", "output=out", "tracking=none", cwd=folder, drawn=True)
    assert result.returncode == 0, result.stderr
    (folder / "stdout.txt").write_text(result.stdout)
    return folder


def lines(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_everything_is_written(workshop):
    names = {path.name for path in (workshop / "out").iterdir()}
    assert names == {
        *("comparison.csv", "runs.csv", "differences.csv", "agreement.csv", "disagreements.csv", "classes.csv"),
        *("comparison.md", "comparison.json", "index.html", "plots"),
    }
    assert {path.name for path in (workshop / "out/plots").iterdir()} == {
        *("pareto_front.png", "learning_curves.png", "block_use.png", "exit_use.png"),
        *("agreement.png", "disagreement.png"),
    }
    assert [path.name for path in workshop.iterdir() if path.name.startswith(".")] == []
    assert (workshop / "out/index.html").stat().st_size < 10e6
    assert len(lines(workshop / "out/runs.csv")) == 7


def test_rows_are_settings_and_say_how_they_differ(workshop):
    rows = lines(workshop / "out/comparison.csv")
    assert {row["row"]: row["seeds"] for row in rows} == {
        "blockdrop": "0 1 2",
        "msdnet": "0",
        "ppo learning_rate=0.01": "0 1",
        "ppo learning_rate=0.02": "2",
    }
    printed = (workshop / "stdout.txt").read_text()
    assert "ppo learning_rate=0.01" in printed and "left out: runs/stopped is not finished" in printed


def test_figures_are_those_of_the_runs(workshop):
    summaries = [json.loads((workshop / f"runs/blockdrop-{n}/summary.json").read_text()) for n in range(3)]
    row = next(row for row in lines(workshop / "out/comparison.csv") if row["row"] == "blockdrop")
    accuracy = [summary["test/accuracy"] for summary in summaries]
    assert float(row["accuracy"]) == pytest.approx(sum(accuracy) / 3)
    changes = [summary["test/accuracy"] - summary["test/full_accuracy"] for summary in summaries]
    assert float(row["change"]) == pytest.approx(sum(changes) / 3)
    assert float(row["change_images_low"]) < float(row["change"]) < float(row["change_images_high"])
    assert float(row["seconds"]) == pytest.approx(11)
    assert (row["of"], row["choice"]) == ("6", "blocks")


def test_labels_have_as_many_keys_as_tell_rows_apart(tmp_path):
    keep = [[1, 0]] * 4
    for name, settings in (("p", dict(a=1, b=1)), ("q", dict(a=1, b=2)), ("r", dict(a=2, b=2, c=3))):
        made_up_run(tmp_path / name, made_up_decisions(keep), "x", **settings)
    rows = rows_of(collect([str(tmp_path)]).results)
    assert {row.results[0].name: row.label for row in rows} == {"p": "x a=1 b=1", "q": "x a=1 b=2", "r": "x a=2"}


def two_agents(folder: Path) -> Path:
    """Four images: a is right on three, b on one of those; the full network on all. Two seeds of a, one of b."""
    keep = [[1, 0], [1, 1], [0, 0], [1, 1]]
    made_up_run(folder / "a0", made_up_decisions(keep, [0, 0, 0, 1]), "a", 0)
    made_up_run(folder / "a1", made_up_decisions(keep, [0, 0, 0, 0]), "a", 1)
    made_up_run(folder / "b0", made_up_decisions([[1, 1]] * 4, [0, 1, 1, 1]), "b", 0)
    return folder


def test_rows_differ_by_what_their_images_say(tmp_path):
    rows = rows_of(collect([str(two_agents(tmp_path))]).results)
    a, b = table(rows, answers_of(rows), "g")
    assert (a["row"], a["runs"], a["accuracy"], b["accuracy"]) == ("a", 2, 0.875, 0.25)
    assert a["accuracy_t95"] == pytest.approx(12.7062 * 0.125, rel=1e-4)  # t(0.975, 1) · sd/√2, sd = 0.125·√2
    assert b["accuracy_t95"] is None and a["kept"] == pytest.approx(5 / 4)
    (difference,) = differences(rows, "g")
    assert difference["accuracy"] == 0.625 and difference["macs"] == pytest.approx(1.25 - 2)
    assert 0 <= difference["images_low"] < 0.625 < difference["images_high"] <= 1
    assert rows[0].correct_N.tolist() == [1, 1, 1, 0.5]
    assert disagreements(rows)[0] in (1, 2) and 0 not in disagreements(rows)
    assert use(rows[0]) == ("blocks", [0.75, 0.5])
    curve = band(rows[0], "val/accuracy")
    assert curve is not None and curve.step_T == [10, 20, 30]
    assert curve.low_T[0] == pytest.approx(60) and curve.mean_T[0] == pytest.approx(60.5)
    assert best_of_lines(fixed_lines(rows)) == [(0.0, 0.1, "net"), (2.0, 0.9, "net")]
    header, (line, *_) = display_table(table(rows, answers_of(rows), "g"))
    assert line[header.index("accuracy, %")] == "87.50 ± 158.83" and "latency, ms" not in header


def test_runs_on_other_images_or_over_other_weights_stand_apart(tmp_path):
    two_agents(tmp_path)
    keep = [[1, 0]] * 4
    made_up_run(tmp_path / "c", made_up_decisions(keep, images="others"), "c")
    made_up_run(tmp_path / "d", made_up_decisions(keep, network="0123456789"), "d")
    made_up_run(tmp_path / "e", made_up_decisions(keep, network=""), "e")  # it trained its network
    groups = groups_of(collect([str(tmp_path)]).results)
    assert [[r.summary["agent"] for r in group.results] for group in groups] == [["a", "a", "b", "e"], ["d"], ["c"]]
    assert "over net with other weights (01234567, not frozen)" in groups[1].reason
    assert "test images others" in groups[2].reason


def test_the_same_run_counts_once_and_names_are_told_apart(tmp_path):
    two_agents(tmp_path / "x")
    made_up_run(tmp_path / "y/a0", made_up_decisions([[1, 1]] * 4), "a", seed=7)
    shutil.copytree(tmp_path / "x/a1", tmp_path / "y/copy")
    found = collect([str(tmp_path / "*/*"), str(tmp_path / "x")])
    assert sorted(result.name for result in found.results) == ["a1", "b0", "x/a0", "y/a0"]
    assert "they are called x/a0, y/a0" in " ".join(found.warnings)
    ((folder, reason),) = found.left_out
    assert folder.name == "copy" and "the configuration and the seed of a1" in reason


def test_versions_and_missing_decisions_are_warned_of(tmp_path):
    two_agents(tmp_path)
    made_up_run(tmp_path / "old", made_up_decisions([[1, 0]] * 4), "old", summary={"version": "0.0.9"}, recorded=False)
    found = collect([str(tmp_path)])
    warnings = " ".join(found.warnings)
    assert "different versions" in warnings and "0.0.9 (1 run)" in warnings
    assert "1 of 4 runs have no decisions.safetensors (old)" in warnings
    decided = collect([str(tmp_path)], lambda run: made_up_decisions([[1, 0]] * 4))
    assert all(result.decisions is not None for result in decided.results)


def test_runs_without_decisions_are_compared_by_their_summaries(tmp_path):
    for seed in range(2):
        folder = tmp_path / f"runs/{seed}"
        made_up_run(folder, drawn(seed), seed=seed, recorded=False)
        made_up_run(tmp_path / f"runs/m{seed}", drawn(seed, kind="exits"), "msdnet", seed=seed, recorded=False)
    made = compare([str(tmp_path / "runs")], tmp_path / "out")
    assert len(made.sections) == 1 and not (tmp_path / "out/differences.csv").read_text().strip()
    assert (tmp_path / "out/index.html").is_file()


def test_what_is_printed_and_the_markdown_lead_with_the_verdict_of_each_row(workshop):
    first = "blockdrop: pays (+2.00 points, +1.00 to +3.00, 3 seeds, against 2 evenly spread blocks)"
    last = "msdnet, ppo learning_rate=0.02 and ppo learning_rate=0.01: not shown: judged by an older version"
    printed = (workshop / "stdout.txt").read_text()
    assert printed.startswith(
        "Of 4 rows that learned, deciding per image pays for 1 and is not shown to pay, or not to"
    )
    assert f"\n  {first}\n  {last}" in printed and printed.index("\nMargins are") < printed.index("Runs on digits")
    text = (workshop / "out/comparison.md").read_text()
    last = last.replace("_", "\\_")
    places = [
        text.index(part) for part in ("Of 4 rows that", f"- {first}\n- {last}", "Most accurate", "| row | seeds |")
    ]
    assert places == sorted(places)
    (line,) = (line for line in lines(workshop / "out/runs.csv") if line["run"] == "blockdrop-1")
    assert (line["verdict"], line["rival"], line["rival_low"]) == ("pays", "2 evenly spread blocks", "0.01")


def test_of_many_verdicts_the_first_are_printed(monkeypatch):
    monkeypatch.setattr("policyskip.comparison.compare.MOST_ANSWERS", 3)
    answers = [Answer(SimpleNamespace(label=f"a{n}"), NOT_SHOWN, "one seed") for n in range(5)]
    _, *printed = _said(SimpleNamespace(answers=answers, sentences=["More."]))
    assert [line.strip() for line in printed] == [
        *("a0: not shown: one seed", "a1: not shown: one seed", "and 3 more rows, in comparison.md and index.html"),
        "More.",
    ]
    assert _said(SimpleNamespace(answers=[], sentences=["More."])) == ["More."]


def test_what_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    two_agents(tmp_path / "runs")
    (tmp_path / "nothing").mkdir()
    shutil.copytree("runs", "damaged")
    (tmp_path / "damaged/a0/summary.json").write_text('{"agent": ')
    shutil.copytree("runs", "lacking")
    (tmp_path / "lacking/a0/summary.json").write_text('{"agent": "a"}')
    shutil.copytree("runs", "torn")
    (tmp_path / "torn/a0/decisions.safetensors").write_bytes(b"\x00" * 40)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    (tmp_path / "others").mkdir()
    (tmp_path / "others/comparison.json").write_text('{"theirs": 1}')
    (tmp_path / "file").write_text("")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    for arguments, message in (
        (["runs=nowhere"], "no run folder matches nowhere"),
        (["runs=nothing"], "no finished run in runs=nothing"),
        (["runs=damaged/a0"], "damaged/a0/summary.json is damaged or not ours"),
        (["runs=lacking/a0"], "lacking/a0/summary.json is damaged or not ours: it has no env"),
        (["runs=torn/a0"], "torn/a0/decisions.safetensors is damaged or not ours"),
        (["runs=runs", "output=others", "overwrite=true"], "others holds no comparison, so it is not overwritten"),
        (["runs=runs", "output=mine"], "mine is there already; say overwrite=true"),
        (["runs=runs", "output=mine", "overwrite=true"], "mine holds no comparison, so it is not overwritten"),
        (["runs=runs", "output=file/out"], "output cannot be below file"),
        (["runs=3"], "runs"),
        ([], "runs is not set"),
    ):
        output = [] if any(a.startswith("output") for a in arguments) else ["output=out"]
        result = typed("compare", *arguments, *output, "tracking=none", cwd=tmp_path)
        assert result.returncode == 2, arguments
        errors = [line for line in result.stderr.splitlines() if line.strip()]
        assert len(errors) in (1, 2) and message in errors[0], (arguments, errors)
        assert sorted(str(path) for path in tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    two_agents(tmp_path / "runs")
    (tmp_path / "locked").mkdir(mode=0o500)
    result = typed("compare", "runs=runs", "output=locked/out", "tracking=none", cwd=tmp_path)
    assert result.returncode == 2 and "cannot write locked/out" in result.stderr


def test_a_comparison_is_overwritten_when_asked_and_whole_when_interrupted(tmp_path, monkeypatch):
    runs = two_agents(tmp_path / "runs")
    compare([str(runs)], tmp_path / "out")
    with pytest.raises(UserError, match="overwrite=true"):
        compare([str(runs)], tmp_path / "out")
    (tmp_path / "out/plots/stale.png").write_text("")
    compare([str(runs / "a*")], tmp_path / "out", overwrite=True)
    assert len(lines(tmp_path / "out/comparison.csv")) == 1 and not (tmp_path / "out/plots/stale.png").exists()
    before = (tmp_path / "out/index.html").read_bytes()

    def fail(*_args: object) -> str:
        raise KeyboardInterrupt

    for target in ("policyskip.comparison.compare.page", "policyskip.comparison.folder._switch"):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(target, fail)
            compare([str(runs)], tmp_path / "out", overwrite=True)
    assert (tmp_path / "out/index.html").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "runs"]


def test_a_link_to_a_folder_stays_one(tmp_path):
    two_agents(tmp_path / "runs")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    compare([str(tmp_path / "runs")], tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real/index.html").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real", "runs"]


DAMAGE = {
    "another shape": {"full_correct_N": torch.tensor([True])},
    "classes that there are not": {"prediction_N": torch.tensor([0, 70])},
    "no bool": {"ran_NK": torch.tensor([[1, 0], [1, 1]])},
    "costs without end": {"macs_N": torch.tensor([1.0, torch.inf], dtype=torch.float64)},
    "costs below nothing": {"macs_N": torch.tensor([1.0, -1.0], dtype=torch.float64)},
    "accuracies above one": {"static_F2": torch.tensor([[1.0, 1.5]], dtype=torch.float64)},
    "an image that left nowhere": {"kind": "exits", "ran_NK": torch.tensor([[False, False], [True, True]])},
    "an image that left and went on": {"kind": "exits", "ran_NK": torch.tensor([[True, True], [False, True]])},
    "a network that costs nothing": {"full_macs": 0.0},
    "images of no name": {"images": 3},
    "a class of no name": {"classes": ("0", 1)},
    "a class of 10^5 letters": {"classes": ("0", "1" * 10**5)},
    "no kind": {"kind": "both"},
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_decisions_are_refused_by_name(damage, tmp_path):
    made_up_run(tmp_path / "a", made_up_decisions([[1, 0], [1, 1]]), "a")
    damaged = dataclasses.replace(made_up_decisions([[1, 0], [1, 1]]), **damage)
    decisions.save_decisions(damaged, Run(tmp_path / "a"))
    with pytest.raises(UserError, match=r"a/decisions\.safetensors is damaged or not ours: "):
        collect([str(tmp_path)])


@pytest.mark.parametrize(
    ("key", "value"),
    [("seed", float("nan")), ("agent", ["x"]), ("test/accuracy", float("inf")), ("test/kept_mean", "many"),
     ("test/macs_mean", 10**400), ("warnings", 5), ("latency_device", ["x"]), ("agent", "x" * 10**5)],
)  # fmt: skip
def test_damaged_summaries_are_refused_by_name(key, value, tmp_path):
    made_up_run(tmp_path / "a", made_up_decisions([[1, 0]]), "a", summary={key: value})
    with pytest.raises(UserError, match=rf"a/summary\.json is damaged or not ours: {key}.* is"):
        collect([str(tmp_path)])


def test_a_run_that_cannot_be_used_is_left_out_with_the_reason(tmp_path):
    """One of a summary that is damaged, one of decisions of another policy, one of other labels; the others go on."""
    two_agents(tmp_path)
    made_up_run(tmp_path / "damaged", made_up_decisions([[1, 0]] * 4), "c", summary={"seed": "none"})
    made_up_run(tmp_path / "other", made_up_decisions([[1, 0]] * 4), "d", summary={"test/accuracy": 0.123})
    made_up_run(tmp_path / "short", made_up_decisions([[1, 0]] * 3), "e")
    found = collect([str(tmp_path)])
    assert sorted({result.summary["agent"] for result in found.results}) == ["a", "b"]
    reasons = {folder.name: reason for folder, reason in found.left_out}
    assert reasons["damaged"].startswith("cannot be used: summary.json is damaged or not ours: seed is 'none'")
    assert "is of other decisions than summary.json" in reasons["other"]
    assert "whose labels are not those of the other runs" in reasons["short"]


def test_warnings_that_many_runs_have_are_one(tmp_path):
    for n in range(6):
        summary = {"warnings": [f"the policy has collapsed: it decides {n}"]}
        made_up_run(tmp_path / f"a{n}", made_up_decisions([[1, 0]]), "a", n, summary=summary)
    assert collect([str(tmp_path)]).warnings == ["6 runs: the policy has collapsed (a0, a1, a2, a3, …)"]


def test_warnings_of_runs_are_passed_on(tmp_path):
    for n, key in enumerate(("test/static_search_finished", "test/rival_finished")):
        summary = {"warnings": ["the policy has collapsed"], key: False}
        made_up_run(tmp_path / f"a{n}", made_up_decisions([[1, 0]]), "a", n, summary=summary)
    collapsed, unfinished = collect([str(tmp_path)]).warnings
    assert collapsed == "2 runs: the policy has collapsed (a0, a1)"
    assert unfinished == "2 runs: the search for its fixed choices ran out of front.budget (a0, a1)"


def test_images_that_the_runs_did_not_see_are_not_shown(tmp_path):
    two_agents(tmp_path / "runs")
    result = typed("compare", "runs=runs", "output=out", "tracking=none", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "are not those that the runs saw" in (tmp_path / "out/index.html").read_text()


def test_no_two_rows_look_alike_however_many_agents():
    """There are ten colours: the eleventh agent has the colour of the first one, and another marker."""
    rows = [SimpleNamespace(agent=f"agent{n // 2}", label=f"row {n}") for n in range(40)]
    found = styles(rows)
    assert len(found) == 40 == len({(style.colour, style.marker) for style in found.values()})
    assert found["row 0"].colour == found["row 1"].colour == found["row 20"].colour != found["row 2"].colour
