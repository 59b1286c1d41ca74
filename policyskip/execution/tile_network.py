"""Residual networks of plain convolutions, executed convolution by convolution, one tile of the output a program.

For networks whose images are too large for one multiprocessor: torchvision's ResNets, and wide ones. The stem, the
head, and shortcuts that are neither the identity nor one convolution are torch's.

Shapes: B images, M consecutive blocks, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from policyskip.backbones.base import Backbone, Block
from policyskip.backbones.folding import FoldedBlock
from policyskip.execution.convolutions import Convolution, TileBlock, largest_tile, why_not_branch
from policyskip.execution.kernel_network import KernelNetwork
from policyskip.execution.stems import Stem, empty, on
from policyskip.execution.tilings import EXPECTED_SHARE, TILINGS, Tiling, choose

MULTIPROCESSORS, CAPABILITY = 132, (9, 0)
"""Of an H100; taken where there is no GPU, so that the interpreter cuts tiles as an H100 would."""


class Listing(NamedTuple):
    """The images in the order of a block's decisions: those that keep it, then the others.

    Attributes:
        rows: int32 (M, B).
        counts: int32 (M,), how many keep the block.
        images: B.
    """

    rows: Tensor
    counts: Tensor
    images: int


class TileNetwork(KernelNetwork):
    """A residual network of plain convolutions whose blocks run in Triton kernels, one tile of the output a program.

    Args:
        folded, image_shape, exact: as in :class:`KernelNetwork`.
        tilings: which tiles there are to choose from, for the kinds of :data:`TILINGS`.
    """

    def __init__(
        self,
        folded: Backbone,
        image_shape: tuple[int, int, int],
        exact: bool = False,
        tilings: Mapping[str, Sequence[Tiling]] = TILINGS,
    ) -> None:
        super().__init__(folded, image_shape, exact)
        import triton

        from policyskip.execution import tile_kernels

        self._kernels: Any = tile_kernels
        self._stem = Stem(folded, tile_kernels)
        dtype = next(folded.parameters()).dtype
        kind = "half" if dtype.itemsize == 2 else "ieee" if exact else "tf32"
        device, self._multiprocessors, capability = folded.mean.device, MULTIPROCESSORS, CAPABILITY
        if device.type == "cuda":
            self._multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
            capability = torch.cuda.get_device_capability(device)
        self._tilings, self._is_new = tilings[kind], capability >= (9, 0)
        if not self._is_new:  # its tensor cores take their operands from registers: the largest tiles need too many
            self._tilings = self._tilings[1:] or self._tilings
        # What joins the shortcut holds its tile as well. With the largest, registers would do for one program a
        # multiprocessor, and nothing would run while that one waits for memory.
        most = max(tile.pixels * tile.channels for tile in self._tilings) // 2
        small = [tile for tile in self._tilings if tile.pixels * tile.channels <= most]
        self._tilings_to_join: Sequence[Tiling] = small or self._tilings
        self._blocks = [TileBlock(block, min(t.inputs for t in self._tilings)) for block in folded.blocks]
        # The interpreter multiplies the bits of bfloat16 as if they were whole numbers.
        upcast = dtype.itemsize == 2 and not isinstance(tile_kernels.convolve, triton.JITFunction)
        self._flags = dict(PRECISION="ieee" if exact else "tf32", UPCAST=upcast)

    @classmethod
    def why_not(cls, folded: Backbone, image_shape: tuple[int, int, int]) -> str:
        """Return why a network cannot run so, as one clause; empty if it can."""
        dtype = next(folded.parameters()).dtype
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"its weights are {str(dtype).removeprefix('torch.')}"
        for number, block in enumerate(folded.blocks):
            if type(block) not in (Block, FoldedBlock):
                kind = type(block).__name__
                return f"its block {number} is of the kind {kind}, which may join its branch in a way of its own"
            if reason := why_not_branch(block.residual):
                return f"the branch of its block {number} has {reason}"
        return ""

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Compute the features (B, C, H, W) that enter block 0, channels last, of images (B, 3, H, W), uint8 in 0..255
        or float in [0, 1]."""
        return self._stem(images)

    @torch.no_grad()
    def head(self, x: Tensor) -> Tensor:
        """Compute logits (B, C), in the network's dtype, from the features (B, C, H, W) after the last block."""
        logits: Tensor = self.folded.head(x)
        return logits

    @torch.no_grad()
    def advance(self, x: Tensor, keep_BM: Tensor, first: int) -> Tensor:
        """Compute the features after M blocks from features (B, C, H, W), channels last, that enter block ``first``.

        Args:
            x: owned by the caller; may be overwritten.
            keep_BM: bool (B, M), which of the blocks each image keeps.
        """
        blocks = self._blocks[first : first + keep_BM.shape[1]]
        if not keep_BM.numel():
            for block in blocks:
                x = block.shortcut(x)
            return x
        x = x.contiguous(memory_format=torch.channels_last)
        with on(x):
            listing = self._list(keep_BM)
            for number, block in enumerate(blocks):
                x = self._run(block, x, listing, number)
        return x

    def _list(self, keep_BM: Tensor) -> Listing:
        """Put the images of each block into the order of its decisions."""
        B, M = keep_BM.shape
        rows = torch.empty(M, B, dtype=torch.int32, device=keep_BM.device)
        counts = torch.empty(M, dtype=torch.int32, device=keep_BM.device)
        keep = keep_BM.view(torch.uint8)
        length = min(1024, max(32, 1 << (B - 1).bit_length()))
        self._kernels.list_images[(M,)](keep, rows, counts, B, *keep.stride(), LENGTH=length)
        return Listing(rows, counts, B)

    def _run(self, block: TileBlock, x: Tensor, listing: Listing, number: int) -> Tensor:
        """Compute the features after one block, the one that has this number in the listing."""
        mid = x
        for convolution in block.branch[:-1]:
            out = empty(x, convolution.out_channels, convolution.out_size(mid.shape[2:]))
            self._convolve(convolution, mid, out, listing, number, is_first=mid is x, is_last=False)
            mid = out
        last = block.branch[-1]
        if block.projection is not None:
            return self._join(last, mid, block.projection, x, listing, number)
        out = block.shortcut(x).contiguous(memory_format=torch.channels_last)
        if mid is x and out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
            out = out.clone(memory_format=torch.channels_last)  # x is still read while it would be written
        self._convolve(last, mid, out, listing, number, is_first=mid is x, is_last=True)
        return out

    def _convolve(
        self, conv: Convolution, x: Tensor, out: Tensor, listing: Listing, number: int, is_first: bool, is_last: bool
    ) -> None:
        """Run one convolution of a branch; see :func:`policyskip.execution.tile_kernels.convolve`."""
        out_h, out_w = out.shape[2:]
        pixels, channels = listing.images * out_h * out_w, conv.out_channels
        tilings = self._tilings_to_join if is_last else self._tilings
        expected = max(1, EXPECTED_SHARE * listing.images) * out_h * out_w
        tile = choose(tilings, expected, channels, self._multiprocessors)
        tile_channels = min(tile.channels, largest_tile(channels))
        self._kernels.convolve[(-(-pixels // tile.pixels) * -(-channels // tile_channels),)](
            *(x, conv.weights, conv.bias, out, listing.rows, listing.counts, number, listing.images, conv.steps),
            **conv.sizes(x.shape[2:]),
            **dict(OUT_H=out_h, OUT_W=out_w, OUT_CHANNELS=channels, IS_FIRST=is_first, IS_LAST=is_last),
            **dict(RELU=conv.relu or is_last, BLOCK_M=tile.pixels, BLOCK_N=tile_channels, **self._flags),
            **options(tile, conv.steps, tile.programs if self._is_new else 2),
        )

    def _join(
        self, conv: Convolution, mid: Tensor, projection: Convolution, x: Tensor, listing: Listing, number: int
    ) -> Tensor:
        """Run the last convolution of a branch and that of the shortcut; see
        :func:`policyskip.execution.tile_kernels.join`."""
        out = empty(x, conv.out_channels, conv.out_size(mid.shape[2:]))
        out_h, out_w = out.shape[2:]
        pixels, channels = listing.images * out_h * out_w, conv.out_channels
        tile = choose(self._tilings_to_join, pixels, channels, self._multiprocessors)
        tile_channels = min(tile.channels, largest_tile(channels))
        # One more tile of pixels than all images fill: kept and other images do not share one.
        self._kernels.join[((-(-pixels // tile.pixels) + 1) * -(-channels // tile_channels),)](
            *(mid, conv.weights, conv.bias, x, projection.weights, projection.bias),
            *(out, listing.rows, listing.counts, number, listing.images, conv.steps, projection.steps),
            **conv.sizes(mid.shape[2:]),
            **{f"SHORTCUT_{name}": size for name, size in projection.sizes(x.shape[2:]).items()},
            **dict(OUT_H=out_h, OUT_W=out_w, OUT_CHANNELS=channels, IS_FIRST=mid is x),
            **dict(BLOCK_M=tile.pixels, BLOCK_N=tile_channels, **self._flags),
            **options(tile, max(conv.steps, projection.steps), programs=2),
        )
        return out


def options(tiling: Tiling, steps: int, programs: int) -> dict[str, int]:
    """Return how the compiler is to cut a tile into threads and stages, with registers for this many programs a
    multiprocessor, which has 65,536."""
    most_registers = min(255, 65536 // (programs * 32 * tiling.warps) // 8 * 8)
    return dict(num_warps=tiling.warps, num_stages=min(tiling.stages, steps), maxnreg=most_registers)
