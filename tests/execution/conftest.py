"""Kernels that run on any machine."""

from __future__ import annotations

import pytest

from policyskip.execution import choosing, ways
from tests.execution.plain_kernels import ImpossibleKernels, PlainKernels


@pytest.fixture
def plain_kernels(monkeypatch) -> type[PlainKernels]:
    """Let kernels be chosen on any machine: these."""
    monkeypatch.setattr(ways, "no_kernels_on", lambda device, may_interpret: "")
    monkeypatch.setattr(choosing, "candidates", lambda: iter((ImpossibleKernels, PlainKernels)))
    monkeypatch.setattr(PlainKernels, "calls", [])
    return PlainKernels
