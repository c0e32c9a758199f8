"""Several networks that answer together: the median is the prediction, the inter-quartile range its spread (GNoME)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from gnome.crystals.crystal import Crystal
from gnome.errors import InvalidCheckpoint
from gnome.graphs.crystal_graph import PackedGraphs
from gnome.models.checkpoint import Network, load_ensemble
from gnome.models.compositional import ANSWERS, CompositionalNetwork
from gnome.models.formula_graph import FormulaGraphNetwork
from gnome.models.formulas import PackedFormulas
from gnome.models.structural import StructuralNetwork

FormulaNetwork = CompositionalNetwork | FormulaGraphNetwork
_Net = TypeVar("_Net")
MAX_EDGES_PER_BATCH = 60_000
"""Edges in one forward pass on a CPU; keeps activations in cache and memory bounded whatever the crystals."""

MAX_FORMULAS_PER_BATCH = 1024


def median_and_spread(member_energies: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Median and inter-quartile range over the first axis."""
    low, middle, high = np.percentile(member_energies, [25, 50, 75], axis=0)
    return middle, high - low


@dataclass(frozen=True)
class _Ensemble(Generic[_Net]):
    """Networks of one shape, and their card."""

    members: Sequence[_Net]
    card: Mapping[str, Any]

    @property
    def model_id(self) -> str:
        """First 16 digits of the weights' sha256."""
        return str(self.card["sha256"])[:16]

    @property
    def method(self) -> str:
        """Label of the method behind the energies it was trained on."""
        return str(self.card["method"])

    @property
    def elements(self) -> frozenset[int]:
        """Atomic numbers it was trained on."""
        return frozenset(self.card["elements"])


class StructuralEnsemble(_Ensemble[StructuralNetwork]):
    """Implements `EnergyModel` with structural networks of one shape."""

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> Self:
        """Load from disk; raises InvalidCheckpoint as `load_ensemble` does, and for weights of another kind."""
        members, card = _load(path, "structural", (StructuralNetwork.kind,), device)
        return cls([member for member in members if isinstance(member, StructuralNetwork)], card)

    @torch.inference_mode()
    def member_energies(self, crystals: Sequence[Crystal], volume_scales: Sequence[float] = (1.0,)) -> NDArray[np.float64]:
        """Predict eV/atom, shape (members, volume scales, crystals); neighbours are those of the unscaled cell."""
        out = np.empty((len(self.members), len(volume_scales), len(crystals)))
        device = next(self.members[0].parameters()).device
        graphs = PackedGraphs.from_crystals(crystals, self.members[0].settings.cutoff)
        for rows in _by_edges(graphs, MAX_EDGES_PER_BATCH if device.type == "cpu" else 100 * MAX_EDGES_PER_BATCH):
            batch = graphs.to(device).batch(rows.to(device))
            for s, scale in enumerate(volume_scales):
                scaled = batch.scaled(scale)
                for m, member in enumerate(self.members):
                    out[m, s, rows.numpy()] = member(scaled).double().cpu().numpy()
        return out


@dataclass(frozen=True)
class FormulaAnswers:
    """What an ensemble says of formulas under a method, arrays (n,), eV/atom; NaN where its networks did not learn it.

    Medians over the members, the inter-quartile ranges of e_form_per_atom (`spread`), and the mean probability of being stable.
    """

    e_form_per_atom: NDArray[np.float64]
    spread: NDArray[np.float64]
    decomposition_energy: NDArray[np.float64]
    p_stable: NDArray[np.float64]
    method: str


class CompositionalEnsemble(_Ensemble[FormulaNetwork]):
    """Implements `FormulaModel` with networks of one kind and shape, under the first label scheme of its card."""

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> Self:
        """Load from disk; raises InvalidCheckpoint as `load_ensemble` does, and for weights of another kind."""
        members, card = _load(path, "compositional", (CompositionalNetwork.kind, FormulaGraphNetwork.kind), device)
        networks = [member for member in members if isinstance(member, FormulaNetwork)]
        schemes, known = card.get("schemes", []), networks[0].settings.n_schemes
        if schemes and not (len(schemes) == known and all(isinstance(x, dict) and x.get("method") for x in schemes)):
            raise InvalidCheckpoint(f"{path.with_suffix('.json')}: schemes must name a method each, {known} in all")
        return cls(networks, card)

    @property
    def schemes(self) -> list[str]:
        """Methods of the label schemes that it learnt, in order; the first is its own."""
        return [str(scheme["method"]) for scheme in self.card.get("schemes", [])] or [self.method]

    @property
    def stability_scheme(self) -> int:
        """Number of the first scheme with decomposition energies, else 0."""
        known = self._knows_stability
        return known.index(True) if any(known) else 0

    @property
    def _knows_stability(self) -> list[bool]:
        return [bool(scheme.get("decomposition_energy")) for scheme in self.card.get("schemes", [])] or [False]

    def member_energies(self, compositions: Sequence[Mapping[int, float]]) -> NDArray[np.float64]:
        """Predict eV/atom, shape (members, compositions)."""
        return self._member_answers(compositions, scheme=0)[:, :, 0]

    def answers(self, compositions: Sequence[Mapping[int, float]]) -> FormulaAnswers:
        """Answer all that the members have learnt, under the scheme that has decomposition energies; only proportions count."""
        scheme = self.stability_scheme
        found = self._member_answers(compositions, scheme=scheme)
        e_form, spread = median_and_spread(found[:, :, 0])
        decomposition = p_stable = np.full(len(compositions), np.nan)
        if found.shape[2] > 1 and self._knows_stability[scheme]:
            decomposition = np.median(found[:, :, 1], axis=0)
            p_stable = (1 / (1 + np.exp(-found[:, :, -1]))).mean(axis=0)
        return FormulaAnswers(e_form, spread, decomposition, p_stable, self.schemes[scheme])

    @torch.inference_mode()
    def _member_answers(self, compositions: Sequence[Mapping[int, float]], *, scheme: int) -> NDArray[np.float64]:
        """Return (members, compositions, answers of a network)."""
        n_answers = ANSWERS if isinstance(self.members[0], CompositionalNetwork) else 1
        out = np.empty((len(self.members), len(compositions), n_answers))
        device = next(self.members[0].parameters()).device
        packed = PackedFormulas.from_compositions(compositions, [scheme] * len(compositions)).to(device)
        for rows, batch in packed.by_size(MAX_FORMULAS_PER_BATCH):
            for m, member in enumerate(self.members):
                out[m, rows.cpu().numpy()] = member(batch).double().cpu().numpy().reshape(len(rows), n_answers)
        return out


def _load(path: Path, name: str, kinds: Sequence[str], device: torch.device | str) -> tuple[list[Network], dict[str, Any]]:
    members, card = load_ensemble(path)
    if card["kind"] not in kinds:
        raise InvalidCheckpoint(f"{path}: an ensemble of kind {card['kind']} where a {name} one is needed")
    return [member.to(device) for member in members], card


def _by_edges(graphs: PackedGraphs, limit: int) -> list[torch.Tensor]:
    """Runs of consecutive crystals with at most `limit` edges, at least one crystal each."""
    runs, start = [], 0
    for i in range(len(graphs)):
        if i > start and int(graphs.edge_start[i + 1] - graphs.edge_start[start]) > limit:
            runs.append(torch.arange(start, i))
            start = i
    if start < len(graphs):
        runs.append(torch.arange(start, len(graphs)))
    return runs
