"""The record of what was decided for each image of a set, its file in a run folder, and warnings of collapsed policies.

Comparisons over the same images are made from this file.

Shapes: N images, K blocks (or exits), F fixed choices.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from policyskip.data import Images
from policyskip.errors import UserError
from policyskip.exits.cache import CachedExits
from policyskip.exits.rules import decisions_at
from policyskip.files import write
from policyskip.runs.folder import Run
from policyskip.runs.tracking import Examples


def block_warnings(keep_NK: Tensor) -> list[str]:
    """What a run is warned of whose learned policy decides keep, bool (N, K), for N images; nothing for one image."""
    N, K = keep_NK.shape
    if N < 2:
        return []
    if keep_NK.all():
        return [f"the policy has collapsed: all {K} blocks run for every image, which is the full network"]
    if not keep_NK.any():
        return [f"the policy has collapsed: none of the {K} blocks runs for any image"]
    if (keep_NK == keep_NK[0]).all():
        blocks = "".join("01"[kept] for kept in keep_NK[0].tolist())
        return [f"the policy has collapsed: it decides the same for every image, {blocks}, as a fixed choice would"]
    return []


def exit_warnings(exit_N: Tensor, num_exits: int) -> list[str]:
    """The same for policies that send N images to exits, int64 (N,), of which there are ``num_exits``."""
    if len(exit_N) < 2 or num_exits < 2 or not (exit_N == exit_N[0]).all():
        return []
    place = "the last exit" if int(exit_N[0]) == num_exits - 1 else f"exit {int(exit_N[0])}"
    return [f"the policy has collapsed: every image leaves at {place}"]


FILE = "decisions.safetensors"


BLOCKS, EXITS = "blocks", "exits"


@dataclass(frozen=True)
class Decisions:
    """One row for each test image, in the order of the set, on the CPU.

    Attributes:
        label_N, prediction_N: int64 (N,).
        full_correct_N: bool (N,), whether the whole network (the last exit) is right.
        ran_NK: bool (N, K), which blocks were kept; of a network with exits, which segments ran.
        macs_N: float64 (N,), what each image cost, the policy's own cost included.
        full_macs: MACs of the whole network for one image.
        static_F2: float64 (F, 2), MACs and test accuracy of fixed choices: the static front, or each exit for all.
        kind: what is decided on, "blocks" or "exits".
        images: fingerprint of the set.
        network: content hash of the network, if the run left it as it was; "" if the run trained it.
        classes: their names.
    """

    label_N: Tensor
    prediction_N: Tensor
    full_correct_N: Tensor
    ran_NK: Tensor
    macs_N: Tensor
    full_macs: float
    static_F2: Tensor
    kind: str
    images: str
    network: str
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.label_N)

    @property
    def correct_N(self) -> Tensor:
        return self.prediction_N == self.label_N

    @property
    def exit_N(self) -> Tensor:
        """Where each image left, int64 (N,), counted from 0."""
        return self.ran_NK.sum(1) - 1


def of_blocks(
    result: Evaluation, static: list[tuple[float, float]], images: str, network: str, classes: tuple[str, ...]
) -> Decisions:
    """From an evaluation of kept blocks on test that asked the full network too."""
    assert result.full_correct_N is not None
    columns = (result.label_N, result.prediction_N, result.full_correct_N, result.keep_NK, result.macs_N)
    static_F2 = torch.tensor(static, dtype=torch.float64).reshape(-1, 2)
    return Decisions(*columns, result.full_macs, static_F2, BLOCKS, images, network, classes)


def of_exits(
    exit_N: Tensor,
    cache: CachedExits,
    static: list[list[float]],
    images: str,
    network: str,
    classes: tuple[str, ...],
    decision_macs: float = 0.0,
) -> Decisions:
    """From where each image left, int64 (N,); ``decision_macs`` is what a policy costs at each exit it is asked at."""
    rows = torch.arange(len(cache), device=exit_N.device)
    count = cache.num_exits
    prediction_N = cache.logits_MNC[rows, exit_N].argmax(-1)
    ran_NK = torch.arange(count, device=exit_N.device) <= exit_N.unsqueeze(1)
    macs_N = cache.macs_N[exit_N] + decision_macs * decisions_at(exit_N, count)
    full_correct_N = cache.correct_MN[:, -1]
    columns = (cache.label_M.cpu(), prediction_N.cpu(), full_correct_N.cpu(), ran_NK.cpu(), macs_N.double().cpu())
    static_F2 = torch.tensor(static, dtype=torch.float64).reshape(-1, 2)
    return Decisions(*columns, cache.costs.full, static_F2, EXITS, images, network, classes)


def record(decisions: Decisions, run: Run) -> dict[str, Any]:
    """Write the decisions into the run's folder.

    Returns: what the summary says of them: the package's version, the images and the network they go with.
    """
    from policyskip import __version__

    tensors = {name: value.contiguous() for name, value in vars(decisions).items() if isinstance(value, Tensor)}
    told = {
        name: json.dumps(value, ensure_ascii=False)
        for name, value in vars(decisions).items()
        if not isinstance(value, Tensor)
    }
    write(run.folder / FILE, save(tensors, metadata=told))
    return {"version": __version__, "test_images": decisions.images, "frozen_network": decisions.network or None}


def examples(decisions: Decisions, images: Images, count: int = 24) -> Examples:
    """Test images from the least computed to the most, with what ran."""
    order = decisions.macs_N.argsort(stable=True)
    chosen = order[torch.linspace(0, len(order) - 1, min(count, len(order))).long()]
    shown = next(iter(images.stream([(chosen, 0)]))).images.permute(0, 2, 3, 1).cpu().numpy()
    rows = []
    for index, image in zip(chosen.tolist(), shown, strict=True):
        ran = decisions.ran_NK[index].tolist()
        names = [decisions.classes[int(t[index])] for t in (decisions.label_N, decisions.prediction_N)]
        what = "".join("·█"[kept] for kept in ran)
        rows.append([image, *names, sum(ran) - (decisions.kind == EXITS), what, decisions.macs_N[index].item()])
    what_ran = ["kept", "blocks that ran"] if decisions.kind == BLOCKS else ["exit", "parts that ran"]
    return Examples(["label", "prediction", *what_ran, "macs"], rows)


def load(run: Run) -> Decisions | None:
    """The decisions in a run's folder; None if there are none (the run is older than the file).

    Raises:
        UserError: the file is damaged.
    """
    path = run.folder / FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            told = {name: json.loads(value) for name, value in file.metadata().items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        told["classes"] = tuple(told["classes"])
        decisions = Decisions(**tensors, **told)
        _check(decisions)
    except Exception as error:  # damaged files raise whatever the reader stumbles over
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is damaged or not ours: {reason}") from error
    return decisions


def _check(decisions: Decisions) -> None:
    """ValueError unless every table is of its type and shape, and its numbers are possible ones."""
    N, C = len(decisions.label_N), len(decisions.classes)
    columns = {
        "label_N": (torch.int64, (N,)),
        "prediction_N": (torch.int64, (N,)),
        "full_correct_N": (torch.bool, (N,)),
        "ran_NK": (torch.bool, (N, decisions.ran_NK.shape[-1])),
        "macs_N": (torch.float64, (N,)),
        "static_F2": (torch.float64, (len(decisions.static_F2), 2)),
    }
    for name, (dtype, shape) in columns.items():
        found = getattr(decisions, name)
        if found.dtype != dtype or tuple(found.shape) != shape:
            raise ValueError(f"its table {name} is {found.dtype} {tuple(found.shape)}")
    for name in ("label_N", "prediction_N"):
        if not ((getattr(decisions, name) >= 0) & (getattr(decisions, name) < C)).all():
            raise ValueError(f"its table {name} names classes that there are not")
    possible = decisions.macs_N.isfinite().all() and decisions.static_F2.isfinite().all() and N > 0
    if not possible or not math.isfinite(decisions.full_macs) or decisions.full_macs <= 0:
        raise ValueError("its costs are no finite numbers")
    if decisions.kind not in (BLOCKS, EXITS) or not all(
        isinstance(text, str) for text in (decisions.images, decisions.network, *decisions.classes)
    ):
        raise ValueError("its tables do not fit together")


@dataclass(frozen=True)
class Evaluation:
    """One row for each image, on the CPU, in the order of the set.

    Attributes:
        label_N, prediction_N: int64 (N,).
        full_correct_N: bool (N,), whether the whole network is right; None when it was not asked.
        keep_NK: bool (N, K).
        macs_N: float64 (N,), what each image cost, the policy's own cost included.
        reward_N: float32 (N,).
        difficulty_N: float32 (N,) or None, the set's own measure.
        policy_macs, full_macs: MACs of the policy for one image, and of the whole network.
        sees_the_label: whether it was an oracle that decided.
    """

    label_N: Tensor
    prediction_N: Tensor
    full_correct_N: Tensor | None
    keep_NK: Tensor
    macs_N: Tensor
    reward_N: Tensor
    difficulty_N: Tensor | None
    policy_macs: float
    full_macs: float
    sees_the_label: bool = False

    @property
    def correct_N(self) -> Tensor:
        return self.prediction_N == self.label_N

    @property
    def accuracy(self) -> float:
        return self.correct_N.double().mean().item()

    @property
    def macs_fraction(self) -> float:
        return self.macs_N.mean().item() / self.full_macs

    @property
    def kept_by_difficulty(self) -> list[float | None] | None:
        """Mean number of kept blocks in each quarter of the images, easiest first; None for a quarter of no images, and
        None without a difficulty."""
        if self.difficulty_N is None:
            return None
        kept_N = self.keep_NK.sum(1).double()
        quarters = self.difficulty_N.argsort().tensor_split(4)
        return [kept_N[quarter].mean().item() if len(quarter) else None for quarter in quarters]

    def block_use_CK(self, classes: int) -> Tensor:
        """Share of each class's images that kept each block, float64 (C, K); NaN for a class without images."""
        return torch.stack([self.keep_NK[self.label_N == c].double().mean(0) for c in range(classes)])

    def figures(self) -> dict[str, Any]:
        """The figures that a summary states; see docs/agents/blockdrop.md for each."""
        kept_N = self.keep_NK.sum(1).double()
        figures: dict[str, Any] = {
            "accuracy": self.accuracy,
            "reward": self.reward_N.double().mean().item(),
            "kept_mean": kept_N.mean().item(),
            "kept_sd": kept_N.std(correction=0).item(),
            "blocks": self.keep_NK.shape[1],
            "macs_mean": self.macs_N.mean().item(),
            "macs_sd": self.macs_N.std(correction=0).item(),
            "full_macs": self.full_macs,
            "macs_fraction": self.macs_fraction,
            "policy_macs": self.policy_macs,
            "unique_decisions": len(self.keep_NK.unique(dim=0)),
        }
        if self.full_correct_N is not None:
            figures["full_accuracy"] = self.full_correct_N.double().mean().item()
        if self.sees_the_label:
            figures["sees_the_label"] = True
        if self.difficulty_N is not None:
            figures["kept_by_difficulty"] = self.kept_by_difficulty
        return figures
