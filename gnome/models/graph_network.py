"""The graph network block of GNoME: edges, then nodes, then the global state, each updated by an MLP.

Battaglia et al., arXiv 1806.01261, algorithm 1, as in google-deepmind/materials_discovery `model/gnn.py`: edges are summed apart by
sender and by receiver; sums over neighbours are divided by the average coordination of the data set, not by each atom's own.
Shapes: N nodes, E edges, B graphs, F features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch_geometric.utils import scatter

from gnome.crystals.elements import MAX_ATOMIC_NUMBER
from gnome.models.linear import MLP, at_least_fp32

AVERAGE_EDGE_COORDINATION = 17.0
"""Edges an atom has on average (GNoME release)."""


@dataclass(frozen=True)
class Topology:
    """Which graph every node and edge belongs to, and which nodes every edge joins; senders is None without edges."""

    node_graph: Tensor
    n_node: Tensor
    senders: Tensor | None = None
    receivers: Tensor | None = None
    edge_graph: Tensor | None = None


@dataclass(frozen=True)
class State:
    """Features of nodes (N, F), of edges (E, F) if there are any, and of graphs (B, F)."""

    nodes: Tensor
    edges: Tensor | None
    graphs: Tensor


def segment_sum(x: Tensor, owner: Tensor, n: int) -> Tensor:
    """Sum rows of x by owner, in FP32 at least."""
    return scatter(at_least_fp32(x), owner, dim=0, dim_size=n, reduce="sum")


class ElementShift(nn.Module):
    """A number for each element, eV/atom: what one method's energies of the elements differ from another's by, and zero at first."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(MAX_ATOMIC_NUMBER + 1))

    def forward(self, atomic_numbers: Tensor, node_graph: Tensor, n_node: Tensor) -> Tensor:
        """Return the mean over the atoms of each graph (B,)."""
        return segment_sum(self.shift[atomic_numbers], node_graph, len(n_node)) / n_node


class GraphNetworkBlock(nn.Module):
    """One update of edges, nodes and global state.

    `readout`: the last block; its global MLP gives one number a graph, and edges reach it by their plain mean.
    """

    def __init__(self, width: int, mlp_widths: Sequence[int], *, edges: bool = True, readout: bool = False) -> None:
        super().__init__()
        n_direct = 2 if edges else 0
        self.readout = readout
        self.edge_mlp = MLP([width] * 4, mlp_widths, width) if edges else None
        self.node_mlp = MLP([width] * (2 + n_direct), mlp_widths, width)
        self.global_mlp = MLP([width] * (2 + n_direct // 2), mlp_widths, 1 if readout else width)

    def forward(self, state: State, topology: Topology) -> State:
        """Update the state; shapes stay, but for the readout's graphs (B, 1)."""
        nodes, edges, graphs = state.nodes, state.edges, state.graphs
        n_nodes, n_graphs = nodes.shape[0], graphs.shape[0]
        per_node: list[Tensor] = []
        per_graph: list[Tensor] = []
        if self.edge_mlp is not None and edges is not None:
            senders, receivers, edge_graph = topology.senders, topology.receivers, topology.edge_graph
            assert senders is not None and receivers is not None and edge_graph is not None  # noqa: S101, PT018
            edges = self.edge_mlp([edges, nodes, nodes, graphs], [None, senders, receivers, edge_graph])
            sent = segment_sum(edges, senders, n_nodes)
            received = segment_sum(edges, receivers, n_nodes)
            per_node = [sent / AVERAGE_EDGE_COORDINATION, received / AVERAGE_EDGE_COORDINATION]
            total = segment_sum(sent, topology.node_graph, n_graphs)
            if self.readout:
                n_edge = segment_sum(torch.ones_like(edge_graph, dtype=sent.dtype)[:, None], edge_graph, n_graphs)
                per_graph = [total / n_edge.clamp(min=1)]
            else:
                per_graph = [total / AVERAGE_EDGE_COORDINATION / topology.n_node[:, None]]
        nodes = self.node_mlp([nodes, *per_node, graphs], [None, *(None for _ in per_node), topology.node_graph])
        mean_node = segment_sum(nodes, topology.node_graph, n_graphs) / topology.n_node[:, None]
        graphs = self.global_mlp([mean_node, *per_graph, graphs], [None] * (2 + len(per_graph)))
        return State(nodes, edges, graphs)
