"""Residual networks of small images on a GPU: each image is one program, and its skipped blocks are branches not taken.

Shapes: B images, S decisions per image, R = S · B rows (an image under one decision), K blocks, M of them in a row,
C classes or channels, H W pixels.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

from policyskip.backbones.base import Backbone, Block
from policyskip.backbones.folding import ConvReLU, FoldedBlock
from policyskip.backbones.resnet import SubsampleShortcut
from policyskip.execution.kernel_network import KernelNetwork
from policyskip.execution.stage_plan import (
    MOST_CHANNELS,
    MOST_PIXELS,
    PRECISIONS,
    Launch,
    Stage,
    convolution,
    is_plain,
    kind_of,
    padded,
    stride_of,
)
from policyskip.execution.stage_tilings import Tiling, tilings_for
from policyskip.execution.stage_weights import Packed


class StageNetwork(KernelNetwork):
    """A network that runs each image of a residual network of basic blocks, such as a CIFAR ResNet, as one program.

    Args:
        tilings: rows a multiprocessor, at most, and how they are computed then; None: as ``tilings_for`` says.
        patch: the side of the patches in which 16 channels are convolved (see ``stage_kernels.py``); None: 2, but 1
            for exact products, whose time is that of the arithmetic.
        entries: bytes of the input pixels that one product takes for one patch; None: 128, but 64 for exact products.
            The more, the fewer waits; the less, the more programs fit a multiprocessor, and the more of its cache is
            left for features.

    Raises:
        ValueError: ``why_not`` says why this network cannot run so.
    """

    def __init__(
        self,
        folded: Backbone,
        image_shape: tuple[int, int, int],
        exact: bool = False,
        tilings: Sequence[tuple[float, Tiling]] | None = None,
        patch: int | None = None,
        entries: int | None = None,
    ) -> None:
        super().__init__(folded, image_shape, exact)
        if reason := self.why_not(folded, image_shape):
            raise ValueError(f"this network cannot run in stage kernels: {reason}")
        device = folded.mean.device
        self.exact = exact and folded.mean.dtype == torch.float32
        self.precision = "ieee" if self.exact else "tf32"
        if device.type == "cpu" and folded.mean.dtype == torch.bfloat16:
            self.precision = "widened"
        self.tilings = tuple(tilings or tilings_for(device, self.exact))
        self.patch = patch or (1 if self.exact else 2)
        self.entries = max(16, (entries or (64 if self.exact else 128)) // folded.mean.element_size())
        self.multiprocessors = (
            torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        )
        self.packed = Packed(folded, self.patch)
        self.stages = self._shapes(folded, image_shape)
        self.costs = torch.tensor([cost for stage in self.stages for cost in _costs(stage)], dtype=torch.int32)
        self.costs = self.costs.to(device)
        self.launches = cache(self._launches)

    @classmethod
    def why_not(cls, folded: Backbone, image_shape: tuple[int, int, int]) -> str:
        """Say in one plain clause why this network cannot run so; empty if it can."""
        names = ("forward", "features", "normalise")
        if not all(getattr(type(folded), name) is getattr(Backbone, name) for name in names):
            return "it is no plain residual network, but one with gates, exits or code of its own"
        if type(folded.stem) is not nn.Sequential or type(folded.head) is not nn.Sequential:
            return "its stem or its head is no plain sequence of layers"
        dtypes = {value.dtype for value in folded.state_dict().values() if value.is_floating_point()}
        if len(dtypes) != 1 or dtypes.isdisjoint(PRECISIONS):
            return f"its weights are {' and '.join(sorted(str(dtype)[6:] for dtype in dtypes))}"
        if image_shape[1] * image_shape[2] > MOST_PIXELS:
            return f"images of {' × '.join(map(str, image_shape))} do not fit one multiprocessor"
        stem, head = list(folded.stem.children()), list(folded.head.children())
        if len(stem) != 1 or type(stem[0]) is not ConvReLU or not is_plain(stem[0], 3) or stem[0].stride != (1, 1):
            return "it does not begin with one 3×3 convolution of stride 1 and a ReLU"
        if stem[0].in_channels != 3:
            return f"it reads {stem[0].in_channels} colours, not 3"
        if [type(layer) for layer in head] != [nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear]:
            return "it does not end with the average over pixels and one linear layer"
        if head[0].output_size not in (1, (1, 1)):
            return "it does not end with the average over all pixels"
        channels = stem[0].out_channels
        for k, block in enumerate(folded.blocks):
            if reason := _why_not_block(block, channels):
                return f"block {k} {reason}"
            channels = convolution(block.residual, 1).out_channels
            if channels > MOST_CHANNELS:
                return f"block {k} has {channels} channels, more than {MOST_CHANNELS}"
        return ""

    def _shapes(self, folded: Backbone, image_shape: tuple[int, int, int]) -> list[Stage]:
        """Divide the blocks into stages: a stage ends where a block changes the shape of the features."""
        _, h, w = image_shape
        c = convolution(folded.stem, 0).out_channels
        stages: list[Stage] = []
        for k, block in enumerate(folded.blocks):
            kind = kind_of(block.shortcut)
            if stages and kind == "identity":
                stages[-1] = stages[-1]._replace(blocks=stages[-1].blocks + 1)
                continue
            before = (h, w, c, padded(c))
            stride, shift = stride_of(block.shortcut), 0
            if kind != "identity":
                h, w, c = -(-h // stride), -(-w // stride), convolution(block.residual, 1).out_channels
            if isinstance(block.shortcut, SubsampleShortcut):
                shift = block.shortcut.pad[0]
            start, (weights, bias) = k + (kind != "identity"), self.packed.blocks[k]
            cp, patch = padded(c), self.patch if padded(c) == 16 else 1
            steps = 2 * (patch * (patch + 2) * cp) ** 2
            own = self.packed.blocks[start] if start < len(self.packed.blocks) else self.packed.head
            kind = "" if kind == "identity" else kind
            stages.append(
                Stage(
                    *(h, w, c, cp, *before, stride, kind, shift, start, int(start == k), own[0], steps, own[1], 2 * cp),
                    *(weights, bias, 0, patch, 0, 0, False, -1),
                )
            )
        return stages

    def _tiled(self, stage: Stage, tiling: Tiling, warps: int) -> Stage:
        """Return a stage with the sizes of its tiles and products."""

        most = tiling.sums * 32 * warps
        patches = -(-stage.h // stage.patch) * -(-stage.w // stage.patch)
        return stage._replace(
            m=_tile(patches, most // (stage.patch**2 * stage.c_padded)),
            m_change=_tile(stage.h * stage.w, min(most // 2, 4096) // stage.c_padded),  # rare, and needs more registers
            entries=self.entries,
            ahead=tiling.ahead,
        )

    def _launches(self, first: int, last: int, stem: bool, head: bool, tiling: Tiling) -> list[Launch]:
        """Plan the launches that run blocks first … last - 1, with stem and head if asked."""
        parts = [
            (number, stage if first < stage.start else stage._replace(kind=""))
            for number, stage in enumerate(self.stages)
            if max(first, stage.start - (stage.kind != "")) < min(last, stage.start + stage.blocks)
        ]
        groups = [parts] if tiling.one_launch or not parts else [[part] for part in parts]
        return [
            self._launch(group, first, last, stem and group is groups[0], head and group is groups[-1], tiling)
            for group in groups
        ]

    def _launch(
        self, parts: list[tuple[int, Stage]], first: int, last: int, stem: bool, head: bool, tiling: Tiling
    ) -> Launch:
        """Plan one launch: which memory each part reads and writes, and what the kernel is compiled for."""
        warps = tiling.warps[0 if tiling.one_launch or not parts else min(parts[0][0], len(tiling.warps) - 1)]
        warps = max(warps, *(stage.c_padded // 32 for _, stage in parts), 1)  # at most 64 sums a thread
        _, height, width = self.image_shape
        before, behind = self.stages[0], self.stages[-1]
        stages = [self._tiled(stage, tiling, warps) for _, stage in parts]
        changes = [i for i, stage in enumerate(stages) if stage.kind]
        shape = (before.c_in, height, width) if stem else (behind.c, behind.h, behind.w)  # of features that are read
        if stages:
            first, last = max(first, stages[0].start - bool(changes)), min(last, stages[-1].start + stages[-1].blocks)
            own = stages[0]
            shape = (own.c_in, own.h_in, own.w_in) if own.kind else (own.c, own.h, own.w)
        x_row = 3 * height * width if stem else math.prod(shape)
        space = _aligned(max((stage.h * stage.w * stage.c for stage in stages), default=0))  # between convolutions
        stem_constants: tuple[int, ...] = ()
        if stem:
            place = -1
            if changes or head:
                place, space = space, space + _aligned(math.prod(shape))
            c = padded(before.c_in)
            tile = _tile(height * width, 8 * 32 * warps // c)
            stem_constants = (height, width, before.c_in, c, *self.packed.stem, tile, place)
        for i in changes:
            if head or i != changes[-1]:
                size = stages[i].h * stages[i].w * stages[i].c
                stages[i], space = stages[i]._replace(out=space), space + _aligned(size)
        if stages:
            shape = (stages[-1].c, stages[-1].h, stages[-1].w)
        out_shape: tuple[int, ...] = shape if stem or changes else ()
        head_constants: tuple[int, ...] = ()
        if head:
            out_shape = (self.folded.num_classes,)
            head_constants = (shape[1] * shape[2], shape[0], padded(shape[0]), *out_shape, *self.packed.head)
        constants = dict(
            STEM=stem_constants,
            STAGES=tuple(field for stage in stages for field in stage),
            HEAD=head_constants,
            SPACE=space,
            X_ROW=x_row,
            OUT_ROW=math.prod(out_shape),
            PRECISION=self.precision,
        )
        return Launch(first, last, constants, warps, out_shape)

    def _tiling(self, rows: int) -> Tiling:
        """Choose how this many rows are computed."""
        return next(tiling for most, tiling in self.tilings if rows <= most * self.multiprocessors)

    def _run(self, x: Tensor, keep_RM: Tensor, first: int, stem: bool = False, head: bool = False) -> Tensor:
        """Run stem, blocks first … first + M - 1 and head, as asked, and return features or logits of R rows."""
        from policyskip.execution.stage_kernels import run_image

        (rows, count), images = keep_RM.shape, len(x)
        tiling, keep_RM = self._tiling(rows), keep_RM.view(torch.uint8)
        weights, bias = self.packed.weights, self.packed.bias
        for launch in self.launches(first, first + count, stem, head, tiling):
            out = x
            if launch.out_shape:
                form = torch.channels_last if len(launch.out_shape) == 3 else torch.contiguous_format
                shape = (rows, *launch.out_shape)
                out = torch.empty(shape, dtype=weights.dtype, device=weights.device, memory_format=form)
            if rows:
                keep = keep_RM[:, launch.first - first : launch.last - first]
                order = self._order(keep, launch, tiling)
                scratch = weights.new_empty(rows * launch.constants["SPACE"])
                with _on(x.device):
                    run_image[(rows,)](
                        *(x, out, scratch, keep, self.costs if order is None else order, weights, bias, images),
                        *(*keep.stride(), launch.first, launch.last, int(order is not None)),
                        **launch.constants,
                        num_warps=launch.warps,
                        num_stages=1,
                    )
            x = out
        return x

    def _order(self, keep: Tensor, launch: Launch, tiling: Tiling) -> Tensor | None:
        """Find in which order the rows are computed, int32 (R,); None if all begin at once or cost about the same."""
        from policyskip.execution.order_kernels import longest_first

        rows, count = keep.shape
        if rows <= self.multiprocessors or count < 2:
            return None
        order = torch.empty(rows, dtype=torch.int32, device=keep.device)
        with _on(keep.device):
            longest_first[(-(-rows // 32),)](
                *(order, keep, self.costs[launch.first : launch.last], rows, *keep.stride(), count),
                *(self.multiprocessors, tiling.resident),
                MINE=32,
                OTHERS=128,
                num_warps=8,
            )
        return order

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Compute the features (B, C, H, W) that enter block 0, channels last, of images (B, 3, H, W)."""
        nothing = torch.zeros(len(images), 0, dtype=torch.bool, device=images.device)
        return self._run(_pixels(images, self.image_shape), nothing, 0, stem=True)

    @torch.no_grad()
    def advance(self, x: Tensor, keep_BM: Tensor, first: int) -> Tensor:
        """Run blocks first … first + M - 1 on features x (B, C, H, W), channels last, which may be overwritten."""
        x = x.to(self.packed.weights.dtype).contiguous(memory_format=torch.channels_last)
        return self._run(x, keep_BM, first)

    @torch.no_grad()
    def head(self, x: Tensor) -> Tensor:
        """Compute logits (B, C) of the last block's features, in the network's precision."""
        x = x.to(self.packed.weights.dtype).contiguous(memory_format=torch.channels_last)
        nothing = torch.zeros(len(x), 0, dtype=torch.bool, device=x.device)
        return self._run(x, nothing, self.folded.num_blocks, head=True)

    @torch.no_grad()
    def logits(self, images: Tensor, keep_SBK: Tensor) -> Tensor:
        """Compute logits (S, B, C) of S decisions for each image, bool (S, B, K)."""
        S, B, K = keep_SBK.shape
        logits = self._run(_pixels(images, self.image_shape), keep_SBK.reshape(S * B, K), 0, stem=True, head=True)
        return logits.view(S, B, self.folded.num_classes)


def _why_not_block(block: Block, channels: int) -> str:
    """Say why a block that reads this many channels is no basic block; empty if it is one."""
    if type(block) not in (Block, FoldedBlock):
        return f"is of the kind {type(block).__name__}, which may join its branch in a way of its own"
    layers = list(block.residual.children()) if type(block.residual) is nn.Sequential else []
    if len(layers) != 2 or type(layers[0]) is not ConvReLU or type(layers[1]) is not nn.Conv2d:
        return "is no basic block of two 3×3 convolutions with a ReLU between them"
    first, second = layers
    if not is_plain(first, 3) or not is_plain(second, 3) or second.stride != (1, 1):
        return "has other convolutions than plain ones of 3×3"
    kind = kind_of(block.shortcut)
    if not kind:
        return "has a shortcut of another kind than identity, A, pool or B"
    same = first.stride == (1, 1) and first.out_channels == channels
    if (kind == "identity" and not same) or first.stride != (stride_of(block.shortcut),) * 2:
        return "has a shortcut of another shape than its residual branch"
    return ""


def _costs(stage: Stage) -> list[int]:
    """Return what a stage's blocks cost: products of 16 × 16 channels, by pixels."""
    inner = stage.h * stage.w * stage.c_padded // 16
    own = inner * stage.c_padded // 16
    change = [(own + inner * stage.c_in_padded // 16) // 2] if stage.kind else []
    return [max(1, cost) for cost in [*change, *[own] * stage.blocks]]


def _tile(patches: int, most: int) -> int:
    """Return how many patches a tile has; from 64 on, products use the same instructions, and give the same bits."""
    return max(16, min(1 << (patches - 1).bit_length(), 1 << (max(64, most).bit_length() - 1)))


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make a GPU the one that kernels are launched on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _aligned(elements: int) -> int:
    """Round up to 64 elements, so that every part of the scratch memory begins where a cache line begins."""
    return -(-elements // 64) * 64


def _pixels(images: Tensor, image_shape: tuple[int, int, int]) -> Tensor:
    """Return images as the kernels read them: uint8 or float32, contiguous.

    Raises:
        ValueError: they are of another shape than the kernels are made for, which would read other memory.
    """
    if tuple(images.shape[1:]) != tuple(image_shape):
        raise ValueError(f"images must be of shape (B, {', '.join(map(str, image_shape))}), got {tuple(images.shape)}")
    return images.to(torch.float32 if images.is_floating_point() else torch.uint8).contiguous()
