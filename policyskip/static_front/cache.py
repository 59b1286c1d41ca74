"""Fronts, and the scores of searches under way, are kept in a folder and found again by network and images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from policyskip.backbones import Backbone
from policyskip.backbones.checkpoints import WEIGHTS
from policyskip.data import Images
from policyskip.errors import UserError
from policyskip.files import check_regular, write
from policyskip.sealed import sealed, unsealed
from policyskip.static_front.front import StaticFront
from policyskip.static_front.scoring import Keep, Scores, keep_text

MOST_SCORES = 2**24
"""The scores, of one set on one image each, that are kept of a search; three bytes each."""
MOST_BYTES = 2**27


def known_front(
    backbone: Backbone,
    images: Images,
    cache: Path,
    at_least: int = 1,
    budget: float = 0,
    hints: Iterable[Keep] = (),
    precision: str = "float32",
) -> StaticFront | None:
    """Find a front searched earlier on this very network and these very images: one that ships, or one in ``cache``.

    Args:
        cache: the folder that :func:`remember` wrote to.
        at_least: the least number of images that the search must have used.
        budget: the least budget that the search must have had.
        hints: sets that the search started from; a front that was searched with other hints is not found.
        precision: that the network was executed in; fronts that ship were searched in exact float32.

    Returns: the front; None if there is none. Of several, the one with the fewest images, and of these the one with
        the largest budget.
    """
    searched_on = (backbone.content_hash(), images.fingerprint())
    prefix = "-".join(searched_on)
    endings = (f"{_key(hints, precision)}.json", f"{_key((), precision)}.json")
    found: list[StaticFront] = []
    shipped = sorted(WEIGHTS.glob("*.front.json")) if precision.startswith("float32") else []
    for path in [*shipped, *sorted(cache.glob(f"{prefix}-*.json"))]:
        if path.parent == cache and path.name.removeprefix(f"{prefix}-").lstrip("0123456789") not in endings:
            continue
        with suppress(OSError, ValueError, UserError):  # absent, or damaged: it is searched anew
            front = StaticFront.load(path)
            fits = (front.backbone, front.data) == searched_on and len(front.sets[0]) == backbone.num_blocks
            if fits and front.correct_FN is not None and front.images >= at_least and front.budget >= budget:
                found.append(front)
    return min(found, key=lambda front: (front.images, -front.budget), default=None)


def remember(front: StaticFront, cache: Path, hints: Iterable[Keep] = (), precision: str = "float32") -> None:
    """Write a front into the folder ``cache``, for :func:`known_front`.

    Raises:
        UserError: it cannot be written.
    """
    front.save(front_file(front.backbone, front.data, front.images, cache, hints, precision))


def front_file(
    backbone: str, data: str, images: int, cache: Path, hints: Iterable[Keep] = (), precision: str = "float32"
) -> Path:
    """Return the file of a front in the folder ``cache``.

    Args:
        backbone, data: content hash and fingerprint.
        images: number of validation images of the search.
        hints: sets that the search starts from.
        precision: that the network is executed in.
    """
    return cache / f"{backbone}-{data}-{images}{_key(hints, precision)}.json"


def _key(hints: Iterable[Keep], precision: str) -> str:
    """Return the part of a file's name that tells searches in other precisions and from different hints apart; nothing
    in float32 and without hints."""
    texts = sorted(map(keep_text, hints))
    kind = "" if precision == "float32" else f"-{precision}"
    return kind + (f"-{hashlib.sha256(' '.join(texts).encode()).hexdigest()[:16]}" if texts else "")


def store_scores(known: Mapping[Keep, Scores], path: Path) -> None:
    """Write the scores of a search under way, the first ones if they are very many, so that it can go on later.

    Raises:
        UserError: they cannot be written.
    """
    sets, total = [], 0
    for keep, scores in known.items():
        if (total := total + len(scores)) > MOST_SCORES:
            break
        sets.append(keep)
    if not sets:
        return
    tensors = {
        "sets": torch.tensor(sets, dtype=torch.uint8),
        "images": torch.tensor([len(known[keep]) for keep in sets]),
        "right": torch.from_numpy(np.packbits(torch.cat([known[keep].right_n for keep in sets]).numpy())),
        "probability": torch.cat([known[keep].probability_n for keep in sets]),
    }
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    write(path, sealed(tensors))


def stored_scores(path: Path, num_blocks: int, count: int) -> dict[Keep, Scores]:
    """Read what :func:`store_scores` wrote for a search over ``num_blocks`` blocks on ``count`` images.

    Returns: the scores by their sets; nothing if the file is not there, is damaged or belongs to another search.
    """
    try:
        check_regular(path, MOST_BYTES)
        tensors = unsealed(path)
        keep_FK, images_F, probability = tensors["sets"], tensors["images"], tensors["probability"]
        right = torch.from_numpy(np.unpackbits(tensors["right"].numpy(), count=len(probability))).bool()
        is_whole = keep_FK.shape == (len(images_F), num_blocks) and int(images_F.sum()) == len(right)
        in_range = int(images_F.min()) > 0 and int(images_F.max()) <= count
        if not (is_whole and in_range and probability.dtype == torch.float16 and bool((probability >= 0).all())):
            return {}
        sizes = images_F.tolist()
        scores = map(Scores, right.split(sizes), probability.split(sizes))
        return dict(zip(map(tuple, keep_FK.bool().tolist()), scores, strict=True))
    except Exception:  # readers raise exceptions of every type for damaged files; what is lost is time
        return {}
