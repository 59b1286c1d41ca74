"""The current folder is taken off the path of modules, so that no file of it is imported because it lies there.

Python puts it in front of everything else for ``python -m policyskip``, and an empty entry of ``PYTHONPATH`` does so
too. A folder that somebody else made may hold a ``yaml.py``. This module is imported before any other, and imports
nothing that Python has not imported already, not even ``__future__``.
"""

import os
import sys


def is_command() -> bool:
    """Return whether this process runs the command line, as ``policyskip`` or as ``python -m policyskip``."""
    if sys.argv[:1] == ["-m"]:  # while Python looks for the module that it is to run
        pairs = zip(sys.orig_argv, [*sys.orig_argv[1:], ""], strict=True)
        return any(
            word[:1] == "-" and (word.endswith("mpolicyskip") or (word.endswith("m") and following == "policyskip"))
            for word, following in pairs
        )
    return os.path.splitext(os.path.basename("".join(sys.argv[:1])))[0] == "policyskip"


def leave_out() -> None:
    """Take the current folder off ``sys.path``; put it behind all else if policyskip itself was imported from it.

    Python's own folders stay where they are, whatever the current folder is.
    """
    try:
        here = os.path.realpath(os.getcwd())
    except OSError:  # it has been deleted
        return
    if here in _folders_of_python():
        return
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    others = [entry for entry in sys.path if os.path.realpath(entry) != here]
    sys.path[:] = [*others, here] if root == here else others


def make_importable() -> None:
    """Put the current folder behind everything else on ``sys.path``, for a class that a user names or trusts."""
    try:
        here = os.getcwd()
    except OSError:  # it has been deleted
        return
    if here not in sys.path:
        sys.path.append(here)


def _folders_of_python() -> set[str]:
    """Return the folders of the standard library and of installed packages, from which modules have to be imported."""
    site = sys.modules.get("site")
    packages = [*site.getsitepackages(), site.getusersitepackages()] if site else []
    return {os.path.realpath(folder) for folder in (os.path.dirname(os.__file__), *packages)}
