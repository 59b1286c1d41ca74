"""Where exits pay: which candidate heads to admit, and after which blocks of a network to propose exits.

Shapes: M images of a set, S stages (candidate heads before the network's own), N = S + 1 exits, K blocks after which
an exit can be (in a network: all blocks but the last), D channels.
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
from policyskip.runs.progress import waiting
from policyskip.texts import percent


@dataclass(frozen=True)
class Stage:
    """Holds the figures of a candidate head on the images that reach it.

    Attributes:
        resolved: number of images that would leave at the head.
        passed: number of images that would pay for the head and go on.
        gain: MACs saved, per image of the whole set; negative if the head costs more than it saves.
        admitted: whether the gain was large enough.
    """

    resolved: int
    passed: int
    gain: float
    admitted: bool


def stage_gain(resolved: int, passed: int, saved_macs: float, head_macs: float) -> float:
    """Compute ``resolved · saved - passed · head``: the MACs that a head saves the images that leave, minus those that
    it costs the images that go on.

    Args:
        resolved, passed: see :class:`Stage`.
        saved_macs: MACs of the remaining network with the network's own head, minus those of this head.
        head_macs: MACs of this head.
    """
    return resolved * saved_macs - passed * head_macs


def admit(leave_MS: Tensor, trunk_N: Tensor, head_N: Tensor, epsilon: float = 0.0) -> list[Stage]:
    """Admit the heads of Conditional Deep Learning, one stage after the other from the first.

    A head is admitted if its gain over the images that reach it exceeds ``epsilon``. Where a head is not admitted, all
    images go on at no cost, and the next stage is judged on them, too. The heads admitted before cost the same either
    way, and heads further on are not there yet. This is our reading of the paper (Panda, Sengupta, Roy 2016, arXiv
    1509.08971), which adds heads from the first layer on while there is a gain in operations; that the search goes on
    after a head without a gain is our choice.

    Args:
        leave_MS: bool (M, S), whether each validation image would leave at each candidate, if it came so far.
        trunk_N: float (N,), MACs of the trunk from the stage before to each stage; the last is the network's end.
        head_N: float (N,), MACs of each head; the last is the network's own.
        epsilon: MACs per image of the whole set.

    Returns: S stages, in order.

    Raises:
        ValueError: the shapes do not belong together.
    """
    M, S = leave_MS.shape
    if trunk_N.shape != (S + 1,) or head_N.shape != (S + 1,):
        raise ValueError(f"{S} stages take {S + 1} trunk and head costs, got {len(trunk_N)} and {len(head_N)}")
    inside_M = torch.ones(M, dtype=torch.bool, device=leave_MS.device)
    stages = []
    for s, leave_M in enumerate(leave_MS.unbind(1)):
        resolved = int((inside_M & leave_M).sum())
        passed = int(inside_M.sum()) - resolved
        remaining_macs = float(trunk_N[s + 1 :].sum() + head_N[-1])
        gain = stage_gain(resolved, passed, remaining_macs - float(head_N[s]), float(head_N[s])) / M
        stages.append(Stage(resolved, passed, gain, gain > epsilon))
        if gain > epsilon:
            inside_M &= ~leave_M
    return stages


@dataclass(frozen=True)
class Probes:
    """Holds accuracy and cost of a probe after each block, by which :func:`propose_exits` chooses.

    Attributes:
        accuracy_K: accuracy on validation images of the probe after each block but the last, in [0, 1].
        macs_K: MACs of leaving at that probe.
        full_accuracy: accuracy of the probe after the last block.
        full_macs: MACs of leaving at the network's own exit.
    """

    accuracy_K: list[float]
    macs_K: list[float]
    full_accuracy: float
    full_macs: float


@dataclass(frozen=True)
class Proposal:
    """Holds an exit after block ``block`` (counted from 0), and the reason to put one there."""

    block: int
    reason: str


def propose_exits(
    accuracy_K: list[float], macs_K: list[float], full_accuracy: float, full_macs: float, number: int, chance: float
) -> list[Proposal]:
    """Propose blocks after which to put ``number`` early exits, by the accuracy that an exit adds and the MACs over
    which it adds it.

    If every budget up to the full cost is equally likely, and an image is classified by the deepest exit that the
    budget reaches (by a guess, before the first), then the mean accuracy is the area under a staircase: an exit adds
    its accuracy minus that of the exit before, times the MACs from this exit to the end. The blocks proposed have the
    largest area of all choices of that number. Accuracy per MAC would put every exit at the very beginning.

    Args:
        accuracy_K: validation accuracy of a probe after each of the K blocks, in [0, 1].
        macs_K: MACs of leaving at that probe, its own included, rising.
        full_accuracy, full_macs: of the network's own exit.
        number: how many exits to propose.
        chance: accuracy of a guess, 1/C.

    Returns: the proposals, the first block first.

    Raises:
        UserError: ``number`` is below 1 or above K.
        ValueError: there is not one cost for each block, or the costs do not rise.
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
                (area + accuracy_K[j] * (macs_K[k] - macs_K[j]), [*blocks, k])
                for j, (area, blocks) in best.items()
                if j < k
            )
            for k in range(min(best) + 1, K)
        }
    _, blocks = max((area + accuracy_K[k] * (full_macs - macs_K[k]), blocks) for k, (area, blocks) in best.items())
    proposals, accuracy_before, macs_before = [], chance, 0.0
    for block in blocks:
        gained, paid = accuracy_K[block] - accuracy_before, macs_K[block] - macs_before
        reason = (
            f"after block {block}: {percent(accuracy_K[block])} right at {macs_K[block] / full_macs:.2f} of the full "
            f"cost (the network: {percent(full_accuracy)}), {100 * gained:+.1f} points for {paid / 1e6:.3g} million "
            f"MACs more than {'a guess' if block == blocks[0] else 'the exit before'}"
        )
        proposals.append(Proposal(block, reason))
        accuracy_before, macs_before = accuracy_K[block], macs_K[block]
    return proposals


@torch.no_grad()
def probe_blocks(backbone: Backbone, train: Images, validation: Images, limit: int = 4000) -> Probes:
    """Judge a linear probe on the pooled features after each block, and count the MACs of leaving there.

    A probe is a ridge regression from each channel's average to the one-hot label, fitted in closed form on ``limit``
    training images, spread over the set, and judged on validation images: it takes one pass, and no learning rate.
    """
    backbone.freeze()
    train_features, train_label_M = _pooled(backbone, train, limit)
    validation_features, validation_label_M = _pooled(backbone, validation, limit)
    target_MC = F.one_hot(train_label_M, backbone.num_classes).double()
    accuracy = []
    for features in zip(train_features, validation_features, strict=True):
        x, validation_x = (torch.cat([f, torch.ones_like(f[:, :1])], 1) for f in features)
        gram = x.T @ x + 1e-3 * len(x) * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        prediction_M = (validation_x @ torch.linalg.solve(gram, x.T @ target_MC)).argmax(1)
        accuracy.append((prediction_M == validation_label_M).double().mean().item())
    channels, height, width = batch_at(validation, torch.tensor([0])).images.shape[1:]
    shape = (channels, height, width)
    costs = count_exit_costs(ResNetExits(backbone, range(backbone.num_blocks - 1), "pooled", shape), shape)
    return Probes(accuracy[:-1], costs.straight_N[:-1].tolist(), accuracy[-1], float(costs.straight_N[-1]))


def _pooled(backbone: Backbone, images: Images, limit: int) -> tuple[list[Tensor], Tensor]:
    """Compute each channel's average after each block, K times float64 (M, D), and the labels, int64 (M,)."""
    pooled, labels = [], []
    index_N = spread_indices(limit, len(images))
    with waiting("probing every block", len(index_N)) as wait:
        for batch in images.plain().stream((index_B, 0) for index_B in index_N.split(250)):
            x, batch_pooled = backbone.features(batch.images), []
            for block in backbone.blocks:
                x = block(x)
                batch_pooled.append(x.mean((2, 3)).double())
            pooled.append(batch_pooled)
            labels.append(batch.label_B)
            wait.advance(len(batch))
    return [torch.cat(after_block) for after_block in zip(*pooled, strict=True)], torch.cat(labels)
