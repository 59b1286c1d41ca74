"""What is shown without running anything: the help of a command, and what a shell can complete a word to."""

from __future__ import annotations

import os
import re
import textwrap
from importlib import resources

from policyskip.typed import words
from policyskip.typed.streams import line_width

SCRIPTS = {
    "bash": """\
_policyskip() {
    local IFS=$'\\n'
    local typed="${COMP_LINE:0:COMP_POINT}"
    local word="${typed##*[[:space:]]}"
    COMPREPLY=($(COMP_LINE="$typed" policyskip --complete))
    if [[ $word == *=* && $COMP_WORDBREAKS == *=* ]]; then
        COMPREPLY=("${COMPREPLY[@]#"${word%=*}="}")
    fi
}
complete -o nospace -o default -F _policyskip policyskip""",
    "zsh": """\
_policyskip() {
    compadd -Q -S '' -- ${(f)"$(COMP_LINE="${BUFFER[1,CURSOR]}" policyskip --complete)"}
}
compdef _policyskip policyskip""",
    "fish": "complete -c policyskip -f -a '(COMP_LINE=(commandline -cp) policyskip --complete)'",
}
"""What a shell reads to complete policyskip's words, as in ``eval "$(policyskip --shell-completion bash)"``."""


LEAST_ROOM = 30
"""Letters that a folded column needs; where there are fewer, its text begins on a line of its own."""


def folded(text: str) -> str:
    """Return a text whose lines are no wider than the screen: what is too long goes on below the last column."""
    width = line_width(100)
    return "\n".join(part for line in text.splitlines() for part in _folded(line, width))


def _folded(line: str, width: int) -> list[str]:
    """Return the lines that a line becomes; a comment, or text behind two spaces, goes on in its own column."""
    if len(line) <= width:
        return [line]
    comment = re.match(r"(\s*|.*?\s)(# )", line) or re.match(r"( *\S.*? {2,}| *)()", line)
    assert comment is not None  # the second matches every line
    (head, mark), end = comment.groups(), line[comment.end() :]
    indent = " " * len(head)
    if head.strip() and width - len(head + mark) < LEAST_ROOM:
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        return [head.rstrip(), *_folded(indent + mark + end, width)]
    wrapper = textwrap.TextWrapper(width, head + mark, indent + mark, break_long_words=False, break_on_hyphens=False)
    return wrapper.wrap(end)


def help_of(command: str) -> str:
    """Return what ``policyskip COMMAND --help`` prints: the command's groups and keys, with defaults and comments."""
    text = resources.files("policyskip.configs").joinpath(f"{command}.yaml").read_text("utf-8")
    head, _, body = text.partition("defaults:\n")
    keys = re.sub(r"\A(?: +- .*\n)*\n*", "", body).rstrip()
    keys = re.sub(
        r"\$\{(?:hydra:runtime\.choices\.|chosen:)(\w+)\}|\$\{(now):[^}]*\}", lambda m: f"<{m[1] or 'time'}>", keys
    )
    about = "\n".join(line.removeprefix("# ") for line in head.splitlines())
    chosen = words.defaults_of(command)
    lines = [about, "", f"  policyskip {command} key=value …", ""]
    if chosen:
        lines.append("Groups, each with the names that it can be set to; the first is the default:")
        lines += [_group_line(group, first) for group, first in chosen.items()]
        if command == "train":
            lines.append(_group_line("+experiment", ""))
        lines.append("")
    lines += ["Keys, with their defaults:", textwrap.indent(keys, "  "), ""]
    several = "; --multirun seed=0,1,2 makes several runs" if command in words.RESUMABLE else ""
    lines.append(f"`policyskip {command} --cfg job` shows every key of the groups, too{several}.")
    return folded("\n".join(lines))


def _group_line(group: str, first: str) -> str:
    """Return a line with the names of a group, the default first."""
    names = [first] * bool(first) + [name for name in words.groups()[group.lstrip("+")] if name != first]
    return f"  {group:11}  {', '.join(names)}"


def completions(commands: tuple[str, ...]) -> list[str]:
    """Return what the last word in the variable ``COMP_LINE``, which a shell sets, can be completed to."""
    from hydra import initialize_config_module
    from hydra._internal.core_plugins.bash_completion import BashCompletion
    from hydra.core.global_hydra import GlobalHydra

    _, _, typed = os.environ.get("COMP_LINE", "").lstrip().partition(" ")
    command, space, line = typed.lstrip().partition(" ")
    if not space:
        return [f"{name} " for name in commands if name.startswith(command)]
    if command not in commands:
        return []
    try:
        with initialize_config_module("policyskip.configs", version_base="1.3"):
            found = BashCompletion(GlobalHydra.instance().config_loader())._query(command, line)
    except Exception:  # whatever is wrong with the words before: nothing can be proposed
        return []
    own = {*words.defaults_of(command), *(["experiment"] if command == "train" else [])}
    others = tuple(f"{name}=" for name in words.groups() if name not in own)
    return [word for word in found if not word.lstrip("+").startswith(("hydra", *others))]
