"""The life of a run, which is begun or resumed, stopped, interrupted or finished; and what is printed at each.

Nothing here knows what a run learns. What a run's folder holds, and how it is written: ``folder.py``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from policyskip.backbones import Network, checkpoints
from policyskip.config import plain
from policyskip.errors import UserError
from policyskip.files import shell_argument
from policyskip.runs import stored_config
from policyskip.runs.folder import Run, create, open_run
from policyskip.typed.words import MOVED

INITIAL_NETWORK = "start.safetensors"
"""The network that a run started from, in the folder of a run that trains it."""
CHANGEABLE = ("run.trust", "train.steps", "device", "tracking.mode", "execution")
"""The keys that can be typed when a run is resumed, beside those of :data:`~policyskip.typed.words.MOVED`."""


def typed_changes() -> list[str]:
    """Return the arguments that were typed after the command, without ``run.resume=``."""
    return [argument for argument in HydraConfig.get().overrides.task if not argument.startswith("run.resume=")]


def typed_command() -> str:
    """Return the command as it was typed, without ``run.resume=``."""
    return " ".join([sys.argv[0], *typed_changes()])


def new_or_resumed(config: DictConfig) -> tuple[dict[str, Any], Run | None, bool]:
    """Find out from ``run.resume`` whether a run is new, and open and lock the folder of one that is resumed.

    Returns: the configuration to run with; the run, None if it is new; whether there is a checkpoint to go on from.

    Raises:
        UserError: the folder cannot be read or is in use, a key was typed that cannot change, or a new run's folder
            cannot be made.
    """
    resumed = OmegaConf.select(config, "run.resume")
    if resumed is None:
        content = plain(config)
        check_new_folder("run.dir", content["run"]["dir"])
        return content, None, False
    if not isinstance(resumed, str):
        raise UserError(f"run.resume must be a run folder, got {resumed!r}; a folder of that name is typed as a path")
    run = open_run(resumed)
    run.lock()
    changed = saved_config(run)
    for key in [change.lstrip("+").split("=")[0] for change in typed_changes()]:
        if key not in (*CHANGEABLE, *MOVED):
            raise UserError(f"{key} cannot change when a run is resumed; only {', '.join((*CHANGEABLE, *MOVED))} can")
        group, _, name = key.rpartition(".")
        node = changed.setdefault(group, {}) if group else changed
        if isinstance(node, dict):
            node[name] = OmegaConf.select(config, key)
    if isinstance(changed.setdefault("run", {}), dict):
        changed["run"]["trust"] = OmegaConf.select(config, "run.trust")  # a folder cannot trust itself
    return changed, run, run.has("checkpoint.pt")


def check_kind(run: Run, content: dict[str, Any], pretrained: bool) -> None:
    """Refuse a run of ``pretrain`` where one of ``train`` is needed, and the other way round.

    Args:
        content: the run's configuration.
        pretrained: whether a run of ``pretrain`` is needed.

    Raises:
        UserError: the message says what can be done with the run.
    """
    if ("pretrain" in content) == pretrained:
        return
    if pretrained:
        raise UserError(f"{run.folder} is a run of train; go on with:  {_resuming('train', run)}")
    weights = shell_argument("backbone.checkpoint", run.folder / "backbone.safetensors")
    raise UserError(
        f"{run.folder} is a run of pretrain, in which no agent decides; go on with:  {_resuming('pretrain', run)}  or "
        f"use its network:  {weights}"
    )


def moved(content: dict[str, Any]) -> dict[str, Any]:
    """Return the groups of a resumed run's configuration with those of their keys that were typed."""
    keys = [key for key in (change.lstrip("+").split("=")[0] for change in typed_changes()) if key in MOVED]
    typed: dict[str, Any] = {}
    for group, _, name in (key.partition(".") for key in keys):
        typed.setdefault(group, {})[name] = content[group][name]
    return typed


def check_new_folder(key: str, folder: Any) -> None:
    """Refuse a folder that cannot be made: one that holds the current folder, or a path through something else.

    Args:
        key: the configuration key that has it.

    Raises:
        UserError: naming the key and the folder.
    """
    if not isinstance(folder, str) or not folder.strip():
        raise UserError(f"{key} must be a folder to make, got {folder!r}")
    path = Path(os.path.expanduser(folder))
    if path.resolve() in (here := Path.cwd().resolve(), *here.parents):
        raise UserError(f"{key}={folder} is no folder of its own; name one that is to be made")
    _check_parents(key, path)


def check_new_file(key: str, file: str) -> None:
    """Refuse a path that cannot become a JSON file, or is a file of something else, before anything is computed for it.

    Raises:
        UserError: naming the key and the path.
    """
    path = Path(file)
    if path.exists() and not path.is_file():
        raise UserError(f"{key}={file} is there, and is no file; say a file to write")
    with suppress(FileNotFoundError, PermissionError), path.open("rb") as old:  # else it is reported when it is written
        if old.read(1) not in (b"", b"{"):
            raise UserError(f"{key}={file} is there, and is no JSON file; it would be lost, so say another one")
    _check_parents(key, path.parent)


def _check_parents(key: str, folder: Path) -> None:
    """Refuse (UserError) a folder that neither is there nor can be made, because a part of its path is no folder."""
    there = next((parent for parent in (folder, *folder.parents) if parent.exists()), folder)
    if there.exists() and not there.is_dir():
        raise UserError(f"{key} cannot be below {there}, which is no folder")


def saved_config(run: Run) -> dict[str, Any]:
    """Read the configuration in a run's folder.

    Raises:
        UserError: the file is damaged, or holds something else.
    """
    return stored_config.read(run.path("config.yaml"))


def begin(content: dict[str, Any], run: Run | None, resume: bool) -> Run:
    """Make the folder of a new run, or return a resumed run, without its metrics if it had no checkpoint yet."""
    if run is None:
        folder = content["run"]["dir"]
        run = create(folder, typed_command(), stored_config.to_yaml(content))
        if run.folder != Path(folder):
            print(f"{folder} is there already: the folder of this run is {run.folder}", flush=True)
        return run
    if not resume:
        run.rewind_metrics(0)
    return run


def record_changes(content: dict[str, Any], run: Run, resume: bool) -> None:
    """Write what was typed to change a resumed run into its folder."""
    if resume and typed_changes():
        save_changed_config(run, " ".join([run.command, *typed_changes()]), content)


def save_changed_config(run: Run, command: str, content: dict[str, Any]) -> None:
    """Write a run's configuration, under the command that it is the configuration of, into its folder."""
    run.save_config(command, stored_config.to_yaml(content))


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


def print_interrupted(command: str, run: Run, steps: int) -> None:
    """Say how to go on, from its last checkpoint, with a run of ``steps`` updates that was interrupted at once."""
    if run.has("checkpoint.pt"):
        step = run.load_checkpoint()["step"]
        kept = f"what came after update {step} is not kept" if step < steps else f"all {steps} updates are saved"
        print(f"Stopped at once; {kept}. Go on with:  {_resuming(command, run)}")
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

    Raises:
        UserError: the checkpoint is a file that is gone, and the folder has no initial network.
    """
    node = content.get("backbone")
    named = node.get("checkpoint") if isinstance(node, dict) else None
    if (
        not isinstance(named, str)
        or named in (checkpoints.RANDOM, *checkpoints.shipped())
        or Path(os.path.expanduser(named)).is_file()
    ):
        return content
    for name in filter(run.has, (INITIAL_NETWORK, *own_files)):
        return {**content, "backbone": {**node, "checkpoint": str(run.path(name))}}  # type: ignore[dict-item]
    if Path(named).suffix:  # else it may be the name of torchvision's weights
        raise UserError(
            f"the run's network {named} is not there any more; say backbone.checkpoint=FILE if it has moved"
        )
    return content
