"""The commands: each composes what its configuration names, calls it, and prints what came of it.

This module imports torch and all of policyskip, which takes seconds: ``cli.py`` imports it when a configuration is
known to be good. Every command takes the configuration that Hydra composed, and returns its exit code.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from policyskip import training
from policyskip.build import Setup, build_backbone, build_data, set_up
from policyskip.comparison import compare as comparison
from policyskip.comparison import sources
from policyskip.config import (
    MOVABLE,
    CalibrateSettings,
    CompareSettings,
    EvaluateSettings,
    FrontSettings,
    PretrainSettings,
    ProfileSettings,
    Settings,
    expand_home,
    group_of,
    plain,
    settings_of,
)
from policyskip.deployment.policy_files import read_policy
from policyskip.errors import UserError, users_problem
from policyskip.evaluation import speed
from policyskip.evaluation.figures import class_figures
from policyskip.evaluation.tables import show_classes, show_rivals
from policyskip.execution.ways import How
from policyskip.files import shell_argument
from policyskip.memory import is_out_of_memory, keep_freed_memory
from policyskip.parallel import processes
from policyskip.parallel.data_parallel import divide
from policyskip.parallel.devices import find_device
from policyskip.runs import lifecycle, own_code, stored_config
from policyskip.runs.folder import Run, open_run, unlock_all
from policyskip.runs.labels import labels_of
from policyskip.runs.tracking import Tracker, log_comparison
from policyskip.static_front.table import describe
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
    expand_home(config)
    try:
        return COMMANDS[name](config)
    except SystemExit as error:  # no command raises it; to the shell, it would look like success
        raise UserError(users_problem(error) or f"something called sys.exit({error.code!r})") from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError("the memory does not suffice; smaller batches, images or networks need less") from error
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
    make_task: Callable[[dict[str, Any], Any, torch.device, Run | None], tuple[dict[str, Any], Task]],
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
    content, run, resume = processes.first(lambda: lifecycle.new_or_resumed(config))
    if run is not None:
        lifecycle.check_kind(run, content, pretrained=section is PretrainSettings)
    settings = settings_of(content, section)
    device, steps = find_device(settings.device), settings.train.steps
    labels_of(settings.tracking, None, command)  # labels that W&B would refuse are refused before there is a folder
    if run is not None and processes.first(partial(lifecycle.is_finished, run, steps, deployed)):
        lifecycle.print_finished(run, steps)
        return 0
    content, task = make_task(content, settings, device, run)
    steps = settings.train.steps  # 0 for an agent that has nothing to learn
    divide(task.learner, task.source)
    if run is not None and resume and steps:  # before anything in its folder changes
        training.restored(task.learner, task.source, task.deployable, run, steps)
    print(task.greeting, flush=True)
    run = processes.first(partial(lifecycle.begin, content, run, resume))
    if task.trained_network is not None and not resume and processes.is_first():
        lifecycle.keep_initial_network(run, task.trained_network, group_of(content, "backbone"))
    if processes.is_first():
        own_code.keep(run)
        task.keep_what_may_go(run)
    group = f"{task.names.get('agent', command)}-{task.names['data']}"
    tags = [*task.names.values(), f"seed {settings.seed}"]
    labels = labels_of(settings.tracking, group, command, tags, lifecycle.typed_changes())
    tracker = Tracker(run, settings.tracking.mode, content, labels)
    try:
        with closing(tracker):
            chain = (task.learner, task.source, task.validate, task.deployable, run, tracker)
            if steps:
                begun = partial(lifecycle.record_changes, content, run, resume)
                schedule = settings.train.model_dump()
                finished = training.train(*chain, choose_by=task.choose_by, resume=resume, begun=begun, **schedule)
            else:
                finished = training.evaluate_only(*chain, resume=resume)
            if not finished:
                lifecycle.print_stopped(command, run)
                return EXIT_INTERRUPTED
            with lifecycle.naming_how_to_go_on(command, run):
                summary = processes.first(lambda: task.finish(run, tracker, run.load_checkpoint()["seconds"]))
    except KeyboardInterrupt:
        lifecycle.print_interrupted(command, run, steps)
        return EXIT_INTERRUPTED
    task.show(summary)
    print(closing_lines(task, run, tracker))
    return 0


def _agent_task(
    content: dict[str, Any], settings: Settings, device: torch.device, run: Run | None
) -> tuple[dict[str, Any], Task]:
    """Make the task of ``train``.

    Returns: the configuration, which for a new run with exits of "auto N" names these exits, and the task.
    """
    built = None
    content = dispatch.without_idle_steps(content, settings, run is None or settings.run.trust)
    if run is not None:
        setup = _set_up_saved(content, run, device, settings.run.trust, lifecycle.moved(content))
    else:
        node = group_of(content, "backbone")
        if str(node.get("exits", "")).startswith("auto"):
            built = build_data(group_of(content, "data"), device)
            node = processes.first(partial(_with_placed_exits, node, built[0], device, settings.seed))
            content = {**content, "backbone": {**group_of(content, "backbone"), "exits": node["exits"]}}
        setup = set_up(content, device, built=built)
    return content, dispatch.start(setup, settings, run)


def _with_placed_exits(node: dict[str, Any], data: Any, device: torch.device, seed: int) -> dict[str, Any]:
    """Return a ``backbone`` node with exits in place of "auto N", and print why each exit is where it is."""
    node, reasons = place_exits(node, data, device, seed)
    print("proposed exits:", *reasons, sep="\n  ", flush=True)
    return node


def _pretrain_task(
    content: dict[str, Any], settings: PretrainSettings, device: torch.device, run: Run | None
) -> tuple[dict[str, Any], Task]:
    """Make the task of ``pretrain``."""
    trusted, built = run is None or settings.run.trust, content
    if run is not None:
        built = lifecycle.with_initial_network(stored_config.buildable(content, trusted, lifecycle.moved(content)), run)
    return content, PretrainTask(built, settings, device, trusted)


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
    setup = _setup_of(run := open_run(settings.run), settings, plain(config))
    judgement = dispatch.judge(setup, run, settings.split)
    summary = {f"{settings.split}/{key}": value for key, value in judgement.figures.items()}
    print(*(f"{key}: {value}" for key, value in summary.items() if not key.endswith("/rivals")), sep="\n")
    show_rivals(judgement.figures)
    show_classes(class_figures(judgement.decisions))
    if settings.split != "test":
        print(f"No verdict on {settings.split} images: it takes images on which nothing was learned or chosen.")
    if settings.split == "test" and run.has("summary.json"):
        before = run.load_json("summary.json")
        known = summary if "test/verdict" in before else before  # older versions said nothing of rivals
        changed = [key for key, value in summary.items() if key in known and before.get(key) != value]
        differs = f"Differs from summary.json in {', '.join(changed)}; judged in {setup.how.precision}."
        print(differs if changed else "Every figure is that of summary.json.")
    return 0


def calibrate(config: DictConfig) -> int:
    """Choose other thresholds for a run that leaves early, for a target; without one, show the whole curve."""
    settings = settings_of(config, CalibrateSettings)
    run = open_run(settings.run)
    if settings.target.chosen:
        run.lock()
    setup = _setup_of(run, settings, plain(config))
    if not settings.target.chosen:
        calibration.show_curve(setup, run)
        print(f"Every point is in {run.folder / 'curve.json'}; a target, such as target.macs_fraction=0.5, deploys one")
        return 0
    show_table(calibration.recalibrate(setup, run, settings.target))
    print(f"Written to {run.folder / 'policy.json'}; curve and pictures are in {run.folder}")
    return 0


def front(config: DictConfig) -> int:
    """Search the best fixed keep-sets of every cost on validation images."""
    settings = settings_of(config, FrontSettings)
    if settings.output:
        lifecycle.check_new_file("output", settings.output)
    best = static_front(set_up(plain(config), find_device(settings.device)), settings.front)
    print(*describe(best), sep="\n")
    if settings.output:
        best.save(Path(settings.output))
        print(f"Written to {settings.output}")
    return 0


def profile(config: DictConfig) -> int:
    """Measure where a network's time goes on this device, and with a run, what its decisions really save.

    Raises:
        UserError: what the settings name cannot be built.
    """
    settings, content = settings_of(config, ProfileSettings), plain(config)
    if settings.output:
        lifecycle.check_new_file("output", settings.output)
    device, how = find_device(settings.device), How(settings.execution, settings.precision or "float32")
    if settings.run is None:
        data, _ = build_data(group_of(content, "data"), device)
        backbone = build_backbone(group_of(content, "backbone"), data, device)
        path = Path(settings.output or f"profile-{backbone.name}.json")
        return speed.of_network(backbone, data.image_shape, settings.batch_sizes, settings.repeats, path, how)
    run = open_run(settings.run)
    setup = _setup_of(run, settings, content)
    given = Path(settings.output) if settings.output else None
    return speed.of_run(setup, run, settings.batch_sizes, settings.repeats, settings.images, given)


def compare(config: DictConfig) -> int:
    """Show finished runs side by side: tables with intervals, pictures, and one HTML page."""
    settings, typed = settings_of(config, CompareSettings), plain(config)
    lifecycle.check_new_folder("output", settings.output)
    labels = labels_of(settings.tracking, None, "compare", ["comparison"])

    def decide_again(run: Run) -> Any:
        return sources.decide_again(_setup_of(run, settings, typed), run)

    made = comparison.compare(
        [settings.runs] if isinstance(settings.runs, str) else settings.runs,
        Path(settings.output),
        settings.overwrite,
        decide_again=decide_again if settings.recompute else None,
        load_images=sources.ExampleImages(settings.trust, _groups(typed)) if settings.images else None,
        command=lifecycle.typed_command(),
    )
    comparison.show(made)
    where = log_comparison(made.folder, made.tables, made.pictures, settings.tracking.mode, typed, labels)
    print(f"Page:   {made.folder / 'index.html'}\nTables: {made.folder / 'comparison.csv'}\nW&B:    {where}")
    return 0


def _groups(content: dict[str, Any]) -> dict[str, Any]:
    """Return what a configuration has of the groups that can be typed beside ``run=``."""
    return {group: content[group] for group in MOVABLE if isinstance(content.get(group), dict)}


def _setup_of(run: Run, settings: Any, typed: dict[str, Any]) -> Setup:
    """Build what the configuration in a run's folder names, with what was typed of its data and its network.

    Args:
        settings: of a command that has ``device``, ``execution``, ``precision`` and ``trust``.

    Raises:
        UserError: the weights that were typed are of another network.
    """
    saved = lifecycle.saved_config(run)
    lifecycle.check_kind(run, saved, pretrained=False)
    settings_of(saved, Settings)
    saved = {**saved, "execution": settings.execution, "precision": settings.precision or saved.get("precision")}
    setup = _set_up_saved(saved, run, find_device(settings.device), settings.trust, groups := _groups(typed))
    if "checkpoint" in groups.get("backbone", {}) and run.has("policy.json"):
        network = read_policy(run).network
        if "config" in network and network["hash"] != setup.backbone.content_hash():
            named = groups["backbone"]["checkpoint"]
            raise UserError(f"backbone.checkpoint={named} holds another network than the one that {run.folder} is over")
    return setup


def _set_up_saved(content: dict[str, Any], run: Run, device: torch.device, trust: bool, typed: dict[str, Any]) -> Setup:
    """Build what a run's configuration names; its initial network comes from its folder if the checkpoint is gone.

    ``network.safetensors`` is the initial network too, or is replaced by the weights of a checkpoint, unless gates were
    trained together with it.
    """
    content = stored_config.buildable(content, trust, typed)
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
