"""The contracts of what predicts formation energies, whatever network is behind it, and their checks."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gnome.crystals.crystal import Crystal
from gnome.crystals.elements import MAX_ATOMIC_NUMBER
from gnome.models.calibration import ErrorCalibration


class EnergyModel(Protocol):
    """An ensemble that predicts e_form_per_atom of crystals, unrelaxed ones included."""

    @property
    def model_id(self) -> str:
        """Hash of the weights."""
        ...

    @property
    def method(self) -> str:
        """Label of the method behind the energies it was trained on."""
        ...

    @property
    def elements(self) -> frozenset[int]:
        """Atomic numbers it was trained on; others are refused by whoever calls it."""
        ...

    @property
    def calibration(self) -> ErrorCalibration | None:
        """How far its medians are off, by the spread over its members; None where that was never measured."""
        ...

    def member_energies(self, crystals: Sequence[Crystal], volume_scales: Sequence[float] = (1.0,)) -> NDArray[np.float64]:
        """Predict eV/atom, shape (members, volume scales, crystals); neighbours are those of the unscaled cell."""
        ...


class FormulaModel(Protocol):
    """An ensemble that predicts the lowest e_form_per_atom of compositions."""

    @property
    def model_id(self) -> str:
        """Hash of the weights."""
        ...

    @property
    def method(self) -> str:
        """Label of the method behind the energies it was trained on."""
        ...

    @property
    def elements(self) -> frozenset[int]:
        """Atomic numbers it was trained on."""
        ...

    def member_energies(self, compositions: Sequence[Mapping[int, int]]) -> NDArray[np.float64]:
        """Predict eV/atom, shape (members, compositions)."""
        ...


def validate_energy_model(
    model: EnergyModel, crystals: Sequence[Crystal], *, scales: Sequence[float] = (0.9, 1.0, 1.1), tolerance: float = 1e-4
) -> None:
    """Check an ensemble against the contract of `EnergyModel`; every implementation's test calls this.

    `tolerance` eV/atom is between answers that should be the same.  Raises AssertionError naming the promise that was broken.
    """
    _validate_labels(model)
    before = [crystal.to_dict() for crystal in crystals]
    energies = model.member_energies(crystals, scales)
    shape = (len(energies), len(scales), len(crystals))
    _promise(energies.shape == shape, f"(members, scales, crystals) is {shape}, got {energies.shape}")
    _promise([crystal.to_dict() for crystal in crystals] == before, "crystals are not changed")
    _promise(bool(np.isfinite(energies).all()), "energies are finite")

    def same(others: Sequence[Crystal], what: str) -> None:
        found = np.concatenate([model.member_energies([other], scales) for other in others], axis=2)
        worst = float(np.abs(found - energies).max())
        _promise(worst <= tolerance, f"{what}, they differ by {worst:.2e} eV/atom")

    same(crystals, "a batch answers as its crystals one by one")
    same([_reversed(crystal) for crystal in crystals], "the order of atoms does not matter")
    same([_turned(crystal) for crystal in crystals], "the orientation does not matter")
    same([_doubled(crystal) for crystal in crystals], "energies are per atom, so a supercell has the same")
    plain = model.member_energies(crystals)
    only_one = model.member_energies(crystals, (1.0,))
    _promise(
        plain.shape[1] == 1 and float(np.abs(plain - only_one).max()) <= tolerance, "the cell as it is, where no scale is named"
    )
    _promise(model.member_energies([], scales).shape == (len(energies), len(scales), 0), "nothing asked is nothing answered")


def validate_formula_model(model: FormulaModel, compositions: Sequence[Mapping[int, int]], *, tolerance: float = 1e-4) -> None:
    """Check an ensemble against the contract of `FormulaModel`; every implementation's test calls this.

    Raises AssertionError naming the promise that was broken.
    """
    _validate_labels(model)
    before = [dict(composition) for composition in compositions]
    energies = model.member_energies(compositions)
    shape = (len(energies), len(compositions))
    _promise(energies.shape == shape, f"(members, compositions) is {shape}, got {energies.shape}")
    _promise([dict(composition) for composition in compositions] == before, "compositions are not changed")
    _promise(bool(np.isfinite(energies).all()), "energies are finite")

    def same(others: Sequence[Mapping[int, int]], what: str) -> None:
        found = np.concatenate([model.member_energies([other]) for other in others], axis=1)
        worst = float(np.abs(found - energies).max())
        _promise(worst <= tolerance, f"{what}, they differ by {worst:.2e} eV/atom")

    same(compositions, "a batch answers as its compositions one by one")
    same(
        [dict(sorted(composition.items(), reverse=True)) for composition in compositions], "the order of elements does not matter"
    )
    doubled = [{z: 2 * amount for z, amount in composition.items()} for composition in compositions]
    same(doubled, "energies are per atom, so two formula units have the same")
    _promise(model.member_energies([]).shape == (len(energies), 0), "nothing asked is nothing answered")


def _validate_labels(model: EnergyModel | FormulaModel) -> None:
    _promise(bool(model.model_id), "it has an id")
    _promise(bool(model.method), "it names the method of its labels")
    _promise(bool(model.elements) and all(0 < z <= MAX_ATOMIC_NUMBER for z in model.elements), "it names its elements")


def _promise(kept: bool, what: str) -> None:
    if not kept:
        raise AssertionError(f"contract of energy models: {what}")


def _reversed(crystal: Crystal) -> Crystal:
    return Crystal(crystal.lattice, crystal.atomic_numbers[::-1], crystal.frac_coords[::-1])


def _turned(crystal: Crystal) -> Crystal:
    rotation, _ = np.linalg.qr(np.array([[1.0, 2.0, 0.5], [-0.3, 1.0, 2.0], [1.5, -0.7, 1.0]]))
    return Crystal(crystal.lattice @ rotation.T, crystal.atomic_numbers, crystal.frac_coords)


def _doubled(crystal: Crystal) -> Crystal:
    lattice = crystal.lattice * np.array([[2.0], [1.0], [1.0]])
    first = crystal.frac_coords * np.array([0.5, 1.0, 1.0])
    numbers = np.concatenate([crystal.atomic_numbers, crystal.atomic_numbers])
    return Crystal(lattice, numbers, np.concatenate([first, first + np.array([0.5, 0.0, 0.0])]))
