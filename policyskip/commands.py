"""The commands: each composes what its configuration names, calls it, and prints what came of it.

This module imports torch and all of policyskip, which takes seconds: ``cli.py`` imports it when a configuration is
known to be good. Every command takes the configuration that Hydra composed, and returns its exit code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from policyskip import training
from policyskip.build import Setup, build_backbone, build_data, set_up
from policyskip.comparison import compare as comparison
from policyskip.comparison import sources
from policyskip.config import (
    CalibrateSettings,
    CompareSettings,
    EvaluateSettings,
    FrontSettings,
    PretrainSettings,
    ProfileSettings,
    Settings,
    group_of,
    plain,
    settings_of,
)
from policyskip.errors import UserError, users_problem
from policyskip.evaluation import speed
from policyskip.evaluation.figures import class_figures
from policyskip.evaluation.tables import show_classes
from policyskip.files import shell_argument
from policyskip.memory import keep_freed_memory
from policyskip.parallel import processes
from policyskip.parallel.data_parallel import divide
from policyskip.parallel.devices import find_device
from policyskip.runs import lifecycle
from policyskip.runs.folder import Run, open_run, unlock_all
from policyskip.runs.tracking import Tracker, log_comparison
from policyskip.static_front import keep_text
from policyskip.tasks import calibrate as calibration
from policyskip.tasks import dispatch
from policyskip.tasks.base import Task
from policyskip.tasks.fronts import static_front
from policyskip.tasks.pretrain import DEPLOYED, PretrainTask
from policyskip.tasks.thresholds import place_exits, show_table

EXIT_INTERRUPTED = 130


def run_command(name: str, config: DictConfig) -> int:
    """Run a command by its name, and release the run folders that it has locked.

    Raises:
        UserError: the command cannot do what the configuration says; or a class of the user's own called ``sys.exit``.
    """
    keep_freed_memory()
    try:
        return COMMANDS[name](config)
    except SystemExit as error:  # no command raises it; to the shell, it would look like success
        raise UserError(users_problem(error) or f"something called sys.exit({error.code!r})") from error
    finally:
        unlock_all()


def train(config: DictConfig) -> int:
    """Let an agent learn in an environment over a backbone, and judge the agent on the test split."""
    return _run_course("train", config, Settings, _agent_task, "policy.json", _where_things_are)


def pretrain(config: DictConfig) -> int:
    """Let a CIFAR ResNet learn with stochastic depth, and write the network for ``backbone.checkpoint=``."""
    return _run_course("pretrain", config, PretrainSettings, _pretrain_task, DEPLOYED, _how_to_use_backbone)


def _run_course(
    command: str,
    config: DictConfig,
    section: type[Settings],
    make_task: Callable[[DictConfig, Any, torch.device, Run | None], tuple[DictConfig, Task]],
    deployed: str,
    closing_lines: Callable[[Task, Run, Tracker], str],
) -> int:
    """Take a run from its configuration to its finished folder, or resume it and go on from where it stopped.

    Args:
        section: the settings of the command.
        make_task: makes the task, and returns it behind the configuration to write into the run's folder; it gets the
            run's folder if the run is resumed.
        deployed: the file of the folder that the task writes last.
        closing_lines: what is printed below the figures of a finished run.

    Raises:
        UserError: everything that can be refused is refused before a run folder is made.
    """
    config, run, resume = processes.first(lambda: lifecycle.new_or_resumed(config))
    settings = settings_of(config, section)
    device, steps = find_device(settings.device), settings.train.steps
    if run is not None and processes.first(partial(lifecycle.is_finished, run, steps, deployed)):
        lifecycle.print_finished(run, steps)
        return 0
    config, task = make_task(config, settings, device, run)
    divide(task.learner, task.source)
    print(task.greeting, flush=True)
    run = processes.first(partial(lifecycle.begin, config, run, resume))
    content = plain(config)
    if task.trained_network is not None and not resume and processes.is_first():
        lifecycle.keep_initial_network(run, task.trained_network, group_of(content, "backbone"))
    group = settings.tracking.group or f"{task.names.get('agent', command)}-{task.names['data']}"
    tags = [*task.names.values(), f"seed {settings.seed}"]
    tracker = Tracker(run, settings.tracking.mode, content, settings.tracking.project, group, command, tags)
    try:
        chain = (task.learner, task.source, task.validate, task.deployable, run, tracker)
        if steps:
            begun = partial(lifecycle.record_changes, config, run, resume)
            schedule = settings.train.model_dump()
            finished = training.train(*chain, choose_by=task.choose_by, resume=resume, begun=begun, **schedule)
        else:
            finished = training.evaluate_only(*chain, resume=resume)
        if not finished:
            lifecycle.print_stopped(command, run)
            return EXIT_INTERRUPTED
        summary = processes.first(lambda: task.finish(run, tracker, run.load_checkpoint()["seconds"]))
    except KeyboardInterrupt:
        lifecycle.print_interrupted(command, run)
        return EXIT_INTERRUPTED
    finally:
        tracker.close()
    task.show(summary)
    print(closing_lines(task, run, tracker))
    return 0


def _agent_task(
    config: DictConfig, settings: Settings, device: torch.device, run: Run | None
) -> tuple[DictConfig, Task]:
    """Make the task of ``train``.

    Returns: the configuration, which for a new run with exits of "auto N" names these exits, and the task.
    """
    content, built = plain(config), None
    if run is not None:
        setup = _set_up_saved(content, run, device, settings.run.trust)
    else:
        node = group_of(content, "backbone")
        if str(node.get("exits", "")).startswith("auto"):
            built = build_data(group_of(content, "data"), device)
            node = processes.first(partial(_with_placed_exits, node, built[0], device, settings.seed))
            config = OmegaConf.merge(config, {"backbone": {"exits": node["exits"]}})  # type: ignore[assignment]
        setup = set_up(plain(config), device, built=built)
    return config, dispatch.start(setup, settings)


def _with_placed_exits(node: dict[str, Any], data: Any, device: torch.device, seed: int) -> dict[str, Any]:
    """Return a ``backbone`` node with exits in place of "auto N", and print why each exit is where it is."""
    node, reasons = place_exits(node, data, device, seed)
    print("proposed exits:", *reasons, sep="\n  ", flush=True)
    return node


def _pretrain_task(
    config: DictConfig, settings: PretrainSettings, device: torch.device, run: Run | None
) -> tuple[DictConfig, Task]:
    """Make the task of ``pretrain``."""
    content = plain(config) if run is None else lifecycle.with_initial_network(plain(config), run)
    return config, PretrainTask(content, settings, device, trusted=run is None or settings.run.trust)


def _where_things_are(task: Task, run: Run, tracker: Tracker) -> str:
    """Return the lines below the table of a finished ``train`` run."""
    return f"Run folder: {run.folder}\nPictures:   {run.folder / 'plots'}\nW&B:        {tracker.where}"


def _how_to_use_backbone(task: Task, run: Run, tracker: Tracker) -> str:
    """Return the line below the accuracies of a finished ``pretrain`` run."""
    assert task.trained_network is not None
    chosen = f"backbone=cifar_resnet backbone.depth={task.trained_network.architecture['depth']}"
    weights = shell_argument("backbone.checkpoint", run.folder / DEPLOYED)
    return f"Use it, with the same data=:  policyskip train {chosen} {weights}"


def evaluate(config: DictConfig) -> int:
    """Judge a run's best policy again, from its folder."""
    settings = settings_of(config, EvaluateSettings)
    run = open_run(settings.run)
    judgement = dispatch.judge(_setup_of(run, settings.device, settings.trust), run, settings.split)
    summary = {f"{settings.split}/{key}": value for key, value in judgement.figures.items()}
    for key, value in summary.items():
        print(f"{key}: {value}")
    show_classes(class_figures(judgement.decisions))
    if settings.split == "test" and (run.folder / "summary.json").is_file():
        before = run.load_json("summary.json")
        changed = [key for key, value in summary.items() if before.get(key) != value]
        same = "Every figure is that of summary.json."
        print(f"Differs from summary.json in {', '.join(changed)}." if changed else same)
    return 0


def calibrate(config: DictConfig) -> int:
    """Choose other thresholds for a run that leaves early, for a target; without one, show the whole curve."""
    settings = settings_of(config, CalibrateSettings)
    run = open_run(settings.run)
    if settings.target.chosen:
        run.lock()
    setup = _setup_of(run, settings.device, settings.trust)
    if not settings.target.chosen:
        calibration.show_curve(setup, run)
        print(f"Every point is in {run.folder / 'curve.json'}; a target, such as target.macs_fraction=0.5, deploys one")
        return 0
    show_table(calibration.recalibrate(setup, run, settings.target))
    changed = OmegaConf.merge(lifecycle.saved_config(run), {"target": settings.target.model_dump()})
    lifecycle.save_changed_config(run, run.command, changed)  # a resumed run keeps to the target
    print(f"Written to {run.folder / 'policy.json'}; curve and pictures are in {run.folder}")
    return 0


def front(config: DictConfig) -> int:
    """Search the best fixed keep-set of every size on validation images."""
    settings = settings_of(config, FrontSettings)
    best = static_front(set_up(plain(config), find_device(settings.device)), settings.front)
    for keep, accuracy, macs in zip(best.sets, best.accuracy, best.macs, strict=True):
        size = f"{sum(keep):3d} blocks  {keep_text(keep)}  {macs / 1e6:8.2f} M MACs"
        print(f"{size}  validation accuracy {100 * accuracy:.2f} %")
    if settings.output:
        best.save(Path(settings.output))
        print(f"Written to {settings.output}")
    return 0


def profile(config: DictConfig) -> int:
    """Measure where a network's time goes on this device, and with a run, what its decisions really save.

    Raises:
        UserError: ``data`` or ``backbone`` was typed beside ``run=``, or what the settings name cannot be built.
    """
    settings = settings_of(config, ProfileSettings)
    device, content = find_device(settings.device), plain(config)
    if settings.run is None:
        data, _ = build_data(group_of(content, "data"), device)
        backbone = build_backbone(group_of(content, "backbone"), data, device)
        path = Path(settings.output or f"profile-{backbone.name}.json")
        return speed.of_network(backbone, data.image_shape, settings.batch_sizes, settings.repeats, path)
    run = open_run(settings.run)
    groups = [change for change in lifecycle.typed_changes() if change.lstrip("+~").startswith(("data", "backbone"))]
    if groups:
        raise UserError(f"a run has its own data and network; {groups[0]} has no effect beside run=")
    setup = _setup_of(run, settings.device, settings.trust)
    path = Path(settings.output) if settings.output else run.folder / "profile.json"
    return speed.of_run(setup, run, settings.batch_sizes, settings.repeats, settings.images, path)


def compare(config: DictConfig) -> int:
    """Show finished runs side by side: tables with intervals, pictures, and one HTML page."""
    settings = settings_of(config, CompareSettings)

    def decide_again(run: Run) -> Any:
        return sources.decide_again(_setup_of(run, settings.device, settings.trust), run)

    made = comparison.compare(
        [settings.runs] if isinstance(settings.runs, str) else settings.runs,
        Path(settings.output),
        settings.overwrite,
        decide_again=decide_again if settings.recompute else None,
        load_images=sources.ExampleImages(settings.trust) if settings.images else None,
        command=lifecycle.typed_command(),
    )
    comparison.show(made)
    tracking = settings.tracking
    logged = (made.folder, made.tables, made.pictures, tracking.mode, plain(config), tracking.project, tracking.group)
    where = log_comparison(*logged)
    print(f"Page:   {made.folder / 'index.html'}\nTables: {made.folder / 'comparison.csv'}\nW&B:    {where}")
    return 0


def _setup_of(run: Run, device: str, trust: bool) -> Setup:
    """Build what the configuration in a run's folder names."""
    saved = lifecycle.saved_config(run)
    settings_of(saved, Settings)
    return _set_up_saved(plain(saved), run, find_device(device), trust)


def _set_up_saved(content: dict[str, Any], run: Run, device: torch.device, trust: bool) -> Setup:
    """Build what a run's configuration names; its initial network comes from its folder if the checkpoint is gone.

    ``network.safetensors`` is the initial network too, or is replaced by the weights of a checkpoint, unless gates were
    trained together with it.
    """
    gated = dispatch.agent_class(content, trust).family == "gates"
    content = lifecycle.with_initial_network(content, run, () if gated else ("network.safetensors",))
    return set_up(content, device, trust)


COMMANDS: dict[str, Callable[[DictConfig], int]] = {
    "train": train,
    "pretrain": pretrain,
    "evaluate": evaluate,
    "calibrate": calibrate,
    "profile": profile,
    "compare": compare,
    "front": front,
}
