"""Crystals a second turned into graphs, on one core and on all: ours beside the neighbour lists of vesin, ASE and pymatgen.

    python benchmarks/graph_building.py [SHARDS/structures.parquet] [--crystals 4000] [--cutoff 5]

Without a shard, the seeds that ship are taken, repeated.  Ours gives packed graphs in a fixed order with the reverse of every edge; the
others give senders, receivers, images and distances as their calls return them.  The numbers of edges are compared.
Goal: 5,000 crystals a second on 2 cores, cells of some 10 atoms.
"""

import argparse
import os
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.neighborlist import neighbor_list
from gpu_timing import conditions, print_table, write_row
from pymatgen.core import Lattice
from pymatgen.optimization.neighbors import find_points_in_spheres
from vesin import NeighborList

from gnome.crystals.crystal import Crystal
from gnome.crystals.shards import read_shard
from gnome.graphs.crystal_graph import PackedGraphs
from gnome.shipped import shipped_data


def ours(crystals: list[Crystal], cutoff: float, threads: int, device: str = "cpu") -> int:
    torch.set_num_threads(threads)
    return int(PackedGraphs.from_crystals(crystals, cutoff, device).edge_start[-1])


def of_vesin(crystals: list[Crystal], cutoff: float) -> int:
    neighbours, total = NeighborList(cutoff=cutoff, full_list=True), 0
    for crystal in crystals:
        points, box = np.ascontiguousarray(crystal.cart_coords), np.ascontiguousarray(crystal.lattice)
        senders, *_ = neighbours.compute(points=points, box=box, periodic=True, quantities="ijSD")
        total += len(senders)
    return total


def of_ase(crystals: list[Crystal], cutoff: float) -> int:
    total = 0
    for crystal in crystals:
        atoms = Atoms(numbers=crystal.atomic_numbers, cell=crystal.lattice, scaled_positions=crystal.frac_coords, pbc=True)
        senders, *_ = neighbor_list("ijSd", atoms, cutoff)
        total += len(senders)
    return total


def of_pymatgen(crystals: list[Crystal], cutoff: float) -> int:
    """Call what `Structure.get_neighbor_list` calls, without making its sites."""
    total = 0
    for crystal in crystals:
        points = np.ascontiguousarray(crystal.cart_coords)
        matrix = np.ascontiguousarray(Lattice(crystal.lattice).matrix)
        periodic = np.array([1, 1, 1], dtype=np.int64)
        *_, distances = find_points_in_spheres(points, points, cutoff, periodic, matrix, 1e-8)
        total += int((np.asarray(distances) > 1e-8).sum())  # an atom is its own neighbour there
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("structures", type=Path, nargs="?", default=shipped_data() / "seeds.parquet")
    parser.add_argument("--crystals", type=int, default=4000)
    parser.add_argument("--cutoff", type=float, default=5.0)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    known, _, _ = read_shard(options.structures)
    known = [known[i] for i in np.random.default_rng(0).permutation(len(known))[: options.crystals]]
    crystals = list(islice(cycle(known), options.crystals))
    cores = len(os.sched_getaffinity(0))
    arms: dict[str, Callable[[], int]] = {
        "ours, one core": lambda: ours(crystals, options.cutoff, 1),
        f"ours, {cores} cores": lambda: ours(crystals, options.cutoff, cores),
        "vesin, one core": lambda: of_vesin(crystals, options.cutoff),
        "ASE, one core": lambda: of_ase(crystals, options.cutoff),
        "pymatgen, one core": lambda: of_pymatgen(crystals, options.cutoff),
    }
    if torch.cuda.is_available():
        arms["ours, GPU"] = lambda: ours(crystals, options.cutoff, cores, "cuda")
    atoms = float(np.mean([crystal.n_atoms for crystal in crystals]))
    print(conditions(), f"{len(crystals)} crystals of {atoms:.1f} atoms on average, cutoff {options.cutoff:g} angstrom")
    times: dict[str, list[float]] = {name: [] for name in arms}
    edges = {}
    for _ in range(options.turns):
        for name, run in arms.items():
            began = time.perf_counter()
            edges[name] = run()
            times[name].append(time.perf_counter() - began)
    if len(set(edges.values())) > 1:
        print(f"the numbers of edges differ: {edges}")
    rows = []
    for name, own in times.items():
        rate = len(crystals) / float(np.median(own))
        rows.append((name, f"{rate:,.0f}", f"{rate * edges[name] / len(crystals):,.0f}"))
        write_row("graph_building", arm=name, crystals_per_second=rate, cutoff=options.cutoff, atoms=atoms)
    print_table(("", "crystals a second", "edges a second"), rows)


if __name__ == "__main__":
    main()
