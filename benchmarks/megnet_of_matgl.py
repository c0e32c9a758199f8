"""MEGNet (Chen et al., Chem. Mater. 31, 3564 (2019)) as matgl has it: what a user might train.

matgl imports far more than its networks need (lightning, boto3, pymatgen, ...); what is not installed is stood in for by empty classes, so
that its wheel alone, on the path, will do.  Shape and cutoff are matgl's defaults; neighbours are those that our networks get.
"""

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from gnome.crystals.elements import SYMBOLS
from gnome.graphs.crystal_graph import GraphBatch

NOT_NEEDED = {
    "ase",
    "boto3",
    "huggingface_hub",
    "lightning",
    "monty",
    "pydantic",
    "pymatgen",
    "torchdata",
    "torchmetrics",
    "tqdm",
}


@dataclass(frozen=True, kw_only=True)
class MEGNetSettings:
    """Cutoff in angstrom, scale and shift of the answer, eV/atom."""

    cutoff: float = 4.0
    scale: float = 1.0
    shift: float = 0.0


class _Empty(type):
    """A class without anything, not even members to go through."""

    def __iter__(cls) -> Iterator[Any]:
        return iter(())


class _StandIn(ModuleType):
    """A module whose every name is such a class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Empty(name, (), {})


class _Finder(MetaPathFinder, Loader):
    """Finds packages that are not needed, and their modules, as stand-ins."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Claim the modules of these packages."""
        del path, target
        return ModuleSpec(fullname, self, is_package=True) if fullname.split(".", maxsplit=1)[0] in self.names else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Make a module that has every name."""
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Leave it empty."""


def megnet_class() -> type[nn.Module]:
    """Import matgl's network."""
    missing = {name for name in NOT_NEEDED if importlib.util.find_spec(name) is None}
    finder = _Finder(missing)
    sys.meta_path.append(finder)
    try:
        from matgl.models._megnet import MEGNet
    finally:
        sys.meta_path.remove(finder)
    found: type[nn.Module] = MEGNet
    return found


class MEGNetOfMatGL(nn.Module):
    """Predicts e_form_per_atom (B,) of a `GraphBatch`."""

    def __init__(self, settings: MEGNetSettings) -> None:
        super().__init__()
        self.settings = settings
        self.network = megnet_class()(cutoff=settings.cutoff, element_types=SYMBOLS)  # by atomic number

    def forward(self, batch: GraphBatch) -> Tensor:
        """Predict eV/atom, shape (B,)."""
        n_graphs = len(batch.n_node)
        graph = SimpleNamespace(
            node_type=batch.atomic_numbers,
            pos=batch.vectors.new_zeros(len(batch.atomic_numbers), 3),
            edge_index=torch.stack([batch.senders, batch.receivers]),
            pbc_offshift=batch.vectors,
            batch=batch.node_graph,
            num_graphs=n_graphs,
        )
        answer = self.network(graph, state_attr=batch.vectors.new_zeros(n_graphs, 2))
        return answer.float().reshape(n_graphs) * self.settings.scale + self.settings.shift
