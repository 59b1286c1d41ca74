"""The contract of a task: everything that one run of ``policyskip train`` consists of."""

from __future__ import annotations

import copy
import inspect
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from policyskip.agents.base import Agent
from policyskip.agents.early_exit import EarlyExitAgent
from policyskip.backbones import Network
from policyskip.build import Setup, class_of
from policyskip.envs.block_selection import BlockSelectionVectorEnv
from policyskip.envs.early_exit import EarlyExitVectorEnv
from policyskip.envs.layer_skip import LayerSkipVectorEnv
from policyskip.errors import UserError
from policyskip.runs.folder import Run
from policyskip.runs.tracking import Tracker


class Task(Protocol):
    """Everything that can be refused is refused when a task is made, before there is a run folder.

    Attributes:
        learner, source: what learns, and from what (see ``training.train``).
        choose_by: the validation figure by which the best weights are kept.
        names: agent, env, backbone and data, for the summary.
        greeting: what is said before training starts.
    """

    learner: Any
    source: Any
    choose_by: str
    names: dict[str, str]
    greeting: str

    @property
    def trained_network(self) -> Network | None:
        """The network, as it is before training, of a run that trains it; None where it is frozen."""
        ...

    def validate(self) -> dict[str, Any]:
        """Figures on the validation images."""
        ...

    def deployable(self) -> dict[str, Tensor]:
        """The tensors of which the best are kept."""
        ...

    def finish(self, run: Run, tracker: Tracker, seconds: float) -> dict[str, Any]:
        """Judge the best weights once on test, and write what is deployed, the summary and the pictures."""
        ...

    def show(self, summary: dict[str, Any]) -> None:
        """Print the summary as a table."""
        ...


def check_batch(network: nn.Module, images: Tensor) -> None:
    """UserError if a network that learns cannot do so from the images, uint8 (B, 3, H, W), of one batch."""
    if len(images) > 1:
        return
    trial = copy.deepcopy(network).train()
    try:
        with torch.no_grad():
            trial(images)
    except ValueError as error:
        raise UserError(f"{ONE_IMAGE}: give a larger data.batch_size or larger images") from error


ONE_IMAGE = "batch normalisation of 1×1 features needs two images at least"


ENVIRONMENTS = {
    "block_selection": ("BlockSelection-v0", BlockSelectionVectorEnv),
    "layer_skip": ("LayerSkip-v0", LayerSkipVectorEnv),
    "early_exit": ("EarlyExit-v0", EarlyExitVectorEnv),
}
"""By the names of ``env=``: each environment's id and class."""


def environment_of(setup: Setup) -> str:
    """The environment of a configuration by the name of ``env=``; a user's own goes by what it derives from."""
    asked = class_of(setup.config, "env", setup.trusted)
    names = [name for name, (_, kind) in ENVIRONMENTS.items() if inspect.isclass(asked) and issubclass(asked, kind)]
    return names[0] if names else "block_selection"


def id_of(setup: Setup) -> str:
    """Its id, ``BlockSelection-v0``, for people to read."""
    return ENVIRONMENTS[environment_of(setup)][0]


def check_agent(setup: Setup) -> None:
    """Refuse an agent that cannot act in the environment.

    Raises:
        UserError: says in which it can.
    """
    agent = class_of(setup.config, "agent", setup.trusted)
    able = getattr(agent, "environments", Agent.environments)
    if environment_of(setup) not in able:
        ways = " or ".join(f"env={name}" for name in able)
        name = getattr(agent, "name", None)
        name = name if isinstance(name, str) else agent.__name__.lower()
        raise UserError(f"agent={name} cannot act in {id_of(setup)}; it can with {ways}")


def sets_thresholds(setup: Setup) -> bool:
    """Whether the agent trains a network with exits and sets thresholds, rather than learn over a frozen one."""
    agent = class_of(setup.config, "agent", setup.trusted)
    return inspect.isclass(agent) and issubclass(agent, EarlyExitAgent)
