"""The two weights of an edge block as the tensor cores take them: BF16, or E4M3 with a scale each."""

# mypy: disable-error-code="import-not-found, no-untyped-def, untyped-decorator"
from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from gnome.fp8.kernels.numerics import E4M3_MAX, inverse, scale_for

ROWS = 32


@dataclass(frozen=True)
class EdgeWeights:
    """The weights of the hidden layer and of the output as products take them, and their inverse scales (2) (BF16: 1).

    `narrow` (4, D, D): weight of an edge, weight of the output, and their transposes.
    """

    narrow: Tensor
    inverse_scales: Tensor

    @classmethod
    def of(cls, weight_edge: Tensor, weight_out: Tensor, fp8: bool) -> Self:
        """Cast weights (D, D) FP32.  torch transposes: Triton 3.6 does it wrongly for some layouts of FP8 in registers."""
        width = weight_edge.shape[0]
        narrow = weight_edge.new_empty((4, width, width), dtype=torch.float8_e4m3fn if fp8 else torch.bfloat16)
        inverse_scales = weight_edge.new_ones(2, dtype=torch.float32)
        edge_weights_kernel[(2,)](
            weight_edge.contiguous(), weight_out.contiguous(), narrow, inverse_scales, D=width, ROWS=ROWS, FP8=fp8
        )
        bits = narrow.view(torch.uint8 if fp8 else torch.int16)
        bits[2:] = bits[:2].mT
        return cls(narrow, inverse_scales)

    @property
    def of_edge(self) -> tuple[Tensor, Tensor]:
        """Weight of an edge, and its inverse scale."""
        return self.narrow[0], self.inverse_scales

    @property
    def of_output(self) -> tuple[Tensor, Tensor]:
        """Weight of the output, and its inverse scale."""
        return self.narrow[1], self.inverse_scales[1:]

    @property
    def of_edge_transposed(self) -> tuple[Tensor, Tensor]:
        """Transposed weight of an edge, and its inverse scale."""
        return self.narrow[2], self.inverse_scales

    @property
    def of_output_transposed(self) -> tuple[Tensor, Tensor]:
        """Transposed weight of the output, and its inverse scale."""
        return self.narrow[3], self.inverse_scales[1:]


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
