"""Fixed keep-sets are scored here on a growing number of images, along the tree of their decisions.

Shapes: N images, n of them, B images in a batch, F sets, K blocks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from policyskip.backbones import Backbone
from policyskip.data import Batch, Images, batch_at, spread_indices
from policyskip.data.base import IN_MEMORY_BYTES
from policyskip.execution.ways import DEFAULT, Execution, How
from policyskip.memory import BatchSplitter, release_freed_memory
from policyskip.runs.progress import waiting

Keep = tuple[bool, ...]
"""A keep-set: for each of the K blocks, whether it runs."""
PIXELS_AT_ONCE = 2**23
"""Kernels score as many sets one beside the other as have so many pixels in all."""
CPU_BATCH, GPU_BATCH = 250, 4096
"""Images in a batch, at most. On a GPU a block takes as long for one image as for a thousand small ones."""


def keep_text(keep: Iterable[bool]) -> str:
    """Write a keep-set as text, a 1 for each block that runs and a 0 for each that is skipped: "1101"."""
    return "".join("01"[kept] for kept in keep)


class Scores(NamedTuple):
    """Holds what a keep-set does with the first n images of a race: bool (n,) whether each is classified rightly, and
    float16 (n,) the probability that the network gives to its label, both on the CPU."""

    right_n: Tensor
    probability_n: Tensor

    def __len__(self) -> int:
        return len(self.right_n)

    def followed_by(self, more: Scores) -> Scores:
        """Return these scores with those of the next images behind them."""
        return Scores(*(torch.cat(pair) for pair in zip(self, more, strict=True)))

    def of(self, first: int, last: int) -> Scores:
        """Return the scores of the images from ``first`` to before ``last``."""
        return Scores(self.right_n[first:last], self.probability_n[first:last])


class SetScorer:
    """Scores fixed keep-sets: which images does the network get right, and how sure is it of their labels.

    Where images are gathered, many sets are scored in one pass along the tree of their decisions: as long as two sets
    agree, from the first block on, their features are computed once. Kernels score many sets one beside the other: they
    compute more then, and sooner. The images stand in a random order that is always the same, so that the first
    n of them are a fair sample, and a set can be scored on few images first and on more later.

    Args:
        backbone: the network; it stays as it is.
        images: the set to score on.
        limit: use this many of the images, spread over the set; None: all.
        batch_size: images in a batch; None: as many as the device and its memory suggest.
        on_progress: called after every batch with what has been spent so far.
        how: in which way and precision the network is executed.

    Attributes:
        count: N, the number of images used.
        known: the scores of each keep-set scored so far.
        stored: scores that an earlier search computed. They are taken from here instead of being computed, and are
            counted in ``spent`` all the same, so that a search that goes on does what it would have done in one go.
        spent: images times blocks (residual branches) that the scores so far take along the tree, which is what a
            budget bounds, whatever the way of execution.
        has_computed: whether any score was computed, rather than taken from ``stored``.
        on_batch: called after every batch with the number of its images.
    """

    def __init__(
        self,
        backbone: Backbone,
        images: Images,
        limit: int | None = None,
        batch_size: int | None = None,
        on_progress: Callable[[int], object] | None = None,
        how: How = DEFAULT,
    ) -> None:
        self.on_progress = on_progress or (lambda spent: None)
        self.on_batch: Callable[[int], object] = lambda images: None
        index_N = spread_indices(limit or len(images), len(images))
        self.count = len(index_N)
        self._order_N = torch.randperm(self.count, generator=torch.Generator().manual_seed(0))
        self._images, self._index_N = images, index_N[self._order_N]
        first = batch_at(images, index_N[:1])
        _, channels, height, width = first.images.shape
        self.execution = Execution(backbone, (channels, height, width), *how)
        self.backbone = self.execution.network
        self._batch_size = self._largest_batch(first) if batch_size is None else batch_size
        self._split = BatchSplitter()
        fits_in_memory = self.count * first.images[0].numel() <= IN_MEMORY_BYTES
        with waiting("reading images"):
            self._batches: list[Batch] | None = None
            self._batches = list(self._stream(0, self.count)) if fits_in_memory else None
        self.known: dict[Keep, Scores] = {}
        self.stored: Mapping[Keep, Scores] = {}
        self.spent, self.has_computed = 0, False

    def _largest_batch(self, one: Batch) -> int:
        """Return the images that a batch may have, after a batch ``one`` of one image."""
        height, width = one.images.shape[2:]
        if one.images.device.type == "cpu":
            return max(1, min(CPU_BATCH, 2**22 // (height * width)))
        with torch.no_grad():
            features = self.backbone.features(one.images)
        free, _ = torch.cuda.mem_get_info(one.images.device)
        layers = self.backbone.num_blocks + 8  # the features that are alive at once, at worst
        return max(1, min(GPU_BATCH, free // 2 // (features.numel() * features.element_size() * layers)))

    def _together(self, images: Tensor) -> int:
        """Return the number of sets that are scored one beside the other on images (B, 3, H, W)."""
        return max(1, PIXELS_AT_ONCE // images[:, 0].numel()) if self.execution.way == "kernel" else 1

    def _stream(self, first: int, last: int) -> Iterator[Batch]:
        """Yield the images from ``first`` to before ``last``, in batches."""
        if self._batches is None:
            yield from self._images.stream(
                (index_B, 0) for index_B in self._index_N[first:last].split(self._batch_size)
            )
            return
        begin = 0
        for batch in self._batches:
            rows = slice(max(first - begin, 0), max(min(last - begin, len(batch)), 0))
            begin += len(batch)
            if rows.start < rows.stop:
                yield Batch(batch.images[rows], batch.label_B[rows], batch.index_B[rows])

    def price(self, sets: Iterable[Keep], images: int | None = None) -> int:
        """Return what :meth:`score` of these sets would spend."""
        last = self.count if images is None else min(images, self.count)
        return sum((last - first) * branches(new) for first, new in self._unscored(sets, last))

    def _unscored(self, sets: Iterable[Keep], last: int) -> list[tuple[int, list[Keep]]]:
        """Return the sets that are not scored on ``last`` images, sorted, by the number of those that they are scored
        on."""
        scored: dict[int, list[Keep]] = defaultdict(list)
        for keep in sorted(set(sets)):
            if (before := len(self.known.get(keep, ()))) < last:
                scored[before].append(keep)
        return sorted(scored.items())

    def score(self, sets: Iterable[Keep], images: int | None = None) -> None:
        """Score sets on the first ``images`` images of the race (None: on all N), as far as they are not scored yet."""
        last = self.count if images is None else min(images, self.count)
        for first, new in self._unscored(sets, last):
            spent = self.spent + (last - first) * branches(new)
            have = {keep: self.stored[keep].of(first, last) for keep in new if len(self.stored.get(keep, ())) >= last}
            if missing := [keep for keep in new if keep not in have]:
                have |= self._computed(missing, first, last)
            self.spent = spent
            self.on_progress(spent)
            for keep in new:
                before_scores = self.known.get(keep)
                self.known[keep] = before_scores.followed_by(have[keep]) if before_scores else have[keep]

    def correct(self, sets: Iterable[Keep]) -> list[Tensor]:
        """Return for each set whether each image is classified rightly, bool (N,) on the CPU in the images' own
        order."""
        sets = list(sets)
        self.score(sets)
        back_N = self._order_N.argsort()
        return [self.known[keep].right_n[back_N] for keep in sets]

    def accuracy(self, sets: Iterable[Keep], images: int | None = None) -> list[float]:
        """Return for each set the fraction of the first ``images`` images (None: of all N) classified rightly."""
        sets = list(sets)
        self.score(sets, images)
        return [self.known[keep].right_n[:images].double().mean().item() for keep in sets]

    def _computed(self, sets: list[Keep], first: int, last: int) -> dict[Keep, Scores]:
        """Run the network with each of the sets on the images from ``first`` to before ``last``."""
        self.has_computed = True
        scores: dict[Keep, list[Scores]] = {keep: [] for keep in sets}
        per_image, done = branches(sets), 0
        for batch in self._stream(first, last):
            for part in self._split(lambda rows, batch=batch: self._run(sets, batch, rows), len(batch), len(batch)):  # type: ignore[misc]
                for keep, of_part in zip(sets, part, strict=True):
                    scores[keep].append(of_part)
            done += len(batch)
            self.on_progress(self.spent + done * per_image)
            self.on_batch(len(batch))
            release_freed_memory()
        return {keep: Scores(*map(torch.cat, zip(*parts, strict=True))) for keep, parts in scores.items()}

    @torch.no_grad()
    def _run(self, sets: list[Keep], batch: Batch, rows: slice) -> list[Scores]:
        """Return the scores of each set on some rows of a batch."""
        found: dict[Keep, Tensor] = {}
        images, label_B = batch.images[rows], batch.label_B[rows]
        if self.execution.way == "gather":
            with self.execution.exactly():
                self._descend(self.backbone.features(images), True, 0, sets, found)
        else:
            keep_SK = torch.tensor(sets, device=images.device)
            for first in range(0, len(sets), size := self._together(images)):
                keep_SBK = keep_SK[first : first + size].unsqueeze(1).expand(-1, len(images), -1)
                logits_SBC = self.execution.logits_many(images, keep_SBK, may_record=False)  # S is often another
                found |= zip(sets[first : first + size], logits_SBC, strict=True)
        right, probability = [], []
        for keep in sets:  # on the device, so that a GPU is waited for once a batch
            logits_BC = found[keep]
            right.append(logits_BC.argmax(1) == label_B)
            probability.append(logits_BC.float().softmax(1).gather(1, label_B.unsqueeze(1)).squeeze(1))
        pairs = zip(torch.stack(right).cpu(), torch.stack(probability).half().cpu(), strict=True)
        return [Scores(*pair) for pair in pairs]

    def _descend(self, x: Tensor, own: bool, k: int, sets: Sequence[Keep], found: dict[Keep, Tensor]) -> None:
        """Run the blocks from k on for all ``sets``, which agree on the blocks before; put the logits into ``found``.

        Args:
            x: the features that enter block k.
            own: whether nobody else needs ``x``, so that it may be overwritten.
        """
        for block in self.backbone.blocks[k:]:
            keeping = [keep for keep in sets if keep[k]]
            k += 1
            if len(keeping) < len(sets):
                dropped = block.shortcut(x)
                is_own = dropped.data_ptr() != x.data_ptr()
                if not keeping:
                    x, own = dropped, own or is_own
                    continue
                self._descend(dropped, is_own, k, [keep for keep in sets if not keep[k - 1]], found)
                sets = keeping
            x, own = block(x, inplace=own), True
        found[sets[0]] = self.backbone.head(x)


def branches(sets: Sequence[Keep]) -> int:
    """Return how many residual branches one image needs for all of the sorted, different ``sets`` along their tree."""
    if not sets:
        return 0
    total = sum(sets[0])
    for before, keep in pairwise(sets):
        common = next(k for k, (a, b) in enumerate(zip(before, keep, strict=True)) if a != b)
        total += sum(keep[common:])
    return total
