"""Where exits pay: which candidate heads to admit, and which places in a network to propose.

Shapes: M images of a set, S stages (candidate heads before the network's own), K places in a network.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from policyskip.backbones.base import Backbone
from policyskip.backbones.exits import count_exit_costs
from policyskip.backbones.resnet_exits import ResNetExits
from policyskip.data import Images, batch_at, spread_indices
from policyskip.errors import UserError


@dataclass(frozen=True)
class Stage:
    """What a candidate head would do for the images that reach it.

    Attributes:
        resolved: number of images that would leave there.
        passed: number of images that would pay for the head and go on.
        gain: MACs saved an image of the whole set, negative if the head costs more than it saves.
        admitted: whether the gain was enough.
    """

    resolved: int
    passed: int
    gain: float
    admitted: bool


def stage_gain(resolved: int, passed: int, saved_macs: float, head_macs: float) -> float:
    """``resolved · saved - passed · head`` in MACs: what a head saves those that leave, and costs those that go on.

    Args:
        saved_macs: the rest of the network with its own head, less this head.
        head_macs: this head.
    """
    return resolved * saved_macs - passed * head_macs


def admit(leave_MS: Tensor, trunk_N: Tensor, head_N: Tensor, epsilon: float = 0.0) -> list[Stage]:
    """Conditional Deep Learning's admission of linear heads, one stage after the other from the first.

    A head is admitted if its gain over the images that reach it exceeds ``epsilon``; one that is not admitted
    lets all images on at no cost, and the next stage is judged with that. Heads admitted earlier are paid for either
    way, later ones are not yet there. This is our reading of the paper (Panda, Sengupta, Roy 2016, arXiv 1509.08971),
    which adds heads from the first layer on while there is a gain in operations; that a head without a gain is passed
    over, and does not end the search, is our choice.

    Args:
        leave_MS: bool (M, S), whether each candidate, asked about each validation image, would let it leave.
        trunk_N: float (S + 1,), MACs of the trunk up to each stage from the one before; the last is the network's end.
        head_N: float (S + 1,), MACs of each head; the last is the network's own.
        epsilon: MACs an image of the whole set.

    Returns: S stages, in order.
    """
    M, S = leave_MS.shape
    if trunk_N.shape != (S + 1,) or head_N.shape != (S + 1,):
        raise ValueError(f"{S} stages take {S + 1} trunk and head costs, got {len(trunk_N)} and {len(head_N)}")
    inside_M = torch.ones(M, dtype=torch.bool, device=leave_MS.device)
    stages = []
    for s, leave_M in enumerate(leave_MS.unbind(1)):
        resolved = int((inside_M & leave_M).sum())
        passed = int(inside_M.sum()) - resolved
        rest = float(trunk_N[s + 1 :].sum() + head_N[-1])
        gain = stage_gain(resolved, passed, rest - float(head_N[s]), float(head_N[s])) / M
        stages.append(Stage(resolved, passed, gain, gain > epsilon))
        if gain > epsilon:
            inside_M &= ~leave_M
    return stages


@dataclass(frozen=True)
class Probes:
    """What :func:`propose_exits` chooses by: validation accuracies in [0, 1] and MACs, the network's own end apart."""

    accuracy_K: list[float]
    macs_K: list[float]
    full_accuracy: float
    full_macs: float


@dataclass(frozen=True)
class Proposal:
    """A place for an exit: after block ``place`` (from 0), and why."""

    place: int
    reason: str


def propose_exits(
    accuracy_K: list[float], macs_K: list[float], full_accuracy: float, full_macs: float, number: int, chance: float
) -> list[Proposal]:
    """Places for ``number`` early exits, by the accuracy that each adds and the MACs over which it adds it.

    If every budget up to the full cost is equally likely, and an image's answer is that of the deepest exit the
    budget reaches (a guess, before the first), then the mean accuracy is the area under a staircase: an exit adds its
    accuracy over the exit before, times the MACs from there to the end. The places returned have the largest area of
    all choices of that number. Steepness alone, accuracy per MAC, would put every exit at the very beginning.

    Args:
        accuracy_K: validation accuracy of a probe after each block, in [0, 1].
        macs_K: MACs of leaving there, the probe's own included, rising.
        full_accuracy, full_macs: of the network's own exit.
        chance: accuracy of a guess, 1/C.

    Raises:
        UserError: ``number`` is below 1 or above the number of places.
    """
    K = len(accuracy_K)
    if len(macs_K) != K or any(low >= high for low, high in zip(macs_K, [*macs_K[1:], full_macs])):
        raise ValueError("macs_K must give one cost for each place, rising and below full_macs")
    if not 1 <= number <= K:
        raise UserError(f"the number of exits must be from 1 to {K}, the places there are, got {number}")
    # best[k]: the largest area up to macs_K[k] of the exits chosen so far, the last of them at k; and these exits.
    best = {k: (chance * macs_K[k], [k]) for k in range(K)}
    for _ in range(number - 1):
        best = {
            k: max(
                (area + accuracy_K[j] * (macs_K[k] - macs_K[j]), [*places, k])
                for j, (area, places) in best.items()
                if j < k
            )
            for k in range(min(best) + 1, K)
        }
    _, places = max((area + accuracy_K[k] * (full_macs - macs_K[k]), places) for k, (area, places) in best.items())
    proposals, before, spent = [], chance, 0.0
    for place in places:
        gained, paid = accuracy_K[place] - before, macs_K[place] - spent
        reason = (
            f"after block {place}: {accuracy_K[place]:.1%} right at {macs_K[place] / full_macs:.2f} of the full cost "
            f"(the network: {full_accuracy:.1%}), {100 * gained:+.1f} points for {paid / 1e6:.3g} million MACs "
            f"more than {'a guess' if place == places[0] else 'the exit before'}"
        )
        proposals.append(Proposal(place, reason))
        before, spent = accuracy_K[place], macs_K[place]
    return proposals


@torch.no_grad()
def probe_blocks(backbone: Backbone, train: Images, validation: Images, limit: int = 4000) -> Probes:
    """How well a linear probe on the pooled features after each block answers, and what leaving there would cost.

    A probe is a ridge regression from each channel's average to the one-hot label, fitted in closed form on ``limit``
    training images, spread over the set, and judged on validation images: it takes one pass, and no learning rate.
    """
    backbone.freeze()
    features, labels = _pooled(backbone, train, limit)
    held_features, held_labels = _pooled(backbone, validation, limit)
    target_MC = F.one_hot(labels, backbone.num_classes).double()
    accuracy = []
    for feature_MD, held_MD in zip(features, held_features, strict=True):
        x, held = (torch.cat([f, torch.ones_like(f[:, :1])], 1) for f in (feature_MD, held_MD))
        gram = x.T @ x + 1e-3 * len(x) * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        prediction_M = (held @ torch.linalg.solve(gram, x.T @ target_MC)).argmax(1)
        accuracy.append((prediction_M == held_labels).double().mean().item())
    channels, height, width = batch_at(validation, torch.tensor([0])).images.shape[1:]
    shape = (channels, height, width)
    costs = count_exit_costs(ResNetExits(backbone, range(backbone.num_blocks - 1), "pooled", shape), shape)
    return Probes(accuracy[:-1], costs.straight_N[:-1].tolist(), accuracy[-1], float(costs.straight_N[-1]))


def _pooled(backbone: Backbone, images: Images, limit: int) -> tuple[list[Tensor], Tensor]:
    """Each channel's average after each block, K times float64 (M, channels), and labels int64 (M,)."""
    rows, labels = [], []
    for batch in images.plain().stream((part, 0) for part in spread_indices(limit, len(images)).split(250)):
        x, row = backbone.features(batch.images), []
        for block in backbone.blocks:
            x = block(x)
            row.append(x.mean((2, 3)).double())
        rows.append(row)
        labels.append(batch.label_B)
    return [torch.cat(column) for column in zip(*rows, strict=True)], torch.cat(labels)
