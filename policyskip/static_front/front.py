"""The static front: fixed keep-sets of every cost with what each does on validation images, mixed, saved and loaded.

Shapes: F sets, N validation images of the search.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from policyskip.files import read, reporting_write_errors, write
from policyskip.fronts import concave_hull
from policyskip.runs import schemas
from policyskip.sealed import DIGEST_KEY
from policyskip.static_front.proposals import spread_set
from policyskip.static_front.scoring import Keep, keep_text

MOST_BYTES = 2**25
"""The largest file that is read as a front: 300 sets on 50,000 images have a tenth of it."""
KEYS = {"sets", "kinds", "accuracy", "correct", "macs", "images", "finished", "spent", "tried", "budget", "backbone"}
KEYS |= {"data"}
"""The keys of a file."""


@dataclass(frozen=True, eq=False)
class StaticFront:
    """Holds fixed keep-sets of every cost: for each range of costs the best ones that a search found, and all evenly
    spread ones.

    Attributes:
        sets: F keep-sets.
        kinds: how each set was found: "spread" (even distances), "stages" (even distances within each stage),
            "random", "surrogate" (predicted to be good, from the sets scored before), "moves" (a good set with one
            block more, less or another), "policy" (a policy's own), "all" (every set was tried), "older version".
        correct_FN: bool (F, N) on the CPU: whether each validation image of the search is classified rightly; None in
            files of older versions.
        macs: of each set.
        images: N, number of validation images.
        finished: whether the whole plan of the search was carried out.
        spent: images × blocks that the search took.
        tried: number of sets that it scored, on at least a part of the images.
        backbone, data: content hash and fingerprint of the network and the images of the search.
        budget: images × blocks that the search was allowed; infinite if it ended because nothing was left to try.
        stated_accuracy: of each set, in files of older versions.
    """

    sets: list[Keep]
    kinds: list[str]
    correct_FN: Tensor | None
    macs: list[float]
    images: int
    finished: bool
    spent: int
    tried: int
    backbone: str
    data: str
    budget: float = 0.0
    stated_accuracy: list[float] = field(default_factory=list)

    @cached_property
    def accuracy(self) -> list[float]:
        """Return the accuracy of each set on the validation images of the search."""
        if self.correct_FN is None:
            return self.stated_accuracy
        accuracy: list[float] = self.correct_FN.double().mean(1).tolist()
        return accuracy

    @property
    def hull(self) -> list[int]:
        """Return the indices of the sets, cheapest first, that are best on validation images alone or mixed."""
        return concave_hull(self.macs, self.accuracy)

    def _content(self) -> dict[str, Any]:
        """Return what a file holds."""
        content: dict[str, Any] = {key: getattr(self, key) for key in KEYS - {"correct", "budget"}}
        content["sets"] = [keep_text(keep) for keep in self.sets]
        content["budget"] = None if self.budget == float("inf") else self.budget
        if self.correct_FN is not None:
            content["correct"] = [_hex(correct_N) for correct_N in self.correct_FN]
        return content

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StaticFront) and self._content() == other._content()

    __hash__ = None  # type: ignore[assignment]

    def save(self, path: Path) -> None:
        """Write the front as JSON.

        Raises:
            UserError: the file cannot be written.
        """
        with reporting_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        content = self._content()
        write(path, (json.dumps(content | {DIGEST_KEY: _digest(content)}, indent=0) + "\n").encode())

    @staticmethod
    def load(path: Path) -> StaticFront:
        """Read the front in a file, also in one of an older version.

        Raises:
            OSError, ValueError: the file is not there, or holds no front.
        """
        try:
            content: dict[str, Any] = schemas.check("front.json", json.loads(read(path, MOST_BYTES)))
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error
        if content.pop(DIGEST_KEY, digest := _digest(content)) != digest:
            raise ValueError("its content has been changed since it was written")
        if unknown := sorted(set(content) - KEYS):
            raise ValueError(f"it has a key {unknown[0]!r:.80}")
        sets: list[Keep] = [tuple(mark == "1" for mark in keep) for keep in content["sets"]]
        lengths = {len(content[key]) for key in ("sets", "kinds", "accuracy", "correct", "macs") if key in content}
        if len(lengths) > 1 or len({len(keep) for keep in sets}) > 1:
            raise ValueError("its sets, accuracies and costs do not belong together")
        if not max(content["macs"]):
            raise ValueError("none of its sets costs anything")
        correct_FN = None
        if "correct" in content:
            correct_FN = torch.stack([_unhex(text, content["images"]) for text in content["correct"]])
        K = len(sets[0])
        old_kinds = ["spread" if keep == spread_set(K, sum(keep)) else "older version" for keep in sets]
        budget = content.get("budget", 0.0)
        return StaticFront(
            sets=sets,
            kinds=content.get("kinds", old_kinds),
            correct_FN=correct_FN,
            spent=content.get("spent", 0),
            tried=content.get("tried", 0),
            budget=float("inf") if budget is None else budget,
            stated_accuracy=[] if "correct" in content else content["accuracy"],
            **{key: content[key] for key in ("macs", "images", "finished", "backbone", "data")},
        )


def _digest(content: dict[str, Any]) -> str:
    """Return the SHA-256 digest of what a file holds beside it."""
    plain = {key: content[key] for key in sorted(content) if key != DIGEST_KEY}
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()


def _hex(correct_N: Tensor) -> str:
    """Write bool (N,) as hexadecimal text, four images a digit, the first image in the highest bit."""
    bits = keep_text(correct_N.tolist())
    digits = -(-len(bits) // 4)
    return f"{int(bits.ljust(4 * digits, '0'), 2):0{digits}x}"


def _unhex(text: str, images: int) -> Tensor:
    """Read bool (images,) from what :func:`_hex` wrote.

    Raises:
        ValueError: the text is that of another number of images.
    """
    if len(text) != -(-images // 4) or not text:
        raise ValueError(f"what a set does on each image has {len(text)} digits, but the search had {images} images")
    bits = f"{int(text, 16):0{4 * len(text)}b}"
    return torch.tensor([bit == "1" for bit in bits[:images]])
