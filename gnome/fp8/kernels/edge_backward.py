"""The edge block, backward, one product a kernel: from the gradient of the new edges through the norm, both layers and back.

The hidden layer and its activation are `edge_forward.edge_hidden_kernel`'s.  All that is written here is BF16 or E4M3 with a
scale a row, and is what the next kernel, the weights' gradients and the sums by node read.
"""

# mypy: disable-error-code="import-not-found, no-untyped-def, untyped-decorator"
import triton
import triton.language as tl

from gnome.fp8.kernels.edge_tile import (
    gather_rows,
    inside,
    keep_rows,
    load_index,
    load_rows,
    normalized,
    scaled_product,
    sigmoid,
    store_rows,
    sum_of,
    weight_tile,
)


@triton.jit
def folded(rows, inverse_row_scale, BLOCK: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, FP8: tl.constexpr):
    """Add narrow rows as they were loaded, (B, D) to (PARTS, D) FP32.

    PARTS: rows that all threads together load at once, so that a thread adds its own.
    """
    values = tl.reshape(rows, (BLOCK // PARTS, PARTS, D)).to(tl.float32)
    if FP8:
        values *= tl.reshape(inverse_row_scale, (BLOCK // PARTS, PARTS))[:, :, None]
    return tl.sum(values, 0)


@triton.jit
def store_sums(sums, total, D: tl.constexpr, PARTS: tl.constexpr):
    """Store a program's sums (PARTS, D)."""
    part = tl.program_id(0) * PARTS + tl.arange(0, PARTS)[:, None]
    tl.store(sums + part * D + tl.arange(0, D)[None, :], total)


@triton.jit
def folded_product(values, BLOCK: tl.constexpr, D: tl.constexpr):
    """Add FP32 rows as the tensor core returns them, (B, D) to (B / 16, 8, D): a thread holds rows 8 apart."""
    return tl.sum(tl.reshape(values, (BLOCK // 16, 2, 8, D)), 1)


@triton.jit(do_not_specialize=["n_edges"])  # graphs differ in size: one compilation serves all
def edge_norm_gradient_kernel(
    activation, activation_scale, weight, inverse_scale, vectors, grad_edges, grad_received, receivers,
    d_out, d_out_scale, of_scale, n_edges, eps, D: tl.constexpr, BLOCK: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Write d_out (E, D), the gradient of the second layer before its norm, which is computed again from the activation.

    of_scale (programs, BLOCK / 2, D) FP32 holds partial sums of the gradient of the norm's scale.
    """
    right = weight_tile(weight, D)
    place = tl.arange(0, BLOCK)
    column = tl.arange(0, D)
    total = tl.zeros((BLOCK // 16, 8, D), tl.float32)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    start = tl.program_id(0).to(tl.int64) * BLOCK
    valid = inside(place, start, n_edges, BLOCK)
    rows = load_rows(activation + start * D, place, valid, D)
    receiver = load_index(receivers + start, place, valid)
    for _ in tl.range(tl.program_id(0), tl.cdiv(n_edges, BLOCK), tl.num_programs(0)):
        of_edges = load_rows(grad_edges + start * D, place, valid, D)
        of_nodes = gather_rows(grad_received, receiver, valid, D)
        ahead = start + step
        valid_ahead = inside(place, ahead, n_edges, BLOCK)
        receiver = load_index(receivers + ahead, place, valid_ahead)
        z = scaled_product(rows, right, activation_scale + start, inverse_scale, place, valid, FP8)
        unit, inverse_deviation = normalized(z + tl.load(vectors + column)[None, :], eps, D)
        g = sum_of(of_edges, of_nodes).to(tl.float32)
        total += folded_product(g * unit, BLOCK, D)
        g *= tl.load(vectors + D + column)[None, :]
        g -= unit * (tl.sum(g * unit, 1) * (1.0 / D))[:, None]
        rows = load_rows(activation + ahead * D, place, valid_ahead, D)  # no sooner: registers are full
        g -= (tl.sum(g, 1) * (1.0 / D))[:, None]  # the unit rows have mean zero
        g *= inverse_deviation[:, None]
        keep_rows(g, d_out + start * D, d_out_scale + start, place, valid, D, FP8)
        start, valid = ahead, valid_ahead
    part = tl.program_id(0) * (BLOCK // 2) + tl.arange(0, BLOCK // 16)[:, None, None] * 8 + tl.arange(0, 8)[None, :, None]
    tl.store(of_scale + part * D + column[None, None, :], total)


@triton.jit(do_not_specialize=["n_edges"])  # as above
def edge_hidden_gradient_kernel(
    d_out, d_out_scale, hidden, hidden_scale, weight_t, inverse_scale, d_hidden, d_hidden_scale, of_bias, n_edges,
    D: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, FP8: tl.constexpr, APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """Write d_hidden (E, D), the gradient of the hidden layer before its activation.

    of_bias (programs, PARTS, D) FP32: partial sums of d_out.
    """
    right = weight_tile(weight_t, D)
    place = tl.arange(0, BLOCK)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    start = tl.program_id(0).to(tl.int64) * BLOCK
    valid = inside(place, start, n_edges, BLOCK)
    rows = load_rows(d_out + start * D, place, valid, D)
    total = tl.zeros((PARTS, D), tl.float32)
    for _ in tl.range(tl.program_id(0), tl.cdiv(n_edges, BLOCK), tl.num_programs(0)):
        kept = load_rows(hidden + start * D, place, valid, D)
        ahead = start + step
        valid_ahead = inside(place, ahead, n_edges, BLOCK)
        rows_ahead = load_rows(d_out + ahead * D, place, valid_ahead, D)
        of_rows = 1.0
        if FP8:
            of_rows = tl.load(d_out_scale + start + place, mask=valid, other=0.0)
        total += folded(rows, of_rows, BLOCK, D, PARTS, FP8)
        g = scaled_product(rows, right, d_out_scale + start, inverse_scale, place, valid, FP8)
        z = kept.to(tl.float32)
        if FP8:
            z *= tl.load(hidden_scale + start + place, mask=valid, other=0.0)[:, None]
        gate = sigmoid(z, APPROXIMATE)
        keep_rows(g * (gate * (1.0 + z * (1.0 - gate))), d_hidden + start * D, d_hidden_scale + start, place, valid, D, FP8)
        rows, start, valid = rows_ahead, ahead, valid_ahead
    store_sums(of_bias, total, D, PARTS)


@triton.jit(do_not_specialize=["n_edges"])  # as above
def edge_gradient_kernel(
    d_hidden, d_hidden_scale, weight_t, inverse_scale, grad_edges, grad_received, receivers, d_edges, of_shift, n_edges,
    D: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Write d_edges (E, D) BF16: the product's part, and what comes straight from the new edges and their receivers.

    of_shift (programs, PARTS, D) FP32: partial sums of the latter, which are the gradient of the norm's shift.
    """
    right = weight_tile(weight_t, D)
    place = tl.arange(0, BLOCK)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    start = tl.program_id(0).to(tl.int64) * BLOCK
    valid = inside(place, start, n_edges, BLOCK)
    rows = load_rows(d_hidden + start * D, place, valid, D)
    receiver = load_index(receivers + start, place, valid)
    total = tl.zeros((PARTS, D), tl.float32)
    for _ in tl.range(tl.program_id(0), tl.cdiv(n_edges, BLOCK), tl.num_programs(0)):
        of_edges = load_rows(grad_edges + start * D, place, valid, D)
        of_nodes = gather_rows(grad_received, receiver, valid, D)
        ahead = start + step
        valid_ahead = inside(place, ahead, n_edges, BLOCK)
        rows_ahead = load_rows(d_hidden + ahead * D, place, valid_ahead, D)
        receiver = load_index(receivers + ahead, place, valid_ahead)
        g = scaled_product(rows, right, d_hidden_scale + start, inverse_scale, place, valid, FP8)
        passed = sum_of(of_edges, of_nodes)
        total += folded(passed, 1.0, BLOCK, D, PARTS, False)
        g += passed.to(tl.float32)
        store_rows(d_edges + start * D, g.to(tl.bfloat16), place, valid, D)
        rows, start, valid = rows_ahead, ahead, valid_ahead
    store_sums(of_shift, total, D, PARTS)
