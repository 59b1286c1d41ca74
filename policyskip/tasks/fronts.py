"""The static front of a run's network is searched or remembered here, and compared with what a policy does.

Shapes: N images, S sets, B images side by side, K blocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from platformdirs import user_cache_path
from torch import Tensor

from policyskip.agents.blockdrop import BlockDrop
from policyskip.build import Setup
from policyskip.config import FrontSection
from policyskip.errors import UserError
from policyskip.evaluation.decisions import Decisions
from policyskip.files import damaged
from policyskip.intervals import half_interval
from policyskip.memory import release_freed_memory
from policyskip.rewards import Adaptive, Utilization
from policyskip.runs.folder import Run
from policyskip.runs.progress import waiting
from policyskip.static_front import (
    Keep,
    SetScorer,
    StaticFront,
    find_front,
    keep_text,
    known_front,
    remember,
    tries_every_set,
)


def static_front(setup: Setup, settings: FrontSection, sets_in_use: Sequence[Keep] = ()) -> StaticFront:
    """Return the static front of a network on its validation images: a known one, or one that is searched now and kept.

    An image-independent learner (BlockDrop with a constant policy, trained on the validation images themselves, under a
    low and a high penalty) joins the search for ``learner_steps`` updates, unless every set can be tried.

    Args:
        setup: names the network and its data.
        settings: how long to search, and on how many images.
        sets_in_use: keep-sets of a policy that trained the network itself, which is at its best with those; they join
            the search.
    """
    if (known := remembered_front(setup, settings, sets_in_use)) is not None:
        return known
    with _alone(setup, _search_key(settings, sets_in_use)):
        if (known := remembered_front(setup, settings, sets_in_use)) is not None:  # another process has searched it
            return known
        front = _searched(with_block_selection(setup), settings, sets_in_use)
        with suppress(UserError):  # a cache that cannot be written costs time, nothing else
            remember(front, _cache(), _search_key(settings, sets_in_use))
    return front


def _searched(setup: Setup, settings: FrontSection, sets_in_use: Sequence[Keep]) -> StaticFront:
    """Search the static front of a network, as :func:`static_front` says."""
    backbone, images = setup.backbone, setup.data.validation
    env = setup.env(images)
    count = min(settings.images, len(images))
    whole = tries_every_set(backbone.num_blocks, count, settings.budget)
    penalties = (1.0, 5.0) if settings.learner_steps and not whole else ()
    hints = [*sets_in_use, *(_learned_set(setup, penalty, settings.learner_steps // 2) for penalty in penalties)]
    most = count * (2**backbone.num_blocks - 1) if whole else settings.budget
    with waiting("searching the best fixed keep-sets on validation images", most, at_most=not whole) as wait:
        return find_front(backbone, images, env.costs, settings.budget, settings.images, hints, wait.reach)


def remembered_front(setup: Setup, settings: FrontSection, sets_in_use: Sequence[Keep] = ()) -> StaticFront | None:
    """Return the static front of a network from an earlier search; None if none was as thorough as ``settings`` ask."""
    images = setup.data.validation
    at_least = min(settings.images, len(images))
    return known_front(setup.backbone, images, _cache(), at_least, _search_key(settings, sets_in_use))


def known_good_sets(setup: Setup) -> list[Keep]:
    """Return the sets on the hull of a network's static front, if there is one from an earlier search; else none."""
    front = known_front(setup.backbone, setup.data.validation, _cache())
    return [] if front is None else [front.sets[index] for index in front.hull]


def _search_key(settings: FrontSection, sets_in_use: Sequence[Keep]) -> str:
    """Return a text that is the same for two searches over one network and data exactly if they do the same."""
    chosen = (settings.images, settings.budget, settings.learner_steps, sorted(map(keep_text, sets_in_use)))
    return hashlib.sha256(repr(chosen).encode()).hexdigest()[:16]


@contextmanager
def _alone(setup: Setup, search_key: str) -> Iterator[None]:
    """Let runs that search the same do so one after the other, so that all but the first find what it has found."""
    name = f"{setup.backbone.content_hash()}-{setup.data.validation.fingerprint()}-{search_key}"
    lock = FileLock(_cache() / f"{name}.lock")
    with suppress(OSError, NotImplementedError), waiting("waiting for a process that searches the same fixed sets"):
        _cache().mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _cache() -> Path:
    """Return the folder in which fronts are remembered; a search that changes its results gets another folder."""
    return user_cache_path("policyskip") / "fronts"


def with_block_selection(setup: Setup) -> Setup:
    """Return a setup with ``BlockSelection-v0`` as its environment, in which fixed keep-sets are searched."""
    env = {"_target_": "policyskip.envs.block_selection.BlockSelectionVectorEnv"}
    return replace(setup, config={**setup.config, "env": env})


def best_set(setup: Setup, front: StaticFront, count: int = 2000) -> Keep:
    """Return the set of the front that earns the highest reward on validation images, at most ``count`` of them.

    Under a reward that moves, it is the set with the highest selection score by the front's own figures.
    """
    env = setup.env(setup.data.validation, "shuffled")  # folders are sorted by class
    if isinstance(setup.reward, Adaptive):
        figures = ({"accuracy": a, "macs_fraction": m / env.costs.full} for a, m in zip(front.accuracy, front.macs))
        return max(zip(map(setup.reward.selection_score, figures), front.sets, strict=True))[1]
    keep_SK = torch.tensor(front.sets)
    total_S, seen = torch.zeros(len(keep_SK), dtype=torch.float64), 0
    count = min(count, len(setup.data.validation))
    with waiting("computing the reward of the best fixed keep-sets", count) as wait:
        while seen < count:
            B = len(env.observation)
            outcome = env.score(keep_SK.unsqueeze(1).expand(-1, B, -1).to(env.device))
            total_S += env.rewards(outcome).view(len(keep_SK), B).double().sum(1).cpu()
            seen += B
            wait.reach(seen)
            env.advance()
    return front.sets[int(total_S.argmax())]


def _learned_set(setup: Setup, penalty: float, steps: int) -> Keep:
    """Return the keep-set that BlockDrop's learner ends with when it cannot see the image."""
    env = setup.env(setup.data.validation, "shuffled")
    env.reward = Utilization(penalty)
    options: dict[str, Any] = dict(lr=0.05, schedule="onecycle", alpha_end=0.98, samples=3, beta=0.01, curriculum=0)
    agent = BlockDrop(env, max(1, steps), policy="constant", initial_keep=0.9, **options)
    with waiting("learning a fixed keep-set, for the search", steps) as wait:
        for _ in range(max(1, steps)):
            agent.update(env)
            wait.advance()
            release_freed_memory()
    return tuple(agent.act(env.observation)[0].tolist())


def static_figures(
    setup: Setup, decisions: Decisions, front: StaticFront, split: str = "test"
) -> tuple[dict[str, Any], list[tuple[float, float]]]:
    """Compare a policy's decisions on a split with the best static choice of their cost.

    Returns: the figures, and MACs and accuracy of every set of the front on the split.
    """
    scorer = SetScorer(setup.backbone, setup.data.split(split).plain())
    with waiting("judging the best fixed keep-sets", scorer.count) as wait:
        scorer.on_batch = wait.advance
        correct = [correct_N.double() for correct_N in scorer.correct(front.sets)]
    mix = front.mix_at(decisions.macs_N.mean().item())
    mixed_N: Tensor = torch.stack([weight * correct[index] for index, weight in mix]).sum(0)
    difference_N = decisions.correct_N.double() - mixed_N
    sets = [front.sets[index] for index, _ in mix]
    figures = {
        "static_accuracy": mixed_N.mean().item(),
        "static_macs": sum(weight * front.macs[index] for index, weight in mix),
        "static_sets": [keep_text(keep) for keep in sets],
        "static_blocks": sum(weight * sum(front.sets[index]) for index, weight in mix),
        "static_margin": difference_N.mean().item(),
        "static_margin_ci95": half_interval(difference_N),
        "static_search_finished": front.finished,
    }
    return figures, [(macs, c.mean().item()) for macs, c in zip(front.macs, correct, strict=True)]


def load_front(run: Run, num_blocks: int) -> StaticFront:
    """Read the static front that a run was judged beside, over a network of ``num_blocks`` blocks.

    Raises:
        UserError: there is none, or it is damaged or of another network.
    """
    path = run.folder / "front.json"
    if not run.has("front.json"):
        raise UserError(f"there is no {path}; the run did not get that far")
    with damaged(path):
        front = StaticFront.load(run.path("front.json"))
        if len(front.sets[0]) != num_blocks:
            raise ValueError(f"its sets are of {len(front.sets[0])} blocks, the network has {num_blocks}")
    return front
