"""How a block is run or skipped: two ways to execute one keep matrix.

``dense`` computes every block for the whole batch and then chooses; it is the
reference, and the cheaper way when nearly everything is kept. ``sparse``
computes a block only for the images that keep it; it is what environments,
evaluation and deployment use. Both give the same logits to rounding, and both
carry gradients.

Shapes: B images, K blocks, S decisions per image, C classes, H W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from policyskip.backbones.base import Backbone, Block


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
        x = torch.where(keep_B.view(-1, 1, 1, 1), torch.relu(shortcut + block.residual(x)), shortcut)
    return backbone.head(x)


def sparse(backbone: Backbone, images: Tensor, keep_BK: Tensor) -> Tensor:
    """Logits (B, C) with each block computed for the images that keep it, and for no others."""
    check_keep(backbone, images, keep_BK)
    return _run_blocks(backbone, backbone.features(images), keep_BK)


def sparse_many(backbone: Backbone, images: Tensor, keep_SBK: Tensor) -> Tensor:
    """Logits (S, B, C) of S decisions for each image in one pass; the stem runs once for each image."""
    S, B, K = keep_SBK.shape
    check_keep(backbone, images, keep_SBK[0])
    x = backbone.features(images)
    x = torch.cat([x] * S)  # keeps the memory format, which expand and reshape lose
    return _run_blocks(backbone, x, keep_SBK.reshape(S * B, K)).view(S, B, -1)


def _run_blocks(backbone: Backbone, x: Tensor, keep_BK: Tensor) -> Tensor:
    """Features (B, …), owned by the caller and overwritten where no gradient needs them, to logits (B, C)."""
    # One transfer for the whole matrix; finding the rows block by block would stop the device K times.
    rows_K = [keep_B.nonzero().squeeze(1).to(x.device) for keep_B in keep_BK.cpu().unbind(1)]
    for block, rows in zip(backbone.blocks, rows_K, strict=True):
        x = run_block(block, x, rows)
    return backbone.head(x)


def run_block(block: Block, x: Tensor, rows: Tensor) -> Tensor:
    """One block for the images ``rows`` (int64) of the features x (B, …), and its shortcut for the others.

    x is the caller's own and may be overwritten where no gradient needs it.
    """
    if len(rows) == len(x):
        return block(x)
    shortcut = block.shortcut(x)
    if len(rows) == 0:
        return shortcut
    kept = torch.relu(shortcut[rows] + block.residual(x[rows]))
    return shortcut.index_copy(0, rows, kept) if torch.is_grad_enabled() else shortcut.index_copy_(0, rows, kept)
