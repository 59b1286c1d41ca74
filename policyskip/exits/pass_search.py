"""The keep-sets of a network's passes are searched here, on validation images, for the target that a run has.

Candidates are products of what is kept in each stage: in each stage blocks are dropped one after the other, the first
being those without which the network answers best. Such sets agree in their first stages, so that passes share much.
Each candidate runs once on the images. What a choice of passes costs and gets right follows from these answers alone.

Shapes: M images, S candidates, N passes, C classes, K blocks, G numbers of images that go on, P points on a curve.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from policyskip.backbones import Backbone, Costs, count_costs
from policyskip.backbones.base import evaluation_mode
from policyskip.backbones.costs import count_macs
from policyskip.backbones.folding import folded
from policyskip.backbones.passes import Keep, common_prefix
from policyskip.data import Batch, Images, batch_at
from policyskip.exits.calibration import Curve
from policyskip.exits.targets import UnmetError, choose_index
from policyskip.fronts import concave_hull
from policyskip.memory import release_freed_memory
from policyskip.runs.progress import Wait, waiting

SCREENED = 250
"""Images by which the blocks of a stage are put in order; the answers' likelihood says more than how many are right."""
NEAR = 0.03
"""How far a candidate may lie below the best fixed choice of its cost and still be tried as a pass, as accuracy."""
FEWEST, TRIED = 4, 100
"""Candidates that are tried as passes, at least and at most: all pairs of them."""
EXTENDED = 10
"""Pairs, the best for the target, for which a third pass is searched."""
SHARES = (0.02, 0.05, *(0.05 * step for step in range(2, 19)))
"""Shares of the images that go on which are tried."""
NUMBERS = 2**28
"""Logits that the answers of all candidates may hold, which bounds the number of images."""


@dataclass(frozen=True)
class Answers:
    """Holds what every candidate answers.

    Attributes:
        sets: the S candidates; the last keeps every block.
        log_probability_SMC: float32 (S, M, C), logarithms of the probabilities.
        label_M: int64 (M,).
        costs: of the network's blocks.
        macs_SS: float64 (S, S), what candidate j costs as a pass that goes on from candidate i.
    """

    sets: list[Keep]
    log_probability_SMC: Tensor
    label_M: Tensor
    costs: Costs
    macs_SS: Tensor

    @property
    def macs_S(self) -> Tensor:
        """Return the MACs of each candidate alone, float64 (S,)."""
        return self.costs.of(torch.tensor(self.sets))

    @property
    def correct_SM(self) -> Tensor:
        """Return whether each candidate is right, bool (S, M)."""
        return self.log_probability_SMC.argmax(-1) == self.label_M


class Runner:
    """Runs keep-sets of a network on images; what sets have in common, from the first block on, runs once.

    Args:
        backbone: left as it is.
        batches: the images.
    """

    def __init__(self, backbone: Backbone, batches: Sequence[Batch]) -> None:
        self.backbone, self.batches = folded(backbone), batches

    @torch.no_grad()
    def log_probabilities(self, sets: Sequence[Keep], what: str) -> Tensor:
        """Return the logarithms of the probabilities, float32 (S, M, C), of S sets; ``what`` says so on the screen."""
        blocks = len({keep[: k + 1] for keep in sets for k, kept in enumerate(keep) if kept})
        parts = []
        with waiting(what, blocks * sum(map(len, self.batches))) as wait:
            for batch in self.batches:
                out: dict[Keep, Tensor] = {}
                self._descend(self.backbone.features(batch.images), 0, sets, out, wait)
                parts.append(torch.stack([out[keep] for keep in sets]))
                release_freed_memory()
        return torch.cat(parts, dim=1)

    def _descend(self, x: Tensor, k: int, sets: Sequence[Keep], out: dict[Keep, Tensor], wait: Wait) -> None:
        """Run the blocks from k on for ``sets``, which agree on those before; put log-probabilities (B, C) into
        ``out``."""
        if k == self.backbone.num_blocks:
            out[sets[0]] = self.backbone.head(x).float().log_softmax(1).cpu()
            return
        block = self.backbone.blocks[k]
        if dropping := [keep for keep in sets if not keep[k]]:
            self._descend(block.shortcut(x), k + 1, dropping, out, wait)
        if keeping := [keep for keep in sets if keep[k]]:
            wait.advance(len(x))
            self._descend(block(x), k + 1, keeping, out, wait)


def stage_patterns(runner: Runner, levels: int) -> list[list[Keep]]:
    """Find, for each stage of the network, up to ``levels`` keep-sets of its blocks, from all of them to one (to none
    in a stage of one block).

    Blocks are dropped one after the other, about a sixth of those left at a time: those without which, all other stages
    being whole, the labels are likeliest.
    """
    stages, label_M = runner.backbone.stages, torch.cat([batch.label_B for batch in runner.batches]).cpu()
    patterns, first = [], 0
    for number, size in enumerate(stages, 1):
        keep, chain = [True] * sum(stages), [(True,) * size]
        while (left := sum(keep[first : first + size])) > (size > 1):
            kept = [k for k in range(first, first + size) if keep[k]]
            trials = [tuple(kept_k and k != dropped for k, kept_k in enumerate(keep)) for dropped in kept]
            answers_SMC = runner.log_probabilities(trials, f"searching what to drop in stage {number} of {len(stages)}")
            loss_S = [F.nll_loss(answer_MC, label_M).item() for answer_MC in answers_SMC]
            for _, dropped in sorted(zip(loss_S, kept))[: max(1, round(left / 6))]:
                keep[dropped] = False
            chain.append(tuple(keep[first : first + size]))
        chosen = torch.linspace(0, len(chain) - 1, min(levels, len(chain))).round().long().tolist()
        patterns.append([chain[index] for index in chosen])
        first += size
    return patterns


def find_answers(
    backbone: Backbone, images: Images, candidates: int, limit: int, seed: int, good: Sequence[Keep] = ()
) -> Answers:
    """Make about ``candidates`` keep-sets, and run each of them on at most ``limit`` of the images.

    Args:
        good: sets to try as well.
        seed: draws the images, and of these the ones by which blocks are put in order.

    """
    generator = torch.Generator().manual_seed(seed)
    count = max(1, min(limit, len(images), NUMBERS // (candidates * backbone.num_classes)))
    index_M = torch.randperm(len(images), generator=generator)[:count]
    height, width = batch_at(images, index_M[:1]).images.shape[2:]
    size = max(1, min(SCREENED, 2**22 // (height * width)))
    with waiting("reading images"):
        batches = [batch_at(images, index_B) for index_B in index_M.split(size)]
    screened = batches[: max(1, SCREENED // size)]
    levels = max(2, int(candidates ** (1 / len(backbone.stages)) * (1 + 1e-9)))
    patterns = stage_patterns(Runner(backbone, screened), levels)
    whole = (True,) * backbone.num_blocks
    sets = [tuple(itertools.chain(*parts)) for parts in itertools.product(*patterns)]
    sets = [*(keep for keep in dict.fromkeys([*sets, *good]) if keep != whole), whole]
    answers_SMC = Runner(backbone, batches).log_probabilities(sets, "searching passes on validation images")
    channels = batches[0].images.shape[1]
    costs = count_costs(backbone, (channels, height, width))
    label_M = torch.cat([batch.label_B for batch in batches]).cpu()
    return Answers(sets, answers_SMC, label_M, costs, macs_from(backbone, costs, (channels, height, width), sets))


def macs_from(backbone: Backbone, costs: Costs, image_shape: tuple[int, int, int], sets: Sequence[Keep]) -> Tensor:
    """Count what each set costs as a pass that goes on from each other one, float64 (S, S)."""
    shared_K1 = always_until(backbone, image_shape)
    block_K, alone_S = costs.block_K.tolist(), costs.of(torch.tensor(sets)).tolist()
    macs_SS = torch.zeros(len(sets), len(sets), dtype=torch.float64)
    for (i, one), (j, other) in itertools.product(enumerate(sets), repeat=2):
        k = common_prefix(one, other)
        shared = shared_K1[k] + sum(macs for macs, kept in zip(block_K[:k], other[:k], strict=True) if kept)
        macs_SS[i, j] = alone_S[j] - shared
    return macs_SS


@torch.no_grad()
def always_until(backbone: Backbone, image_shape: tuple[int, int, int]) -> list[float]:
    """Count the MACs of the stem and of the shortcuts of the first k blocks, for k from 0 to K."""
    images = torch.zeros(1, *image_shape, device=backbone.mean.device)
    with evaluation_mode(backbone):
        macs = [count_macs(backbone.stem, images)]
        x = backbone.features(images)
        for block in backbone.blocks:
            macs.append(macs[-1] + count_macs(block.shortcut, x))
            x = block(x)
    return macs


@dataclass(frozen=True)
class Choices:
    """Holds P choices of passes and of how many images go on, and what they come to on the images of the search.

    Attributes:
        passes_PN: int64 (P, N), the candidates.
        curve: accuracy and cost of each choice, in this order; it holds no thresholds.
    """

    passes_PN: Tensor
    curve: Curve


def choices(answers: Answers, rows: Sequence[tuple[Tensor, ...]]) -> Choices:
    """Make :class:`Choices` of rows of four columns (P', …).

    The columns: the passes, the number of images that are right, the number of images that are right by the passes or
    by the whole network but not by both, and the mean MACs of an image.
    """
    passes_PN, correct_P, differ_P, macs_P = (torch.cat(column) for column in zip(*rows, strict=True))
    M, full = len(answers.label_M), float(answers.correct_SM[-1].double().mean())
    accuracy_P, none_PE = correct_P.double() / M, torch.empty(len(correct_P), 0, dtype=torch.float64)
    error_P = ((differ_P.double() / M - (accuracy_P - full) ** 2).clamp(min=0) / M).sqrt()
    curve = Curve("confidence", none_PE, accuracy_P, error_P, macs_P, full, answers.costs.full)
    return Choices(passes_PN, curve)


def joined(parts: Sequence[Choices]) -> Choices:
    """Join several choices of the same number of passes into one."""
    curves = [part.curve for part in parts]
    accuracy_P, error_P, macs_P = (
        torch.cat([getattr(curve, name) for curve in curves]) for name in ("accuracy_P", "error_P", "macs_P")
    )
    none_PE = torch.cat([curve.threshold_PE for curve in curves])
    curve = replace(curves[0], threshold_PE=none_PE, accuracy_P=accuracy_P, error_P=error_P, macs_P=macs_P)
    return Choices(torch.cat([part.passes_PN for part in parts]), curve)


def pairs(answers: Answers, tried: Tensor) -> Choices:
    """Judge all pairs of the candidates ``tried``, int64 (S',): the first pass for every image, the second for the G
    least sure ones."""
    lp_SMC, label_M, correct_SM = answers.log_probability_SMC[tried], answers.label_M, answers.correct_SM[tried]
    M, full_M, macs_S = len(label_M), answers.correct_SM[-1], answers.macs_S[tried]
    count_G = _counts(M)
    rows: list[tuple[Tensor, ...]] = []
    with waiting("choosing passes", len(tried)) as wait:
        for i, first in enumerate(tried.tolist()):
            order_M = lp_SMC[i].amax(1).argsort()
            right_SM = (lp_SMC + lp_SMC[i]).argmax(-1) == label_M
            correct_SG = _going_on(right_SM, correct_SM[i], order_M, count_G)
            differ_SG = _going_on(right_SM != full_M, correct_SM[i] != full_M, order_M, count_G)
            macs_SG = macs_S[i] + answers.macs_SS[first, tried].unsqueeze(1) * count_G / M
            other = torch.arange(len(tried)) != i
            passes_SN = torch.stack([torch.full_like(tried, first), tried], dim=1)
            passes_SGN = passes_SN.unsqueeze(1).expand(-1, len(count_G), -1)
            columns = (passes_SGN, correct_SG, differ_SG, macs_SG)
            rows.append(tuple(column[other].flatten(0, 1) for column in columns))
            wait.advance()
    return choices(answers, rows)


def thirds(answers: Answers, tried: Tensor, first: int, second: int) -> Choices:
    """Judge every candidate of ``tried``, int64 (S',), as a third pass behind two, as :func:`pairs` does for two."""
    lp_SMC, label_M, full_M = answers.log_probability_SMC, answers.label_M, answers.correct_SM[-1]
    M, count_G = len(label_M), _counts(len(label_M))
    tried = tried[(tried != first) & (tried != second)]
    correct_M, both_MC = answers.correct_SM[first], lp_SMC[first] + lp_SMC[second]
    order_M, sure_M = lp_SMC[first].amax(1).argsort(), (both_MC / 2).log_softmax(1).amax(1)
    right_SM = (lp_SMC[tried] + both_MC).argmax(-1) == label_M
    correct_2M = both_MC.argmax(1) == label_M
    third_S = torch.minimum(answers.macs_SS[first, tried], answers.macs_SS[second, tried])
    rows: list[tuple[Tensor, ...]] = []
    for count in count_G.tolist():
        on, staying = order_M[:count], order_M[count:]
        further_G = count_G[count_G < count]
        order_O = sure_M[on].argsort()
        columns = []
        for right, of_two, of_one in (
            (right_SM, correct_2M, correct_M),
            (right_SM != full_M, correct_2M != full_M, correct_M != full_M),
        ):
            columns.append(_going_on(right[:, on], of_two[on], order_O, further_G) + of_one[staying].sum())
        macs = float(answers.macs_S[first]) + float(answers.macs_SS[first, second]) * count / M
        macs_SG = macs + third_S.unsqueeze(1) * further_G / M
        passes_SN = torch.stack([torch.full_like(tried, first), torch.full_like(tried, second), tried], dim=1)
        passes_SGN = passes_SN.unsqueeze(1).expand(-1, len(further_G), -1)
        rows.append(tuple(column.flatten(0, 1) for column in (passes_SGN, *columns, macs_SG)))
    return choices(answers, rows)


def _counts(M: int) -> Tensor:
    """Return the numbers of images that go on which are tried, int64 (G,), each once and at least 1."""
    return (torch.tensor(SHARES) * M).round().long().clamp(min=1, max=M).unique()


def _going_on(after_SM: Tensor, before_M: Tensor, order_M: Tensor, count_G: Tensor) -> Tensor:
    """Count the images for which something holds if the first ``count_G`` in order go on, int64 (S, G).

    Args:
        after_SM, before_M: bool, whether it holds for an image that goes on, and for one that does not.
    """
    change_SM = (after_SM.int() - before_M.int())[:, order_M].cumsum(1)
    return before_M.sum() + change_SM[:, count_G - 1]


def search_passes(answers: Answers, number: int, target: dict[str, Any]) -> list[Keep]:
    """Choose the keep-sets of ``number`` passes, 2 or 3, for a target (see :func:`~policyskip.exits.targets.choose`).

    Raises:
        UserError: no choice meets the target.
    """
    tried = near_the_front(answers)
    found = pairs(answers, tried)
    if number == 2:
        best = found.passes_PN[choose_index(found.curve, **target)]
    else:
        extended: list[Choices] = []
        left = torch.ones(len(found.passes_PN), dtype=torch.bool)
        with waiting("choosing a third pass", EXTENDED) as wait:
            while len(extended) < EXTENDED and left.any():
                rows = left.nonzero().squeeze(1)
                try:
                    index = rows[choose_index(found.curve.only(rows), **target)]
                except UnmetError:
                    if not extended:
                        raise
                    break
                first, second = found.passes_PN[index].tolist()
                left &= (found.passes_PN != found.passes_PN[index]).any(1)
                extended.append(thirds(answers, tried, first, second))
                wait.advance()
        found = joined(extended)
        best = found.passes_PN[choose_index(found.curve, **target)]
    return [answers.sets[index] for index in best.tolist()]


def near_the_front(answers: Answers) -> Tensor:
    """Return the candidates that are worth trying, int64 (S',): those nearest to the best fixed choice of their cost,
    and the whole network."""
    accuracy_S, macs_S = answers.correct_SM.double().mean(1), answers.macs_S
    hull = concave_hull(macs_S.tolist(), accuracy_S.tolist())
    best_S = torch.from_numpy(np.interp(macs_S.numpy(), macs_S[hull].numpy(), accuracy_S[hull].numpy()))
    below_S = (best_S - accuracy_S).index_fill(0, torch.tensor([len(accuracy_S) - 1]), 0.0)
    nearest = below_S.argsort(stable=True)[:TRIED]
    return nearest[(below_S[nearest] <= NEAR) | (torch.arange(len(nearest)) < FEWEST)].sort().values
