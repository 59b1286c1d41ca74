"""Going on with a run, and ending one, from the command line's point of view: what there is, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from policyskip.backbones import Network, checkpoints
from policyskip.errors import UserError
from policyskip.files import damaged, shell_argument
from policyskip.runs.folder import Run

START = "start.safetensors"
"""The network that a run started from, in the folder of a run that trains it."""


def is_finished(run: Run, steps: int, deployed: str) -> bool:
    """Whether a run of ``steps`` updates has written everything, of which the file ``deployed`` comes last.

    Raises:
        UserError: it has done more updates than that, or a file of it is damaged.
    """
    if not (run.folder / "checkpoint.pt").is_file():
        return False
    with damaged(run.folder / "checkpoint.pt"):
        done = int(run.load_checkpoint()["step"])
    if done > steps:
        raise UserError(f"{run.folder} has done {done} updates already; train.steps={steps} is below that")
    if done < steps or not all((run.folder / name).is_file() for name in ("summary.json", deployed)):
        return False
    return all(run.load_json(name).get("steps") == steps for name in {"summary.json", deployed} if ".json" in name)


def say_finished(run: Run, steps: int) -> None:
    """What a finished run's resumption says."""
    more = f"; train.steps={2 * steps} would go on to twice as many" if steps else ""
    print(f"{run.folder} has finished its {steps} updates, and nothing is left to do{more}")


def say_interrupted(command: str, run: Run) -> None:
    """What is said after an interruption that waited for nothing: what there is to go on from, if anything."""
    again = f"policyskip {command} {shell_argument('run.resume', run.folder)}"
    if (run.folder / "checkpoint.pt").is_file():
        step = run.load_checkpoint().get("step")
        print(f"Stopped at once; what came after update {step} is not kept. Go on with:  {again}")
    else:
        print(f"Stopped at once, before anything was saved. Begin anew with:  {again}")


def keep_initial_network(run: Run, network: Network, node: dict[str, Any]) -> None:
    """Put the network that a run trains into its folder as it is now, if it comes from a file that may go away."""
    if node.get("checkpoint") not in (checkpoints.RANDOM, None, *checkpoints.shipped()):
        checkpoints.save(network, run.folder / START)


def with_initial_network(content: dict[str, Any], run: Run) -> dict[str, Any]:
    """A run's configuration; its network comes from the run's own folder if the file that it names is gone."""
    node = content.get("backbone")
    named = node.get("checkpoint") if isinstance(node, dict) else None
    if not isinstance(named, str) or named in (checkpoints.RANDOM, *checkpoints.shipped()) or Path(named).is_file():
        return content
    # What SkipNet has trained is no start; where images leave early, weights come from elsewhere in the folder.
    trained = () if str((content.get("agent") or {}).get("_target_")).endswith(".SkipNet") else ("network.safetensors",)
    own = next((run.folder / name for name in (START, *trained) if (run.folder / name).is_file()), None)
    return content if own is None else {**content, "backbone": {**node, "checkpoint": str(own)}}  # type: ignore[dict-item]
