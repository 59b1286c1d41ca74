"""From settings to objects: data, network, reward, environments and agents of a configuration.

Every group's YAML says ``_target_: package.module.Name`` and the arguments of that name. The arguments are checked
against its signature here, so that a wrong key or value is one clear line.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, get_type_hints

import torch
from pydantic import (
    ConfigDict,
    TypeAdapter,
    ValidationError,
)

from policyskip.agents.base import Agent
from policyskip.backbones import ExitNetwork, Network
from policyskip.backbones.checkpoints import check_data
from policyskip.config import first_problem, group_of
from policyskip.data import Data, Images, Order
from policyskip.errors import UserError, remember_users_class
from policyskip.parallel import processes
from policyskip.rewards import Reward
from policyskip.static_front import Keep, StaticFront

GROUPS = {
    "data": "policyskip.data",
    "backbone": "policyskip.backbones",
    "env": "policyskip.envs",
    "reward": "policyskip.rewards",
    "agent": "policyskip.agents",
    "pretrain": "policyskip.pretraining",
}
"""The groups, and where the package keeps its own choices for each."""


def build(
    group: str, node: dict[str, Any], trusted: bool = True, optional: dict[str, Any] | None = None, **given: Any
) -> Any:
    """Call a group's ``_target_`` with its other keys and with those of ``given`` that it takes.

    Args:
        optional: given too, but only by the names that it declares: nothing that ``**kwargs`` would swallow.
        trusted: False refuses targets that are not policyskip's own for the group: the configuration came with a run
            folder, and calling what it names would execute its author's code.

    Raises:
        UserError: the target cannot be imported, does not take these arguments, or fails on them.
    """
    arguments = {str(key): value for key, value in node.items() if key != "_target_"}
    target = node.get("_target_")
    if not isinstance(target, str):
        raise UserError(f"{group}._target_ must name a class or function as package.module.Name, got {target!r}")
    call = _resolve(group, target, trusted)
    try:
        signature = inspect.signature(call)
    except (TypeError, ValueError) as error:
        raise UserError(f"{group}._target_={target} cannot be called: {error}") from error
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    given |= {key: value for key, value in (optional or {}).items() if key in signature.parameters}
    settable = [name for name in signature.parameters if name not in given]
    unknown = [key for key in arguments if key not in settable]
    if unknown and not takes_any:
        raise UserError(f"{group} has no key {unknown[0]}; {target} takes {', '.join(settable) or 'none'}")
    given = {key: value for key, value in given.items() if takes_any or key in signature.parameters}
    missing = [
        name
        for name, p in signature.parameters.items()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        if name not in arguments and name not in given
    ]
    if missing:
        raise UserError(f"{group}.{missing[0]} is not set; {target} needs it")
    hints = _hints(call)
    for key, value in arguments.items():
        if key in hints:
            try:
                arguments[key] = TypeAdapter(hints[key], config=ConfigDict(strict=True)).validate_python(
                    _as_declared(value, hints[key])
                )
            except ValidationError as error:
                raise UserError(first_problem(f"{group}.{key}", error)) from error
            except Exception:
                continue
    try:
        return call(**arguments, **given)
    except UserError:
        raise
    except Exception as error:  # whatever the user's class, or torch, raises for these arguments
        raise UserError(f"{group}: {target} failed with {type(error).__name__}: {error}") from error


def class_of(config: dict[str, Any], group: str, trusted: bool = True) -> Any:
    """What a group's ``_target_`` names.

    Raises:
        UserError: it cannot be imported, or has to be trusted for it.
    """
    return _resolve(group, str(group_of(config, group).get("_target_")), trusted)


def _as_declared(value: Any, hint: Any) -> Any:
    """YAML reads 1 and 1e-3 for a float alike as it pleases; nothing else is converted."""
    if isinstance(value, str) and "float" in str(hint):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _hints(call: Any) -> dict[str, Any]:
    try:
        return get_type_hints(call.__init__ if inspect.isclass(call) else call)
    except Exception:
        return {}


def _resolve(group: str, target: str, trusted: bool) -> Callable[..., Any]:
    """Import ``package.module.Name``, or an entry point's name from the group ``policyskip.<group>s``."""
    if "." not in target:
        points = entry_points(group=f"policyskip.{group}s")
        if target not in points.names:
            known = ", ".join(sorted(points.names)) or "none is installed"
            raise UserError(f"{group}._target_={target} is no installed {group} ({known}); or say package.module.Name")
        target = points[target].value.replace(":", ".")
    module_name, _, name = target.rpartition(".")
    if not trusted and not _ours(group, module_name):
        raise UserError(
            f"the run's {group} {target} is not one of policyskip's own; say trust=true "
            "(when resuming: run.trust=true) to execute it"
        )
    foreign = module_name.partition(".")[0] != "policyskip"
    if foreign:
        remember_users_class(module_name, f"{group}: {target}")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except Exception as error:  # whatever the user's module raises while it is imported
        raise UserError(
            f"could not import {group}._target_={target}: {type(error).__name__}: {error} "
            f"(current folder: {os.getcwd()})"
        ) from error
    if not trusted and not _ours(group, getattr(found, "__module__", "")):
        raise UserError(f"the run's {group} {target} is not one of policyskip's own")
    if not callable(found):
        raise UserError(f"{group}._target_={target} is no class or function")
    if foreign:
        remember_users_class(str(getattr(found, "__module__", module_name)), f"{group}: {target}")
    checked: Callable[..., Any] = found
    return checked


def _ours(group: str, module: str) -> bool:
    """Whether a module is, or is inside, the package's own for the group."""
    return f"{module}.".startswith(f"{GROUPS[group]}.")


def find_device(name: str) -> torch.device:
    """``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if processes.world() > 1 and device.type == "cuda":
        if device.index is not None:
            raise UserError(f"{name} is one GPU, and each of {processes.world()} processes needs its own: say cuda")
        device = torch.device("cuda", processes.local_rank())
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device {device} is not there: this machine has {torch.cuda.device_count()} CUDA devices; say device=cpu"
        )
    torch.backends.cudnn.deterministic = True  # one seed, one result
    return device


@dataclass
class Setup:
    """Data, backbone and reward of a configuration, and the environments and agents over them."""

    config: dict[str, Any]
    device: torch.device
    data: Data
    backbone: Any  # a Backbone, or an ExitNetwork where images leave early
    reward: Reward | None
    batch_size: int
    trusted: bool = True

    def env(self, images: Images, order: Order = "sequential", seed: int = 0) -> Any:
        """An environment over a set of images."""
        network = "network" if isinstance(self.backbone, ExitNetwork) else "backbone"
        given = {network: self.backbone, "images": images, "reward": self.reward, "order": order, "seed": seed}
        count = min(self.batch_size, len(images))
        return build("env", group_of(self.config, "env"), self.trusted, num_envs=count, **given)

    def agent(self, env: Any, front: StaticFront | None = None, best: Keep | None = None) -> Agent:
        """The agent, about to learn in an environment. ``front`` is the static front and ``best`` its set with the
        highest reward, for agents that keep to it, or can start from it (and are not told otherwise)."""
        node = dict(group_of(self.config, "agent"))
        warm_start = node.pop("warm_start", False)
        if not isinstance(warm_start, bool):
            raise UserError(f"agent.warm_start must be true or false, got {warm_start!r}")
        agent: Agent = build(
            "agent",
            node,
            self.trusted,
            env=env,
            total_steps=self.config["train"]["steps"],
            seed=self.config["seed"],
            optional={"best": best, "front": front},
            **({"start": best} if warm_start else {}),
        )
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
    """The data set, and the number of images side by side."""
    node = dict(node)
    batch_size = node.pop("batch_size", 256)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise UserError(f"data.batch_size must be a positive integer, got {batch_size!r}")
    processes.per_process_batch_size(batch_size)  # found before there is data
    return build("data", node, trusted, device=device), batch_size


def build_backbone(
    node: dict[str, Any], data: Data, device: torch.device, trusted: bool = True, **given: Any
) -> Network:
    """The backbone for a data set's classes and images, on the device, in the memory format that convolutions like
    best.

    Raises:
        UserError: shipped weights that were trained on other data.
    """
    check_data(node.get("checkpoint"), data.name)
    given |= dict(num_classes=len(data.classes), image_shape=data.image_shape)
    backbone: Network = build("backbone", node, trusted, **given)
    return backbone.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
