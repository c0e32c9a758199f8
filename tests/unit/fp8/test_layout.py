"""Where tensors lie in a flat buffer, and how it is cut among ranks."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gnome.errors import InvalidInput
from gnome.fp8.formats import BLOCK
from gnome.fp8.layout import Layout, Sharding, lay_out

SHARDINGS: tuple[Sharding, ...] = ("even", "whole")
WORLDS = range(1, 6)
numels = st.lists(st.one_of(st.integers(0, 40 * BLOCK), st.sampled_from((0, 1, BLOCK - 1, BLOCK, BLOCK + 1))), max_size=12)


def blocks_for(sizes: list[int]) -> list[int]:
    return [-(-n // BLOCK) for n in sizes]


def assert_layout(layout: Layout, sizes: list[int], world: int) -> None:
    """Check what holds for every layout."""
    assert layout.numels == tuple(sizes)
    assert layout.world == world
    assert layout.blocks_of == tuple(blocks_for(sizes))
    assert layout.numel == layout.n_blocks * BLOCK
    taken = torch.zeros(layout.n_blocks, dtype=torch.int32)
    owners = layout.owners("cpu")
    assert owners.dtype == torch.int32
    assert owners.shape == (layout.n_blocks,)
    for index, (start, n_blocks) in enumerate(zip(layout.starts, blocks_for(sizes), strict=True)):
        assert start % BLOCK == 0
        blocks = layout.blocks(index)
        assert (blocks.start * BLOCK, blocks.stop - blocks.start) == (start, n_blocks)
        assert blocks.stop <= layout.n_blocks
        taken[blocks] += 1
        assert (owners[blocks] == index).all()
    assert not (taken > 1).any()
    assert torch.equal(owners < 0, taken == 0)
    shards = [layout.shard(rank) for rank in range(world)]
    assert shards[0][0] == 0
    assert shards[-1][1] == layout.n_blocks
    assert all(before[1] == after[0] for before, after in itertools.pairwise(shards))
    assert len({last - first for first, last in shards}) == 1


@pytest.mark.parametrize("sharding", SHARDINGS)
@given(sizes=numels, world=st.integers(1, 5))
def test_every_layout(sharding: Sharding, sizes: list[int], world: int) -> None:
    assert_layout(lay_out(sizes, world=world, sharding=sharding), sizes, world)


@given(sizes=numels, world=st.integers(1, 5))
def test_even_keeps_the_order_and_shares_differ_by_padding_only(sizes: list[int], world: int) -> None:
    layout = lay_out(sizes, world=world)
    needed = sum(blocks_for(sizes))
    assert 0 <= layout.n_blocks - needed < world
    assert layout.owners("cpu").tolist() == [i for i, n in enumerate(blocks_for(sizes)) for _ in range(n)] + [-1] * (
        layout.n_blocks - needed
    )
    assert layout.starts == lay_out(sizes).starts  # the same places for any number of ranks


@given(sizes=numels, world=st.integers(1, 5))
def test_whole_never_splits_a_tensor_and_keeps_to_the_greedy_bound(sizes: list[int], world: int) -> None:
    layout = lay_out(sizes, world=world, sharding="whole")
    share = layout.n_blocks // world
    loads = [0] * world
    for index, n_blocks in enumerate(layout.blocks_of):
        blocks = layout.blocks(index)
        if n_blocks:
            rank = blocks.start // share
            assert rank * share <= blocks.start < blocks.stop <= (rank + 1) * share
            loads[rank] += n_blocks
    assert max(loads) == share  # padded to the fullest and no further
    largest = sorted(layout.blocks_of, reverse=True)
    # The tensor that ends highest was put where the least was: at most the mean of all others before it (Graham 1966).
    assert share <= sum(largest) / world + max(largest, default=0) * (1 - 1 / world)
    if len(largest) <= world:
        assert share == max(largest, default=0)


def best_share(blocks: tuple[int, ...], world: int) -> int:
    """Fewest blocks of the fullest rank over all ways to spread whole tensors."""
    loads = {(0,) * world}
    for n in blocks:
        loads = {tuple(sorted((*load[:rank], load[rank] + n, *load[rank + 1 :]))) for load in loads for rank in range(world)}
    return min(max(load) for load in loads)


@given(blocks=st.lists(st.integers(0, 9), max_size=7), world=st.integers(1, 4))
def test_whole_is_within_four_thirds_of_the_best(blocks: list[int], world: int) -> None:
    layout = lay_out([n * BLOCK for n in blocks], world=world, sharding="whole")
    # Graham, SIAM J. Appl. Math. 17 (1969) 416, theorem 2
    assert 3 * layout.n_blocks <= (4 * world - 1) * best_share(tuple(blocks), world)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_nothing_to_lay_out(sharding: Sharding, world: int) -> None:
    for sizes in ([], [0], [0, 0, 0]):
        layout = lay_out(sizes, world=world, sharding=sharding)
        assert_layout(layout, sizes, world)
        assert layout.n_blocks == 0
        assert layout.starts == (0,) * len(sizes)


def test_golden_layouts() -> None:
    even = lay_out([300, 128, 1], world=2)
    assert even.starts == (0, 384, 512)
    assert even.owners("cpu").tolist() == [0, 0, 0, 1, 2, -1]
    assert [even.shard(rank) for rank in range(2)] == [(0, 3), (3, 6)]
    # Blocks 1, 5, 3, 3, 2 on two ranks: 5 to rank 0; 3, 3 to rank 1; 2 to rank 0; 1 to rank 1.
    whole = lay_out([1, 640, 300, 384, 200], world=2, sharding="whole")
    assert whole.owners("cpu").tolist() == [1] * 5 + [4] * 2 + [2] * 3 + [3] * 3 + [0]
    assert [whole.shard(rank) for rank in range(2)] == [(0, 7), (7, 14)]


def test_parts_are_views_of_the_buffer() -> None:
    layout = lay_out([5, 130, 128], world=3)
    flat = torch.zeros(layout.numel)
    for index, numel in enumerate(layout.numels):
        part = layout.part(flat, index)
        assert part.shape == (numel,)
        part += index + 1
    assert flat.sum() == 5 + 2 * 130 + 3 * 128  # no number of a tensor is another's
    assert set(flat[layout.owners("cpu").repeat_interleave(BLOCK) < 0].tolist()) <= {0.0}


@pytest.mark.parametrize("world", [0, -3])
def test_no_ranks_is_refused(world: int) -> None:
    with pytest.raises(InvalidInput, match=f"at least one rank, not {world}"):
        lay_out([5], world=world)
