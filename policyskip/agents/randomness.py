"""A state of the global random generators that belongs to one learner."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class Randomness:
    """A learner's own state of torch's and numpy's global generators, from which the learner's library draws.

    Within :meth:`own` the global generators are in :attr:`state`; afterwards they are as they were before.

    Attributes:
        state: the learner's state, which can be saved and set.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.state = self._read()

    @contextmanager
    def own(self) -> Iterator[None]:
        """Put the global generators into the learner's state, and back again at the end."""
        outside = self._read()
        self._write(self.state)
        try:
            yield
        finally:
            self.state = self._read()
            self._write(outside)

    def _read(self) -> dict[str, Any]:
        """Return the state that the global generators are in."""
        _, key, *position = np.random.get_state(legacy=True)
        assert isinstance(key, np.ndarray)
        numpy_state = [torch.tensor(key.astype(np.int64)), *position]
        state: dict[str, Any] = {"torch": torch.get_rng_state(), "numpy": numpy_state}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def _write(self, state: dict[str, Any]) -> None:
        """Put the global generators into a state."""
        key, *position = state["numpy"]
        torch.set_rng_state(state["torch"])
        np.random.set_state(("MT19937", key.numpy().astype(np.uint32), *position))
        if self.device.type == "cuda" and "cuda" in state:  # a run may go on on another kind of device
            torch.cuda.set_rng_state(state["cuda"], self.device)
