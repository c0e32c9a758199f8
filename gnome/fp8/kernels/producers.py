"""What stands before a linear layer in a transformer, fused with the cast of its result: RMS norm and SwiGLU, and their gradients."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gnome.fp8.formats import Format
from gnome.fp8.kernels.numerics import inverse, without_infinities
from gnome.fp8.kernels.quantize import TILE, fp8_of, magnitude_bits

BACKWARD_TILE = (64, 64, 8)
NORM_PROGRAMS = 528
"""Programs of the norm's backward pass, each with a partial sum for the norm's weight."""


@triton.jit
def _record(state, values):
    bits = magnitude_bits(values)
    tl.atomic_max((state + 1).to(tl.pointer_type(tl.int32)), tl.max(tl.max(bits, axis=1), axis=0))


@triton.jit
def _norm_rows_kernel(x, gain, rows, inverse_rms, state, eps, width, FP8: tl.constexpr, WIDTH: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < width
    values = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    root = tl.sqrt(tl.sum(values * values, axis=0) / width + eps)
    scaled = values * (1.0 / root) * tl.load(gain + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(inverse_rms + row, 1.0 / root)
    tl.atomic_max((state + 1).to(tl.pointer_type(tl.int32)), tl.max(magnitude_bits(scaled), axis=0))
    tl.store(rows + row * width + column, (without_infinities(scaled) * tl.load(state)).to(FP8), mask=inside)


@triton.jit
def _norm_columns_kernel(
    x, gain, inverse_rms, inverse_scale, columns, n_row, width, n_row_padded, FP8: tl.constexpr, M: tl.constexpr, N: tl.constexpr
) -> None:  # fmt: skip
    first_row, first_column = tl.program_id(1) * M, tl.program_id(0) * N
    row, column = first_row + tl.arange(0, M), first_column + tl.arange(0, N)
    inside = (row[:, None] < n_row) & (column[None, :] < width)
    corner = x + first_row.to(tl.int64) * width + first_column
    values = tl.load(corner + tl.arange(0, M)[:, None] * width + tl.arange(0, N)[None, :], mask=inside, other=0.0).to(tl.float32)
    values *= tl.load(inverse_rms + row, mask=row < n_row, other=0.0)[:, None]
    values *= tl.load(gain + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    q = (values * inverse(tl.load(inverse_scale))).to(FP8)
    target = columns + first_column.to(tl.int64) * n_row_padded + first_row
    offset = tl.arange(0, N)[:, None] * n_row_padded + tl.arange(0, M)[None, :]
    tl.store(target + offset, tl.trans(q), mask=(column[:, None] < width) & (row[None, :] < n_row_padded))


@triton.jit
def _norm_backward_kernel(g, x, gain, inverse_rms, dx, partial, n_row, width, WIDTH: tl.constexpr) -> None:
    column = tl.arange(0, WIDTH)
    inside = column < width
    weight = tl.load(gain + column, mask=inside, other=0.0).to(tl.float32)
    d_gain = tl.zeros((WIDTH,), tl.float32)
    for index in range(tl.program_id(0), n_row, tl.num_programs(0)):
        row = tl.cast(index, tl.int64) * width
        d = tl.load(g + row + column, mask=inside, other=0.0).to(tl.float32)
        rms = tl.load(inverse_rms + index)
        unit = tl.load(x + row + column, mask=inside, other=0.0).to(tl.float32) * rms
        d_gain += d * unit
        d *= weight
        mean = tl.sum(d * unit, axis=0) / width
        tl.store(dx + row + column, (rms * (d - unit * mean)).to(dx.dtype.element_ty), mask=inside)
    tl.store(partial + tl.program_id(0) * width + column, d_gain, mask=inside)


@triton.jit
def _gates(u, first_row, first_column, n_row, hidden, M: tl.constexpr, N: tl.constexpr):
    """Load a tile of gate and up (FP32), and return the sigmoid of the gate with them."""
    row, column = first_row + tl.arange(0, M), first_column + tl.arange(0, N)
    inside = (row[:, None] < n_row) & (column[None, :] < hidden)
    corner = u + first_row.to(tl.int64) * (2 * hidden) + first_column
    offset = tl.arange(0, M)[:, None] * (2 * hidden) + tl.arange(0, N)[None, :]
    gate = tl.load(corner + offset, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(corner + hidden + offset, mask=inside, other=0.0).to(tl.float32)
    return gate, up, 1.0 / (1.0 + tl.exp(-gate)), inside


@triton.jit
def _swiglu_rows_kernel(u, rows, state, n_row, hidden, FP8: tl.constexpr, M: tl.constexpr, N: tl.constexpr) -> None:
    first_row, first_column = tl.program_id(1) * M, tl.program_id(0) * N
    gate, up, sigmoid, inside = _gates(u, first_row, first_column, n_row, hidden, M, N)
    values = gate * sigmoid * up
    _record(state, values)
    target = rows + first_row.to(tl.int64) * hidden + first_column
    offset = tl.arange(0, M)[:, None] * hidden + tl.arange(0, N)[None, :]
    tl.store(target + offset, (without_infinities(values) * tl.load(state)).to(FP8), mask=inside)


@triton.jit
def _swiglu_backward_kernel(
    g, u, h_columns, h_inverse_scale, du_rows, du_columns, state, n_row, hidden, n_row_padded,
    FP8_H: tl.constexpr, FP8_G: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
) -> None:  # fmt: skip
    first_row, first_column = tl.program_id(1) * M, tl.program_id(0) * N
    row, column = first_row + tl.arange(0, M), first_column + tl.arange(0, N)
    gate, up, sigmoid, inside = _gates(u, first_row, first_column, n_row, hidden, M, N)
    tile = tl.arange(0, M)[:, None] * hidden + tl.arange(0, N)[None, :]
    d = tl.load(g + first_row.to(tl.int64) * hidden + first_column + tile, mask=inside, other=0.0).to(tl.float32)
    silu = gate * sigmoid
    by_column = tl.arange(0, N)[:, None] * n_row_padded + tl.arange(0, M)[None, :]
    column_mask = (column[:, None] < hidden) & (row[None, :] < n_row_padded)
    h = (silu * up * inverse(tl.load(h_inverse_scale))).to(FP8_H)
    tl.store(h_columns + first_column.to(tl.int64) * n_row_padded + first_row + by_column, tl.trans(h), mask=column_mask)

    scale = tl.load(state)
    by_row = tl.arange(0, M)[:, None] * (2 * hidden) + tl.arange(0, N)[None, :]
    corner = du_rows + first_row.to(tl.int64) * (2 * hidden) + first_column
    d_up = d * silu
    d_gate = d * up * (sigmoid + silu * (1.0 - sigmoid))
    _record(state, tl.where(tl.abs(d_up) > tl.abs(d_gate), d_up, d_gate))
    q = (without_infinities(d_gate) * scale).to(FP8_G)
    tl.store(corner + by_row, q, mask=inside)
    tl.store(du_columns + first_column.to(tl.int64) * n_row_padded + first_row + by_column, tl.trans(q), mask=column_mask)
    q = (without_infinities(d_up) * scale).to(FP8_G)
    tl.store(corner + hidden + by_row, q, mask=inside)
    below = du_columns + (hidden + first_column).to(tl.int64) * n_row_padded + first_row
    tl.store(below + by_column, tl.trans(q), mask=column_mask)


def norm_rows(x: Tensor, gain: Tensor, eps: float, state: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Return the normalised x (M, K) in FP8 under the scale of `state`, and 1 / rms (M,)."""
    n_row, width = x.shape
    rows = torch.empty(x.shape, dtype=fmt.dtype, device=x.device)
    inverse_rms = torch.empty(n_row, device=x.device)
    size = triton.next_power_of_2(width)
    _norm_rows_kernel[(n_row,)](
        x, gain, rows, inverse_rms, state, eps, width, FP8=fp8_of(fmt), WIDTH=size, num_warps=4 if size <= 4096 else 8
    )
    return rows, inverse_rms


def norm_columns(x: Tensor, gain: Tensor, inverse_rms: Tensor, inverse_scale: Tensor, n_row_padded: int, fmt: Format) -> Tensor:
    """Return the transpose (K, M') of what `norm_rows` wrote."""
    n_row, width = x.shape
    columns = torch.empty(width, n_row_padded, dtype=fmt.dtype, device=x.device)
    m, n, num_warps = TILE
    _norm_columns_kernel[(triton.cdiv(width, n), triton.cdiv(n_row_padded, m))](
        x, gain, inverse_rms, inverse_scale, columns, n_row, width, n_row_padded, FP8=fp8_of(fmt), M=m, N=n, num_warps=num_warps
    )
    return columns


def norm_backward(g: Tensor, x: Tensor, gain: Tensor, inverse_rms: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x (M, K) and gain (K,), from that of the normalised x."""
    n_row, width = x.shape
    programs = min(NORM_PROGRAMS, n_row)
    dx, partial = torch.empty_like(x), torch.empty(programs, width, device=x.device)
    size = triton.next_power_of_2(width)
    _norm_backward_kernel[(programs,)](
        g, x, gain, inverse_rms, dx, partial, n_row, width, WIDTH=size, num_warps=8 if size <= 4096 else 16
    )
    return dx, partial.sum(0).to(gain.dtype)


def swiglu_rows(u: Tensor, state: Tensor, fmt: Format) -> Tensor:
    """Return silu(gate) * up (M, F) of u = [gate, up] (M, 2F) in FP8 under the scale of `state`."""
    n_row, hidden = u.shape[0], u.shape[1] // 2
    rows = torch.empty(n_row, hidden, dtype=fmt.dtype, device=u.device)
    m, n, num_warps = TILE
    _swiglu_rows_kernel[(triton.cdiv(hidden, n), triton.cdiv(n_row, m))](
        u, rows, state, n_row, hidden, FP8=fp8_of(fmt), M=m, N=n, num_warps=num_warps
    )
    return rows


def swiglu_backward(
    g: Tensor, u: Tensor, h_inverse_scale: Tensor, state: Tensor, n_row_padded: int, h_format: Format, g_format: Format
) -> tuple[Tensor, Tensor, Tensor]:
    """Return h transposed (F, M'), and the gradient of u in FP8 both ways, (M, 2F) and (2F, M')."""
    n_row, hidden = u.shape[0], u.shape[1] // 2
    h_columns = torch.empty(hidden, n_row_padded, dtype=h_format.dtype, device=u.device)
    du_rows = torch.empty(u.shape, dtype=g_format.dtype, device=u.device)
    du_columns = torch.empty(2 * hidden, n_row_padded, dtype=g_format.dtype, device=u.device)
    m, n, num_warps = BACKWARD_TILE
    _swiglu_backward_kernel[(triton.cdiv(hidden, n), triton.cdiv(n_row_padded, m))](
        g, u, h_columns, h_inverse_scale, du_rows, du_columns, state, n_row, hidden, n_row_padded,
        FP8_H=fp8_of(h_format), FP8_G=fp8_of(g_format), M=m, N=n, num_warps=num_warps,
    )  # fmt: skip
    return h_columns, du_rows, du_columns
