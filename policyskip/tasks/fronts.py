"""The static front of a run's network is searched or remembered here.

Shapes: N images, S sets, B images side by side, K blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch
from filelock import FileLock
from platformdirs import user_cache_path

from policyskip.backbones import ExitNetwork
from policyskip.build import Setup
from policyskip.config import FrontSection
from policyskip.errors import UserError
from policyskip.execution.exits import check_kernels
from policyskip.files import damaged
from policyskip.fronts import pareto
from policyskip.rewards import Adaptive
from policyskip.runs.folder import Run
from policyskip.runs.progress import waiting
from policyskip.static_front import (
    Keep,
    StaticFront,
    find_front,
    front_file,
    known_front,
    least_budget,
    remember,
)

USUAL_BUDGET = 1.2e7
"""The images × blocks of a search that nobody has given a budget; deep networks take more."""


def static_front(setup: Setup, settings: FrontSection, sets_in_use: Sequence[Keep] = ()) -> StaticFront:
    """Return the static front of a network on its validation images: a known one, or one that is searched now and kept.

    Args:
        setup: names the network and its data.
        settings: how long to search, and on how many images.
        sets_in_use: keep-sets that a policy uses, from which a search that is made now starts, too. Another policy's
            rivals never come of them.

    Raises:
        UserError: the network has exits, which are no blocks.
    """
    if isinstance(setup.backbone, ExitNetwork):
        raise UserError(
            "fixed sets are searched over blocks, and this network has exits; name one without by backbone="
        )
    check_kernels(setup.backbone, setup.data.image_shape, setup.how)  # also where a search need not be made
    hints = dict.fromkeys(sets_in_use, "policy")
    if (known := remembered_front(setup, settings)) is None:
        with _alone(setup, settings, hints):
            known = remembered_front(setup, settings, hints)  # another process may have searched it
            if known is None:
                known = _searched(with_block_selection(setup), settings, hints)
    return known


def _searched(setup: Setup, settings: FrontSection, hints: Mapping[Keep, str]) -> StaticFront:
    """Search the static front of a network, as :func:`static_front` says, and remember it."""
    backbone, images = setup.backbone, setup.data.validation
    count = min(settings.images, len(images))
    costs = setup.env(images).costs
    precision = setup.how.precision
    file = front_file(backbone.content_hash(), images.fingerprint(), count, _cache(), hints, precision)
    scores = file.with_suffix(".scores")
    with waiting("searching the best fixed keep-sets on validation images") as wait:
        chain = (backbone, images, costs, _budget(setup, settings), count, hints)
        front = find_front(*chain, wait.reach, settings.seconds, scores, wait.expect, setup.how)
    with suppress(UserError):  # a cache that cannot be written costs time, nothing else
        remember(front, _cache(), hints, precision)
        if hints or front.budget == float("inf"):  # no other search will go on from here
            scores.unlink(missing_ok=True)
    return front


def remembered_front(setup: Setup, settings: FrontSection, sets_in_use: Iterable[Keep] = ()) -> StaticFront | None:
    """Return the static front of a network from an earlier search; None if none was as thorough as ``settings`` ask."""
    images = setup.data.validation
    at_least = min(settings.images, len(images))
    budget, precision = _budget(setup, settings), setup.how.precision
    return known_front(setup.backbone, images, _cache(), at_least, budget, sets_in_use, precision)


def _budget(setup: Setup, settings: FrontSection) -> float:
    """Return the budget of a search: that of the settings, or else one that suffices for the whole plan at least."""
    if settings.budget is not None:
        return settings.budget
    count = min(settings.images, len(setup.data.validation))
    return max(USUAL_BUDGET, least_budget(setup.backbone.num_blocks, count))


@contextmanager
def _alone(setup: Setup, settings: FrontSection, hints: Iterable[Keep]) -> Iterator[None]:
    """Let runs that search the same do so one after the other, so that all but the first find what it has found."""
    searched_on = (setup.backbone.content_hash(), setup.data.validation.fingerprint())
    file = front_file(*searched_on, settings.images, _cache(), hints, setup.how.precision)
    lock = FileLock(file.with_suffix(".lock"))
    with suppress(OSError, NotImplementedError), waiting("waiting for a process that searches the same fixed sets"):
        _cache().mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _cache() -> Path:
    """Return the folder in which fronts are remembered; a search that changes its results gets another folder."""
    return user_cache_path("policyskip") / "static-fronts-2"


def with_block_selection(setup: Setup) -> Setup:
    """Return a setup with ``BlockSelection-v0`` as its environment, in which fixed keep-sets are searched."""
    env = {"_target_": "policyskip.envs.block_selection.BlockSelectionVectorEnv"}
    return replace(setup, config={**setup.config, "env": env})


def best_set(setup: Setup, front: StaticFront, count: int = 2000) -> Keep:
    """Return the set of the front that earns the highest reward on validation images, at most ``count`` of them.

    Sets than which another one costs no more and is more accurate are left out. Under a reward that moves, it is the
    set with the highest selection score by the front's own figures.
    """
    env = setup.env(setup.data.validation, "shuffled")  # folders are sorted by class
    if isinstance(setup.reward, Adaptive):
        figures = ({"accuracy": a, "macs_fraction": m / env.costs.full} for a, m in zip(front.accuracy, front.macs))
        return max(zip(map(setup.reward.selection_score, figures), front.sets, strict=True))[1]
    sets = [front.sets[i] for i in pareto(front.macs, front.accuracy)]
    keep_SK = torch.tensor(sets)
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
    return sets[int(total_S.argmax())]


def load_front(run: Run, num_blocks: int, network_hash: str) -> StaticFront:
    """Read the static front that a run was judged beside, over a network of ``num_blocks`` blocks and of this hash.

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
    if front.backbone != network_hash:
        raise UserError(f"{path} is of a network of other weights ({front.backbone}) than the run's ({network_hash})")
    return front
