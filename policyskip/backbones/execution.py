"""How a block is run or skipped: two ways to execute one keep matrix.

``dense`` computes every block for the whole batch and then chooses; it is the
reference, and the cheaper way when nearly everything is kept. ``sparse``
computes a block only for the images that keep it; it is what environments,
evaluation and deployment use. Both give the same logits to rounding, and both
carry gradients.

Shapes: B images, B' of them that keep a block, K blocks, S decisions per image, C classes, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from policyskip.backbones.base import Backbone, Block
from policyskip.parallel import processes


def check_keep(backbone: Backbone, images: Tensor, keep_BK: Tensor) -> None:
    """Raise ``ValueError`` unless ``keep_BK`` is bool of shape (B, K)."""
    expected = (len(images), backbone.num_blocks)
    if keep_BK.dtype != torch.bool or keep_BK.shape != expected:
        raise ValueError(f"keep must be bool of shape {expected}, got {keep_BK.dtype} {tuple(keep_BK.shape)}")


def dense(backbone: Backbone, images: Tensor, keep_BK: Tensor) -> Tensor:
    """Logits (B, C) with every block computed for every image, then chosen per image.

    ``torch.where`` and not a product: a NaN in a dropped branch must not reach the output.
    """
    check_keep(backbone, images, keep_BK)
    x = backbone.features(images)
    for block, keep_B in zip(backbone.blocks, keep_BK.unbind(1), strict=True):
        shortcut = block.shortcut(x)
        kept = torch.relu(shortcut + block.residual(x)) if torch.is_grad_enabled() else block.join(shortcut, x)
        x = torch.where(keep_B.view(-1, 1, 1, 1), kept, shortcut)
    return backbone.head(x)


def sparse(backbone: Backbone, images: Tensor, keep_BK: Tensor, break_even_K: Sequence[float] | None = None) -> Tensor:
    """Logits (B, C) with each block computed for the images that keep it, and for no others.

    Args:
        break_even_K: for each block the share of the batch above which it is computed for all images after all, because
            that is faster (see ``profiling.py``). None: never.
    """
    check_keep(backbone, images, keep_BK)
    if len(images) == 1:  # which rows is no question then, and asking it would take longer than a small block
        x = backbone.features(images)
        for block, kept in zip(backbone.blocks, keep_BK[0].tolist(), strict=True):
            x = block(x, inplace=True) if kept else block.shortcut(x)
        return backbone.head(x)
    keep_KB = keep_BK.T.cpu()  # one transfer; finding the rows block by block would stop the device K times
    rows_K = _rows(keep_KB, images.device)
    rest_K = rows_K if break_even_K is None else _rows(~keep_KB, images.device)
    x = backbone.features(images)
    most_K = break_even_K or [1.0] * len(rows_K)
    for block, rows, rest, most in zip(backbone.blocks, rows_K, rest_K, most_K, strict=True):
        gather = len(rows) <= most * len(x) or len(rest) == 0
        x = run_block(block, x, rows) if gather else run_most(block, x, rest)
    return backbone.head(x)


def _rows(which_KB: Tensor, device: torch.device) -> tuple[Tensor, ...]:
    """For each block the places, int64 (B',), where bool (K, B) says so."""
    return which_KB.nonzero()[:, 1].to(device).split(which_KB.sum(1).tolist())


def sparse_many(backbone: Backbone, images: Tensor, keep_SBK: Tensor) -> Tensor:
    """Logits (S, B, C) of S decisions for each image in one pass.

    What an image's decisions have in common up to some block is computed once: the rows of the features are the
    beginnings of decisions that differ, and a row is copied where the decisions that share it part.
    """
    S, B, _ = keep_SBK.shape
    check_keep(backbone, images, keep_SBK[0])
    if S == 1:
        return sparse(backbone, images, keep_SBK[0]).unsqueeze(0)
    x, room = backbone.features(images), None
    leader_SB, row_SB = torch.zeros(S, B, dtype=torch.int64), torch.arange(B).expand(S, B)
    for block, keep_SB in zip(backbone.blocks, keep_SBK.cpu().unbind(2), strict=True):
        before_SB, leader_SB = leader_SB, leaders(leader_SB, keep_SB)
        leads_SB = leader_SB == torch.arange(S).unsqueeze(1)
        parts_SB = leads_SB & (before_SB != leader_SB)
        parents = row_SB[parts_SB]
        if len(parents):
            row_SB = row_SB.masked_scatter(parts_SB, torch.arange(len(x), len(x) + len(parents)))
            x, room = append(x, parents.to(x.device), room, S * B)
        row_SB = row_SB.gather(0, leader_SB)
        x = run_block(block, x, row_SB[leads_SB & keep_SB].to(x.device))
    return backbone.head(x)[row_SB.to(x.device)]


def leaders(leader_SB: Tensor, keep_SB: Tensor) -> Tensor:
    """Of each decision the first one of its image that has begun in the same way, one block further; int64 (S, B).

    Args:
        leader_SB: the same up to the block before; zeros, before the first block.
        keep_SB: bool, what each does at this block. Who had a leader in common and does the same has one in common.
    """
    alike_SSB = (leader_SB.unsqueeze(1) == leader_SB) & (keep_SB.unsqueeze(1) == keep_SB)
    return alike_SSB.to(torch.uint8).argmax(1)  # the first of equals


def append(x: Tensor, rows: Tensor, room: Tensor | None, capacity: int) -> tuple[Tensor, Tensor | None]:
    """Features (U, …) and, behind them, copies of the rows int64 (V,): (U + V, …).

    Args:
        room: a tensor of ``capacity`` rows of which x may be the first; where it is not, or None, there is a new one.
            So features that grow block by block are copied once, and not at every block. Not used with gradients.

    Returns: the features, and the room that they are in.
    """
    if torch.is_grad_enabled():
        return torch.cat([x, take(x, rows)]), None
    if room is None or room.data_ptr() != x.data_ptr():
        room = torch.empty((capacity, *x.shape[1:]), dtype=x.dtype, device=x.device, memory_format=_format(x))
        room[: len(x)] = x
    room[len(x) : len(x) + len(rows)] = take(x, rows)
    return room[: len(x) + len(rows)], room


def run_block(block: Block, x: Tensor, rows: Tensor, none_too: bool = False) -> Tensor:
    """Features (B, …) after one block that runs for the images in ``rows``, and for no others.

    Args:
        x: features (B, …) that enter the block, owned by the caller and overwritten where no gradient needs them.
        rows: int64 (B',), places of the images that keep the block, each once.
        none_too: whether the block is passed, with no images, where none keeps it.
    """
    if len(rows) == len(x):
        return block(x, inplace=True)
    shortcut = block.shortcut(x)
    if len(rows) == 0 and not none_too:
        return shortcut
    taken = take(x, rows)
    own = taken if shortcut is x else take(shortcut, rows)
    if torch.is_grad_enabled():
        return shortcut.index_copy(0, rows, torch.relu(own + block.residual(taken)))
    return put_(shortcut, rows, block.join(own, taken, inplace=True))


def run_most(block: Block, x: Tensor, rest: Tensor) -> Tensor:
    """What :func:`run_block` gives, with the block computed for all images; ``rest``, int64, are those that drop it."""
    dropped = take(block.shortcut(x), rest)
    everything = block(x, inplace=True)
    if torch.is_grad_enabled():
        return everything.index_copy(0, rest, dropped)
    return put_(everything, rest, dropped)


def take(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of features (B, C, H, W), in their memory format; where it is channels last, image by image in one piece."""
    if _format(x) is torch.contiguous_format:
        return x.index_select(0, rows)
    if (wide := _wide(x)) is not None:
        _, C, H, W = x.shape
        return wide.index_select(0, rows).view(x.dtype).view(len(rows), H, W, C).permute(0, 3, 1, 2)
    return x.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)


def put_(x: Tensor, rows: Tensor, y: Tensor) -> Tensor:
    """Features x (B, C, H, W) with y (B', C, H, W) in the place of the rows int64 (B',), each named once."""
    wide_x, wide_y = _wide(x), _wide(y)
    if wide_x is None or wide_y is None:
        return x.index_copy_(0, rows, y)
    wide_x.index_put_((rows,), wide_y)
    return x


def _wide(x: Tensor) -> Tensor | None:
    """The same memory, image by image, in numbers of sixteen bytes, complex128 (B, …): there are fewer of them to move,
    which is faster on a CPU. None where that cannot be."""
    if _format(x) is torch.contiguous_format or x.device.type != "cpu" or torch.is_grad_enabled():
        return None
    pixels = x.permute(0, 2, 3, 1).flatten(1)
    fits = pixels.shape[1] * x.itemsize % 16 == 0 and x.storage_offset() * x.itemsize % 16 == 0
    return pixels.view(torch.complex128) if fits else None


def _format(x: Tensor) -> torch.memory_format:
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def some_process_runs(block: Block, rows: Tensor) -> bool:
    """Return whether this process has to compute a block, if only with an empty batch.

    A block in training mode is computed in every process as soon as one process has an image that keeps it, because its
    batch normalisation and its gradients are those of all processes. In evaluation mode only this process counts.

    Args:
        rows: int64 (B',), indices of this process's images that keep the block.
    """
    return processes.any_process(len(rows) > 0) if block.residual.training else len(rows) > 0


def run_block_together(block: Block, x: Tensor, rows: Tensor) -> Tensor:
    """Return what :func:`run_block` returns, where several processes share the batch: a block that another process
    runs is computed here too, with an empty batch if need be (see :func:`some_process_runs`)."""
    return run_block(block, x, rows, none_too=some_process_runs(block, rows))
