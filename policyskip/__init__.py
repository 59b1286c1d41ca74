"""policyskip: decide for each image how much of a network to run."""

from policyskip.typed import current_folder

if current_folder.is_command():
    current_folder.leave_out()  # before anything else is imported

import signal
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if current_folder.is_command():
    with suppress(ValueError):  # outside the main thread
        # Libraries take seconds to import, and are not written for an exception meanwhile: until they are imported,
        # a Ctrl-C ends the process at once. Then ``cli.py`` puts Python's own handler back.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

import gymnasium

if TYPE_CHECKING:
    from policyskip.deployment.loading import load
    from policyskip.deployment.predictors import Predictor
    from policyskip.rewards import Outcome

__version__ = "0.2.0"
__all__ = ["Outcome", "Predictor", "__version__", "load"]

gymnasium.register(
    "policyskip/BlockSelection-v0",
    entry_point="policyskip.envs.block_selection:BlockSelectionEnv",
    vector_entry_point="policyskip.envs.block_selection:BlockSelectionVectorEnv",
)
gymnasium.register(
    "policyskip/LayerSkip-v0",
    entry_point="policyskip.envs.layer_skip:LayerSkipEnv",
    vector_entry_point="policyskip.envs.layer_skip:LayerSkipVectorEnv",
)
gymnasium.register(
    "policyskip/EarlyExit-v0",
    entry_point="policyskip.envs.early_exit:EarlyExitEnv",
    vector_entry_point="policyskip.envs.early_exit:EarlyExitVectorEnv",
)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: importing torch takes seconds, and ``--help`` does not need it.

    Raises:
        AttributeError: there is no such name.
    """
    if name == "load":
        from policyskip.deployment.loading import load

        return load
    if name == "Predictor":
        from policyskip.deployment.predictors import Predictor

        return Predictor
    if name == "Outcome":
        from policyskip.rewards import Outcome

        return Outcome
    raise AttributeError(f"module 'policyskip' has no attribute {name!r}")
