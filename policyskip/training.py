"""The one training loop: update, validate, checkpoint, resume.

It drives anything that learns from a stream of images: agents in an environment, and the networks
that ``policyskip pretrain`` makes.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from policyskip.errors import UserError
from policyskip.files import damaged
from policyskip.finite import NotFiniteError, find_nonfinite
from policyskip.memory import release_freed_memory
from policyskip.parallel import processes
from policyskip.rewards import Adaptive
from policyskip.runs.folder import Run
from policyskip.runs.tracking import Tracker


class Source(Protocol):
    """What is learned from: an environment or a feed. Its cursor is all of its state."""

    @property
    def cursor(self) -> int: ...

    def seek(self, cursor: int) -> None: ...


S = TypeVar("S", bound=Source, contravariant=True)


class Learner(Protocol[S]):
    """What learns: an agent, or a network in pretraining."""

    def update(self, source: S) -> dict[str, float]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


Show = Callable[[int, dict[str, float]], None]


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
    """Learn for ``steps`` updates; keep the best weights by validation, and enough to go on from anywhere.

    Args:
        validate: figures on the validation images; the weights with the highest ``choose_by`` are kept.
        choose_after: share of the training, in [0, 1], before which no weights are kept: of many early ones, one looks
            good by luck, and a fixed keep-set chosen on the same images looks better on them than it is.
        deployable: the tensors that are kept.
        resume: go on from the run's checkpoint.
        begun: called once, when a checkpoint has been read and learning is about to start.

    Returns: whether it finished; False after Ctrl-C or SIGTERM, with a checkpoint of that very step.

    Raises:
        UserError: numbers went wrong, or the learner was given what it cannot learn from. It says at which update, and
            which checkpoint was the last; nothing that came after that is kept.
    """
    if steps < 1 or validate_every < 1 or log_every < 1:
        raise UserError(
            f"train.steps, train.validate_every and train.log_every must be at least 1, "
            f"got {steps}, {validate_every} and {log_every}"
        )
    step, best, elapsed, window = 0, float("-inf"), 0.0, []
    reward = getattr(source, "reward", None)
    if resume:
        state = processes.first(run.load_checkpoint)
        with damaged(run.folder / "checkpoint.pt"):
            step, best, elapsed = int(state["step"]), float(state["best"]), float(state["seconds"])
            window = [{str(key): float(value) for key, value in means.items()} for means in state["window"]]
            learner.load_state_dict(state["learner"])
            source.seek(state["cursor"])
            if isinstance(reward, Adaptive):
                reward.load_state_dict(state["reward"])
        if step > steps:
            raise UserError(f"{run.folder} has done {step} updates already; train.steps={steps} is below that")
        if best > float("-inf"):  # damaged weights would be missed only at the end
            kept, own = processes.first(run.load_best), deployable()
            if {name: t.shape for name, t in kept.items()} != {name: t.shape for name, t in own.items()}:
                raise UserError(f"{run.folder / 'best.safetensors'} is not of what this run learns")
        run.rewind_metrics(step)
    if begun is not None:
        begun()
    saved = step if resume else None
    started = time.monotonic() - elapsed

    def check() -> None:
        place = find_nonfinite(learner.state_dict())
        if place is not None:
            raise NotFiniteError(f"{name_of(learner)} has non-finite numbers after update {step}, in {place}")

    def save() -> None:
        nonlocal saved
        check()
        run.save_checkpoint(
            {
                "step": step,
                "best": best,
                "seconds": time.monotonic() - started,
                "window": window,
                "cursor": source.cursor,
                "learner": learner.state_dict(),
                "reward": reward.state_dict() if isinstance(reward, Adaptive) else {},
            }
        )
        saved = step

    def last_good() -> str:
        return (
            "no checkpoint had been written"
            if saved is None
            else f"the last good checkpoint is {run.folder / 'checkpoint.pt'}, of update {saved}"
        )

    with _with_checkpoint_hint(last_good), _stop_requests() as stop_asked, _progress(steps, step) as show:
        while step < steps:
            # An optimizer's state is looked at only in the first update.
            with damaged(run.folder / "checkpoint.pt") if resume and step == saved else nullcontext():
                window.append(processes.average(learner.update(source)))
            if isinstance(reward, Adaptive):
                window[-1] |= reward.adapt(window[-1])
            step += 1
            show(step, window[-1])
            if step % log_every == 0 or step == steps:
                means = {f"train/{key}": sum(m[key] for m in window) / len(window) for key in window[0]}
                tracker.log(step, time.monotonic() - started, means)
                window = []
                release_freed_memory()
            if step % validate_every == 0 or step == steps:
                check()
                figures = processes.first(lambda: _judged(validate(), reward))
                tracker.log(step, time.monotonic() - started, {f"val/{key}": value for key, value in figures.items()})
                if figures[choose_by] > best and step >= min(choose_after, 1.0) * steps:
                    best = figures[choose_by]
                    run.save_best(deployable())
                save()
            if processes.any_process(stop_asked()):
                processes.first(save)  # nobody ends before it is done
                return step == steps
    return True


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
    """What :func:`train` does for a learner that has nothing to learn: validate once, and write the same files.

    Returns: True.
    """
    reward = getattr(source, "reward", None)
    if not resume:
        started = time.monotonic()
        figures = _judged(validate(), reward)
        seconds = time.monotonic() - started
        tracker.log(0, seconds, {f"val/{key}": value for key, value in figures.items()})
        run.save_best(deployable())
        state = {"step": 0, "seconds": seconds, "cursor": source.cursor, "learner": learner.state_dict()}
        run.save_checkpoint(state)
    return True


def name_of(learner: Any) -> str:
    """What a learner is called."""
    name = getattr(learner, "name", None)
    return name if isinstance(name, str) else type(learner).__name__.lower()


@contextmanager
def _with_checkpoint_hint(last_good: Callable[[], str]) -> Iterator[None]:
    """What goes wrong while learning is said together with what there is to go on from."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}; {last_good()}") from error
    except torch.OutOfMemoryError as error:
        raise UserError(f"the device ran out of memory; a smaller data.batch_size needs less; {last_good()}") from error
    except RuntimeError as error:
        if processes.is_lost_process(error):
            raise UserError(f"{processes.lost_process_message(error)}; {last_good()}") from error
        if "without overflow" not in str(error):  # torch's, for a learning rate that float32 does not hold
            raise
        raise UserError(f"a number of the optimizer is too large; {last_good()}") from error
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        reason = "batch normalisation of 1×1 features needs two images at least"
        raise UserError(f"{reason}: give a larger data.batch_size or larger images") from error


def _judged(figures: dict[str, Any], reward: Any) -> dict[str, Any]:
    """Figures on validation images, with where they stand in the place of a reward that moves."""
    return {**figures, "reward": reward.selection_score(figures)} if isinstance(reward, Adaptive) else figures


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a request met between updates; a second Ctrl-C interrupts at once."""
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if asked and processes.world() == 1:  # torchrun, and Slurm around it, may say the same thing twice
            raise KeyboardInterrupt
        asked = True

    try:
        previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread, where signals cannot be caught
        previous = {}
    try:
        yield lambda: asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


SHOWN = ("reward", "sampled_reward", "accuracy", "kept", "loss")


@contextmanager
def _progress(steps: int, done: int) -> Iterator[Show]:
    """A progress bar on a terminal, about twenty plain lines elsewhere; figures are running means."""
    means: dict[str, float] = {}

    def text(metrics: dict[str, float]) -> str:
        for key in SHOWN:
            if key in metrics:
                means[key] = 0.9 * means.get(key, metrics[key]) + 0.1 * metrics[key]
        return "  ".join(f"{key} {value:.3f}" for key, value in means.items())

    if sys.stdout.isatty():
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = [
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(20),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        ]
        with Progress(*columns) as bar:
            task = bar.add_task("", total=steps, completed=done)
            yield lambda step, metrics: bar.update(task, completed=step, description=text(metrics))
        return

    started, every = time.monotonic(), max(1, steps // 20)

    def show(step: int, metrics: dict[str, float]) -> None:
        line = text(metrics)
        if step % every == 0 or step == steps:
            left = (time.monotonic() - started) / (step - done) * (steps - step)
            print(f"step {step}/{steps}  {line}  {left:.0f} s left", flush=True)

    yield show
