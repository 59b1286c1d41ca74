"""Pictures of one run: their names, and that what is printed in them is right however the classes are called."""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from policyskip.comparison import series
from policyskip.data import TensorImages
from policyskip.evaluation import block_plots, exit_plots, learning_plots, plots
from policyskip.evaluation.decisions import Decisions
from policyskip.evaluation.evaluate import exit_decisions
from policyskip.exits.cache import CachedExits
from policyskip.exits.references import static_pairs
from tests.exits.test_references import answers
from tests.made_up import made_up_decisions

ALIKE = ("aaaaaaaaaaaaaaa1", "aaaaaaaaaaaaaaa2")
LABELS, ANSWERS = [0, 0, 1, 1], [0, 1, 1, 0]


def images() -> TensorImages:
    return TensorImages(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor(LABELS))


def blocks() -> Decisions:
    made_up = made_up_decisions([[1, 0], [1, 1], [0, 0], [1, 0]], ANSWERS, LABELS)
    return dataclasses.replace(made_up, classes=ALIKE)


def exits() -> tuple[Decisions, CachedExits]:
    """Exits 0, 1, 2 and 0 that give the same answers to the same labels."""
    right_MN = (torch.tensor(LABELS) == torch.tensor(ANSWERS)).unsqueeze(1).expand(4, 3)
    zeros = answers(right_MN)
    flip_M11 = torch.tensor(LABELS).view(4, 1, 1).bool()
    logits_MNC = torch.where(flip_M11, zeros.logits_MNC.flip(2), zeros.logits_MNC)
    cache = CachedExits(logits_MNC, torch.tensor(LABELS), zeros.costs)
    decisions = exit_decisions(torch.tensor([0, 1, 2, 0]), cache)
    static_F2 = torch.tensor(static_pairs(cache), dtype=torch.float64)
    return dataclasses.replace(decisions, static_F2=static_F2, classes=ALIKE), cache


@pytest.mark.parametrize("kind", ["blocks", "exits"])
def test_a_wrong_answer_is_red_however_alike_the_names_of_two_classes_begin(kind, monkeypatch, tmp_path):
    """Of four images the second and the last are wrong; the title keeps the ends of names that begin alike."""
    titles: list[tuple[str, str]] = []
    monkeypatch.setattr(plots, "draw_image", lambda axes, image, title, colour: titles.append((title, colour)))
    if kind == "blocks":
        block_plots.block_gallery(blocks(), images(), tmp_path / "gallery.png")
        word = "not"
    else:
        exit_plots.exit_gallery(*exits(), images(), tmp_path / "gallery.png")
        word = "answer"
    right = [("aaaaaaaaaaa…", plots.FULL)] * 2
    wrong = [f"…aaaaaaaaaa1\n{word} …aaaaaaaaaa2", f"…aaaaaaaaaa2\n{word} …aaaaaaaaaa1"]
    assert sorted(titles) == sorted([*right, *((title, plots.WRONG) for title in wrong)])


def test_titles_have_names_that_fit_whole():
    decisions = dataclasses.replace(blocks(), classes=("automobile", "a long class name"))
    titles = [plots.title_of(decisions, n, "not") for n in range(4)]
    assert titles == [
        ("automobile", plots.FULL),
        ("automobile\nnot a long clas…", plots.WRONG),
        ("a long clas…", plots.FULL),
        ("a long clas…\nnot automobile", plots.WRONG),
    ]


METRICS = [{"step": n, "train/reward": 0.1 * n, "val/accuracy": 0.5, "train/loss": 1.0 / n} for n in (1, 2)]


@pytest.mark.parametrize("metrics", [METRICS, []], ids=["records", "no records"])
@pytest.mark.parametrize("difficulty", [torch.tensor([0.1, 0.5, 0.2, 0.9]), None], ids=["difficulty", "none"])
def test_every_run_has_its_pictures(metrics, difficulty, tmp_path):
    learning = ["learning_curves"] if metrics else []
    names = [*learning, "accuracy_against_macs", "block_use", "block_use_by_class", "gallery"]
    names += [] if difficulty is None else ["kept_by_difficulty"]
    decisions = dataclasses.replace(blocks(), difficulty_N=difficulty)
    paths = block_plots.block_pictures(tmp_path / "blocks", metrics, decisions, images(), (1, 1))
    assert [path.name for path in paths] == [f"{name}.png" for name in names] and all(p.is_file() for p in paths)

    names = [*learning, "accuracy_against_macs", "exit_use", "gallery"]
    names += [] if difficulty is None else ["exit_by_difficulty"]
    decisions, cache = exits()
    decisions = dataclasses.replace(decisions, difficulty_N=difficulty)
    for budgeted in ([[3.0, 0.5], [9.0, 0.5]], []):
        folder = tmp_path / f"exits{len(budgeted)}"
        paths = exit_plots.exit_pictures(folder, metrics, decisions, cache, budgeted, images())
        assert [path.name for path in paths] == [f"{name}.png" for name in names] and all(p.is_file() for p in paths)


def test_groups_go_from_easy_to_hard_and_none_is_empty():
    difficulty_N = torch.tensor([0.3, 0.1, 0.2, 0.5, 0.4])
    assert [group.tolist() for group in plots.groups_by_difficulty(difficulty_N, 2)] == [[1, 2, 0], [4, 3]]
    assert [group.tolist() for group in plots.groups_by_difficulty(difficulty_N)] == [[1], [2], [0], [4], [3]]


@pytest.mark.parametrize("keep", [[[1, 0]] * 80, [[1, 0]] * 10 + [[1, 1]] * 60 + [[0, 0]] * 10])
def test_ties_are_drawn_at_random_and_not_in_the_order_of_the_files(keep, monkeypatch, tmp_path):
    """In a sorted set of which all images get as many blocks, a gallery has several classes in each line."""
    label = [n // 20 for n in range(80)]
    titles: list[str] = []
    captions: list[str] = []
    monkeypatch.setattr(plots, "draw_image", lambda axes, image, title, colour: titles.append(title))
    monkeypatch.setattr(plots, "save", lambda figure, caption, path: captions.append(caption))
    shown = TensorImages(torch.zeros(80, 3, 8, 8, dtype=torch.uint8), torch.tensor(label))
    block_plots.block_gallery(made_up_decisions(keep, label, label), shown, tmp_path / "gallery.png")
    alike = keep == [[1, 0]] * 80
    assert len(set(titles[8:])) > 1 and (not alike or len(set(titles[:8])) > 1)
    assert captions[0].startswith("All test images got 1 of 2 blocks" if alike else "Test images that got the fewest")


def test_examples_of_a_comparison_are_drawn_among_ties():
    decisions = made_up_decisions([[1, 0]] * 80, [0] * 80, [n // 20 for n in range(80)])
    result = SimpleNamespace(decisions=decisions)
    least, most, _ = series.gallery(result, range(80))
    assert all(len({item["label"] for item in part["items"]}) > 1 for part in (least, most))


def drawn_axes(monkeypatch, draw) -> tuple[Any, str]:
    """The first axes of a picture and its caption."""
    kept: list[tuple[Any, str]] = []
    for module in (block_plots, exit_plots, learning_plots):
        monkeypatch.setattr(module, "save", lambda figure, caption, path: kept.append((figure, caption)))
    draw()
    ((figure, caption),) = kept
    return figure.axes[0], caption


@pytest.mark.parametrize("accuracy", [0.02, 0.5, 0.97])
def test_the_picture_shows_the_rival_of_the_table_and_all_points_are_on_it(accuracy, monkeypatch, tmp_path):
    front_F2 = torch.tensor([[0.0, 0.1], [2.0, 0.9], [1.0, 0.98]], dtype=torch.float64)
    decisions = dataclasses.replace(blocks(), static_F2=front_F2)
    figures = {"rival": "33 blocks", "rival_accuracy": accuracy, "rival_macs": 1.0}
    draw = lambda: block_plots.accuracy_against_macs(decisions, tmp_path / "x.png", figures)  # noqa: E731
    axes, _ = drawn_axes(monkeypatch, draw)
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["fixed choices, and two mixed"].get_xydata().tolist() == [[0.0, 0.1], [0.5, 0.98], [1.0, 0.9]]
    assert lines["rival: 33 blocks"].get_xydata().tolist() == [[0.5, accuracy]]
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    for label in ("rival: 33 blocks", "full network", "policy, its own cost included"):
        ((x, y),) = lines[label].get_xydata()
        assert left <= x <= right and low <= y <= high, label


REWARDS = [0.1, 0.5, 0.3, 0.2]


NOISE = (0.02, -0.03, 0.01, 0.04, -0.04, 0.03, -0.02, -0.01)


def noisy(before: float, after: float) -> list[float]:
    """Eight training rewards up to update 20, the best on validation, and eight after it."""
    return [level + noise for level in (before, after) for noise in NOISE]


@pytest.mark.parametrize(
    ("train", "reason"),
    [
        ({"price": [1] * 8 + [2] * 8}, "the price of computing rose"),
        ({"free_blocks": [1] * 8 + [9] * 8}, "the curriculum let the policy decide about more blocks"),
        ({"reward": noisy(0.3, 0.4)}, "fits those better"),
        ({"reward": noisy(0.4, 0.3)}, "on training images it fell too"),
        ({"reward": noisy(0.367, 0.349)}, "the records do not show why"),
        ({"reward": noisy(0.349, 0.367)}, "the records do not show why"),
        ({"reward": [0.1, 0.4]}, "the records do not show why"),
        ({"price": [1] * 2 + [3] * 6 + [3] * 8}, "the records do not show why"),
        ({}, "the records do not show why"),
    ],
)
def test_learning_curves_mark_the_weights_that_were_kept_and_say_why_reward_fell(train, reason, monkeypatch, tmp_path):
    records = [{"step": 10 * (n + 1), "val/reward": reward, "val/accuracy": 0.5} for n, reward in enumerate(REWARDS)]
    records += [
        {"step": 40 * (n + 1) / len(values), f"train/{key}": v}
        for key, values in train.items()
        for n, v in enumerate(values)
    ]
    for choose_after, kept in ((0.0, 20), (25.0, 30)):
        draw = partial(learning_plots.learning_curves, records, 3, tmp_path / "x.png", choose_after)
        axes, caption = drawn_axes(monkeypatch, draw)
        (mark,) = [line for line in axes.lines if line.get_label() == "weights that were kept"]
        assert mark.get_xdata()[0] == kept and axes.get_xlim()[0] == 0
        assert f"Kept are the weights of update {kept}," in caption and reason in caption
        assert caption.count("reward ends below") == 1 and ("good by luck" in caption) == (choose_after > 0)


def test_a_reward_that_does_not_fall_needs_no_reason():
    assert learning_plots.why_it_falls([{"step": n, "val/reward": 0.1 * n} for n in range(4)]) == ""


@pytest.mark.parametrize(
    "records",
    [[{"step": 1, "train/loss": 0.0}], [{"step": 0, "val/accuracy_exit0": 0.5}], [{"step": 1, "train/loss": -1}]],
)
def test_short_or_odd_records_draw_without_a_warning_of_the_library(records, tmp_path, recwarn):
    exit_plots.learning_curves(records, 2, tmp_path / "x.png")
    assert not list(recwarn)


@pytest.mark.parametrize("values", [(75, 1400), (75, 90), (0.0012, 0.9), (1e-3, 1e4), (7.3, 36.6), (0, 5), ()])
def test_labels_of_a_time_or_loss_axis_stand_apart_however_wide_it_is(values):
    figure = plots.figure_of(5, 3.8)
    axes = figure.subplots()
    axes.plot(values)
    plots.logarithmic_if_wide(axes, values)
    figure.canvas.draw()
    low, high = axes.get_ylim()
    labels = [*axes.yaxis.get_ticklabels(), *axes.yaxis.get_ticklabels(minor=True)]
    boxes = [t.get_window_extent() for t in labels if t.get_text() and low <= t.get_position()[1] <= high]
    assert len(boxes) >= 2
    assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])


def test_every_accuracy_of_a_picture_is_in_percent(monkeypatch, tmp_path):
    """Tables say 50.00 %, so pictures do not say 0.5."""
    drawn: dict[str, Any] = {}
    for module in (block_plots, exit_plots, learning_plots):
        monkeypatch.setattr(module, "save", lambda figure, caption, path: drawn.setdefault(str(path), figure) and path)
    decisions, cache = exits()
    difficulty = torch.tensor([0.1, 0.5, 0.2, 0.9])
    with_difficulty = dataclasses.replace(blocks(), difficulty_N=difficulty)
    block_plots.block_pictures(tmp_path / "blocks", METRICS, with_difficulty, images(), (1, 1))
    exit_plots.exit_pictures(tmp_path / "exits", METRICS, decisions, cache, [[3.0, 0.5], [9.0, 0.5]], images())
    shares = [
        axes
        for figure in drawn.values()
        for axes in figure.axes
        if re.search("accuracy|share of (test )?images", f"{axes.get_ylabel()} {axes.get_title()}")
    ]
    assert len(shares) >= 7
    assert all(axes.yaxis.get_major_formatter()(0.5, 0).endswith(" %") for axes in shares)


def test_a_map_of_classes_names_both_axes_and_every_line_of_the_costs_is_in_the_legend(monkeypatch, tmp_path):
    axes, _ = drawn_axes(monkeypatch, lambda: block_plots.block_use_by_class(blocks(), (1, 1), tmp_path / "x.png"))
    assert axes.get_xlabel() == "block" and axes.get_ylabel() == "class of the image"
    front_F2 = torch.tensor([[0.0, 0.1], [1.0, 0.98]], dtype=torch.float64)
    decisions = dataclasses.replace(blocks(), static_F2=front_F2)
    axes, _ = drawn_axes(monkeypatch, lambda: block_plots.accuracy_against_macs(decisions, tmp_path / "x.png"))
    assert "the best of these, if more is spent" in {line.get_label() for line in axes.lines}
    assert not any(line.get_label().startswith("_") for line in axes.lines)
