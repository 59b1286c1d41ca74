"""What every environment over images shares: a frozen network, its costs, and the images before it.

Shapes: B images side by side (``num_envs``), H W pixels.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from policyskip.backbones import Backbone, count_costs, load
from policyskip.data import Feed, Images, Order, load_data
from policyskip.rewards import Reward, Utilization


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
        self.device = backbone.mean.device
        self.reward = reward if reward is not None else Utilization()
        self.feed = Feed(images, num_envs, order, seed)
        image_shape = tuple(self.observation.shape[1:])
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

    def seek(self, cursor: int) -> None:
        """Show batch number ``cursor`` of the order."""
        self.feed.seek(cursor)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, Any]]:
        """Show images: with ``seed``, or in sequential order, from the start; otherwise those that come next."""
        super().reset(seed=seed)
        if seed is not None or self.feed.order == "sequential":
            self.feed.seek(0, seed)
        return self.observation, {}

    def advance(self) -> Tensor:
        """Show the next images and return them; none are left after the last of a sequential order."""
        return self.feed.advance().images
