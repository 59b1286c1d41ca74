"""The protocol that all environments follow, and the base class of those that decide about blocks.

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
from policyskip.data import Feed, Images, Order, load_data
from policyskip.data.base import check_images
from policyskip.envs.arguments import (
    MOST_IMAGES,
    check_fit,
    check_network,
    check_reward,
    decisions,
    naming_arguments,
    seed_or_none,
)
from policyskip.envs.step_tensors import for_numpy
from policyskip.execution.ways import Execution, How
from policyskip.finite import plain_tensor, whole_number
from policyskip.memory import BatchSplitter
from policyskip.parallel.devices import device_named, usual_defaults
from policyskip.rewards import Outcome, Reward, Utilization, reward_of

PIXELS_AT_ONCE = 2**23
"""Decisions are scored in chunks of this many pixels (S·B·H·W), so that many decisions on large images fit into
memory."""


Step = tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]
"""What ``step`` returns: the next observation (B, …), reward float32 (B,), terminated and truncated bool (B,), and the
info. B is the number of images shown before the step; the next observation may have fewer rows."""


class DecisionEnv(Protocol):
    """A vector environment in which a policy decides about images: the protocol holds what agents, the adapter,
    evaluation and training use of any of the three environments.

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
        """Return the device that observations, outcomes and rewards are on."""
        ...

    @property
    def feed(self) -> Feed:
        """Return the feed that the images come from."""
        ...

    @property
    def costs(self) -> Costs | ExitCosts:
        """Return the MACs of the network's blocks or exits."""
        ...

    @property
    def reward(self) -> Reward:
        """Return the function from outcomes to rewards."""
        ...

    @property
    def steps_per_episode(self) -> int:
        """Return the largest number of steps that an episode can have: 1, K or N."""
        ...

    @property
    def observation(self) -> Tensor:
        """Return the observation (B, …) of the images shown; after the last image of a sequential order, B is 0."""
        ...

    @property
    def outcome(self) -> Outcome:
        """Return the outcome of the episodes that ended at the last step at which any ended."""
        ...

    @property
    def cursor(self) -> int:
        """Return the position in the order of the images; :meth:`seek` goes back to it."""
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
        """Compute the outcome that these decisions, bool, would have for the images shown; nothing moves on."""
        ...

    def rewards(self, outcome: Outcome) -> Tensor:
        """Compute the reward of each image of an outcome, float32 (B,)."""
        ...

    def decisions_of(self, outcome: Outcome) -> Tensor | int:
        """Count the decisions that a policy made about each image of an outcome: int64 (B,), or one int for all."""
        ...

    def close(self) -> None:
        """Do nothing: Gymnasium asks for this method, and there is nothing to release."""
        ...


class ImageVectorEnv(VectorEnv[Tensor, Tensor, Tensor]):
    """An environment that shows B images of a data set at once, as tensors on the device, to decide which blocks of a
    frozen network run for each of them.

    Args:
        num_envs: B, the images shown at once.
        backbone: the network, which is frozen here, or the name of shipped weights.
        images: the set that the images come from; None takes the split ``split`` of the set named ``data``.
        reward: the function from an outcome to the reward of each image; None is BlockDrop's utilization reward.
        order: "shuffled" for training, without end; "sequential" shows each image once, with a short last batch and
            then an empty one.
        seed: decides the shuffled order; ``reset(seed=…)`` starts the order of that seed.
        device: where a backbone and images given by name are put; by default the CPU, or where the backbone is.
        execution: how the network is executed: auto, kernel, gather or dense (see ``execution/ways.py``).
        precision: that it is executed in: float32, float32_exact, bfloat16 or float16.

    Attributes:
        execution: executes the network, and says in which way.

    Raises:
        UserError: an argument is of another kind or out of range, images do not fit the network, there is no such
            name, order, split or device, or the network cannot be executed in the way that was asked for.
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
    """The outcome of the episodes that ended at the last step at which any ended."""

    @naming_arguments
    @usual_defaults()
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
        execution: str = "auto",
        precision: str = "float32",
    ) -> None:
        how = How(execution, precision).checked()
        num_envs, seed = whole_number("num_envs", num_envs, 1, MOST_IMAGES), whole_number("seed", seed, 0)
        where = None if device is None else device_named(str(device))
        if isinstance(backbone, str):
            backbone = load(backbone).to(where or "cpu")
        check_network("backbone", backbone, Backbone)
        if images is None:
            images = load_data(data, where or backbone.mean.device).split(split)
        check_images(images)
        self.reward = reward if reward is not None else Utilization()
        check_reward(self.reward)
        self.num_envs = num_envs
        self.backbone = backbone.freeze()
        self.splitter = BatchSplitter()
        self.device = backbone.mean.device
        self.feed = Feed(images, num_envs, order, seed)
        check_fit(backbone, self.feed.batch.images[:1], images.label_N)
        image_shape = tuple(self.feed.batch.images.shape[1:])
        self.execution = Execution(self.backbone, image_shape, *how)  # type: ignore[arg-type]
        self.costs = count_costs(self.backbone, image_shape)  # type: ignore[arg-type]
        self.single_observation_space = gymnasium.spaces.Box(0, 255, image_shape, np.uint8)
        self.observation_space = batch_space(self.single_observation_space, num_envs)

    @property
    def executed(self) -> Backbone:
        """Return the network that is executed: a copy of :attr:`backbone` that gives the same logits, faster."""
        return self.execution.network

    @property
    def observation(self) -> Tensor:
        """Return the images now shown, uint8 (B, 3, H, W)."""
        return self.feed.batch.images

    @property
    def cursor(self) -> int:
        """Return the number of the batch shown; :meth:`seek` goes back to it."""
        return self.feed.cursor

    @usual_defaults()
    def seek(self, cursor: int, seed: int | None = None) -> None:
        """Show batch number ``cursor``, in the order of ``seed``, or in the present order if that is None."""
        self.feed.seek(cursor, seed)
        self._begin()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, Any]]:
        """Show the first images of the order, with ``seed`` or if it is sequential; otherwise, those that come next.

        Returns: the observation (B, …), and an empty info.
        """
        seed = seed_or_none(seed)
        super().reset(seed=seed)
        if seed is not None or self.feed.order == "sequential":
            self.seek(0, seed)
        return self.observation, {}

    @usual_defaults()
    def advance(self) -> Tensor:
        """Show the next images of the order and return their observation (B, …); B is 0 after the last image of a
        sequential order."""
        self.feed.advance()
        self._begin()
        return self.observation

    @usual_defaults()
    def divide(self) -> None:
        """Show only this process's slice of each batch from now on, where several processes train together."""
        self.feed.divide()
        self.num_envs = len(self.observation)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._begin()

    def _begin(self) -> None:
        """Start the episodes of the images that the feed now shows; a subclass with several steps overrides this."""

    @usual_defaults()
    @torch.no_grad()
    def score(self, keep: Tensor) -> Outcome:
        """Compute the outcome that these decisions would have for the images now shown; nothing moves on.

        Args:
            keep: 0 or 1, of any dtype, (B, K), or (S, B, K) for S decisions per image, executed in one pass.

        Returns: the outcome of B decisions, or of S·B: those of the first of the S for all images, then the second, ….

        Raises:
            UserError: ``keep`` is of another shape, or holds other numbers than 0 and 1.
        """
        images, label_B = self.feed.batch.images, self.feed.batch.label_B
        keep = plain_tensor(keep, "keep")
        several = (len(keep),) if keep.dim() == 3 and len(keep) else ()
        keep = decisions(keep, (*several, len(label_B), self.backbone.num_blocks), self.device, "keep")
        keep_SBK = keep if keep.dim() == 3 else keep.unsqueeze(0)
        size = max(1, PIXELS_AT_ONCE // (len(keep_SBK) * images[0, 0].numel())) if len(images) else 1
        chunks = self.splitter(
            lambda rows: self.execution.logits_many(images[rows], keep_SBK[:, rows]), len(images), size
        )
        logits_BC = torch.cat(chunks, dim=1).flatten(0, 1)
        return self._outcome(logits_BC, label_B.repeat(len(keep_SBK)), keep_SBK.flatten(0, 1))

    def _outcome(self, logits_BC: Tensor, label_B: Tensor, keep_BK: Tensor) -> Outcome:
        correct_B = logits_BC.argmax(1) == label_B
        return Outcome(logits_BC.float(), label_B, correct_B, keep_BK, self.costs.of(keep_BK), self.costs.full)

    def rewards(self, outcome: Outcome) -> Tensor:
        """Compute the reward of each decision of an outcome, float32 (B,).

        Raises:
            UserError: the reward function fails, or returns something other than a finite float tensor (B,).
        """
        return reward_of(self.reward, outcome)

    def decisions_of(self, outcome: Outcome) -> int:
        """Return the number of decisions that a policy made about each image: one for all, since all episodes have the
        same number of steps."""
        return self.steps_per_episode

    def _end(self, outcome: Outcome) -> Step:
        """Show the next images, and make what ``step`` returns when the episodes of all images end with ``outcome``."""
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
        reward_B, over_B, truncated_B = for_numpy(self.rewards(outcome), over_B, ~over_B)
        return self.advance(), reward_B, over_B, truncated_B, info
