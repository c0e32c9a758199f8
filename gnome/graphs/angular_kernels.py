"""The kernels of `angular_sums`: a program gathers the moments of one atom from the edges that reach it, then gives them back to these.

Numbers of 16 bits are exact in TF32, in which products are taken; moments are rounded to it once.
"""

# mypy: disable-error-code="import-not-found, no-untyped-def, untyped-decorator"
import torch
import triton
import triton.language as tl
from torch import Tensor

from gnome.graphs.angular_sums import KERNEL_HARMONICS

BLOCK = 16
"""Edges of a tile; an atom receives some 14 within 3.5 angstrom."""


@triton.jit
def harmonics_of(harmonics, edge, end, M: tl.constexpr, PADDED: tl.constexpr):
    """Load a tile (BLOCK, PADDED); zeros where there is no edge or harmonic."""
    column = tl.arange(0, PADDED)
    mask = (edge < end)[:, None] & (column < M)[None, :]
    return tl.load(harmonics + edge.to(tl.int64)[:, None] * M + column[None, :], mask, other=0.0).to(tl.float32)


@triton.jit
def tile_at(tensor, edge, place, stride, C: tl.constexpr):
    """Return pointers (BLOCK, C) to columns from `place` on of rows of a length."""
    return tensor + edge.to(tl.int64)[:, None] * stride + place + tl.arange(0, C)[None, :]


@triton.jit
def of_degree(DEGREE: tl.constexpr, PADDED: tl.constexpr):
    """Which columns of the harmonics are of a degree."""
    column = tl.arange(0, PADDED)
    return (column >= DEGREE * DEGREE - 1) & (column < (DEGREE + 1) * (DEGREE + 1) - 1)


@triton.jit
def sums_kernel(
    weights, harmonics, sums, offsets, M: tl.constexpr, PADDED: tl.constexpr, C: tl.constexpr, DEGREES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the sums (E, DEGREES, C) of weights (E, C)."""
    begin, end = tl.load(offsets + tl.program_id(0)), tl.load(offsets + tl.program_id(0) + 1)
    moments = tl.zeros((PADDED, C), tl.float32)
    for start in range(begin, end, BLOCK):
        edge = start + tl.arange(0, BLOCK)
        y = harmonics_of(harmonics, edge, end, M, PADDED)
        w = tl.load(tile_at(weights, edge, 0, C, C), (edge < end)[:, None], other=0.0).to(tl.float32)
        moments += tl.dot(tl.trans(y), w, input_precision="tf32")
    for start in range(begin, end, BLOCK):
        edge = start + tl.arange(0, BLOCK)
        y = harmonics_of(harmonics, edge, end, M, PADDED)
        for degree in tl.static_range(1, DEGREES + 1):
            own = tl.where(of_degree(degree, PADDED)[:, None], moments, 0.0)
            read = tl.dot(y, own, input_precision="tf32").to(sums.dtype.element_ty)
            tl.store(tile_at(sums, edge, (degree - 1) * C, DEGREES * C, C), read, (edge < end)[:, None])


@triton.jit
def gradient_kernel(
    gradient, harmonics, own, offsets, M: tl.constexpr, PADDED: tl.constexpr, C: tl.constexpr, DEGREES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the weights' gradient (E, C) from that of the sums (E, DEGREES, C)."""
    begin, end = tl.load(offsets + tl.program_id(0)), tl.load(offsets + tl.program_id(0) + 1)
    moments = tl.zeros((PADDED, C), tl.float32)
    for start in range(begin, end, BLOCK):
        edge = start + tl.arange(0, BLOCK)
        y = harmonics_of(harmonics, edge, end, M, PADDED)
        for degree in tl.static_range(1, DEGREES + 1):
            g = tl.load(tile_at(gradient, edge, (degree - 1) * C, DEGREES * C, C), (edge < end)[:, None], other=0.0)
            own_y = tl.where(of_degree(degree, PADDED)[None, :], y, 0.0)
            moments += tl.dot(tl.trans(own_y), g.to(tl.float32), input_precision="tf32")
    for start in range(begin, end, BLOCK):
        edge = start + tl.arange(0, BLOCK)
        y = harmonics_of(harmonics, edge, end, M, PADDED)
        read = tl.dot(y, moments, input_precision="tf32").to(own.dtype.element_ty)
        tl.store(tile_at(own, edge, 0, C, C), read, (edge < end)[:, None])


def sums_of_weights(weights: Tensor, harmonics: Tensor, offsets: Tensor, degree: int) -> Tensor:
    """Return the sums (E, degree, C) of weights (E, C)."""
    n_edges, channels = weights.shape
    sums = torch.empty(n_edges, degree, channels, dtype=weights.dtype, device=weights.device)
    _launch(sums_kernel, weights, harmonics, sums, offsets, channels, degree)
    return sums


def gradient_of_weights(gradient: Tensor, harmonics: Tensor, offsets: Tensor) -> Tensor:
    """Return the gradient of the weights (E, C) from that of the sums (E, degree, C)."""
    n_edges, degree, channels = gradient.shape
    own = torch.empty(n_edges, channels, dtype=gradient.dtype, device=gradient.device)
    _launch(gradient_kernel, gradient, harmonics, own, offsets, channels, degree)
    return own


def _launch(kernel, given: Tensor, harmonics: Tensor, written: Tensor, offsets: Tensor, channels: int, degree: int) -> None:
    """Run a program for each atom; an edge belongs to exactly one, so that all of `written` is."""
    if len(offsets) > 1 and given.numel():
        kernel[len(offsets) - 1,](
            given.contiguous(), harmonics.contiguous(), written, offsets, M=harmonics.shape[1], PADDED=KERNEL_HARMONICS, C=channels,
            DEGREES=degree, BLOCK=BLOCK, num_warps=1,
        )  # fmt: skip
