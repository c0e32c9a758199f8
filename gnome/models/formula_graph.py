"""The compositional form of the GNoME network: a formula in, the lowest formation energy of its crystals out.

As in the release, elements are nodes, there are no edges, and a node's feature is its one-hot element times its atomic fraction; elements
see each other through the global state.  Labels of several correction schemes may be learnt together: each scheme has its own starting
global state, and a prediction is asked for under one scheme.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gnome.crystals.elements import MAX_ATOMIC_NUMBER
from gnome.models.formulas import FormulaBatch
from gnome.models.graph_network import GraphNetworkBlock, State, Topology
from gnome.models.label_scale import check_label_scale
from gnome.models.linear import at_least_fp32


@dataclass(frozen=True, kw_only=True)
class FormulaGraphSettings:
    """Shape of the network; scale and shift of the output in eV/atom."""

    width: int = 256
    mlp_layers: int = 2
    steps: int = 3
    n_schemes: int = 1
    scale: float = 1.0
    shift: float = -1.6526496

    def __post_init__(self) -> None:
        check_label_scale((self.scale,), (self.shift,))


class FormulaGraphNetwork(nn.Module):
    """Predicts the lowest e_form_per_atom (B,) of a `FormulaBatch`."""

    kind = "compositional"

    def __init__(self, settings: FormulaGraphSettings) -> None:
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
        used = batch.atomic_numbers > 0
        n_node = used.sum(1)
        topology = Topology(torch.repeat_interleave(n_node), n_node)
        nodes = self.embed_node(batch.atomic_numbers[used]) * batch.fractions[used][:, None] + self.embed_bias
        state = State(nodes, None, self.embed_scheme(batch.scheme))
        for block in self.blocks:
            state = block(state, topology)
        out = at_least_fp32(self.readout(state, topology).graphs[:, 0])
        return out * self.settings.scale + self.settings.shift

    def config(self) -> dict[str, Any]:
        """Settings as a checkpoint's card keeps them."""
        return asdict(self.settings)
