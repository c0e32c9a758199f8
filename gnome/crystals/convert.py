"""Between `Crystal` and the objects of pymatgen and ASE; the one file that speaks both."""

import numpy as np
from ase import Atoms
from pymatgen.core import Element, Structure
from pymatgen.core.periodic_table import DummySpecies, Species

from gnome.crystals.crystal import Crystal
from gnome.errors import InvalidCrystal


def from_structure(structure: Structure) -> Crystal:
    """Convert an ordered pymatgen structure; oxidation states are dropped.

    Raises InvalidCrystal for partial occupancies, isotopes and dummy species.
    """
    numbers = []
    for site in structure:
        if not site.is_ordered:
            raise InvalidCrystal("disordered", f"site {site.species_string} is partially occupied; give an ordered crystal")
        species = site.specie
        if isinstance(species, DummySpecies) or not isinstance(species, Element | Species):
            raise InvalidCrystal("unsupported_element", f"{species} is not an element")
        element = species if isinstance(species, Element) else species.element
        if element.name in {"D", "T"}:  # pymatgen answers "H" for their symbol
            raise InvalidCrystal("isotope", f"{element.name} is an isotope; write it as H")
        numbers.append(element.Z)
    return Crystal(structure.lattice.matrix, np.array(numbers), structure.frac_coords)


def to_structure(crystal: Crystal) -> Structure:
    """Convert to a pymatgen structure; sites keep their order."""
    return Structure(crystal.lattice, crystal.symbols, crystal.frac_coords)


def from_atoms(atoms: Atoms) -> Crystal:
    """Convert ASE atoms; they must be periodic in three directions."""
    if not all(atoms.pbc):
        raise InvalidCrystal(
            "not_periodic", f"periodic in {list(map(bool, atoms.pbc))}; a crystal is periodic in all three directions"
        )
    return Crystal(np.asarray(atoms.cell), atoms.get_atomic_numbers(), atoms.get_scaled_positions(wrap=False))


def to_atoms(crystal: Crystal) -> Atoms:
    """Convert to ASE atoms, periodic in all directions; sites keep their order."""
    return Atoms(numbers=crystal.atomic_numbers, cell=crystal.lattice, scaled_positions=crystal.frac_coords, pbc=True)
