"""Global generators, lent to an agent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class Randomness:
    """For learners that draw from the global generators of torch and numpy.

    Within :meth:`own` these are in :attr:`state`, which is the learner's own and can be saved; outside, they are as
    they were.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.state = self._now()

    @contextmanager
    def own(self) -> Iterator[None]:
        outside = self._now()
        self._set(self.state)
        try:
            yield
        finally:
            self.state = self._now()
            self._set(outside)

    def _now(self) -> dict[str, Any]:
        _, key, *rest = np.random.get_state(legacy=True)
        assert isinstance(key, np.ndarray)
        state: dict[str, Any] = {"torch": torch.get_rng_state(), "numpy": [torch.tensor(key.astype(np.int64)), *rest]}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def _set(self, state: dict[str, Any]) -> None:
        key, *rest = state["numpy"]
        torch.set_rng_state(state["torch"])
        np.random.set_state(("MT19937", key.numpy().astype(np.uint32), *rest))
        if self.device.type == "cuda" and "cuda" in state:  # a run may go on on another kind of device
            torch.cuda.set_rng_state(state["cuda"], self.device)
