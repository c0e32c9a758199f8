"""Sums over the edges of each node, and products that contract over edges.

Both run in a fixed order: the same input gives the same bits.
"""

# mypy: disable-error-code="import-not-found, no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 8
TILE = 128
SLICE = 64


@triton.jit
def segment_sum_kernel(
    values, inverse_row_scale, order, offsets, sums,
    D: tl.constexpr, ROWS: tl.constexpr, SCALED: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    """Write sums (N, D): of the rows order[offsets[n]:offsets[n + 1]], or, not ORDERED, offsets[n]:offsets[n + 1].

    A program, of one warp, takes a node, ROWS rows at a time: nothing passes between warps.
    """
    node = tl.program_id(0)
    first, last = tl.load(offsets + node), tl.load(offsets + node + 1)
    column = tl.arange(0, D)[None, :]
    total = tl.zeros((ROWS, D), tl.float32)
    for start in range(first, last, ROWS):
        place = start + tl.arange(0, ROWS)
        valid = place < last
        row = tl.load(order + place, mask=valid, other=0) if ORDERED else place
        row = row.to(tl.int64)
        part = tl.load(values + row[:, None] * D + column, mask=valid[:, None], other=0.0).to(tl.float32)
        if SCALED:
            part *= tl.load(inverse_row_scale + row, mask=valid, other=0.0)[:, None]
        total += part
    target = sums + node.to(tl.int64) * D + tl.arange(0, D)
    tl.store(target, tl.sum(total, 0).to(sums.dtype.element_ty))


@triton.jit
def largest_factor(left_scale, right_scale, first, last, SLICE: tl.constexpr):
    """Return the largest product of two rows' inverse scales in a range, and 1 where there is none."""
    largest = tl.zeros((SLICE,), tl.float32)
    for start in range(first, last, SLICE):
        row = start + tl.arange(0, SLICE)
        factor = tl.load(left_scale + row, mask=row < last, other=0.0) * tl.load(right_scale + row, mask=row < last, other=0.0)
        largest = tl.where(factor > largest, factor, largest)
    largest = tl.max(largest, 0)
    return tl.where(largest > 0, largest, 1.0)


@triton.jit(do_not_specialize=["n_edges"])  # graphs differ in size: one compilation serves all
def weight_gradient_kernel(
    left, right, left_scale, right_scale, partial, n_edges, chunk,
    D: tl.constexpr, TILE: tl.constexpr, SLICE: tl.constexpr, STAGES: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """Write partial (programs along 1, D, D) FP32: left.T @ right over `chunk` edges each.

    Rows in E4M3 with a scale each contract in FP16, which holds every E4M3 number: the product of the scales goes to the left
    row, relative to the chunk's largest, and what underflows is 2**-24 of that.  The tensor cores would take E4M3 itself only
    with the edges running fastest.
    """
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, n_edges)
    per_side: tl.constexpr = D // TILE
    i = (tl.program_id(0) // per_side) * TILE + tl.arange(0, TILE)[None, :]
    j = (tl.program_id(0) % per_side) * TILE + tl.arange(0, TILE)[None, :]
    if SCALED:
        largest = largest_factor(left_scale, right_scale, first, last, 1024)
        inverse_largest = 1.0 / largest
    total = tl.zeros((TILE, TILE), tl.float32)
    for start in tl.range(first, last, SLICE, num_stages=STAGES):
        row = start + tl.arange(0, SLICE)
        valid = row < last
        at = row.to(tl.int64)[:, None]
        a = tl.load(left + at * D + i, mask=valid[:, None], other=0.0)
        b = tl.load(right + at * D + j, mask=valid[:, None], other=0.0)
        if SCALED:
            factor = tl.load(left_scale + row, mask=valid, other=0.0) * tl.load(right_scale + row, mask=valid, other=0.0)
            a = a.to(tl.float16) * (factor * inverse_largest).to(tl.float16)[:, None]
            b = b.to(tl.float16)
        total = tl.dot(tl.trans(a), b, total)
    if SCALED:
        total *= largest
    target = partial + tl.program_id(1).to(tl.int64) * (D * D)
    tl.store(target + tl.trans(i) * D + j, total)


def segment_sum(
    values: Tensor, offsets: Tensor, order: Tensor | None, dtype: torch.dtype, inverse_row_scale: Tensor | None = None
) -> Tensor:
    """Sum rows (E, D), E4M3 ones times their inverse scales (E), into nodes (N, D).

    `offsets` (N + 1) int32; `order` (E) int32 lists the rows by node, None where they lie so.
    """
    n_nodes, width = offsets.numel() - 1, values.shape[1]
    sums = values.new_empty((n_nodes, width), dtype=dtype)
    if n_nodes:
        segment_sum_kernel[(n_nodes,)](
            values, inverse_row_scale, order, offsets, sums, D=width, ROWS=ROWS,
            SCALED=values.dtype == torch.float8_e4m3fn, ORDERED=order is not None, num_warps=1,
        )  # fmt: skip
    return sums


def weight_gradient(left: Tensor, right: Tensor, left_scale: Tensor, right_scale: Tensor, programs: int) -> Tensor:
    """Return left.T @ right (D, D), FP32, of rows (E, D) in BF16, or in E4M3 with inverse scales (E), which BF16 ignores.

    `programs`: how many to spread over; each holds a tile of the result for a part of the edges.
    """
    n_edges, width = left.shape
    tile = min(TILE, width)
    n_tiles = (width // tile) ** 2
    chunk = max(1024, -(-n_edges // max(1, programs // n_tiles)))
    chunk = -(-chunk // SLICE) * SLICE
    partial = left.new_empty((-(-n_edges // chunk), width, width), dtype=torch.float32)
    if n_edges:
        weight_gradient_kernel[(n_tiles, partial.shape[0])](
            left, right, left_scale, right_scale, partial, n_edges, chunk,
            D=width, TILE=tile, SLICE=SLICE, STAGES=3, SCALED=left.dtype == torch.float8_e4m3fn, num_warps=4 if tile < TILE else 8,
        )  # fmt: skip
    return partial.sum(0)
