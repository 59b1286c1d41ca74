"""The static front of a run's network is searched or remembered here, and compared with what a policy does.

Shapes: N images, S sets, B images side by side, K blocks.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path
from rich.progress import Progress
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
from policyskip.static_front import Keep, SetScorer, StaticFront, find_front, keep_text, known_front, tries_every_set


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
    if (known := remembered_front(setup, settings)) is not None:
        return known
    setup = with_block_selection(setup)
    backbone, images = setup.backbone, setup.data.validation
    print("searching the best fixed keep-sets on validation images", flush=True)
    env = setup.env(images)
    whole = tries_every_set(backbone.num_blocks, min(settings.images, len(images)), settings.budget)
    penalties = (1.0, 5.0) if settings.learner_steps and not whole else ()
    hints = [*sets_in_use, *(_learned_set(setup, penalty, settings.learner_steps // 2) for penalty in penalties)]
    with Progress(transient=True, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("share of front.budget spent", total=settings.budget)
        front = find_front(
            backbone,
            images,
            env.costs,
            settings.budget,
            settings.images,
            hints,
            lambda n: bar.update(task, completed=n),
        )
    with suppress(UserError):  # a cache that cannot be written costs time, nothing else
        front.save(_cache() / f"{front.backbone}-{front.data}.json")
    return front


def remembered_front(setup: Setup, settings: FrontSection) -> StaticFront | None:
    """Return the static front of a network from an earlier search; None if none was as thorough as ``settings`` ask."""
    images = setup.data.validation
    known = known_front(setup.backbone, images, _cache())
    return known if known and known.finished and known.images >= min(settings.images, len(images)) else None


def _cache() -> Path:
    """Return the folder in which fronts are remembered."""
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
    while seen < min(count, len(setup.data.validation)):
        B = len(env.observation)
        outcome = env.score(keep_SK.unsqueeze(1).expand(-1, B, -1).to(env.device))
        total_S += env.rewards(outcome).view(len(keep_SK), B).double().sum(1).cpu()
        seen += B
        env.advance()
    return front.sets[int(total_S.argmax())]


def _learned_set(setup: Setup, penalty: float, steps: int) -> Keep:
    """Return the keep-set that BlockDrop's learner ends with when it cannot see the image."""
    env = setup.env(setup.data.validation, "shuffled")
    env.reward = Utilization(penalty)
    options: dict[str, Any] = dict(lr=0.05, schedule="onecycle", alpha_end=0.98, samples=3, beta=0.01, curriculum=0)
    agent = BlockDrop(env, max(1, steps), policy="constant", initial_keep=0.9, **options)
    for _ in range(max(1, steps)):
        agent.update(env)
        release_freed_memory()
    return tuple(agent.act(env.observation)[0].tolist())


def static_figures(
    setup: Setup, decisions: Decisions, front: StaticFront, split: str = "test"
) -> tuple[dict[str, Any], list[tuple[float, float]]]:
    """Compare a policy's decisions on a split with the best static choice of their cost.

    Returns: the figures, and MACs and accuracy of every set of the front on the split.
    """
    scorer = SetScorer(setup.backbone, setup.data.split(split).plain())
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
