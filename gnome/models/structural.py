"""The GNoME graph network for crystals: a structure in, its relaxed formation energy per atom out.

Constants of the released `crystal_energy_model` (google-deepmind/materials_discovery `model/crystal.py`): one-hot elements; 30
Gaussians exp(-(d - r)^2 / 0.5^2), r from 0.05 to 4 angstrom; `steps - 1` blocks and a readout block; learned swish; output scaled and
shifted per atom.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gnome.crystals.elements import MAX_ATOMIC_NUMBER
from gnome.graphs.crystal_graph import GraphBatch
from gnome.models.graph_network import ElementShift, GraphNetworkBlock, State, Topology
from gnome.models.label_scale import check_label_scale, check_shape
from gnome.models.linear import at_least_fp32, make_linear

GAUSSIAN_WIDTH = 0.5


@dataclass(frozen=True, kw_only=True)
class StructuralSettings:
    """Shape of the network; cutoff in angstrom, scale and shift of the output in eV/atom.

    `shifts_elements`: has a number for each element besides, which carries it over to another method's energies.
    """

    width: int = 256
    mlp_layers: int = 2
    steps: int = 3
    cutoff: float = 4.0
    n_gaussians: int = 30
    scale: float = 1.0
    shift: float = -1.6526496
    shifts_elements: bool = False

    def __post_init__(self) -> None:
        check_label_scale((self.scale,), (self.shift,))
        check_shape(
            cutoff=self.cutoff, width=self.width, mlp_layers=self.mlp_layers, steps=self.steps, n_gaussians=self.n_gaussians
        )


class StructuralNetwork(nn.Module):
    """Predicts e_form_per_atom (B,) of a `GraphBatch`."""

    kind = "structural"
    fixed_shapes = True
    centres: Tensor

    def __init__(self, settings: StructuralSettings) -> None:
        super().__init__()
        self.settings = settings
        width, mlp_widths = settings.width, [settings.width] * settings.mlp_layers
        self.embed_node = nn.Embedding(MAX_ATOMIC_NUMBER + 1, width)
        nn.init.normal_(self.embed_node.weight, std=1.0)
        self.embed_edge = make_linear(settings.n_gaussians, width)
        self.embed_global = nn.Parameter(torch.zeros(width))
        self.blocks = nn.ModuleList([GraphNetworkBlock(width, mlp_widths) for _ in range(settings.steps - 1)])
        self.readout = GraphNetworkBlock(width, mlp_widths, readout=True)
        self.elements = ElementShift() if settings.shifts_elements else None
        self.register_buffer("centres", torch.linspace(0.05, settings.cutoff, settings.n_gaussians), persistent=False)

    def forward(self, batch: GraphBatch) -> Tensor:
        """Predict eV/atom, shape (B,)."""
        topology = Topology(batch.node_graph, batch.n_node, batch.senders, batch.receivers, batch.edge_graph)
        gaussians = torch.exp(-(((batch.distances[:, None] - self.centres) / GAUSSIAN_WIDTH) ** 2))
        state = State(
            self.embed_node(batch.atomic_numbers),
            self.embed_edge(gaussians),
            self.embed_global.expand(len(batch.n_node), -1),
        )
        for block in self.blocks:
            state = block(state, topology)
        out = at_least_fp32(self.readout(state, topology).graphs[:, 0])
        energies = out * self.settings.scale + self.settings.shift
        return (
            energies if self.elements is None else energies + self.elements(batch.atomic_numbers, batch.node_graph, batch.n_node)
        )

    def config(self) -> dict[str, Any]:
        """Settings as a checkpoint's card keeps them."""
        return asdict(self.settings)
