"""The two passes of FP8-LM's optimizer step: largest magnitudes of every tensor, then the numbers themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from gnome.fp8.formats import BLOCK
from gnome.fp8.kernels.adamw import NUM_WARPS, ROWS, coefficients_of, work_of
from gnome.fp8.kernels.numerics import inverse, reciprocal_of, root_of

if TYPE_CHECKING:
    from gnome.fp8.optimizer_state import StateArena
    from gnome.fp8.optimizer_step import StepInputs


@triton.jit
def _pass_kernel(
    weights, weight_scale, first, first_scale, second, second_scale, gradient, gradient_scale,
    work, groups, active, coefficients, control, largest, scales, n_tensors,
    WRITE: tl.constexpr, EXACT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    tensor, start, count = work_of(work)
    row = tl.arange(0, ROWS)
    inside = row < count
    mask = inside[:, None]
    offset = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    weights += start * BLOCK
    first += start * BLOCK
    second += start * BLOCK
    kept, rate, beta1, rest1, _, root_rest2, eps, beta2 = coefficients_of(coefficients, tl.load(groups + tensor))
    factor = tl.load(control + 1) / tl.load(gradient_scale + start + row, mask=inside, other=1.0)
    g = tl.load(gradient + start * BLOCK + offset, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weights + offset, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(first + offset, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(second + offset, mask=mask, other=0.0).to(tl.float32)
    m = (beta1 * inverse(tl.load(first_scale + tensor))) * m + (rest1 * factor)[:, None] * g
    new_part = (root_rest2 * factor)[:, None] * g
    v = (beta2 * inverse(tl.load(second_scale + tensor))) * v + new_part * new_part
    w = (kept * inverse(tl.load(weight_scale + tensor))) * w - (rate * m) * reciprocal_of(root_of(v, EXACT) + eps, EXACT)
    inside = row < count * tl.where(tl.load(control) > 0, 0, tl.load(active + tensor))
    mask = inside[:, None]
    if WRITE:
        m = m * tl.load(scales + tensor)
        v = tl.where(mask, v * tl.load(scales + n_tensors + tensor), 0.0)  # numbers that are not written may be out of range
        w = tl.where(mask, w * tl.load(scales + 2 * n_tensors + tensor), 0.0)
        tl.store(first + offset, m.to(first.dtype.element_ty), mask=mask)
        tl.store(second + offset, v.to(second.dtype.element_ty), mask=mask)
        tl.store(weights + offset, w.to(weights.dtype.element_ty), mask=mask)
    else:
        tl.atomic_max(largest + tensor, _largest(m, mask))
        tl.atomic_max(largest + n_tensors + tensor, _largest(v, mask))
        tl.atomic_max(largest + 2 * n_tensors + tensor, _largest(w, mask))


@triton.jit
def _largest(x, mask):
    return tl.max(tl.max(tl.where(mask, tl.abs(x), 0.0), axis=1), axis=0)


def launch_pass(arena: StateArena, inputs: StepInputs, largest: Tensor, scales: Tensor | None) -> None:
    """Raise `largest` (3, tensors) to the magnitudes of moments and weights, or, given their scales, write them."""
    work = arena.work(ROWS)
    if not len(work):
        return
    _pass_kernel[(len(work),)](
        arena.weights,
        arena.weight_scale,
        arena.first.payload,
        arena.first.scale,
        arena.second.payload,
        arena.second.scale,
        inputs.gradient,
        inputs.gradient_scale,
        work,
        arena.groups,
        arena.active,
        inputs.coefficients,
        inputs.control,
        largest,
        largest if scales is None else scales,
        len(arena.groups),
        WRITE=scales is not None,
        EXACT=not arena.weights.is_cuda,
        ROWS=ROWS,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
