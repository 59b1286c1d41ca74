"""The record of what was decided for each image of a set: its file in a run folder, warnings, and example images.

Shapes: N images, K blocks (or exits), C classes, F fixed choices, B images shown.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch import Tensor

from policyskip import __version__
from policyskip.data import Images
from policyskip.errors import UserError, first_line
from policyskip.files import read, write
from policyskip.runs import schemas
from policyskip.runs.folder import Run
from policyskip.runs.tracking import Examples
from policyskip.static_front import keep_text
from policyskip.texts import for_json, one_line

FILE = "decisions.safetensors"
LARGEST_FILE = 2**31
"""Bytes of the largest file of decisions that is read: two million images of ImageNet need less."""
TABLES = ("label_N", "prediction_N", "full_correct_N", "ran_NK", "macs_N", "static_F2")
"""The tensors in the file of a record."""
OPTIONAL_TABLES = ("group_N",)
"""Tensors that the file of a record has only where they are known."""
METADATA = ("full_macs", "kind", "images", "network", "classes")
"""The other attributes in the file of a record, as JSON."""
BLOCKS, EXITS = "blocks", "exits"


@dataclass(frozen=True)
class Decisions:
    """Holds what was decided for each image of a set, in the set's order on the CPU, and what came of it.

    Attributes:
        kind: what the policy decides on, "blocks" or "exits".
        label_N, prediction_N: int64 (N,), the classes.
        ran_NK: bool (N, K), which blocks were kept; of a network with exits, which segments ran.
        macs_N: float64 (N,), MACs spent on each image, the policy's own cost included.
        full_macs: MACs of the whole network for one image.
        full_correct_N: bool (N,), whether the whole network (the last exit) is right; None if it did not run.
        reward_N: float32 (N,), or None where no reward was computed.
        difficulty_N: float32 (N,), the data set's own measure of difficulty; None if it has none.
        group_N: int64 (N,), which images belong together; None if each is its own group.
        policy_macs: mean MACs of the policy for an image; ``macs_N`` contains them.
        sees_the_label: whether the policy is an oracle, which decides by the label.
        static_F2: float64 (F, 2), MACs and test accuracy of fixed choices: the static front, or every exit for all.
        images: fingerprint of the set.
        network: content hash of a frozen network; "" if the run trained it.
        classes: names of the C classes.
    """

    kind: str
    label_N: Tensor
    prediction_N: Tensor
    ran_NK: Tensor
    macs_N: Tensor
    full_macs: float
    full_correct_N: Tensor | None = None
    reward_N: Tensor | None = None
    difficulty_N: Tensor | None = None
    group_N: Tensor | None = None
    policy_macs: float = 0.0
    sees_the_label: bool = False
    static_F2: Tensor = field(default_factory=lambda: torch.empty(0, 2, dtype=torch.float64))
    images: str = ""
    network: str = ""
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.label_N)

    @property
    def correct_N(self) -> Tensor:
        """Return whether each prediction is the label, bool (N,)."""
        return self.prediction_N == self.label_N

    @property
    def accuracy(self) -> float:
        """Return the fraction of the predictions that are right."""
        return self.correct_N.double().mean().item()

    @property
    def macs_fraction(self) -> float:
        """Return the mean MACs as a fraction of the whole network's."""
        return self.macs_N.mean().item() / self.full_macs

    @property
    def exit_N(self) -> Tensor:
        """Return the exit at which each image left, int64 (N,), counted from 0."""
        return self.ran_NK.sum(1) - 1

    @property
    def kept_by_difficulty(self) -> list[float | None] | None:
        """Return the mean number of kept blocks in each quarter of the images, easiest first.

        A quarter without images has None. Without a measure of difficulty the whole list is None.
        """
        if self.difficulty_N is None:
            return None
        kept_N = self.ran_NK.sum(1).double()
        quarters = self.difficulty_N.argsort().tensor_split(4)
        return [kept_N[quarter].mean().item() if len(quarter) else None for quarter in quarters]

    def block_use_CK(self, classes: int) -> Tensor:
        """Return the fraction of each class's images that kept each block, float64 (C, K); NaN for an empty class."""
        return torch.stack([self.ran_NK[self.label_N == c].double().mean(0) for c in range(classes)])


def collapse_warnings(decisions: Decisions) -> list[str]:
    """Return a warning if a learned policy decides the same for every image, else none; one image is no evidence."""
    ran_NK = decisions.ran_NK
    N, K = ran_NK.shape
    if N < 2 or (decisions.kind == EXITS and K < 2) or not (ran_NK == ran_NK[0]).all():
        return []
    if decisions.kind == EXITS:
        n = int(decisions.exit_N[0])
        return [f"the policy has collapsed: every image leaves at {'the last exit' if n == K - 1 else f'exit {n}'}"]
    if ran_NK.all():
        return [f"the policy has collapsed: all {K} blocks run for every image, which is the full network"]
    if not ran_NK.any():
        return [f"the policy has collapsed: none of the {K} blocks runs for any image"]
    blocks = keep_text(ran_NK[0].tolist())
    return [f"the policy has collapsed: it decides the same for every image, {blocks}, as a fixed choice would"]


def pixels(images: Images, index_B: Tensor) -> NDArray[np.uint8]:
    """Return the images of a set at indices int64 (B,), for pictures: uint8 (B, H, W, 3)."""
    shown: NDArray[np.uint8] = next(iter(images.stream([(index_B, 0)]))).images.permute(0, 2, 3, 1).cpu().numpy()
    return shown


def examples(decisions: Decisions, images: Images, count: int = 24) -> Examples:
    """Make a table of example images, from the least computed to the most, with the blocks or segments that ran."""
    order = decisions.macs_N.argsort(stable=True)
    chosen = order[torch.linspace(0, len(order) - 1, min(count, len(order))).long()]
    rows = []
    for index, image in zip(chosen.tolist(), pixels(images, chosen), strict=True):
        ran = decisions.ran_NK[index].tolist()
        names = [
            one_line(decisions.classes[int(class_N[index])]) for class_N in (decisions.label_N, decisions.prediction_N)
        ]
        drawn = "".join("·█"[kept] for kept in ran)
        rows.append([image, *names, sum(ran) - (decisions.kind == EXITS), drawn, decisions.macs_N[index].item()])
    titles = ["kept", "blocks that ran"] if decisions.kind == BLOCKS else ["exit", "parts that ran"]
    return Examples(["label", "prediction", *titles, "macs"], rows)


def save_decisions(decisions: Decisions, run: Run) -> dict[str, Any]:
    """Write a record that says what the whole network does, too, into the run's folder.

    Returns: what ``summary.json`` says of the record: the package's version, the images and the network.
    """
    optional = [name for name in OPTIONAL_TABLES if getattr(decisions, name) is not None]
    tables = {name: getattr(decisions, name).contiguous() for name in (*TABLES, *optional)}
    metadata = {name: for_json(json.dumps(getattr(decisions, name), ensure_ascii=False)) for name in METADATA}
    write(run.folder / FILE, save(tables, metadata=metadata))
    return {"version": __version__, "test_images": decisions.images, "frozen_network": decisions.network or None}


def load_decisions(run: Run) -> Decisions | None:
    """Read the record in a run's folder; None if there is no such file, as in runs of older versions.

    Raises:
        UserError: the file is damaged.
    """
    if not run.has(FILE):
        return None
    path = run.path(FILE)
    try:
        content = read(path, LARGEST_FILE)  # safetensors itself opens no path that is not UTF-8
        tables: dict[str, Any] = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = {name: json.loads(text) for name, text in header["__metadata__"].items()}
        schemas.check("decisions", metadata)
        if set(tables) - set(OPTIONAL_TABLES) != set(TABLES) or set(metadata) != set(METADATA):
            raise ValueError("its tables are not those of decisions")
        metadata["classes"] = tuple(metadata["classes"])
        decisions = Decisions(**tables, **metadata)
        _check(decisions)
    except Exception as error:  # damaged files raise whatever the reader stumbles over
        raise UserError(f"{path} is damaged or not ours: {first_line(error)}") from error
    return decisions


def _check(decisions: Decisions) -> None:
    """Check a record that was read from a file.

    Raises:
        ValueError: a table is of a wrong type or shape, or a number is not a possible one.
    """
    N, C = len(decisions.label_N), len(decisions.classes)
    columns = {
        "label_N": (torch.int64, (N,)),
        "prediction_N": (torch.int64, (N,)),
        "full_correct_N": (torch.bool, (N,)),
        "ran_NK": (torch.bool, (N, decisions.ran_NK.shape[-1])),
        "macs_N": (torch.float64, (N,)),
        "static_F2": (torch.float64, (len(decisions.static_F2), 2)),
    }
    if decisions.group_N is not None:
        columns["group_N"] = (torch.int64, (N,))
    for name, (dtype, shape) in columns.items():
        table = getattr(decisions, name)
        if table.dtype != dtype or tuple(table.shape) != shape:
            raise ValueError(f"its table {name} is {table.dtype} {tuple(table.shape)}")
    for name in ("label_N", "prediction_N"):
        if not ((getattr(decisions, name) >= 0) & (getattr(decisions, name) < C)).all():
            raise ValueError(f"its table {name} names classes that there are not")
    costs = (decisions.macs_N, decisions.static_F2)
    if not N or any(not ((table >= 0) & (table <= schemas.LARGEST)).all() for table in costs):
        raise ValueError("its costs are no finite numbers")
    if (decisions.static_F2[:, 1] > 1).any():
        raise ValueError("its table static_F2 has accuracies above 1")
    if decisions.kind == EXITS and not (decisions.ran_NK[:, :1].all() and _is_falling(decisions.ran_NK)):
        raise ValueError("its table ran_NK says of an image that it left at no exit")


def _is_falling(ran_NK: Tensor) -> bool:
    """Return whether no segment ran for an image behind one that did not."""
    return bool((ran_NK[:, 1:] <= ran_NK[:, :-1]).all())
