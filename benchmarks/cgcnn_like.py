"""A network like CGCNN (Xie & Grossman, Phys. Rev. Lett. 120, 145301 (2018)) from PyG's own layer: what a user might train.

Elements and Gaussians of the distances are embedded, `CGConv` layers with batch norm update the atoms, and a mean over them goes
through softplus layers.  Its neighbours are those that our networks get.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch_geometric.nn import CGConv, global_mean_pool

from gnome.crystals.elements import MAX_ATOMIC_NUMBER
from gnome.graphs.crystal_graph import GraphBatch


@dataclass(frozen=True, kw_only=True)
class CGCNNSettings:
    """Shape; cutoff in angstrom, scale and shift of the answer, eV/atom."""

    width: int = 128
    depth: int = 3
    hidden: int = 256
    cutoff: float = 5.0
    n_gaussians: int = 41
    scale: float = 1.0
    shift: float = 0.0


class CGCNN(nn.Module):
    """Predicts e_form_per_atom (B,) of a `GraphBatch`."""

    centres: Tensor

    def __init__(self, settings: CGCNNSettings) -> None:
        super().__init__()
        self.settings = settings
        self.embed = nn.Embedding(MAX_ATOMIC_NUMBER + 1, settings.width)
        self.convolutions = nn.ModuleList(
            [CGConv(settings.width, settings.n_gaussians, batch_norm=True) for _ in range(settings.depth)]
        )
        self.up, self.middle = nn.Linear(settings.width, settings.hidden), nn.Linear(settings.hidden, settings.hidden)
        self.out = nn.Linear(settings.hidden, 1)
        self.register_buffer("centres", torch.linspace(0, settings.cutoff, settings.n_gaussians), persistent=False)

    def forward(self, batch: GraphBatch) -> Tensor:
        """Predict eV/atom, shape (B,)."""
        step = self.settings.cutoff / (self.settings.n_gaussians - 1)
        gaussians = torch.exp(-(((batch.distances[:, None] - self.centres) / step) ** 2))
        nodes = self.embed(batch.atomic_numbers)
        ends = torch.stack([batch.senders, batch.receivers])
        for convolution in self.convolutions:
            nodes = convolution(nodes, ends, gaussians.to(nodes.dtype))
        pooled = functional.softplus(self.up(functional.softplus(global_mean_pool(nodes, batch.node_graph, len(batch.n_node)))))
        return self.out(functional.softplus(self.middle(pooled))).float()[:, 0] * self.settings.scale + self.settings.shift
