"""Learners of ``learners.py`` in one of several processes, which torchrun starts: ``-m tests.divided FOLDER NAME …``.

With ``POLICYSKIP_TEST_DEVICE=cuda`` each process has a GPU of its own.
"""

from __future__ import annotations

import os
import sys

from policyskip.parallel import processes
from policyskip.parallel.devices import find_device
from policyskip.runs.folder import create
from tests import learners

if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    with processes.joined():
        learners.DEVICE = find_device(os.environ.get("POLICYSKIP_TEST_DEVICE", "cpu"))
        for name in names:
            learners.learn(name, processes.first(lambda name=name: create(f"{folder}/{name}", "policyskip train", "")))
