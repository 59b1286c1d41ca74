"""Objects are built here from settings: data, network, reward, environments and agents of a configuration.

Every group's YAML says ``_target_: package.module.Name`` and the arguments of that name. The arguments are checked
against its signature here, so that a wrong key or value is one clear line.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, get_type_hints

import torch
from pydantic import (
    ConfigDict,
    TypeAdapter,
    ValidationError,
)
from torch import Tensor

from policyskip import registry
from policyskip.agents.base import Agent
from policyskip.backbones import Backbone, ExitNetwork, Network
from policyskip.backbones.architectures import record_architecture
from policyskip.backbones.base import evaluation_mode
from policyskip.backbones.checkpoints import check_data, seeded
from policyskip.config import first_problem, group_of
from policyskip.data import Data, Images, Order, batch_at
from policyskip.errors import UserError
from policyskip.execution.ways import How
from policyskip.parallel import processes
from policyskip.policies.base import Policy
from policyskip.rewards import Reward
from policyskip.runs.progress import waiting
from policyskip.runs.stored_config import check_paths
from policyskip.static_front import Keep, StaticFront
from policyskip.texts import a_type


@dataclass(frozen=True)
class Call:
    """Holds the class or function that a group's ``_target_`` names, and the checked arguments to call it with.

    Attributes:
        label: group and target, for messages.
    """

    label: str
    target: Callable[..., Any]
    arguments: dict[str, Any]

    def result(self) -> Any:
        """Make the call, and return what it returns.

        Raises:
            UserError: it failed.
        """
        with registry.naming_failures(self.label):
            return self.target(**self.arguments)


def build(
    group: str, node: dict[str, Any], trusted: bool = True, optional: dict[str, Any] | None = None, **given: Any
) -> Any:
    """Call a group's ``_target_`` with its other keys as arguments. For the arguments see :func:`check_call`.

    Raises:
        UserError: the target cannot be imported, does not take these arguments, or fails on them.
    """
    with registry.trusting(trusted, stored=False):
        return check_call(group, node, optional, **given).result()


def check_call(group: str, node: dict[str, Any], optional: dict[str, Any] | None = None, **given: Any) -> Call:
    """Check the keys of a group's configuration against the signature of its ``_target_``, and convert their values.

    Args:
        group: the group's name, such as ``agent``.
        node: the group's part of the configuration: ``_target_``, and arguments.
        optional: more arguments, passed only if the target declares a parameter of that name.
        given: more arguments, passed if the target declares a parameter of that name or takes any (``**kwargs``).

    Raises:
        UserError: the target cannot be imported, or does not take these arguments.
    """
    from_settings = {str(key): value for key, value in node.items() if key != "_target_"}
    check_paths({group: node})
    target = _target_of(group, node)
    function = registry.resolve(group, target)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise UserError(f"{group}._target_={target} cannot be called: {error}") from error
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    given |= {key: value for key, value in (optional or {}).items() if key in signature.parameters}
    settable = [name for name in signature.parameters if name not in given]
    unknown = [key for key in from_settings if key not in settable]
    if unknown and not takes_any:
        raise UserError(f"{group} has no key {unknown[0]}; {target} takes {', '.join(settable) or 'none'}")
    given = {key: value for key, value in given.items() if takes_any or key in signature.parameters}
    missing = [
        name
        for name, p in signature.parameters.items()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        if name not in from_settings and name not in given
    ]
    if missing:
        hint = "; a reward is a class with __call__, or a function that returns one" if group == "reward" else ""
        raise UserError(f"{group}.{missing[0]} is not set; {target} needs it{hint}")
    hints = _hints(function)
    converted = {
        key: _converted(f"{group}.{key}", value, hints[key]) if key in hints else value
        for key, value in from_settings.items()
    }
    if both := [key for key in converted if key in given]:
        raise UserError(f"{group} has no key {both[0]}; {target} takes {', '.join(settable) or 'none'}")
    return Call(f"{group}: {target}", function, {**converted, **given})


def class_of(config: dict[str, Any], group: str, trusted: bool = True) -> Any:
    """Return the class or function that a group's ``_target_`` names.

    Raises:
        UserError: it cannot be imported, or has to be trusted for it.
    """
    with registry.trusting(trusted, stored=False):
        return registry.resolve(group, _target_of(group, group_of(config, group)))


def _target_of(group: str, node: dict[str, Any]) -> str:
    """Return the name in a group's ``_target_``, or refuse (UserError) what is none."""
    target = node.get("_target_")
    if not isinstance(target, str) or not target:
        raise UserError(f"{group}._target_ must name a class or function as package.module.Name, got {target!r}")
    return target


def _converted(key: str, value: Any, hint: Any) -> Any:
    """Convert a configuration's value to the type that its parameter's annotation declares.

    Hydra leaves ``1e-3`` a string: it is converted where a float is declared, and nothing else is. An annotation that
    pydantic cannot check lets every value pass.

    Raises:
        UserError: the value is of another type.
    """
    number = value
    if isinstance(value, str) and "float" in str(hint):
        with suppress(ValueError):
            number = float(value)
    try:
        return TypeAdapter(hint, config=ConfigDict(strict=True)).validate_python(number)
    except ValidationError as error:
        raise UserError(first_problem(key, error)) from error
    except Exception:
        return value


def _hints(function: Any) -> dict[str, Any]:
    """Return the annotations of a function's or a constructor's parameters; none if one of them makes no sense."""
    try:
        return get_type_hints(function.__init__ if inspect.isclass(function) else function)
    except Exception:
        return {}


@dataclass
class Setup:
    """Holds data, backbone and reward of a configuration, and makes the environments and agents over them."""

    config: dict[str, Any]
    device: torch.device
    data: Data
    backbone: Any  # a Backbone, or an ExitNetwork where images leave early
    reward: Reward | None
    batch_size: int
    trusted: bool = True
    warnings: list[str] = field(default_factory=list)  # about the network, for the screen and the summary

    @property
    def how(self) -> How:
        """Return in which way and precision networks are executed; stored runs of older versions say nothing of it."""
        return How(str(self.config.get("execution") or "auto"), str(self.config.get("precision") or "float32"))

    def env(self, images: Images, order: Order = "sequential", seed: int = 0) -> Any:
        """Make an environment over a set of images.

        Raises:
            UserError: what the configuration names cannot be made, or is no environment.
        """
        network = "network" if isinstance(self.backbone, ExitNetwork) else "backbone"
        given = {network: self.backbone, "images": images, "reward": self.reward, "order": order, "seed": seed}
        given["num_envs"], node = min(self.batch_size, len(images)), group_of(self.config, "env")
        for key, value, usual in zip(("execution", "precision"), self.how, How()):
            if key in node and str(node.get("_target_")).startswith("policyskip."):
                raise UserError(f"env.{key} cannot differ from the rest of a run: say {key}={node[key]} for all of it")
            node = node if value == usual else {**node, key: value}
        env = build("env", node, self.trusted, **given)
        if not all(hasattr(env, name) for name in ("observation", "costs", "score", "advance")):
            raise UserError(wrong_kind("env", node, env, "policyskip.envs.base.DecisionEnv"))
        return env

    def agent(self, env: Any, front: StaticFront | None = None, best: Keep | None = None) -> Agent:
        """Make a fresh agent for an environment.

        Args:
            env: the environment that the agent will learn in.
            front: the static front, for agents that declare it as a parameter.
            best: the set of the front with the highest reward: for agents that declare it, and, if
                ``agent.warm_start`` is true, the set that the agent starts from.

        Raises:
            UserError: ``agent.warm_start`` is neither true nor false, or the configuration's agent cannot be made.
        """
        node = dict(group_of(self.config, "agent"))
        warm_start = node.pop("warm_start", False)
        if not isinstance(warm_start, bool):
            raise UserError(f"agent.warm_start must be true or false, got {warm_start!r}")
        agent = build(
            "agent",
            node,
            self.trusted,
            env=env,
            total_steps=self.config["train"]["steps"],
            seed=self.config["seed"],
            optional={"best": best, "front": front},
            **({"start": best} if warm_start else {}),
        )
        if not isinstance(agent, Agent):
            raise UserError(wrong_kind("agent", node, agent, "policyskip.agents.base.Agent"))
        _check_agent(f"agent: {node['_target_']}", agent)
        return agent


def set_up(
    config: dict[str, Any], device: torch.device, trusted: bool = True, built: tuple[Data, int] | None = None
) -> Setup:
    """Build what a ``train`` configuration names; what is cheap to check comes first.

    Args:
        built: data and batch size, as :func:`build_data` returns them, if they have been built already.
    """
    reward = build("reward", group_of(config, "reward"), trusted) if config.get("reward") else None
    data, batch_size = built or build_data(group_of(config, "data"), device, trusted)
    backbone = build_backbone(group_of(config, "backbone"), data, device, trusted, seed=config.get("seed", 0))
    return Setup(config, device, data, backbone, reward, batch_size, trusted)


def build_data(node: dict[str, Any], device: torch.device, trusted: bool = True) -> tuple[Data, int]:
    """Build the data set of a configuration; return it, and the number of images in a batch.

    Raises:
        UserError: the batch size is no positive integer, or the data set cannot be made.
    """
    node = dict(node)
    batch_size = node.pop("batch_size", 256)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise UserError(f"data.batch_size must be a positive integer, got {batch_size!r}")
    processes.per_process_batch_size(batch_size)  # refuses a batch that cannot be divided, before the data is read
    with waiting("reading the data"):
        data = build("data", node, trusted, device=device)
    if not isinstance(data, Data):
        raise UserError(wrong_kind("data", node, data, "policyskip.data.Data"))
    data.check_batch(batch_size)
    own = registry.is_own(registry.path_of("data", str(node["_target_"])).rpartition(".")[0])
    for images in (data.train, data.validation, data.test):
        label_N = getattr(images, "label_N", None)
        if (
            isinstance(label_N, Tensor)
            and len(label_N)
            and not 0 <= int(label_N.min()) <= int(label_N.max()) < len(data.classes)
        ):
            found = f"{int(label_N.min())} to {int(label_N.max())}"
            raise UserError(f"data: {node['_target_']} gave labels {found} for {len(data.classes)} classes")
        if own or not len(images):
            continue
        first = batch_at(images, torch.zeros(1, dtype=torch.int64)).images
        if (first.dtype, tuple(first.shape[1:])) != (torch.uint8, tuple(data.image_shape)):
            found = f"{str(first.dtype).removeprefix('torch.')} {tuple(first.shape[1:])}"
            raise UserError(f"data: {node['_target_']} gave images {found}, not uint8 {tuple(data.image_shape)}")
    return data, batch_size


def build_backbone(
    node: dict[str, Any], data: Data, device: torch.device, trusted: bool = True, seed: int | None = None
) -> Network:
    """Build a configuration's backbone for a data set's classes and images.

    A backbone that is not the package's own draws its random weights by ``seed``, and gets an ``architecture`` from
    which a file with its weights can be read again.

    Returns: the network on the device, in the memory format in which convolutions are fastest.

    Raises:
        UserError: shipped weights that were trained on other data, or the network cannot be made.
    """
    check_data(node.get("checkpoint"), data.name)
    with registry.trusting(trusted, stored=False), waiting("making the network"):
        given: dict[str, Any] = dict(num_classes=len(data.classes), image_shape=data.image_shape)
        given |= {} if seed is None else {"seed": seed}
        call = check_call("backbone", node, **given)
        own = registry.is_own(getattr(call.target, "__module__", None))
        with nullcontext() if own else seeded(seed or 0):
            backbone = call.result()
            if not isinstance(backbone, Backbone | ExitNetwork):
                kinds = "policyskip.backbones.Backbone or ExitNetwork"
                raise UserError(wrong_kind("backbone", node, backbone, kinds))
            if backbone.num_classes != len(data.classes):
                made = f"a network of {backbone.num_classes} classes"
                raise UserError(f"backbone._target_={node['_target_']} gave {made}, the data has {len(data.classes)}")
            if not own:
                _check_logits(node["_target_"], backbone, data.image_shape)
                path = registry.path_of("backbone", node["_target_"])
                record_architecture(backbone, path, call.target, call.arguments)
    return backbone.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _check_logits(target: str, network: Backbone | ExitNetwork, image_shape: tuple[int, int, int]) -> None:
    """Refuse (UserError) a network of the user's own whose logits for two images are not (2, C), or (2, N, C)."""
    with registry.naming_failures(f"backbone: {target}"), torch.no_grad(), evaluation_mode(network):
        logits = network(torch.zeros(2, *image_shape, dtype=torch.uint8))
    exits = (network.num_exits,) if isinstance(network, ExitNetwork) else ()
    expected = (2, *exits, network.num_classes)
    if tuple(logits.shape) != expected:
        raise UserError(f"backbone: {target} gave logits {tuple(logits.shape)} for two images, not {expected}")


def _check_agent(label: str, agent: Agent) -> None:
    """Refuse (UserError) an agent whose constructor left out what every agent has, or set it to something else."""
    policy, macs = getattr(agent, "policy", None), getattr(agent, "decision_macs", None)
    if not isinstance(policy, Policy):
        raise UserError(f"{label} must set policy to a policyskip.policies.base.Policy, got {type(policy).__name__}")
    if not isinstance(macs, int | float) or not 0 <= macs < math.inf:
        raise UserError(f"{label} must set decision_macs to the MACs of one decision, a number, got {macs!r}")
    try:  # so that a run is not learned to its end before its policy.json cannot be written, or cannot be read
        arguments = policy.spec()
        json.dumps(arguments)
        inspect.signature(type(policy).__init__).bind(policy, **arguments)
    except (TypeError, ValueError) as error:
        kind = type(policy).__name__
        raise UserError(f"spec of the policy {kind} must return the arguments of {kind} for JSON: {error}") from error


def wrong_kind(group: str, node: dict[str, Any], made: Any, kind: str) -> str:
    """Return the message for a target that made an object of another class than its group needs."""
    return f"{group}._target_={node['_target_']} gave {a_type(made)}; it must be a {kind}"
