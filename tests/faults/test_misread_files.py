"""Files that a reader with too much good will takes for another crystal: refused, and what stands behind them is read."""

import json
from pathlib import Path

import numpy as np
import pytest

from gnome.crystals.formats import ReadCrystal, read_crystals

SITES = """loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
"""

CIF = (
    """data_salt
{group}
_cell_length_a 5.64
_cell_length_b 5.64
_cell_length_c 5.64
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
"""
    + SITES
    + """Na1 Na 0 0 0
Cl1 Cl 0.5 0 0
"""
)


@pytest.mark.parametrize(
    ("group", "n_atoms"),
    [
        ("_symmetry_space_group_name_H-M 'F m -3 m'", 8),
        ("_space_group_IT_number 225", 8),
        ("_symmetry_space_group_name_H-M 'P 1'", 2),
        ("_space_group_IT_number 1", 2),
        ("_symmetry_space_group_name_H-M ?", 2),
        ("", 2),
        ("_symmetry_space_group_name_H-M 'F m-33 m'", 0),
        ("_space_group_IT_number 999", 0),
        ("_space_group_name_H-M_alt 'Fm-3m:7'", 0),
        ("_symmetry_space_group_name_H-M 'P m -3 m'\n_space_group_IT_number 221", 4),
        ("_symmetry_space_group_name_H-M 'P m -3 m'\n_space_group_IT_number 225", 0),
        ("_symmetry_space_group_name_H-M 'P 1'\n_space_group_IT_number 225", 0),
        ("_symmetry_space_group_name_H-M 'Q -9 z'\n_space_group_IT_number 225", 0),
        ("_symmetry_space_group_name_H-M 'F d -3 m'", 0),
        ("_symmetry_space_group_name_H-M 'F d -3 m :2'\n_space_group_IT_number 227", 32),
        ("_symmetry_space_group_name_H-M 'F d -3 m :2'\n_space_group_IT_number 225", 0),
        ("_space_group_IT_number 227", 0),
        ("_space_group_IT_number 62", 0),
        ("_symmetry_space_group_name_H-M 'P 63/m m c'", 0),
        ("_symmetry_space_group_name_H-M 'R -3 m'", 0),
    ],
)
def test_a_space_group_is_understood_or_refused(tmp_path: Path, group: str, n_atoms: int) -> None:
    (tmp_path / "salt.cif").write_text(CIF.format(group=group))
    (item,) = read_crystals(tmp_path / "salt.cif")
    if isinstance(item, ReadCrystal):
        assert item.crystal.n_atoms == n_atoms
        return
    assert n_atoms == 0, item
    assert "and no symmetry operations are listed; list them" in item.message


MONOCLINIC = (
    """data_zirconia
_symmetry_space_group_name_H-M '{name}'
_cell_length_a 5.15
_cell_length_b 5.21
_cell_length_c 5.317
_cell_angle_alpha 90.
_cell_angle_beta 99.23
_cell_angle_gamma 90.
"""
    + SITES
    + """Zr1 Zr 0.2754 0.0395 0.2083
O1 O 0.070 0.3317 0.3447
O2 O 0.4496 0.7569 0.4792
"""
)


def test_short_names_of_monoclinic_groups_are_along_b(tmp_path: Path) -> None:
    read = {}
    for i, name in enumerate(["P 1 21/c 1", "P 21/c", "P2_1/c", "P 1 21/n 1", "P 21/n"]):
        (tmp_path / f"{i}.cif").write_text(MONOCLINIC.format(name=name))
        (item,) = read_crystals(tmp_path / f"{i}.cif")
        assert isinstance(item, ReadCrystal)
        assert item.crystal.composition == {40: 4, 8: 8}
        read[name] = item.crystal.id
    assert read["P 1 21/c 1"] == read["P 21/c"] == read["P2_1/c"]
    assert read["P 1 21/n 1"] == read["P 21/n"] != read["P 21/c"]
    (tmp_path / "c.cif").write_text(
        MONOCLINIC.format(name="P 21/c").replace("beta 99.23", "beta 90").replace("gamma 90", "gamma 99")
    )
    (item,) = read_crystals(tmp_path / "c.cif")
    assert not isinstance(item, ReadCrystal)
    assert "the cell has not the symmetry of the space group 'P 21/c'" in item.message


def test_a_volume_in_place_of_a_scaling_factor_scales_positions_too(tmp_path: Path) -> None:
    head = "salt\n{factor}\n2 0 0\n0 2 0\n0 0 2\nNa Cl\n1 1\n{kind}\n"
    texts = (
        head.format(factor="2.0", kind="Direct") + "0 0 0\n0.5 0.5 0.25\n",
        head.format(factor="2.0", kind="Cartesian") + "0 0 0\n1 1 0.5\n",
        head.format(factor="-64", kind="Direct") + "0 0 0\n0.5 0.5 0.25\n",
        head.format(factor="-64", kind="Cartesian") + "0 0 0\n1 1 0.5\n",
    )
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.vasp").write_text(text)
    found = [item.crystal for item in read_crystals(tmp_path) if isinstance(item, ReadCrystal)]
    assert len(found) == len(texts)
    for crystal in found:
        np.testing.assert_allclose(crystal.lattice, np.eye(3) * 4.0, atol=1e-9)
        np.testing.assert_allclose(crystal.frac_coords[1], [0.5, 0.5, 0.25], atol=1e-9)


def with_occupancies(*occupancies: str) -> str:
    text = CIF.format(group="").replace("_atom_site_fract_z\n", "_atom_site_fract_z\n_atom_site_occupancy\n")
    for site, occupancy in zip(("Na1 Na 0 0 0", "Cl1 Cl 0.5 0 0"), occupancies, strict=True):
        text = text.replace(site, f"{site} {occupancy}")
    return text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (with_occupancies("1", "1.0"), ""),
        (with_occupancies("1", "?"), ""),
        (with_occupancies("1", "."), "disordered"),
        (with_occupancies("0", "1"), "disordered"),
        (with_occupancies("1", "-0.3"), "disordered"),
        (CIF.format(group="").replace("Cl 0.5 0 0", "Cl 0.5 . 0"), "malformed"),
        (CIF.format(group="").replace("_alpha 90", "_alpha -80"), "malformed"),
        (CIF.format(group="").replace("_gamma 90", "_gamma 440"), "malformed"),
    ],
)
def test_sites_and_angles_that_pymatgen_reads_as_others_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "a.cif").write_text(text)
    (item,) = read_crystals(tmp_path / "a.cif")
    assert getattr(item, "reason", "") == reason
    if isinstance(item, ReadCrystal):
        assert item.crystal.n_atoms == 2


def frame(properties: str, *atoms: str, more: str = "") -> str:
    return f'{len(atoms)}\nLattice="4 0 0 0 4 0 0 0 4" Properties={properties} pbc="T T T"{more}\n' + "\n".join(atoms) + "\n"


PLAIN = frame("species:S:1:pos:R:3", "Cs 0 0 0", "Cl 2 2 2")


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (frame("species:S:1:pos:R:3:occupancy:R:1", "Na 0 0 0 0.5", "Cl 2 2 2 1"), "disordered"),
        (frame("species:S:1:pos:R:3:Z:I:1", "Na 0 0 0 19", "Cl 2 2 2 35"), "malformed"),
        (frame("species:S:1:pos:R:3", "Na 0 0 0", "Cl 2 2 2", more=" author=Andr\udce9"), "malformed"),
    ],
)
def test_frames_that_ase_reads_as_others_cost_themselves_alone(tmp_path: Path, wrong: str, reason: str) -> None:
    fine = frame("species:S:1:pos:R:3:occupancy:R:1:Z:I:1", "Na 0 0 0 1.0 11", "Cl 2 2 2 1.0 17")
    (tmp_path / "a.extxyz").write_text("\ufeff" + PLAIN + wrong + fine, errors="surrogateescape")
    first, second, third = read_crystals(tmp_path / "a.extxyz")
    assert isinstance(first, ReadCrystal)
    assert getattr(second, "reason", "") == reason
    assert isinstance(third, ReadCrystal)


def block(announced: int, *atoms: str) -> str:
    lattice = 'Lattice="4 0 0 0 4 0 0 0 4" Properties=species:S:1:pos:R:3 pbc="T T T"'
    return f"{announced}\n{lattice}\n" + "".join(f"{atom} {2 * i} {2 * i} {2 * i}\n" for i, atom in enumerate(atoms))


@pytest.mark.parametrize(("announced", "atoms"), [(1, ("Na", "Cl")), (3, ("Na", "Cl"))])
def test_a_block_with_another_number_of_atoms_costs_itself_alone(tmp_path: Path, announced: int, atoms: tuple[str, ...]) -> None:
    good = block(2, "Cs", "Cl")
    (tmp_path / "a.extxyz").write_text(good + block(announced, *atoms) + good + good)
    found = [item.crystal.reduced_formula for item in read_crystals(tmp_path / "a.extxyz") if isinstance(item, ReadCrystal)]
    assert found[0] == found[-1] == "CsCl"
    assert set(found) == {"CsCl"}
    assert len(found) >= 2


SITE = {"species": [{"element": "Na", "occu": 1}], "abc": [0, 0, 0]}
LATTICE = [[3.0, 0, 0], [0, 3.0, 0], [0, 0, 3.0]]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"lattice": {"matrix": LATTICE}, "sites": [SITE | {"species": [{"element": "Na", "occu": 2}]}]}, "disordered"),
        (
            {"lattice": {"matrix": LATTICE}, "sites": [SITE | {"species": [{"element": "Na", "occu": float("nan")}]}]},
            "disordered",
        ),
        ({"structure": {"lattice": {"matrix": LATTICE}, "sites": [SITE]}, "composition": {"K": 1}}, "formula_mismatch"),
        ({"lattice": LATTICE, "atomic_numbers": [True], "frac_coords": [[0, 0, 0]]}, "malformed"),
        ({"lattice": LATTICE, "atomic_numbers": [11, 17], "frac_coords": [[0, 0], [0, 0.5], [0.5, 0.5]]}, "malformed"),
    ],
)
def test_records_that_say_something_else_are_refused(tmp_path: Path, record: dict[str, object], reason: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps(record))
    (item,) = read_crystals(tmp_path / "a.json")
    assert not isinstance(item, ReadCrystal)
    assert item.reason == reason


HEAD = "salt\n1.0\n4 0 0\n0 4 0\n0 0 4\nNa Cl\n1 1\nDirect\n"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("POSCAR", HEAD + "0 0 0\n0.5 0.5\n", "0.5 0.5"),
        ("POSCAR", HEAD + "0 0 0\n", "2 atoms are announced, fewer are there"),
        ("POSCAR", "x", "at least 8 lines"),
        ("POSCAR", HEAD.replace("1.0", "1 1") + "0 0 0\n0.5 0.5 0.5\n", "one scaling factor or three"),
        (
            "a.json",
            json.dumps({"lattice": {"matrix": LATTICE}, "sites": [SITE | {"species": [{"element": "Na+"}]}]}),
            "'Na+': not an element",
        ),
        (
            "a.cif",
            CIF.format(group="").replace("_atom_site_type_symbol\n", "").replace("Na1 Na", "NA1").replace("Cl1 Cl", "CL1"),
            "type_symbol",
        ),
        ("a.csv", "id,cif,cif\n1,x,y\n", "2 columns `cif`"),
        ("b.csv", "id,cif\n1,x\n".encode("utf-16"), "save it as UTF-8"),
        ("a.extxyz", '1\nLattice="4 0 0 0 4 0 0 0 4" Properties=species:S:1:forces:R:3\nNa 0 0 0\n', "positions are needed"),
        ("c.extxyz", '1\nLattice="4 0 0 0 4 0 0 0 4" Lattice="5 0 0 0 5 0 0 0 5"\nNa 0 0 0\n', "more than once"),
        ("d.extxyz", '1\nLattice="4 0 0 0 4 0 0 0 4"\nD 0 0 0\n', "'D': not an element symbol"),
        ("b.json", '{"lattice": [], "lattice": []}', "the key 'lattice' twice"),
        ("c.json", json.dumps({"lattice": {"matrix": LATTICE, "pbc": [True, True, False]}, "sites": [SITE]}), "all three"),
        (
            "d.json",
            json.dumps({"lattice": LATTICE, "atomic_numbers": [11], "frac_coords": [[0, 0, 0]], "pbc": [False] * 3}),
            "all three",
        ),
        ("b.cif", CIF.format(group="_cell_length_a 6"), "_cell_length_a more than once"),
        ("c.cif", CIF.format(group="").replace("_cell_length_b 5.64", "_cell_length_b ?"), "no number for _cell_length_b"),
        (
            "d.cif",
            CIF.format(group="").replace("_fract_z\n", "_fract_z\n_atom_site_calc_flag\n").replace("0 0\n", "0 0 dum\n"),
            "dummy",
        ),
        (
            "e.cif",
            CIF.format(group="").replace("_fract_z\n", "_fract_z\n_atom_site_attached_hydrogens\n").replace("0 0\n", "0 0 1\n"),
            "attached hydrogens",
        ),
        ("b.extxyz", '0\nLattice="4 0 0 0 4 0 0 0 4"\n', "announces no atoms"),
    ],
)
def test_messages_name_what_is_wrong(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    (item,) = read_crystals(tmp_path / name)
    assert not isinstance(item, ReadCrystal)
    assert message in item.message
