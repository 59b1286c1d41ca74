"""Pictures of one run: their names, and that what is printed in them is right however the classes are called."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from policyskip.data import TensorImages
from policyskip.evaluation import block_plots, exit_plots, plots
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
