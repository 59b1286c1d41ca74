"""What a run is compared with beside its own network's choices, and how its folder keeps that.

These are finished runs that decide the same for every image, such as a smaller network.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from policyskip.backbones.resnet_exits import ResNetExits
from policyskip.build import Setup
from policyskip.config import RivalsSection
from policyskip.data import Images
from policyskip.deployment.predictors import ExitPredictor
from policyskip.errors import UserError
from policyskip.evaluation.decisions import Decisions, load_decisions
from policyskip.rivals import Choice, Family, Rival
from policyskip.runs.folder import Run, open_run
from policyskip.static_front import StaticFront
from policyskip.tasks.fronts import load_front
from policyskip.texts import one_line

FILE = "rivals.json"
"""The file of a run's folder that holds what it was compared with, for when the folders of these have gone."""
DEARER = 1.005
"""A run that costs more than this many times what the policy costs is no rival at that cost."""


@dataclass(frozen=True)
class RunRival:
    """Holds a finished run that decides the same for every image.

    Attributes:
        name: agent, network and folder.
        macs: what it costs for an image.
        correct_N: bool (N,), whether it is right on each test image.
    """

    name: str
    macs: float
    correct_N: Tensor

    def is_dearer(self, macs: float) -> bool:
        """Return whether it costs clearly more than a policy."""
        return self.macs > DEARER * macs

    def rival(self) -> Rival:
        """Return it as the only choice of its family."""
        family = Family(f"the run {self.name}", [self.name], torch.tensor([self.macs], dtype=torch.float64), None)
        return Rival(family, Choice([(0, 1.0)], self.name, self.macs, 0.0), self.correct_N.double())


def find_run_rivals(setup: Setup, settings: RivalsSection | None, resumed: Run | None) -> list[RunRival]:
    """Read the runs of ``front.rivals``, each once; of a resumed run, what its own folder keeps of them.

    Raises:
        UserError: one of them is missing or not finished, was judged on other images or classes, or decides image by
            image; the message names it.
    """
    if resumed is not None and resumed.has(FILE):
        return load_run_rivals(resumed, setup.data.test)
    folders = settings.rivals if settings is not None else []
    return [_read(setup, folder) for folder in {os.path.realpath(folder): folder for folder in folders}.values()]


def _read(setup: Setup, folder: str) -> RunRival:
    """Read a run; errors as in :func:`find_run_rivals`."""
    try:
        run = open_run(folder)
    except UserError as error:
        raise UserError(f"front.rivals: {error}") from error
    problem = f"front.rivals: the run {folder} cannot be a rival"
    decisions = load_decisions(run) if run.has("policy.json") and run.has("summary.json") else None
    if decisions is None:
        raise UserError(f"{problem}: it is not a finished run of train that has a record of its decisions")
    summary = run.load_json("summary.json")
    if decisions.classes != setup.data.classes:
        raise UserError(f"{problem}: its classes are not those of {setup.data.name}")
    if decisions.images != setup.data.test.fingerprint():
        raise UserError(f"{problem}: it was judged on other images than the test images of {setup.data.name}")
    if summary.get("test/sees_the_label"):
        raise UserError(f"{problem}: it sees the label")
    if not _is_fixed(decisions):
        raise UserError(f"{problem}: it decides image by image; a rival decides the same for every image")
    name = one_line(f"{summary.get('agent')} over {summary.get('backbone')} ({run.name})", 200)
    return RunRival(name, decisions.macs_N[0].item(), decisions.correct_N)


def _is_fixed(decisions: Decisions) -> bool:
    """Return whether every image was decided on alike, at one cost."""
    same_cost = decisions.macs_N.max() - decisions.macs_N.min() <= 1e-9 * decisions.full_macs
    return bool((decisions.ran_NK == decisions.ran_NK[0]).all() and same_cost)


def save_run_rivals(run: Run, rivals: Sequence[RunRival], images: Images) -> None:
    """Write what is needed of the runs that a run is compared with on test images, if there are any, into its
    folder."""
    if rivals:
        entries = [
            {"name": r.name, "macs": r.macs, "correct": "".join("01"[right] for right in r.correct_N.tolist())}
            for r in rivals
        ]
        run.save_json(FILE, {"runs": entries, "images": images.fingerprint()})


def load_run_rivals(run: Run, images: Images) -> list[RunRival]:
    """Read what :func:`save_run_rivals` wrote for these test images; none if it wrote nothing.

    Raises:
        UserError: the file is damaged, or about other images.
    """
    if not run.has(FILE):
        return []
    rivals, content, N = [], run.load_json(FILE), len(images)
    if content.get("images", own := images.fingerprint()) != own:
        raise UserError(f"{run.folder / FILE} is about other test images than those that are here now")
    for entry in content["runs"]:
        if len(entry["correct"]) != N:
            raise UserError(f"{run.folder / FILE} is damaged: it is about {len(entry['correct'])} images, not {N}")
        correct_N = torch.tensor([mark == "1" for mark in entry["correct"]])
        rivals.append(RunRival(entry["name"], entry["macs"], correct_N))
    return rivals


@dataclass(frozen=True)
class References:
    """Holds what a policy over exits is compared with beside the exits themselves: the static front of the blocks that
    the exits follow, None if there is none; and finished runs."""

    front: StaticFront | None
    others: Sequence[RunRival]

    @staticmethod
    def load(run: Run, predictor: ExitPredictor, images: Images) -> References:
        """Read those of a finished run, which deploys ``predictor`` and was judged on these test images.

        Raises:
            UserError: a file is damaged, or is about another network or other images.
        """
        front, network = None, predictor.network
        if isinstance(network, ResNetExits) and run.has("front.json"):
            front = load_front(run, network.backbone.num_blocks, predictor.trunk_hash)
        return References(front, load_run_rivals(run, images))

    def save(self, run: Run) -> None:
        """Write the front into a run's folder, if there is one; the finished runs are there from the start."""
        if self.front is not None:
            self.front.save(run.folder / "front.json")
