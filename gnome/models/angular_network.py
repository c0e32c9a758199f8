"""A graph network for crystals whose edges see the angles between them: a structure in, its relaxed formation energy per atom out.

Edges are updated from their ends and themselves and summed by the atom they reach (Battaglia et al., arXiv 1806.01261, without sums by
sender), in residual form (Pfaff et al., arXiv 2010.03409), which `gnome.fp8.edge_block` does in fused kernels.  Between these updates every
edge learns the angles it makes with the other edges at both its ends, through moments (see `AngularChannel`), at a cost that is linear in
the number of edges.  The mean over atoms goes back to all of them, so that one step reaches the whole cell.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gnome.crystals.elements import MAX_ATOMIC_NUMBER
from gnome.errors import InvalidInput
from gnome.fp8.edge_block import EdgeBlock, EdgeOrder
from gnome.graphs.angular_sums import angular_sums
from gnome.graphs.crystal_graph import GraphBatch
from gnome.graphs.harmonics import spherical_harmonics
from gnome.models.element_features import COVALENT_RADII, ELEMENT_FEATURES
from gnome.models.graph_network import ElementShift, segment_sum
from gnome.models.label_scale import check_label_scale, check_shape
from gnome.models.linear import at_least_fp32, make_linear

RELATIVE_RANGE = (0.6, 2.4)
"""Ratios of distances to the sum of two covalent radii that are told apart; most bonds lie near 1."""

AVERAGE_COORDINATION = 25.0
"""Edges that an atom receives on average within 5 angstrom."""


@dataclass(frozen=True, kw_only=True)
class AngularSettings:
    """Shape of the network; cutoff in angstrom, scale and shift of the output in eV/atom.

    `hidden`: width between the layers of an atom's update, twice `width` unless given.
    `n_relative`: Gaussians, besides the `n_radial` of a distance, of its ratio to the sum of its ends' radii, which are learnt and begin as
    covalent ones.  `denoises`: can tell where atoms that were moved came from, in training.
    `shifts_elements`: has a number for each element besides, which carries it over to another method's energies.
    `channels`: weights that an edge gives itself for each moment; no angles are seen when 0.  `degree`: highest of the moments.
    """

    width: int = 256
    hidden: int | None = None
    steps: int = 5
    cutoff: float = 5.0
    n_radial: int = 64
    n_relative: int = 0
    denoises: bool = False
    channels: int = 16
    degree: int = 4
    dropout: float = 0.0
    scale: float = 1.0
    shift: float = 0.0
    shifts_elements: bool = False

    def __post_init__(self) -> None:
        check_label_scale((self.scale,), (self.shift,))
        check_shape(cutoff=self.cutoff, width=self.width, steps=self.steps, n_radial=self.n_radial)
        if self.n_relative == 1 or self.n_relative < 0:
            raise InvalidInput(f"n_relative is {self.n_relative}, expected 0, or 2 or more")


class AngularChannel(nn.Module):
    """What an edge learns of the angles to the edges at its ends.

    Every edge k reaching an atom gives itself weights phi_k, and the edge e reads sum over k of phi_k P_l(cos angle(k, e)), see
    `gnome.graphs.angular_sums`.  What it reads at its other end is what its reverse reads.
    """

    def __init__(self, width: int, channels: int, degree: int) -> None:
        super().__init__()
        self.degree = degree
        self.weigh = make_linear(width, channels)
        self.norm = nn.LayerNorm(degree * channels)
        self.read = make_linear(2 * degree * channels, width)
        nn.init.zeros_(self.read.weight)
        nn.init.zeros_(self.read.bias)

    def forward(self, edges: Tensor, harmonics: Tensor, batch: GraphBatch, offsets: Tensor) -> Tensor:
        """Return what is added to the edges (E, width), from harmonics (E, degree (degree + 2)); offsets of receivers (N + 1,)."""
        weights = self.weigh(edges) / AVERAGE_COORDINATION
        read = self.norm(angular_sums(weights, harmonics, batch.receivers, offsets, self.degree).flatten(1))
        return self.read(torch.cat([read, read.index_select(0, batch.reverse)], 1))


class NodeUpdate(nn.Module):
    """Atoms from themselves, the edges they received, and the mean over the atoms of their crystal."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
        self.up = make_linear(3 * width, hidden)
        self.down = make_linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, nodes: Tensor, received: Tensor, batch: GraphBatch) -> Tensor:
        """Return new nodes (N, width)."""
        mean = graph_mean(nodes, batch).index_select(0, batch.node_graph)  # see EdgeBlock on indexing
        inputs = torch.cat([norm(x) for norm, x in zip(self.norms, (nodes, received, mean), strict=True)], 1)
        return nodes + self.down(self.dropout(functional.silu(self.up(inputs))))


def graph_mean(nodes: Tensor, batch: GraphBatch) -> Tensor:
    """Mean over the atoms of each crystal (B, width), FP32 at least."""
    return segment_sum(nodes, batch.node_graph, len(batch.n_node)) / batch.n_node[:, None]


class AngularNetwork(nn.Module):
    """Predicts e_form_per_atom (B,) of a `GraphBatch`."""

    kind = "structural-angular"
    fixed_shapes = True
    features: Tensor
    centres: Tensor

    def __init__(self, settings: AngularSettings) -> None:
        super().__init__()
        self.settings = settings
        width, steps = settings.width, settings.steps
        self.register_buffer("features", torch.from_numpy(ELEMENT_FEATURES), persistent=False)
        self.register_buffer("centres", torch.linspace(0.5, settings.cutoff, settings.n_radial), persistent=False)
        self.embed_node = nn.Embedding(MAX_ATOMIC_NUMBER + 1, width)
        self.embed_features = make_linear(ELEMENT_FEATURES.shape[1], width)
        self.embed_edge = make_linear(settings.n_radial + settings.n_relative, width)
        self.radii = nn.Parameter(torch.tensor(COVALENT_RADII)) if settings.n_relative else None
        self.move = make_linear(width, 1) if settings.denoises else None
        self.edge_blocks = nn.ModuleList([EdgeBlock(width) for _ in range(steps)])
        self.angles = nn.ModuleList(
            [AngularChannel(width, settings.channels, settings.degree) for _ in range(steps) if settings.channels]
        )
        hidden = 2 * width if settings.hidden is None else settings.hidden
        self.node_updates = nn.ModuleList([NodeUpdate(width, hidden, settings.dropout) for _ in range(steps)])
        self.norm = nn.LayerNorm(width)
        self.up = make_linear(width, width)
        self.out = make_linear(width, 1)
        self.elements = ElementShift() if settings.shifts_elements else None

    def forward(self, batch: GraphBatch) -> Tensor:
        """Predict eV/atom, shape (B,)."""
        nodes, _ = self._updated(batch)
        return self._energies(nodes, batch)

    def denoise(self, batch: GraphBatch) -> tuple[Tensor, Tensor]:
        """Predict energies, and how far each atom was moved (N, 3), angstrom, but for what all atoms of a cell share."""
        if self.move is None:
            raise InvalidInput("this network tells no moves of atoms: its setting denoises is off")
        nodes, edges = self._updated(batch)
        along = self.move(edges).float() * batch.vectors / batch.distances[:, None]
        return self._energies(nodes, batch), segment_sum(along, batch.receivers, len(nodes))

    def _updated(self, batch: GraphBatch) -> tuple[Tensor, Tensor]:
        """Return nodes (N, width) and edges (E, width) after all steps."""
        distances = batch.distances
        nodes = self.embed_node(batch.atomic_numbers) + self.embed_features(self.features[batch.atomic_numbers])
        edges = self.embed_edge(self.radial(distances, batch))
        harmonics = spherical_harmonics(batch.vectors / distances[:, None], self.settings.degree).to(edges.dtype)
        order = edge_order(batch)
        for step, (edge_block, node_update) in enumerate(zip(self.edge_blocks, self.node_updates, strict=True)):
            if self.settings.channels:
                edges = edges + self.angles[step](edges, harmonics, batch, order.receiver_offsets)
            edges, received = edge_block(nodes, edges, batch.senders, batch.receivers, order)
            nodes = node_update(nodes, received / AVERAGE_COORDINATION, batch)
        return nodes, edges

    def _energies(self, nodes: Tensor, batch: GraphBatch) -> Tensor:
        energies = self.out(functional.silu(self.up(graph_mean(self.norm(nodes), batch))))
        energies = at_least_fp32(energies)[:, 0] * self.settings.scale + self.settings.shift
        return (
            energies if self.elements is None else energies + self.elements(batch.atomic_numbers, batch.node_graph, batch.n_node)
        )

    def radial(self, distances: Tensor, batch: GraphBatch) -> Tensor:
        """Gaussians of the edges (E, n_radial + n_relative), about as wide as they lie apart, falling to zero smoothly at the cutoff."""
        cutoff, n = self.settings.cutoff, self.settings.n_radial
        gaussians = torch.exp(-(((distances[:, None] - self.centres) * (n - 1) / cutoff) ** 2))
        if self.radii is not None:
            ends = self.radii[batch.atomic_numbers]
            ratios = distances / (ends[batch.senders] + ends[batch.receivers])
            width = (RELATIVE_RANGE[1] - RELATIVE_RANGE[0]) / (self.settings.n_relative - 1)
            centres = torch.linspace(*RELATIVE_RANGE, self.settings.n_relative, device=distances.device, dtype=distances.dtype)
            gaussians = torch.cat([gaussians, torch.exp(-(((ratios[:, None] - centres) / width) ** 2))], 1)
        return gaussians * (0.5 + 0.5 * torch.cos(torch.pi * (distances / cutoff).clamp(max=1)))[:, None]

    def config(self) -> dict[str, Any]:
        """Settings as a checkpoint's card keeps them."""
        return asdict(self.settings)


def edge_order(batch: GraphBatch) -> EdgeOrder:
    """Return the order of edges by receiver, as they lie, and by sender, which is that of their reverses; nothing waits for the device."""
    nodes = torch.arange(len(batch.atomic_numbers) + 1, device=batch.receivers.device)
    offsets = torch.searchsorted(batch.receivers, nodes).int()
    return EdgeOrder(batch.senders.int(), batch.receivers.int(), offsets, None, offsets, batch.reverse.int())
