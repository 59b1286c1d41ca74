"""Triton kernels for residual networks of small images: one program computes one image, and a skipped block is a branch
that it does not take.

An image's features stay with its program from block to block. They are small enough for the cache of one
multiprocessor, so that a block reads and writes no other memory. Programs know nothing of each other.

A convolution is a product of matrices: a row is a patch of PATCH × PATCH neighbouring output pixels, and its entries are
the SIDE × SIDE input pixels that the patch depends on. With PATCH = 2, the weights of input pixels that an output pixel
does not depend on are zeros: 16 input pixels a patch in place of 4 · 9 = 36, and four times as many columns. This pays
for 16 channels, because the copying of input pixels takes longer there than the product.

Shapes: R rows (an image under one decision), H W pixels, C channels (CP: padded to a power of two), M patches a tile,
K entries of a product, N = PATCH² · CP results a patch. Features are (R, H, W, C), without padding.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _window(
    src: tl.tensor,
    top_M: tl.tensor,
    left_M: tl.tensor,
    first: tl.tensor,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    SIDE: tl.constexpr,
    K: tl.constexpr,
) -> tl.tensor:
    """Load entries first … first + K - 1 of the windows of SIDE × SIDE pixels at (top, left), (M, K); 0 outside."""
    k = first + tl.arange(0, K)
    down, right, c = k // CP // SIDE, k // CP % SIDE, k % CP
    y, x = top_M[:, None] + down[None, :], left_M[:, None] + right[None, :]
    inside = (y >= 0) & (y < H) & (x >= 0) & (x < W)
    if C < CP:
        inside = inside & (c < C)[None, :]
    at = ((top_M * W + left_M) * C)[:, None] + ((down * W + right) * C + c)[None, :]
    return tl.load(src + at, mask=inside, other=0.0)


@triton.jit
def _product(a: tl.tensor, b: tl.tensor, total: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """Add the product of a (M, K) and b (K, N) to float32 sums (M, N).

    PRECISION: "tf32" or "ieee" for float32. "widened": Triton's interpreter cannot multiply bfloat16.
    """
    if PRECISION == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _weights(weights: tl.tensor, first: tl.tensor, ALL: tl.constexpr, K: tl.constexpr, N: tl.constexpr) -> tl.tensor:
    """Load entries first … first + K - 1 of weights (N, ALL), as (K, N)."""
    return tl.load(weights + first + tl.arange(0, K)[:, None] + tl.arange(0, N)[None, :] * ALL)


@triton.jit
def _convolve(
    src: tl.tensor,
    weights: tl.tensor,
    top_M: tl.tensor,
    left_M: tl.tensor,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    N: tl.constexpr,
    SIDE: tl.constexpr,
    M: tl.constexpr,
    MOST: tl.constexpr,
    AHEAD: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Sum up products of at most MOST entries of windows with weights (N, SIDE² · CP): float32 (M, N).

    All loads of a product are on their way at once, which is why a product takes several pixels if C is small. AHEAD:
    they are so while the product before is computed, in registers.
    """
    ALL: tl.constexpr = SIDE * SIDE * CP
    LARGEST: tl.constexpr = (8 if SIDE == 3 else SIDE * SIDE) * CP  # of 9 pixels, the ninth is a product of its own
    K: tl.constexpr = MOST if MOST < LARGEST else LARGEST
    PRODUCTS: tl.constexpr = ALL // K
    REST: tl.constexpr = ALL % K
    total = tl.zeros((M, N), dtype=tl.float32)
    # Loops and not copies of their body: Triton spreads the warps of products that follow each other over rows alone.
    if AHEAD:
        a, b = _window(src, top_M, left_M, 0, H, W, C, CP, SIDE, K), _weights(weights, 0, ALL, K, N)
        for i in range(PRODUCTS):
            later = (i + 1) % PRODUCTS * K
            next_a = _window(src, top_M, left_M, later, H, W, C, CP, SIDE, K)
            next_b = _weights(weights, later, ALL, K, N)
            total = _product(a, b, total, PRECISION)
            a, b = next_a, next_b
    else:
        for i in range(PRODUCTS):
            a = _window(src, top_M, left_M, i * K, H, W, C, CP, SIDE, K)
            total = _product(a, _weights(weights, i * K, ALL, K, N), total, PRECISION)
    if REST > 0:
        a = _window(src, top_M, left_M, PRODUCTS * K, H, W, C, CP, SIDE, REST)
        total = _product(a, _weights(weights, PRODUCTS * K, ALL, REST, N), total, PRECISION)
    return total


@triton.jit
def _patches(tile: tl.tensor, W: tl.constexpr, PATCH: tl.constexpr, M: tl.constexpr) -> tl.tensor:
    """Return y and x, each (M,), of the first pixel of each patch of a tile; behind the last patch, y is at least H."""
    across: tl.constexpr = (W + PATCH - 1) // PATCH
    number = tile * M + tl.arange(0, M)
    return number // across * PATCH, number % across * PATCH


@triton.jit
def _pixels(
    y_M: tl.tensor,
    x_M: tl.tensor,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    PATCH: tl.constexpr,
) -> tl.tensor:
    """Return where in features (H, W, C) the results (M, N) of patches stand, and which of them exist."""
    n = tl.arange(0, PATCH * PATCH * CP)
    down, right, c = n // CP // PATCH, n // CP % PATCH, n % CP
    inside = (y_M[:, None] + down[None, :] < H) & (x_M[:, None] + right[None, :] < W)
    if C < CP:
        inside = inside & (c < C)[None, :]
    return ((y_M * W + x_M) * C)[:, None] + ((down * W + right) * C + c)[None, :], inside


@triton.jit
def _relu(x: tl.tensor) -> tl.tensor:
    """Return the larger of x and 0, and NaN for NaN, as torch does."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


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
        products = _convolve(src, weights, y_M * STRIDE, x_M * STRIDE, H, W, C, CP, N, 1, M, MOST, False, PRECISION)
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
    STAGE: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Run a stage's first block, which changes the shape, on features src, and write what it gives to dst."""
    H: tl.constexpr = STAGE[0]
    W: tl.constexpr = STAGE[1]
    C: tl.constexpr = STAGE[2]
    CP: tl.constexpr = STAGE[3]
    H_IN: tl.constexpr = STAGE[4]
    W_IN: tl.constexpr = STAGE[5]
    C_IN: tl.constexpr = STAGE[6]
    CP_IN: tl.constexpr = STAGE[7]
    S: tl.constexpr = STAGE[8]
    KIND: tl.constexpr = STAGE[9]
    SHIFT: tl.constexpr = STAGE[10]
    M: tl.constexpr = STAGE[21]
    K: tl.constexpr = STAGE[22]
    AHEAD: tl.constexpr = STAGE[23]
    TILES: tl.constexpr = (H * W + M - 1) // M
    second = weights + 9 * CP_IN * CP
    third = second + 9 * CP * CP
    c = tl.arange(0, CP)
    if kept:
        for tile in range(TILES):
            y, x = _patches(tile, W, 1, M)
            sums = _convolve(
                src, weights, y * S - 1, x * S - 1, H_IN, W_IN, C_IN, CP_IN, CP, 3, M, K, AHEAD, PRECISION
            )
            at, inside = _pixels(y, x, H, W, C, CP, 1)
            tl.store(mid + at, _relu(sums + tl.load(bias + c)[None, :]).to(mid.dtype.element_ty), mask=inside)
        tl.debug_barrier()  # the second convolution reads what other threads wrote
        for tile in range(TILES):
            y, x = _patches(tile, W, 1, M)
            sums = _convolve(mid, second, y - 1, x - 1, H, W, C, CP, CP, 3, M, K, AHEAD, PRECISION)
            sums += tl.load(bias + CP + c)[None, :]
            sums += _shortcut(
                src, third, bias + 2 * CP, y, x, KIND, SHIFT, S, H_IN, W_IN, C_IN, CP_IN, CP, M, K, PRECISION
            )
            at, inside = _pixels(y, x, H, W, C, CP, 1)
            tl.store(dst + at, _relu(sums).to(dst.dtype.element_ty), mask=inside)
    else:
        for tile in range(TILES):
            y, x = _patches(tile, W, 1, M)
            sums = _shortcut(
                src, third, bias + 2 * CP, y, x, KIND, SHIFT, S, H_IN, W_IN, C_IN, CP_IN, CP, M, K, PRECISION
            )
            at, inside = _pixels(y, x, H, W, C, CP, 1)
            tl.store(dst + at, sums.to(dst.dtype.element_ty), mask=inside)
    tl.debug_barrier()


@triton.jit
def _run_block(x: tl.tensor, mid: tl.tensor, weights: tl.tensor, bias: tl.tensor, STAGE: tl.constexpr, PRECISION: tl.constexpr) -> None:
    """Run a kept block that has the identity as its shortcut, in place on features x; mid is scratch memory."""
    H: tl.constexpr = STAGE[0]
    W: tl.constexpr = STAGE[1]
    C: tl.constexpr = STAGE[2]
    CP: tl.constexpr = STAGE[3]
    M: tl.constexpr = STAGE[19]
    PATCH: tl.constexpr = STAGE[20]
    K: tl.constexpr = STAGE[22]
    AHEAD: tl.constexpr = STAGE[23]
    SIDE: tl.constexpr = PATCH + 2
    N: tl.constexpr = PATCH * PATCH * CP
    TILES: tl.constexpr = (((H + PATCH - 1) // PATCH) * ((W + PATCH - 1) // PATCH) + M - 1) // M
    second = weights + SIDE * SIDE * CP * N
    c = tl.arange(0, N) % CP
    for tile in range(TILES):
        top, left = _patches(tile, W, PATCH, M)
        sums = _convolve(x, weights, top - 1, left - 1, H, W, C, CP, N, SIDE, M, K, AHEAD, PRECISION)
        at, inside = _pixels(top, left, H, W, C, CP, PATCH)
        tl.store(mid + at, _relu(sums + tl.load(bias + c)[None, :]).to(mid.dtype.element_ty), mask=inside)
    tl.debug_barrier()  # the second convolution reads what other threads wrote
    for tile in range(TILES):
        top, left = _patches(tile, W, PATCH, M)
        sums = _convolve(mid, second, top - 1, left - 1, H, W, C, CP, N, SIDE, M, K, AHEAD, PRECISION)
        at, inside = _pixels(top, left, H, W, C, CP, PATCH)
        sums += tl.load(bias + CP + c)[None, :]
        sums += tl.load(x + at, mask=inside, other=0.0)
        tl.store(x + at, _relu(sums).to(x.dtype.element_ty), mask=inside)
    tl.debug_barrier()


@triton.jit
def _stem(images: tl.tensor, dst: tl.tensor, weights: tl.tensor, bias: tl.tensor, STEM: tl.constexpr, PRECISION: tl.constexpr) -> None:
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
        y_M, x_M = _patches(tile, W, 1, M)
        y, x = y_M[:, None] + down[None, :], x_M[:, None] + right[None, :]
        inside = (y >= 0) & (y < H) & (x >= 0) & (x < W) & (k < 27)[None, :]
        pixels = tl.load(images + channel[None, :] * (H * W) + y * W + x, mask=inside, other=0).to(tl.float32)
        pixels = tl.where(inside, pixels * scale[None, :] + shift[None, :], 0.0).to(dtype)
        sums = _product(pixels, _weights(weights, 0, 32, 32, CP), tl.zeros((M, CP), dtype=tl.float32), PRECISION)
        at, exists = _pixels(y_M, x_M, H, W, C, CP, 1)
        tl.store(dst + at, _relu(sums + tl.load(bias + c)[None, :]).to(dtype), mask=exists)
    tl.debug_barrier()


@triton.jit
def _head(src: tl.tensor, out: tl.tensor, weights: tl.tensor, bias: tl.tensor, HEAD: tl.constexpr, PRECISION: tl.constexpr) -> None:
    """Average features src (H, W, C) over pixels and write the linear layer's logits.

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
        total = _product(tl.full((16, 16), 1.0, tl.float32).to(dtype), x, total, EXACT)
    mean = (total / PIXELS).to(dtype)
    for first in range(0, CLASSES, 16):
        logits = tl.zeros((16, 16), dtype=tl.float32) + tl.load(bias + first + i)[None, :]
        logits = _product(mean, _weights(weights + first * CP, 0, CP, CP, 16), logits, EXACT)
        once = (i == 0)[:, None] & (first + i < CLASSES)[None, :]
        tl.store(out + i[:, None] + (first + i)[None, :], logits.to(dtype), mask=once)


@triton.jit(do_not_specialize=["images", "keep_row", "keep_block", "first", "last"])
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
    STEM: tl.constexpr,
    STAGES: tl.constexpr,
    HEAD: tl.constexpr,
    SPACE: tl.constexpr,
    X_ROW: tl.constexpr,
    OUT_ROW: tl.constexpr,
    ORDERED: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Run blocks first … last - 1, those of them that are kept, on one image under one decision.

    Args:
        x: features (R, H, W, C), overwritten; or, with a stem, images (B, 3, H, W), uint8 or float32, of which row r
            reads number r modulo ``images``, B.
        out: features after the blocks; or, with a head, logits (R, CLASSES).
        scratch: memory of SPACE elements a row.
        keep: uint8, row r and block k at ``r * keep_row + (k - first) * keep_block``; not 0 where the block runs.
        order: int32 (R,), which row each program computes, if ORDERED.
        weights, bias: as ``StageNetwork`` packs them.
        STEM, STAGES, HEAD: which parts of the network run, each as the tuple that ``stage_plan.py`` describes.
    """
    row = tl.program_id(0).to(tl.int64)
    if ORDERED:
        row = tl.load(order + row).to(tl.int64)
    own = scratch + row * SPACE
    keep += row * keep_row
    if len(STEM) > 0:
        if STEM[7] < 0:
            current = out + row * OUT_ROW
        else:
            current = own + STEM[7]
        _stem(x + row % images * X_ROW, current, weights + STEM[4], bias + STEM[5], STEM, PRECISION)
    else:
        current = x + row * X_ROW
    for i in tl.static_range(len(STAGES)):
        start = STAGES[i][11]
        if STAGES[i][9] != "":
            if STAGES[i][24] < 0:
                changed = out + row * OUT_ROW
            else:
                changed = own + STAGES[i][24]
            kept = tl.load(keep + (start - 1 - first) * keep_block) != 0
            _change_shape(
                current, changed, own, kept, weights + STAGES[i][17], bias + STAGES[i][18], STAGES[i], PRECISION
            )
            current = changed
        for k in range(tl.maximum(first, start), tl.minimum(last, start + STAGES[i][12])):
            if tl.load(keep + (k - first) * keep_block) != 0:
                own_weights = weights + STAGES[i][13] + (k - start) * STAGES[i][14]
                own_bias = bias + STAGES[i][15] + (k - start) * STAGES[i][16]
                _run_block(current, own, own_weights, own_bias, STAGES[i], PRECISION)
    if len(HEAD) > 0:
        _head(current, out + row * OUT_ROW, weights + HEAD[4], bias + HEAD[5], HEAD, PRECISION)


@triton.jit
def _costs(keep: tl.tensor, costs: tl.tensor, row_N: tl.tensor, rows: tl.tensor, keep_row: tl.tensor, keep_block: tl.tensor, blocks: tl.tensor) -> tl.tensor:
    """Sum up the costs of the blocks that rows keep, int32 (N,)."""
    total = row_N * 0
    for start in range(0, blocks, 64):
        k = start + tl.arange(0, 64)
        at = row_N.to(tl.int64)[:, None] * keep_row + k[None, :] * keep_block
        kept = tl.load(keep + at, mask=(row_N < rows)[:, None] & (k < blocks)[None, :], other=0) != 0
        total += tl.sum(tl.where(kept, tl.load(costs + k, mask=k < blocks, other=0)[None, :], 0), 1)
    return total


@triton.jit(do_not_specialize=["rows", "keep_row", "keep_block", "blocks", "together", "turns"])
def longest_first(
    order: tl.tensor,
    keep: tl.tensor,
    costs: tl.tensor,
    rows: tl.tensor,
    keep_row: tl.tensor,
    keep_block: tl.tensor,
    blocks: tl.tensor,
    together: tl.tensor,
    turns: tl.tensor,
    MINE: tl.constexpr,
    OTHERS: tl.constexpr,
) -> None:
    """Write the rows in the order in which programs compute them, the costliest first: int32 order (rows,).

    A multiprocessor that is free takes the next row, so that all end at about the same time. Where a multiprocessor
    runs several programs at once, its second one begins with the first: then every other group of ``together`` rows
    of the first ``turns`` groups is turned round, and the costliest row shares with the cheapest.

    Args:
        keep: uint8 (rows, blocks) with these strides.
        costs: int32 (blocks,).
    """
    mine = tl.program_id(0) * MINE + tl.arange(0, MINE)
    cost = _costs(keep, costs, mine, rows, keep_row, keep_block, blocks)
    rank = mine * 0
    for start in range(0, rows, OTHERS):
        other = start + tl.arange(0, OTHERS)
        theirs = _costs(keep, costs, other, rows, keep_row, keep_block, blocks)
        same = (theirs[None, :] == cost[:, None]) & (other[None, :] < mine[:, None])
        before = ((theirs[None, :] > cost[:, None]) | same) & (other < rows)[None, :]
        rank += tl.sum(before.to(tl.int32), 1)
    group = rank // together
    size = tl.minimum(together, rows - group * together)
    turned = group * together + size - 1 - rank % together
    at = tl.where((group % 2 == 1) & (group < turns), turned, rank)
    tl.store(order + at, mine, mask=mine < rows)
