"""Crystals deformed at random in training, and the atoms' moves that a network can learn to take back.

A network that sees moved atoms and is asked for the moves besides the energy keeps its atoms apart and overfits less (Noisy Nodes: Godwin
et al., arXiv 2106.07971).  A move common to all atoms of a cell cannot be seen and is not asked for.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gnome.graphs.crystal_graph import GraphBatch
from gnome.models.graph_network import segment_sum

if TYPE_CHECKING:
    from gnome.models.training import TrainSettings


def deformed(batch: GraphBatch, settings: "TrainSettings") -> tuple[GraphBatch, Tensor | None]:
    """Strain cells and move atoms by what torch draws, as far as the settings ask; returns the moves too (N, 3), angstrom."""
    device, dtype = batch.vectors.device, batch.vectors.dtype
    if settings.strain_jitter:
        strains = torch.randn(len(batch.n_node), 3, 3, device=device, dtype=dtype) * settings.strain_jitter
        batch = batch.strained((strains + strains.transpose(1, 2)) / 2)
    if not settings.position_jitter:
        return batch, None
    moves = torch.randn(len(batch.atomic_numbers), 3, device=device, dtype=dtype) * settings.position_jitter
    return batch.displaced(moves), moves


def denoising_error(found: Tensor, moves: Tensor, batch: GraphBatch, n_graphs: int) -> Tensor:
    """Mean absolute error of moves (N, 3) over the atoms of the first graphs, in units of the moves' own mean absolute value."""
    means = segment_sum(moves, batch.node_graph, len(batch.n_node)) / batch.n_node[:, None]
    wanted = moves - means[batch.node_graph]
    real = (batch.node_graph < n_graphs)[:, None]
    return ((found - wanted).abs() * real).sum() / (wanted.abs() * real).sum().clamp(min=1e-12)
