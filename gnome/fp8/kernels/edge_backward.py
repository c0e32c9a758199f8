"""The edge block, backward, one product a kernel: from the gradient of the new edges through the norm, both layers and back.

The hidden layer and its activation are `edge_forward.edge_hidden_kernel`'s.  All that is written here is BF16 or E4M3 with a
scale a row, and is what the next kernel, the weights' gradients and the sums by node read.
"""


# mypy: disable-error-code="import-not-found, no-untyped-def, untyped-decorator"
import triton
import triton.language as tl

from gnome.fp8.kernels.edge_tile import (
    gather_rows,
    keep_rows,
    load_rows,
    normalized,
    scaled_product,
    sigmoid,
    store_rows,
    weight_tile,
)

SUMS = tl.constexpr(16)


@triton.jit
def add_rows(values, sums, WHICH: tl.constexpr, BLOCK: tl.constexpr):
    """Add the sum of rows (B, D) to row WHICH of sums (SUMS, D), by a product: a thread holds few rows of any column."""
    wanted = tl.arange(0, SUMS)[:, None] + tl.zeros((1, BLOCK), tl.int32) == WHICH
    return tl.dot(tl.where(wanted, 1.0, 0.0).to(tl.bfloat16), values.to(tl.bfloat16), sums)


@triton.jit(do_not_specialize=["n_edges"])  # graphs differ in size: one compilation serves all
def edge_norm_gradient_kernel(
    activation, activation_scale, weight, inverse_scale, vectors, grad_edges, grad_received, receivers,
    d_out, d_out_scale, sums, n_edges, eps, D: tl.constexpr, BLOCK: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Write d_out (E, D), the gradient of the second layer before its norm, which is computed again from the activation.

    `sums` (programs, 3, D) FP32: each program's sums for the second bias, the norm's scale and its shift.
    """
    right = weight_tile(weight, D)
    place = tl.arange(0, BLOCK)
    column = tl.arange(0, D)[None, :]
    total = tl.zeros((SUMS, D), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(n_edges, BLOCK), tl.num_programs(0)):
        start = tile.to(tl.int64) * BLOCK
        valid = place < n_edges - start
        of_edges = load_rows(grad_edges + start * D, place, valid, D)
        of_nodes = gather_rows(grad_received, receivers + start, place, valid, D)
        rows = load_rows(activation + start * D, place, valid, D)
        z = scaled_product(rows, right, activation_scale + start, inverse_scale, place, valid, FP8)
        unit, inverse_deviation = normalized(z + tl.load(vectors + column), eps, D)
        g = of_edges.to(tl.float32) + of_nodes.to(tl.float32)
        total = add_rows(g, total, 2, BLOCK)
        total = add_rows(g * unit, total, 1, BLOCK)
        g *= tl.load(vectors + D + column)
        g -= unit * (tl.sum(g * unit, 1) * (1.0 / D))[:, None]
        g -= (tl.sum(g, 1) * (1.0 / D))[:, None]  # the unit rows have mean zero
        g *= inverse_deviation[:, None]
        total = add_rows(g, total, 0, BLOCK)
        keep_rows(g, d_out + start * D, d_out_scale + start, place, valid, D, FP8)
    which = tl.arange(0, SUMS)[:, None]
    tl.store(sums + tl.program_id(0) * (3 * D) + which * D + column, total, mask=which < 3)


@triton.jit(do_not_specialize=["n_edges"])  # as above
def edge_hidden_gradient_kernel(
    d_out, d_out_scale, hidden, hidden_scale, weight_t, inverse_scale, d_hidden, d_hidden_scale, n_edges,
    D: tl.constexpr, BLOCK: tl.constexpr, FP8: tl.constexpr, APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """Write d_hidden (E, D), the gradient of the hidden layer before its activation."""
    right = weight_tile(weight_t, D)
    place = tl.arange(0, BLOCK)
    for tile in tl.range(tl.program_id(0), tl.cdiv(n_edges, BLOCK), tl.num_programs(0)):
        start = tile.to(tl.int64) * BLOCK
        valid = place < n_edges - start
        kept = load_rows(hidden + start * D, place, valid, D)
        rows = load_rows(d_out + start * D, place, valid, D)
        g = scaled_product(rows, right, d_out_scale + start, inverse_scale, place, valid, FP8)
        z = kept.to(tl.float32)
        if FP8:
            z *= tl.load(hidden_scale + start + place, mask=valid, other=0.0)[:, None]
        gate = sigmoid(z, APPROXIMATE)
        keep_rows(g * (gate * (1.0 + z * (1.0 - gate))), d_hidden + start * D, d_hidden_scale + start, place, valid, D, FP8)


@triton.jit(do_not_specialize=["n_edges"])  # as above
def edge_gradient_kernel(
    d_hidden, d_hidden_scale, weight_t, inverse_scale, grad_edges, grad_received, receivers, d_edges, n_edges,
    D: tl.constexpr, BLOCK: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Write d_edges (E, D) BF16: the product's part, and what comes straight from the new edges and their receivers."""
    right = weight_tile(weight_t, D)
    place = tl.arange(0, BLOCK)
    for tile in tl.range(tl.program_id(0), tl.cdiv(n_edges, BLOCK), tl.num_programs(0)):
        start = tile.to(tl.int64) * BLOCK
        valid = place < n_edges - start
        of_edges = load_rows(grad_edges + start * D, place, valid, D)
        of_nodes = gather_rows(grad_received, receivers + start, place, valid, D)
        rows = load_rows(d_hidden + start * D, place, valid, D)
        g = scaled_product(rows, right, d_hidden_scale + start, inverse_scale, place, valid, FP8)
        g += of_edges.to(tl.float32) + of_nodes.to(tl.float32)
        store_rows(d_edges + start * D, g.to(tl.bfloat16), place, valid, D)
