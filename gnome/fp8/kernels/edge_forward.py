"""The edge block, forward: gather, two products, SiLU, norm, residual and, for sorted receivers, sums to the nodes."""

# ruff: noqa: N803, PLR0912, PLR0913, PLR0917 - Triton kernels: many pointers, capitals for compile-time sizes
# mypy: disable-error-code="import-not-found, no-untyped-def, untyped-decorator"
import triton
import triton.language as tl

from gnome.fp8.kernels.edge_tile import (
    add_runs,
    hidden_terms,
    load_rows,
    normalized,
    quantized_rows,
    sigmoid,
    staged_product,
    store_rows,
    stored_product,
    weight_tile,
)


@triton.jit
def forward_tile(
    tile, first, second, edges, projected_senders, projected_receivers, senders, receivers,
    weight_edge, weight_out, inverse_scales, vectors,
    new_edges, parked, received, payload, inverse_row_scale, n_edges, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    FP8: tl.constexpr, STAGED: tl.constexpr, RESIDENT: tl.constexpr, REDUCE: tl.constexpr, APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """Compute one tile of `edge_forward_kernel`; `first` and `second` are the weights where they are resident."""
    place = tl.arange(0, BLOCK)
    column = tl.arange(0, D)[None, :]
    start = tl.cast(tile, tl.int64) * BLOCK
    valid = place < n_edges - start
    ends = hidden_terms(projected_senders, projected_receivers, senders + start, receivers + start, place, valid, D)
    if FP8:
        left, inverse_scale = quantized_rows(load_rows(edges + start * D, place, valid, D).to(tl.float32))
        store_rows(payload + start * D, left, place, valid, D, D)
        tl.store(inverse_row_scale + start + place, inverse_scale, mask=valid)
        if RESIDENT:
            z = tl.dot(left, first)
        else:
            z = stored_product(left, payload + start * D, weight_edge, valid, D, BLOCK, BLOCK_K, STAGES, STAGED)
        z *= (inverse_scale * tl.load(inverse_scales))[:, None]
    elif STAGED:
        z = staged_product(edges + start * D, weight_edge, valid, D, BLOCK, BLOCK_K, STAGES, D)
    else:
        z = tl.dot(load_rows(edges + start * D, place, valid, D), weight_tile(weight_edge, D))
    z += ends.to(tl.float32)
    z *= sigmoid(z, APPROXIMATE)
    if FP8:
        left, inverse_scale = quantized_rows(z)
        own = parked + start * (2 * D)  # the tile's part of new_edges, which is twice as wide
    else:
        left = z.to(tl.bfloat16)
        own = parked + start * D
    if RESIDENT:
        z = tl.dot(left, second)
    else:
        if STAGED:
            store_rows(own, left, place, valid, D, D)
        z = stored_product(left, own, weight_out, valid, D, BLOCK, BLOCK_K, STAGES, STAGED)
        if STAGED:
            tl.debug_barrier()  # what is parked has been read
    if FP8:
        z *= (inverse_scale * tl.load(inverse_scales + 1))[:, None]
    unit, _ = normalized(z + tl.load(vectors + column), eps, D)
    update = unit * tl.load(vectors + D + column) + tl.load(vectors + 2 * D + column)
    result = (load_rows(edges + start * D, place, valid, D).to(tl.float32) + update).to(tl.bfloat16)
    store_rows(new_edges + start * D, result, place, valid, D, D)
    if REDUCE:
        add_runs(result, receivers + start, place, valid, received, D)


@triton.jit(do_not_specialize=["n_edges"])  # graphs differ in size: one compilation serves all
def edge_forward_kernel(
    edges, projected_senders, projected_receivers, senders, receivers,
    weight_edge, weight_out, inverse_scales, vectors,
    new_edges, parked, received, payload, inverse_row_scale, n_edges, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    FP8: tl.constexpr, STAGED: tl.constexpr, RESIDENT: tl.constexpr, REDUCE: tl.constexpr, APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """Write new_edges (E, D) BF16; with FP8 payload (E, D) and inverse_row_scale (E); with REDUCE add to received (N, D), FP32.

    `vectors` (3, D) FP32: bias of the second layer, scale and shift of the norm.  `inverse_scales` (2) FP32, of the
    weights.  `parked`: the memory of new_edges, which holds the activations until the result replaces them.  RESIDENT, of FP8
    alone: a program keeps both weights in shared memory (128 KB at width 256; two BF16 ones do not fit) and walks over many
    tiles; otherwise it has one tile.
    """
    if RESIDENT:
        first, second = weight_tile(weight_edge, D), weight_tile(weight_out, D)
        for tile in tl.range(tl.program_id(0), tl.cdiv(n_edges, BLOCK), tl.num_programs(0)):
            forward_tile(
                tile, first, second, edges, projected_senders, projected_receivers, senders, receivers,
                weight_edge, weight_out, inverse_scales, vectors,
                new_edges, parked, received, payload, inverse_row_scale, n_edges, eps,
                D, BLOCK, BLOCK_K, STAGES, FP8, STAGED, RESIDENT, REDUCE, APPROXIMATE,
            )  # fmt: skip
    else:
        forward_tile(
            tl.program_id(0), 0, 0, edges, projected_senders, projected_receivers, senders, receivers,
            weight_edge, weight_out, inverse_scales, vectors,
            new_edges, parked, received, payload, inverse_row_scale, n_edges, eps,
            D, BLOCK, BLOCK_K, STAGES, FP8, STAGED, RESIDENT, REDUCE, APPROXIMATE,
        )  # fmt: skip
