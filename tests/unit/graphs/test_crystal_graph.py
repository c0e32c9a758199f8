"""Neighbours against brute force; packing and batching against single graphs."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vesin import NeighborList

from gnome.crystals.crystal import Crystal
from gnome.graphs import neighbours
from gnome.graphs.crystal_graph import Capacity, FixedGraphs, PackedGraphs
from gnome.graphs.neighbours import Edges, find_neighbours

CUTOFF = 4.0


def random_crystal(seed: int, n_atoms: int) -> Crystal:
    rng = np.random.default_rng(seed)
    lattice = np.diag(rng.uniform(3.0, 6.0, 3)) + rng.uniform(-1.0, 1.0, (3, 3))
    return Crystal(lattice, rng.integers(1, 90, n_atoms), rng.uniform(-0.5, 1.5, (n_atoms, 3)))


def edges_of(*crystals: Crystal, cutoff: float = CUTOFF) -> Edges:
    lattices = torch.from_numpy(np.stack([crystal.lattice for crystal in crystals]))
    coords = torch.from_numpy(np.concatenate([crystal.frac_coords for crystal in crystals]))
    return find_neighbours(lattices, coords, torch.tensor([crystal.n_atoms for crystal in crystals]), cutoff)


def brute_force_edges(crystal: Crystal, cutoff: float) -> list[tuple[int, int, tuple[int, ...], float]]:
    reach = 4
    edges = []
    for i in range(crystal.n_atoms):
        for j in range(crystal.n_atoms):
            for shift in np.ndindex(*(2 * reach + 1,) * 3):
                image = np.array(shift) - reach
                vector = (crystal.frac_coords[j] + image - crystal.frac_coords[i]) @ crystal.lattice
                distance = np.linalg.norm(vector)
                if distance <= cutoff and not (i == j and not image.any()):
                    edges.append((i, j, tuple(image.tolist()), round(float(distance), 8)))
    return sorted(edges)


@pytest.mark.parametrize("seed", range(4))
def test_neighbours_equal_brute_force(seed: int) -> None:
    crystal = random_crystal(seed, n_atoms=3)
    graph = edges_of(crystal)
    edges = sorted(
        (int(i), int(j), tuple(int(x) for x in shift), round(float(d), 8))
        for i, j, shift, d in zip(graph.senders, graph.receivers, graph.cell_shift, graph.vectors.norm(dim=1), strict=True)
    )
    assert edges == brute_force_edges(crystal, CUTOFF)


@given(seed=st.integers(0, 10_000), n_atoms=st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_every_edge_has_its_reverse_and_none_is_double(seed: int, n_atoms: int) -> None:
    graph = edges_of(random_crystal(seed, n_atoms))
    forward = list(zip(graph.senders.tolist(), graph.receivers.tolist(), map(tuple, graph.cell_shift.tolist()), strict=True))
    backward = {(j, i, tuple(-x for x in shift)) for i, j, shift in forward}
    assert len(set(forward)) == len(forward)
    assert set(forward) == backward
    assert (graph.receivers.diff() >= 0).all()
    turned = graph.reverse
    assert torch.equal(turned[turned], torch.arange(len(turned)))
    assert torch.equal(graph.senders[turned], graph.receivers)
    assert torch.equal(graph.vectors[turned], -graph.vectors)
    positions = random_crystal(seed, n_atoms).cart_coords
    images = positions[graph.receivers] + graph.cell_shift.numpy() @ random_crystal(seed, n_atoms).lattice
    np.testing.assert_allclose(images - positions[graph.senders], graph.vectors, atol=1e-9)


@pytest.mark.parametrize("at_once", [1, 1000, 1 << 20])
def test_neighbours_do_not_depend_on_how_many_crystals_are_tried_at_once(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    crystals = [random_crystal(seed, n_atoms) for seed, n_atoms in enumerate((3, 1, 5, 2, 4))]
    monkeypatch.setattr(neighbours, "TRIES_AT_ONCE", {"cpu": at_once})
    together, apart = edges_of(*crystals), [edges_of(crystal) for crystal in crystals]
    for field in fields(Edges):
        assert torch.equal(getattr(together, field.name), torch.cat([getattr(one, field.name) for one in apart])), field.name
    assert together.n_edge.tolist() == [len(one.senders) for one in apart]


PER_EDGE = ("senders", "receivers", "cell_shift", "vectors")


def sorted_like_theirs(graph: Edges) -> torch.Tensor:
    """The order by receiver, sender and image; oblique cells have that of another description."""
    shift = graph.cell_shift
    return torch.from_numpy(np.lexsort((shift[:, 2], shift[:, 1], shift[:, 0], graph.senders, graph.receivers)))


def test_neighbours_agree_with_vesin_in_small_flat_and_large_cells() -> None:
    rng = np.random.default_rng(0)
    oblique = np.array([[1, -3, -3], [-6, 19, 13], [-6, 19, 14]]) @ np.diag([4.0, 5.0, 6.0])
    flat, slanted = np.diag([1.5, 9.0, 3.0]), np.array([[2.6, 0, 0], [2.2, 2.4, 0], [1.1, 0.3, 8.0]])
    cells = {"oblique": (oblique, 3), "left-handed": (-oblique, 3), "flat": (flat, 2), "slanted": (slanted, 3)}
    cells |= {"large": (np.eye(3) * 12, 60), "small": (np.eye(3) * 4.0, 1)}
    crystals = [Crystal(cell, rng.integers(1, 90, n), rng.uniform(-2, 3, (n, 3))) for cell, n in cells.values()]
    for crystal in crystals:
        graph = edges_of(crystal, cutoff=5.0)
        graph = replace(graph, **{name: getattr(graph, name)[sorted_like_theirs(graph)] for name in PER_EDGE})
        senders, receivers, shift, vectors = NeighborList(cutoff=5.0, full_list=True).compute(
            points=np.ascontiguousarray(crystal.cart_coords),
            box=np.ascontiguousarray(crystal.lattice),
            periodic=True,
            quantities="ijSD",
        )
        order = np.lexsort((shift[:, 2], shift[:, 1], shift[:, 0], senders, receivers))
        for ours, theirs in ((graph.senders, senders), (graph.receivers, receivers), (graph.cell_shift, shift)):
            np.testing.assert_array_equal(ours, theirs[order].astype(np.int64))
        np.testing.assert_allclose(graph.vectors, vectors[order], atol=1e-9)


def test_pairs_at_the_cutoff_are_left_out_however_the_cell_is_turned() -> None:
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    for cell in (np.eye(3) * CUTOFF, np.eye(3) * CUTOFF @ rotation, np.eye(3) * (CUTOFF + 1e-9), np.eye(3) * (CUTOFF - 1e-9)):
        assert len(edges_of(Crystal(cell, np.array([3]), np.full((1, 3), 0.3))).senders) == 0
    assert len(edges_of(Crystal(np.eye(3) * (CUTOFF - 1e-5), np.array([3]), np.zeros((1, 3)))).senders) == 6


def test_crystals_without_neighbours_and_no_crystals_have_no_edges() -> None:
    lonely = Crystal(np.eye(3) * 20, np.array([3]), np.zeros((1, 3)))
    assert len(edges_of(lonely).senders) == 0
    pack = PackedGraphs.from_crystals([lonely, random_crystal(0, 2), lonely], CUTOFF)
    assert pack.edge_start.diff()[[0, 2]].tolist() == [0, 0]
    assert len(PackedGraphs.from_crystals([], CUTOFF)) == 0


def test_supercell_repeats_the_distances() -> None:
    crystal = random_crystal(3, 2)
    doubled = Crystal(
        crystal.lattice * np.array([[2.0], [1.0], [1.0]]),
        np.tile(crystal.atomic_numbers, 2),
        np.concatenate([(crystal.frac_coords + np.array([shift, 0, 0])) / [2, 1, 1] for shift in (0, 1)]),
    )
    single, double = (np.sort(edges_of(one).vectors.norm(dim=1)) for one in (crystal, doubled))
    np.testing.assert_allclose(double, np.repeat(single, 2), atol=1e-9)


def test_a_batch_holds_the_graphs_of_its_crystals_apart() -> None:
    crystals = [random_crystal(seed, n) for seed, n in enumerate((2, 1, 4))]
    pack = PackedGraphs.from_crystals(crystals, CUTOFF)
    batch = pack.batch(torch.tensor([2, 0, 0]))
    assert batch.n_node.tolist() == [4, 2, 2]
    assert torch.equal(batch.node_graph[batch.senders], batch.edge_graph)
    assert torch.equal(batch.node_graph[batch.receivers], batch.edge_graph)
    for row, index in enumerate((2, 0, 0)):
        graph = edges_of(crystals[index])
        mine = batch.edge_graph == row
        first = int((batch.node_graph < row).sum())
        assert torch.equal(batch.senders[mine] - first, graph.senders)
        assert torch.equal(batch.receivers[mine] - first, graph.receivers)
        torch.testing.assert_close(batch.vectors[mine], graph.vectors.float())
    torch.testing.assert_close(batch.vectors[batch.reverse], -batch.vectors)
    assert torch.equal(batch.senders[batch.reverse], batch.receivers)


def test_a_padded_batch_is_the_batch_and_a_graph_of_what_is_empty() -> None:
    pack = PackedGraphs.from_crystals([random_crystal(seed, n) for seed, n in enumerate((2, 1, 4))], CUTOFF)
    indices = torch.tensor([2, 0, 0])
    plain = pack.batch(indices)
    n_node, n_edge = len(plain.atomic_numbers), len(plain.senders)
    for capacity in (Capacity(n_node + 5, n_edge + 9), Capacity(n_node + 1, n_edge)):
        assert FixedGraphs(pack, 3, capacity).fits(indices) == [True]
        padded = FixedGraphs(pack, 3, capacity).batch(indices)
        assert (len(padded.atomic_numbers), len(padded.senders)) == (capacity.n_node, capacity.n_edge)
        for field in fields(plain):
            own, other = getattr(padded, field.name), getattr(plain, field.name)
            assert torch.equal(own[: len(other)], other), field.name
        assert padded.n_node[-1] == capacity.n_node - n_node
        assert (padded.node_graph[n_node:] == 3).all()
        assert (padded.edge_graph[n_edge:] == 3).all()
        assert (padded.senders[n_edge:] >= n_node).all()
        assert (padded.receivers.diff() >= 0).all()
        assert torch.equal(padded.reverse[padded.reverse], torch.arange(capacity.n_edge))
        assert (padded.distances > 0).all()
        factors = torch.tensor([8.0, 1.0, 0.5])
        torch.testing.assert_close(padded.scaled(factors).vectors[: len(plain.vectors)], plain.scaled(factors).vectors)
    order = torch.tensor([2, 0, 0, 1, 1, 1, 0])
    for capacity, answer in ((Capacity(n_node, n_edge), False), (Capacity(n_node + 1, n_edge - 1), False)):
        assert FixedGraphs(pack, 3, capacity).fits(order) == [answer, True, False]


def test_random_batches_fit() -> None:
    crystals = [random_crystal(seed, 1 + seed % 5) for seed in range(60)]
    pack = PackedGraphs.from_crystals(crystals, CUTOFF)
    fixed = pack.fixed(20, torch.arange(60))
    torch.manual_seed(0)
    assert all(all(fixed.fits(torch.randperm(60))) for _ in range(200))
    assert fixed.capacity.n_edge < 20 * int(pack.edge_start.diff().max())


def test_packs_join_to_the_pack_of_all() -> None:
    crystals = [random_crystal(seed, n) for seed, n in enumerate((2, 1, 4, 3))]
    whole = PackedGraphs.from_crystals(crystals, CUTOFF)
    joined = PackedGraphs.concatenate(
        [PackedGraphs.from_crystals(crystals[:1], CUTOFF), PackedGraphs.from_crystals(crystals[1:], CUTOFF)]
    )
    for name in (field.name for field in fields(PackedGraphs)):
        assert torch.equal(getattr(whole, name), getattr(joined, name)), name


def test_deforming_a_batch_is_building_it_from_deformed_crystals_where_neighbours_stay() -> None:
    crystals = [random_crystal(seed, 3) for seed in (1, 2)]
    rng = np.random.default_rng(0)
    strains, moves = rng.normal(0, 0.02, (2, 3, 3)), rng.normal(0, 0.02, (6, 3))
    pack = PackedGraphs.from_crystals(crystals, CUTOFF)
    batch = pack.batch(torch.arange(2)).strained(torch.from_numpy(strains).float()).displaced(torch.from_numpy(moves).float())
    for i, crystal in enumerate(crystals):
        lattice = crystal.lattice @ (np.eye(3) + strains[i])
        positions = crystal.frac_coords @ lattice + moves[3 * i : 3 * i + 3]
        graph = edges_of(crystal)
        expected = positions[graph.receivers] + graph.cell_shift.numpy() @ lattice - positions[graph.senders]
        found = batch.vectors[batch.edge_graph == i]
        np.testing.assert_allclose(found, expected, atol=1e-5)
    torch.testing.assert_close(batch.vectors[batch.reverse], -batch.vectors)


def test_scaling_a_batch_is_building_it_from_scaled_crystals_where_neighbours_stay() -> None:
    crystal = random_crystal(1, 2)
    scaled = edges_of(crystal.scaled(1.1), cutoff=CUTOFF * 1.1 ** (1 / 3))
    batch = PackedGraphs.from_crystals([crystal], CUTOFF).batch(torch.tensor([0]))
    for factor in (1.1, torch.tensor([1.1])):
        torch.testing.assert_close(batch.scaled(factor).vectors, scaled.vectors.float(), rtol=1e-5, atol=1e-5)
