"""The hyper-parameters of Stable-Baselines3 are checked here; SB3 itself would stumble over them while it learns."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from policyskip.errors import UserError

RESERVED = {"self", "policy", "env", "policy_kwargs", "seed", "device", "verbose", "tensorboard_log", "use_sde"}
RESERVED |= {"stats_window_size", "sde_sample_freq", "rollout_buffer_class", "rollout_buffer_kwargs"}
RESERVED |= {"replay_buffer_class", "replay_buffer_kwargs", "optimize_memory_usage", "_init_setup_model"}
"""Arguments of SB3's learners that ``sb3.py`` chooses; every other argument is a key of ``agent``."""


def checked_hyperparameters(
    learner: type, name: str, hyperparameters: dict[str, Any], optional: Sequence[str]
) -> dict[str, Any]:
    """Return the hyper-parameters of a learner, each of the type that the learner declares.

    Args:
        learner: SB3's class.
        name: the agent's, for messages.
        hyperparameters: as they were typed; Hydra leaves ``1e-3`` a string, which becomes a number.
        optional: those that may be None beside those whose default is None.

    Raises:
        UserError: the learner has no such hyper-parameter, or it is of another type.
    """
    parameters = inspect.signature(learner.__init__).parameters  # type: ignore[misc]
    allowed = sorted(set(parameters) - RESERVED)
    unknown = [key for key in hyperparameters if key not in allowed]
    if unknown:
        raise UserError(f"agent has no key {unknown[0]}; {name} takes {', '.join(allowed)}")
    checked = {}
    for key, value in hyperparameters.items():
        default = parameters[key].default
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                raise UserError(f"agent.{key} must be a number, got {value!r}") from None
        if not (value is None and (default is None or key in optional)):
            kinds = {bool: (bool,), int: (int,)}.get(parameters[key].annotation, (int, float))
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                what = "true or false" if bool in kinds else "a whole number" if float not in kinds else "a number"
                raise UserError(f"agent.{key} must be {what}, got {value!r:.80}")
        checked[key] = value
    return checked
