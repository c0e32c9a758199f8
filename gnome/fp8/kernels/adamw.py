"""AdamW over every parameter of a layout in one pass: read weights, moments and gradient, write weights and moments."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from gnome.fp8.formats import BLOCK
from gnome.fp8.kernels.numerics import (
    BF16_MAX,
    E4M3_MAX,
    E4M3_SMALLEST,
    FP16_MAX,
    inverse,
    mix,
    random_words,
    reciprocal_of,
    root_of,
    scale_for,
    stochastic_round,
    with_sign_of,
)

if TYPE_CHECKING:
    from gnome.fp8.optimizer_state import StateArena
    from gnome.fp8.optimizer_step import StepInputs

ROWS, NUM_WARPS = 8, 2


@triton.jit
def coefficients_of(table, group):
    """Load the coefficients of a parameter group (see `optimizer_step.COEFFICIENTS`)."""
    row = table + group * 8
    return (
        tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3),
        tl.load(row + 4), tl.load(row + 5), tl.load(row + 6), tl.load(row + 7),
    )  # fmt: skip


@triton.jit
def work_of(work):
    """Load what this program works on: a tensor, the first of its blocks here, how many."""
    item = work + tl.program_id(0) * 3
    return tl.load(item), tl.load(item + 1).to(tl.int64), tl.load(item + 2)


@triton.jit(do_not_specialize=["seed"])  # a seed of 1 would become a constant without a dtype
def _step_kernel(
    weights, weight_scale, new_weight_scale, weight_amax,
    first, first_scale, second, second_scale, gradient, gradient_scale,
    work, groups, active, coefficients, control, step, seed, first_block,
    WEIGHT: tl.constexpr, SCALED: tl.constexpr, BLOCK_STATES: tl.constexpr, EXACT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    tensor, start, count = work_of(work)
    row = tl.arange(0, ROWS)
    inside = row < count
    mask = inside[:, None]
    offset = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    weights += start * BLOCK
    first += start * BLOCK
    second += start * BLOCK
    kept, rate, beta1, rest1, root_beta2, root_rest2, eps, _ = coefficients_of(coefficients, tl.load(groups + tensor))
    g_factor = tl.load(control + 1) / tl.load(gradient_scale + start + row, mask=inside, other=1.0)
    m_factor, root_factor = tl.full((ROWS,), 1.0, tl.float32), tl.full((ROWS,), 1.0, tl.float32)
    if BLOCK_STATES:
        m_factor = inverse(tl.load(first_scale + start + row, mask=inside, other=1.0))
        root_factor = inverse(tl.load(second_scale + start + row, mask=inside, other=1.0))
    if SCALED:
        kept = kept * inverse(tl.load(weight_scale + tensor))
    g = tl.load(gradient + start * BLOCK + offset, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(first + offset, mask=mask, other=0.0).to(tl.float32)
    root = tl.load(second + offset, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weights + offset, mask=mask, other=0.0).to(tl.float32)

    m = (beta1 * m_factor)[:, None] * m + (rest1 * g_factor)[:, None] * g
    old_part = (root_beta2 * root_factor)[:, None] * root
    new_part = (root_rest2 * g_factor)[:, None] * g
    root = root_of(old_part * old_part + new_part * new_part, EXACT)
    w = kept * w - (rate * m) * reciprocal_of(root + eps, EXACT)

    # A step is skipped by writing nothing: returning early would keep every load waiting for these two.
    run = tl.where(tl.load(control) > 0, 0, tl.load(active + tensor))
    inside = row < count * run
    mask = inside[:, None]
    random = random_words(first_block + start + row, tl.arange(0, BLOCK), seed, tl.load(step))
    if BLOCK_STATES:
        m_scale = scale_for(tl.max(tl.abs(m), axis=1), E4M3_MAX, 1.0)
        root_scale = scale_for(tl.max(root, axis=1), E4M3_MAX, 1.0)
        tl.store(first_scale + start + row, m_scale, mask=inside)
        tl.store(second_scale + start + row, root_scale, mask=inside)
        # A step moves the moments by less than E4M3's spacing, and rounded to nearest they would never decay.  And the second never
        # falls to zero beside a first that has not, for that would make the update infinite.
        magnitude = stochastic_round(tl.abs(m) * m_scale[:, None], (mix(random) & 0xFFFFF).to(tl.int32), 3, 2.0**-6)
        m = with_sign_of(magnitude, m)
        rounded = stochastic_round(root * root_scale[:, None], (random & 0xFFFFF).to(tl.int32), 3, 2.0**-6)
        root = tl.where(root > 0, tl.maximum(rounded, E4M3_SMALLEST), 0.0)
    tl.store(first + offset, m.to(first.dtype.element_ty), mask=mask)
    tl.store(second + offset, root.to(second.dtype.element_ty), mask=mask)
    if SCALED:
        tl.atomic_max(weight_amax + tensor, tl.max(tl.max(tl.abs(w), axis=1), axis=0), mask=run > 0)
        w = w * tl.load(new_weight_scale + tensor)
    if WEIGHT == "fp16":
        magnitude = tl.minimum(tl.abs(w), FP16_MAX)
        w = with_sign_of(stochastic_round(magnitude, (random >> 19).to(tl.int32), 10, 0.0), w)
    elif WEIGHT == "bf16":
        magnitude = tl.minimum(tl.abs(w), BF16_MAX)
        w = with_sign_of(stochastic_round(magnitude, (random >> 16).to(tl.int32), 7, 0.0), w)
    tl.store(weights + offset, w.to(weights.dtype.element_ty), mask=mask)


def launch_step(arena: StateArena, inputs: StepInputs) -> None:
    """Update an arena's share of weights and states in place."""
    work = arena.work(ROWS)
    if not len(work):
        return
    _step_kernel[(len(work),)](
        arena.weights,
        arena.weight_scale,
        arena.new_weight_scale,
        arena.weight_amax,
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
        inputs.step,
        arena.seed,
        arena.first_block,
        WEIGHT=arena.weight_name,
        SCALED=arena.scaled,
        BLOCK_STATES=arena.states == "block",
        EXACT=not arena.weights.is_cuda,
        ROWS=ROWS,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
