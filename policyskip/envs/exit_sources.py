"""Where the exit environment gets its images from, and what the exits say of them: computed, or looked up.

Shapes: B images side by side, B' of them that begin, N exits, C classes, M images of a set, D numbers of an
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


class Seen(NamedTuple):
    """An observation taken apart: float32 (B, C) and (B,), and int64 (B,)."""

    probability_BC: Tensor
    entropy_B: Tensor
    top_B: Tensor
    margin_B: Tensor
    exit_B: Tensor


def observe(logits_BC: Tensor, exit_B: Tensor, num_exits: int) -> Tensor:
    """What is known at exits ``exit_B``, int64 (B,): float32 (B, C + 3 + N).

    Softmax (C), entropy in nats, top probability, margin between the top two, exit one-hot (N), side by side.
    """
    probability_BC = logits_BC.float().softmax(1)
    top_B, second_B = top_two(probability_BC).unbind(1)
    measures_B3 = torch.stack([entropy(probability_BC), top_B, top_B - second_B], dim=1)
    return torch.cat([probability_BC, measures_B3, F.one_hot(exit_B, num_exits).float()], dim=1)


def read(observation: Tensor, num_classes: int) -> Seen:
    """Take an observation (B, C + 3 + N) apart; a threshold rule needs ``probability_BC`` and ``exit_B``."""
    C = num_classes
    entropy_B, top_B, margin_B = observation[:, C : C + 3].unbind(1)
    return Seen(observation[:, :C], entropy_B, top_B, margin_B, observation[:, C + 3 :].argmax(1))


class Source(Protocol):
    """What the exits say of the images that are shown.

    Attributes:
        feed: where the images come from.
        costs: MACs of every exit.
    """

    feed: Feed
    costs: ExitCosts
    num_exits: int
    num_classes: int

    def restart(self, images: Tensor) -> None:
        """Forget what is shown; begin with ``images`` (B, …), of a batch of the feed, each at its first exit."""
        ...

    def move(self, exit_B: Tensor, leave_B: Tensor, rows: Tensor, images: Tensor) -> None:
        """Images at exits ``exit_B`` that do not leave go on to the next; ``images`` (B', …) begin in ``rows``."""
        ...

    def close(self, open_B: Tensor) -> None:
        """Only rows where ``open_B`` is true are left."""
        ...

    def answer(self, index_B: Tensor, exit_B: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B', C) and top class, int64 (B',), of the images in ``rows``.

        Args:
            index_B, exit_B: int64 (B',), their places in the set and their exits.
        """
        ...

    def observation(self, index_B: Tensor, exit_B: Tensor) -> Tensor:
        """The observation of all rows, float32 (B, D)."""
        ...


class Live:
    """Compute each image as far as it goes.

    Every image that does not leave goes one exit further with every step. So those at exit n + 1 are those that were at
    exit n and stayed: a state for each exit is all there is to carry, in the order of the rows.
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
        exit_B, leave_B = exit_B.cpu(), leave_B.cpu()  # one transfer; finding rows would stop the device every time
        states, self._states = self._states, {}
        for n, state in states.items():
            here = (exit_B == n).nonzero().squeeze(1)
            staying = (~leave_B[here]).nonzero().squeeze(1)
            if len(staying):
                part = state if len(staying) == len(here) else rows_of(state, staying.to(images.device))
                self._states[n + 1] = self.network.segment(n + 1, part)
                there = here[staying].to(images.device)
                self.logits_BC[there] = self.network.head(n + 1, self._states[n + 1]).float()
        self._begin(images, rows)

    def close(self, open_B: Tensor) -> None:
        self.logits_BC = self.logits_BC[open_B]

    def answer(self, index_B: Tensor, exit_B: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        logits_BC = self.logits_BC[rows]
        return logits_BC, logits_BC.argmax(1)

    def observation(self, index_B: Tensor, exit_B: Tensor) -> Tensor:
        return observe(self.logits_BC, exit_B, self.num_exits)


class Replay:
    """Look up what was computed before: a step is a few look-ups in tables of M·N rows.

    ``index_select`` throughout: indexing with brackets takes several times as long.
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


class Places:
    """The places of a cache as a set to stream: batches whose ``images`` are just their places, int64 (B,)."""

    difficulty: Tensor | None = None

    def __init__(self, cache: CachedExits) -> None:
        self.label_N = cache.label_M
        self.fingerprint = cache.fingerprint

    def __len__(self) -> int:
        return len(self.label_N)

    def stream(self, orders: Iterable[tuple[Tensor, int]], part: slice = WHOLE) -> Iterator[Batch]:
        for index_B in (whole_B[part] for whole_B, _ in orders):
            on_device = index_B.to(self.label_N.device)
            yield Batch(on_device, self.label_N.index_select(0, on_device), index_B)

    def plain(self) -> Places:
        return self


class Queue:
    """The images of a feed one after the other, whatever its batches. ``place`` is that of the next in the order."""

    def __init__(self, feed: Feed) -> None:
        self.feed = feed
        self._taken = 0

    @property
    def place(self) -> int:
        return self.feed.cursor * self.feed.batch_size + self._taken

    def seek(self, place: int, seed: int | None = None) -> None:
        """Go to a place in the order (of that seed)."""
        self.feed.seek(place // self.feed.batch_size, seed)
        self._taken = place % self.feed.batch_size

    def take(self, count: int) -> Batch:
        """The next ``count`` images; fewer, or none, when a sequential order ends."""
        parts = [self.feed.batch.empty()]
        while count and len(self.feed.batch):
            batch, part = self.feed.batch, slice(self._taken, self._taken + count)
            parts.append(Batch(batch.images[part], batch.label_B[part], batch.index_B[part]))
            count -= len(parts[-1])
            self._taken += len(parts[-1])
            if self._taken == len(batch):
                self.feed.advance()
                self._taken = 0
        if len(parts) <= 2:
            return parts[-1]
        images, label_B, index_B = (
            torch.cat(column) for column in zip(*((b.images, b.label_B, b.index_B) for b in parts), strict=True)
        )
        return Batch(images, label_B, index_B)
