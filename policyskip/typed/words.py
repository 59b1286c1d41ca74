"""The words behind a command are checked here before Hydra sees them.

Hydra has keys and flags that reach outside a command's own configuration: other files, search paths, its own output.
None of them is needed, and what cannot be read is answered with what to type.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException

from policyskip.errors import UserError
from policyskip.files import shell_argument
from policyskip.texts import one_line

FLAGS = {"-h": 0, "--help": 0, "-m": 0, "--multirun": 0, "--resolve": 0, "-c": 1, "--cfg": 1, "-p": 1, "--package": 1}
"""The flags that a command takes, with the number of words that follow each."""
HYDRA_KEYS = ("hydra/launcher", "hydra.launcher", "hydra/sweeper", "hydra.sweeper")
"""The keys of Hydra's own that can be typed, or the beginning of them; see docs/scaling.md."""
OF_RUNS = ("evaluate", "calibrate", "compare")
"""The commands that take data and network from run folders; ``profile`` is one of them if it has ``run=``."""
RESUMABLE = ("train", "pretrain")
MOVED = ("data.root", "data.download", "backbone.checkpoint")
"""The keys that can be typed beside ``run.resume=`` for data and weights that are no longer where they were."""
FOLDERS = {"evaluate": "run", "calibrate": "run", "profile": "run", "compare": "runs"}
"""The key that a folder typed without a key was meant for."""
NEEDED = ("agent", "data", "backbone")
"""The groups that cannot be left out with ``~``."""
RUN_KEYS = ("run", "runs", "run.resume", "run.dir", "output")
"""The keys whose values are names of files and folders, so that a number or ``true`` is probably a mistake."""


@cache
def groups() -> dict[str, tuple[str, ...]]:
    """Return the groups of all commands, such as ``agent``, with the names that each can be set to."""
    folders = [entry for entry in resources.files("policyskip.configs").iterdir() if entry.is_dir()]
    names = {
        folder.name: sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name[-5:] == ".yaml")
        for folder in folders
    }
    return {name: tuple(options) for name, options in sorted(names.items()) if options}


def defaults_of(command: str) -> dict[str, str]:
    """Return the groups that a command's configuration has, with the name that each is set to by default."""
    text = resources.files("policyskip.configs").joinpath(f"{command}.yaml").read_text("utf-8")
    entries = yaml.safe_load(text)["defaults"]
    return {group: name for entry in entries if isinstance(entry, dict) for group, name in entry.items()}


def checked(command: str, typed: list[str]) -> list[str]:
    """Return the words for Hydra of those that were typed behind a command.

    Raises:
        UserError: a word is no flag or ``key=value`` of the command, or cannot be read.
    """
    flags, words, following = [], [], 0
    for word in typed:
        if any("\ud800" <= letter <= "\udfff" for letter in word):
            raise UserError(
                f"{one_line(word)} is not UTF-8; rename what it names: all names are read and written as UTF-8"
            )
        if following or word in FLAGS or word.startswith("--cfg="):
            following = following - 1 if following else FLAGS.get(word, 0)
            flags.append(word)
        else:
            words.append(_without_hyphens(word))
    printing = any(flag in ("-c", "--cfg") or flag.startswith("--cfg=") for flag in flags)
    if not printing and (alone := [flag for flag in flags if flag in ("-p", "--package", "--resolve")]):
        raise UserError(f"{alone[0]} goes with --cfg job, which prints the configuration and runs nothing")
    overrides = [_read(command, word) for word in words]
    for override in overrides:
        _check(override)
    return [*flags, *_beside_runs(command, overrides)]


def _without_hyphens(word: str) -> str:
    """Return ``key=value`` for ``--key=value``, which sweeps of W&B write.

    Raises:
        UserError: the word is a flag that no command takes.
    """
    if not word.startswith("-"):
        return word
    key, equals, _ = word.partition("=")
    if not equals or not re.fullmatch(r"--[A-Za-z_][\w./]*", key) or key.startswith("--config"):
        raise UserError(
            f"there is no flag {one_line(key)}; arguments are key=value (a sweep of W&B writes them so with "
            "${args_no_hyphens} in its command), and the flags are --help, --cfg job and --multirun"
        )
    return word.removeprefix("--")


def _read(command: str, word: str) -> Override:
    """Return what ``key=value`` says, or say what to type in its place (UserError)."""
    key, equals, value = word.partition("=")
    if not equals and not key.startswith("~"):
        meant = FOLDERS.get(command)
        hint = f"; did you mean {shell_argument(meant, Path(word))}?" if meant else ""
        raise UserError(f"{one_line(word)} cannot be read: arguments are key=value{hint}")
    if not re.fullmatch(r"(\+\+?|~)?[A-Za-z_][\w-]*([./][\w-]+)*", key):
        raise UserError(f"{one_line(word)} cannot be read: {one_line(key) or 'what stands before ='} is no key")
    if value.startswith("~"):  # Hydra has other plans with it
        escaped = value.replace("'", r"\'")
        word = f"{key}='{escaped}'"
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException as error:
        hint = "unusual letters go in quotes of their own"
        raise UserError(f"{one_line(word)} cannot be read; {hint}: {_quoted(key, value)}") from error


def _quoted(key: str, value: str) -> str:
    """Return ``key=value`` as it is to be typed; of a list, each part is quoted."""
    if re.fullmatch(r"\[[^'\"\\$`!]+\]", value):
        parts = ",".join(f"'{part.strip()}'" for part in value[1:-1].split(","))
        return f'"{key}=[{parts}]"'
    return shell_argument(key, Path(value)) if value else "key=value"


def _check(override: Override) -> None:
    """Refuse (UserError) a key of Hydra's own, a name that is not in its group, and a folder that is no text."""
    key, word = str(override.key_or_group), one_line(override.input_line)
    if re.split("[./]", key)[0] == "hydra" and not any(
        key == allowed or key.startswith(f"{allowed}.") for allowed in HYDRA_KEYS
    ):
        raise UserError(f"{word} is a setting of Hydra, not of policyskip; of those, only hydra/launcher can be typed")
    if override.is_delete() and key in NEEDED:
        raise UserError(f"{word} cannot be left out: every run has one")
    if override.is_delete() or override.value_type == ValueType.GLOB_CHOICE_SWEEP:
        return
    if override.is_sweep_override():
        values: list[Any] = list(override.sweep_string_iterator())
    else:
        values = [override.value()]
    for value in values:
        if key in groups() and value not in groups()[key]:
            name = "null" if value is None else one_line(value)
            raise UserError(f"there is no {key}/{name}; {key} is one of {', '.join(groups()[key])}")
        if key in ("hydra/launcher", "hydra/sweeper") and not re.fullmatch(r"\w+", str(value)):
            raise UserError(f"{word} names no launcher")
        if key in RUN_KEYS and isinstance(value, bool | int | float | dict):
            shown = str(value).lower() if isinstance(value, bool) else str(value)
            raise UserError(
                f"{key} must be the name of a folder or file, got {one_line(shown)}; a name that looks like "
                f"something else is typed with ./ in front: {key}=./{one_line(shown)}"
            )


def _beside_runs(command: str, overrides: list[Override]) -> list[str]:
    """Return the words, with those of data and network made for a configuration that has neither.

    Raises:
        UserError: such a word has no effect beside ``run=``, or no folder is given where one is needed.
    """
    given = {str(o.key_or_group): o for o in overrides if not o.is_delete() and not o.is_sweep_override()}
    run = given["run"].value() if "run" in given else None
    if command in ("evaluate", "calibrate") and "run" in given and not (isinstance(run, str) and run):
        raise UserError(f"run must be a run folder, got {one_line(given['run'].input_line)}")
    resume = given["run.resume"].value() if "run.resume" in given else None
    if "run.resume" in given and not (resume is None or (isinstance(resume, str) and resume)):
        raise UserError(f"run.resume must be a run folder, got {one_line(given['run.resume'].input_line)}")
    words = [str(o.input_line) for o in overrides]
    if command in RESUMABLE and resume is not None:
        return [f"++{word.lstrip('+')}" if word.lstrip("+").split("=")[0] in MOVED else word for word in words]
    if command not in OF_RUNS and not (command == "profile" and run is not None):
        return words
    made = ["~data", "~backbone"] if command == "profile" else []
    for override, word in zip(overrides, words, strict=True):
        key = str(override.key_or_group)
        group, _, name = key.partition(".")
        if group not in ("data", "backbone"):
            made.append(word)
        elif not name or override.is_delete():
            raise UserError(f"a run has its own data and network; {one_line(word)} has no effect beside run=")
        elif key == "data._target_" or (group == "backbone" and name != "checkpoint"):
            raise UserError(f"a run keeps its {key}; beside run=, backbone.checkpoint and data's keys can be typed")
        else:
            made.append(f"++{word.lstrip('+')}")
    return made
