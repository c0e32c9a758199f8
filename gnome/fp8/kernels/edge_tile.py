"""What the forward and backward kernels of the edge block do with a tile of edges.

Two ways to feed the tensor cores, a compile-time choice:

- STAGED: both operands of a product come from memory in slices, copied ahead by the pipeliner.  What the program itself
  computed goes through memory that the L2 cache still holds.  Little shared memory, so that a multiprocessor works on two
  tiles, one multiplying while the other computes or waits.
- whole: the left operand stays where it was computed and the weight is read at once, into 64 KB (FP8) or 128 KB (BF16) at width
  256.

In FP8 the left operands are E4M3 with a power-of-two scale a row, taken from the row's own largest magnitude; weights have one
scale each. The inner length is at most 256, so that the tensor core's own accumulation (about 14 bits) is exact enough beside
E4M3's 4.
"""

# ruff: noqa: N803, PLR0913, PLR0917 - Triton kernels: many pointers, capitals for compile-time sizes
# mypy: disable-error-code="import-not-found, no-untyped-def, untyped-decorator"
import triton
import triton.language as tl

from gnome.fp8.kernels.numerics import E4M3_MAX, inverse, scale_for

RUNS = tl.constexpr(16)


@triton.jit
def quantized_rows(x):
    """Return E4M3 rows (B, D) and what they are to be multiplied by (B), FP32.

    Nothing is clamped: by the choice of scale no finite number is beyond 448, and the GPU's conversion saturates.  NaN stays in
    the payload; a row with an infinity, which would vanish by saturating, gets NaN for its inverse scale.
    """
    amax = tl.max(tl.abs(x), axis=1)
    scale = scale_for(amax, E4M3_MAX, 1.0)
    payload = (x * scale[:, None]).to(tl.float8e4nv)
    return payload, tl.where(amax < float("inf"), inverse(scale), float("nan"))


@triton.jit
def load_rows(start, place, valid, D: tl.constexpr):
    """Load a tile of rows (B, D); rows past the end are zero."""
    return tl.load(start + place[:, None] * D + tl.arange(0, D)[None, :], mask=valid[:, None], other=0.0)


@triton.jit
def store_rows(start, values, place, valid, D: tl.constexpr, STRIDE: tl.constexpr):
    """Store a tile of rows (B, D) at distances of STRIDE, none past the end."""
    tl.store(start + place[:, None] * STRIDE + tl.arange(0, D)[None, :], values, mask=valid[:, None])


@triton.jit
def gather_rows(table, index, place, valid, D: tl.constexpr):
    """Load the rows of a table that an index (B) names."""
    row = tl.load(index + place, mask=valid, other=0).to(tl.int64)
    return tl.load(table + row[:, None] * D + tl.arange(0, D)[None, :], mask=valid[:, None], other=0.0)


@triton.jit
def weight_tile(weight, D: tl.constexpr):
    """Load a weight (out, in) as a right operand (in, out)."""
    return tl.load(weight + tl.arange(0, D)[:, None] + tl.arange(0, D)[None, :] * D)


@triton.jit
def staged_product(
    rows, weight, valid, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, STRIDE: tl.constexpr
):
    """Multiply rows in memory, at distances of STRIDE, by a weight (out, in); returns (B, D), FP32."""
    place = tl.arange(0, BLOCK)
    product = tl.zeros((BLOCK, D), tl.float32)
    for first in tl.range(0, D, BLOCK_K, num_stages=STAGES):
        inner = first + tl.arange(0, BLOCK_K)
        left = tl.load(rows + place[:, None] * STRIDE + inner[None, :], mask=valid[:, None], other=0.0)
        right = tl.load(weight + inner[:, None] + tl.arange(0, D)[None, :] * D)
        product = tl.dot(left, right, product)
    return product


@triton.jit
def stored_product(
    left, rows, weight, valid,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, STAGED: tl.constexpr,
):  # fmt: skip
    """Multiply the tile `left`, which this program has just stored at `rows`, by a weight (out, in); returns (B, D), FP32."""
    if STAGED:
        tl.debug_barrier()  # every thread's part is stored
        return staged_product(rows, weight, valid, D, BLOCK, BLOCK_K, STAGES, D)
    return tl.dot(left, weight_tile(weight, D))


@triton.jit
def sigmoid(z, APPROXIMATE: tl.constexpr):
    """Return the logistic function; APPROXIMATE by the GPU's tanh (error 2**-11, BF16's is 2**-9), 3 instructions for 16."""
    if APPROXIMATE:
        half = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [0.5 * z], dtype=tl.float32, is_pure=True, pack=1)
        return 0.5 * half + 0.5
    return tl.sigmoid(z)


@triton.jit
def normalized(z, eps, D: tl.constexpr):
    """Return rows (B, D) less their mean and over their standard deviation, and the inverse standard deviations (B)."""
    centred = z - (tl.sum(z, 1) * (1.0 / D))[:, None]
    inverse_deviation = tl.rsqrt(tl.sum(centred * centred, 1) * (1.0 / D) + eps)
    return centred * inverse_deviation[:, None], inverse_deviation


@triton.jit
def hidden_terms(projected_senders, projected_receivers, senders, receivers, place, valid, D: tl.constexpr):
    """Return what both ends of each edge add to the hidden layer (B, D), rounded once to the projections' type."""
    from_sender = gather_rows(projected_senders, senders, place, valid, D)
    from_receiver = gather_rows(projected_receivers, receivers, place, valid, D)
    return (from_sender.to(tl.float32) + from_receiver.to(tl.float32)).to(from_sender.dtype)


@triton.jit
def add_runs(values, receivers, place, valid, sums, D: tl.constexpr):
    """Add the rows (B, D) of each run of equal receivers, and the result to `sums` (N, D) FP32.

    By products with a matrix of zeros and ones: memory sees an atomic addition a run and not one an edge.  A node that lies in
    no more than two tiles gets the same bits every time, since a sum of two does not depend on their order.
    """
    node = tl.load(receivers + place, mask=valid, other=0)
    previous = tl.load(receivers + place - 1, mask=valid & (place > 0), other=0)
    run = tl.cumsum(((place > 0) & (node != previous)).to(tl.int32), 0)
    n_runs = tl.max(tl.where(valid, run, -1), 0) + 1
    for first in range(0, n_runs, RUNS):
        wanted = first + tl.arange(0, RUNS)
        belongs = (run[:, None] == wanted[None, :]) & valid[:, None]
        of_runs = tl.dot(tl.trans(values), tl.where(belongs, 1.0, 0.0).to(values.dtype))
        row = tl.max(tl.where(belongs, node[:, None], 0), 0).to(tl.int64)
        tl.atomic_add(sums + row[None, :] * D + tl.arange(0, D)[:, None], of_runs, mask=(wanted < n_runs)[None, :], sem="relaxed")
