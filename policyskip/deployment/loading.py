"""``policyskip.load`` makes a predictor from a run folder.

Loading executes nothing that a run folder names: a policy, network or rule is one of the package's own, or one of an
installed entry point, or the user says ``trust=True``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from policyskip import registry
from policyskip.data.base import check_types
from policyskip.deployment.networks import built, load_state, network_of
from policyskip.deployment.policy_files import Family, PolicyFile, damaged_policy, read_policy
from policyskip.deployment.policy_schema import check_agreement, check_arguments
from policyskip.deployment.predictors import ExitPredictor, GatedPredictor, Predictor, ThresholdPredictor
from policyskip.deployment.profiling import device_name
from policyskip.errors import UserError, first_line, in_one_line, users_problem
from policyskip.execution.ways import DEFAULT, How
from policyskip.exits.rules import check_thresholds
from policyskip.memory import keep_freed_memory
from policyskip.parallel.devices import usual_defaults
from policyskip.policies.base import Policy
from policyskip.policies.fixed import FixedPolicy, OraclePolicy, RandomPolicy
from policyskip.policies.networks import ConstantPolicy, PolicyNetwork
from policyskip.policies.perceptrons import BlockPolicy, ExitPolicy, LookPolicy
from policyskip.policies.thresholds import ThresholdPolicy
from policyskip.runs.folder import Run, open_run
from policyskip.texts import one_line

OWN_POLICIES = {
    policy.__name__: policy
    for policy in (
        *(PolicyNetwork, ConstantPolicy, FixedPolicy, RandomPolicy, OraclePolicy),
        *(LookPolicy, BlockPolicy, ExitPolicy),
    )
}
"""The package's own policies, by the names that ``policy.json`` has for them."""


def load(
    run: str | Path,
    backbone: str | Path | None = None,
    device: str = "cpu",
    precision: str | None = None,
    planned: bool = True,
    trust: bool = False,
    execution: str = "auto",
) -> Predictor | GatedPredictor | ExitPredictor:
    """Load what a run learned: a :class:`Predictor`, a :class:`GatedPredictor` or an :class:`ExitPredictor`.

    From then on the process keeps freed memory (see ``memory.py``).

    Args:
        run: the run folder.
        backbone: where the network's weights are now, if they have moved since.
        precision: "float32", "float32_exact" (on a GPU, without TF32), or "bfloat16" or "float16" for the network; a
            policy in front of it stays as it is. None: the run's own. In another, decisions and answers can differ
            from those that the run was judged by; see docs/speed.md.
        planned: go by what ``policyskip profile run=…`` measured, if it did: a block that nearly all images of a batch
            keep is then computed for all of them. False computes no block for an image that skips it.
        trust: import policies, networks and rules that the run names and that are neither the package's own nor
            installed as entry points. This executes their code.
        execution: "auto", "kernel", "gather" or "dense"; see docs/speed.md.

    Raises:
        UserError: there is no run folder, a file is damaged, something that the run names is not installed here, the
            precision or device does not exist, or the network's weights are not those the policy was trained with.
    """
    check_types(run=(run, str | Path), backbone=(backbone, str | Path | None))
    check_types(planned=(planned, bool), trust=(trust, bool))
    How(execution, "float32" if precision is None else precision).checked()
    _check_device(device)
    keep_freed_memory()
    opened = open_run(os.path.expanduser(run))
    how = How(execution, own_precision(opened) if precision is None else precision).checked()
    with usual_defaults():
        predictor = load_predictor(opened, device, backbone and os.path.expanduser(backbone), trust, how)
        if isinstance(predictor, Predictor) and planned:
            predictor.plan = _plan(opened, predictor)
    return predictor


def own_precision(run: Run) -> str:
    """Return the precision that a run was judged in; float32 for runs of older versions, which knew no other.

    Raises:
        UserError: the run's ``config.yaml`` is damaged.
    """
    from policyskip.runs import stored_config  # needs OmegaConf, which `import policyskip` does not

    return str(stored_config.read(run.path("config.yaml")).get("precision") or "float32")


def _check_device(device: str | torch.device) -> None:
    """Refuse (UserError) a device that is not here, or that holds no numbers."""
    try:
        kind = torch.empty(0, device=device).device.type
    except (RuntimeError, AssertionError, TypeError, ValueError, ImportError) as error:
        raise UserError(f"there is no device {one_line(device, 60)} here: {one_line(first_line(error))}") from error
    if kind == "meta":
        raise UserError("the device meta holds no numbers, so nothing can be predicted there; say cpu or cuda")


def load_predictor(
    run: Run,
    device: str | torch.device,
    backbone: str | Path | None = None,
    trust: bool = False,
    how: How = DEFAULT,
) -> Predictor | GatedPredictor | ExitPredictor:
    """Build a run's predictor on a device, without a plan. The arguments are those of :func:`load`; ``how`` holds
    execution and precision.

    Raises:
        UserError: as for :func:`load`.
    """
    file = read_policy(run)
    if backbone is not None and "config" not in file.network:
        raise UserError(
            f"the run {run.folder} brings its own network, network.safetensors; backbone={backbone} has no effect"
        )
    if file.policy.get("name") == OraclePolicy.__name__:
        raise UserError(
            f"the run {run.folder} is an oracle's, which sees the label: there is nothing to load for other images"
        )
    with registry.trusting(trust):
        try:
            if backbone is not None:
                file.network["config"] = {**file.network["config"], "checkpoint": str(backbone)}
            network = network_of(run, file, trust)
            check_agreement(file.policy.get("arguments", {}), network, len(file.classes))
            predictor = LOADERS[file.family](run, file, network.to(device), device, how)
            _try_once(run, file, predictor)
            return predictor
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            if isinstance(error, UserError) or users_problem(error):
                raise
            raise damaged_policy(run, error) from error


@torch.no_grad()
def _try_once(run: Run, file: PolicyFile, predictor: Predictor | GatedPredictor | ExitPredictor) -> None:
    """Let a predictor answer one black image, so that what cannot work is refused now and not at the first image.

    Raises:
        UserError: the policy decides with something else than bool (1, K), or a class of the user's own fails.
        ValueError: what the file says makes no policy.
    """
    name = str(file.policy.get("name", ""))
    image = torch.zeros(1, *file.image_shape, dtype=torch.uint8)
    try:
        decisions = predictor.ran(predictor.predict(image))
    except Exception as error:  # a policy from a file may fail in any way
        if isinstance(error, UserError) or users_problem(error):
            raise
        raise ValueError(f"the policy cannot decide for an image: {in_one_line(error)}") from error
    if isinstance(predictor, Predictor):
        expected = (1, predictor.backbone.num_blocks)
        if decisions.dtype != torch.bool or tuple(decisions.shape) != expected:
            found = f"{str(decisions.dtype).removeprefix('torch.')} {tuple(decisions.shape)}"
            raise UserError(
                f"the policy {one_line(name, 80)} must decide with bool {expected} for an image, got {found}"
            )


def load_thresholds(
    run: Run, device: str | torch.device, trust: bool = False, how: How = DEFAULT
) -> ThresholdPredictor:
    """Build the predictor of a run that leaves early by thresholds.

    Raises:
        UserError: the run has no thresholds; and as for :func:`load`.
    """
    family = read_policy(run).family
    if family == "exit_policy":
        raise UserError(f"the run {run.folder} leaves early by a learned policy; it has no thresholds")
    if family != "thresholds":
        raise UserError(f"the run {run.folder} skips blocks; it has no exits")
    predictor = load_predictor(run, device, trust=trust, how=how)
    assert isinstance(predictor, ThresholdPredictor)
    return predictor


def _load_blocks(run: Run, file: PolicyFile, network: Any, device: str | torch.device, how: How) -> Predictor:
    policy = _policy_of(run, file.policy["name"], file.policy)
    return Predictor(policy.to(device), network, file.classes, file.image_shape, float(file.policy["macs"]), how)


def _load_gates(run: Run, file: PolicyFile, network: Any, device: str | torch.device, how: How) -> GatedPredictor:
    return GatedPredictor(network, file.classes, file.image_shape, how)


def _load_thresholds(
    run: Run, file: PolicyFile, network: Any, device: str | torch.device, how: How
) -> ThresholdPredictor:
    thresholds = [float(threshold) for threshold in file.policy["thresholds"]]
    check_thresholds(thresholds, network.num_exits)
    policy = ThresholdPolicy(str(file.policy["rule"]), thresholds).to(device)
    return ThresholdPredictor(policy, str(file.policy["search"]), network, file.classes, file.image_shape, how)


def _load_exit_policy(run: Run, file: PolicyFile, network: Any, device: str | torch.device, how: How) -> ExitPredictor:
    policy: Any = _policy_of(run, file.policy.get("name", ExitPolicy.__name__), file.policy)
    return ExitPredictor(policy.to(device), network, file.classes, file.image_shape, float(file.policy["macs"]), how)


LOADERS: dict[Family, Callable[..., Predictor | GatedPredictor | ExitPredictor]] = {
    "blocks": _load_blocks,
    "gates": _load_gates,
    "thresholds": _load_thresholds,
    "exit_policy": _load_exit_policy,
}


def _policy_of(run: Run, name: str, entry: dict[str, Any]) -> Policy:
    """Build a run's policy with its best weights.

    Raises:
        UserError: its class is not installed here, it sees the label, or the weights do not fit it.
    """
    kind = OWN_POLICIES.get(str(name)) or registry.resolve("policy", str(name))
    arguments = dict(entry["arguments"])
    if str(name) in OWN_POLICIES:
        check_arguments(kind, arguments)
    needed = stored = sum(value.numel() for value in run.load_best().values())
    with suppress(Exception), torch.device("meta"):  # so that a file that lies about its size takes no memory
        needed = sum(value.numel() for value in kind(**arguments).state_dict().values())
    if needed != stored:  # equal for policies that look at numbers while they are made: they cannot be made like that
        raise UserError(
            f"{run.folder / 'best.safetensors'} does not fit policy.json: it holds {stored} numbers, not {needed}"
        )
    policy = built(run, name, kind, arguments)
    if not isinstance(policy, Policy):
        raise UserError(f"{name} of {run.folder / 'policy.json'} gives no policy")
    load_weights(policy, run)
    return policy


def load_weights(module: nn.Module, run: Run, described: str = "policy.json") -> None:
    """Put a run's best weights into a module that was built as ``described``.

    Raises:
        UserError: the weights are damaged, not finite, or of another module.
    """
    load_state(module, run.load_best(), run, described)


def load_best_so_far(module: nn.Module, run: Run) -> None:
    """Put the best weights of a run that has learned, and is not finished yet, into what its ``config.yaml`` names.

    Raises:
        UserError: the weights are damaged, not finite, or of another module.
    """
    load_state(module, run.load_best_so_far(), run, "the run's config.yaml", run.best_so_far)


def _plan(run: Run, predictor: Predictor) -> dict[int, list[float]]:
    """Read what ``policyskip profile run=…`` measured; empty if that was for another network or another device.

    Raises:
        UserError: the file is damaged.
    """
    if not run.has("profile.json"):
        return {}
    content = run.load_json("profile.json")
    network = predictor.backbone
    try:
        here = (read_policy(run).network["hash"], device_name(network.mean.device), torch.get_num_threads())
        if (content["hash"], content["device"], content["threads"]) != here:
            return {}
        if content.get("execution", {}).get("precision", "float32") != "float32":
            return {}
        plan = {
            int(size): [float(share) for share in times["break_even"]] for size, times in content["batches"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{run.folder / 'profile.json'} is damaged; `policyskip profile run=` makes it anew") from error
    return {size: shares for size, shares in plan.items() if len(shares) == network.num_blocks}
