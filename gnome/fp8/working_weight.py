"""The FP8 copy of a weight that products use, made once after every change of the weight."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gnome.fp8.formats import E4M3
from gnome.fp8.scaling import Operand, padded, quantize_matrix


@dataclass
class WorkingWeight:
    """Both FP8 layouts of a weight (out, in), kept until the weight changes.

    A change is seen by the tensor's version counter, its address, or its scale's: in-place operations of torch move the counter, and
    `AdamW` of this package moves it by hand.  What is written through `.data` is not seen: call the layer's `enroll` after it.
    """

    operand: Operand | None = None
    stamp: tuple[Any, ...] = ()

    def of(self, weight: Tensor, weight_scale: Tensor | None) -> Operand:
        """Return the FP8 weight; its inverse scale takes in that of a scaled master copy."""
        stamp = _stamp(weight, weight_scale)
        if self.operand is None or stamp is None or stamp != self.stamp:
            with torch.no_grad():
                self.operand = _cast(weight.detach(), weight_scale)
            self.stamp = stamp or ()
        return self.operand

    @property
    def nbytes(self) -> int:
        """Bytes of the resident copy."""
        if self.operand is None:
            return 0
        return sum(layout.nbytes for layout in (self.operand.rows, self.operand.columns) if layout is not None)


def _cast(weight: Tensor, weight_scale: Tensor | None) -> Operand:
    if weight.dtype == E4M3.dtype:
        n_out, n_in = weight.shape
        payload = functional.pad(weight.view(torch.uint8), (0, padded(n_in) - n_in, 0, padded(n_out) - n_out))
        rows, columns = payload.view(E4M3.dtype), payload.t().contiguous().view(E4M3.dtype)
        cast = Operand(rows, columns, torch.ones((), device=weight.device))
    else:
        state = torch.ones(18, device=weight.device)
        cast = quantize_matrix(weight, state, E4M3, current=True, rows=True, columns=True)
        missing = padded(weight.shape[0]) - weight.shape[0]
        if missing and cast.rows is not None:
            cast = replace(cast, rows=functional.pad(cast.rows.view(torch.uint8), (0, 0, 0, missing)).view(E4M3.dtype))
    return cast if weight_scale is None else replace(cast, inverse_scale=cast.inverse_scale / weight_scale)


def _stamp(weight: Tensor, weight_scale: Tensor | None) -> tuple[Any, ...] | None:
    """Return what changes when the weight does; None where torch keeps no version (inference tensors)."""
    if weight.is_inference() or (weight_scale is not None and weight_scale.is_inference()):
        return None
    version = weight._version  # noqa: SLF001 - torch has no other way to ask
    scale = () if weight_scale is None else (weight_scale._version, weight_scale.data_ptr())  # noqa: SLF001
    return (version, weight.data_ptr(), weight.device, weight.shape, *scale)
