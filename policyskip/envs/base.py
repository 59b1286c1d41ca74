"""What every environment over images shares: a frozen network, its costs, and the images before it.

Shapes: B images side by side (``num_envs``), S decisions for each image, K blocks, H W pixels.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from policyskip.backbones import Backbone, Costs, ExitCosts, count_costs, load
from policyskip.backbones.execution import sparse_many
from policyskip.backbones.folding import folded
from policyskip.data import Feed, Images, Order, load_data
from policyskip.memory import BatchSplitter
from policyskip.rewards import Outcome, Reward, Utilization, reward_of

PIXELS_AT_ONCE = 2**23
"""Decisions are scored in parts of this many pixels, so that many decisions on large images fit into memory."""


Step = tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]
"""What ``step`` returns: the next observation (B, …), reward float32 (B,), terminated and truncated bool (B,), and the
info. B is the number of images shown before the step; the next observation may have fewer rows."""


class DecisionEnv(Protocol):
    """A vector environment in which a policy decides about images: what agents, the adapter, evaluation and training
    use of it, whichever of the three environments it is.

    Attributes:
        family: how policies of this environment are deployed and reported: "blocks" or "exit_policy".
        key: the environment's name in the configuration (``env=``): block_selection, layer_skip or early_exit.
        id: the environment's name in Gymnasium, without its namespace: "BlockSelection-v0", ….
        metadata: Gymnasium's; "autoreset_mode" is in it.
    """

    family: ClassVar[str]
    key: ClassVar[str]
    id: ClassVar[str]
    metadata: dict[str, Any]
    num_envs: int
    single_observation_space: gymnasium.Space[Any]
    single_action_space: gymnasium.Space[Any]

    @property
    def device(self) -> torch.device:
        """Where observations, outcomes and rewards are."""
        ...

    @property
    def feed(self) -> Feed:
        """The feed that the images come from."""
        ...

    @property
    def costs(self) -> Costs | ExitCosts:
        """MACs of the network's blocks or exits."""
        ...

    @property
    def reward(self) -> Reward:
        """The function from outcomes to rewards."""
        ...

    @property
    def steps_per_episode(self) -> int:
        """The largest number of steps that an episode can have: 1, K or N."""
        ...

    @property
    def observation(self) -> Tensor:
        """The observation (B, …) of the images shown; after the last image of a sequential order, B is 0."""
        ...

    @property
    def outcome(self) -> Outcome:
        """The outcome of the episodes that ended at the last step at which any ended."""
        ...

    @property
    def cursor(self) -> int:
        """The position in the order of the images; :meth:`seek` goes back to it."""
        ...

    def seek(self, cursor: int) -> None:
        """Show the images from this position in the order on; episodes under way are given up."""
        ...

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, Any]]:
        """Start episodes; with ``seed``, or in sequential order, at the beginning of the order of the images."""
        ...

    def step(self, actions: Tensor | np.ndarray) -> Step:
        """Carry out one action (B, …) for each image shown."""
        ...

    def advance(self) -> Tensor:
        """Give up the episodes under way, show the next images, and return their observation (B, …)."""
        ...

    def score(self, decisions: Tensor, /) -> Outcome:
        """The outcome that these decisions, bool, would have for the images shown; nothing moves on."""
        ...

    def rewards(self, outcome: Outcome) -> Tensor:
        """The reward of each image of an outcome, float32 (B,)."""
        ...

    def decisions_of(self, outcome: Outcome) -> Tensor | int:
        """The number of decisions that a policy made about each image of an outcome: int64 (B,), or one int for all."""
        ...

    def close(self) -> None:
        """Gymnasium's; there is nothing to release."""
        ...


class ImageVectorEnv(VectorEnv[Tensor, Tensor, Tensor]):
    """Images of a data set side by side, as tensors on the device, before a frozen network.

    Args:
        num_envs: B, the images shown at once.
        backbone: the network, which is frozen here, or the name of shipped weights.
        images: the set the images come from; None takes the split ``split`` of the set named ``data``.
        reward: what an outcome is worth; None is BlockDrop's utilization reward.
        order: "shuffled" for training, without end; "sequential" shows each image once, with a short last batch and
            then an empty one.
        seed: decides the shuffled order; ``reset(seed=…)`` starts it anew.
        device: where a backbone and images given by name are put; by default the CPU, or where the backbone is.

    Raises:
        UserError: unknown name, order or split, or ``num_envs`` below 1.
    """

    metadata = {  # noqa: RUF012 - Gymnasium declares it so
        "autoreset_mode": AutoresetMode.SAME_STEP,
        "render_modes": [],
    }
    family: ClassVar[str] = "blocks"
    key: ClassVar[str]
    id: ClassVar[str]
    steps_per_episode: int
    outcome: Outcome
    """What came of the episodes that ended last."""

    def __init__(
        self,
        num_envs: int = 256,
        backbone: Backbone | str = "resnet32_digits",
        images: Images | None = None,
        reward: Reward | None = None,
        order: Order = "shuffled",
        seed: int = 0,
        data: str = "digits",
        split: str = "train",
        device: str | None = None,
    ) -> None:
        if isinstance(backbone, str):
            backbone = load(backbone).to(device or "cpu")
        if images is None:
            images = load_data(data, torch.device(device or backbone.mean.device)).split(split)
        self.num_envs = num_envs
        self.backbone = backbone.freeze()
        self.executed = folded(self.backbone)  # what is executed
        self.splitter = BatchSplitter()
        self.device = backbone.mean.device
        self.reward = reward if reward is not None else Utilization()
        self.feed = Feed(images, num_envs, order, seed)
        image_shape = tuple(self.feed.batch.images.shape[1:])
        self.costs = count_costs(self.backbone, image_shape)  # type: ignore[arg-type]
        self.single_observation_space = gymnasium.spaces.Box(0, 255, image_shape, np.uint8)
        self.observation_space = batch_space(self.single_observation_space, num_envs)

    @property
    def observation(self) -> Tensor:
        """The images now shown, uint8 (B, 3, H, W)."""
        return self.feed.batch.images

    @property
    def cursor(self) -> int:
        """Number of the batch shown; :meth:`seek` goes back to it."""
        return self.feed.cursor

    def seek(self, cursor: int, seed: int | None = None) -> None:
        """Show batch number ``cursor`` of the order (of that seed)."""
        self.feed.seek(cursor, seed)
        self._begin()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, Any]]:
        """Show images: with ``seed``, or in sequential order, from the start; otherwise those that come next."""
        super().reset(seed=seed)
        if seed is not None or self.feed.order == "sequential":
            self.seek(0, seed)
        return self.observation, {}

    def advance(self) -> Tensor:
        """Show the next images and return what is observed of them; none are left after the last of a sequential
        order."""
        self.feed.advance()
        self._begin()
        return self.observation

    def divide(self) -> None:
        """From now on show this process's part of each batch, where several processes make one run."""
        self.feed.divide()
        self.num_envs = len(self.observation)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._begin()

    def _begin(self) -> None:
        """Other images are shown. An episode of more than one step starts here."""

    @torch.no_grad()
    def score(self, keep: Tensor) -> Outcome:
        """What these decisions would earn on the images now shown; nothing moves on.

        Args:
            keep: bool (B, K), or (S, B, K) for S decisions an image, answered in one sparsely executed pass.

        Returns: outcome of B decisions, or of S·B, laid end to end.
        """
        images, label_B = self.feed.batch.images, self.feed.batch.label_B
        if keep.dim() not in (2, 3) or keep.shape[-2:] != (len(label_B), self.backbone.num_blocks):
            expected = f"(…, {len(label_B)}, {self.backbone.num_blocks})"
            raise ValueError(f"keep must be of shape {expected}, got {tuple(keep.shape)}")
        keep_SBK = keep if keep.dim() == 3 else keep.unsqueeze(0)
        part = max(1, PIXELS_AT_ONCE // (len(keep_SBK) * images[0, 0].numel())) if len(images) else 1
        parts = self.splitter(lambda of: sparse_many(self.executed, images[of], keep_SBK[:, of]), len(images), part)
        logits_BC = torch.cat(parts, dim=1).flatten(0, 1)
        return self._outcome(logits_BC, label_B.repeat(len(keep_SBK)), keep_SBK.flatten(0, 1))

    def _outcome(self, logits_BC: Tensor, label_B: Tensor, keep_BK: Tensor) -> Outcome:
        correct_B = logits_BC.argmax(1) == label_B
        return Outcome(logits_BC, label_B, correct_B, keep_BK, self.costs.of(keep_BK), self.costs.full)

    def rewards(self, outcome: Outcome) -> Tensor:
        """The reward of each decision in an outcome, float32 (B,)."""
        return reward_of(self.reward, outcome)

    def decisions_of(self, outcome: Outcome) -> int:
        """The number of decisions that a policy made about each image: the same for all, as all episodes are equally
        long."""
        return self.steps_per_episode

    def _end(self, outcome: Outcome) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Every episode ends with ``outcome``: rewards, which episodes end (all), and what ``step`` says of it.

        Called before the next images are shown.
        """
        over_B = torch.ones_like(outcome.correct_B)
        info = {
            "final_obs": self.observation,
            "_final_obs": over_B,
            "final_info": {
                "correct": outcome.correct_B,
                "macs": outcome.macs_B,
                "kept": outcome.keep_BK.sum(1),
            },
            "_final_info": over_B,
        }
        return self.rewards(outcome), over_B, info


def decisions(actions: Tensor | np.ndarray, device: torch.device | None = None) -> Tensor:
    """Actions of 0 and 1, of any type, as bool on the device.

    Raises:
        ValueError: other numbers are among them.
    """
    chosen = torch.as_tensor(actions, device=device)
    if chosen.dtype != torch.bool and not ((chosen == 0) | (chosen == 1)).all():
        other = chosen[(chosen != 0) & (chosen != 1)]
        raise ValueError(f"actions must be 0 or 1, got {other[0].item()}")
    return chosen.bool()


class SingleView(gymnasium.Env[np.ndarray, np.int64]):
    """One image at a time, in numpy: a vector environment of B = 1 whose episodes have several steps.

    ``reset`` shows an image; the ``step`` that ends the episode shows what it last showed.

    Args:
        vector: the vector environment; autoreset ``SAME_STEP``, action Discrete(2).
    """

    metadata = {  # noqa: RUF012 - Gymnasium declares it so
        "render_modes": []
    }

    def __init__(self, vector: DecisionEnv) -> None:
        self.vector = vector
        self.observation_space = vector.single_observation_space
        self.action_space = vector.single_action_space
        self._shown = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.vector.reset(seed=seed)
        elif self._shown:
            self.vector.advance()
        if not len(self.vector.observation):
            self.vector.reset()  # every image of a sequential order was shown
        self._shown = True
        return _numpy(self.vector.observation), {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        observation, reward_B, terminated_B, _, info = self.vector.step(torch.as_tensor(action).reshape(1))
        if not terminated_B:
            return _numpy(observation), 0.0, False, False, {}
        self._shown = False  # the next image is there already
        final = {key: value.item() for key, value in info["final_info"].items()}
        return _numpy(info["final_obs"]), float(reward_B), True, False, final


def _numpy(observation: Tensor) -> np.ndarray:
    shown: np.ndarray = observation[0].cpu().numpy().copy()
    return shown
