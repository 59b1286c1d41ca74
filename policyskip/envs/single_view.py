"""A view that shows a vector environment as an ordinary Gymnasium environment: one image at a time, in numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from torch import Tensor

from policyskip.envs.arguments import one_row, seed_or_none
from policyskip.envs.base import DecisionEnv
from policyskip.errors import UserError


class SingleView(gymnasium.Env[np.ndarray, np.int64 | np.ndarray]):
    """Shows a vector environment of B = 1 as an ordinary environment: one image at a time, in numpy.

    ``reset`` shows an image; the ``step`` that ends the episode returns the last observation of that episode.

    A shuffled order for which no seed was given begins at another image in every view, as in Gymnasium's environments.

    Args:
        kind: the vector environment, with autoreset ``SAME_STEP``.
        arguments: those that it is made with, without ``num_envs``; a ``seed`` of None is none.

    Raises:
        UserError: the arguments hold ``num_envs``, or one that the vector environment refuses.
    """

    metadata = {  # noqa: RUF012 - Gymnasium declares it so
        "render_modes": []
    }

    def __init__(self, kind: Callable[..., DecisionEnv], arguments: dict[str, Any]) -> None:
        if "num_envs" in arguments:
            raise UserError("num_envs is for gymnasium.make_vec: an environment of gymnasium.make shows one image")
        given = {key: value for key, value in arguments.items() if key != "seed" or value is not None}
        self._is_seeded = "seed" in given
        vector = kind(1, **given)
        self.vector = vector
        self.observation_space = vector.single_observation_space
        self.action_space = vector.single_action_space
        self._was_shown = False  # whether the image in the vector environment was shown, and reset must show another

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        seed = seed_or_none(seed)
        super().reset(seed=seed)
        if seed is None and not self._is_seeded:
            seed = int(self.np_random.integers(2**62))
        self._is_seeded = True
        if seed is not None:
            self.vector.reset(seed=seed)
        elif self._was_shown:
            self.vector.advance()
        if not len(self.vector.observation):
            self.vector.reset()  # every image of a sequential order was shown
        self._was_shown = True
        return numpy_of(self.vector.observation), {}

    def step(self, action: np.int64 | np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        observation, reward_B, terminated_B, _, info = self.vector.step(one_row(action, self.action_space))
        if not terminated_B:
            return numpy_of(observation), 0.0, False, False, {}
        self._was_shown = False  # the vector environment has moved on to the next image
        final = {key: value.item() for key, value in info["final_info"].items()}
        return numpy_of(info["final_obs"]), float(reward_B), True, False, final


def numpy_of(observation: Tensor) -> np.ndarray:
    """Copy the only row of an observation, (1, …), to a numpy array (…)."""
    array: np.ndarray = observation[0].cpu().numpy().copy()
    return array
