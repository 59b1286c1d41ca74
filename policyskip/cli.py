"""``policyskip <command> key=value …``: each command is a Hydra app over the packaged configurations."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

USAGE = """\
policyskip: decide for each image how much of a network to run.

  policyskip train agent=blockdrop    learn a policy over a frozen network; judge it on the test split
  policyskip train agent=best_static  judge the best fixed choice of blocks; nothing is learned
  policyskip pretrain                 train a network whose blocks can be skipped
  policyskip evaluate run=runs/x      repeat a run's figures from its folder
  policyskip calibrate run=runs/x     other exit thresholds, for an accuracy or a budget
  policyskip profile                  measure where a network's time goes, and what a run really saves
  policyskip compare runs=runs        many runs side by side: tables with intervals, pictures, one HTML page
  policyskip front                    search the best fixed keep-sets of a network

Arguments are key=value, as in `policyskip train reward.penalty=2 seed=1`. `policyskip train --help` shows the
groups, `policyskip train --cfg job` every key with its value, `--multirun seed=0,1,2` runs several."""


def train(config: Any) -> int:
    """An agent learns in an environment over a backbone, and is judged on the test split."""
    from contextlib import nullcontext
    from functools import partial

    from policyskip import training
    from policyskip.build import find_device, set_up
    from policyskip.config import Settings, plain, settings_of
    from policyskip.files import damaged
    from policyskip.parallel import processes
    from policyskip.parallel.data_parallel import divide
    from policyskip.runs import lifecycle as resuming
    from policyskip.runs.tracking import Tracker
    from policyskip.tasks import dispatch as tasks

    config, run, resume = processes.first(lambda: _new_or_resumed(config))
    settings = settings_of(config, Settings)
    device = find_device(settings.device)
    if run is not None and processes.first(lambda: resuming.is_finished(run, settings.train.steps, "policy.json")):
        resuming.say_finished(run, settings.train.steps)
        return 0
    if run is None:
        config = processes.first(lambda: _with_proposed_exits(config, device, settings.seed))
    content = plain(config) if run is None else resuming.with_initial_network(plain(config), run)
    with nullcontext() if run is None else damaged(run.folder):
        setup = set_up(content, device, trusted=run is None or settings.run.trust)
        task = tasks.start(setup, settings)
    divide(task.learner, task.source)
    print(task.greeting, flush=True)
    run = processes.first(lambda: _begin(config, run, resume))
    if task.trained_network is not None and not resume and processes.is_first():
        resuming.keep_initial_network(run, task.trained_network, content["backbone"])
    group = settings.tracking.group or f"{task.names['agent']}-{task.names['data']}"
    tags = [*task.names.values(), f"seed {settings.seed}"]
    tracker = Tracker(run, settings.tracking.mode, plain(config), settings.tracking.project, group, "train", tags)
    try:
        chain = (task.learner, task.source, task.validate, task.deployable, run, tracker)
        if settings.train.steps:
            schedule = settings.train.model_dump()
            begun = partial(_record_changes, config, run, resume)
            finished = training.train(*chain, choose_by=task.choose_by, resume=resume, begun=begun, **schedule)
        else:
            finished = training.evaluate_only(*chain, resume=resume)
        if not finished:
            return _stopped("train", run)
        summary = processes.first(lambda: task.finish(run, tracker, run.load_checkpoint()["seconds"]))
    except KeyboardInterrupt:
        resuming.say_interrupted("train", run)
        return EXIT_INTERRUPTED
    finally:
        tracker.close()
    task.show(summary)
    print(f"Run folder: {run.folder}\nPictures:   {run.folder / 'plots'}\nW&B:        {tracker.where}")
    return 0


def pretrain(config: Any) -> int:
    """A CIFAR ResNet learns to classify, with stochastic depth, and is written for ``backbone.checkpoint=``."""
    from functools import partial

    from policyskip import training
    from policyskip.backbones import checkpoints
    from policyskip.backbones.resnet import CifarResNet
    from policyskip.build import build, build_backbone, build_data, find_device
    from policyskip.config import PretrainSettings, group_of, plain, settings_of
    from policyskip.data import Feed
    from policyskip.errors import UserError
    from policyskip.files import shell_argument
    from policyskip.parallel import processes
    from policyskip.parallel.data_parallel import divide
    from policyskip.pretraining import pixel_statistics
    from policyskip.runs import lifecycle as resuming
    from policyskip.runs.tracking import Tracker

    config, run, resume = processes.first(lambda: _new_or_resumed(config))
    content = plain(config)
    group_of(content, "pretrain")  # which a run of another command has not
    settings = settings_of(config, PretrainSettings)
    device = find_device(settings.device)
    if run is not None and processes.first(
        lambda: resuming.is_finished(run, settings.train.steps, "backbone.safetensors")
    ):
        resuming.say_finished(run, settings.train.steps)
        return 0
    trusted = run is None or settings.run.trust
    content = content if run is None else resuming.with_initial_network(content, run)
    data, batch_size = build_data(group_of(content, "data"), device, trusted)
    node = group_of(content, "backbone")
    if (
        node.get("checkpoint") == checkpoints.RANDOM and "mean" in node
    ):  # the held-out share of the training images is not augmented
        mean, std = pixel_statistics(data.validation)
        node["mean"], node["std"] = node.get("mean") or mean, node.get("std") or std
    backbone: Any = build_backbone(node, data, device, trusted, seed=settings.seed)
    if not isinstance(backbone, CifarResNet):
        raise UserError(f"pretrain trains CIFAR ResNets, not {backbone.name}")
    learner = build(
        "pretrain",
        group_of(content, "pretrain"),
        trusted,
        backbone=backbone,
        total_steps=settings.train.steps,
        seed=settings.seed,
    )
    feed = Feed(data.train, batch_size, "shuffled", settings.seed)
    divide(learner, feed)
    run = processes.first(lambda: _begin(config, run, resume))
    if not resume and processes.is_first():
        resuming.keep_initial_network(run, backbone, node)
    group = settings.tracking.group or f"pretrain-{data.name}"
    tags = [backbone.name, data.name, f"seed {settings.seed}"]
    weights = run.folder / "backbone.safetensors"

    def finish() -> dict[str, Any]:
        backbone.load_state_dict(run.load_best())
        checkpoints.save(backbone, weights)
        summary = dict(
            command=run.command, backbone=backbone.name, data=data.name, seed=settings.seed, steps=settings.train.steps
        )
        summary |= {"seconds": round(run.load_checkpoint()["seconds"], 1), "hash": backbone.content_hash()}
        summary |= {f"test/{key}": value for key, value in learner.accuracies(data.test).items()}
        run.save_json("summary.json", summary)
        tracker.finish(summary, [], [weights, run.folder / "summary.json"], None)
        return summary

    tracker = Tracker(run, settings.tracking.mode, content, settings.tracking.project, group, "pretrain", tags)
    try:
        finished = training.train(
            learner,
            feed,
            lambda: learner.accuracies(data.validation),
            backbone.state_dict,
            run,
            tracker,
            choose_by="accuracy",
            resume=resume,
            begun=partial(_record_changes, config, run, resume),
            **settings.train.model_dump(),
        )
        if not finished:
            return _stopped("pretrain", run)
        summary = processes.first(finish)
    except KeyboardInterrupt:
        resuming.say_interrupted("pretrain", run)
        return EXIT_INTERRUPTED
    finally:
        tracker.close()
    full, half = summary["test/accuracy"], summary["test/accuracy_half_the_blocks"]
    print(f"Test accuracy {100 * full:.2f} % with all blocks, {100 * half:.2f} % with a random half of them.")
    chosen = f"backbone=cifar_resnet backbone.depth={backbone.architecture['depth']}"
    print(f"Use it, with the same data=:  policyskip train {chosen} {shell_argument('backbone.checkpoint', weights)}")
    return 0


def evaluate(config: Any) -> int:
    """A run's best policy, judged again from its folder."""
    from policyskip.config import EvaluateSettings, settings_of
    from policyskip.files import damaged
    from policyskip.runs.folder import open_run
    from policyskip.tasks import dispatch as tasks

    asked = settings_of(config, EvaluateSettings)
    run = open_run(asked.run)
    setup = _setup_of(run, asked.device, asked.trust)
    with damaged(run.folder):
        figures = tasks.judge(setup, run, asked.split).figures
    summary = {f"{asked.split}/{key}": value for key, value in figures.items()}
    for key, value in summary.items():
        print(f"{key}: {value}")
    if asked.split == "test" and (run.folder / "summary.json").is_file():
        before = run.load_json("summary.json")
        changed = [key for key, value in summary.items() if before.get(key) != value]
        print(
            f"Differs from summary.json in {', '.join(changed)}."
            if changed
            else "Every figure is that of summary.json."
        )
    return 0


def calibrate(config: Any) -> int:
    """Other thresholds for a run that leaves early, for another target; without one, the whole curve."""
    from omegaconf import OmegaConf

    from policyskip.config import CalibrateSettings, settings_of
    from policyskip.runs.folder import open_run
    from policyskip.tasks import calibrate as exits
    from policyskip.tasks.thresholds import show_table

    asked = settings_of(config, CalibrateSettings)
    run = open_run(asked.run)
    if asked.target.given:
        run.lock()
    setup = _setup_of(run, asked.device, asked.trust)
    if asked.target.given:
        show_table(exits.recalibrate(setup, run, asked.target))
        changed = OmegaConf.merge(_saved(run), {"target": asked.target.model_dump()})  # what a resumed run aims at
        run.save_config(run.command, OmegaConf.to_yaml(changed, resolve=True))
        print(f"Written to {run.folder / 'policy.json'}; curve and pictures are in {run.folder}")
    else:
        exits.show_curve(setup, run)
        print(f"Every point is in {run.folder / 'curve.json'}; a target, such as target.macs_fraction=0.5, deploys one")
    return 0


def _with_proposed_exits(config: Any, device: Any, seed: int) -> Any:
    """The configuration with the exits of "auto N" in place, so that a run's folder says which they were."""
    from omegaconf import OmegaConf

    from policyskip.build import build_data
    from policyskip.config import group_of, plain
    from policyskip.tasks.thresholds import place_exits

    content = plain(config)
    node = group_of(content, "backbone")
    if not str(node.get("exits", "")).startswith("auto"):
        return config
    data, _ = build_data(group_of(content, "data"), device)
    node, reasons = place_exits(node, data, device, seed)
    print("proposed exits:", *reasons, sep="\n  ", flush=True)
    return OmegaConf.merge(config, {"backbone": {"exits": node["exits"]}})


def _setup_of(run: Any, device: str, trust: bool) -> Any:
    """What a run's own configuration names."""
    from policyskip.build import find_device, set_up
    from policyskip.config import Settings, plain, settings_of
    from policyskip.files import damaged
    from policyskip.runs import lifecycle as resuming

    saved = _saved(run)
    with damaged(run.folder / "config.yaml"):
        settings_of(saved, Settings)
        return set_up(resuming.with_initial_network(plain(saved), run), find_device(device), trust)


def front(config: Any) -> int:
    """The best fixed keep-set of every size, searched on validation images."""
    from pathlib import Path

    from policyskip.build import find_device, set_up
    from policyskip.config import FrontSettings, plain, settings_of
    from policyskip.static_front import keep_text
    from policyskip.tasks.fronts import static_front

    settings = settings_of(config, FrontSettings)
    setup = set_up(plain(config), find_device(settings.device))
    found = static_front(setup, settings.front)
    for keep, accuracy, macs in zip(found.sets, found.accuracy, found.macs, strict=True):
        blocks = keep_text(keep)
        print(f"{sum(keep):3d} blocks  {blocks}  {macs / 1e6:8.2f} M MACs  validation accuracy {100 * accuracy:.2f} %")
    if settings.output:
        found.save(Path(settings.output))
        print(f"Written to {settings.output}")
    return 0


def profile(config: Any) -> int:
    """Where a network's time goes on this device, and with a run, what its decisions really save."""
    from pathlib import Path

    from policyskip.build import build_backbone, build_data, find_device
    from policyskip.config import ProfileSettings, group_of, plain, settings_of
    from policyskip.errors import UserError
    from policyskip.evaluation import speed
    from policyskip.runs.folder import open_run

    asked = settings_of(config, ProfileSettings)
    device, content = find_device(asked.device), plain(config)
    if asked.run is None:
        data, _ = build_data(group_of(content, "data"), device)
        backbone = build_backbone(group_of(content, "backbone"), data, device)
        path = Path(asked.output or f"profile-{backbone.name}.json")
        return speed.of_network(backbone, data.image_shape, asked.batch_sizes, asked.repeats, path)
    run = open_run(asked.run)
    groups = [change for change in _changes() if change.startswith(("data", "backbone"))]
    if groups:
        raise UserError(f"a run has its own data and network; {groups[0]} has no effect beside run=")
    setup = _setup_of(run, asked.device, asked.trust)
    path = Path(asked.output) if asked.output else run.folder / "profile.json"
    return speed.of_run(setup, run, asked.batch_sizes, asked.repeats, asked.images, path)


def compare(config: Any) -> int:
    """Finished runs side by side: tables with intervals, pictures, and one HTML page."""
    from pathlib import Path

    from policyskip.comparison import compare as comparison
    from policyskip.comparison import sources
    from policyskip.config import CompareSettings, plain, settings_of
    from policyskip.runs.tracking import log_comparison

    asked = settings_of(config, CompareSettings)
    patterns = [asked.runs] if isinstance(asked.runs, str) else asked.runs
    made = comparison.compare(
        patterns,
        Path(asked.output),
        asked.overwrite,
        decide_again=(lambda run: sources.decide_again(_setup_of(run, asked.device, asked.trust), run))
        if asked.recompute
        else None,
        load_images=sources.ExampleImages(asked.trust) if asked.images else None,
        command=" ".join([sys.argv[0], *_changes()]),
    )
    comparison.show(made)
    tracking = asked.tracking
    logged = (made.folder, made.tables, made.pictures, tracking.mode, plain(config), tracking.project, tracking.group)
    where = log_comparison(*logged)
    print(f"Page:   {made.folder / 'index.html'}\nTables: {made.folder / 'comparison.csv'}\nW&B:    {where}")
    return 0


COMMANDS: dict[str, Callable[[Any], int]] = {
    "train": train,
    "pretrain": pretrain,
    "evaluate": evaluate,
    "calibrate": calibrate,
    "profile": profile,
    "compare": compare,
    "front": front,
}
EXIT_BAD_INPUT, EXIT_INTERRUPTED = 2, 130


def main() -> None:
    """Entry point of ``policyskip`` and ``python -m policyskip``."""
    if sys.getfilesystemencoding() == "ascii":  # LC_ALL=C PYTHONUTF8=0: paths with other letters could not be named
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return
    if arguments[0] == "--version":
        from policyskip import __version__

        print(f"policyskip {__version__}")
        return
    if arguments[0] not in COMMANDS:
        print(f"policyskip: there is no command {arguments[0]!r}; it is one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    command = sys.argv.pop(1)
    sys.argv[0] = f"policyskip {command}"
    sys.path.insert(0, os.getcwd())  # so that reward._target_=my_rewards.Mine finds my_rewards.py here
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us, and become one line
    sys.exit(_run_together(command) if command in ("train", "pretrain") and _is_one_of_several() else _run(command))


def _is_one_of_several() -> bool:
    """What torchrun tells the processes that it starts."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1")


def _run_together(command: str) -> int:
    """Be one of the processes that make a run."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # which torch reads when it is imported
    from policyskip import sweeps
    from policyskip.errors import UserError
    from policyskip.parallel import processes

    try:
        with processes.joined():
            if not sweeps.FLAGS.isdisjoint(sys.argv):
                several = UserError("--multirun makes several runs, of one process each; start it without torchrun")
                return _refuse(command, several)
            return _run(command)
    except UserError as error:
        return _refuse(command, error)


def _run(command: str) -> int:
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from policyskip import sweeps
    from policyskip.errors import UserError
    from policyskip.memory import keep_freed_memory

    keep_freed_memory()
    composed = False

    def job(config: Any) -> None:
        from policyskip.runs.folder import unlock_all
        from policyskip.tasks import dispatch as tasks  # noqa: F401 - what takes seconds to import

        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see policyskip/__init__.py
            signal.signal(signal.SIGINT, signal.default_int_handler)
        nonlocal composed
        composed = True
        told = (UserError, OmegaConfBaseException, OSError)
        try:
            if sweeps.is_one_of_many():
                status = sweeps.run_job(COMMANDS[command], config, lambda error: isinstance(error, told))
            else:
                status = COMMANDS[command](config)
        except told as error:
            status = _refuse(command, error)
        finally:
            unlock_all()
        if status:
            sys.exit(status)  # rather than return it: a sweep ends with the run that was stopped

    arguments = sorted(sys.argv[1:], key=lambda word: word not in sweeps.FLAGS)  # which Hydra wants in front
    sys.argv[1:], sweep = sweeps.prepare(command, _with_own_reward(arguments))
    app = hydra.main(config_path="pkg://policyskip.configs", config_name=command, version_base="1.3")(job)
    try:
        app()
    except SystemExit:
        if sweep and composed:
            sweeps.conclude(sweep)
        raise
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (HydraException, OmegaConfBaseException) as error:
        return _refuse(command, error)
    except Exception as error:  # Hydra's, for arguments such as agent=3 or +=+
        if composed:
            raise
        return _refuse(command, error)
    finally:
        if sweep and not composed:
            sweeps.forget(sweep)
    return sweeps.conclude(sweep) if sweep else 0


def _with_own_reward(arguments: list[str]) -> list[str]:
    """The arguments for Hydra. A reward of the user's own starts without the default's keys, and takes any."""
    if not any(argument.startswith("reward._target_=") for argument in arguments):
        return arguments
    chosen = any(argument.startswith("reward=") for argument in arguments)
    added = [f"++{argument}" if argument.startswith("reward.") else argument for argument in arguments]
    return added if chosen else ["reward=custom", *added]


def _refuse(command: str, error: Exception) -> int:
    if _is_one_of_several():
        from policyskip.parallel import processes

        if not processes.claims_error_report():
            return EXIT_BAD_INPUT
    print(f"policyskip {command}: {_in_one_line(error)}", file=sys.stderr)
    return EXIT_BAD_INPUT


def _in_one_line(error: Exception) -> str:
    """What was given and what is allowed; Hydra keeps the latter in its errors' attributes."""
    from hydra.errors import MissingConfigException
    from omegaconf import DictConfig
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError

    if isinstance(error, MissingConfigException) and error.options:
        group = str(error.missing_cfg_file).rpartition("/")[0]
        return f"there is no {error.missing_cfg_file}; {group} is one of {', '.join(error.options)}"
    cause = error.__cause__
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and isinstance(cause.parent_node, DictConfig):
        parent = str(cause.full_key).rpartition(".")[0]
        keys = sorted(key for key in map(str, cause.parent_node) if not key.startswith("_"))
        if keys:
            return f"there is no key {cause.full_key}; {f'{parent} has' if parent else 'there are'} {', '.join(keys)}"
    text = str(error).partition("Config search path:")[0]
    if text.startswith("LexerNoViableAltException"):
        argument = " ".join(text.partition(":")[2].partition("^")[0].split())
        return f"{argument} cannot be read; unusual letters go in quotes of their own: \"key='value'\""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:2]) or f"these arguments cannot be read ({type(error).__name__}); they are key=value"


def _new_or_resumed(config: Any) -> tuple[Any, Any, bool]:
    """The configuration to run with, the run folder if there is one, and whether to go on from its checkpoint."""
    from omegaconf import OmegaConf

    from policyskip.errors import UserError
    from policyskip.runs.folder import open_run

    if config.run.resume is None:
        return config, None, False
    run = open_run(config.run.resume)
    run.lock()
    allowed = ("run.resume", "run.trust", "train.steps", "device", "tracking.mode")
    changes = _changes()
    for change in changes:
        if change.split("=")[0] not in allowed:
            raise UserError(
                f"{change.split('=')[0]} cannot change when a run is resumed; only {', '.join(allowed[1:])} can"
            )
    changed = OmegaConf.merge(_saved(run), OmegaConf.from_dotlist(changes))
    OmegaConf.update(
        changed, "run.trust", config.run.trust, force_add=True
    )  # what the folder says of itself is no trust
    return changed, run, (run.folder / "checkpoint.pt").is_file()


def _saved(run: Any) -> Any:
    """The configuration in a run's folder."""
    from omegaconf import DictConfig, OmegaConf

    from policyskip.errors import UserError

    path = run.folder / "config.yaml"
    try:
        saved = OmegaConf.load(path)
    except Exception as error:  # damaged files raise whatever the reader stumbles over
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(saved, DictConfig):
        raise UserError(f"{path} is damaged or not ours: it must hold keys and values")
    return saved


def _begin(config: Any, run: Any, resume: bool) -> Any:
    """The run folder, once everything is known to be good: a new one, or the one to go on with."""
    from omegaconf import OmegaConf

    from policyskip.runs.folder import create

    if run is None:
        return create(config.run.dir, " ".join([sys.argv[0], *_changes()]), OmegaConf.to_yaml(config, resolve=True))
    if not resume:
        run.rewind_metrics(0)
    return run


def _record_changes(config: Any, run: Any, resume: bool) -> None:
    """Put what a resumed run changed into its folder, once its checkpoint has been read."""
    from omegaconf import OmegaConf

    if resume and _changes():
        run.save_config(" ".join([run.command, *_changes()]), OmegaConf.to_yaml(config, resolve=True))


def _changes() -> list[str]:
    """What was typed behind the command, less the run to go on with."""
    from hydra.core.hydra_config import HydraConfig

    return [typed for typed in HydraConfig.get().overrides.task if not typed.startswith("run.resume=")]


def _stopped(command: str, run: Any) -> int:
    from policyskip.files import shell_argument

    print(f"Stopped and saved. Go on with:  policyskip {command} {shell_argument('run.resume', run.folder)}")
    return EXIT_INTERRUPTED
