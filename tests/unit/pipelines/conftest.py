from collections.abc import Callable

import numpy as np
import pytest
from pymatgen.analysis.prototypes import AFLOW_PROTOTYPE_LIBRARY

from gnome.crystals.crystal import Crystal
from gnome.crystals.validity import is_valid


@pytest.fixture(scope="session")
def known_crystals() -> list[Crystal]:
    """Real structures of at most 12 atoms, from the prototype library of pymatgen, in its order."""
    crystals = []
    for entry in AFLOW_PROTOTYPE_LIBRARY:
        structure = entry["snl"].structure
        if len(structure) <= 12 and structure.is_ordered:
            crystal = Crystal(structure.lattice.matrix, np.array([site.specie.Z for site in structure]), structure.frac_coords)
            if is_valid(crystal):
                crystals.append(crystal)
    return crystals


@pytest.fixture(scope="session")
def rocksalt() -> Callable[..., Crystal]:
    """Conventional rock-salt cells of 8 atoms: (cation, anion, lattice constant in angstrom) -> Crystal."""

    def build(cation: str = "Na", anion: str = "Cl", a: float = 5.64) -> Crystal:
        corners = [[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]
        edges = [[0.5, 0, 0], [0.5, 0.5, 0.5], [0, 0, 0.5], [0, 0.5, 0]]
        return Crystal.from_symbols(a * np.eye(3), [cation] * 4 + [anion] * 4, [*corners, *edges])

    return build
