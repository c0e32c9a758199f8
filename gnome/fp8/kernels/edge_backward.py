"""The edge block, backward, one product a kernel: from the gradient of the new edges through the norm, both layers and back.

The hidden layer and its activation are `edge_forward.edge_hidden_kernel`'s.  All that is written here is BF16 or E4M3 with a
scale a row, and is what the next kernel, the weights' gradients and the sums by node read.
"""

# mypy: disable-error-code="import-not-found, no-untyped-def, untyped-decorator"
import triton
import triton.language as tl

from gnome.fp8.kernels.edge_tile import (
    inside,
    inverse_deviations,
    keep_rows,
    load_operand,
    passed_gradient,
    scales_of_rows,
    sigmoid,
    store_rows,
    unscaled,
    weight_tile,
)


@triton.jit
def gradient_tile(
    rows, inverse_row_scale, grad_edges, grad_received, receivers, start, place, n_edges,
    D: tl.constexpr, BLOCK: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Load the rows (B, D) of a tile, their inverse scales, and the gradient of its new edges (B, D)."""
    valid = inside(place, start, n_edges, BLOCK)
    passed = passed_gradient(grad_edges, grad_received, receivers, start, place, valid, D)
    operand, scale = load_operand(rows, inverse_row_scale, start, place, valid, D, FP8)
    return operand, scale, passed


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
    d_out, d_out_scale, of_scale, n_edges, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, FP8: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Write d_out (E, D), the gradient of the second layer before its norm, which is computed again from the activation.

    A row's mean is taken off though weight and bias, with mean zero over the outputs, would do it: it may be large, and rounded with it the
    rest of the row would lose by it.
    of_scale (programs, BLOCK / 2, D) FP32 holds partial sums of the gradient of the norm's scale.
    """
    right = weight_tile(weight, D)
    of_weight = tl.load(inverse_scale)
    place = tl.arange(0, BLOCK)
    column = tl.arange(0, D)
    total = tl.zeros((BLOCK // 16, 8, D), tl.float32)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if AHEAD:
        rows, scale, passed = gradient_tile(
            activation, activation_scale, grad_edges, grad_received, receivers, start, place, n_edges, D, BLOCK, FP8
        )
    for _ in tl.range(tl.program_id(0), tl.cdiv(n_edges, BLOCK), tl.num_programs(0)):
        ahead = start + tl.num_programs(0).to(tl.int64) * BLOCK
        next_rows, next_scale, next_passed = gradient_tile(
            activation, activation_scale, grad_edges, grad_received, receivers, ahead if AHEAD else start, place, n_edges,
            D, BLOCK, FP8,
        )  # fmt: skip
        if not AHEAD:
            rows, scale, passed = next_rows, next_scale, next_passed
        z = unscaled(tl.dot(rows, right), scale, of_weight, FP8) + tl.load(vectors + column)[None, :]
        inverse_deviation = inverse_deviations(z, eps, D)
        unit = z * inverse_deviation[:, None]
        g = passed.to(tl.float32)
        total += folded_product(g * unit, BLOCK, D)
        g *= tl.load(vectors + D + column)[None, :]
        along, mean = tl.sum(g * unit, 1) * (1.0 / D), tl.sum(g, 1) * (1.0 / D)  # unit rows have mean zero
        g = (g - unit * along[:, None] - mean[:, None]) * inverse_deviation[:, None]
        valid = inside(place, start, n_edges, BLOCK)
        own_scale = 1.0
        if FP8:
            own_scale, _ = scales_of_rows(g, d_out_scale + start, place, valid)
        keep_rows(g, own_scale, d_out + start * D, place, valid, D, FP8)
        start = ahead
        if AHEAD:
            rows, scale, passed = next_rows, next_scale, next_passed
    part = tl.program_id(0) * (BLOCK // 2) + tl.arange(0, BLOCK // 16)[:, None, None] * 8 + tl.arange(0, 8)[None, :, None]
    tl.store(of_scale + part * D + column[None, None, :], total)


@triton.jit
def layer_tile(
    d_out, d_out_scale, hidden, hidden_scale, start, place, n_edges, D: tl.constexpr, BLOCK: tl.constexpr, FP8: tl.constexpr
):
    """Load the output's gradient (B, D) of a tile and its hidden layer (B, D), with their inverse scales."""
    valid = inside(place, start, n_edges, BLOCK)
    rows, scale = load_operand(d_out, d_out_scale, start, place, valid, D, FP8)
    kept, kept_scale = load_operand(hidden, hidden_scale, start, place, valid, D, FP8)
    return rows, scale, kept, kept_scale


@triton.jit(do_not_specialize=["n_edges"])  # as above
def edge_hidden_gradient_kernel(
    d_out, d_out_scale, hidden, hidden_scale, weight_t, inverse_scale, d_hidden, d_hidden_scale, of_bias, n_edges,
    D: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, FP8: tl.constexpr, AHEAD: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """Write d_hidden (E, D), the gradient of the hidden layer before its activation.

    of_bias (programs, PARTS, D) FP32: partial sums of d_out.
    """
    right = weight_tile(weight_t, D)
    of_weight = tl.load(inverse_scale)
    place = tl.arange(0, BLOCK)
    total = tl.zeros((PARTS, D), tl.float32)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if AHEAD:
        rows, scale, kept, kept_scale = layer_tile(d_out, d_out_scale, hidden, hidden_scale, start, place, n_edges, D, BLOCK, FP8)
    for _ in tl.range(tl.program_id(0), tl.cdiv(n_edges, BLOCK), tl.num_programs(0)):
        ahead = start + tl.num_programs(0).to(tl.int64) * BLOCK
        next_rows, next_scale, next_kept, next_kept_scale = layer_tile(
            d_out, d_out_scale, hidden, hidden_scale, ahead if AHEAD else start, place, n_edges, D, BLOCK, FP8
        )
        if not AHEAD:
            rows, scale, kept, kept_scale = next_rows, next_scale, next_kept, next_kept_scale
        total += folded(rows, scale, BLOCK, D, PARTS, FP8)
        g = unscaled(tl.dot(rows, right), scale, of_weight, FP8)
        z = kept.to(tl.float32)
        if FP8:
            z *= kept_scale[:, None]
        gate = sigmoid(z, APPROXIMATE)
        g *= gate * (1.0 + z * (1.0 - gate))
        valid = inside(place, start, n_edges, BLOCK)
        own_scale = 1.0
        if FP8:
            own_scale, _ = scales_of_rows(g, d_hidden_scale + start, place, valid)
        keep_rows(g, own_scale, d_hidden + start * D, place, valid, D, FP8)
        start = ahead
        if AHEAD:
            rows, scale, kept, kept_scale = next_rows, next_scale, next_kept, next_kept_scale
    store_sums(of_bias, total, D, PARTS)


@triton.jit(do_not_specialize=["n_edges"])  # as above
def edge_gradient_kernel(
    d_hidden, d_hidden_scale, weight_t, inverse_scale, grad_edges, grad_received, receivers, d_edges, of_shift, n_edges,
    D: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, FP8: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Write d_edges (E, D) BF16: the product's part, and what comes straight from the new edges and their receivers.

    of_shift (programs, PARTS, D) FP32: partial sums of the latter, which are the gradient of the norm's shift.
    """
    right = weight_tile(weight_t, D)
    of_weight = tl.load(inverse_scale)
    place = tl.arange(0, BLOCK)
    total = tl.zeros((PARTS, D), tl.float32)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if AHEAD:
        rows, scale, passed = gradient_tile(
            d_hidden, d_hidden_scale, grad_edges, grad_received, receivers, start, place, n_edges, D, BLOCK, FP8
        )
    for _ in tl.range(tl.program_id(0), tl.cdiv(n_edges, BLOCK), tl.num_programs(0)):
        ahead = start + tl.num_programs(0).to(tl.int64) * BLOCK
        next_rows, next_scale, next_passed = gradient_tile(
            d_hidden,
            d_hidden_scale,
            grad_edges,
            grad_received,
            receivers,
            ahead if AHEAD else start,
            place,
            n_edges,
            D,
            BLOCK,
            FP8,
        )
        if not AHEAD:
            rows, scale, passed = next_rows, next_scale, next_passed
        total += folded(passed, 1.0, BLOCK, D, PARTS, False)
        g = unscaled(tl.dot(rows, right), scale, of_weight, FP8) + passed.to(tl.float32)
        store_rows(d_edges + start * D, g.to(tl.bfloat16), place, inside(place, start, n_edges, BLOCK), D)
        start = ahead
        if AHEAD:
            rows, scale, passed = next_rows, next_scale, next_passed
    store_sums(of_shift, total, D, PARTS)
