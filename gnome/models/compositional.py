"""The compositional form of the GNoME network: a formula in, the lowest formation energy of its crystals out.

As in the release, elements are nodes, there are no edges, and a node's feature is its one-hot element times its atomic fraction; elements
see each other through the global state.  Labels of several correction schemes may be learnt together: each scheme has its own starting
global state, and a prediction is asked for under one scheme.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from gnome.crystals.elements import MAX_ATOMIC_NUMBER
from gnome.models.graph_network import GraphNetworkBlock, State, Topology, at_least_fp32


@dataclass(frozen=True, kw_only=True)
class CompositionalSettings:
    """Shape of the network; scale and shift of the output in eV/atom."""

    width: int = 256
    mlp_layers: int = 2
    steps: int = 3
    n_schemes: int = 1
    scale: float = 1.0
    shift: float = -1.6526496


@dataclass(frozen=True)
class FormulaBatch:
    """Formulas side by side: atomic_numbers, fractions, node_graph (N,); n_node, scheme (B,)."""

    atomic_numbers: Tensor
    fractions: Tensor
    node_graph: Tensor
    n_node: Tensor
    scheme: Tensor


@dataclass(frozen=True)
class PackedFormulas:
    """Many formulas in padded tensors: atomic_numbers, fractions (n, most elements), 0 where unused; scheme (n,)."""

    atomic_numbers: Tensor
    fractions: Tensor
    scheme: Tensor

    @classmethod
    def from_compositions(cls, compositions: Sequence[Mapping[int, int]], scheme: Sequence[int] | None = None) -> Self:
        """Pack amounts by atomic number; `scheme` is the index of the label scheme of each, 0 when None."""
        most = max((len(composition) for composition in compositions), default=1)
        numbers = np.zeros((len(compositions), most), dtype=np.int64)
        fractions = np.zeros((len(compositions), most), dtype=np.float32)
        for row, composition in enumerate(compositions):
            total = sum(composition.values())
            for column, (z, amount) in enumerate(sorted(composition.items())):
                numbers[row, column] = z
                fractions[row, column] = amount / total
        schemes = torch.zeros(len(compositions), dtype=torch.long) if scheme is None else torch.tensor(list(scheme))
        return cls(torch.from_numpy(numbers), torch.from_numpy(fractions), schemes)

    def __len__(self) -> int:
        """Number of formulas."""
        return len(self.scheme)

    def to(self, device: torch.device | str) -> Self:
        """Move all tensors."""
        return type(self)(*(getattr(self, field.name).to(device) for field in fields(self)))

    def batch(self, indices: Tensor) -> FormulaBatch:
        """Select formulas (B,)."""
        numbers, fractions = self.atomic_numbers[indices], self.fractions[indices]
        used = numbers > 0
        n_node = used.sum(1)
        node_graph = torch.repeat_interleave(torch.arange(len(indices), device=numbers.device), n_node)
        return FormulaBatch(numbers[used], fractions[used], node_graph, n_node, self.scheme[indices])


class CompositionalNetwork(nn.Module):
    """Predicts the lowest e_form_per_atom (B,) of a `FormulaBatch`."""

    kind = "compositional"

    def __init__(self, settings: CompositionalSettings) -> None:
        super().__init__()
        self.settings = settings
        width, mlp_widths = settings.width, [settings.width] * settings.mlp_layers
        self.embed_node = nn.Embedding(MAX_ATOMIC_NUMBER + 1, width)
        nn.init.normal_(self.embed_node.weight, std=1.0)
        self.embed_bias = nn.Parameter(torch.zeros(width))
        self.embed_scheme = nn.Embedding(settings.n_schemes, width)
        nn.init.zeros_(self.embed_scheme.weight)
        self.blocks = nn.ModuleList([GraphNetworkBlock(width, mlp_widths, edges=False) for _ in range(settings.steps - 1)])
        self.readout = GraphNetworkBlock(width, mlp_widths, edges=False, readout=True)

    def forward(self, batch: FormulaBatch) -> Tensor:
        """Predict eV/atom, shape (B,)."""
        topology = Topology(batch.node_graph, batch.n_node)
        nodes = self.embed_node(batch.atomic_numbers) * batch.fractions[:, None] + self.embed_bias
        state = State(nodes, None, self.embed_scheme(batch.scheme))
        for block in self.blocks:
            state = block(state, topology)
        out = at_least_fp32(self.readout(state, topology).graphs[:, 0])
        return out * self.settings.scale + self.settings.shift

    def config(self) -> dict[str, Any]:
        """Settings as a checkpoint's card keeps them."""
        return asdict(self.settings)
