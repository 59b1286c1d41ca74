"""A residual network that an image runs through several times, each time with other blocks, until it is sure enough.

Pass 1 keeps few of the network's blocks, later passes keep more, and each ends in the network's own head: a pass is an
exit whose head is the thinned-out rest of the network. So nothing has to be trained. A pass goes on from the features
that it shares with an earlier pass, up to the first block at which the two differ, and an exit answers with the mean of
what the passes so far say.

Shapes: B images, N passes (and exits), C classes, K blocks, F fixed choices.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from policyskip.backbones.base import Backbone
from policyskip.backbones.costs import count_costs
from policyskip.backbones.exits import ExitNetwork, State
from policyskip.errors import UserError

Keep = tuple[bool, ...]
"""A keep-set: for each of the K blocks, whether it runs."""


def common_prefix(one: Keep, other: Keep) -> int:
    """Return the number of blocks, from the first on, up to which two keep-sets agree."""
    return next((k for k, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


class PassNetwork(ExitNetwork):
    """A frozen backbone that an image runs through once for each keep-set, as far as it has to.

    Exit n answers with the mean, over the passes 0 to n, of the logarithms of their probabilities. What two passes have
    in common, from the stem to the first block at which they differ, is computed once.

    Args:
        backbone: the network, which is frozen here.
        sets: the keep-set of each pass, N of them.

    Attributes:
        sets: these keep-sets.
        forks: for each pass, the number of blocks that it shares with the earlier pass that it goes on from.

    Raises:
        UserError: there is no set, a set is not of the network's K blocks, or two sets are the same.
    """

    def __init__(self, backbone: Backbone, sets: Sequence[Sequence[bool | int]]) -> None:
        keep_NK = [tuple(bool(kept) for kept in keep) for keep in sets]
        K = backbone.num_blocks
        if not keep_NK or any(len(keep) != K for keep in keep_NK):
            found = ", ".join(str(len(keep)) for keep in keep_NK) or "none"
            raise UserError(f"passes need keep-sets of the {K} blocks of {backbone.name}, got sets of {found}")
        if len(set(keep_NK)) < len(keep_NK):
            raise UserError("two passes have the same keep-set; the second would say what the first has said")
        super().__init__(backbone.num_classes, len(keep_NK), [0.0] * 3, [1.0] * 3)  # replaced below
        for name in ("mean", "std"):  # the backbone's own, which are saved as part of it
            self.register_buffer(name, getattr(backbone, name), persistent=False)
        self.backbone = backbone.freeze()
        self.sets: tuple[Keep, ...] = tuple(keep_NK)
        self.forks = tuple(
            max((common_prefix(keep, before) for before in self.sets[:n]), default=0)
            for n, keep in enumerate(self.sets)
        )
        self.name = f"{backbone.name}_passes"
        if backbone.architecture:
            sets_as_numbers = [[int(kept) for kept in keep] for keep in self.sets]
            self.architecture = dict(network="passes", backbone=backbone.architecture, sets=sets_as_numbers)

    def content_hash(self) -> str:
        """Return a hash, as text, of the weights and of the keep-sets."""
        return hashlib.sha256(f"{super().content_hash()} {self.sets}".encode()).hexdigest()[:16]

    def begin(self, images: Tensor) -> State:
        return {(): self.backbone.features(images)}

    def segment(self, n: int, state: State) -> State:
        """Run pass n from where it forks off. A state holds the features that later passes go on from, by the keep
        decisions that lead to them, and the sum of the passes' logarithms of probabilities."""
        keep, fork = self.sets[n], self.forks[n]
        later = {other[:k] for other, k in zip(self.sets[n + 1 :], self.forks[n + 1 :], strict=True)}
        after: State = {key: value for key, value in state.items() if key in later}
        x, owned = state[keep[:fork]], False
        for k in range(fork, self.backbone.num_blocks):
            block = self.backbone.blocks[k]
            if keep[k]:
                x, owned = block(x, inplace=owned), True
            else:
                x = block.shortcut(x)
            if keep[: k + 1] in later:
                after[keep[: k + 1]], owned = x, False
        log_probability_BC = self.backbone.head(x).log_softmax(1)
        after["sum"] = log_probability_BC + state["sum"] if n else log_probability_BC
        return after

    def head(self, n: int, state: State) -> Tensor:
        return state["sum"] / (n + 1)

    def remarks(self, image_shape: tuple[int, int, int]) -> list[str]:
        """Return a line about each pass."""
        costs, lines = count_costs(self.backbone, image_shape), []
        for n, (keep, fork) in enumerate(zip(self.sets, self.forks, strict=True)):
            shared = f" and shares {sum(keep[:fork])} of them with an earlier pass" if n else ""
            alone = float(costs.of(torch.tensor(keep))) / costs.full
            marks = "".join("01"[kept] for kept in keep)
            lines.append(
                f"pass {n + 1} keeps {sum(keep)} of {len(keep)} blocks ({marks}){shared}; "
                f"alone it costs {alone:.3f} of the whole network"
            )
        return lines

    @property
    def fixed_names(self) -> tuple[str, ...]:
        alone = tuple(f"pass {n + 1} alone ({sum(self.sets[n])} blocks)" for n in range(1, self.num_exits))
        return (*alone, f"all {self.backbone.num_blocks} blocks")

    def fixed_logits(self, images: Tensor, logits_BNC: Tensor) -> Tensor:
        """Compute the logits (B, F, C) of each later pass on its own, and of the whole network."""
        last = torch.arange(1, self.num_exits + 1, device=logits_BNC.device).view(1, -1, 1)
        alone_BNC = (logits_BNC * last).diff(dim=1)  # exit n holds the mean of n + 1 passes
        return torch.cat([alone_BNC, self.backbone(images).unsqueeze(1)], dim=1)

    def fixed_macs(self, image_shape: tuple[int, int, int]) -> Tensor:
        costs = count_costs(self.backbone, image_shape)
        others = [*self.sets[1:], (True,) * self.backbone.num_blocks]
        return costs.of(torch.tensor(others))
