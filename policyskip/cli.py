"""``policyskip <command> key=value …``: arguments become a Hydra job, and errors become one line.

This module must not import torch, which takes seconds: ``commands.py``, which does, is imported when a configuration is
known to be good.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from functools import partial
from types import ModuleType

import hydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from policyskip import __version__, sweeps
from policyskip.errors import (
    UserError,
    forget_users_classes,
    problem_beside_users_classes,
    traceback_hint,
    traceback_wanted,
    users_problem,
)
from policyskip.runs import progress
from policyskip.texts import one_line
from policyskip.typed import showing, streams, words

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

Arguments are key=value, as in `policyskip train reward.penalty=2 seed=1`.
`policyskip train --help` shows its groups and keys, `--cfg job` instead of
`--help` every key with its value; `--multirun seed=0,1,2` runs several.
`eval "$(policyskip --shell-completion bash)"` lets bash complete these words
(or zsh, or fish)."""
COMMANDS = ("train", "pretrain", "evaluate", "calibrate", "profile", "compare", "front")
TOGETHER = ("train", "pretrain")
"""The commands that several processes, started by torchrun, can run together."""
OWN_CLASS_GROUPS = ("agent", "backbone", "data", "env", "reward")
"""The groups that take a class of the user's own as ``GROUP._target_=``; each has a ``custom.yaml``."""
EXIT_BAD_INPUT, EXIT_INTERRUPTED = 2, 130
REFUSED = (UserError, OmegaConfBaseException, OSError)
"""Exceptions that the user can put right, so that their message is enough."""


def main() -> None:
    """Run the command that was typed, and end the process with its exit code."""
    if sys.getfilesystemencoding() == "ascii":  # LC_ALL=C PYTHONUTF8=0: paths with other letters could not be named
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    streams.make_patient()
    status = _main(sys.argv[1:])
    if (problem := streams.lost_output()) is not None:
        if not isinstance(problem, BrokenPipeError):  # whoever reads has closed it, as `| head` does
            kept = "what the command writes to files is not concerned"
            print(f"policyskip: not all output could be printed ({problem.strerror}); {kept}", file=sys.stderr)
        status = status or streams.EXIT_OUTPUT_LOST
    sys.exit(status)


def _main(arguments: list[str]) -> int:
    """Show what was asked for, or run a command; return the exit code."""
    command = arguments[0] if arguments else "help"
    if command in ("-h", "--help", "help"):
        print(showing.folded(USAGE))
    elif command == "--version":
        print(f"policyskip {__version__}")
    elif command == "--shell-completion":
        shell = "".join(arguments[1:2])
        if shell not in showing.SCRIPTS:
            return _say(f"policyskip: --shell-completion is followed by one of {', '.join(showing.SCRIPTS)}")
        print(showing.SCRIPTS[shell])
    elif command == "--complete":
        print(*showing.completions(COMMANDS), sep="\n")
    elif command not in COMMANDS:
        known = ", ".join(COMMANDS)
        return _say(f"policyskip: there is no command {one_line(repr(command))}; it is one of {known}")
    elif not {"-h", "--help"}.isdisjoint(arguments):
        print(showing.help_of(command))
    else:
        try:
            os.getcwd()
        except OSError:
            return _say(f"policyskip {command}: the current folder has been deleted; cd to one that is there")
        sys.argv[:2] = [f"policyskip {command}"]
        os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra raises its errors, for us to print in one line
        os.environ["MPLBACKEND"] = "agg"  # a notebook's does not exist here, and pictures go to files
        return _run_together(command) if command in TOGETHER and _is_one_of_several() else _run(command)
    return 0


def _say(line: str) -> int:
    """Print a refusal; return its exit code."""
    print(line, file=sys.stderr)
    return EXIT_BAD_INPUT


def _commands() -> ModuleType:
    """Import the commands, which takes seconds; from then on a Ctrl-C is an exception again (see ``__init__.py``)."""
    here = os.getcwd()
    os.chdir(os.path.dirname(os.__file__))  # for matplotlib would read a matplotlibrc of the current folder
    try:
        importlib.import_module("matplotlib")
    finally:
        os.chdir(here)
    from policyskip import commands

    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return commands


def _is_one_of_several() -> bool:
    """Return whether torchrun has started several processes, of which this is one."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1")


def _run_together(command: str) -> int:
    """Run a command in this process and, together with it, in the others that torchrun has started.

    Returns: the exit code.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch reads it when it is imported
    try:
        with _commands().processes.joined():
            if not sweeps.FLAGS.isdisjoint(sys.argv):
                message = "--multirun makes several runs, of one process each; start it without torchrun"
                return _refuse(command, UserError(message))  # while the processes are joined, so that one prints it
            return _run(command)
    except UserError as error:
        return _refuse(command, error)


def _run(command: str) -> int:
    """Compose the configuration from what was typed, and run the command, or each job of a sweep, with it.

    Returns: the exit code.
    """
    composed = False

    def job(config: DictConfig) -> None:
        nonlocal composed
        forget_users_classes()
        progress.show()
        with progress.waiting("loading PyTorch"):
            run_command = partial(_commands().run_command, command)
        composed = True
        try:
            if sweeps.is_one_of_many():
                status = sweeps.run_job(run_command, config, lambda error: isinstance(error, REFUSED))
            else:
                status = run_command(config)
        except Exception as error:
            if not isinstance(error, REFUSED) and not (users_problem(error) or problem_beside_users_classes(error)):
                raise
            status = _refuse(command, error)
        if status:
            sys.exit(status)  # rather than return it: a sweep ends with the run that was stopped

    try:
        arguments = words.checked(command, sys.argv[1:])
        sys.argv[1:], sweep = sweeps.prepare(command, with_own_classes(arguments))
    except UserError as error:
        return _refuse(command, error)
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


def with_own_classes(arguments: list[str]) -> list[str]:
    """Let ``GROUP._target_=`` put a class of the user's own in the place of a group's default.

    Such a group starts without the default's keys, unless ``GROUP=`` is typed too, and takes any key that is typed.

    Returns: the arguments for Hydra.
    """
    for group in OWN_CLASS_GROUPS:
        if any(argument.startswith(f"{group}._target_=") for argument in arguments):
            chosen = any(argument.startswith(f"{group}=") for argument in arguments)
            added = [f"++{argument}" if argument.startswith(f"{group}.") else argument for argument in arguments]
            flags = [argument for argument in added if argument in sweeps.FLAGS]
            others = [argument for argument in added if argument not in sweeps.FLAGS]
            arguments = [*flags, *([] if chosen else [f"{group}=custom"]), *others]
    return arguments


def _refuse(command: str, error: Exception) -> int:
    """Print an error in one line, below its traceback if that is wanted; of several processes, only one does.

    Returns: the exit code.
    """
    if _is_one_of_several() and not _commands().processes.claims_error_report():
        return EXIT_BAD_INPUT
    if traceback_wanted():
        traceback.print_exception(error)
    beside = None if isinstance(error, REFUSED) else problem_beside_users_classes(error)
    line = users_problem(error) or beside or _in_one_line(error)
    lines = [one_line(part, 1000) for part in f"{line}{traceback_hint(error)}".splitlines()]
    return _say("\n".join([f"policyskip {command}: {lines[0]}", *lines[1:]]))


def _in_one_line(error: Exception) -> str:
    """Say what was typed and what is allowed; Hydra keeps the latter in its errors' attributes."""
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
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:2]) or f"these arguments cannot be read ({type(error).__name__}); they are key=value"
