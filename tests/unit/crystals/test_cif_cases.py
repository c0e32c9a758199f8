"""Files that were once refused, each read by ASE, pymatgen or both too: same formula, atoms, volume and distances."""

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
BOTH, ASE, PYMATGEN, NEITHER = ("ase", "pymatgen"), ("ase",), ("pymatgen",), ()
"""Which of the two reads a file right.

ASE: NA is nitrogen to it, few digits make more atoms, it wants a setting beside a number.  pymatgen: capital tags, data blocks named in
text, three factors and comments are beyond it.  Neither knows a setting written as S, :2 or R: these crystals are built from tables.
"""
EXPECTED = {
    "cif-charged-type-symbols/b11_charges.cif": ("CsCl", 2, BOTH),
    "cif-charged-type-symbols/b11c_charges_sign_first.cif": ("CsCl", 2, BOTH),
    "cif-charged-type-symbols/c01_mos2_4digits.cif": ("MoS2", 6, PYMATGEN),
    "cif-explicit-setting/b13_Fd3m_1.cif": ("Si", 8, BOTH),
    "cif-explicit-setting/b13b_Fd3m_Hall1.cif": ("Si", 8, BOTH),
    "cif-explicit-setting/b13c_Fd3m_S.cif": ("Si", 8, NEITHER),
    "cif-explicit-setting/b13e_Fd3m_2.cif": ("Si", 8, NEITHER),
    "cif-explicit-setting/b14_R3m_rhomb.cif": ("Bi", 2, NEITHER),
    "cif-labels-only/a01_unlooped.cif": ("GaP", 2, PYMATGEN),
    "cif-labels-only/b01_labels_only.cif": ("CsCl", 2, BOTH),
    "cif-special-positions/c01_mos2_3digits.cif": ("MoS2", 6, PYMATGEN),
    "cif-special-positions/c03_x2x_4digits.cif": ("NaSi6", 7, BOTH),
    "cif-special-positions/c04_x2x_3digits.cif": ("NaSi6", 7, PYMATGEN),
    "cif-tag-case/b05_upper_tags.cif": ("CsCl", 2, ASE),
    "cif-tag-case/b05b_upper_loop_only.cif": ("CsCl", 2, ASE),
    "cif-text-field-cell/b08a_cell_in_text.cif": ("CsCl", 2, BOTH),
    "cif-text-field-data/before.cif": ("NaCl", 8, ASE),
    "cif-text-field-data/prose.cif": ("NaCl", 8, ASE),
    "cif-uppercase-symbols/b03_upper_types.cif": ("NaCl", 8, PYMATGEN),
    "poscar-names/NaCl_POSCAR": ("NaCl", 8, BOTH),
    "poscar-names/SPOSCAR": ("NaCl", 8, BOTH),
    "poscar-prefix-over-suffix/CONTCAR_relaxed.cif": ("NaCl", 8, BOTH),
    "poscar-prefix-over-suffix/POSCAR.cif": ("NaCl", 8, BOTH),
    "rough-poscar/POSCAR_3scale": ("NaCl", 8, ASE),
    "rough-poscar/POSCAR_fraccomment": ("NaCl", 8, ASE),
    "rough-poscar/POSCAR_seldyn_label": ("NaCl", 8, BOTH),
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


def of_ase(path: Path, kind: str) -> Crystal:
    return from_atoms(ase.io.read(path, format=kind))


def of_pymatgen(path: Path, kind: str) -> Crystal:
    if kind == "vasp":
        return from_structure(Structure.from_file(path))
    return from_structure(CifParser(path, site_tolerance=0.01).parse_structures(primitive=False)[0])


READERS = {"ase": of_ase, "pymatgen": of_pymatgen}


def assert_alike(ours: Crystal, theirs: Crystal) -> None:
    assert theirs.composition == ours.composition
    assert theirs.volume == pytest.approx(ours.volume, rel=1e-6)
    assert len(distances(theirs)) == len(distances(ours))
    assert distances(theirs) == pytest.approx(distances(ours), abs=0.02)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EXPECTED)
def test_a_file_that_was_refused_is_read_as_others_read_it(name: str) -> None:
    path = CASES / name
    if not path.exists():
        pytest.skip(f"the file is not here: {path}")
    formula, n_atoms, readers = EXPECTED[name]
    (item,) = read_crystals(path)
    assert isinstance(item, ReadCrystal), item
    assert (item.crystal.reduced_formula, item.crystal.n_atoms) == (formula, n_atoms)
    for reader in readers:
        assert_alike(item.crystal, READERS[reader](path, "cif" if path.suffix == ".cif" else "vasp"))
    assert readers or name in SETTINGS, "nothing independent says what it is"
    if name in SETTINGS:
        group, lattice, symbol, x = SETTINGS[name]
        assert_alike(item.crystal, from_structure(Structure.from_spacegroup(group, lattice, [symbol], [[x, x, x]])))


CELL = "".join(f"_cell_length_{axis} 5.64\n" for axis in "abc") + "".join(
    f"_cell_angle_{name} 90\n" for name in ("alpha", "beta", "gamma")
)
SITES = "_atom_site_label\n_atom_site_type_symbol\n_atom_site_fract_x\n_atom_site_fract_y\n_atom_site_fract_z\n"
HALITE = f"data_x\n_symmetry_space_group_name_H-M 'F m -3 m'\n_symmetry_Int_Tables_number 225\n{CELL}loop_\n{SITES}"
PROSE = "data_x\n_publ_section_comment\n;\n_cell_length_a 3\n;\n"
ATOMS = "Na1 Na 0 0 0\nCl1 Cl 0.5 0.5 0.5\n"
OWN = {
    "charges.cif": (HALITE + "Na1 Na1+ 0 0 0\nCl1 Cl1- 0.5 0.5 0.5\n", BOTH),
    "labels.cif": (HALITE.replace("_atom_site_type_symbol\n", "") + "Na1 0 0 0\nCl1 0.5 0.5 0.5\n", BOTH),
    "capital_tags.cif": (HALITE.replace("_cell_length", "_CELL_LENGTH") + ATOMS, ASE),
    "capitals.cif": (HALITE + "NA1 NA 0 0 0\nCL1 CL 0.5 0.5 0.5\n", PYMATGEN),
    "prose.cif": (HALITE.replace("data_x\n", PROSE) + ATOMS, BOTH),
    "SPOSCAR": ("x\n5.64\n0 .5 .5\n.5 0 .5\n.5 .5 0\nNa Cl\n1 1\nDirect\n0 0 0\n.5 .5 .5\n", BOTH),
}  # fmt: skip
"""Files of the same kinds, small enough to stand here, and who reads them right."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OWN)
def test_a_file_of_a_kind_that_was_refused_is_read_as_others_read_it(tmp_path: Path, name: str) -> None:
    text, readers = OWN[name]
    (tmp_path / name).write_text(text)
    (item,) = read_crystals(tmp_path / name)
    assert isinstance(item, ReadCrystal), item
    assert item.crystal.reduced_formula == "NaCl"
    for reader in readers:
        assert_alike(item.crystal, READERS[reader](tmp_path / name, "cif" if name.endswith(".cif") else "vasp"))
