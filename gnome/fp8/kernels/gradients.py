"""One pass from a gradient to E4M3 with a scale for every 128 numbers, added to what is stored if asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from gnome.fp8.formats import BLOCK, STOCHASTIC_FROM
from gnome.fp8.kernels.numerics import E4M3_MAX, inverse, random_words, scale_for, stochastic_round, with_sign_of

if TYPE_CHECKING:
    from gnome.fp8.gradients import GradientStore

BLOCKS_PER_PROGRAM = 32


@triton.jit(do_not_specialize=["first_block", "earlier"])  # a 1 would become a constant without a dtype
def _store_kernel(
    gradient, payload, scale, squares, numel, first_block, earlier,
    ACCUMULATE: tl.constexpr, STOCHASTIC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    index = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = index < numel
    block_inside = rows * BLOCK < numel
    g = tl.load(gradient + index, mask=inside, other=0.0).to(tl.float32)
    if ACCUMULATE:
        old_scale = tl.load(scale + rows, mask=block_inside, other=1.0)
        g += tl.load(payload + index, mask=inside, other=0.0).to(tl.float32) * inverse(old_scale)[:, None]
    magnitudes = tl.abs(g).to(tl.int32, bitcast=True)  # as integers NaN is the largest of all
    amax = tl.max(magnitudes, axis=1).to(tl.float32, bitcast=True)
    new_scale = scale_for(amax, E4M3_MAX, 1.0)
    scaled = g * new_scale[:, None]
    if STOCHASTIC:  # to nearest, what is added would be lost beside a sum 16 times as large
        random = random_words(first_block + rows, tl.arange(0, BLOCK), earlier, earlier)
        scaled = with_sign_of(stochastic_round(tl.abs(scaled), (random & 0xFFFFF).to(tl.int32), 3, 2.0**-6), scaled)
    tl.store(payload + index, scaled.to(tl.float8e4nv), mask=inside)
    tl.store(scale + rows, new_scale, mask=block_inside)
    tl.store(squares + tl.program_id(0), tl.sum(tl.sum(g * g, axis=1), axis=0))


def store_gradient(store: GradientStore, index: int, flat: Tensor, *, earlier: int) -> None:
    """Write gradient `index` of a store with block scales, or add it to `earlier` ones, its sum of squares included."""
    layout = store.layout
    n_programs = triton.cdiv(layout.blocks_of[index], BLOCKS_PER_PROGRAM)
    squares = torch.empty(n_programs, dtype=torch.float32, device=flat.device)
    _store_kernel[(n_programs,)](
        flat.contiguous(),
        layout.part(store.payload, index),
        store.scale[layout.blocks(index)],
        squares,
        flat.numel(),
        layout.starts[index] // BLOCK,
        earlier,
        ACCUMULATE=earlier > 0,
        STOCHASTIC=earlier >= STOCHASTIC_FROM,
        ROWS=BLOCKS_PER_PROGRAM,
        BLOCK=BLOCK,
        num_warps=8,
        enable_fp_fusion=False,
    )
    torch.sum(squares, dim=0, out=store.squares[index])
