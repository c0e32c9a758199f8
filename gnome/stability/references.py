"""Energies of the elements, from which formation energies are taken."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

from gnome.crystals.elements import SYMBOLS
from gnome.errors import EvaluatorUnavailable, InvalidInput


@dataclass(frozen=True, kw_only=True)
class ElementalReferences:
    """Energy of each element's ground state under one method.

    `method` is the label of that method.  `energies` are eV/atom by atomic number, corrections included.
    Raises InvalidInput for an energy that is not a finite number.
    """

    method: str
    energies: Mapping[int, float]

    def __post_init__(self) -> None:
        """Freeze the mapping and check the numbers."""
        energies = {int(z): float(energy) for z, energy in sorted(self.energies.items())}
        for z, energy in energies.items():
            if not 1 <= z < len(SYMBOLS):
                raise InvalidInput(f"atomic number {z} is not that of an element")
            if not math.isfinite(energy):
                raise InvalidInput(f"the reference energy of {SYMBOLS[z]} is {energy}, expected a finite number of eV/atom")
        object.__setattr__(self, "energies", MappingProxyType(energies))

    @property
    def elements(self) -> frozenset[int]:
        """Atomic numbers that have a reference."""
        return frozenset(self.energies)

    def formation_energy_per_atom(
        self, composition: Mapping[int, int], energy_per_atom: float, correction_per_atom: float = 0.0
    ) -> float:
        """Take the energy of the elements off a corrected energy, eV/atom.

        Raises EvaluatorUnavailable naming the elements that have no reference.
        """
        if missing := sorted(set(composition) - set(self.energies)):
            names = ", ".join(SYMBOLS[z] for z in missing)
            raise EvaluatorUnavailable(f"no elemental reference for {names} under {self.method}; evaluate the elements first")
        n_atoms = sum(composition.values())
        elements = math.fsum(self.energies[z] * amount for z, amount in composition.items()) / n_atoms
        return energy_per_atom + correction_per_atom - elements

    def to_dict(self) -> dict[str, Any]:
        """Plain fields, for JSON; elements by symbol."""
        return {"method": self.method, "energies": {SYMBOLS[z]: energy for z, energy in self.energies.items()}}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Rebuild what `to_dict` gave; raises InvalidInput when it is something else."""
        try:
            energies = {SYMBOLS.index(symbol): float(energy) for symbol, energy in fields["energies"].items()}
            return cls(method=str(fields["method"]), energies=energies)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidInput(f"not a record of elemental references: {error}") from None
