"""The two weights of an edge block as the tensor cores take them: BF16, or E4M3 with a scale each."""

# mypy: disable-error-code="import-not-found, no-untyped-def, untyped-decorator"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gnome.fp8.kernels.numerics import E4M3_MAX, inverse, scale_for

ROWS = 32


@dataclass(frozen=True)
class EdgeWeights:
    """Weights (D, D) for the hidden layer of an edge and for its output, or their transposes; inverse scales (BF16: 1)."""

    edge: Tensor
    out: Tensor
    edge_inverse_scale: Tensor
    out_inverse_scale: Tensor


@triton.jit
def edge_weights_kernel(weight_edge, weight_out, narrow, inverse_scales, D: tl.constexpr, ROWS: tl.constexpr, FP8: tl.constexpr):
    """Write narrow (2, D, D) and, in FP8, inverse_scales (2); a program a weight."""
    which = tl.program_id(0)
    weight = weight_edge if which == 0 else weight_out
    column = tl.arange(0, D)[None, :]
    scale = 1.0
    if FP8:
        amax = tl.zeros((ROWS,), tl.float32)
        for first in range(0, D, ROWS):
            row = first + tl.arange(0, ROWS)[:, None]
            of_rows = tl.max(tl.abs(tl.load(weight + row * D + column).to(tl.float32)), 1)
            amax = tl.where(of_rows > amax, of_rows, amax)
        scale = scale_for(tl.max(amax, 0), E4M3_MAX, 1.0)
        tl.store(inverse_scales + which, inverse(scale))
    for first in range(0, D, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        values = tl.load(weight + row * D + column).to(tl.float32)
        if FP8:
            values *= scale
        tl.store(narrow + which * D * D + row * D + column, values.to(narrow.dtype.element_ty))


def edge_weights(weight_edge: Tensor, weight_out: Tensor, fp8: bool, transposed: bool) -> EdgeWeights:
    """Cast both weights (D, D) FP32.  torch transposes: Triton 3.6 does it wrongly for some layouts of FP8 in registers."""
    width = weight_edge.shape[0]
    narrow = weight_edge.new_empty((2, width, width), dtype=torch.float8_e4m3fn if fp8 else torch.bfloat16)
    inverse_scales = weight_edge.new_ones(2, dtype=torch.float32)
    edge_weights_kernel[(2,)](
        weight_edge.contiguous(), weight_out.contiguous(), narrow, inverse_scales, D=width, ROWS=ROWS, FP8=fp8
    )
    if transposed:
        bits = narrow.view(torch.uint8 if fp8 else torch.int16)
        narrow = bits.mT.contiguous().view(narrow.dtype)
    return EdgeWeights(narrow[0], narrow[1], inverse_scales[0:], inverse_scales[1:])
