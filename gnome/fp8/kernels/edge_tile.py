"""What the edge block's kernels share: a persistent program that multiplies tile after tile of edges by one weight.

The weight lies in shared memory for as long as the program runs, 64 KB (FP8) or 128 KB (BF16) at width 256.  All that a tile needs
is asked for one tile ahead (AHEAD), or else at the tile's beginning, while another program of the multiprocessor works.

In FP8 the rows are E4M3 with a power-of-two scale a row, taken from the row's own largest magnitude; weights have one scale
each.  The inner length is at most 256, so that the tensor core's own accumulation (about 14 bits) is exact enough beside E4M3's
4.  No tile of FP8 is transposed in registers: Triton 3.6 does that wrongly for some layouts.
"""

# mypy: disable-error-code="import-not-found, no-untyped-def, untyped-decorator"
import triton
import triton.language as tl

from gnome.fp8.kernels.numerics import E4M3_MAX, inverse, scale_for


@triton.jit
def scales_of_rows(x, inverse_row_scale, place, valid):
    """Return the scales (B) of rows (B, D) and store their inverses.

    Nothing needs clamping: by the choice of scale no finite number is beyond 448, and the GPU's conversion saturates.  NaN stays in
    the payload; a row with an infinity, which would vanish by saturating, gets NaN for its inverse scale.
    """
    amax = tl.max(tl.abs(x), axis=1)
    scale = scale_for(amax, E4M3_MAX, 1.0)
    inverse_scale = tl.where(amax < float("inf"), inverse(scale), float("nan"))
    tl.store(inverse_row_scale + place, inverse_scale, mask=valid)
    return scale, inverse_scale


@triton.jit
def inside(place, start, n_edges, BLOCK: tl.constexpr):
    """Return which rows (B) of the tile at `start` (int64) are edges."""
    return place < tl.minimum(n_edges - start, BLOCK).to(tl.int32)


@triton.jit
def load_rows(start, place, valid, D: tl.constexpr):
    """Load a tile of rows (B, D); rows past the end are zero."""
    return tl.load(start + place[:, None] * D + tl.arange(0, D)[None, :], mask=valid[:, None], other=0.0)


@triton.jit
def load_operand(rows, inverse_row_scale, start, place, valid, D: tl.constexpr, SCALED: tl.constexpr):
    """Load a tile of rows (B, D) as products take them, and their inverse scales (B) or a 1 (1)."""
    scale = tl.full((1,), 1.0, tl.float32)
    if SCALED:
        scale = tl.load(inverse_row_scale + start + place, mask=valid, other=0.0)
    return load_rows(rows + start * D, place, valid, D), scale


@triton.jit
def store_rows(start, values, place, valid, D: tl.constexpr):
    """Store a tile of rows (B, D), none past the end."""
    tl.store(start + place[:, None] * D + tl.arange(0, D)[None, :], values, mask=valid[:, None])


@triton.jit
def keep_rows(x, scale, rows, place, valid, D: tl.constexpr, FP8: tl.constexpr):
    """Store FP32 rows (B, D) as the products take them: BF16, or E4M3 times their scales (B)."""
    if FP8:
        store_rows(rows, (x * scale[:, None]).to(tl.float8e4nv), place, valid, D)
    else:
        store_rows(rows, x.to(tl.bfloat16), place, valid, D)


@triton.jit
def gather_rows(table, node, valid, D: tl.constexpr):
    """Load the nodes' rows of a table (N, D)."""
    return tl.load(table + node.to(tl.int64)[:, None] * D + tl.arange(0, D)[None, :], mask=valid[:, None], other=0.0)


@triton.jit
def nodes_of(index, start, place, valid):
    """Load the nodes (B) of a tile's edges."""
    return tl.load(index + start + place, mask=valid, other=0)


@triton.jit
def sum_of(one, other):
    """Add two tiles of narrow rows, rounded once."""
    return (one.to(tl.float32) + other.to(tl.float32)).to(one.dtype)


@triton.jit
def passed_gradient(grad_edges, grad_received, receivers, start, place, valid, D: tl.constexpr):
    """Load the gradient (B, D) that new edges get of their own and from their receivers, BF16."""
    of_nodes = gather_rows(grad_received, nodes_of(receivers, start, place, valid), valid, D)
    return sum_of(load_rows(grad_edges + start * D, place, valid, D), of_nodes)


@triton.jit
def weight_tile(weight, D: tl.constexpr):
    """Load a weight (out, in) as a right operand (in, out)."""
    return tl.load(weight + tl.arange(0, D)[:, None] + tl.arange(0, D)[None, :] * D)


@triton.jit
def unscaled(product, inverse_row_scale, inverse_scale, FP8: tl.constexpr):
    """Undo both scales of a product (B, D), FP32.

    BF16's scale of 1 costs nothing where something is added next, and keeps Triton from making that the product's first
    summand, for which the product would wait.
    """
    if FP8:
        return product * (inverse_row_scale * inverse_scale)[:, None]
    return product * inverse_scale


@triton.jit
def sigmoid(z, APPROXIMATE: tl.constexpr):
    """Return the logistic function; APPROXIMATE by the GPU's tanh (error 2**-11, BF16's is 2**-9), 3 instructions for 16."""
    if APPROXIMATE:
        half = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [0.5 * z], dtype=tl.float32, is_pure=True, pack=1)
        return 0.5 * half + 0.5
    return tl.sigmoid(z)


@triton.jit
def inverse_deviations(z, eps, D: tl.constexpr):
    """Return one over the standard deviations (B) of rows (B, D) whose mean is zero."""
    return tl.rsqrt(tl.sum(z * z, 1) * (1.0 / D) + eps)
