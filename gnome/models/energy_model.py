"""The contract of what predicts formation energies, whatever network is behind it."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gnome.crystals.crystal import Crystal


class EnergyModel(Protocol):
    """An ensemble that predicts e_form_per_atom of crystals, unrelaxed ones included."""

    @property
    def model_id(self) -> str:
        """Hash of the weights and their card."""
        ...

    @property
    def method(self) -> str:
        """Label of the method behind the energies it was trained on."""
        ...

    @property
    def elements(self) -> frozenset[int]:
        """Atomic numbers it was trained on; others are refused by whoever calls it."""
        ...

    def member_energies(self, crystals: Sequence[Crystal], volume_scales: Sequence[float] = (1.0,)) -> NDArray[np.float64]:
        """Predict eV/atom, shape (members, volume scales, crystals); neighbours are those of the unscaled cell."""
        ...


class FormulaModel(Protocol):
    """An ensemble that predicts the lowest e_form_per_atom of compositions."""

    @property
    def model_id(self) -> str:
        """Hash of the weights and their card."""
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
