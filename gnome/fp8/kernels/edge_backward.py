"""The edge block, backward: recompute a tile from the saved edges, and its gradients down to the edges and the hidden layer.

What the weights' gradients need (activations and both layers' gradients) is written once, BF16 or E4M3 with a scale a row, and
is also what the kernel's own later products read.
"""

# ruff: noqa: N803, N806, PLR0913, PLR0917 - Triton kernels: many pointers, capitals for compile-time sizes
# mypy: disable-error-code="import-not-found, no-untyped-def, untyped-decorator"
import triton
import triton.language as tl

from gnome.fp8.kernels.edge_tile import (
    add_runs,
    gather_rows,
    hidden_terms,
    load_rows,
    normalized,
    quantized_rows,
    sigmoid,
    staged_product,
    store_rows,
)

ROWS = tl.constexpr(16)


@triton.jit
def keep_rows(x, rows, inverse_row_scale, place, valid, D: tl.constexpr, STRIDE: tl.constexpr, FP8: tl.constexpr):
    """Store rows as the products take them; returns FP8's inverse scales (B), which are stored too."""
    inverse_scale = 1.0
    if FP8:
        x, inverse_scale = quantized_rows(x)
        tl.store(inverse_row_scale + place, inverse_scale, mask=valid)
    else:
        x = x.to(tl.bfloat16)
    store_rows(rows, x, place, valid, D, STRIDE)
    return inverse_scale


@triton.jit
def gradient_out(grad_edges, grad_received, receivers, place, valid, D: tl.constexpr):
    """Return the gradient of the new edges (B, D), FP32: their own, and their receiver's."""
    of_edges = load_rows(grad_edges, place, valid, D)
    of_nodes = gather_rows(grad_received, receivers, place, valid, D)
    return of_edges.to(tl.float32) + of_nodes.to(tl.float32)


@triton.jit
def norm_gradient(
    unit, inverse_deviation, gamma, grad_edges, grad_received, receivers, d_out, row_scale, sums, n_rows,
    D: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Store the gradient of the second layer (B, D), and the tile's sums for its bias and the norm's scale and shift (3, D).

    `unit` (B, D) BF16 and `inverse_deviation` (B) in memory.  A few rows at a time: a row's mean needs a whole row, and two
    tiles in FP32 are more than all registers.
    """
    column = tl.arange(0, D)
    weight = tl.load(gamma + column)[None, :]
    of_bias = tl.zeros((ROWS, D), tl.float32)
    of_scale = tl.zeros((ROWS, D), tl.float32)
    of_shift = tl.zeros((ROWS, D), tl.float32)
    for first in range(0, BLOCK, ROWS):
        place = first + tl.arange(0, ROWS)
        valid = place < n_rows
        u = load_rows(unit, place, valid, D).to(tl.float32)
        g = gradient_out(grad_edges, grad_received, receivers, place, valid, D)
        of_shift += g
        of_scale += g * u
        g *= weight
        g -= u * (tl.sum(g * u, 1) * (1.0 / D))[:, None]
        g -= (tl.sum(g, 1) * (1.0 / D))[:, None]  # u has mean zero
        g *= tl.load(inverse_deviation + place, mask=valid, other=0.0)[:, None]
        of_bias += g
        tl.debug_barrier()  # FP8 writes over `unit`
        keep_rows(g, d_out, row_scale, place, valid, D, STRIDE, FP8)
    tl.store(sums + column, tl.sum(of_bias, 0))
    tl.store(sums + D + column, tl.sum(of_scale, 0))
    tl.store(sums + 2 * D + column, tl.sum(of_shift, 0))


@triton.jit(do_not_specialize=["n_edges"])  # graphs differ in size: one compilation serves all
def edge_backward_kernel(
    saved, saved_inverse_scale, projected_senders, projected_receivers, senders, receivers,
    weight_edge, weight_out, weight_out_t, weight_edge_t, inverse_scales, vectors, grad_edges, grad_received,
    d_edges, activation, d_out, d_hidden, parked, row_scales, sums, d_projected, n_edges, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    FP8: tl.constexpr, REDUCE: tl.constexpr, APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """Write d_edges (E, D) BF16 and activation, d_out and d_hidden (E, D) as products take them, with row_scales (3, E).

    The scales are FP8's, inverse, in the order of these three.
    `sums` (tiles, 3, D) FP32: each tile's sums for the second bias, the norm's scale and its shift.  With REDUCE d_projected
    (N, D) FP32 gets the gradient of the receivers' projections; that of the senders' is the sum of d_hidden by sender.  Results
    to come hold what is short-lived, so that it need not reach memory: d_edges the hidden layer, and `parked`, which is
    d_hidden in BF16 and both of d_out and d_hidden, side by side in rows of 2 D bytes, in FP8, the normalised second layer.
    """
    STRIDE: tl.constexpr = 2 * D if FP8 else D
    place = tl.arange(0, BLOCK)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    n_rows = n_edges - start
    valid = place < n_rows
    rows = start * D
    senders += start
    receivers += start
    row_scales += start
    parked += rows
    d_out += start * STRIDE
    d_hidden += start * STRIDE
    one, two = 1.0, 1.0
    if FP8:
        one, two = tl.load(inverse_scales), tl.load(inverse_scales + 1)

    ends = hidden_terms(projected_senders, projected_receivers, senders, receivers, place, valid, D)
    z = staged_product(saved + rows, weight_edge, valid, D, BLOCK, BLOCK_K, STAGES, D)
    if FP8:
        z *= (tl.load(saved_inverse_scale + start + place, mask=valid, other=0.0) * one)[:, None]
    z += ends.to(tl.float32)
    store_rows(d_edges + rows, z.to(tl.bfloat16), place, valid, D, D)
    z *= sigmoid(z, APPROXIMATE)
    inverse_scale = keep_rows(z, activation + rows, row_scales, place, valid, D, D, FP8)
    tl.debug_barrier()

    z = staged_product(activation + rows, weight_out, valid, D, BLOCK, BLOCK_K, STAGES, D)
    if FP8:
        z *= (inverse_scale * two)[:, None]
    unit, inverse_deviation = normalized(z + tl.load(vectors + tl.arange(0, D))[None, :], eps, D)
    store_rows(parked, unit.to(tl.bfloat16), place, valid, D, D)
    deviations = row_scales + 2 * tl.cast(n_edges, tl.int64)  # until the hidden layer's gradient has its scales
    tl.store(deviations + place, inverse_deviation, mask=valid)
    tl.debug_barrier()
    norm_gradient(
        parked, deviations, vectors + D, grad_edges + rows, grad_received, receivers, d_out, row_scales + n_edges,
        sums + tl.program_id(0).to(tl.int64) * (3 * D), n_rows, D, BLOCK, STRIDE, FP8,
    )  # fmt: skip
    tl.debug_barrier()

    z = staged_product(d_out, weight_out_t, valid, D, BLOCK, BLOCK_K, STAGES, STRIDE)
    if FP8:
        z *= (tl.load(row_scales + n_edges + place, mask=valid, other=0.0) * two)[:, None]
    hidden = load_rows(d_edges + rows, place, valid, D).to(tl.float32)
    gate = sigmoid(hidden, APPROXIMATE)
    z *= gate * (1.0 + hidden * (1.0 - gate))
    if REDUCE:
        add_runs(z.to(tl.bfloat16), receivers, place, valid, d_projected, D)
    inverse_scale = keep_rows(z, d_hidden, deviations, place, valid, D, STRIDE, FP8)
    tl.debug_barrier()

    z = staged_product(d_hidden, weight_edge_t, valid, D, BLOCK, BLOCK_K, STAGES, STRIDE)
    if FP8:
        z *= (inverse_scale * one)[:, None]
    z += gradient_out(grad_edges + rows, grad_received, receivers, place, valid, D)
    store_rows(d_edges + rows, z.to(tl.bfloat16), place, valid, D, D)
