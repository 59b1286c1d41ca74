"""The life of a run, which is begun or resumed, stopped, interrupted or finished; and what is printed at each.

Nothing here knows what a run learns. What a run's folder holds, and how it is written: ``folder.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from policyskip.backbones import Network, checkpoints
from policyskip.errors import UserError, in_one_line
from policyskip.files import damaged, shell_argument
from policyskip.runs.folder import Run, create, open_run

INITIAL_NETWORK = "start.safetensors"
"""The network that a run started from, in the folder of a run that trains it."""
CHANGEABLE = ("run.trust", "train.steps", "device", "tracking.mode")
"""The keys that can be typed when a run is resumed."""


def typed_changes() -> list[str]:
    """Return the arguments that were typed after the command, without ``run.resume=``."""
    return [argument for argument in HydraConfig.get().overrides.task if not argument.startswith("run.resume=")]


def typed_command() -> str:
    """Return the command as it was typed, without ``run.resume=``."""
    return " ".join([sys.argv[0], *typed_changes()])


def new_or_resumed(config: DictConfig) -> tuple[DictConfig, Run | None, bool]:
    """Find out from ``run.resume`` whether a run is new, and open and lock the folder of one that is resumed.

    Returns: the configuration to run with; the run, None if it is new; whether there is a checkpoint to go on from.

    Raises:
        UserError: the folder cannot be read or is in use, or a key was typed that cannot change.
    """
    resumed = OmegaConf.select(config, "run.resume")
    if resumed is None:
        return config, None, False
    run = open_run(str(resumed))
    run.lock()
    changes = typed_changes()
    for key in [change.split("=")[0] for change in changes]:
        if key not in ("run.resume", *CHANGEABLE):
            raise UserError(f"{key} cannot change when a run is resumed; only {', '.join(CHANGEABLE)} can")
    typed, saved = OmegaConf.from_dotlist(changes), saved_config(run)
    with damaged(run.folder / "config.yaml"):
        changed = OmegaConf.merge(saved, typed)
        OmegaConf.update(changed, "run.trust", config.run.trust, force_add=True)  # a folder cannot trust itself
    assert isinstance(changed, DictConfig)
    return changed, run, run.has("checkpoint.pt")


def saved_config(run: Run) -> DictConfig:
    """Read the configuration in a run's folder.

    Raises:
        UserError: the file is damaged, or holds something else.
    """
    path = run.folder / "config.yaml"
    try:
        saved = OmegaConf.load(run.path("config.yaml"))
    except Exception as error:  # readers raise exceptions of every type for damaged files
        raise UserError(f"{path} is damaged: {in_one_line(error)}") from error
    if not isinstance(saved, DictConfig):
        raise UserError(f"{path} is damaged or not ours: it must hold keys and values")
    return saved


def begin(config: DictConfig, run: Run | None, resume: bool) -> Run:
    """Make the folder of a new run, or return a resumed run, without its metrics if it had no checkpoint yet."""
    if run is None:
        run = create(config.run.dir, typed_command(), OmegaConf.to_yaml(config, resolve=True))
        if run.folder != Path(config.run.dir):
            print(f"{config.run.dir} is there already: the folder of this run is {run.folder}", flush=True)
        return run
    if not resume:
        run.rewind_metrics(0)
    return run


def record_changes(config: DictConfig, run: Run, resume: bool) -> None:
    """Write what was typed to change a resumed run into its folder."""
    if resume and typed_changes():
        save_changed_config(run, " ".join([run.command, *typed_changes()]), config)


def save_changed_config(run: Run, command: str, config: Any) -> None:
    """Write a run's configuration, under the command that it is the configuration of, into its folder."""
    run.save_config(command, OmegaConf.to_yaml(config, resolve=True))


def is_finished(run: Run, steps: int, deployed: str) -> bool:
    """Return whether a run of ``steps`` updates has written everything; it writes the file ``deployed`` last.

    Raises:
        UserError: it has done more updates than that, or a file of its folder is damaged.
    """
    if not run.has("checkpoint.pt"):
        return False
    done = run.load_checkpoint()["step"]
    if done > steps:
        raise UserError(f"{run.folder} has done {done} updates already; train.steps={steps} is below that")
    if done < steps or not all(map(run.has, ("summary.json", deployed))):
        return False
    return all(run.load_json(name).get("steps") == steps for name in {"summary.json", deployed} if ".json" in name)


def print_finished(run: Run, steps: int) -> None:
    """Say that a resumed run has nothing left to do."""
    more = f"; train.steps={2 * steps} would go on to twice as many" if steps else ""
    print(f"{run.folder} has finished its {steps} updates, and nothing is left to do{more}")


def print_stopped(command: str, run: Run) -> None:
    """Say how to go on with a run that stopped between two updates."""
    print(f"Stopped and saved. Go on with:  {_resuming(command, run)}")


def print_interrupted(command: str, run: Run) -> None:
    """Say how to go on with a run that was interrupted at once, from its last checkpoint if it has one."""
    if run.has("checkpoint.pt"):
        step = run.load_checkpoint()["step"]
        print(f"Stopped at once; what came after update {step} is not kept. Go on with:  {_resuming(command, run)}")
    else:
        print(f"Stopped at once, before anything was saved. Begin anew with:  {_resuming(command, run)}")


@contextmanager
def naming_how_to_go_on(command: str, run: Run) -> Iterator[None]:
    """Add to an error of the body, which judges and writes what a run has learned, how to try that once more.

    Raises:
        UserError: the body raised one.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}; what was learned is safe. Go on with:  {_resuming(command, run)}") from error


def _resuming(command: str, run: Run) -> str:
    return f"policyskip {command} {shell_argument('run.resume', run.folder)}"


def keep_initial_network(run: Run, network: Network, node: dict[str, Any]) -> None:
    """Save the network that a run is about to train in its folder, if it comes from a file, which may go away.

    Args:
        node: the ``backbone`` of the run's configuration.
    """
    if node.get("checkpoint") not in (checkpoints.RANDOM, None, *checkpoints.shipped()):
        checkpoints.save(network, run.folder / INITIAL_NETWORK)


def with_initial_network(content: dict[str, Any], run: Run, own_files: Sequence[str] = ()) -> dict[str, Any]:
    """Return a run's configuration, with the initial network in its folder in place of a checkpoint that is gone.

    Args:
        own_files: other files of the folder that hold a network to start from, to be used if there is no
            ``start.safetensors``.
    """
    node = content.get("backbone")
    named = node.get("checkpoint") if isinstance(node, dict) else None
    if not isinstance(named, str) or named in (checkpoints.RANDOM, *checkpoints.shipped()) or Path(named).is_file():
        return content
    for name in filter(run.has, (INITIAL_NETWORK, *own_files)):
        return {**content, "backbone": {**node, "checkpoint": str(run.path(name))}}  # type: ignore[dict-item]
    return content
