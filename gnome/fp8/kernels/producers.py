"""What stands before a linear layer in a transformer, fused with the cast of its result: RMS norm and SwiGLU, and their gradients."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gnome.fp8.formats import Format
from gnome.fp8.kernels.numerics import inverse, without_infinities
from gnome.fp8.kernels.quantize import TILE, four_rows, fp8_of, magnitude_bits, record, store_packed

BACKWARD_TILE = (64, 64, 8)
NORM_PROGRAMS = 528
"""Programs of the norm's backward pass, each with a partial sum for the norm's weight."""


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
def _normed(
    x, gain, inverse_rms, scale, first_row, first_column, n_row, width, M: tl.constexpr, N: tl.constexpr, PART: tl.constexpr
):
    """Return every fourth row of a tile, normalised and scaled, FP32."""
    local = tl.arange(0, M // 4) * 4 + PART
    column = first_column + tl.arange(0, N)
    valid = first_row + local < n_row
    place = x + first_row.to(tl.int64) * width + local[:, None] * width + column[None, :]
    values = tl.load(place, mask=valid[:, None] & (column < width)[None, :], other=0.0).to(tl.float32)
    values *= tl.load(inverse_rms + first_row + local, mask=valid, other=0.0)[:, None]
    return values * tl.load(gain + column, mask=column < width, other=0.0).to(tl.float32)[None, :] * scale


@triton.jit
def _norm_columns_kernel(
    x, gain, inverse_rms, inverse_scale, columns, n_row, width, n_row_padded,
    FP8: tl.constexpr, M: tl.constexpr, N: tl.constexpr, ASSEMBLY: tl.constexpr,
) -> None:  # fmt: skip
    first_row, first_column = tl.program_id(1) * M, tl.program_id(0) * N
    scale = inverse(tl.load(inverse_scale))
    packed = four_rows(
        _normed(x, gain, inverse_rms, scale, first_row, first_column, n_row, width, M, N, 0),
        _normed(x, gain, inverse_rms, scale, first_row, first_column, n_row, width, M, N, 1),
        _normed(x, gain, inverse_rms, scale, first_row, first_column, n_row, width, M, N, 2),
        _normed(x, gain, inverse_rms, scale, first_row, first_column, n_row, width, M, N, 3),
        FP8, ASSEMBLY,
    )  # fmt: skip
    store_packed(columns, packed, first_row, first_column, width, n_row_padded, M, N)


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
def _gates(u, local, first_row, first_column, n_row, hidden, N: tl.constexpr):
    """Load gate and up (FP32) of rows first_row + local and N columns, and return the gate's sigmoid and what is inside with them."""
    column = tl.arange(0, N)[None, :]
    inside = (first_row + local[:, None] < n_row) & (first_column + column < hidden)
    corner = u + first_row.to(tl.int64) * (2 * hidden) + first_column
    place = local[:, None] * (2 * hidden) + column
    gate = tl.load(corner + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(corner + hidden + place, mask=inside, other=0.0).to(tl.float32)
    return gate, up, 1.0 / (1.0 + tl.exp(-gate)), inside


@triton.jit
def _swiglu_rows_kernel(u, rows, state, n_row, hidden, FP8: tl.constexpr, M: tl.constexpr, N: tl.constexpr) -> None:
    first_row, first_column = tl.program_id(1) * M, tl.program_id(0) * N
    gate, up, sigmoid, inside = _gates(u, tl.arange(0, M), first_row, first_column, n_row, hidden, N)
    values = gate * sigmoid * up
    record(state, magnitude_bits(values))
    target = rows + first_row.to(tl.int64) * hidden + first_column
    offset = tl.arange(0, M)[:, None] * hidden + tl.arange(0, N)[None, :]
    tl.store(target + offset, (without_infinities(values) * tl.load(state)).to(FP8), mask=inside)


@triton.jit
def _swiglu_gradient(
    g, u, du_rows, h_scale, scale, top, first_row, first_column, n_row, hidden,
    FP8_G: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Store both gradients of every fourth row of a tile in FP8; returns h and them scaled, and `top` raised to their magnitudes."""
    local = tl.arange(0, M // 4) * 4 + PART
    gate, up, sigmoid, inside = _gates(u, local, first_row, first_column, n_row, hidden, N)
    corner = g + first_row.to(tl.int64) * hidden + first_column
    d = tl.load(corner + local[:, None] * hidden + tl.arange(0, N)[None, :], mask=inside, other=0.0).to(tl.float32)
    silu = gate * sigmoid
    d_up = d * silu
    d_gate = d * up * (sigmoid + silu * (1.0 - sigmoid))
    top = tl.maximum(top, tl.maximum(magnitude_bits(d_gate), magnitude_bits(d_up)))
    d_gate, d_up = without_infinities(d_gate) * scale, without_infinities(d_up) * scale
    corner = du_rows + first_row.to(tl.int64) * (2 * hidden) + first_column
    place = local[:, None] * (2 * hidden) + tl.arange(0, N)[None, :]
    tl.store(corner + place, d_gate.to(FP8_G), mask=inside)
    tl.store(corner + hidden + place, d_up.to(FP8_G), mask=inside)
    return silu * up * h_scale, d_gate, d_up, top


@triton.jit
def _swiglu_backward_kernel(
    g, u, h_columns, h_inverse_scale, du_rows, du_columns, state, n_row, hidden, n_row_padded,
    FP8_H: tl.constexpr, FP8_G: tl.constexpr, M: tl.constexpr, N: tl.constexpr, ASSEMBLY: tl.constexpr,
) -> None:  # fmt: skip
    first_row, first_column = tl.program_id(1) * M, tl.program_id(0) * N
    h_scale, scale = inverse(tl.load(h_inverse_scale)), tl.load(state)
    top = tl.zeros((M // 4, N), tl.int32)
    h0, gate0, up0, top = _swiglu_gradient(
        g, u, du_rows, h_scale, scale, top, first_row, first_column, n_row, hidden, FP8_G, M, N, 0
    )
    h1, gate1, up1, top = _swiglu_gradient(
        g, u, du_rows, h_scale, scale, top, first_row, first_column, n_row, hidden, FP8_G, M, N, 1
    )
    h2, gate2, up2, top = _swiglu_gradient(
        g, u, du_rows, h_scale, scale, top, first_row, first_column, n_row, hidden, FP8_G, M, N, 2
    )
    h3, gate3, up3, top = _swiglu_gradient(
        g, u, du_rows, h_scale, scale, top, first_row, first_column, n_row, hidden, FP8_G, M, N, 3
    )
    record(state, top)
    packed = four_rows(h0, h1, h2, h3, FP8_H, ASSEMBLY)
    store_packed(h_columns, packed, first_row, first_column, hidden, n_row_padded, M, N)
    packed = four_rows(gate0, gate1, gate2, gate3, FP8_G, ASSEMBLY)
    store_packed(du_columns, packed, first_row, first_column, hidden, n_row_padded, M, N)
    packed = four_rows(up0, up1, up2, up3, FP8_G, ASSEMBLY)
    of_up = du_columns + tl.cast(hidden, tl.int64) * n_row_padded
    store_packed(of_up, packed, first_row, first_column, hidden, n_row_padded, M, N)


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
        x, gain, inverse_rms, inverse_scale, columns, n_row, width, n_row_padded, FP8=fp8_of(fmt), M=m, N=n, ASSEMBLY=x.is_cuda,
        num_warps=num_warps,
    )  # fmt: skip
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
        FP8_H=fp8_of(h_format), FP8_G=fp8_of(g_format), M=m, N=n, ASSEMBLY=u.is_cuda, num_warps=num_warps,
    )  # fmt: skip
    return h_columns, du_rows, du_columns
