"""Learners of ``learners.py`` in one of several processes, which torchrun starts: ``-m tests.divided FOLDER NAME …``."""

from __future__ import annotations

import sys

from policyskip.parallel import processes
from policyskip.runs.folder import create
from tests.learners import learn

if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    with processes.joined():
        for name in names:
            learn(name, processes.first(lambda name=name: create(f"{folder}/{name}", "policyskip train", "")))
