"""The static front is searched once and remembered."""

from __future__ import annotations

import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from policyskip.backbones import count_costs, load
from policyskip.build import Setup
from policyskip.config import FrontSection
from policyskip.data import Data, TensorImages, digits
from policyskip.envs.block_selection import BlockSelectionVectorEnv
from policyskip.errors import UserError
from policyskip.runs.folder import Run
from policyskip.runs.progress import Wait
from policyskip.static_front import SetScorer, StaticFront, find_front, known_front, least_budget
from policyskip.tasks import fronts as report
from policyskip.tasks.fronts import load_front, static_front
from tests.conftest import small_backbone, small_images

FRONT_BUDGET = 1.2e7  # what `train` and `front` ask for unless they are told otherwise


def test_the_shipped_front_is_that_of_the_shipped_network_on_the_default_validation_images(tmp_path):
    validation = digits(torch.device("cpu"), train=1, test=1).validation
    front = known_front(load("resnet32_digits"), validation, tmp_path)
    assert front is not None and front.finished and {sum(keep) for keep in front.sets} == set(range(16))
    assert front.images == 2000 and front.correct_FN is not None and front.budget >= FRONT_BUDGET
    others = digits(torch.device("cpu"), train=1, validation=1999, test=1).validation
    assert known_front(load("resnet32_digits"), others, tmp_path) is None


SETTINGS = FrontSection(budget=1, images=30)  # a search that runs out of its budget


@pytest.fixture
def searches(monkeypatch, tmp_path) -> list[float]:
    """The budgets of the searches that are made; their cache is empty at first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made: list[float] = []

    def search(*arguments, **options):
        made.append(arguments[3])
        return find_front(*arguments, **options)

    monkeypatch.setattr(report, "find_front", search)
    return made


def small_setup(seed: int = 0) -> Setup:
    data = Data("small", *(small_images(seed=n) for n in range(3)), classes=tuple("abcde"), image_shape=(3, 12, 12))
    return Setup({}, torch.device("cpu"), data, small_backbone(seed=seed), None, 20)


def test_a_search_is_made_once_for_each_network_and_settings(searches):
    first = static_front(small_setup(), SETTINGS)
    assert not first.finished and static_front(small_setup(), SETTINGS) == first and searches == [1]
    more = SETTINGS.model_copy(update={"budget": 1e9})
    whole = static_front(small_setup(), more)
    assert whole.finished and searches == [1, 1e9]
    assert static_front(small_setup(), SETTINGS) == static_front(small_setup(), more) == whole and len(searches) == 2
    static_front(small_setup(seed=1), SETTINGS)
    static_front(small_setup(), more.model_copy(update={"images": 40}))
    assert len(searches) == 4


def test_a_search_that_starts_from_a_policy_s_sets_is_found_by_those_sets_alone(searches):
    own = [(True, False, True, False, False, True)]
    with_own = static_front(small_setup(), SETTINGS, own)
    assert own[0] in with_own.sets and static_front(small_setup(), SETTINGS, own) == with_own and searches == [1]
    assert own[0] not in static_front(small_setup(), SETTINGS).sets and searches == [1, 1]


def test_an_interrupted_search_goes_on_where_it_was(searches, monkeypatch, tmp_path):
    class Interrupted(BaseException):
        pass

    settings = FrontSection(budget=1700, images=30)
    whole = static_front(small_setup(), settings)
    shutil.rmtree(tmp_path / "cache")
    score, passes = SetScorer.score, []

    def interrupted(scorer, sets, images=None):
        passes.append(scorer.spent)
        if len(passes) == 8:
            raise Interrupted
        score(scorer, sets, images)

    with monkeypatch.context() as patch:
        patch.setattr(SetScorer, "score", interrupted)
        with pytest.raises(Interrupted):
            static_front(small_setup(), settings)
    assert [
        path.suffix for path in (tmp_path / "cache/policyskip/static-fronts-2").iterdir() if path.suffix != ".lock"
    ] == [".scores"]
    assert static_front(small_setup(), settings) == whole


def test_of_two_runs_at_once_one_searches_and_the_other_waits_for_it(searches, monkeypatch):
    """Each has a file descriptor of its own, so that the lock holds between threads as between processes."""
    begun, go_on = threading.Event(), threading.Event()
    search = report.find_front

    def slow(*arguments, **options):
        begun.set()
        assert go_on.wait(20)
        return search(*arguments, **options)

    monkeypatch.setattr(report, "find_front", slow)
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(static_front, small_setup(), SETTINGS)
        assert begun.wait(20)
        other = pool.submit(static_front, small_setup(), SETTINGS)
        go_on.set()
        assert one.result() == other.result() and searches == [1]


@pytest.mark.parametrize("obstacle", ["a file", "a pipe", "damaged"])
def test_a_cache_that_cannot_be_used_costs_time_and_nothing_else(obstacle, searches, tmp_path):
    cache = tmp_path / "cache/policyskip/static-fronts-2"
    static_front(small_setup(), SETTINGS)
    (file,) = cache.glob("*.json")
    if obstacle == "a file":
        shutil.rmtree(cache)
        cache.write_text("")
    elif obstacle == "a pipe":
        file.unlink()
        os.mkfifo(file)
    else:
        file.write_text("{")
    assert static_front(small_setup(), SETTINGS) == static_front(small_setup(), SETTINGS)
    assert len(searches) == (2 if obstacle == "damaged" else 3)  # what is damaged is written anew; a pipe is left alone


def test_a_front_of_other_weights_is_refused_by_name(tmp_path):
    setup = small_setup()
    front = find_front(setup.backbone, setup.data.validation, count_costs(setup.backbone, (3, 12, 12)), 1, 30)
    front.save(tmp_path / "front.json")
    assert load_front(Run(tmp_path), 6, setup.backbone.content_hash()) == front
    other = small_backbone(seed=1).content_hash()
    with pytest.raises(UserError, match=f"front.json is of a network of other weights .* than the run's .{other}"):
        load_front(Run(tmp_path), 6, other)


def test_the_time_left_is_that_of_what_will_be_done(searches, monkeypatch):
    waits = []
    monkeypatch.setattr(
        report, "waiting", lambda what, *more: nullcontext(waits.append(Wait(what, *more)) or waits[-1])
    )
    static_front(small_setup(), FrontSection(budget=1e12, images=30))
    (wait,) = (wait for wait in waits if "searching" in wait.what)
    assert wait.total == 30 * (2**6 - 1) <= wait.done <= 2 * wait.total


@pytest.mark.parametrize(("K", "expected"), [(15, FRONT_BUDGET), (54, FRONT_BUDGET), (100, least_budget(100, 2000))])
def test_without_a_budget_a_search_has_one_for_its_whole_plan(K, expected, monkeypatch):
    """What the plan takes is tested in test_static_front.py."""
    data = replace(small_setup().data, validation=small_images(2000))
    setup = replace(small_setup(), data=data, backbone=SimpleNamespace(num_blocks=K))
    budgets = []
    monkeypatch.setattr(report, "known_front", lambda *arguments: budgets.append(arguments[4]))
    for budget in (None, 5):
        report.remembered_front(setup, FrontSection(budget=budget, images=2000))
    assert budgets == [expected, 5]


def test_the_best_set_is_sought_over_all_classes():
    """Images sorted by class, as folders are: dropping all blocks is right about the first class only."""
    label_N = torch.arange(5).repeat_interleave(200)
    images = TensorImages(torch.zeros(1000, 3, 12, 12, dtype=torch.uint8), label_N)

    def reward(outcome):
        return (outcome.keep_BK.all(1) | (outcome.label_B == 0)).float() - 0.1 * outcome.keep_BK.float().mean(1)

    def env(images, order="sequential", seed=0):
        return BlockSelectionVectorEnv(
            100, backbone=small_backbone(), images=images, reward=reward, order=order, seed=seed
        )

    setup = SimpleNamespace(env=env, reward=None, data=SimpleNamespace(validation=images))
    correct_FN = torch.arange(10) < torch.tensor([[2], [10]])
    front = StaticFront([(False,) * 6, (True,) * 6], ["spread"] * 2, correct_FN, [1.0, 2.0], 10, True, 1, 2, "", "")
    assert report.best_set(setup, front, count=200) == (True,) * 6
