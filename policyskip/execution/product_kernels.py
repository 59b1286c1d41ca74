"""Triton functions that compute convolutions as products of matrices, for kernels in which a program has one image.

A row of a product is a patch of PATCH × PATCH neighbouring output pixels, and its entries are the SIDE × SIDE input
pixels that the patch depends on. With PATCH = 2, the weights of input pixels that an output pixel does not depend on
are zeros: 16 input pixels a patch in place of 4 · 9 = 36, and four times as many columns. This pays for 16 channels,
where moving input pixels to the processor takes longer than the product.

Shapes: H W pixels, C channels (CP: padded to a power of two), M patches a tile, K entries of a product,
N = PATCH² · CP results a patch. Features are (H, W, C), without padding.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_windows(
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
    LIMIT: tl.constexpr,
) -> tl.tensor:
    """Load entries first … first + K - 1 of the windows of SIDE × SIDE pixels at (top, left), (M, K).

    Pixels outside of the image are 0, and so are entries from LIMIT on, if that is not 0.
    """
    k = first + tl.arange(0, K)
    down, right, c = k // CP // SIDE, k // CP % SIDE, k % CP
    y, x = top_M[:, None] + down[None, :], left_M[:, None] + right[None, :]
    inside = (y >= 0) & (y < H) & (x >= 0) & (x < W)
    if C < CP:
        inside = inside & (c < C)[None, :]
    if LIMIT > 0:
        inside = inside & (k < LIMIT)[None, :]
    at = ((top_M * W + left_M) * C)[:, None] + ((down * W + right) * C + c)[None, :]
    return tl.load(src + at, mask=inside, other=0.0)


@triton.jit
def add_product(a: tl.tensor, b: tl.tensor, total: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """Add the product of a (M, K) and b (K, N) to float32 sums (M, N).

    PRECISION: "tf32" or "ieee" for float32. "widened": Triton's interpreter cannot multiply bfloat16.
    """
    if PRECISION == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def load_weights(
    weights: tl.tensor,
    first: tl.tensor,
    ALL: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    LIMIT: tl.constexpr,
) -> tl.tensor:
    """Load entries first … first + K - 1 of weights (N, ALL), as (K, N); 0 from LIMIT on, if that is not 0."""
    k = first + tl.arange(0, K)[:, None]
    at = weights + k + tl.arange(0, N)[None, :] * ALL
    if LIMIT > 0:
        return tl.load(at, mask=k + tl.zeros((1, N), dtype=tl.int32) < LIMIT, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def convolve(
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
    """Compute a convolution as a sum of products of at most MOST entries, float32 (M, N), with weights (N, SIDE² · CP).

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
        a = load_windows(src, top_M, left_M, 0, H, W, C, CP, SIDE, K, 0)
        b = load_weights(weights, 0, ALL, K, N, 0)
        for i in range(PRODUCTS):
            later = (i + 1) * K  # in the last round, nothing is loaded
            next_a = load_windows(src, top_M, left_M, later, H, W, C, CP, SIDE, K, PRODUCTS * K)
            next_b = load_weights(weights, later, ALL, K, N, PRODUCTS * K)
            total = add_product(a, b, total, PRECISION)
            a, b = next_a, next_b
    else:
        for i in range(PRODUCTS):
            a = load_windows(src, top_M, left_M, i * K, H, W, C, CP, SIDE, K, 0)
            total = add_product(a, load_weights(weights, i * K, ALL, K, N, 0), total, PRECISION)
    if REST > 0:
        a = load_windows(src, top_M, left_M, PRODUCTS * K, H, W, C, CP, SIDE, REST, 0)
        total = add_product(a, load_weights(weights, PRODUCTS * K, ALL, REST, N, 0), total, PRECISION)
    return total


@triton.jit
def patches(tile: tl.tensor, W: tl.constexpr, PATCH: tl.constexpr, M: tl.constexpr) -> tl.tensor:
    """Return y and x, each (M,), of the first pixel of each patch of a tile; behind the last patch, y is at least H."""
    across: tl.constexpr = (W + PATCH - 1) // PATCH
    number = tile * M + tl.arange(0, M)
    return number // across * PATCH, number % across * PATCH


@triton.jit
def pixels(
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
def relu(x: tl.tensor) -> tl.tensor:
    """Return the larger of x and 0, and NaN for NaN, as torch does."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
