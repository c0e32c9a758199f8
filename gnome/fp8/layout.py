"""Where each tensor lies in one flat buffer, so that a single kernel or collective works on all of them.

Every tensor starts at a block of 128 numbers, and the buffer splits evenly among ranks at block boundaries.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from gnome.errors import InvalidInput
from gnome.fp8.formats import BLOCK

Sharding = Literal["even", "whole"]


@dataclass(frozen=True)
class Layout:
    """Tensors of `numels` numbers at `starts` (numbers from the beginning, multiples of 128) in a buffer of `n_blocks` blocks."""

    numels: tuple[int, ...]
    starts: tuple[int, ...]
    n_blocks: int
    world: int = 1
    blocks_of: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks_of", tuple(-(-n // BLOCK) for n in self.numels))

    @property
    def numel(self) -> int:
        """Numbers in the buffer, padding included."""
        return self.n_blocks * BLOCK

    def shard(self, rank: int) -> tuple[int, int]:
        """First and last (exclusive) block of a rank."""
        share = self.n_blocks // self.world
        return rank * share, (rank + 1) * share

    def part(self, flat: Tensor, index: int) -> Tensor:
        """View one tensor's numbers, flat."""
        return flat[self.starts[index] : self.starts[index] + self.numels[index]]

    def blocks(self, index: int) -> slice:
        """Blocks of one tensor."""
        first = self.starts[index] // BLOCK
        return slice(first, first + self.blocks_of[index])

    def owners(self, device: torch.device | str) -> Tensor:
        """Which tensor each block belongs to, int32 (n_blocks,); -1 for padding."""
        owners = torch.full((self.n_blocks,), -1, dtype=torch.int32)
        for index in range(len(self.numels)):
            owners[self.blocks(index)] = index
        return owners.to(device)


def lay_out(numels: Sequence[int], *, world: int = 1, sharding: Sharding = "even") -> Layout:
    """Lay tensors end to end for a number of ranks.

    `even`: in order, and cut at any block: shares differ by nothing but padding.  `whole`: each tensor on one rank, the largest first to
    the rank with the least so far, and every rank padded to the fullest (FP8-LM, arXiv 2310.18313, algorithm 1).
    """
    if world < 1:
        raise InvalidInput(f"a layout needs at least one rank, not {world}")
    blocks = [-(-n // BLOCK) for n in numels]
    if sharding == "even":
        firsts = list(itertools.accumulate(blocks, initial=0))
        n_blocks = -(-firsts.pop() // world) * world
    else:
        firsts, fullest = _spread_whole(blocks, world)
        n_blocks = fullest * world
    return Layout(tuple(numels), tuple(first * BLOCK for first in firsts), n_blocks, world)


def _spread_whole(blocks: Sequence[int], world: int) -> tuple[list[int], int]:
    """First block of each tensor, and the blocks of the fullest rank."""
    filled = [0] * world
    places: list[tuple[int, int]] = [(0, 0)] * len(blocks)
    for index in sorted(range(len(blocks)), key=lambda i: (-blocks[i], i)):
        rank = min(range(world), key=lambda r: (filled[r], r))
        places[index] = (rank, filled[rank])
        filled[rank] += blocks[index]
    fullest = max(filled)
    return [rank * fullest + offset for rank, offset in places], fullest
