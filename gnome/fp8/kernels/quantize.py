"""From a matrix to the two FP8 layouts that its products need, in one pass, with its largest magnitude on the way."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gnome.fp8.formats import E4M3, Format
from gnome.fp8.kernels.numerics import E4M3_MAX, E5M2_MAX, inverse, scale_for, without_infinities

WINDOW = tl.constexpr(16)
TILE = (64, 128, 4)
"""Rows, columns and warps of a program that casts."""


_PACK = """{{
    .reg .b16 low, high;
    cvt.rn.satfinite.{0}x2.f32 low, $2, $1;
    cvt.rn.satfinite.{0}x2.f32 high, $4, $3;
    mov.b32 $0, {{low, high}};
}}"""
PACK_E4M3, PACK_E5M2 = tl.constexpr(_PACK.format("e4m3")), tl.constexpr(_PACK.format("e5m2"))


@triton.jit
def magnitude_bits(x):
    """Return |x| as int32, whose order is that of the numbers, with infinity and NaN on top."""
    return tl.abs(x).to(tl.int32, bitcast=True)


@triton.jit
def record(state, bits):
    """Raise the latest largest magnitude of `state` to that of a tile of `magnitude_bits`."""
    tl.atomic_max((state + 1).to(tl.pointer_type(tl.int32)), tl.max(tl.max(bits, axis=1), axis=0))


@triton.jit
def four_rows(first, second, third, fourth, FP8: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Cast four tiles of FP32 to FP8, and return them as the bytes of one tile of int32, `first` lowest.

    Transposes are of rows packed so, in assembly of their own: ptxas 12.9 miscompiles kernels that use a tile that Triton cast to FP8 both
    as it is and transposed (https://github.com/triton-lang/triton/issues/11111).  The interpreter knows no ASSEMBLY.
    """
    if ASSEMBLY:
        assembly: tl.constexpr = PACK_E4M3 if FP8 is tl.float8e4nv else PACK_E5M2
        return tl.inline_asm_elementwise(
            assembly, "=r,f,f,f,f", [first, second, third, fourth], dtype=tl.int32, is_pure=True, pack=1
        )
    low = _byte(first, FP8) | (_byte(second, FP8) << 8)
    return low | (_byte(third, FP8) << 16) | (_byte(fourth, FP8) << 24)


@triton.jit
def _byte(x, FP8: tl.constexpr):
    return x.to(FP8).to(tl.uint8, bitcast=True).to(tl.int32)


@triton.jit
def store_packed(columns, packed, first_row, first_column, width, n_row_padded, M: tl.constexpr, N: tl.constexpr):
    """Store packed rows (M / 4, N) as a tile of FP8 `columns` (width, n_row_padded), whose rows are multiples of 4 bytes."""
    length = n_row_padded // 4
    corner = columns.to(tl.pointer_type(tl.int32)) + first_column.to(tl.int64) * length + first_row // 4
    column, row = tl.arange(0, N)[:, None], tl.arange(0, M // 4)[None, :]
    mask = (first_column + column < width) & (first_row // 4 + row < length)
    tl.store(corner + column * length + row, tl.trans(packed), mask=mask)


@triton.jit
def _amax_kernel(x, amax_bits, numel, SIZE: tl.constexpr) -> None:
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    values = tl.load(x + index, mask=index < numel, other=0.0).to(tl.float32)
    tl.atomic_max(amax_bits, tl.max(magnitude_bits(values), axis=0))


@triton.jit
def _roll_kernel(state, inverse_scale, TOP: tl.constexpr) -> None:
    slots = tl.arange(0, WINDOW)
    latest = tl.load(state + 1)
    latest = tl.where(latest < float("inf"), latest, 0.0)  # also false for NaN
    older = tl.load(state + 2 + slots - 1, mask=slots > 0, other=0.0)
    history = tl.where(slots == 0, latest, older)
    scale = scale_for(tl.max(history, axis=0), TOP, tl.load(state))
    tl.debug_barrier()  # every slot is read before any is written
    tl.store(state + 2 + slots, history)
    tl.store(state, scale)
    tl.store(state + 1, 0.0)
    tl.store(inverse_scale, inverse(scale))


@triton.jit
def _current_scale_kernel(state, inverse_scale, TOP: tl.constexpr) -> None:
    scale = scale_for(tl.load(state + 1), TOP, tl.load(state))
    tl.store(state, scale)
    tl.store(inverse_scale, inverse(scale))


@triton.jit
def _cast_rows(
    x, rows, scale, top, first_row, first_column, n_row, n_column, n_column_padded,
    FP8: tl.constexpr, ROWS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Store every fourth row of a tile in FP8; returns them scaled, and `top` raised to their magnitudes."""
    local = tl.arange(0, M // 4)[:, None] * 4 + PART
    column = tl.arange(0, N)[None, :]
    valid = first_row + local < n_row
    corner = x + first_row.to(tl.int64) * n_column + first_column
    inside = valid & (first_column + column < n_column)
    values = tl.load(corner + local * n_column + column, mask=inside, other=0.0).to(tl.float32)
    scaled = without_infinities(values) * scale
    if ROWS:
        corner = rows + first_row.to(tl.int64) * n_column_padded + first_column
        inside = valid & (first_column + column < n_column_padded)
        tl.store(corner + local * n_column_padded + column, scaled.to(FP8), mask=inside)
    return scaled, tl.maximum(top, magnitude_bits(values))


@triton.jit
def _quantize_kernel(
    x, rows, columns, state, n_row, n_column, n_row_padded, n_column_padded,
    FP8: tl.constexpr, RECORD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, ASSEMBLY: tl.constexpr,
) -> None:  # fmt: skip
    first_row, first_column = tl.program_id(1) * M, tl.program_id(0) * N
    scale = tl.load(state)
    top = tl.zeros((M // 4, N), tl.int32)
    first, top = _cast_rows(x, rows, scale, top, first_row, first_column, n_row, n_column, n_column_padded, FP8, ROWS, M, N, 0)
    second, top = _cast_rows(x, rows, scale, top, first_row, first_column, n_row, n_column, n_column_padded, FP8, ROWS, M, N, 1)
    third, top = _cast_rows(x, rows, scale, top, first_row, first_column, n_row, n_column, n_column_padded, FP8, ROWS, M, N, 2)
    fourth, top = _cast_rows(x, rows, scale, top, first_row, first_column, n_row, n_column, n_column_padded, FP8, ROWS, M, N, 3)
    if RECORD:
        record(state, top)
    if COLUMNS:
        packed = four_rows(first, second, third, fourth, FP8, ASSEMBLY)
        store_packed(columns, packed, first_row, first_column, n_column_padded, n_row_padded, M, N)


def fp8_of(fmt: Format) -> tl.dtype:
    """Return Triton's name of an FP8 format."""
    return tl.float8e4nv if fmt == E4M3 else tl.float8e5


def top_of(fmt: Format) -> tl.constexpr:
    """Return the largest number of an FP8 format as kernels take it."""
    return E4M3_MAX if fmt == E4M3 else E5M2_MAX


def roll_scale(state: Tensor, fmt: Format, x: Tensor | None) -> Tensor:
    """Set `state`'s scale from x itself, or, without x, from the window of earlier amax; returns the inverse scale, () FP32."""
    inverse_scale = torch.empty((), dtype=torch.float32, device=state.device)
    _roll_kernel[(1,)](state, inverse_scale, TOP=top_of(fmt), num_warps=1)
    if x is not None:
        size = 8192
        _amax_kernel[(triton.cdiv(x.numel(), size),)](x, state[1:2].view(torch.int32), x.numel(), SIZE=size, num_warps=8)
        _current_scale_kernel[(1,)](state, inverse_scale, TOP=top_of(fmt), num_warps=1)
    return inverse_scale


def quantize_both(x: Tensor, state: Tensor, fmt: Format, rows: Tensor | None, columns: Tensor | None, *, record: bool) -> None:
    """Write x (M, K) times the scale in `state` into `rows` (M, K') and `columns` (K', M'), zeros in the padding."""
    n_row, n_column = x.shape
    n_row_padded = columns.shape[1] if columns is not None else n_row
    n_column_padded = rows.shape[1] if rows is not None else columns.shape[0]  # type: ignore[union-attr]
    tile_m, tile_n, num_warps = TILE
    _quantize_kernel[(triton.cdiv(n_column_padded, tile_n), triton.cdiv(n_row_padded, tile_m))](
        x,
        rows,
        columns,
        state,
        n_row,
        n_column,
        n_row_padded,
        n_column_padded,
        FP8=fp8_of(fmt),
        RECORD=record,
        ROWS=rows is not None,
        COLUMNS=columns is not None,
        M=tile_m,
        N=tile_n,
        ASSEMBLY=x.is_cuda,
        num_warps=num_warps,
    )
