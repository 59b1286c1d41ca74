"""Networks that have several exits: their contract, their execution image by image, and the cost of each exit.

An exit is a classifier head on the way through a network. What is computed for one exit is carried forward to the next
and never recomputed, and an image that has left is computed no further. Exits are counted from 0; the last one, N-1, is
the network's own head.

Shapes: B images (B' of them still in the network), N exits, C classes, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from policyskip.backbones.base import Network, evaluation_mode
from policyskip.backbones.costs import counted
from policyskip.errors import UserError
from policyskip.parallel.deferred import sent

State = dict[Hashable, Tensor]
"""The tensors that are carried forward from one exit to the next, by keys of the network's own choice. The first
dimension of each tensor is the image."""

Leave = Callable[[int, Tensor, Tensor], Tensor]
"""``leave(n, logits_BC, rows)``: which of the images still in the network leave at exit n, bool (B',). ``logits_BC``,
(B', C), are their logits at this exit, ``rows``, int64 (B',), their rows in the batch."""


class ExitNetwork(Network):
    """A network that has N exits: environments and agents call :meth:`begin`, :meth:`segment` and :meth:`head`, and
    nothing else of it.

    A subclass implements these three. A state must never be changed in place, so that one state may be continued more
    than once.

    Args:
        num_classes: C.
        num_exits: N; the last exit is the network's own head.
        mean, std: per-channel normalisation of pixels in [0, 1].

    Raises:
        UserError: mean or std are not three numbers, or std is not positive.
    """

    def __init__(self, num_classes: int, num_exits: int, mean: Sequence[float], std: Sequence[float]) -> None:
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise UserError(
                f"mean and std must be three numbers, those of std positive; got {list(mean)} and {list(std)}"
            )
        super().__init__(num_classes, mean, std)
        self.num_exits = num_exits

    def begin(self, images: Tensor) -> State:
        """Make the state that enters segment 0 from images (B, 3, H, W), uint8 in 0..255 or float in [0, 1]."""
        raise NotImplementedError

    def segment(self, n: int, state: State) -> State:
        """Compute the state at exit n from the state at exit n-1, or from that which :meth:`begin` made if n is 0."""
        raise NotImplementedError

    def head(self, n: int, state: State) -> Tensor:
        """Compute the logits (B, C) of exit n from the state that ``segment(n, …)`` returned."""
        raise NotImplementedError

    def remarks(self, image_shape: tuple[int, int, int]) -> list[str]:
        """Return lines to print before the network is trained on images of shape (3, H, W)."""
        return []

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits (B, N, C) of every exit. Gradients flow through all of them."""
        state, logits = self.begin(images), []
        for n in range(self.num_exits):
            state = self.segment(n, state)
            logits.append(self.head(n, state))
        return torch.stack(logits, 1)


def rows_of(state: State, rows: Tensor) -> State:
    """Select images from a state of B images by ``rows``, int64 (B',) or bool (B,)."""
    return {key: value[rows] for key, value in state.items()}


def run_until(network: ExitNetwork, images: Tensor, leave: Leave) -> tuple[Tensor, Tensor]:
    """Compute each image up to the exit where it leaves, and no further.

    Args:
        network: in evaluation mode, or batch normalisation would see only the images that stayed.
        images: uint8 or float (B, 3, H, W); B may be 0.
        leave: called at every exit but the last, as long as there are images in the network.

    Returns: the logits (B, C) at the exit where each image left, and that exit, int64 (B,).

    Raises:
        ValueError: ``leave`` returned something other than bool of shape (B',).
    """
    logits_BC = torch.zeros(len(images), network.num_classes, dtype=network.mean.dtype, device=images.device)
    exit_B = torch.full((len(images),), network.num_exits - 1, device=images.device)
    if len(images) == 0:
        return logits_BC, exit_B
    rows, state = torch.arange(len(images), device=images.device), network.begin(images)
    for n in range(network.num_exits):
        state = network.segment(n, state)
        here_BC = network.head(n, state)
        if n == network.num_exits - 1:
            logits_BC[rows] = here_BC.to(logits_BC.dtype)
            break
        leaves = leave(n, here_BC, rows)
        check_leaves(leaves, rows)
        leaving = leaves.nonzero().squeeze(1)
        if len(leaving) == 0:
            continue
        left = rows[leaving]
        logits_BC[left] = here_BC[leaving].to(logits_BC.dtype)
        exit_B[left] = n
        if len(leaving) == len(rows):
            break
        staying = (~leaves).nonzero().squeeze(1)
        rows, state = rows[staying], rows_of(state, staying)
    return logits_BC, exit_B


def check_leaves(leaves: Tensor, rows: Tensor) -> None:
    """Check that what ``leave`` gave for some images, whose rows are int64 (B',), is bool (B',).

    Raises:
        ValueError: it is not.
    """
    if leaves.dtype != torch.bool or leaves.shape != rows.shape:
        raise ValueError(
            f"leave must give bool of shape {tuple(rows.shape)}, gave {leaves.dtype} {tuple(leaves.shape)}"
        )


@dataclass(frozen=True)
class ExitCosts:
    """Holds the MACs of one image: ``trunk_N`` of each segment and ``head_N`` of each head, float64 (N,)."""

    trunk_N: Tensor
    head_N: Tensor

    @property
    def cumulative_N(self) -> Tensor:
        """Return the MACs of leaving at each exit, every head on the way included, float64 (N,)."""
        return (self.trunk_N + self.head_N).cumsum(0)

    @property
    def straight_N(self) -> Tensor:
        """Return the MACs of each exit if it is the only one, with no other head on the way, float64 (N,)."""
        return self.trunk_N.cumsum(0) + self.head_N

    @property
    def full(self) -> float:
        """Return the MACs of leaving at the last exit, every head on the way included."""
        return float(self.cumulative_N[-1])

    def of(self, exit_B: Tensor) -> Tensor:
        """Return the MACs, float64 (B,), of leaving at exits int64 (B,)."""
        return sent(self.cumulative_N, exit_B.device)[exit_B]


def count_exit_costs(network: ExitNetwork, image_shape: tuple[int, int, int]) -> ExitCosts:
    """Count the MACs of each segment and head for one image of shape (3, H, W), by torch's flop counter."""
    images = torch.zeros(1, *image_shape, device=network.mean.device)
    trunk, heads = [], []
    with evaluation_mode(network):
        begin, state = counted(network.begin, images)
        for n in range(network.num_exits):
            segment, state = counted(network.segment, n, state)
            trunk.append(segment if n else begin + segment)
            heads.append(counted(network.head, n, state)[0])
    return ExitCosts(torch.tensor(trunk, dtype=torch.float64), torch.tensor(heads, dtype=torch.float64))


def costly_exits(costs: ExitCosts) -> list[str]:
    """Return a line of warning for each head that costs at least as much as the segment behind it: such a head can
    hardly pay."""
    return [
        f"the head of exit {n} costs {head / 1e6:.3f} M MACs, going on to exit {n + 1} {going_on / 1e6:.3f} M: "
        f"make the head smaller, or move or remove the exit"
        for n, (head, going_on) in enumerate(zip(costs.head_N[:-1].tolist(), costs.trunk_N[1:].tolist()))
        if head >= going_on
    ]


def in_millions(macs_N: Tensor) -> str:
    """Format MACs, float (N,), as text: "5.91, 12.62 M MACs"."""
    return ", ".join(f"{macs / 1e6:.2f}" for macs in macs_N.tolist()) + " M MACs"
