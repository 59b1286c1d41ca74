"""Triton kernels that convolve the features of those images that keep a block, a tile of the output a program.

Features lie channels last, so that a convolution is a product of matrices whose rows are output pixels. The pixels of
the kept images are counted through, from the first image to the last, and a tile is a run of them: it may end in
another image than it begins in, and no place of it is wasted on images that drop the block. How many images keep it
is read on the device. The grid is made for all images: programs that have nothing to do return at once.

A step of a product goes over one place of the filter (a tap) and BLOCK_K input channels. The steps have one order,
whatever else is in the tile, so an image's result does not depend on the others.

Shapes: B images, M output pixels of a tile, N output channels of a tile, K input channels of a step.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["images", "image_stride", "block_stride"])
def list_images(keep, rows, counts, images, image_stride, block_stride, LENGTH: tl.constexpr):
    """List, for one block a program, the images that keep it and behind them those that drop it, each in order.

    Args:
        keep: uint8 (B, blocks), of any strides.
        rows: int32 (blocks, B), written: the images.
        counts: int32 (blocks,), written: how many keep the block.
    """
    block = tl.program_id(0)
    place = tl.arange(0, LENGTH)
    keep += block * block_stride
    kept = tl.zeros((LENGTH,), dtype=tl.int32)
    for start in range(0, images, LENGTH):
        kept += tl.load(keep + (start + place) * image_stride, mask=start + place < images, other=0).to(tl.int32)
    count = tl.sum(kept, 0)
    tl.store(counts + block, count)
    rows += block * images
    before = 0
    for start in range(0, images, LENGTH):
        image = start + place
        kept = tl.load(keep + image * image_stride, mask=image < images, other=0).to(tl.int32)
        rank = before + tl.cumsum(kept, 0) - kept
        tl.store(rows + tl.where(kept != 0, rank, count + image - rank), image, mask=image < images)
        before += tl.sum(kept, 0)


@triton.jit
def normalise(
    images, mean, std, out, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, MOST: tl.constexpr, LENGTH: tl.constexpr
):
    """Normalise images and put them channels last, in one pass over them; a program does a part of one image.

    Args:
        images: (B, CHANNELS, H, W), of values from 0 to MOST.
        mean, std: (CHANNELS,).
        out: (B, H, W, CHANNELS), written.
    """
    NUMBERS: tl.constexpr = CHANNELS * PIXELS
    PARTS: tl.constexpr = (NUMBERS + LENGTH - 1) // LENGTH
    first = (tl.program_id(0) // PARTS).to(tl.int64) * NUMBERS
    place = tl.program_id(0) % PARTS * LENGTH + tl.arange(0, LENGTH)
    inside = place < NUMBERS
    channel = place % CHANNELS
    value = tl.load(images + first + (channel * PIXELS + place // CHANNELS), mask=inside, other=0).to(tl.float32)
    value = (value / MOST - tl.load(mean + channel).to(tl.float32)) / tl.load(std + channel).to(tl.float32)
    tl.store(out + first + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["pixels"])
def pool(
    x, bias, out, pixels,
    H: tl.constexpr, W: tl.constexpr, CHANNELS: tl.constexpr, OUT_H: tl.constexpr, OUT_W: tl.constexpr,
    SIZE_Y: tl.constexpr, SIZE_X: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    PAD_Y: tl.constexpr, PAD_X: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Take the largest of each window of pixels, and then add the bias and clip at zero.

    The order changes nothing, because both keep the order of numbers; and so there are fewer numbers to do it to.

    Args:
        x: features (B, H, W, CHANNELS), before their bias.
        bias: (CHANNELS,).
        out: features (B, OUT_H, OUT_W, CHANNELS), written.
        pixels: of it, in all images.
    """
    place_M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    y_M = place_M // OUT_W % OUT_H * STRIDE_Y - PAD_Y
    x_M = place_M % OUT_W * STRIDE_X - PAD_X
    corner_M = (place_M // (OUT_H * OUT_W)).to(tl.int64) * (H * W) + (y_M * W + x_M)  # outside of x at its edges
    x_MN = x + (corner_M * CHANNELS)[:, None] + channel_N[None, :]
    inside_N = channel_N < CHANNELS
    largest_MN = tl.full((BLOCK_M, BLOCK_N), float("-inf"), dtype=tl.float32)
    for place in tl.static_range(SIZE_Y * SIZE_X):
        down, right = place // SIZE_X, place % SIZE_X
        inside_M = (place_M < pixels) & (y_M + down >= 0) & (y_M + down < H) & (x_M + right >= 0) & (x_M + right < W)
        inside_MN = inside_M[:, None] & inside_N[None, :]
        value_MN = tl.load(x_MN + (down * W + right) * CHANNELS, mask=inside_MN, other=float("-inf")).to(tl.float32)
        largest_MN = tl.maximum(largest_MN, value_MN, propagate_nan=tl.PropagateNan.ALL)
    largest_MN += tl.load(bias + channel_N, mask=inside_N, other=0.0).to(tl.float32)[None, :]
    largest_MN = tl.maximum(largest_MN, 0.0, propagate_nan=tl.PropagateNan.ALL)
    out_MN = out + (place_M.to(tl.int64) * CHANNELS)[:, None] + channel_N[None, :]
    tl.store(out_MN, largest_MN.to(out.dtype.element_ty), mask=(place_M < pixels)[:, None] & inside_N[None, :])


@triton.jit
def add_products(
    sum_MN, x, weights, row_M, pixel_M, live_M, channel_N, steps,
    H: tl.constexpr, W: tl.constexpr, CHANNELS: tl.constexpr, OUT_W: tl.constexpr,
    TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr, PAD_Y: tl.constexpr,
    PAD_X: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add the products of a convolution of x to a tile of sums, which begin with the bias.

    Args:
        x: features (B, H, W, CHANNELS).
        weights: (output channels, steps · BLOCK_K), in the order of the steps; see ``tile_network.packed``.
        row_M, pixel_M: the row of x, and the output pixel in it, of each place of the tile.
        live_M: whether the place has a pixel at all; nothing is read for one that has none.
        channel_N: the output channels.
        steps: of the product. The compiler knows it as well, but is not told where it would unroll them until registers
            run out; it does not unroll very many.
    """
    TAPS: tl.constexpr = TAPS_Y * TAPS_X
    STEPS: tl.constexpr = (CHANNELS + BLOCK_K - 1) // BLOCK_K * TAPS
    y_M = pixel_M // OUT_W * STRIDE_Y - PAD_Y
    x_M = pixel_M % OUT_W * STRIDE_X - PAD_X
    k_K = tl.arange(0, BLOCK_K)
    # The corner that a place's filter begins at may lie outside of x: it is moved before anything is read.
    x_MK = x + ((row_M.to(tl.int64) * (H * W) + (y_M * W + x_M)) * CHANNELS)[:, None] + k_K[None, :]
    weights_KN = weights + (channel_N * (STEPS * BLOCK_K))[None, :] + k_K[:, None]
    for step in range(STEPS if STEPS <= 9 or STEPS > 32 else steps):
        first = step // TAPS * BLOCK_K
        tap_y = step % TAPS // TAPS_X
        tap_x = step % TAPS % TAPS_X
        inside_M = live_M
        if PAD_Y > 0:
            inside_M = inside_M & (y_M + tap_y >= 0) & (y_M + tap_y < H)
        if PAD_X > 0:
            inside_M = inside_M & (x_M + tap_x >= 0) & (x_M + tap_x < W)
        inside_MK = inside_M[:, None]
        if CHANNELS % BLOCK_K != 0:
            inside_MK = inside_MK & (first + k_K < CHANNELS)[None, :]
        a_MK = tl.load(x_MK + ((tap_y * W + tap_x) * CHANNELS + first), mask=inside_MK, other=0.0)
        b_KN = tl.load(weights_KN + step * BLOCK_K)
        if UPCAST:
            a_MK, b_KN = a_MK.to(tl.float32), b_KN.to(tl.float32)
        sum_MN = tl.dot(a_MK, b_KN, sum_MN, input_precision=PRECISION)
    return sum_MN


@triton.jit(do_not_specialize=["block", "images", "steps"])
def convolve(
    x, weights, bias, out, rows, counts, block, images, steps,
    H: tl.constexpr, W: tl.constexpr, CHANNELS: tl.constexpr,
    OUT_H: tl.constexpr, OUT_W: tl.constexpr, OUT_CHANNELS: tl.constexpr,
    TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr, PAD_Y: tl.constexpr,
    PAD_X: tl.constexpr,
    IS_FIRST: tl.constexpr, IS_LAST: tl.constexpr, RELU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Run one convolution of a block's branch for the images that keep the block, one tile a program.

    Between the first and the last convolution, the features of the kept images lie side by side, in the order of
    ``rows``. The last one adds its result to ``out``, which holds the shortcut of all images, in place.

    Args:
        x: features (B, H, W, CHANNELS) of all images if IS_FIRST, else of the kept ones.
        weights, bias: of :func:`add_products`; float32, one for each of its output channels.
        out: features (B, OUT_H, OUT_W, OUT_CHANNELS), of all images if IS_LAST, else of the kept ones.
        rows, counts: of :func:`list_images`.
        block: the block's number in them.
        images: B.
    """
    PIXELS: tl.constexpr = OUT_H * OUT_W
    TILES_N: tl.constexpr = (OUT_CHANNELS + BLOCK_N - 1) // BLOCK_N
    pixels = tl.load(counts + block) * PIXELS
    tile = tl.program_id(0) // TILES_N  # the tiles that read the same pixels run side by side: the cache has them
    if tile * BLOCK_M >= pixels:
        return
    place_M = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    channel_N = tl.program_id(0) % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    live_M = place_M < pixels
    slot_M = place_M // PIXELS
    image_M = slot_M
    if IS_FIRST or IS_LAST:
        image_M = tl.load(rows + block * images + slot_M, mask=live_M, other=0)
    from_M = image_M if IS_FIRST else slot_M
    to_M = image_M if IS_LAST else slot_M
    out_MN = out + ((to_M.to(tl.int64) * PIXELS + place_M % PIXELS) * OUT_CHANNELS)[:, None] + channel_N[None, :]
    inside_MN = live_M[:, None]
    if OUT_CHANNELS % BLOCK_N != 0:
        inside_MN = inside_MN & (channel_N < OUT_CHANNELS)[None, :]
    if IS_LAST:  # begun before the product, so that it is on its way meanwhile
        shortcut_MN = tl.load(out_MN, mask=inside_MN, other=0.0)
    sum_MN = add_products(
        tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32) + tl.load(bias + channel_N)[None, :],
        x, weights, from_M, place_M % PIXELS, live_M, channel_N, steps,
        H, W, CHANNELS, OUT_W, TAPS_Y, TAPS_X, STRIDE_Y, STRIDE_X, PAD_Y, PAD_X, BLOCK_K, PRECISION, UPCAST,
    )  # fmt: skip
    if IS_LAST:
        sum_MN += shortcut_MN.to(tl.float32)
    if RELU:
        sum_MN = tl.maximum(sum_MN, 0.0, propagate_nan=tl.PropagateNan.ALL)  # else NaN would become 0
    tl.store(out_MN, sum_MN.to(out.dtype.element_ty), mask=inside_MN)


@triton.jit(do_not_specialize=["block", "images", "steps", "shortcut_steps"])
def join(
    mid, weights, bias, x, shortcut_weights, shortcut_bias, out, rows, counts, block, images, steps, shortcut_steps,
    H: tl.constexpr, W: tl.constexpr, CHANNELS: tl.constexpr,
    OUT_H: tl.constexpr, OUT_W: tl.constexpr, OUT_CHANNELS: tl.constexpr,
    TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr, PAD_Y: tl.constexpr,
    PAD_X: tl.constexpr,
    SHORTCUT_H: tl.constexpr, SHORTCUT_W: tl.constexpr, SHORTCUT_CHANNELS: tl.constexpr,
    SHORTCUT_TAPS_Y: tl.constexpr, SHORTCUT_TAPS_X: tl.constexpr, SHORTCUT_STRIDE_Y: tl.constexpr,
    SHORTCUT_STRIDE_X: tl.constexpr,
    SHORTCUT_PAD_Y: tl.constexpr, SHORTCUT_PAD_X: tl.constexpr, SHORTCUT_BLOCK_K: tl.constexpr,
    IS_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Run the last convolution of a block's branch and the convolution in its shortcut in one, one tile a program.

    The first tiles are those of the images that keep the block, which get both and the ReLU; behind them come those of
    the other images, which get the shortcut alone. No tile has pixels of both, so the shortcut of an image that drops
    the block never meets the branch.

    Args:
        mid, weights, bias: as ``x``, ``weights`` and ``bias`` of :func:`convolve`; ``mid`` holds the features of the
            kept images, or of all images if IS_FIRST.
        x, shortcut_weights, shortcut_bias: the same of the shortcut; x are the features of all images, (B, SHORTCUT_H,
            SHORTCUT_W, SHORTCUT_CHANNELS).
        out: features (B, OUT_H, OUT_W, OUT_CHANNELS) of all images, written.
        rows, counts: of :func:`list_images`.
        block: the block's number in them.
        images: B.
    """
    PIXELS: tl.constexpr = OUT_H * OUT_W
    TILES_N: tl.constexpr = (OUT_CHANNELS + BLOCK_N - 1) // BLOCK_N
    count = tl.load(counts + block)
    kept_tiles = (count * PIXELS + BLOCK_M - 1) // BLOCK_M
    tile = tl.program_id(0) // TILES_N
    is_kept = tile < kept_tiles
    tile = tl.where(is_kept, tile, tile - kept_tiles)
    pixels = tl.where(is_kept, count, images - count) * PIXELS
    if tile * BLOCK_M >= pixels:
        return
    place_M = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    channel_N = tl.program_id(0) % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    live_M = place_M < pixels
    slot_M = place_M // PIXELS
    first = tl.where(is_kept, 0, count)
    image_M = tl.load(rows + block * images + first + slot_M, mask=live_M, other=0)
    bias_N = tl.load(shortcut_bias + channel_N) + tl.load(bias + channel_N, mask=is_kept, other=0.0)
    sum_MN = add_products(
        tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32) + bias_N[None, :],
        x, shortcut_weights, image_M, place_M % PIXELS, live_M, channel_N, shortcut_steps,
        SHORTCUT_H, SHORTCUT_W, SHORTCUT_CHANNELS, OUT_W, SHORTCUT_TAPS_Y, SHORTCUT_TAPS_X, SHORTCUT_STRIDE_Y,
        SHORTCUT_STRIDE_X, SHORTCUT_PAD_Y, SHORTCUT_PAD_X, SHORTCUT_BLOCK_K, PRECISION, UPCAST,
    )  # fmt: skip
    if is_kept:
        from_M = image_M if IS_FIRST else slot_M
        sum_MN = add_products(
            sum_MN, mid, weights, from_M, place_M % PIXELS, live_M, channel_N, steps,
            H, W, CHANNELS, OUT_W, TAPS_Y, TAPS_X, STRIDE_Y, STRIDE_X, PAD_Y, PAD_X, BLOCK_K, PRECISION, UPCAST,
        )  # fmt: skip
        sum_MN = tl.maximum(sum_MN, 0.0, propagate_nan=tl.PropagateNan.ALL)  # else NaN would become 0
    out_MN = out + ((image_M.to(tl.int64) * PIXELS + place_M % PIXELS) * OUT_CHANNELS)[:, None] + channel_N[None, :]
    inside_MN = live_M[:, None]
    if OUT_CHANNELS % BLOCK_N != 0:
        inside_MN = inside_MN & (channel_N < OUT_CHANNELS)[None, :]
    tl.store(out_MN, sum_MN.to(out.dtype.element_ty), mask=inside_MN)
