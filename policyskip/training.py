"""The one training loop, which updates, validates, writes checkpoints and resumes.

It drives everything that learns from a stream of images: agents in an environment, and the networks that
``policyskip pretrain`` trains.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from torch import Tensor

from policyskip.errors import UserError, users_problem
from policyskip.finite import NotFiniteError, described, find_nonfinite, unusual
from policyskip.memory import is_out_of_memory, release_freed_memory
from policyskip.parallel import processes
from policyskip.parallel.deferred import MOST_UPDATES, Deferred, Figure, fetched
from policyskip.rewards import Adaptive
from policyskip.runs import progress as screen
from policyskip.runs.folder import Run
from policyskip.runs.restore import Progress, restore
from policyskip.runs.tracking import Tracker


class Source(Protocol):
    """An environment or a feed that a learner learns from; its cursor is all of its state."""

    @property
    def cursor(self) -> int: ...

    def seek(self, cursor: int) -> None: ...


S = TypeVar("S", bound=Source, contravariant=True)


class Learner(Protocol[S]):
    """Anything that learns: an agent, or a network in pretraining."""

    def update(self, source: S) -> Mapping[str, Figure]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def train(
    learner: Learner[S],
    source: S,
    validate: Callable[[], dict[str, Any]],
    deployable: Callable[[], dict[str, Tensor]],
    run: Run,
    tracker: Tracker,
    *,
    steps: int,
    validate_every: int,
    log_every: int = 10,
    choose_after: float = 0.0,
    choose_by: str = "reward",
    resume: bool = False,
    begun: Callable[[], None] | None = None,
) -> bool:
    """Learn for ``steps`` updates; keep the best weights by validation, and enough to go on from any update.

    Args:
        validate: returns figures on the validation images; the weights with the highest ``choose_by`` are kept.
        choose_after: fraction of the training, in [0, 1], before which no weights are kept: of many early ones, one
            looks good by luck, and a fixed keep-set chosen on the same images looks better on them than it is.
        deployable: returns the tensors that are kept.
        resume: go on from the run's checkpoint.
        begun: called once, when a checkpoint has been read and learning is about to start.

    Returns: whether it finished; False after Ctrl-C or SIGTERM, with a checkpoint of that very step.

    Raises:
        UserError: numbers went wrong, or the learner cannot learn from what it was given. The message says at which
            update, and which checkpoint was the last; nothing that came after that checkpoint is kept.
    """
    if steps < 1 or validate_every < 1 or log_every < 1:
        raise UserError(
            f"train.steps, train.validate_every and train.log_every must be at least 1, "
            f"got {steps}, {validate_every} and {log_every}"
        )
    reward = getattr(source, "reward", None)
    adaptive = reward if isinstance(reward, Adaptive) else None
    progress = Progress()
    if resume:
        progress = restored(learner, source, deployable, run, steps)
        run.rewind_metrics(progress.step)
    step, best = progress.step, progress.best
    window: list[dict[str, Any]] = [*progress.window]
    deferred = Deferred()
    unread = 0  # the last updates of the window, whose figures may still be on the device
    if begun is not None:
        begun()
    saved_step = step if resume else None
    started = time.monotonic() - progress.seconds

    def read() -> None:
        """Read the figures of the last updates from the device, and whether something was wrong in them."""
        nonlocal unread
        if (problem := deferred.first_problem()) is not None:
            raise NotFiniteError(f"{problem}, as was found after update {step}")
        window[len(window) - unread :] = fetched(window[len(window) - unread :])
        unread = 0

    def check() -> None:
        name = find_nonfinite(learner.state_dict())
        if name is not None:
            raise NotFiniteError(f"{name_of(learner)} has non-finite numbers after update {step}, in {name}")

    def save() -> None:
        nonlocal saved_step
        read()
        check()
        run.save_checkpoint(
            {
                "step": step,
                "best": best,
                "seconds": time.monotonic() - started,
                "window": window,
                "cursor": source.cursor,
                "learner": learner.state_dict(),
                "reward": {} if adaptive is None else adaptive.state_dict(),
            }
        )
        saved_step = step

    def last_good() -> str:
        return (
            "no checkpoint had been written"
            if saved_step is None
            else f"the last good checkpoint is {run.folder / 'checkpoint.pt'}, of update {saved_step}"
        )

    with _with_checkpoint_hint(last_good), _stop_requests() as stop_requested, screen.updates(steps, step) as show:
        while step < steps:
            with deferred.during(step + 1):
                figures = dict(processes.average(_updated(learner, source)))
                if adaptive is not None:
                    known = figures if getattr(adaptive, "takes_tensors", False) else fetched([figures])[0]
                    figures = known | adaptive.adapt(known)
            window.append(figures)
            step, unread = step + 1, unread + 1
            fresh = unread
            due = step % log_every == 0 or step % validate_every == 0 or step == steps
            if due or _is_known(figures) or unread == MOST_UPDATES:
                read()
            show(step, [] if unread else window[len(window) - fresh :])
            if step % log_every == 0 or step == steps:
                means = {f"train/{key}": sum(m[key] for m in window) / len(window) for key in _common(window)}
                tracker.log(step, time.monotonic() - started, means)
                window.clear()
                release_freed_memory()
            if step % validate_every == 0 or step == steps:
                check()
                with screen.waiting("validating"):
                    judged = processes.first(lambda: _with_selection_score(validate(), adaptive))
                tracker.log(step, time.monotonic() - started, {f"val/{key}": value for key, value in judged.items()})
                if judged[choose_by] > best and step >= min(choose_after, 1.0) * steps:
                    best = judged[choose_by]
                    run.save_best(deployable())
                save()
            if processes.any_process(stop_requested()):
                processes.first(save)  # no process ends before the first one has saved
                return step == steps
    tracker.chosen = _chosen_figures(run, choose_by, best, min(choose_after, 1.0) * steps)
    return True


def _chosen_figures(run: Run, choose_by: str, best: float, first_step: float) -> dict[str, float]:
    """Return the validation figures, as they were logged, of the weights that were kept: the first with the best."""
    for record in run.metrics():
        if record["step"] >= first_step and record.get(f"val/{choose_by}") == best:
            figures = {key: value for key, value in record.items() if key.startswith("val/")}
            return {key: value for key, value in figures.items() if isinstance(value, int | float)}
    return {}


def restored(
    learner: Learner[S], source: S, deployable: Callable[[], dict[str, Tensor]], run: Run, steps: int
) -> Progress:
    """Restore a learner and what it learns from from a run's checkpoint; in the run's folder nothing changes.

    Returns: how far the run has come.

    Raises:
        UserError: the checkpoint or the best weights are damaged or do not fit; more than ``steps`` updates are done.
    """
    state, reward = processes.first(run.load_checkpoint), getattr(source, "reward", None)
    adaptive = reward if isinstance(reward, Adaptive) else None
    progress = restore(state, run.folder / "checkpoint.pt", learner, source, adaptive)
    if progress.step > steps:
        raise UserError(f"{run.folder} has done {progress.step} updates already; train.steps={steps} is below that")
    if progress.best > float("-inf"):  # best weights that are damaged would be noticed only at the end
        best, own = processes.first(run.load_best_so_far), deployable()
        path = run.folder / run.best_so_far
        if {name: (t.shape, t.dtype) for name, t in best.items()} != {n: (t.shape, t.dtype) for n, t in own.items()}:
            raise UserError(f"{path} is not of what this run learns")
        if (name := find_nonfinite(best)) is not None:
            raise UserError(f"{path} cannot be used: {name} holds numbers that are not finite")
    return progress


def evaluate_only(
    learner: Learner[S],
    source: S,
    validate: Callable[[], dict[str, Any]],
    deployable: Callable[[], dict[str, Tensor]],
    run: Run,
    tracker: Tracker,
    *,
    resume: bool = False,
) -> bool:
    """Validate a learner that has nothing to learn once, and write the files that :func:`train` writes.

    Returns: True.
    """
    reward = getattr(source, "reward", None)
    if not resume:
        started = time.monotonic()
        with screen.waiting("validating"):
            figures = _with_selection_score(validate(), reward if isinstance(reward, Adaptive) else None)
        seconds = time.monotonic() - started
        tracker.log(0, seconds, {f"val/{key}": value for key, value in figures.items()})
        run.save_best(deployable())
        state = {"step": 0, "seconds": seconds, "cursor": source.cursor, "learner": learner.state_dict()}
        run.save_checkpoint(state)
    return True


def _updated(learner: Any, source: Source) -> dict[str, Figure]:
    """Let a learner take an update, and return its figures.

    Raises:
        UserError: they are not numbers by name.
    """
    figures = learner.update(source)
    wanted = f"update of {name_of(learner)} must return numbers by name"
    if not isinstance(figures, dict):
        raise UserError(f"{wanted}, a dictionary, got {figures!r:.80}")
    for key, value in figures.items():
        if not isinstance(key, str) or not _is_figure(value):
            got = (
                described(value, f" {unusual(value) or ''}".rstrip()) if isinstance(value, Tensor) else f"{value!r:.80}"
            )
            raise UserError(f"{wanted}, got {got} by the name {key!r:.80}")
    # Many updates' figures are held at once, and a loss would hold all that its gradient needs.
    return {key: value.detach() if isinstance(value, Tensor) else value for key, value in figures.items()}


def _is_figure(value: Any) -> bool:
    """Return whether a value is a real number, or a tensor of one, of shape ()."""
    if isinstance(value, Tensor):
        return unusual(value) is None and value.dim() == 0
    return isinstance(value, int | float)


def _is_known(figures: dict[str, Any]) -> bool:
    """Return whether the figures of an update are numbers, and not tensors on a device."""
    return not any(isinstance(value, Tensor) for value in figures.values())


def _common(window: list[dict[str, Any]]) -> list[str]:
    """Return the names of the figures that every update of a window has."""
    return [key for key in window[0] if all(key in figures for figures in window)]


def name_of(learner: Any) -> str:
    """Return a learner's ``name``; without one, the name of its class."""
    name = getattr(learner, "name", None)
    return name if isinstance(name, str) else type(learner).__name__.lower()


@contextmanager
def _with_checkpoint_hint(last_good: Callable[[], str]) -> Iterator[None]:
    """Add what ``last_good`` says of the last checkpoint to what goes wrong while learning.

    Raises:
        UserError: the body raised one, or an exception that the user can do something about.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, UserError) and "more than 1 value per channel" in str(error):
            raise UserError(ONE_IMAGE) from error
        problem = _problem(error)
        if problem is None:
            raise
        raise UserError(f"{problem}; {last_good()}") from error


def _problem(error: Exception) -> str | None:
    """Describe an exception of an update that the user can do something about; None for every other one."""
    if isinstance(error, UserError):
        return str(error)
    if is_out_of_memory(error):
        return "the device ran out of memory; a smaller data.batch_size needs less"
    if isinstance(error, RuntimeError) and processes.is_lost_process(error):
        return processes.lost_process_message(error)
    if isinstance(error, RuntimeError) and "without overflow" in str(error):  # torch's, for a rate beyond float32
        return "a number of the optimizer is too large"
    return users_problem(error)


def _with_selection_score(figures: dict[str, Any], reward: Adaptive | None) -> dict[str, Any]:
    """Return validation figures; under a reward that adapts, with its selection score as the ``reward``."""
    return figures if reward is None else {**figures, "reward": reward.selection_score(figures)}


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Note the first Ctrl-C or SIGTERM, for the loop to stop between updates; a second Ctrl-C interrupts at once.

    Yields: a function that returns whether a stop was requested.
    """
    requested = False

    def request(number: int, frame: object) -> None:
        nonlocal requested
        if requested and processes.world() == 1:  # torchrun, and Slurm around it, may send one request twice
            raise KeyboardInterrupt
        requested = True

    try:
        previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread, where signals cannot be caught
        previous = {}
    try:
        yield lambda: requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


ONE_IMAGE = (
    "batch normalisation of 1×1 features needs two images at least: give a larger data.batch_size or larger images"
)
