"""Fixed keep-sets are searched here: the best that can be done without looking at the image.

A policy that decides per image has to beat the best *fixed* choice of equal cost, and backward greedy elimination alone
finds a weak one. The search here eliminates with a beam (or tries every set, where there are few), takes in the sets
that an image-independent learner found, and swaps blocks in and out until nothing helps; all on validation images.

Shapes: N images, B images in a batch, F sets on the front, K blocks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from policyskip.backbones import Backbone, Costs
from policyskip.backbones.checkpoints import WEIGHTS
from policyskip.backbones.folding import folded
from policyskip.data import Batch, Images, batch_at, spread_indices
from policyskip.data.base import IN_MEMORY_BYTES
from policyskip.errors import UserError
from policyskip.files import read, reporting_write_errors, write
from policyskip.fronts import concave_hull
from policyskip.memory import release_freed_memory
from policyskip.runs import schemas
from policyskip.runs.progress import waiting

MOST_BYTES = 2**25
"""The largest file that is read as a front: one over a thousand blocks has a tenth of it."""
Keep = tuple[bool, ...]
"""A keep-set: for each of the K blocks, whether it runs."""


def keep_text(keep: Iterable[bool]) -> str:
    """Write a keep-set as text, a 1 for each block that runs and a 0 for each that is skipped: "1101"."""
    return "".join("01"[kept] for kept in keep)


class SetScorer:
    """Counts, for fixed keep-sets, the images that the network gets right.

    Many sets are scored in one pass along the tree of their decisions: as long as two sets agree, from the first block
    on, their features are computed once.

    Args:
        backbone: the network; it stays as it is.
        images: the set to score on.
        limit: use this many of the images, spread over the set; None: all.
        batch_size: images in a batch, fewer where they are large.
        on_progress: called after every batch with what has been spent so far.

    Attributes:
        count: N, the number of images used.
        known: for each keep-set scored so far, whether each image is classified rightly, bool (N,) on the CPU.
        spent: images times blocks (residual branches) computed so far, which is what a budget bounds.
        on_batch: called after every batch with the number of its images.
    """

    def __init__(
        self,
        backbone: Backbone,
        images: Images,
        limit: int | None = None,
        batch_size: int = 250,
        on_progress: Callable[[int], object] | None = None,
    ) -> None:
        self.backbone = folded(backbone)
        self.on_progress = on_progress or (lambda spent: None)
        self.on_batch: Callable[[int], object] = lambda images: None
        index_N = spread_indices(limit or len(images), len(images))
        self.count = len(index_N)
        height, width = batch_at(images, index_N[:1]).images.shape[2:]
        batch_size = max(1, min(batch_size, 2**22 // (height * width)))
        self._images, self._batch_indices = images, index_N.split(batch_size)
        fits_in_memory = self.count * 3 * height * width <= IN_MEMORY_BYTES
        with waiting("reading images"):
            self._batches: list[Batch] | None = list(self._stream()) if fits_in_memory else None
        self.known: dict[Keep, Tensor] = {}
        self.spent = 0

    def _stream(self) -> Iterator[Batch]:
        return self._images.stream((index_B, 0) for index_B in self._batch_indices)

    def correct(self, sets: Iterable[Keep]) -> list[Tensor]:
        """Return for each set whether each image is classified rightly, bool (N,) on the CPU."""
        sets = list(sets)
        new = sorted(set(sets) - set(self.known))
        if new:
            correct: dict[Keep, list[Tensor]] = {keep: [] for keep in new}
            with torch.no_grad():
                for batch in self._batches or self._stream():
                    self._descend(self.backbone.features(batch.images), batch.label_B, 0, new, correct)
                    self.on_progress(self.spent)
                    self.on_batch(len(batch))
                    release_freed_memory()
            self.known.update({keep: torch.cat(batches) for keep, batches in correct.items()})
        return [self.known[keep] for keep in sets]

    def accuracy(self, sets: Iterable[Keep]) -> list[float]:
        """Return for each set the fraction of the images classified rightly."""
        return [correct_N.double().mean().item() for correct_N in self.correct(sets)]

    def _descend(self, x: Tensor, label_B: Tensor, k: int, sets: list[Keep], correct: dict[Keep, list[Tensor]]) -> None:
        """Run the blocks from k on for all ``sets``, which agree on the blocks before; append to ``correct`` what comes
        out, bool (B,) on the CPU for each set. ``x`` holds the features that enter block k."""
        if k == self.backbone.num_blocks:
            correct[sets[0]].append((self.backbone.head(x).argmax(1) == label_B).cpu())
            return
        block = self.backbone.blocks[k]
        dropping = [keep for keep in sets if not keep[k]]
        keeping = [keep for keep in sets if keep[k]]
        if dropping:
            self._descend(block.shortcut(x), label_B, k + 1, dropping, correct)
        if keeping:
            self.spent += len(x)
            self._descend(block(x), label_B, k + 1, keeping, correct)


@dataclass(frozen=True)
class StaticFront:
    """Holds the best fixed keep-set found of every size, from no block to all K, and every other on the hull over MACs.

    Attributes:
        sets: F keep-sets.
        accuracy: of each set, on the validation images that it was chosen on.
        macs: of each set.
        images: number of validation images.
        finished: False if the search ran out of its budget.
        backbone, data: content hash and fingerprint of the network and the images of the search.
    """

    sets: list[Keep]
    accuracy: list[float]
    macs: list[float]
    images: int
    finished: bool
    backbone: str
    data: str

    @property
    def hull(self) -> list[int]:
        """Return the indices of the sets, cheapest first, that are best on validation images alone or mixed."""
        return concave_hull(self.macs, self.accuracy)

    def mix_at(self, macs: float) -> list[tuple[int, float]]:
        """Find the one or two sets that, mixed at random, cost ``macs`` and are most accurate on validation images.

        Mixing two fixed sets reaches every point on the line between them, so the best static choice at a given cost
        lies on the upper concave hull of the front. A cost outside the front's range gives the nearest end.

        Returns: pairs (index of the set, weight in (0, 1]); the weights sum to 1.
        """
        hull = self.hull
        above = next((position for position, i in enumerate(hull) if self.macs[i] > macs), None)
        if above is None or above == 0:
            return [(hull[-1 if above is None else 0], 1.0)]
        low, high = hull[above - 1], hull[above]
        weight = (macs - self.macs[low]) / (self.macs[high] - self.macs[low])
        return [(i, weight_i) for i, weight_i in ((low, 1 - weight), (high, weight)) if weight_i > 0]

    def save(self, path: Path) -> None:
        """Write the front as JSON.

        Raises:
            UserError: the file cannot be written.
        """
        with reporting_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        content = asdict(self) | {"sets": [keep_text(keep) for keep in self.sets]}
        write(path, (json.dumps(content, indent=1) + "\n").encode())

    @staticmethod
    def load(path: Path) -> StaticFront:
        """Read the front in a file.

        Raises:
            OSError, ValueError: the file is not there, or holds no front.
        """
        try:
            content: dict[str, Any] = schemas.check("front.json", json.loads(read(path, MOST_BYTES)))
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error
        content["sets"] = [tuple(mark == "1" for mark in keep) for keep in content["sets"]]
        if unknown := sorted(set(content) - {field.name for field in fields(StaticFront)}):
            raise ValueError(f"it has a key {unknown[0]!r:.80}")
        front = StaticFront(**content)
        lengths = {len(front.sets), len(front.accuracy), len(front.macs)}
        if len(lengths) > 1 or len({len(keep) for keep in front.sets}) > 1:
            raise ValueError("its sets, accuracies and costs do not belong together")
        return front


def search(
    scorer: SetScorer, budget: float, beam: int = 3, hints: Sequence[Keep] = ()
) -> tuple[list[Keep], list[float], bool]:
    """Search the best keep-set of every size.

    Every set is tried if that fits the budget. Otherwise: backward elimination with a beam; then, for every size,
    swaps of one block for another and the neighbours of better sets at the next sizes, until none helps.

    Args:
        scorer: scores sets on validation images.
        budget: bound on images times blocks computed; checked between steps.
        beam: sets of each size that the elimination goes on from.
        hints: sets found elsewhere, such as by an image-independent learner.

    Returns: sets, the smallest first; their accuracies; and whether the search finished within the budget.
    """
    K = scorer.backbone.num_blocks
    if tries_every_set(K, scorer.count, budget):
        every = [tuple(bool(code >> k & 1) for k in range(K)) for code in range(2**K)]
        scorer.accuracy(every)
        return *_best_by_size(scorer), True

    level: list[Keep] = [(True,) * K]
    scorer.accuracy([*level, (False,) * K, *hints])
    for _ in range(K - 1):
        if scorer.spent > budget:
            return *_best_by_size(scorer), False
        children = sorted({child for keep in level for child in _without_one(keep)})
        accuracy = dict(zip(children, scorer.accuracy(children), strict=True))
        level = sorted(children, key=lambda keep: -accuracy[keep])[:beam]

    best, _ = _best_by_size(scorer)
    todo = list(best)
    while todo:
        if scorer.spent > budget:
            return *_best_by_size(scorer), False
        keep = todo.pop(0)
        scorer.accuracy({*_swaps(keep), *_without_one(keep), *_with_one(keep)})
        better, _ = _best_by_size(scorer)
        todo = [new for new in better if new in todo or new not in best]
        best = better
    return *_best_by_size(scorer), True


def tries_every_set(K: int, count: int, budget: float) -> bool:
    """Return whether :func:`search` can afford all 2^K sets on ``count`` images."""
    return 2 ** (K + 1) * count <= budget


def _best_by_size(scorer: SetScorer) -> tuple[list[Keep], list[float]]:
    """Return the most accurate known set of each size and its accuracy; of equals, the first in order of the sets."""
    best: dict[int, tuple[float, Keep]] = {}
    for keep in sorted(scorer.known):
        accuracy = scorer.known[keep].double().mean().item()
        if sum(keep) not in best or accuracy > best[sum(keep)][0]:
            best[sum(keep)] = (accuracy, keep)
    ordered = [best[size] for size in sorted(best)]
    return [keep for _, keep in ordered], [accuracy for accuracy, _ in ordered]


def _flip(keep: Keep, *blocks: int) -> Keep:
    return tuple(kept != (k in blocks) for k, kept in enumerate(keep))


def _without_one(keep: Keep) -> list[Keep]:
    return [_flip(keep, k) for k, kept in enumerate(keep) if kept]


def _with_one(keep: Keep) -> list[Keep]:
    return [_flip(keep, k) for k, kept in enumerate(keep) if not kept]


def _swaps(keep: Keep) -> list[Keep]:
    return [_flip(keep, i, j) for i, a in enumerate(keep) for j, b in enumerate(keep) if a and not b]


def find_front(
    backbone: Backbone,
    images: Images,
    costs: Costs,
    budget: float,
    limit: int,
    hints: Sequence[Keep] = (),
    on_progress: Callable[[int], object] | None = None,
) -> StaticFront:
    """Search the static front of a backbone on at most ``limit`` validation images.

    Args:
        costs: of the backbone's blocks.
        budget, hints: see :func:`search`.
        on_progress: see :class:`SetScorer`.

    Raises:
        UserError: ``budget`` is negative, or ``limit`` below 1.
    """
    if budget < 0 or limit < 1:
        raise UserError(f"front.budget must not be negative and front.images at least 1, got {budget} and {limit}")
    scorer = SetScorer(backbone, images, limit, on_progress=on_progress)
    by_size, _, finished = search(scorer, budget, hints=hints)
    tried = sorted(scorer.known)
    hull = concave_hull(costs.of(torch.tensor(tried)).tolist(), scorer.accuracy(tried))
    sets = sorted({*by_size, *(tried[i] for i in hull)}, key=lambda keep: (sum(keep), keep))
    accuracy, macs = scorer.accuracy(sets), costs.of(torch.tensor(sets)).tolist()
    return StaticFront(sets, accuracy, macs, scorer.count, finished, backbone.content_hash(), images.fingerprint())


def known_front(
    backbone: Backbone, images: Images, cache: Path, at_least: int = 1, search_key: str = ""
) -> StaticFront | None:
    """Find a front searched earlier on this very network and these very images: one that ships, or one in ``cache``.

    Args:
        cache: the folder that :func:`remember` wrote to.
        at_least: the least number of images that the search must have used.
        search_key: names the settings of a search; one that ran out of its budget is found by its own key alone,
            because another budget would have given another front.
    """
    searched_on = (backbone.content_hash(), images.fingerprint())
    stored = [cache / _file_name(*searched_on), cache / _file_name(*searched_on, search_key)]
    for path in [*sorted(WEIGHTS.glob("*.front.json")), *stored]:
        try:
            front = StaticFront.load(path)
        except (OSError, ValueError):
            continue  # absent, or damaged: it is searched anew
        fits = (front.backbone, front.data) == searched_on and len(front.sets[0]) == backbone.num_blocks
        if fits and front.images >= at_least and (front.finished or path == stored[1]):
            return front
    return None


def remember(front: StaticFront, cache: Path, search_key: str) -> None:
    """Write a front into the folder ``cache``, for :func:`known_front`.

    Raises:
        UserError: it cannot be written.
    """
    front.save(cache / _file_name(front.backbone, front.data, "" if front.finished else search_key))


def _file_name(backbone: str, data: str, search_key: str = "") -> str:
    """Return the name of a file in a cache: content hash and fingerprint, and a key unless the search finished."""
    return f"{'-'.join(filter(None, (backbone, data, search_key)))}.json"
