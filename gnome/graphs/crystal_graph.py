"""Crystals as graphs: atoms are nodes, every pair of atoms within the cutoff (images included) is an edge each way.

A `PackedGraphs` keeps the graphs of many crystals in flat tensors; `GraphBatch` is a selection of them with renumbered atoms.  Edges
lie by their receivers, and each knows the edge that goes the other way, so that sums over senders need no sorting either.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from gnome.crystals.crystal import Crystal
from gnome.graphs.neighbours import find_neighbours

_ROUND = 128


@dataclass(frozen=True)
class GraphBatch:
    """Several graphs side by side.

    atomic_numbers, node_graph (N,); senders, receivers, reverse, edge_graph (E,); vectors (E, 3), angstrom; n_node (B,).
    """

    atomic_numbers: Tensor
    node_graph: Tensor
    senders: Tensor
    receivers: Tensor
    reverse: Tensor
    vectors: Tensor
    edge_graph: Tensor
    n_node: Tensor

    @property
    def distances(self) -> Tensor:
        """Lengths of the edges (E,), angstrom."""
        return self.vectors.square().sum(1).sqrt()

    def scaled(self, volume_factor: float | Tensor) -> Self:
        """Change volumes isotropically with the neighbours kept; one factor, or one for each of the first graphs."""
        if isinstance(volume_factor, Tensor):
            factors = functional.pad(volume_factor ** (1 / 3), (0, len(self.n_node) - len(volume_factor)), value=1.0)
            return replace(self, vectors=self.vectors * factors[self.edge_graph, None])
        return replace(self, vectors=self.vectors * volume_factor ** (1 / 3))

    def displaced(self, displacements: Tensor) -> Self:
        """Move atoms by (N, 3), angstrom, with the neighbours kept."""
        return replace(self, vectors=self.vectors + displacements[self.receivers] - displacements[self.senders])

    def strained(self, strains: Tensor) -> Self:
        """Deform each crystal by 1 + strain (B, 3, 3), symmetric or not, with the neighbours kept."""
        return replace(self, vectors=self.vectors + torch.einsum("ei,eij->ej", self.vectors, strains[self.edge_graph]))


@dataclass(frozen=True)
class Capacity:
    """Nodes and edges that batches are filled up to."""

    n_node: int
    n_edge: int


@dataclass(frozen=True)
class PackedGraphs:
    """Graphs of many crystals in flat tensors.

    atomic_numbers (N,) uint8; senders, receivers, reverse (E,) int32 counted within each crystal; vectors (E, 3) float32;
    node_start, edge_start (n + 1,) int64.
    """

    atomic_numbers: Tensor
    senders: Tensor
    receivers: Tensor
    reverse: Tensor
    vectors: Tensor
    node_start: Tensor
    edge_start: Tensor

    @classmethod
    def from_crystals(cls, crystals: Sequence[Crystal], cutoff: float, device: torch.device | str = "cpu") -> Self:
        """Build the graphs of gated crystals on a device: all neighbours up to `cutoff` angstrom, each pair both ways, in a fixed order."""
        numbers = _flat([crystal.atomic_numbers for crystal in crystals], np.uint8)
        lattices = _flat([crystal.lattice for crystal in crystals], np.float64).reshape(-1, 3, 3)
        coords = _flat([crystal.frac_coords for crystal in crystals], np.float64).reshape(-1, 3)
        n_atoms = torch.tensor([crystal.n_atoms for crystal in crystals], dtype=torch.long, device=device)
        edges = find_neighbours(torch.from_numpy(lattices).to(device), torch.from_numpy(coords).to(device), n_atoms, cutoff)
        return cls(
            torch.from_numpy(numbers).to(device),
            edges.senders.int(),
            edges.receivers.int(),
            edges.reverse.int(),
            edges.vectors.float(),
            _starts(n_atoms),
            _starts(edges.n_edge),
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """Join packs in their order."""
        flat = [torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)[:5]]
        starts = [_starts(torch.cat([getattr(part, name).diff() for part in parts])) for name in ("node_start", "edge_start")]
        return cls(*flat, *starts)

    def __len__(self) -> int:
        """Number of crystals."""
        return len(self.node_start) - 1

    def to(self, device: torch.device | str) -> Self:
        """Move all tensors."""
        return type(self)(*(getattr(self, field.name).to(device) for field in fields(self)))

    def batch(self, indices: Tensor) -> GraphBatch:
        """Select crystals (B,) and renumber their atoms; runs where the pack lives."""
        nodes, node_graph, node_offset = _select(self.node_start, indices)
        edges, edge_graph, edge_offset = _select(self.edge_start, indices)
        offset = node_offset[edge_graph]
        return GraphBatch(
            self.atomic_numbers[nodes].long(),
            node_graph,
            self.senders[edges].long() + offset,
            self.receivers[edges].long() + offset,
            self.reverse[edges].long() + edge_offset[edge_graph],
            self.vectors[edges],
            edge_graph,
            self.node_start[indices + 1] - self.node_start[indices],
        )

    def fixed(self, batch_size: int, rows: Tensor | None = None) -> "FixedGraphs":
        """Return the crystals in batches of one shape, which some million random batches of `rows` of them fit into but one."""
        found = []
        for start in (self.node_start, self.edge_start):
            sizes = start.diff() if rows is None else start[rows + 1] - start[rows]
            likely = batch_size * sizes.double().mean() + 5 * batch_size**0.5 * sizes.double().std(correction=0)
            found.append(_ROUND * math.ceil((float(torch.minimum(likely, batch_size * sizes.max())) + 1) / _ROUND))
        return FixedGraphs(self, batch_size, Capacity(*found))

    def padded_batch(self, indices: Tensor, capacity: Capacity) -> GraphBatch:
        """Select crystals (B,), and a last graph that fills nodes and edges up to a capacity that they fit into.

        No shape depends on which crystals they are, and nothing waits for the device.
        """
        nodes, node_graph, node_offset = _select_padded(self.node_start, indices, capacity.n_node)
        edges, edge_graph, edge_offset = _select_padded(self.edge_start, indices, capacity.n_edge)
        empty_node, empty_edge = node_graph == len(indices), edge_graph == len(indices)
        n_node, n_edge = node_offset[-1], edge_offset[-1]  # where the padding begins
        place = torch.arange(capacity.n_edge, device=edges.device)
        spread = (place - n_edge) * (capacity.n_node - n_node) // (capacity.n_edge - n_edge).clamp(min=1) + n_node
        offset = node_offset[edge_graph]
        return GraphBatch(
            torch.where(empty_node, 0, self.atomic_numbers[nodes].long()),
            node_graph,
            torch.where(empty_edge, spread, self.senders[edges].long() + offset),
            torch.where(empty_edge, spread, self.receivers[edges].long() + offset),
            torch.where(empty_edge, place, self.reverse[edges].long() + edge_offset[edge_graph]),
            torch.where(empty_edge[:, None], 1.0, self.vectors[edges]),
            edge_graph,
            torch.cat([node_offset.diff(), (capacity.n_node - n_node)[None]]),
        )


@dataclass(frozen=True)
class FixedGraphs:
    """Crystals in batches of one size, filled up to one shape."""

    pack: PackedGraphs
    batch_size: int
    capacity: Capacity

    def batch(self, indices: Tensor) -> GraphBatch:
        """Select crystals (B,), which must fit; the graph behind them is empty space."""
        return self.pack.padded_batch(indices, self.capacity)

    def fits(self, order: Tensor) -> list[bool]:
        """For each batch of an order, whether it is whole, and its nodes but for one and edges are within the capacity."""
        limits = (self.pack.node_start, self.capacity.n_node - 1), (self.pack.edge_start, self.capacity.n_edge)
        batch = torch.arange(len(order), device=order.device) // self.batch_size
        n_batches = math.ceil(len(order) / self.batch_size)
        fit = torch.bincount(batch, minlength=n_batches) == self.batch_size
        for start, limit in limits:
            sizes = start[order + 1] - start[order]
            fit &= torch.zeros(n_batches, dtype=sizes.dtype, device=order.device).index_add_(0, batch, sizes) <= limit
        return [bool(one) for one in fit.tolist()]


def _flat(arrays: Sequence[NDArray[np.generic]], dtype: type[np.generic]) -> NDArray[np.generic]:
    return np.concatenate(arrays).astype(dtype) if arrays else np.zeros(0, dtype)


def _starts(sizes: Tensor) -> Tensor:
    return functional.pad(sizes.cumsum(0), (1, 0))


def _select_padded(start: Tensor, indices: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `_select`, with positions 0 of an owner len(indices) up to a length; its begin is where they begin."""
    sizes = start[indices + 1] - start[indices]
    ends = sizes.cumsum(0)
    begin = functional.pad(ends, (1, 0))
    place = torch.arange(length, device=start.device)
    owner = torch.searchsorted(ends, place, right=True)
    first = functional.pad(start[indices], (0, 1))
    position = torch.where(owner < len(indices), first[owner] + place - begin[owner], 0)
    return position, owner, begin


def _select(start: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of the selected runs, the run each belongs to, and where each run begins in the selection."""
    sizes = start[indices + 1] - start[indices]
    owner = torch.repeat_interleave(torch.arange(len(indices), device=start.device), sizes)
    begin = sizes.cumsum(0) - sizes
    within = torch.arange(len(owner), device=start.device) - begin[owner]
    return start[indices][owner] + within, owner, begin
