"""One decision for each image at every exit says whether the image leaves or goes on: ``policyskip/EarlyExit-v0``.

Shapes: B images side by side, B' of them that leave or begin, N exits, C classes, M images of a set,
D numbers of an observation (C + 3 + N).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from policyskip.backbones import ExitNetwork, load_exits
from policyskip.data import Feed, Images, Order, batch_at, load_data
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
from policyskip.envs.base import Step
from policyskip.envs.exit_sources import CacheIndices, ExitSource, Live, Queue, Replay
from policyskip.envs.single_view import SingleView
from policyskip.envs.step_tensors import for_numpy
from policyskip.errors import UserError
from policyskip.execution.ways import How
from policyskip.exits.cache import CachedExits, cache_exits
from policyskip.exits.rules import decisions_at
from policyskip.finite import whole_number
from policyskip.parallel.devices import device_named, usual_defaults
from policyskip.rewards import Macs, Outcome, Reward, reward_of
from policyskip.texts import one_line


class EarlyExitVectorEnv(VectorEnv[Tensor, Tensor, Tensor]):
    """An environment in which an action decides, exit by exit and for each of B images, whether the image leaves; an
    episode is one image and has at most N steps.

    **Observation** float32 (B, C + 3 + N), what a deployed system knows at the exit where the image is: the softmax,
    its entropy in nats, the top probability, the margin between the top two, and the exit's one-hot;
    :func:`~policyskip.envs.exit_sources.split_observation` splits it again. **Action** Discrete(2), integer or bool
    (B,): 1 leaves here; at the last exit every action leaves. **Reward** float32 (B,): what ``reward`` gives for the
    outcome of an image that leaves (``keep_BK`` of the outcome are the N segments that ran), 0 for an image that goes
    on. **Episode end** when the image leaves, which is at different steps for different images. Autoreset is
    ``SAME_STEP``: where an image left, the observation that ``step`` returns already shows the next image at its first
    exit. The outcome of the images that left is in ``env.outcome``; the most important of it (``correct``, ``macs``,
    ``exit``) and their last observation are in ``info["final_info"]`` and ``info["final_obs"]``, in the rows where
    ``terminated`` is true.

    In sequential order each image is shown once. When there is no next image for a row, the row is removed: the
    observation gets shorter, the other images keep their order, and it is empty once all have left.

    Images that left are not computed any further. With ``cached=True`` the outputs of every exit are computed once,
    when the environment is made, and looked up from then on. Both give the same outcomes.

    Args:
        num_envs: B, the images shown at once.
        network: the network, which is frozen here; the name of shipped weights; or cached outputs to replay, which
            need no images.
        images: the set that the images come from; None takes the split ``split`` of the set named ``data``.
        reward: the function from an outcome to the reward of each image; None is ``Macs()``.
        order: "shuffled" for training, without end; "sequential" shows each image once.
        seed: decides the shuffled order; ``reset(seed=…)`` starts the order of that seed.
        cached: whether outputs are looked up, not computed at each step.
        device: where a network and images given by name are put; by default the CPU, or where the network is.
        execution, precision: how the outputs of ``cached=True`` are computed (see ``execution/ways.py``). What is
            computed at each step is gathered, in float32.

    Raises:
        UserError: an argument is of another kind or out of range, images do not fit the network, there is no such
            name, order, split or device, or ``cached`` is true and images are augmented at random.
    """

    metadata = {  # noqa: RUF012 - Gymnasium declares it so
        "autoreset_mode": AutoresetMode.SAME_STEP,
        "render_modes": [],
    }
    family: ClassVar[str] = "exit_policy"
    key: ClassVar[str] = "early_exit"
    id: ClassVar[str] = "EarlyExit-v0"
    outcome: Outcome
    """The outcome of the images that left at the last step; of none, if none left."""

    @naming_arguments
    @usual_defaults()
    def __init__(
        self,
        num_envs: int = 256,
        network: ExitNetwork | CachedExits | str = "resnet32_digits_exits",
        images: Images | None = None,
        reward: Reward | None = None,
        order: Order = "shuffled",
        seed: int = 0,
        data: str = "digits",
        split: str = "train",
        cached: bool = False,
        device: str | None = None,
        execution: str = "auto",
        precision: str = "float32",
    ) -> None:
        how = How(execution, precision).checked()
        num_envs, seed = whole_number("num_envs", num_envs, 1, MOST_IMAGES), whole_number("seed", seed, 0)
        where = None if device is None else device_named(str(device))
        self.num_envs = num_envs
        self.reward = reward if reward is not None else Macs()
        check_reward(self.reward)
        if not isinstance(cached, bool):
            raise UserError(f"cached must be true or false, got {one_line(repr(cached), 60)}")
        computes = cached and not isinstance(network, CachedExits)
        if not computes and (how.way in ("kernel", "dense") or how.precision != "float32"):
            got = f"execution={how.way} and precision={how.precision}"
            raise UserError(f"execution and precision are for the outputs that cached=true computes, got {got}")
        if isinstance(network, str):
            network = load_exits(network).to(where or "cpu")
        if not isinstance(network, CachedExits):
            check_network("network", network, ExitNetwork)
            network.freeze()
            if images is None:
                images = load_data(data, where or network.mean.device).split(split)
            check_images(images)
            check_fit(network, batch_at(images, torch.tensor([0])).images, images.label_N)
            if cached:
                network = cache_exits(network, images, how)
        self.source: ExitSource
        if isinstance(network, CachedExits):
            self.source = Replay(network, Feed(CacheIndices(network), num_envs, order, seed))
        else:
            assert images is not None
            self.source = Live(network, Feed(images, num_envs, order, seed))
        self.costs, self.num_exits, self.num_classes = self.source.costs, self.source.num_exits, self.source.num_classes
        self.steps_per_episode = self.num_exits
        self.queue = Queue(self.source.feed)
        self.device = self.source.feed.batch.images.device
        self._macs_N, self._full_macs = self.costs.cumulative_N.to(self.device), self.costs.full
        self._ran_NN = torch.ones(self.num_exits, self.num_exits, dtype=torch.bool, device=self.device).tril()
        high_D = np.ones(self.num_classes + 3 + self.num_exits, np.float32)
        high_D[self.num_classes] = math.log(self.num_classes)
        self.single_observation_space = gymnasium.spaces.Box(np.zeros_like(high_D), high_D, dtype=np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.single_action_space = gymnasium.spaces.Discrete(2)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.advance()

    @property
    def feed(self) -> Feed:
        """Return the feed that the images come from."""
        return self.source.feed

    @property
    def cursor(self) -> int:
        """Return the position in the order of the images to go on from: that of the first image shown or, once a step
        was made, that of the next image that was not shown yet."""
        return self.queue.position - (0 if self._moved else len(self.exit_B))

    @usual_defaults()
    def seek(self, cursor: int) -> None:
        """Show the images from position ``cursor`` of the order on, each at its first exit.

        Episodes under way are given up. To continue a run exactly where it stopped, call :meth:`reset` before each
        update.
        """
        self.queue.seek(cursor)
        self.advance()

    @usual_defaults()
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, Any]]:
        """Show images at their first exit: the first of the order, with ``seed`` or if it is sequential; otherwise,
        those that come next. Episodes under way are given up.

        Returns: the observation float32 (B, C + 3 + N), and an empty info.
        """
        seed = seed_or_none(seed)
        super().reset(seed=seed)
        if seed is not None or self.queue.feed.order == "sequential":
            self.queue.seek(0, seed)
            self.advance()
        elif self._moved:
            self.advance()
        return self.observation, {}

    @usual_defaults()
    @torch.no_grad()
    def advance(self) -> Tensor:
        """Give up the episodes under way, and show the next images of the order at their first exit.

        Returns: the observation float32 (B, C + 3 + N).
        """
        batch = self.queue.take(self.num_envs)
        self.index_B, self.label_B = batch.index_B.to(self.device), batch.label_B
        self.exit_B = torch.zeros_like(self.label_B)
        self.source.restart(batch.images)
        self.observation = self.source.observation(self.index_B, self.exit_B)
        self._moved = False
        return self.observation

    @usual_defaults()
    @torch.no_grad()
    def score(self, leave: Tensor) -> Outcome:
        """Compute the outcome that the images where ``leave``, bool (B,), is true would have if they left now; nothing
        moves on.

        Raises:
            UserError: ``leave`` is of another shape, or holds other numbers than 0 and 1.
        """
        leave_B = decisions(leave, (len(self.exit_B),), self.device, "leave")
        return self._outcome(leave_B.nonzero().squeeze(1))

    def _outcome(self, rows: Tensor) -> Outcome:
        index_B, label_B, exit_B = (x.index_select(0, rows) for x in (self.index_B, self.label_B, self.exit_B))
        logits_BC, prediction_B = self.source.answer(index_B, exit_B, rows)
        keep_BN, macs_B = self._ran_NN.index_select(0, exit_B), self._macs_N.index_select(0, exit_B)
        return Outcome(logits_BC, label_B, prediction_B == label_B, keep_BN, macs_B, self._full_macs)

    def rewards(self, outcome: Outcome) -> Tensor:
        """Compute the reward of each image of an outcome, float32 (B,).

        Raises:
            UserError: the reward function fails, or returns something other than a finite float tensor (B,).
        """
        return reward_of(self.reward, outcome)

    def decisions_of(self, outcome: Outcome) -> Tensor:
        """Count the decisions that a policy made about each image of an outcome, int64 (B,); at the last exit there is
        nothing to decide."""
        return decisions_at(outcome.keep_BK.sum(1) - 1, self.num_exits)

    @usual_defaults()
    @torch.no_grad()
    def step(self, actions: Tensor | np.ndarray) -> Step:
        """Let the images leave whose action, in ``actions`` (B,), is 1, show the next images in their rows, and take
        the other images to the next exit.

        Raises:
            UserError: an action is neither 0 nor 1, or there is not one for each image.
        """
        leave_B = decisions(actions, (len(self.exit_B),), self.device)
        leave_B = leave_B | (self.exit_B == self.num_exits - 1)
        rows = leave_B.nonzero().squeeze(1)
        self.outcome = outcome = self._outcome(rows)
        reward_B = torch.zeros(len(leave_B), device=self.device)
        if len(rows):
            reward_B.index_copy_(0, rows, self.rewards(outcome))
        info = {
            "final_obs": self.observation,
            "_final_obs": leave_B,
            "final_info": {
                "correct": torch.zeros_like(leave_B).index_copy_(0, rows, outcome.correct_B),
                "macs": torch.zeros(len(leave_B), dtype=torch.float64, device=self.device).index_copy_(
                    0, rows, outcome.macs_B
                ),
                "exit": self.exit_B,
            },
            "_final_info": leave_B,
        }
        self._replace(leave_B, rows)
        return self.observation, *for_numpy(reward_B, leave_B, torch.zeros_like(leave_B)), info

    def _replace(self, leave_B: Tensor, rows: Tensor) -> None:
        """Show the next images in ``rows``, int64 (B',), where images left; the other images go on to the next exit.

        Rows for which there is no next image are removed.
        """
        batch = self.queue.take(len(rows))
        filled, closed = rows[: len(batch)], rows[len(batch) :]
        self.source.move(self.exit_B, leave_B, filled, batch.images)
        self.exit_B = torch.where(leave_B, 0, self.exit_B + 1)
        self.index_B = self.index_B.index_copy(0, filled, batch.index_B.to(self.device))
        self.label_B = self.label_B.index_copy(0, filled, batch.label_B)
        if len(closed):
            open_B = torch.ones_like(leave_B).index_fill_(0, closed, False)
            self.exit_B, self.index_B, self.label_B = self.exit_B[open_B], self.index_B[open_B], self.label_B[open_B]
            self.source.close(open_B)
        self.observation = self.source.observation(self.index_B, self.exit_B)
        self._moved = True


class EarlyExitEnv(SingleView):
    """An environment that shows one image at a time, in numpy: :class:`EarlyExitVectorEnv` with B = 1.

    Observation float32 (C + 3 + N,), action Discrete(2), reward float. ``reset`` shows an image at its first exit.
    ``step`` takes it to the next exit; with action 1, and at the last exit, ``step`` ends the episode and returns the
    observation at the exit where the image left.
    """

    vector: EarlyExitVectorEnv

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(EarlyExitVectorEnv, kwargs)
