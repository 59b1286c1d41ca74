"""Fixed keep-sets: the best that can be done without looking at the image.

A policy that decides per image has to beat the best *fixed* choice of equal cost, and backward
greedy elimination alone is a weak one. The search here eliminates with a beam (or tries every set,
where there are few), takes in the sets that an image-independent learner found, and swaps blocks
in and out until nothing helps; all of it on validation images.

Shapes: N images, F sets on the front, K blocks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from policyskip.backbones import Backbone, Costs
from policyskip.backbones.checkpoints import WEIGHTS
from policyskip.backbones.folding import folded
from policyskip.data.base import IN_MEMORY_BYTES, Batch, Images, batch_at, spread_indices
from policyskip.errors import UserError
from policyskip.files import refusing, write
from policyskip.fronts import concave_hull
from policyskip.memory import release_freed_memory

Keep = tuple[bool, ...]


class SetScorer:
    """Counts, for fixed keep-sets, the images that the network gets right.

    Sets are answered together, along the tree of their decisions: what two sets have in common up to some block is
    computed once. ``spent`` counts images times blocks (residual branches) computed, and is what a budget bounds;
    ``tell`` hears of it batch by batch.
    """

    def __init__(
        self,
        backbone: Backbone,
        images: Images,
        limit: int | None = None,
        batch_size: int = 250,
        tell: Callable[[int], object] | None = None,
    ) -> None:
        self.backbone = folded(backbone)
        self.tell = tell or (lambda spent: None)
        index_N = spread_indices(limit or len(images), len(images))
        self.count = len(index_N)
        height, width = batch_at(images, index_N[:1]).images.shape[2:]
        batch_size = max(1, min(batch_size, 2**22 // (height * width)))
        self._images, self._parts = images, list(index_N.split(batch_size))
        in_memory = self.count * 3 * height * width <= IN_MEMORY_BYTES
        self._batches: list[Batch] | None = list(self._stream()) if in_memory else None
        self.known: dict[Keep, Tensor] = {}
        self.spent = 0

    def _stream(self) -> Iterator[Batch]:
        return self._images.stream((part, 0) for part in self._parts)

    def correct(self, sets: Iterable[Keep]) -> list[Tensor]:
        """Whether each image is classified rightly, bool (N,) on the CPU, for each set."""
        sets = list(sets)
        new = sorted(set(sets) - set(self.known))
        if new:
            parts: dict[Keep, list[Tensor]] = {keep: [] for keep in new}
            with torch.no_grad():
                for batch in self._batches or self._stream():
                    self._descend(self.backbone.features(batch.images), batch.label_B, 0, new, parts)
                    self.tell(self.spent)
                    release_freed_memory()
            self.known.update({keep: torch.cat(part) for keep, part in parts.items()})
        return [self.known[keep] for keep in sets]

    def accuracy(self, sets: Iterable[Keep]) -> list[float]:
        """Share of the images classified rightly, for each set."""
        return [correct_N.double().mean().item() for correct_N in self.correct(sets)]

    def _descend(self, x: Tensor, label_B: Tensor, k: int, sets: list[Keep], parts: dict[Keep, list[Tensor]]) -> None:
        if k == self.backbone.num_blocks:
            parts[sets[0]].append((self.backbone.head(x).argmax(1) == label_B).cpu())
            return
        block = self.backbone.blocks[k]
        dropping = [keep for keep in sets if not keep[k]]
        keeping = [keep for keep in sets if keep[k]]
        if dropping:
            self._descend(block.shortcut(x), label_B, k + 1, dropping, parts)
        if keeping:
            self.spent += len(x)
            self._descend(block(x), label_B, k + 1, keeping, parts)


@dataclass(frozen=True)
class StaticFront:
    """The best fixed keep-set found of every size, from no block to all K, and any other on the hull over MACs.

    Attributes:
        sets: F tuples of K booleans.
        accuracy: of each on the validation images it was chosen on.
        macs: of each.
        images: number of validation images.
        finished: False if the search ran out of its budget.
        backbone, data: content hash and fingerprint of what it was searched on.
    """

    sets: list[Keep]
    accuracy: list[float]
    macs: list[float]
    images: int
    finished: bool
    backbone: str
    data: str

    def mix_at(self, macs: float) -> list[tuple[int, float]]:
        """Places and weights of the one or two sets that, mixed at random, cost ``macs`` and were best on validation.

        Mixing two fixed sets reaches every point on the line between them, so the best static choice at a given cost
        lies on the upper concave hull of the front. A cost outside the front's range gives the nearest end.
        """
        hull = concave_hull(self.macs, self.accuracy)
        above = next((place for place, i in enumerate(hull) if self.macs[i] > macs), None)
        if above is None or above == 0:
            return [(hull[-1 if above is None else 0], 1.0)]
        low, high = hull[above - 1], hull[above]
        weight = (macs - self.macs[low]) / (self.macs[high] - self.macs[low])
        return [(place, share) for place, share in ((low, 1 - weight), (high, weight)) if share > 0]

    def save(self, path: Path) -> None:
        with refusing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        content = asdict(self) | {"sets": ["".join("01"[kept] for kept in keep) for keep in self.sets]}
        write(path, (json.dumps(content, indent=1) + "\n").encode())

    @staticmethod
    def load(path: Path) -> StaticFront:
        """The front in a file.

        Raises:
            OSError, ValueError, TypeError, KeyError: it is not there, or is no front.
        """
        content: dict[str, Any] = json.loads(path.read_bytes())
        content["sets"] = [tuple(mark == "1" for mark in keep) for keep in content["sets"]]
        for name in ("accuracy", "macs"):
            content[name] = [float(value) for value in content[name]]
        front = StaticFront(**content)
        F = len(front.sets)
        if not F or {len(front.accuracy), len(front.macs)} != {F} or len({len(keep) for keep in front.sets}) != 1:
            raise ValueError("its sets, accuracies and costs do not belong together")
        if not (isinstance(front.images, int) and isinstance(front.backbone, str) and isinstance(front.data, str)):
            raise TypeError("it does not say what it was searched on")
        return front


def search(
    scorer: SetScorer, budget: float, beam: int = 3, hints: Sequence[Keep] = ()
) -> tuple[list[Keep], list[float], bool]:
    """The best keep-set of every size: sets, their accuracies, and whether the search finished.

    Every set is tried if that fits the budget. Otherwise: backward elimination with a beam; then, for every size,
    swaps of one block for another and the neighbours of better sets at the next sizes, until none helps.

    Args:
        budget: bound on images times blocks computed; checked between steps.
        hints: sets found elsewhere, such as by an image-independent learner.
    """
    K = scorer.backbone.num_blocks
    if tries_every_set(K, scorer.count, budget):
        every = [tuple(bool(code >> k & 1) for k in range(K)) for code in range(2**K)]
        scorer.accuracy(every)
        return *_best_by_size(scorer, K), True

    level: list[Keep] = [(True,) * K]
    scorer.accuracy([*level, (False,) * K, *hints])
    for _ in range(K - 1):
        if scorer.spent > budget:
            return *_best_by_size(scorer, K), False
        children = sorted({child for keep in level for child in _without_one(keep)})
        accuracy = dict(zip(children, scorer.accuracy(children), strict=True))
        level = sorted(children, key=lambda keep: -accuracy[keep])[:beam]

    best, _ = _best_by_size(scorer, K)
    todo = list(best)
    while todo:
        if scorer.spent > budget:
            return *_best_by_size(scorer, K), False
        keep = todo.pop(0)
        scorer.accuracy({*_swaps(keep), *_without_one(keep), *_with_one(keep)})
        better, _ = _best_by_size(scorer, K)
        todo = [new for new in better if new in todo or new not in best]
        best = better
    return *_best_by_size(scorer, K), True


def tries_every_set(K: int, count: int, budget: float) -> bool:
    """Whether :func:`search` can afford all 2^K sets on ``count`` images."""
    return 2 ** (K + 1) * count <= budget


def _best_by_size(scorer: SetScorer, K: int) -> tuple[list[Keep], list[float]]:
    """The most accurate known set of each size that has one; of equals, the first in order of the sets."""
    best: dict[int, tuple[float, Keep]] = {}
    for keep in sorted(scorer.known):
        accuracy = scorer.known[keep].double().mean().item()
        if sum(keep) not in best or accuracy > best[sum(keep)][0]:
            best[sum(keep)] = (accuracy, keep)
    ordered = [best[size] for size in sorted(best)]
    return [keep for _, keep in ordered], [accuracy for accuracy, _ in ordered]


def _flip(keep: Keep, *places: int) -> Keep:
    return tuple(kept != (k in places) for k, kept in enumerate(keep))


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
    tell: Callable[[int], object] | None = None,
) -> StaticFront:
    """Search the static front of a backbone on ``limit`` validation images; ``tell`` hears what has been spent."""
    if budget < 0 or limit < 1:
        raise UserError(f"front.budget must not be negative and front.images at least 1, got {budget} and {limit}")
    scorer = SetScorer(backbone, images, limit, tell=tell)
    by_size, _, finished = search(scorer, budget, hints=hints)
    tried = sorted(scorer.known)
    hull = concave_hull(costs.of(torch.tensor(tried)).tolist(), scorer.accuracy(tried))
    sets = sorted({*by_size, *(tried[i] for i in hull)}, key=lambda keep: (sum(keep), keep))
    accuracy, macs = scorer.accuracy(sets), costs.of(torch.tensor(sets)).tolist()
    return StaticFront(sets, accuracy, macs, scorer.count, finished, backbone.content_hash(), images.fingerprint())


def known_front(backbone: Backbone, images: Images, cache: Path) -> StaticFront | None:
    """A front searched earlier on this very network and these very images: one that ships, or one in ``cache``."""
    asked = (backbone.content_hash(), images.fingerprint())
    for path in [*sorted(WEIGHTS.glob("*.front.json")), cache / f"{asked[0]}-{asked[1]}.json"]:
        try:
            front = StaticFront.load(path)
        except (OSError, ValueError, TypeError, KeyError):
            continue  # absent, or damaged: it is searched anew
        if (front.backbone, front.data) == asked:
            return front
    return None
