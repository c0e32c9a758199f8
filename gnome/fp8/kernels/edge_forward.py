"""The edge block, forward, one product a kernel: the hidden layer with its activation, and the second layer with norm and residual.

Backward runs the first of them again.
"""

# mypy: disable-error-code="import-not-found, no-untyped-def, untyped-decorator"
import triton
import triton.language as tl

from gnome.fp8.kernels.edge_tile import (
    gather_rows,
    inside,
    inverse_deviations,
    keep_rows,
    load_operand,
    load_rows,
    nodes_of,
    scales_of_rows,
    sigmoid,
    store_rows,
    sum_of,
    unscaled,
    weight_tile,
)


@triton.jit
def hidden_tile(
    edges, edge_scale, projected_senders, projected_receivers, senders, receivers, start, place, n_edges,
    D: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Load the edges (B, D) of a tile, their inverse scales, and the sum of what their two nodes add to the hidden layer (B, D)."""
    valid = inside(place, start, n_edges, BLOCK)
    of_senders = gather_rows(projected_senders, nodes_of(senders, start, place, valid), valid, D)
    of_receivers = gather_rows(projected_receivers, nodes_of(receivers, start, place, valid), valid, D)
    rows, scale = load_operand(edges, edge_scale, start, place, valid, D, SCALED)
    return rows, scale, sum_of(of_senders, of_receivers)


@triton.jit(do_not_specialize=["n_edges"])  # graphs differ in size: one compilation serves all
def edge_hidden_kernel(
    edges, edge_scale, projected_senders, projected_receivers, senders, receivers, weight, inverse_scale,
    payload, payload_scale, hidden, activation, row_scale, n_edges,
    D: tl.constexpr, BLOCK: tl.constexpr, FP8: tl.constexpr, AHEAD: tl.constexpr,
    FORWARD: tl.constexpr, APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """Write activation = SiLU(hidden) (E, D), BF16, or E4M3 with inverse scales row_scale (E).

    FORWARD reads edges in BF16 and, in FP8, writes them as payload with payload_scale (E).  Otherwise edges are what forward
    saved (FP8: payload, with edge_scale), and hidden is written too.  Hidden layer and activation share a scale, for the
    activation is never larger, and numbers below the scale's largest by a few powers of two are as exact in E4M3.
    """
    right = weight_tile(weight, D)
    of_weight = tl.load(inverse_scale)
    place = tl.arange(0, BLOCK)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if AHEAD:
        rows, scale, ends = hidden_tile(
            edges, edge_scale, projected_senders, projected_receivers, senders, receivers, start, place, n_edges,
            D, BLOCK, FP8 and not FORWARD,
        )  # fmt: skip
    for _ in tl.range(tl.program_id(0), tl.cdiv(n_edges, BLOCK), tl.num_programs(0)):
        ahead = start + tl.num_programs(0).to(tl.int64) * BLOCK
        next_rows, next_scale, next_ends = hidden_tile(
            edges, edge_scale, projected_senders, projected_receivers, senders, receivers, ahead if AHEAD else start, place, n_edges,
            D, BLOCK, FP8 and not FORWARD,
        )  # fmt: skip
        if not AHEAD:
            rows, scale, ends = next_rows, next_scale, next_ends
        valid = inside(place, start, n_edges, BLOCK)
        if FP8 and FORWARD:
            exact = rows.to(tl.float32)
            to_narrow, of_rows = scales_of_rows(exact, payload_scale + start, place, valid)
            narrow = (exact * to_narrow[:, None]).to(tl.float8e4nv)
            store_rows(payload + start * D, narrow, place, valid, D)
        else:
            narrow, of_rows = rows, scale
        z = unscaled(tl.dot(narrow, right), of_rows, of_weight, FP8) + ends.to(tl.float32)
        own_scale = 1.0
        if FP8:
            own_scale, _ = scales_of_rows(z, row_scale + start, place, valid)
        if not FORWARD:
            keep_rows(z, own_scale, hidden + start * D, place, valid, D, FP8)
        keep_rows(z * sigmoid(z, APPROXIMATE), own_scale, activation + start * D, place, valid, D, FP8)
        start = ahead
        if AHEAD:
            rows, scale, ends = next_rows, next_scale, next_ends


@triton.jit
def output_tile(
    activation, activation_scale, edges, start, place, n_edges, D: tl.constexpr, BLOCK: tl.constexpr, FP8: tl.constexpr
):
    """Load the activations (B, D) of a tile, their inverse scales, and its edges (B, D)."""
    valid = inside(place, start, n_edges, BLOCK)
    rows, scale = load_operand(activation, activation_scale, start, place, valid, D, FP8)
    return rows, scale, load_rows(edges + start * D, place, valid, D)


@triton.jit(do_not_specialize=["n_edges"])  # as above
def edge_output_kernel(
    activation, activation_scale, edges, weight, inverse_scale, vectors, new_edges, n_edges, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, FP8: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Write new_edges (E, D) BF16.  `vectors` (3, D) FP32: bias of the second layer, scale and shift of the norm."""
    right = weight_tile(weight, D)
    of_weight = tl.load(inverse_scale)
    place = tl.arange(0, BLOCK)
    column = tl.arange(0, D)[None, :]
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if AHEAD:
        rows, scale, old = output_tile(activation, activation_scale, edges, start, place, n_edges, D, BLOCK, FP8)
    for _ in tl.range(tl.program_id(0), tl.cdiv(n_edges, BLOCK), tl.num_programs(0)):
        ahead = start + tl.num_programs(0).to(tl.int64) * BLOCK
        next_rows, next_scale, next_old = output_tile(
            activation, activation_scale, edges, ahead if AHEAD else start, place, n_edges, D, BLOCK, FP8
        )
        if not AHEAD:
            rows, scale, old = next_rows, next_scale, next_old
        z = unscaled(tl.dot(rows, right), scale, of_weight, FP8) + tl.load(vectors + column)
        unit = z * inverse_deviations(z, eps, D)[:, None]
        update = unit * tl.load(vectors + D + column) + tl.load(vectors + 2 * D + column)
        valid = inside(place, start, n_edges, BLOCK)
        store_rows(new_edges + start * D, (old.to(tl.float32) + update).to(tl.bfloat16), place, valid, D)
        start = ahead
        if AHEAD:
            rows, scale, old = next_rows, next_scale, next_old
