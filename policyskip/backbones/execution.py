"""Two ways to execute a keep matrix, which says for each image which blocks run.

``dense`` computes every block for the whole batch and then chooses; it is the reference, and the cheaper way when
nearly everything is kept. ``sparse`` computes a block only for the images that keep it; environments, evaluation and
deployment use it. Both give the same logits to rounding, and gradients flow through both.

Shapes: B images, B' of them that keep a block, K blocks, S decisions per image, C classes, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from policyskip.backbones.base import Backbone, Block
from policyskip.parallel import processes
from policyskip.parallel.deferred import sent


def check_keep(backbone: Backbone, images: Tensor, keep_BK: Tensor) -> None:
    """Check that ``keep_BK`` is bool of shape (B, K).

    Raises:
        ValueError: it is not.
    """
    expected = (len(images), backbone.num_blocks)
    if keep_BK.dtype != torch.bool or keep_BK.shape != expected:
        raise ValueError(f"keep must be bool of shape {expected}, got {keep_BK.dtype} {tuple(keep_BK.shape)}")


def dense(backbone: Backbone, images: Tensor, keep_BK: Tensor) -> Tensor:
    """Compute logits (B, C) with every block computed for every image, and its output chosen per image.

    It chooses with ``torch.where`` and not by a product, so that a NaN in a dropped branch does not reach the output.

    Raises:
        ValueError: ``keep_BK`` is not bool (B, K).
    """
    check_keep(backbone, images, keep_BK)
    x = backbone.features(images)
    for block, keep_B in zip(backbone.blocks, keep_BK.unbind(1), strict=True):
        shortcut = block.shortcut(x)
        kept = torch.relu(shortcut + block.residual(x)) if torch.is_grad_enabled() else block.join(shortcut, x)
        x = torch.where(keep_B.view(-1, 1, 1, 1), kept, shortcut)
    return backbone.head(x)


def sparse(backbone: Backbone, images: Tensor, keep_BK: Tensor, break_even_K: Sequence[float] | None = None) -> Tensor:
    """Compute logits (B, C) with each block computed for the images that keep it, and for no others.

    Args:
        break_even_K: for each block, the share of the batch above which the block is computed for all images, because
            that is faster (see ``profiling.py``). None: never.

    Raises:
        ValueError: ``keep_BK`` is not bool (B, K).
    """
    check_keep(backbone, images, keep_BK)
    if len(images) == 1:  # finding the rows would take longer than a small block
        x = backbone.features(images)
        for block, kept in zip(backbone.blocks, keep_BK[0].tolist(), strict=True):
            x = block(x, inplace=True) if kept else block.shortcut(x)
        return backbone.head(x)
    keep_KB = keep_BK.T.cpu()  # one transfer; finding the rows on a GPU would wait for it at each of the K blocks
    rows_K = _rows(keep_KB, images.device)
    dropped_K = rows_K if break_even_K is None else _rows(~keep_KB, images.device)
    x = backbone.features(images)
    most_K = break_even_K or [1.0] * len(rows_K)
    for block, rows, dropped, most in zip(backbone.blocks, rows_K, dropped_K, most_K, strict=True):
        gather = len(rows) <= most * len(x) or len(dropped) == 0
        x = run_block(block, x, rows) if gather else run_most(block, x, dropped)
    return backbone.head(x)


def _rows(which_KB: Tensor, device: torch.device) -> tuple[Tensor, ...]:
    """Find, for each block, the rows, int64 (B',), of the images where ``which_KB``, bool (K, B), is true."""
    return sent(which_KB.nonzero()[:, 1], device).split(which_KB.sum(1).tolist())


def sparse_many(backbone: Backbone, images: Tensor, keep_SBK: Tensor) -> Tensor:
    """Compute logits (S, B, C) of S decisions for each image, bool (S, B, K), in one pass.

    As long as several decisions of one image are the same, block by block from the first, they share one row of the
    features and are computed once. Where they begin to differ, the row is copied.

    Raises:
        ValueError: ``keep_SBK`` is not bool (S, B, K).
    """
    S, B, _ = keep_SBK.shape
    check_keep(backbone, images, keep_SBK[0])
    if S == 1:
        return sparse(backbone, images, keep_SBK[0]).unsqueeze(0)
    x, buffer = backbone.features(images), None
    leader_SB, row_SB = torch.zeros(S, B, dtype=torch.int64), torch.arange(B).expand(S, B)
    for block, keep_SB in zip(backbone.blocks, keep_SBK.cpu().unbind(2), strict=True):
        before_SB, leader_SB = leader_SB, leaders(leader_SB, keep_SB)
        leads_SB = leader_SB == torch.arange(S).unsqueeze(1)
        new_SB = leads_SB & (before_SB != leader_SB)  # decisions that differ here from the one whose row they shared
        copied = row_SB[new_SB]
        if len(copied):
            row_SB = row_SB.masked_scatter(new_SB, torch.arange(len(x), len(x) + len(copied)))
            x, buffer = append(x, copied.to(x.device), buffer, S * B)
        row_SB = row_SB.gather(0, leader_SB)
        x = run_block(block, x, row_SB[leads_SB & keep_SB].to(x.device))
    return backbone.head(x)[row_SB.to(x.device)]


def leaders(leader_SB: Tensor, keep_SB: Tensor) -> Tensor:
    """Return, for each decision, the index of the first decision of the same image with the same choices so far, int64
    (S, B).

    Args:
        leader_SB: int64 (S, B), these indices up to the block before this one; zeros before the first block.
        keep_SB: bool (S, B), the choices at this block.
    """
    alike_SSB = (leader_SB.unsqueeze(1) == leader_SB) & (keep_SB.unsqueeze(1) == keep_SB)
    return alike_SSB.to(torch.uint8).argmax(1)  # the first of several


def append(x: Tensor, rows: Tensor, buffer: Tensor | None, capacity: int) -> tuple[Tensor, Tensor | None]:
    """Append copies of the rows, int64 (V,), to features x (U, …), and return the features (U + V, …).

    Args:
        buffer: a tensor of ``capacity`` rows. If x is its first rows, only the copies are written; otherwise, or if it
            is None, a new buffer is made. So features that grow block by block are copied once, and not at every
            block. Not used with gradients.

    Returns: the features, and the buffer that they are in.
    """
    if torch.is_grad_enabled():
        return torch.cat([x, take(x, rows)]), None
    if buffer is None or buffer.data_ptr() != x.data_ptr():
        buffer = torch.empty((capacity, *x.shape[1:]), dtype=x.dtype, device=x.device, memory_format=_format(x))
        buffer[: len(x)] = x
    buffer[len(x) : len(x) + len(rows)] = take(x, rows)
    return buffer[: len(x) + len(rows)], buffer


def run_block(block: Block, x: Tensor, rows: Tensor, even_if_empty: bool = False) -> Tensor:
    """Compute the features (B, …) after one block that runs for the images in ``rows``, and for no others.

    Args:
        x: features (B, …) that enter the block, owned by the caller and overwritten where no gradient needs them.
        rows: int64 (B',), the rows of the images that keep the block, each once.
        even_if_empty: whether the block runs, on a batch of no images, if no image keeps it.
    """
    if len(rows) == len(x):
        return block(x, inplace=True)
    shortcut = block.shortcut(x)
    if len(rows) == 0 and not even_if_empty:
        return shortcut
    taken = take(x, rows)
    own = taken if shortcut is x else take(shortcut, rows)
    if torch.is_grad_enabled():
        return shortcut.index_copy(0, rows, torch.relu(own + block.residual(taken)))
    return put_(shortcut, rows, block.join(own, taken, inplace=True))


def run_most(block: Block, x: Tensor, dropped: Tensor) -> Tensor:
    """Compute the same as :func:`run_block`, with the block computed for all images; ``dropped``, int64 (B',), are the
    rows of those that drop it."""
    shortcut = take(block.shortcut(x), dropped)
    everything = block(x, inplace=True)
    if torch.is_grad_enabled():
        return everything.index_copy(0, dropped, shortcut)
    return put_(everything, dropped, shortcut)


def take(x: Tensor, rows: Tensor) -> Tensor:
    """Copy rows, int64 (B',), of features (B, C, H, W): (B', C, H, W) in the same memory format.

    With channels last, each image is copied in one piece.
    """
    if _format(x) is torch.contiguous_format:
        return x.index_select(0, rows)
    if (wide := _wide(x)) is not None:
        _, C, H, W = x.shape
        return wide.index_select(0, rows).view(x.dtype).view(len(rows), H, W, C).permute(0, 3, 1, 2)
    return x.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)


def put_(x: Tensor, rows: Tensor, y: Tensor) -> Tensor:
    """Overwrite the rows, int64 (B',), each once, of features x (B, C, H, W) with y (B', C, H, W), and return x."""
    wide_x, wide_y = _wide(x), _wide(y)
    if wide_x is None or wide_y is None:
        return x.index_copy_(0, rows, y)
    wide_x.index_put_((rows,), wide_y)
    return x


def _wide(x: Tensor) -> Tensor | None:
    """View features (B, C, H, W) as numbers of sixteen bytes, complex128 (B, …), or return None if that is impossible.

    There are fewer of these numbers to move, which is faster on a CPU.
    """
    if _format(x) is torch.contiguous_format or x.device.type != "cpu" or torch.is_grad_enabled():
        return None
    pixels = x.permute(0, 2, 3, 1).flatten(1)
    fits = pixels.shape[1] * x.itemsize % 16 == 0 and x.storage_offset() * x.itemsize % 16 == 0
    return pixels.view(torch.complex128) if fits else None


def _format(x: Tensor) -> torch.memory_format:
    """Return the memory format of x (B, C, H, W): channels last or contiguous."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def some_process_runs(block: Block, rows: Tensor) -> bool:
    """Return whether a block must run in this process, given the rows, int64 (B',), of the images that keep it.

    It must if an image of this process keeps it. If the block is being trained, it must also if an image of another
    process does, because batch normalisation and gradients are computed over all processes.
    """
    return processes.any_process(len(rows) > 0) if block.residual.training else len(rows) > 0


def run_block_together(block: Block, x: Tensor, rows: Tensor) -> Tensor:
    """Compute the features (B, …) of :func:`run_block`, for a network that several processes may train together.

    Without an image that keeps the block here, it runs on a batch of no images where :func:`some_process_runs` says so.
    """
    return run_block(block, x, rows, even_if_empty=some_process_runs(block, rows))
