"""Several networks that answer together: the median is the prediction, the inter-quartile range its spread (GNoME)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from gnome.crystals.crystal import Crystal
from gnome.errors import InvalidCheckpoint, OutOfMemory
from gnome.fp8.edge_block import set_edge_precision
from gnome.graphs.crystal_graph import GraphBatch, PackedGraphs
from gnome.models.angular_network import AngularNetwork
from gnome.models.calibration import ErrorCalibration
from gnome.models.checkpoint import Network, load_ensemble
from gnome.models.linear import Precision, autocast
from gnome.models.memory import is_out_of_memory
from gnome.models.structural import StructuralNetwork

_Net = TypeVar("_Net")
MAX_EDGES_PER_BATCH = {"cpu": 4_000, "cuda": 6_000_000}
"""Edges in one forward pass: on a CPU what its cache holds, on a GPU what fills it; memory is bounded whatever the crystals."""


_GRAPHS_AT_ONCE = 256


def median_and_spread(member_energies: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Median and inter-quartile range over the first axis."""
    low, middle, high = np.percentile(member_energies, [25, 50, 75], axis=0)
    return middle, high - low


def calibrate_crystals(
    member_energies: NDArray[np.float64], targets: NDArray[np.float64], *, least: int | None = None
) -> dict[str, float] | None:
    """Learn from energies (members, n) of held-out crystals how far their median is off; what a card keeps as `calibration`.

    None where there are fewer than `least` of them, as of `ErrorCalibration.fit`.
    """
    medians, spreads = median_and_spread(member_energies)
    made = ErrorCalibration.fit(targets - medians, spreads, least=least)
    return None if made is None else dict(vars(made))


@dataclass(frozen=True)
class Ensemble(Generic[_Net]):
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


CrystalNetwork = StructuralNetwork | AngularNetwork
"""Networks that take crystals."""


@dataclass(frozen=True)
class StructuralEnsemble(Ensemble[CrystalNetwork]):
    """Implements `EnergyModel` with structural networks of one shape.

    `precision`: of predictions; on GPUs BF16 is faster and answers change by a meV/atom or two, and with the batch.
    """

    precision: Precision = "fp32"
    kinds: ClassVar[tuple[str, ...]] = (StructuralNetwork.kind, AngularNetwork.kind)

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu", precision: Precision = "fp32") -> Self:
        """Load from disk; raises InvalidCheckpoint as `load_ensemble` does, and for weights of another kind."""
        members, card = load_kind(path, "structural", cls.kinds, device)
        loaded = cls([member for member in members if isinstance(member, CrystalNetwork)], card, precision)
        try:
            _ = loaded.calibration
        except (TypeError, ValueError) as error:
            advice = "take the file anew, or train it with this version"
            raise InvalidCheckpoint(f"{path.with_suffix('.json')}: its calibration cannot be read ({error}); {advice}") from None
        return loaded

    @property
    def calibration(self) -> ErrorCalibration | None:
        """How far its medians are off, by the spread over its members; None where its card does not say."""
        kept = self.card.get("calibration")
        return None if kept is None else ErrorCalibration(**kept)

    @property
    def cutoff(self) -> float:
        """How far its networks see, angstrom."""
        return self.members[0].settings.cutoff

    def lonely_atoms(self, crystals: Sequence[Crystal]) -> NDArray[np.int64]:
        """Count the atoms of each crystal, shape (crystals,), that have no neighbour within the networks' cutoff."""
        counts = np.zeros(len(crystals), dtype=np.int64)
        for start in range(0, len(crystals), _GRAPHS_AT_ONCE):
            some = crystals[start : start + _GRAPHS_AT_ONCE]
            batch = PackedGraphs.from_crystals(some, self.cutoff).batch(torch.arange(len(some)))
            alone = torch.bincount(batch.receivers, minlength=len(batch.node_graph)) == 0
            counts[start : start + len(some)] = torch.bincount(batch.node_graph[alone], minlength=len(some)).numpy()
        return counts

    @torch.inference_mode()
    def member_energies(self, crystals: Sequence[Crystal], volume_scales: Sequence[float] = (1.0,)) -> NDArray[np.float64]:
        """Predict eV/atom, shape (members, volume scales, crystals); neighbours are those of the unscaled cell.

        Crystals and volumes go through the networks side by side, as many as fill a batch; one that memory is too small for is halved.
        Raises OutOfMemory where that is one crystal.
        """
        for member in self.members:
            set_edge_precision(member, self.precision)
        device = next(self.members[0].parameters()).device
        graphs = PackedGraphs.from_crystals(crystals, self.cutoff, device)
        n_scales = len(volume_scales)
        scales = torch.tensor(volume_scales, dtype=torch.float64)
        edges = graphs.edge_start.diff().repeat_interleave(n_scales)
        out = np.empty((len(self.members), len(edges)))
        waiting = _by_edges(edges.cumsum(0).cpu().numpy(), MAX_EDGES_PER_BATCH[device.type])
        while waiting:
            asked = waiting.pop()
            try:
                batch = graphs.batch((asked // n_scales).to(device)).scaled(scales[asked % n_scales].float().to(device))
                out[:, asked.numpy()] = self._answers(batch).cpu().numpy()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if len(asked) == 1:
                    crystal = crystals[int(asked[0]) // n_scales]
                    raise OutOfMemory(
                        f"memory does not suffice for {crystal.reduced_formula} ({crystal.id}), whose atoms have {int(edges[asked[0]])} "
                        "pairs of neighbours; leave it out"
                    ) from error
                waiting += asked.chunk(2)
        return np.ascontiguousarray(out.reshape(len(self.members), len(crystals), n_scales).swapaxes(1, 2))

    def _answers(self, batch: GraphBatch) -> torch.Tensor:
        """Predict (members, graphs) of one batch."""
        with autocast(self.precision, batch.vectors.device):
            return torch.stack([member(batch).double() for member in self.members])


def load_kind(path: Path, name: str, kinds: Sequence[str], device: torch.device | str) -> tuple[list[Network], dict[str, Any]]:
    """Load an ensemble of networks of these kinds to a device; raises InvalidCheckpoint for weights of another."""
    members, card = load_ensemble(path)
    if card["kind"] not in kinds:
        raise InvalidCheckpoint(f"{path}: an ensemble of kind {card['kind']} where a {name} one is needed")
    return [member.to(device) for member in members], card


def _by_edges(ends: NDArray[np.int64], limit: int) -> list[torch.Tensor]:
    """Runs of consecutive graphs, whose edges end at `ends`, with at most `limit` edges, at least one graph each."""
    runs, start = [], 0
    while start < len(ends):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + limit, side="right")))
        runs.append(torch.arange(start, stop))
        start = stop
    return runs
