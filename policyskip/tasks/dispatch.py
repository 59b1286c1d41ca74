"""The task that a configuration asks for is made here, by the family that its agent, or its environment, declares."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from policyskip.agents.base import Agent
from policyskip.build import Setup, class_of
from policyskip.config import Settings, group_of
from policyskip.envs.base import DecisionEnv
from policyskip.envs.block_selection import BlockSelectionVectorEnv
from policyskip.errors import UserError
from policyskip.execution.exits import check_kernels
from policyskip.files import damaged
from policyskip.parallel import processes
from policyskip.parallel.data_parallel import Divisible
from policyskip.registry import declared_class
from policyskip.rewards import Adaptive
from policyskip.runs.folder import REWARD, Run
from policyskip.tasks.base import FamilyTask, Judgement
from policyskip.tasks.blocks import BlockTask
from policyskip.tasks.exit_policy import ExitPolicyTask
from policyskip.tasks.gates import GateTask
from policyskip.tasks.network_check import network_warnings, remark
from policyskip.tasks.run_rivals import find_run_rivals
from policyskip.tasks.thresholds import ThresholdTask
from policyskip.texts import one_line

FAMILIES: dict[str, type[FamilyTask]] = {
    "blocks": BlockTask,
    "gates": GateTask,
    "thresholds": ThresholdTask,
    "exit_policy": ExitPolicyTask,
}


def start(setup: Setup, settings: Settings, resumed: Run | None = None) -> FamilyTask:
    """Make the task of a ``train`` configuration, of a new run or of one that is resumed.

    Raises:
        UserError: the agent cannot act in the environment, cannot learn for that many updates, or not in several
            processes; or the configuration lacks something that its family needs.
    """
    agent, steps = agent_class(setup.config, setup.trusted), settings.train.steps
    _check_declarations(agent)
    if agent.learns and not steps:
        raise UserError(f"train.steps must be at least 1, got 0{_annotation_hint(setup)}")
    if processes.world() > 1 and not issubclass(agent, Divisible):
        target = class_of(setup.config, "agent", setup.trusted)
        raise UserError(f"the agent {target.__name__} learns in one process; start it without torchrun")
    others = find_run_rivals(setup, settings.front, resumed)
    family = FAMILIES[family_of(setup)]
    check_kernels(setup.backbone, setup.data.image_shape, setup.how)
    task = family(setup, settings, others)
    state = task.learner.state_dict()
    problem = _not_plain(state, "state_dict") if isinstance(state, dict) else type(state).__name__
    if problem:
        raise UserError(
            f"state_dict of the agent {agent.__name__} must return a dictionary of tensors, numbers, strings, lists "
            f"and dictionaries, for checkpoints that can be read again; got {problem}"
        )
    if task.trained_network is None:
        setup.warnings = network_warnings(setup)
    lines = [task.greeting, remark(setup.backbone), *(f"warning: {text}" for text in setup.warnings)]
    task.greeting = "\n".join(filter(None, lines))
    return task


def without_idle_steps(content: dict[str, Any], settings: Settings, trusted: bool) -> dict[str, Any]:
    """Set ``train.steps`` to 0 for an agent that has nothing to learn, and say so: it may be one of a sweep's agents.

    Returns: the configuration; ``settings`` are changed in place.

    Raises:
        UserError: the agent's class cannot be imported, or has to be trusted for it.
    """
    steps = settings.train.steps
    if not steps or agent_class(content, trusted).learns:
        return content
    name = one_line(class_of(content, "agent", trusted).__name__.lower())
    print(f"the agent {name} has nothing to learn, so train.steps={steps} is ignored", flush=True)
    settings.train.steps = 0
    return {**content, "train": {**group_of(content, "train"), "steps": 0}}


def _annotation_hint(setup: Setup) -> str:
    """Return what to add for a function of the user's own that does not say which agent it makes."""
    target = class_of(setup.config, "agent", setup.trusted)
    if declared_class(target) is not None:
        return ""
    return f"; if the agent has nothing to learn, annotate what {target.__name__} returns, as -> FixedAgent"


def _not_plain(value: Any, where: str) -> str | None:
    """Find something in a learner's state that a checkpoint would not give back, and say where; None if there is
    none."""
    if isinstance(value, Tensor) or type(value) in (type(None), bool, int, float, str, bytes):
        return None
    if isinstance(value, dict):
        pairs = list(value.items())
        odd = next((key for key in value if type(key) not in (str, int, float, bool)), None)
        if odd is not None:
            return f"the key {odd!r:.80} in {where}"
    elif isinstance(value, list | tuple):
        pairs = list(enumerate(value))
    else:
        return f"{type(value).__name__} in {where}"
    return next((found for key, entry in pairs if (found := _not_plain(entry, f"{where}[{key!r}]"))), None)


def _check_declarations(agent: type[Agent]) -> None:
    """Refuse (UserError) an agent that declares a family that does not exist, or environments that are no names."""
    name = f"the agent {agent.__name__}"
    if not isinstance(agent.family, str | None) or agent.family not in (None, *FAMILIES):
        raise UserError(f"{name} must declare a family of {', '.join(FAMILIES)}, or None, got {agent.family!r}")
    environments: Any = agent.environments
    if not isinstance(environments, tuple | list) or not all(isinstance(key, str) for key in environments):
        raise UserError(f"{name} must declare environments, a tuple of names, got {environments!r}")


def judge(setup: Setup, run: Run, split: str, compared: bool = True) -> Judgement:
    """Judge a finished run, from its folder, on a split; beside its rivals if ``compared``, which takes longer.

    Raises:
        UserError: a file of the run is damaged, or the run did not get that far.
    """
    if isinstance(setup.reward, Adaptive):  # it moves, and goes on from where it stood
        _restore_reward(setup.reward, run)
    return FAMILIES[family_of(setup)].judge(setup, run, split, compared)


def _restore_reward(reward: Adaptive, run: Run) -> None:
    """Let a reward that moves stand where it stood when a run was finished; older versions kept that in the checkpoint.

    Raises:
        UserError: the file is damaged.
    """
    if run.has(REWARD):
        path, state = run.folder / REWARD, {"reward": run.load_json(REWARD)}
    elif run.has("checkpoint.pt"):
        path, state = run.folder / "checkpoint.pt", run.load_checkpoint()
    else:
        return
    if "reward" in state:  # where nothing was learned, it has not moved
        with damaged(path):
            reward.load_state_dict(state["reward"])


def family_of(setup: Setup) -> str:
    """Return the family of a configuration's agent: its own, or that of the environment it acts in.

    Raises:
        UserError: the agent cannot act in the environment; the message says in which it can.
    """
    agent = agent_class(setup.config, setup.trusted)
    if agent.family == "gates":  # gates learn from labelled images, in no environment
        return agent.family
    env = env_class(setup.config, setup.trusted)
    if env.key not in agent.environments:
        allowed = " or ".join(f"env={name}" for name in agent.environments)
        name = getattr(agent, "name", None)
        target = class_of(setup.config, "agent", setup.trusted)
        name = name if isinstance(name, str) else target.__name__.lower()
        raise UserError(f"agent={name} cannot act in {env.id}; it can with {allowed}")
    family = agent.family or env.family
    if family not in FAMILIES:
        raise UserError(
            f"the environment {env.__name__} must declare a family of {', '.join(FAMILIES)}, got {family!r}"
        )
    return family


def agent_class(config: dict[str, Any], trusted: bool = True) -> type[Agent]:
    """Return the class of a configuration's agent, which declares its family, and whether and what it learns."""
    declared = declared_class(class_of(config, "agent", trusted))
    return declared if declared is not None and issubclass(declared, Agent) else Agent


def env_class(config: dict[str, Any], trusted: bool = True) -> type[DecisionEnv]:
    """Return the class of a configuration's environment, which declares its key, its id and its family."""
    declared: Any = declared_class(class_of(config, "env", trusted))
    return declared if hasattr(declared, "family") else BlockSelectionVectorEnv
