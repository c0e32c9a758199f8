"""A periodic crystal as three arrays.

This file, `elements` and `formula` work without pymatgen or ASE installed, so a GPU node that only trains can use them.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gnome.crystals.elements import MAX_ATOMIC_NUMBER, SYMBOLS
from gnome.crystals.formula import chemical_system, reduced_formula
from gnome.errors import InvalidCrystal

ID_DIGITS = 6
"""Decimals kept of lengths and fractional coordinates when an id is derived."""


@dataclass(frozen=True, eq=False)
class Crystal:
    """A periodic arrangement of atoms, immutable.

    `lattice` (3, 3): rows are the cell vectors, angstrom.  `atomic_numbers` (n,).  `frac_coords` (n, 3), any real value.
    Shapes and atomic numbers are checked here; whether the geometry makes sense is `gnome.crystals.validity`'s to say.

    Raises InvalidCrystal when shapes disagree, there is no atom, or an atomic number is not that of an element.
    """

    lattice: NDArray[np.float64]
    atomic_numbers: NDArray[np.int64]
    frac_coords: NDArray[np.float64]

    def __post_init__(self) -> None:
        """Copy into frozen arrays and check their shapes."""
        lattice = np.array(self.lattice, dtype=np.float64)
        numbers = np.array(self.atomic_numbers)
        if numbers.dtype.kind not in "iu" and numbers.size:
            raise InvalidCrystal("malformed", f"atomic numbers are integers, got {numbers.ravel()[:4].tolist()}")
        numbers = numbers.astype(np.int64)
        coords = np.array(self.frac_coords, dtype=np.float64)
        if lattice.shape != (3, 3):
            raise InvalidCrystal("malformed", f"a lattice has shape (3, 3), got {lattice.shape}")
        if numbers.ndim != 1 or len(numbers) == 0:
            raise InvalidCrystal("malformed", f"a crystal has a flat list of at least one atom, got shape {numbers.shape}")
        if coords.shape != (len(numbers), 3):
            raise InvalidCrystal("malformed", f"{len(numbers)} atoms need coordinates ({len(numbers)}, 3), got {coords.shape}")
        if numbers.min() < 1 or numbers.max() > MAX_ATOMIC_NUMBER:
            offender = int(numbers.min() if numbers.min() < 1 else numbers.max())
            raise InvalidCrystal("unsupported_element", f"atomic number {offender} is not that of an element")
        for name, array in (("lattice", lattice), ("atomic_numbers", numbers), ("frac_coords", coords)):
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    @classmethod
    def from_symbols(cls, lattice: ArrayLike, symbols: list[str], frac_coords: ArrayLike) -> Self:
        """Build from element symbols instead of atomic numbers."""
        if unknown := sorted(set(symbols) - set(SYMBOLS[1:])):
            raise InvalidCrystal(
                "unsupported_element", f"{', '.join(map(repr, unknown))}: not an element symbol; leave charges and numbers out"
            )
        return cls(np.asarray(lattice), np.asarray([SYMBOLS.index(symbol) for symbol in symbols]), np.asarray(frac_coords))

    @property
    def n_atoms(self) -> int:
        """Atoms in the cell."""
        return len(self.atomic_numbers)

    @property
    def volume(self) -> float:
        """Cell volume, angstrom^3."""
        return abs(float(np.linalg.det(self.lattice)))

    @property
    def volume_per_atom(self) -> float:
        """Cell volume per atom, angstrom^3."""
        return self.volume / self.n_atoms

    @property
    def cart_coords(self) -> NDArray[np.float64]:
        """Cartesian coordinates (n, 3), angstrom."""
        return self.frac_coords @ self.lattice

    @property
    def symbols(self) -> list[str]:
        """Element symbol of every atom."""
        return [SYMBOLS[z] for z in self.atomic_numbers]

    @cached_property
    def composition(self) -> dict[int, int]:
        """Atoms of each atomic number in the cell, by ascending atomic number."""
        numbers, counts = np.unique(self.atomic_numbers, return_counts=True)
        return dict(zip(numbers.tolist(), counts.tolist(), strict=True))

    @cached_property
    def reduced_formula(self) -> str:
        """Reduced formula in pymatgen's spelling."""
        return reduced_formula(self.composition)

    @property
    def chemical_system(self) -> str:
        """Element symbols in alphabetical order, joined by '-'."""
        return chemical_system(self.composition)

    @cached_property
    def id(self) -> str:
        """Hash of the arrays as stored: the same numbers give the same id, another choice of cell does not.

        Identity of crystals (as opposed to of their descriptions) is `gnome.crystals.identity`'s to decide.
        """
        digest = hashlib.sha256()
        digest.update((np.round(self.lattice, ID_DIGITS) + 0.0).tobytes())  # + 0.0: no negative zeros
        digest.update(self.atomic_numbers.tobytes())
        wrapped = np.round(self.frac_coords % 1.0, ID_DIGITS) % 1.0
        digest.update((wrapped + 0.0).tobytes())
        return digest.hexdigest()[:16]

    def scaled(self, volume_factor: float) -> Self:
        """Scale the volume isotropically; fractional coordinates stay."""
        return type(self)(self.lattice * volume_factor ** (1 / 3), self.atomic_numbers, self.frac_coords)

    def with_atomic_numbers(self, atomic_numbers: ArrayLike) -> Self:
        """Replace the elements on the same sites."""
        return type(self)(self.lattice, np.asarray(atomic_numbers), self.frac_coords)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, for JSON."""
        return {
            "lattice": self.lattice.tolist(),
            "atomic_numbers": self.atomic_numbers.tolist(),
            "frac_coords": self.frac_coords.tolist(),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Rebuild what `to_dict` gave."""
        try:
            if any(isinstance(z, bool) for z in fields["atomic_numbers"]):
                raise InvalidCrystal("malformed", "atomic numbers are integers, one is true or false")
            return cls(
                np.asarray(fields["lattice"], dtype=np.float64),
                np.asarray(fields["atomic_numbers"]),
                np.asarray(fields["frac_coords"], dtype=np.float64),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidCrystal("malformed", f"not a crystal record: {error}") from None

    def __eq__(self, other: object) -> bool:
        """Equal numbers, to the precision of `id`."""
        return isinstance(other, Crystal) and self.id == other.id

    def __hash__(self) -> int:
        """Agrees with `__eq__`."""
        return hash(self.id)
