"""Skipping blocks: an agent learns which blocks run; beside it stand the full network and the static front.

Shapes: N images, K blocks.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from platformdirs import user_cache_path
from rich.progress import Progress
from torch import Tensor

from policyskip import decisions, distributed, plots
from policyskip.agents.base import Agent
from policyskip.agents.policies import KeepPolicy
from policyskip.agents.static import Keep, SetScorer, StaticFront, find_front, known_front, tries_every_set
from policyskip.backbones import Backbone
from policyskip.collapse import block_warnings
from policyskip.config import FrontSection, Setup
from policyskip.decisions import Decisions
from policyskip.deployment import describe, load_weights
from policyskip.errors import UserError
from policyskip.evaluation import Evaluation, evaluate
from policyskip.files import damaged
from policyskip.memory import give_back
from policyskip.rewards import Adaptive, Utilization
from policyskip.runs import Run
from policyskip.tasks.environments import check_batch, id_of
from policyskip.tasks.margins import half_interval, verdict_on
from policyskip.tracking import Tracker


def static_front(setup: Setup, wanted: FrontSection, in_use: Sequence[Keep] = ()) -> StaticFront:
    """The static front of the run's network on its validation images: a known one, or one searched now and remembered.

    An image-independent learner (the agent with a constant policy, trained on the validation images themselves, under a
    low and a high penalty) joins the search for ``learner_steps`` updates, unless every set can be tried. Sets
    ``in_use`` by a policy that trained the network itself join it too: such a network is at its best with those.
    """
    setup = all_at_once(setup)
    backbone, images = setup.backbone, setup.data.validation
    cache = user_cache_path("policyskip") / "fronts"
    known = known_front(backbone, images, cache)
    if known is not None and known.finished and known.images >= min(wanted.images, len(images)):
        return known
    print("searching the best fixed keep-sets on validation images", flush=True)
    env = setup.env(images)
    whole = tries_every_set(backbone.num_blocks, min(wanted.images, len(images)), wanted.budget)
    penalties = (1.0, 5.0) if wanted.learner_steps and not whole else ()
    hints = [*in_use, *(_learned_set(setup, penalty, wanted.learner_steps // 2) for penalty in penalties)]
    with Progress(transient=True, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("share of front.budget spent", total=wanted.budget)
        front = find_front(
            backbone, images, env.costs, wanted.budget, wanted.images, hints, lambda n: bar.update(task, completed=n)
        )
    with suppress(UserError):  # a cache that cannot be written costs time, nothing else
        front.save(cache / f"{front.backbone}-{front.data}.json")
    return front


def all_at_once(setup: Setup) -> Setup:
    """The same with ``BlockSelection-v0`` as its environment, in which fixed keep-sets are searched."""
    env = {"_target_": "policyskip.envs.block_selection.BlockSelectionVectorEnv"}
    return replace(setup, config={**setup.config, "env": env})


def best_set(setup: Setup, front: StaticFront, count: int = 2000) -> Keep:
    """The set of the front that earns the highest reward on ``count`` validation images, at most; under a reward that
    moves, the one that stands best by the front's own figures."""
    env = setup.env(setup.data.validation, "shuffled")  # folders are sorted by class
    if isinstance(setup.reward, Adaptive):
        figures = ({"accuracy": a, "macs_fraction": m / env.costs.full} for a, m in zip(front.accuracy, front.macs))
        return max(zip(map(setup.reward.standing, figures), front.sets, strict=True))[1]
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
    """What BlockDrop's learner settles on when it cannot see the image."""
    from policyskip.agents.blockdrop import BlockDrop

    env = setup.env(setup.data.validation, "shuffled")
    env.reward = Utilization(penalty)
    options: dict[str, Any] = dict(lr=0.05, schedule="onecycle", alpha_end=0.98, samples=3, beta=0.01, curriculum=0)
    agent = BlockDrop(env, max(1, steps), policy="constant", initial_keep=0.9, **options)
    for _ in range(max(1, steps)):
        agent.update(env)
        give_back()
    return tuple(agent.act(env.observation)[0].tolist())


def judge(setup: Setup, agent: Agent, split: str = "test") -> Evaluation:
    """The agent on a split, beside the full network. The test split is read once a run, after everything is chosen."""
    return evaluate(agent, setup.env(setup.data.split(split).plain()))


def static_figures(
    setup: Setup, result: Evaluation, front: StaticFront, split: str = "test"
) -> tuple[dict[str, Any], list[tuple[float, float]]]:
    """The best static choice of the policy's cost on a split, and the whole front there (MACs, accuracy)."""
    scorer = SetScorer(setup.backbone, setup.data.split(split).plain())
    correct = [correct_N.double() for correct_N in scorer.correct(front.sets)]
    mix = front.mix_at(result.macs_N.mean().item())
    mixed_N: Tensor = torch.stack([weight * correct[place] for place, weight in mix]).sum(0)
    difference_N = result.correct_N.double() - mixed_N
    sets = [front.sets[place] for place, _ in mix]
    figures = {
        "static_accuracy": mixed_N.mean().item(),
        "static_macs": sum(weight * front.macs[place] for place, weight in mix),
        "static_sets": ["".join("01"[kept] for kept in keep) for keep in sets],
        "static_blocks": sum(weight * sum(front.sets[place]) for place, weight in mix),
        "static_margin": difference_N.mean().item(),
        "static_margin_ci95": half_interval(difference_N),
        "static_search_finished": front.finished,
    }
    return figures, [(macs, c.mean().item()) for macs, c in zip(front.macs, correct, strict=True)]


class BlockTask:
    """An agent that decides which blocks run, judged beside the full network and the static front."""

    choose_by, trains = "reward", None

    def __init__(self, setup: Setup, wanted: FrontSection) -> None:
        if not isinstance(setup.backbone, Backbone):
            raise UserError(f"{setup.backbone.name} has exits, not blocks to skip; say backbone=resnet32_digits")
        if setup.reward is None:
            raise UserError("the configuration has no reward, and this command needs one")
        self.setup = setup
        self.source = env = setup.env(setup.data.train, "shuffled", setup.config["seed"])
        everything = torch.ones(len(env.observation), env.backbone.num_blocks, dtype=torch.bool, device=env.device)
        env.rewards(env.score(everything))  # a reward that fails is refused before there is a run folder
        policy = setup.agent(env).policy  # likewise, and before the front is searched
        if isinstance(policy, KeepPolicy):
            check_batch(policy, env.feed.batch.images)
        self.front = distributed.first(lambda: static_front(setup, wanted))
        best = distributed.first(lambda: best_set(setup, self.front))
        self.learner: Agent = setup.agent(env, self.front, best)
        self.validation = setup.env(setup.data.validation)
        self.names = dict(
            agent=self.learner.name,
            env=id_of(setup),
            backbone=setup.backbone.name,
            data=setup.data.name,
        )
        self.greeting = (
            f"{self.names['agent']} {'learns' if setup.config['train']['steps'] else 'is judged'} on "
            f"{setup.data.name} over {setup.backbone.name} ({env.costs.full / 1e6:.1f} M MACs)"
        )

    def validate(self) -> dict[str, Any]:
        """Figures of the greedy decisions on validation images."""
        return evaluate(self.learner, self.validation, full=False).figures()

    def deployable(self) -> dict[str, Tensor]:
        return self.learner.policy.state_dict()

    def finish(self, run: Run, tracker: Tracker, seconds: float) -> dict[str, Any]:
        """Judge the best weights once on test; write summary, deployable files and pictures; close the tracker."""
        setup, agent = self.setup, self.learner
        load_best(agent, run)
        result = judge(setup, agent)
        policy = describe(
            agent.policy,
            setup.backbone,
            setup.config["backbone"],
            setup.data.classes,
            setup.data.image_shape,
            result.policy_macs,
        )
        frozen = setup.backbone.content_hash()
        return report(setup, self.names, result, self.front, policy, run, tracker, seconds, frozen)

    def show(self, summary: dict[str, Any]) -> None:
        """Print the table."""
        show_table(summary)


def report(
    setup: Setup,
    names: dict[str, str],
    result: Evaluation,
    front: StaticFront,
    policy: dict[str, Any],
    run: Run,
    tracker: Tracker,
    seconds: float,
    frozen: str = "",
    **more: float,
) -> dict[str, Any]:
    """Write ``policy`` (the content of ``policy.json``), front, decisions, summary and pictures of a result on test,
    and close the tracker. ``frozen`` is the network's content hash unless the run trained it; ``more`` are other
    figures on test.

    Returns: the summary.
    """
    data, steps, seed = setup.data, setup.config["train"]["steps"], setup.config["seed"]
    static, curve = static_figures(setup, result, front)
    figures = {f"test/{key}": value for key, value in {**result.figures(), **more, **static}.items()}
    judged = decisions.of_blocks(result, curve, data.test.fingerprint(), frozen, data.classes)
    told = decisions.record(judged, run)
    summary = {**names, "seed": seed, "steps": steps, "seconds": round(seconds, 1), **told, **figures}
    if steps:
        summary["warnings"] = block_warnings(result.keep_NK)
    front.save(run.folder / "front.json")
    run.save_json("summary.json", summary)
    pictures = plots.all_plots(
        run.folder / "plots", run.metrics(), result, data.test, data.classes, setup.backbone.stages, curve
    )
    run.save_json("policy.json", policy | {"steps": steps})  # the last: with it, the run is finished
    written = ("best.safetensors", "network.safetensors", "policy.json", "summary.json", "config.yaml")
    files = [path for path in (run.folder / name for name in written) if path.is_file()]
    tracker.finish(summary, pictures, files, decisions.examples(judged, data.test))
    return summary


def again(setup: Setup, run: Run, split: str) -> dict[str, Any]:
    """A finished run's figures on a split, from its folder."""
    result, front = _judged_again(setup, run, split)
    return result.figures() | static_figures(setup, result, front, split)[0]


def decide_again(setup: Setup, run: Run) -> Decisions:
    """A finished run's decisions on test images, from its folder."""
    result, front = _judged_again(setup, run, "test")
    _, curve = static_figures(setup, result, front)
    data, frozen = setup.data, setup.backbone.content_hash()
    return decisions.of_blocks(result, curve, data.test.fingerprint(), frozen, data.classes)


def _judged_again(setup: Setup, run: Run, split: str) -> tuple[Evaluation, StaticFront]:
    if setup.reward is None:
        raise UserError("the configuration has no reward, and this command needs one")
    if not isinstance(setup.backbone, Backbone):
        raise UserError(f"{setup.backbone.name} has exits, not blocks to skip")
    front = load_front(run, setup.backbone.num_blocks)
    agent = setup.agent(setup.env(setup.data.validation, "shuffled"), front)  # shuffled, which is what SB3 asks for
    load_best(agent, run)
    return judge(setup, agent, split), front


def load_front(run: Run, num_blocks: int) -> StaticFront:
    """The static front that the run was judged beside, over a network of ``num_blocks`` blocks."""
    path = run.folder / "front.json"
    if not path.is_file():
        raise UserError(f"there is no {path}; the run did not get that far")
    with damaged(path):
        front = StaticFront.load(path)
        if len(front.sets[0]) != num_blocks:
            raise ValueError(f"its sets are of {len(front.sets[0])} blocks, the network has {num_blocks}")
    return front


def load_best(agent: Agent, run: Run) -> None:
    """Put the run's best weights into the agent's policy."""
    load_weights(agent.policy, run, "the run's config.yaml")


def show_table(summary: dict[str, Any]) -> None:
    """Print the policy beside the full network and the best static choice of equal cost."""
    from rich.console import Console
    from rich.table import Table

    def get(name: str) -> Any:
        return summary[f"test/{name}"]

    table = Table(title=f"{summary['agent']} on {summary['data']}, test split, seed {summary['seed']}")
    for column in ("", "accuracy", "blocks kept", "MACs (millions)", "of full", "decisions"):
        table.add_column(column, justify="left" if not column else "right")
    full, oracle = get("full_macs"), summary.get("test/sees_the_label", False)

    def row(name: str, accuracy: float, kept: str, macs: float, spread: str, decisions: str) -> None:
        table.add_row(
            name, f"{100 * accuracy:.2f} %", kept, f"{macs / 1e6:.2f}{spread}", f"{macs / full:.3f}", decisions
        )

    row(
        f"{summary['agent']} (sees the label)" if oracle else "policy, its own cost included",
        get("accuracy"),
        f"{get('kept_mean'):.2f} ± {get('kept_sd'):.2f}",
        get("macs_mean"),
        f" ± {get('macs_sd') / 1e6:.2f}",
        str(get("unique_decisions")),
    )
    row("full network", get("full_accuracy"), f"{get('blocks')}", full, "", "1")
    if "test/static_accuracy" in summary:
        sets = str(len(get("static_sets")))
        row(
            "best static choice of equal cost",
            get("static_accuracy"),
            f"{get('static_blocks'):.2f}",
            get("static_macs"),
            "",
            sets,
        )
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(table)
    if "test/static_accuracy" in summary:
        verdict, margin = verdict_on(summary)
        told = f"Deciding per image {verdict}" if summary["steps"] else f"{summary['agent']}, which learns nothing"
        console.print(
            f"{told}{', but sees the label' if oracle else ''}: {margin} points "
            "against the best static choice of equal cost"
            + ("." if get("static_search_finished") else " (its search ran out of front.budget).")
        )
    if "test/kept_by_difficulty" in summary:
        quarters = ", ".join("–" if kept is None else f"{kept:.1f}" for kept in get("kept_by_difficulty"))
        console.print(f"Blocks kept, from the easiest quarter of the images to the hardest: {quarters}.")
    for warning in summary.get("warnings", []):
        console.print(f"warning: {warning}")
