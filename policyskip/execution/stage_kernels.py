"""Triton kernels for residual networks of small images: one program computes one image, and a skipped block is a branch
that it does not take.

An image's features stay with its program from block to block. They are small enough for the cache of one
multiprocessor, so that a block reads and writes no other memory. Programs know nothing of each other.

Shapes: R rows (an image under one decision), H W pixels, C channels (CP: padded to a power of two), M patches a tile,
N results a patch (see ``product_kernels.py``). Features are (R, H, W, C), without padding.
"""

from __future__ import annotations

import triton
import triton.language as tl

from policyskip.execution.product_kernels import (
    add_product,
    convolve,
    load_weights,
    patches,
    pixels,
    relu,
)
from policyskip.execution.stage_plan import Stage

FIELDS = tl.constexpr(len(Stage._fields))
"""Of a stage. They are handed over in one flat tuple: up to Triton 3.7, no kernel can read a tuple of tuples."""


@triton.jit
def _shortcut(
    src: tl.tensor,
    weights: tl.tensor,
    bias: tl.tensor,
    y_M: tl.tensor,
    x_M: tl.tensor,
    KIND: tl.constexpr,
    SHIFT: tl.constexpr,
    STRIDE: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    MOST: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Compute a shortcut that changes the shape, float32 (M, N), from features src (H, W, C).

    KIND: "A" takes one pixel and puts SHIFT zero channels before it; "pool" averages over the pixels that exist;
    "B" is a 1×1 convolution.
    """
    if KIND == "B":
        products = convolve(src, weights, y_M * STRIDE, x_M * STRIDE, H, W, C, CP, N, 1, M, MOST, False, PRECISION)
        return products + tl.load(bias + tl.arange(0, N))[None, :]
    c = tl.arange(0, N) - SHIFT
    exists = ((c >= 0) & (c < C))[None, :]
    total = tl.zeros((M, N), dtype=tl.float32)
    count = tl.zeros((M,), dtype=tl.float32)
    SIDE: tl.constexpr = STRIDE if KIND == "pool" else 1
    for i in tl.static_range(SIDE * SIDE):
        y, x = y_M * STRIDE + i // SIDE, x_M * STRIDE + i % SIDE
        inside = (y < H) & (x < W)
        total += tl.load(src + ((y * W + x) * C)[:, None] + c[None, :], mask=inside[:, None] & exists, other=0.0)
        count += inside.to(tl.float32)
    return total / tl.maximum(count, 1.0)[:, None]


@triton.jit
def _change_shape(
    src: tl.tensor,
    dst: tl.tensor,
    mid: tl.tensor,
    kept: tl.tensor,
    weights: tl.tensor,
    bias: tl.tensor,
    STAGES: tl.constexpr,
    AT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Run a stage's first block, which changes the shape, on features src, and write what it gives to dst.

    Its fields are those of STAGES from AT on.
    """
    H: tl.constexpr = STAGES[AT + 0]
    W: tl.constexpr = STAGES[AT + 1]
    C: tl.constexpr = STAGES[AT + 2]
    CP: tl.constexpr = STAGES[AT + 3]
    H_IN: tl.constexpr = STAGES[AT + 4]
    W_IN: tl.constexpr = STAGES[AT + 5]
    C_IN: tl.constexpr = STAGES[AT + 6]
    CP_IN: tl.constexpr = STAGES[AT + 7]
    S: tl.constexpr = STAGES[AT + 8]
    KIND: tl.constexpr = STAGES[AT + 9]
    SHIFT: tl.constexpr = STAGES[AT + 10]
    M: tl.constexpr = STAGES[AT + 21]
    K: tl.constexpr = STAGES[AT + 22]
    AHEAD: tl.constexpr = STAGES[AT + 23]
    TILES: tl.constexpr = (H * W + M - 1) // M
    second = weights + 9 * CP_IN * CP
    third = second + 9 * CP * CP
    c = tl.arange(0, CP)
    if kept:
        for tile in range(TILES):
            y, x = patches(tile, W, 1, M)
            sums = convolve(src, weights, y * S - 1, x * S - 1, H_IN, W_IN, C_IN, CP_IN, CP, 3, M, K, AHEAD, PRECISION)
            at, inside = pixels(y, x, H, W, C, CP, 1)
            tl.store(mid + at, relu(sums + tl.load(bias + c)[None, :]).to(mid.dtype.element_ty), mask=inside)
        tl.debug_barrier()  # the second convolution reads what other threads wrote
        for tile in range(TILES):
            y, x = patches(tile, W, 1, M)
            sums = convolve(mid, second, y - 1, x - 1, H, W, C, CP, CP, 3, M, K, AHEAD, PRECISION)
            sums += tl.load(bias + CP + c)[None, :]
            sums += _shortcut(
                src, third, bias + 2 * CP, y, x, KIND, SHIFT, S, H_IN, W_IN, C_IN, CP_IN, CP, M, K, PRECISION
            )
            at, inside = pixels(y, x, H, W, C, CP, 1)
            tl.store(dst + at, relu(sums).to(dst.dtype.element_ty), mask=inside)
    else:
        for tile in range(TILES):
            y, x = patches(tile, W, 1, M)
            sums = _shortcut(
                src, third, bias + 2 * CP, y, x, KIND, SHIFT, S, H_IN, W_IN, C_IN, CP_IN, CP, M, K, PRECISION
            )
            at, inside = pixels(y, x, H, W, C, CP, 1)
            tl.store(dst + at, sums.to(dst.dtype.element_ty), mask=inside)
    tl.debug_barrier()


@triton.jit
def _run_block(
    x: tl.tensor,
    mid: tl.tensor,
    weights: tl.tensor,
    bias: tl.tensor,
    STAGES: tl.constexpr,
    AT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Run a kept block that has the identity as its shortcut, in place on features x; mid is scratch memory."""
    H: tl.constexpr = STAGES[AT + 0]
    W: tl.constexpr = STAGES[AT + 1]
    C: tl.constexpr = STAGES[AT + 2]
    CP: tl.constexpr = STAGES[AT + 3]
    M: tl.constexpr = STAGES[AT + 19]
    PATCH: tl.constexpr = STAGES[AT + 20]
    K: tl.constexpr = STAGES[AT + 22]
    AHEAD: tl.constexpr = STAGES[AT + 23]
    SIDE: tl.constexpr = PATCH + 2
    N: tl.constexpr = PATCH * PATCH * CP
    TILES: tl.constexpr = (((H + PATCH - 1) // PATCH) * ((W + PATCH - 1) // PATCH) + M - 1) // M
    second = weights + SIDE * SIDE * CP * N
    c = tl.arange(0, N) % CP
    for tile in range(TILES):
        top, left = patches(tile, W, PATCH, M)
        sums = convolve(x, weights, top - 1, left - 1, H, W, C, CP, N, SIDE, M, K, AHEAD, PRECISION)
        at, inside = pixels(top, left, H, W, C, CP, PATCH)
        tl.store(mid + at, relu(sums + tl.load(bias + c)[None, :]).to(mid.dtype.element_ty), mask=inside)
    tl.debug_barrier()  # the second convolution reads what other threads wrote
    for tile in range(TILES):
        top, left = patches(tile, W, PATCH, M)
        sums = convolve(mid, second, top - 1, left - 1, H, W, C, CP, N, SIDE, M, K, AHEAD, PRECISION)
        at, inside = pixels(top, left, H, W, C, CP, PATCH)
        sums += tl.load(bias + CP + c)[None, :]
        sums += tl.load(x + at, mask=inside, other=0.0)
        tl.store(x + at, relu(sums).to(x.dtype.element_ty), mask=inside)
    tl.debug_barrier()


@triton.jit
def _stem(
    images: tl.tensor, dst: tl.tensor, weights: tl.tensor, bias: tl.tensor, STEM: tl.constexpr, PRECISION: tl.constexpr
) -> None:
    """Normalise an image (3, H, W), uint8 or float32, convolve it, and write the ReLU of that to dst (H, W, C)."""
    H: tl.constexpr = STEM[0]
    W: tl.constexpr = STEM[1]
    C: tl.constexpr = STEM[2]
    CP: tl.constexpr = STEM[3]
    M: tl.constexpr = STEM[6]
    dtype = dst.dtype.element_ty
    k, c = tl.arange(0, 32), tl.arange(0, CP)  # 27 entries: channel, down, right
    channel, down, right = k // 9, k % 9 // 3 - 1, k % 3 - 1
    scale, shift = tl.load(bias + CP + channel), tl.load(bias + CP + 4 + channel)
    if images.dtype.element_ty == tl.uint8:
        scale = scale / 255
    for tile in range((H * W + M - 1) // M):
        y_M, x_M = patches(tile, W, 1, M)
        y, x = y_M[:, None] + down[None, :], x_M[:, None] + right[None, :]
        inside = (y >= 0) & (y < H) & (x >= 0) & (x < W) & (k < 27)[None, :]
        values = tl.load(images + channel[None, :] * (H * W) + y * W + x, mask=inside, other=0).to(tl.float32)
        values = tl.where(inside, values * scale[None, :] + shift[None, :], 0.0).to(dtype)
        sums = add_product(
            values, load_weights(weights, 0, 32, 32, CP, 0), tl.zeros((M, CP), dtype=tl.float32), PRECISION
        )
        at, exists = pixels(y_M, x_M, H, W, C, CP, 1)
        tl.store(dst + at, relu(sums + tl.load(bias + c)[None, :]).to(dtype), mask=exists)
    tl.debug_barrier()


@triton.jit
def _head(
    src: tl.tensor, out: tl.tensor, weights: tl.tensor, bias: tl.tensor, HEAD: tl.constexpr, PRECISION: tl.constexpr
) -> None:
    """Write the logits of the linear layer, which reads features src (H, W, C) averaged over pixels.

    Both are products, because the order of the sums in those does not depend on the number of warps.
    """
    PIXELS: tl.constexpr = HEAD[0]
    C: tl.constexpr = HEAD[1]
    CP: tl.constexpr = HEAD[2]
    CLASSES: tl.constexpr = HEAD[3]
    EXACT: tl.constexpr = "widened" if PRECISION == "widened" else "ieee"
    dtype = src.dtype.element_ty
    i, c = tl.arange(0, 16), tl.arange(0, CP)
    total = tl.zeros((16, CP), dtype=tl.float32)  # 16 equal rows, the fewest that a product can have
    for first in range(0, PIXELS, 16):
        inside = (first + i < PIXELS)[:, None] & (c < C)[None, :]
        x = tl.load(src + (first + i)[:, None] * C + c[None, :], mask=inside, other=0.0)
        total = add_product(tl.full((16, 16), 1.0, tl.float32).to(dtype), x, total, EXACT)
    mean = (total / PIXELS).to(dtype)
    for first in range(0, CLASSES, 16):
        logits = tl.zeros((16, 16), dtype=tl.float32) + tl.load(bias + first + i)[None, :]
        logits = add_product(mean, load_weights(weights + first * CP, 0, CP, CP, 16, 0), logits, EXACT)
        once = (i == 0)[:, None] & (first + i < CLASSES)[None, :]
        tl.store(out + i[:, None] + (first + i)[None, :], logits.to(dtype), mask=once)


@triton.jit(
    do_not_specialize=["images", "keep_row", "keep_block", "first", "last", "ordered"],
    do_not_specialize_on_alignment=["keep", "order"],
)
def run_image(
    x: tl.tensor,
    out: tl.tensor,
    scratch: tl.tensor,
    keep: tl.tensor,
    order: tl.tensor,
    weights: tl.tensor,
    bias: tl.tensor,
    images: tl.tensor,
    keep_row: tl.tensor,
    keep_block: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    ordered: tl.tensor,
    STEM: tl.constexpr,
    STAGES: tl.constexpr,
    HEAD: tl.constexpr,
    SPACE: tl.constexpr,
    X_ROW: tl.constexpr,
    OUT_ROW: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Run blocks first … last - 1, those of them that are kept, on one image under one decision.

    Args:
        x: features (R, H, W, C), overwritten; or, with a stem, images (B, 3, H, W), uint8 or float32, of which row r
            reads number r modulo ``images``, B.
        out: features after the blocks; or, with a head, logits (R, CLASSES).
        scratch: memory of SPACE elements a row.
        keep: uint8, row r and block k at ``r * keep_row + (k - first) * keep_block``; not 0 where the block runs.
        order: int32 (R,), which row each program computes, if ``ordered`` is not 0.
        weights, bias: as ``stage_weights.py`` packs them.
        STEM: (H, W, C, CP, place of the weights, place of the biases, pixels a tile, place in scratch of what it gives,
            negative for ``out``); () without a stem.
        STAGES: the stages' fields, as ``Stage`` in ``stage_plan.py`` describes them, one stage behind the other.
        HEAD: (pixels, C, CP, CLASSES, place of the weights, place of the biases); () without a head.
    """
    row = tl.program_id(0)
    if ordered != 0:  # not known to the compiler, so that there is one kernel for both
        row = tl.load(order + row)
    row = row.to(tl.int64)
    own = scratch + row * SPACE
    keep += row * keep_row
    if len(STEM) > 0:
        current = out + row * OUT_ROW if STEM[7] < 0 else own + STEM[7]
        _stem(x + row % images * X_ROW, current, weights + STEM[4], bias + STEM[5], STEM, PRECISION)
    else:
        current = x + row * X_ROW
    for i in tl.static_range(len(STAGES) // FIELDS):
        start = STAGES[i * FIELDS + 11]
        if STAGES[i * FIELDS + 9] != "":
            changed = out + row * OUT_ROW if STAGES[i * FIELDS + 24] < 0 else own + STAGES[i * FIELDS + 24]
            kept = tl.load(keep + (start - 1 - first) * keep_block) != 0
            _change_shape(
                current,
                changed,
                own,
                kept,
                weights + STAGES[i * FIELDS + 17],
                bias + STAGES[i * FIELDS + 18],
                STAGES,
                i * FIELDS,
                PRECISION,
            )
            current = changed
        for k in range(tl.maximum(first, start), tl.minimum(last, start + STAGES[i * FIELDS + 12])):
            if tl.load(keep + (k - first) * keep_block) != 0:
                own_weights = weights + STAGES[i * FIELDS + 13] + (k - start) * STAGES[i * FIELDS + 14]
                own_bias = bias + STAGES[i * FIELDS + 15] + (k - start) * STAGES[i * FIELDS + 16]
                _run_block(current, own, own_weights, own_bias, STAGES, i * FIELDS, PRECISION)
    if len(HEAD) > 0:
        _head(current, out + row * OUT_ROW, weights + HEAD[4], bias + HEAD[5], HEAD, PRECISION)
