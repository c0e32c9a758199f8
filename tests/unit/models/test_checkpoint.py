"""Ensembles on disk: what was saved comes back, what was altered is refused."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from small_networks import small_network

from gnome.crystals.crystal import Crystal
from gnome.errors import InvalidCheckpoint, OutOfMemory
from gnome.graphs.crystal_graph import GraphBatch
from gnome.models.checkpoint import load_ensemble, save_ensemble
from gnome.models.energy_model import validate_energy_model, validate_formula_model
from gnome.models.ensemble import StructuralEnsemble, median_and_spread
from gnome.models.formula_ensemble import CompositionalEnsemble
from gnome.shipped import shipped_data

CARD = {"method": "test", "elements": list(range(1, 90))}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "ensemble.safetensors"
    save_ensemble(path, [small_network(seed) for seed in range(3)], CARD)
    return path


def test_members_come_back(saved: Path, crystals: list[Crystal]) -> None:
    ensemble = StructuralEnsemble.load(saved)
    original = StructuralEnsemble([small_network(seed).eval() for seed in range(3)], CARD)
    assert ensemble.method == "test"
    assert ensemble.elements == frozenset(range(1, 90))
    assert len(ensemble.model_id) == 16
    np.testing.assert_allclose(
        ensemble.member_energies(crystals[:5]), original.member_energies(crystals[:5]), atol=2e-2
    )  # weights are kept in FP16


def test_energies_have_a_row_for_each_member_and_volume(saved: Path, crystals: list[Crystal]) -> None:
    ensemble = StructuralEnsemble.load(saved)
    energies = ensemble.member_energies(crystals, (0.9, 1.0, 1.1))
    assert energies.shape == (3, 3, len(crystals))
    np.testing.assert_allclose(energies[:, 1], ensemble.member_energies(crystals)[:, 0], atol=1e-6)
    validate_energy_model(ensemble, crystals[:4])


def test_a_precision_is_of_predictions(saved: Path, crystals: list[Crystal]) -> None:
    exact = StructuralEnsemble.load(saved).member_energies(crystals)
    rough = StructuralEnsemble.load(saved, precision="bf16").member_energies(crystals)
    assert 0 < np.abs(rough - exact).max() < 0.05
    assert rough.dtype == exact.dtype


def test_the_shipped_ensembles_keep_their_contracts(crystals: list[Crystal]) -> None:
    folder = shipped_data() / "ensembles"
    validate_energy_model(StructuralEnsemble.load(folder / "structural.safetensors"), crystals[:3])
    compositions = [crystal.composition for crystal in crystals[:6]]
    validate_formula_model(CompositionalEnsemble.load(folder / "compositional.safetensors"), compositions)


class PerCell:
    """Breaks the promise on units: its energies grow with the cell."""

    calibration = None
    method, model_id, elements = "test", "broken", frozenset(range(1, 90))

    def member_energies(self, crystals: Sequence[Crystal], volume_scales: Sequence[float] = (1.0,)) -> NDArray[np.float64]:
        return np.tile([float(crystal.n_atoms) for crystal in crystals], (2, len(volume_scales), 1))


class PerFormula:
    """The same for formulas."""

    method, model_id, elements = "test", "broken", frozenset(range(1, 90))

    def member_energies(self, compositions: Sequence[Mapping[int, int]]) -> NDArray[np.float64]:
        return np.tile([float(sum(composition.values())) for composition in compositions], (2, 1))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_batch_too_large_for_memory_is_halved(
    saved: Path, crystals: list[Crystal], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    ensemble = StructuralEnsemble.load(saved)
    volumes = (0.9, 1.0, 1.1)
    single = [[ensemble.member_energies([crystal], [volume])[:, 0, 0] for crystal in crystals] for volume in volumes]
    answers, sizes = StructuralEnsemble._answers, []

    def small(self: StructuralEnsemble, batch: GraphBatch) -> torch.Tensor:
        sizes.append(len(batch.n_node))
        if len(batch.n_node) > most:
            raise error
        return answers(self, batch)

    most = 1
    monkeypatch.setattr(StructuralEnsemble, "_answers", small)
    np.testing.assert_array_equal(ensemble.member_energies(crystals, volumes), np.moveaxis(single, 2, 0))
    assert max(sizes) > most
    most = 0
    with pytest.raises(OutOfMemory, match=r"for \w+ \([0-9a-f]{16}\), whose atoms have \d+ pairs of neighbours; leave it out"):
        ensemble.member_energies(crystals)


def test_a_broken_promise_is_named(crystals: list[Crystal]) -> None:
    with pytest.raises(AssertionError, match="a supercell has the same"):
        validate_energy_model(PerCell(), crystals[:2])
    with pytest.raises(AssertionError, match="two formula units have the same"):
        validate_formula_model(PerFormula(), [crystal.composition for crystal in crystals[:2]])


def test_a_truncated_file_is_refused(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(InvalidCheckpoint, match="truncated or altered"):
        load_ensemble(saved)


def test_a_file_with_one_changed_byte_is_refused(saved: Path) -> None:
    blob = bytearray(saved.read_bytes())
    blob[-5] ^= 1
    saved.write_bytes(bytes(blob))
    with pytest.raises(InvalidCheckpoint, match="truncated or altered"):
        load_ensemble(saved)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"settings": {"width": 16, "colour": 1}}, "do not fit"),
        ({"settings": {"width": 32, "steps": 2, "scale": 1.0, "shift": 0.0}}, "does not fit its settings"),
        ({"kind": "crystal ball"}, "unknown kind"),
        ({"card_version": 99}, "card version"),
        ({"n_members": 1}, "holds 3 members"),
        ({"settings": {"width": 16, "steps": 2}}, "scale, shift must be named"),
        ({"settings": {"width": 16, "steps": 2, "scale": 1e300, "shift": 0.0}}, "scales"),
        ({"settings": {"width": 16, "steps": 2, "scale": 1.0, "shift": float("nan")}}, "scales"),
        ({"settings": {"width": 16, "steps": 2, "scale": 10**400, "shift": 0.0}}, "do not fit"),
        ({"settings": {"width": 16, "steps": 2, "scale": 1.0, "shift": 0.0, "cutoff": float("nan")}}, "cutoff is nan"),
        ({"settings": {"width": 16, "steps": 2, "scale": 1.0, "shift": 0.0, "cutoff": -1.0}}, "cutoff is -1"),
        ({"settings": {"width": 0, "steps": 2, "scale": 1.0, "shift": 0.0}}, "width is 0"),
        ({"elements": [11, 200]}, "expected atomic numbers"),
        ({"elements": [True, 11]}, "expected atomic numbers"),
        ({"method": None}, "expected its label"),
        ({"method": " "}, "expected its label"),
    ],
)
def test_a_card_that_does_not_fit_is_refused(saved: Path, change: dict[str, object], complaint: str) -> None:
    card_path = saved.with_suffix(".json")
    card_path.write_text(json.dumps({**json.loads(card_path.read_text()), **change}))
    with pytest.raises(InvalidCheckpoint, match=complaint):
        load_ensemble(saved)


def test_missing_and_foreign_files_are_refused(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match=r"nothing\.safetensors: cannot be read \(No such file"):
        load_ensemble(tmp_path / "nothing.safetensors")
    for text in ("not json", "[" * 100_000, "9" * 5000):
        saved.with_suffix(".json").write_text(text)
        with pytest.raises(InvalidCheckpoint, match="not a card"):
            load_ensemble(saved)


def test_weights_of_another_kind_are_refused(saved: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match="kind structural where a compositional one is needed"):
        CompositionalEnsemble.load(saved)


def test_median_and_spread() -> None:
    middle, spread = median_and_spread(np.array([[1.0], [2.0], [3.0], [4.0], [10.0]]))
    assert middle.tolist() == [3.0]
    assert spread.tolist() == [2.0]
