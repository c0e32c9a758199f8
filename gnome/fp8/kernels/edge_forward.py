"""The edge block, forward, one product a kernel: the hidden layer with its activation, and the second layer with norm and residual.

Backward runs the first of them again.
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
    quantized_rows,
    scaled_product,
    sigmoid,
    store_rows,
    sum_of,
    weight_tile,
)


@triton.jit(do_not_specialize=["n_edges"])  # graphs differ in size: one compilation serves all
def edge_hidden_kernel(
    edges, edge_scale, projected_senders, projected_receivers, senders, receivers, weight, inverse_scale,
    payload, payload_scale, hidden, hidden_scale, activation, activation_scale, n_edges,
    D: tl.constexpr, BLOCK: tl.constexpr, FP8: tl.constexpr, FORWARD: tl.constexpr, APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """Write activation = SiLU(hidden) (E, D), BF16 or E4M3 with inverse scales (E).

    FORWARD reads edges in BF16 and, in FP8, writes them as payload with payload_scale (E).  Otherwise edges are what forward
    saved (FP8: payload, with edge_scale), and hidden is written too.
    """
    right = weight_tile(weight, D)
    place = tl.arange(0, BLOCK)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    start = tl.program_id(0).to(tl.int64) * BLOCK
    valid = inside(place, start, n_edges, BLOCK)
    rows = load_rows(edges + start * D, place, valid, D)
    sender, receiver = load_index(senders + start, place, valid), load_index(receivers + start, place, valid)
    for _ in tl.range(tl.program_id(0), tl.cdiv(n_edges, BLOCK), tl.num_programs(0)):
        from_sender = gather_rows(projected_senders, sender, valid, D)
        from_receiver = gather_rows(projected_receivers, receiver, valid, D)
        ahead = start + step
        valid_ahead = inside(place, ahead, n_edges, BLOCK)
        rows_ahead = load_rows(edges + ahead * D, place, valid_ahead, D)
        sender, receiver = load_index(senders + ahead, place, valid_ahead), load_index(receivers + ahead, place, valid_ahead)
        if FP8 and FORWARD:
            rows, row_scale = quantized_rows(rows.to(tl.float32))
            store_rows(payload + start * D, rows, place, valid, D)
            tl.store(payload_scale + start + place, row_scale, mask=valid)
            z = tl.dot(rows, right) * (row_scale * tl.load(inverse_scale))[:, None]
        else:
            z = scaled_product(rows, right, edge_scale + start, inverse_scale, place, valid, FP8)
        z += sum_of(from_sender, from_receiver).to(tl.float32)
        if not FORWARD:
            keep_rows(z, hidden + start * D, hidden_scale + start, place, valid, D, FP8)
        keep_rows(z * sigmoid(z, APPROXIMATE), activation + start * D, activation_scale + start, place, valid, D, FP8)
        rows, start, valid = rows_ahead, ahead, valid_ahead


@triton.jit(do_not_specialize=["n_edges"])  # as above
def edge_output_kernel(
    activation, activation_scale, edges, weight, inverse_scale, vectors, new_edges, n_edges, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Write new_edges (E, D) BF16.  `vectors` (3, D) FP32: bias of the second layer, scale and shift of the norm."""
    right = weight_tile(weight, D)
    place = tl.arange(0, BLOCK)
    column = tl.arange(0, D)[None, :]
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    start = tl.program_id(0).to(tl.int64) * BLOCK
    valid = inside(place, start, n_edges, BLOCK)
    rows = load_rows(activation + start * D, place, valid, D)
    for _ in tl.range(tl.program_id(0), tl.cdiv(n_edges, BLOCK), tl.num_programs(0)):
        old = load_rows(edges + start * D, place, valid, D)
        ahead = start + step
        valid_ahead = inside(place, ahead, n_edges, BLOCK)
        rows_ahead = load_rows(activation + ahead * D, place, valid_ahead, D)
        z = scaled_product(rows, right, activation_scale + start, inverse_scale, place, valid, FP8)
        unit, _ = normalized(z + tl.load(vectors + column), eps, D)
        update = unit * tl.load(vectors + D + column) + tl.load(vectors + 2 * D + column)
        store_rows(new_edges + start * D, (old.to(tl.float32) + update).to(tl.bfloat16), place, valid, D)
        rows, start, valid = rows_ahead, ahead, valid_ahead
