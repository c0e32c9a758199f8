"""The mean of E4M3 gradients over ranks in one pass, and what FP8-LM's sum needs before and after it.

Programs work on pieces: up to 32 blocks of one tensor, so that a program's sums belong to one tensor and are added again in a fixed order.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from gnome.fp8.formats import BLOCK
from gnome.fp8.kernels.numerics import E4M3_MAX, inverse, scale_for

if TYPE_CHECKING:
    from gnome.fp8.layout import Layout

BLOCKS_PER_PROGRAM = 32
_WIDTH = 1024


@dataclass(frozen=True)
class Pieces:
    """A range of blocks cut where tensors begin and at multiples of `step` blocks.

    `table` (pieces, 3) int32 on the device: first block from the range's beginning, number of blocks, tensor.  `of_span`: first piece of
    every span of `step` blocks, and the number of pieces.  `of_tensor` (tensors, 2) int32: first and last (exclusive) piece of a tensor;
    none has more than `most`.
    """

    table: Tensor
    of_span: tuple[int, ...]
    of_tensor: Tensor
    most: int


@functools.lru_cache(maxsize=16)
def cut(layout: Layout, first: int, last: int, step: int, device: torch.device) -> Pieces:
    """Cut blocks `first` to `last` of a layout; tensors lie in the order of their places, so a tensor's pieces follow each other."""
    rows: list[Tensor] = []
    of_tensor = torch.zeros(len(layout.numels), 2, dtype=torch.int32)
    n_pieces = 0
    for index in sorted(range(len(layout.numels)), key=lambda i: layout.starts[i]):
        blocks = layout.blocks(index)
        of_tensor[index, 0] = n_pieces
        begin, end = max(blocks.start, first) - first, min(blocks.stop, last) - first
        while begin < end:
            stop = min(end, (begin // step + 1) * step)
            firsts = torch.arange(begin, stop, BLOCKS_PER_PROGRAM)
            rows.append(
                torch.stack([firsts, (stop - firsts).clamp(max=BLOCKS_PER_PROGRAM), torch.full_like(firsts, index)], dim=1)
            )
            n_pieces += len(firsts)
            begin = stop
        of_tensor[index, 1] = n_pieces
    table = torch.cat(rows).int() if rows else torch.zeros(0, 3, dtype=torch.int32)
    edges = torch.arange(0, last - first + step, step)
    of_span = torch.searchsorted(table[:, 0].long().contiguous(), edges)
    most = int((of_tensor[:, 1] - of_tensor[:, 0]).max())
    return Pieces(table.to(device), tuple(of_span.tolist()), of_tensor.to(device), most)


@triton.jit(do_not_specialize=["first_piece", "begin"])
def _mean_kernel(
    received, scales, payload, scale, squares, pieces, first_piece, begin, span_numel, share, inverse_ranks,
    RANKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    piece = tl.program_id(0).to(tl.int64) + first_piece
    rows = tl.load(pieces + 3 * piece).to(tl.int64) + tl.arange(0, ROWS)
    inside = tl.arange(0, ROWS) < tl.load(pieces + 3 * piece + 1)
    columns = tl.arange(0, BLOCK)[None, :]
    there = (rows - begin)[:, None] * BLOCK + columns
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for _ in range(RANKS):  # always in this order
        its_scale = tl.load(scales + rows, mask=inside, other=1.0)
        part = tl.load(received + there, mask=inside[:, None], other=0.0)
        total += part.to(tl.float32) * inverse(its_scale)[:, None]
        scales += share
        received += span_numel
    mean = total * inverse_ranks
    magnitudes = tl.abs(mean).to(tl.int32, bitcast=True)  # as integers NaN is the largest of all
    amax = tl.max(magnitudes, axis=1).to(tl.float32, bitcast=True)
    new_scale = scale_for(amax, E4M3_MAX, 1.0)
    stored = (mean * new_scale[:, None]).to(tl.float8e4nv)
    tl.store(payload + rows[:, None] * BLOCK + columns, stored, mask=inside[:, None])
    tl.store(scale + rows, new_scale, mask=inside)
    tl.store(squares + piece, tl.sum(tl.sum(mean * mean, axis=1), axis=0))


@triton.jit
def _rescale_kernel(payload, factor, pieces, ROWS: tl.constexpr, BLOCK: tl.constexpr) -> None:
    piece = tl.program_id(0).to(tl.int64)
    rows = tl.load(pieces + 3 * piece).to(tl.int64) + tl.arange(0, ROWS)
    inside = (tl.arange(0, ROWS) < tl.load(pieces + 3 * piece + 1))[:, None]
    times = tl.load(factor + tl.load(pieces + 3 * piece + 2))
    index = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(payload + index, mask=inside, other=0.0).to(tl.float32) * times
    tl.store(payload + index, x.to(tl.float8e4nv), mask=inside)


@triton.jit
def _census_kernel(payload, squares, saturated, pieces, ROWS: tl.constexpr, BLOCK: tl.constexpr) -> None:
    piece = tl.program_id(0).to(tl.int64)
    rows = tl.load(pieces + 3 * piece).to(tl.int64) + tl.arange(0, ROWS)
    inside = (tl.arange(0, ROWS) < tl.load(pieces + 3 * piece + 1))[:, None]
    index = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(payload + index, mask=inside, other=0.0).to(tl.float32)
    full = tl.where(tl.abs(x) == E4M3_MAX, 1.0, 0.0)
    tl.store(squares + piece, tl.sum(tl.sum(x * x, axis=1), axis=0))
    tl.store(saturated + piece, tl.sum(tl.sum(full, axis=1), axis=0))


@triton.jit
def _total_kernel(values, of_tensor, totals, TURNS: tl.constexpr, WIDTH: tl.constexpr) -> None:
    tensor = tl.program_id(0)
    first = tl.load(of_tensor + 2 * tensor)
    last = tl.load(of_tensor + 2 * tensor + 1)
    total = tl.zeros((WIDTH,), tl.float32)
    for turn in range(TURNS):
        at = first + turn * WIDTH + tl.arange(0, WIDTH)
        total += tl.load(values + at, mask=at < last, other=0.0)
    tl.store(totals + tensor, tl.sum(total, axis=0))


class KernelReduction:
    """The arithmetic of a reduction on blocks `first` to `last` of a layout, in spans of `step` blocks; see `TorchReduction`."""

    def __init__(self, layout: Layout, first: int, last: int, step: int, device: torch.device) -> None:
        self._pieces = cut(layout, first, last, step, device)
        self._step = step
        self._squares = torch.zeros(len(self._pieces.table), device=device)

    def mean(self, received: Tensor, scales: Tensor, begin: int, payload: Tensor, scale: Tensor) -> None:
        """Write the mean of a span that begins at block `begin` of the range.

        received (ranks, numbers of the span) E4M3; scales (ranks, blocks of the range), powers of two; payload and scale of the range are
        written.
        """
        span = begin // self._step
        first, last = self._pieces.of_span[span : span + 2]
        if first == last:
            return
        ranks, share = scales.shape
        _mean_kernel[(last - first,)](
            received, scales, payload, scale, self._squares, self._pieces.table, first, begin, received.shape[1], share, 1 / ranks,
            RANKS=ranks, ROWS=BLOCKS_PER_PROGRAM, BLOCK=BLOCK, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip

    def squares(self) -> Tensor:
        """Sum of squares of each tensor over the spans done."""
        return self._totals(self._squares)

    def rescale(self, payload: Tensor, factor: Tensor) -> None:
        """Multiply the payload of each tensor by its factor, in place."""
        grid = (len(self._pieces.table),)
        if grid[0]:
            _rescale_kernel[grid](payload, factor, self._pieces.table, ROWS=BLOCKS_PER_PROGRAM, BLOCK=BLOCK, num_warps=8)

    def census(self, payload: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of squares of each tensor's payload, scales left out, and the count of its numbers at +-448."""
        saturated = torch.zeros_like(self._squares)
        grid = (len(self._pieces.table),)
        if grid[0]:
            _census_kernel[grid](
                payload, self._squares, saturated, self._pieces.table, ROWS=BLOCKS_PER_PROGRAM, BLOCK=BLOCK, num_warps=8,
                enable_fp_fusion=False,
            )  # fmt: skip
        return self._totals(self._squares), self._totals(saturated)

    def _totals(self, values: Tensor) -> Tensor:
        totals = torch.zeros(len(self._pieces.of_tensor), device=values.device)
        turns = triton.next_power_of_2(triton.cdiv(self._pieces.most, _WIDTH))
        _total_kernel[(len(totals),)](values, self._pieces.of_tensor, totals, TURNS=turns, WIDTH=_WIDTH, num_warps=4)
        return totals
