"""The two sources that the exit environment's observations come from: exits computed step by step, and cached outputs.

Shapes: B images side by side, B' of them that begin or leave, N exits, C classes, M images of a set, D numbers of an
observation (C + 3 + N).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from policyskip.backbones.exits import ExitCosts, ExitNetwork, State, count_exit_costs, rows_of
from policyskip.data import Batch, Feed
from policyskip.data.base import WHOLE
from policyskip.exits.cache import CachedExits
from policyskip.exits.rules import entropy, top_two
from policyskip.finite import whole_number


class ExitObservation(NamedTuple):
    """Holds the columns of an observation: softmax float32 (B, C), three measures of it float32 (B,), int64 exit
    (B,)."""

    probability_BC: Tensor
    entropy_B: Tensor
    top_B: Tensor
    margin_B: Tensor
    exit_B: Tensor


def observe(logits_BC: Tensor, exit_B: Tensor, num_exits: int) -> Tensor:
    """Make the observation of images at exits ``exit_B``, int64 (B,), with these logits, float (B, C).

    Returns: float32 (B, C + 3 + N): softmax (C), entropy in nats, top probability, margin between the top two, and the
    exit's one-hot (N).
    """
    probability_BC = logits_BC.float().softmax(1)
    top_B, second_B = top_two(probability_BC).unbind(1)
    measures_B3 = torch.stack([entropy(probability_BC), top_B, top_B - second_B], dim=1)
    return torch.cat([probability_BC, measures_B3, F.one_hot(exit_B, num_exits).float()], dim=1)


def split_observation(observation: Tensor, num_classes: int) -> ExitObservation:
    """Split an observation, float32 (B, C + 3 + N), into its columns: the inverse of :func:`observe`."""
    C = num_classes
    entropy_B, top_B, margin_B = observation[:, C : C + 3].unbind(1)
    return ExitObservation(observation[:, :C], entropy_B, top_B, margin_B, observation[:, C + 3 :].argmax(1))


class ExitSource(Protocol):
    """Gives the logits of the images that are shown, each at its present exit.

    Attributes:
        feed: the feed that the images come from.
        costs: MACs of every exit.
    """

    feed: Feed
    costs: ExitCosts
    num_exits: int
    num_classes: int

    def restart(self, images: Tensor) -> None:
        """Replace all images shown by ``images`` (B, …), taken from batches of the feed, each at its first exit."""
        ...

    def move(self, exit_B: Tensor, leave_B: Tensor, rows: Tensor, images: Tensor) -> None:
        """Take the images that do not leave one exit further, and let other images begin in rows of those that do.

        Args:
            exit_B: int64 (B,), the exit of each image before the move.
            leave_B: bool (B,), whether the image leaves.
            rows: int64 (B',), the rows in which ``images`` (B', …) begin at their first exit.
        """
        ...

    def close(self, open_B: Tensor) -> None:
        """Remove the rows where ``open_B``, bool (B,), is false: for them there is no next image."""
        ...

    def answer(self, index_B: Tensor, exit_B: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (B', C) and top class, int64 (B',), of the images in ``rows``, int64 (B',).

        Args:
            index_B, exit_B: int64 (B',), the indices of these images in the set, and their exits.
        """
        ...

    def observation(self, index_B: Tensor, exit_B: Tensor) -> Tensor:
        """Return the observation of all images shown, float32 (B, D), from their indices in the set and their exits,
        int64 (B,)."""
        ...


class Live:
    """A source that computes each image up to the exit where it leaves.

    Every image that does not leave goes one exit further with every step. So the images at exit n + 1 are those that
    were at exit n and stayed: one state per exit, with its images in the order of the rows, is all there is to carry.
    """

    def __init__(self, network: ExitNetwork, feed: Feed) -> None:
        self.network, self.feed = network, feed
        self.num_exits, self.num_classes = network.num_exits, network.num_classes
        _, channels, height, width = feed.batch.images.shape
        self.costs = count_exit_costs(network, (channels, height, width))

    def restart(self, images: Tensor) -> None:
        self._states: dict[int, State] = {}
        self.logits_BC = torch.zeros(len(images), self.num_classes, device=images.device)
        self._begin(images, torch.arange(len(images), device=images.device))

    def _begin(self, images: Tensor, rows: Tensor) -> None:
        if len(images):
            self._states[0] = self.network.segment(0, self.network.begin(images))
            self.logits_BC[rows] = self.network.head(0, self._states[0]).float()

    def move(self, exit_B: Tensor, leave_B: Tensor, rows: Tensor, images: Tensor) -> None:
        exit_B, leave_B = exit_B.cpu(), leave_B.cpu()  # on a GPU each ``nonzero`` would wait for all it still has to do
        states, self._states = self._states, {}
        for n, state in states.items():
            here = (exit_B == n).nonzero().squeeze(1)
            staying = (~leave_B[here]).nonzero().squeeze(1)
            if len(staying):
                kept = state if len(staying) == len(here) else rows_of(state, staying.to(images.device))
                self._states[n + 1] = self.network.segment(n + 1, kept)
                staying_rows = here[staying].to(images.device)
                self.logits_BC[staying_rows] = self.network.head(n + 1, self._states[n + 1]).float()
        self._begin(images, rows)

    def close(self, open_B: Tensor) -> None:
        self.logits_BC = self.logits_BC[open_B]

    def answer(self, index_B: Tensor, exit_B: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        logits_BC = self.logits_BC[rows]
        return logits_BC, logits_BC.argmax(1)

    def observation(self, index_B: Tensor, exit_B: Tensor) -> Tensor:
        return observe(self.logits_BC, exit_B, self.num_exits)


class Replay:
    """A source that looks up cached outputs: a step is a few look-ups in tables of M·N rows.

    It uses ``index_select`` throughout, because indexing with brackets takes several times as long.
    """

    def __init__(self, cache: CachedExits, feed: Feed) -> None:
        self.cache, self.feed, self.costs = cache, feed, cache.costs
        self.num_exits, self.num_classes = cache.num_exits, cache.num_classes
        self._logits = cache.logits_MNC.flatten(0, 1)
        exits = torch.arange(self.num_exits, device=self._logits.device).repeat(len(cache))
        self._predictions = self._logits.argmax(1)
        self._observations = observe(self._logits, exits, self.num_exits)

    def restart(self, images: Tensor) -> None:
        pass

    def move(self, exit_B: Tensor, leave_B: Tensor, rows: Tensor, images: Tensor) -> None:
        pass

    def close(self, open_B: Tensor) -> None:
        pass

    def answer(self, index_B: Tensor, exit_B: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        at_B = index_B * self.num_exits + exit_B
        return self._logits.index_select(0, at_B), self._predictions.index_select(0, at_B)

    def observation(self, index_B: Tensor, exit_B: Tensor) -> Tensor:
        return self._observations.index_select(0, index_B * self.num_exits + exit_B)


class CacheIndices:
    """A set of images that holds only indices: in its batches, ``images`` are indices of the cache, int64 (B,)."""

    difficulty: Tensor | None = None
    group_N: Tensor | None = None

    def __init__(self, cache: CachedExits) -> None:
        self.label_N = cache.label_M
        self.fingerprint = cache.fingerprint

    def __len__(self) -> int:
        return len(self.label_N)

    def stream(self, orders: Iterable[tuple[Tensor, int]], rows: slice = WHOLE) -> Iterator[Batch]:
        for index_B in (whole_B[rows] for whole_B, _ in orders):
            on_device = index_B.to(self.label_N.device)
            yield Batch(on_device, self.label_N.index_select(0, on_device), index_B)

    def plain(self) -> CacheIndices:
        return self


class Queue:
    """Hands out the images of a feed in its order, any number at a time, whatever the size of the feed's batches."""

    def __init__(self, feed: Feed) -> None:
        self.feed = feed
        self._taken = 0

    @property
    def position(self) -> int:
        """Return the position, in the order of the images, of the next image to be taken."""
        return self.feed.cursor * self.feed.batch_size + self._taken

    def seek(self, position: int, seed: int | None = None) -> None:
        """Go to a position in the order of ``seed``, or in the present order if that is None.

        Raises:
            UserError: ``position`` or ``seed`` is no whole number, or negative.
        """
        position = whole_number("cursor", position, 0)
        self.feed.seek(position // self.feed.batch_size, seed)
        self._taken = position % self.feed.batch_size

    def take(self, count: int) -> Batch:
        """Take the next ``count`` images; fewer, or none, when a sequential order ends."""
        pieces = [self.feed.batch.empty()]
        while count and len(self.feed.batch):
            batch, rows = self.feed.batch, slice(self._taken, self._taken + count)
            pieces.append(Batch(batch.images[rows], batch.label_B[rows], batch.index_B[rows]))
            count -= len(pieces[-1])
            self._taken += len(pieces[-1])
            if self._taken == len(batch):
                self.feed.advance()
                self._taken = 0
        if len(pieces) <= 2:
            return pieces[-1]
        images, label_B, index_B = (
            torch.cat(column) for column in zip(*((b.images, b.label_B, b.index_B) for b in pieces), strict=True)
        )
        return Batch(images, label_B, index_B)
