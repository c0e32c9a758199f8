"""Files that were once refused, each read by ASE or pymatgen too: same formula, atoms, volume and distances."""

from pathlib import Path

import ase.io
import numpy as np
import pytest
from pymatgen.core import Lattice, Structure
from pymatgen.io.cif import CifParser

from gnome.crystals.convert import from_atoms, from_structure
from gnome.crystals.crystal import Crystal
from gnome.crystals.formats import ReadCrystal, read_crystals

CASES = Path(__file__).resolve().parents[3].parent / "shared" / "cases"
EXPECTED = {
    "cif-charged-type-symbols/b11_charges.cif": ("CsCl", 2),
    "cif-charged-type-symbols/b11c_charges_sign_first.cif": ("CsCl", 2),
    "cif-charged-type-symbols/c01_mos2_4digits.cif": ("MoS2", 6),
    "cif-explicit-setting/b13_Fd3m_1.cif": ("Si", 8),
    "cif-explicit-setting/b13b_Fd3m_Hall1.cif": ("Si", 8),
    "cif-explicit-setting/b13c_Fd3m_S.cif": ("Si", 8),
    "cif-explicit-setting/b13e_Fd3m_2.cif": ("Si", 8),
    "cif-explicit-setting/b14_R3m_rhomb.cif": ("Bi", 2),
    "cif-labels-only/a01_unlooped.cif": ("GaP", 2),
    "cif-labels-only/b01_labels_only.cif": ("CsCl", 2),
    "cif-special-positions/c01_mos2_3digits.cif": ("MoS2", 6),
    "cif-special-positions/c03_x2x_4digits.cif": ("NaSi6", 7),
    "cif-special-positions/c04_x2x_3digits.cif": ("NaSi6", 7),
    "cif-tag-case/b05_upper_tags.cif": ("CsCl", 2),
    "cif-tag-case/b05b_upper_loop_only.cif": ("CsCl", 2),
    "cif-text-field-cell/b08a_cell_in_text.cif": ("CsCl", 2),
    "cif-text-field-data/before.cif": ("NaCl", 8),
    "cif-text-field-data/prose.cif": ("NaCl", 8),
    "cif-uppercase-symbols/b03_upper_types.cif": ("NaCl", 8),
    "poscar-names/NaCl_POSCAR": ("NaCl", 8),
    "poscar-names/SPOSCAR": ("NaCl", 8),
    "poscar-prefix-over-suffix/CONTCAR_relaxed.cif": ("NaCl", 8),
    "poscar-prefix-over-suffix/POSCAR.cif": ("NaCl", 8),
    "rough-poscar/POSCAR_3scale": ("NaCl", 8),
    "rough-poscar/POSCAR_fraccomment": ("NaCl", 8),
    "rough-poscar/POSCAR_seldyn_label": ("NaCl", 8),
}


SETTINGS = {
    "cif-explicit-setting/b13c_Fd3m_S.cif": ("Fd-3m:1", Lattice.cubic(5.43), "Si", 0.0),
    "cif-explicit-setting/b13e_Fd3m_2.cif": ("Fd-3m:2", Lattice.cubic(5.43), "Si", 0.125),
    "cif-explicit-setting/b14_R3m_rhomb.cif": ("R-3m:R", Lattice.rhombohedral(3.8, 57), "Bi", 0.234),
}
"""Settings whose names neither reader knows, built by pymatgen from its own tables."""


def distances(crystal: Crystal) -> np.ndarray:
    """Sorted distances from each atom to all images in three cells each way."""
    shifts = np.stack(np.meshgrid(*[np.arange(-3, 4)] * 3), axis=-1).reshape(-1, 3)
    between = crystal.frac_coords[:, None, None] - crystal.frac_coords[None, :, None] + shifts
    found = np.linalg.norm(between @ crystal.lattice, axis=-1).ravel()
    return np.sort(found[found < 6.0])


def independent(path: Path, formula: str, n_atoms: int) -> list[Crystal]:
    """What ASE and pymatgen make of a file, where that is what its README gives: NA is nitrogen to ASE."""
    found = []
    kind = "cif" if path.suffix == ".cif" else "vasp"
    for read in (
        lambda: from_atoms(ase.io.read(path, format=kind)),
        lambda: from_structure(
            CifParser(path, site_tolerance=0.01).parse_structures(primitive=False)[0]
            if kind == "cif"
            else Structure.from_file(path)
        ),
    ):
        try:
            crystal = read()
        except Exception:  # each of them fails on some
            continue
        found += [crystal] if (crystal.reduced_formula, crystal.n_atoms) == (formula, n_atoms) else []
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EXPECTED)
def test_a_file_that_was_refused_is_read_as_others_read_it(name: str) -> None:
    path = CASES / name
    if not path.exists():
        pytest.skip(f"the file is not here: {path}")
    formula, n_atoms = EXPECTED[name]
    (item,) = read_crystals(path)
    assert isinstance(item, ReadCrystal), item
    assert (item.crystal.reduced_formula, item.crystal.n_atoms) == (formula, n_atoms)
    others = independent(path, formula, n_atoms)
    if name in SETTINGS:
        group, lattice, symbol, x = SETTINGS[name]
        others.append(from_structure(Structure.from_spacegroup(group, lattice, [symbol], [[x, x, x]])))
    assert others, "neither ASE nor pymatgen reads it"
    ours = distances(item.crystal)
    for other in others:
        assert other.composition == item.crystal.composition
        assert other.volume == pytest.approx(item.crystal.volume, rel=1e-6)
        assert len(distances(other)) == len(ours)
        assert distances(other) == pytest.approx(ours, abs=0.02)
