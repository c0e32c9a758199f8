"""CIFs that say how much their cell holds, and list something else: a few atoms without the symmetry that made more of them."""

import gemmi
import pytest
from pymatgen.core import Lattice, Structure
from pymatgen.io.cif import CifWriter

from gnome.crystals.cif import parse_block
from gnome.errors import InvalidCrystal

CUBIC = (5.64, 5.64, 5.64, 90, 90, 90)
TRICLINIC = (4.0, 5.0, 6.0, 80, 85, 95)
HALITE = ("Na1 Na 0 0 0", "Cl1 Cl 0.5 0.5 0.5")
ONE_UNIT = "_chemical_formula_sum 'Na Cl'\n_cell_formula_units_Z "
NAMED = "_symmetry_space_group_name_H-M 'F m -3 m'\n"
ALONE = "loop_\n_symmetry_equiv_pos_as_xyz\n'x,y,z'\n"
ALL = "loop_\n_symmetry_equiv_pos_as_xyz\n" + "".join(
    f"'{operation.triplet()}'\n" for operation in gemmi.find_spacegroup_by_name("F m -3 m").operations()
)
MULTIPLICITY, WYCKOFF = "_atom_site_symmetry_multiplicity\n", "_atom_site_Wyckoff_symbol\n"


def cif(said: str = "", *, cell: tuple[float, ...] = CUBIC, columns: str = "", more: tuple[str, ...] = ("", "")) -> str:
    names = ("length_a", "length_b", "length_c", "angle_alpha", "angle_beta", "angle_gamma")
    lines = "".join(f"_cell_{name} {value}\n" for name, value in zip(names, cell, strict=True))
    fixed = "loop_\n_atom_site_label\n_atom_site_type_symbol\n_atom_site_fract_x\n_atom_site_fract_y\n_atom_site_fract_z\n"
    return f"data_x\n{said}{lines}{fixed}{columns}" + "".join(f"{site} {end}\n" for site, end in zip(HALITE, more, strict=True))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (cif(f"{ONE_UNIT}4\n"), "make 2 atoms of NaCl in 179.4 angstrom.3, which disagrees with Z = 4 formula units a cell"),
        (cif(f"{ONE_UNIT}4\n{ALONE}"), "disagrees with Z = 4"),
        (cif(f"{ONE_UNIT}4\n_symmetry_space_group_name_H-M 'P 1'\n"), "disagrees with Z = 4"),
        (cif("_chemical_formula_sum 'Na4 Cl4'\n_cell_formula_units_Z 4\n"), "disagrees with Z = 4"),
        (cif("_chemical_formula_moiety 'Na 1+, Cl 1-'\n_cell_formula_units_Z 4\n"), "disagrees with Z = 4"),
        (cif("_cell_formula_units_Z 4\n"), "disagrees with Z = 4"),
        (cif("_exptl_crystal_density_diffrn 2.165\n"), "a density of 2.165 g/cm.3, theirs is 0.541"),
        (cif("_exptl_crystal_density_diffrn 2165\n"), "a density of 2.165 g/cm.3"),
        (cif(columns=MULTIPLICITY + WYCKOFF, more=("4 a", "4 b")), "_atom_site_symmetry_multiplicity '4' speaks of symmetry"),
        (cif(columns=WYCKOFF, more=("a", "b")), "_atom_site_wyckoff_symbol 'b' speaks of symmetry"),
        (cif(ALONE, columns=MULTIPLICITY, more=("4", "4")), "multiplicity 4 of the site 'Na1', which is 1 here"),
        (cif(ALONE, columns=WYCKOFF, more=("4a", "4b")), "the Wyckoff letter '4b'"),
        (cif(NAMED, columns=MULTIPLICITY, more=("8", "4")), "multiplicity 8 of the site 'Na1', which is 4 here"),
        (cif(ALL, columns="_atom_site_site_symmetry_order\n", more=("2", "2")), "order 2 of the site 'Na1'"),
        (cif("_space_group_crystal_system triclinic\n", cell=TRICLINIC), "that of P -1 as well as of P 1"),
        (cif("_symmetry_cell_setting triclinic\n", cell=TRICLINIC), "that of P -1 as well as of P 1"),
        (cif(f"_space_group_crystal_system triclinic\n{ONE_UNIT}2\n", cell=TRICLINIC), "disagrees with Z = 2"),
    ],
)  # fmt: skip
def test_a_cell_that_should_hold_more_than_it_does_is_refused(text: str, words: str) -> None:
    with pytest.raises(InvalidCrystal, match=words):
        parse_block(text)


@pytest.mark.parametrize(
    ("text", "n_atoms"),
    [
        (cif(), 2),
        (cif(f"{ONE_UNIT}1\n"), 2),
        (cif("_chemical_formula_sum 'Na Cl'\n_cell_formula_units_Z ?\n"), 2),
        (cif(NAMED + f"{ONE_UNIT}4\n"), 8),
        (cif(NAMED, columns=MULTIPLICITY + WYCKOFF, more=("4 a", "4 b")), 8),
        (cif(NAMED, columns=MULTIPLICITY, more=("48", "48")), 8),  # how many operations leave a site, under the same name
        (cif(ALL, columns=MULTIPLICITY, more=("4", "?")), 8),
        (cif(ALONE, columns=MULTIPLICITY + WYCKOFF, more=("1 a", "1 a")), 2),
        (cif(NAMED + ALL + f"{ONE_UNIT}1\n"), 8),  # Z alone is wrong at times
        (cif(ALL + f"{ONE_UNIT}1\n", columns=MULTIPLICITY, more=("4", "4")), 8),
        (cif(NAMED + f"{ONE_UNIT}1\n_exptl_crystal_density_diffrn 2.16\n"), 8),
        (cif(NAMED + ALL + "_exptl_crystal_density_diffrn 1.3\n"), 8),
        (cif("_exptl_crystal_density_diffrn 0.54\n", columns="_atom_site_occupancy\n", more=("1", "1")), 2),
        (cif(f"_space_group_crystal_system triclinic\n{ONE_UNIT}1\n", cell=TRICLINIC), 2),
        (cif(NAMED + "_chemical_formula_moiety '2(Na 1+), 2(Cl 1-)'\n_cell_formula_units_Z 2\n"), 8),
    ],
)  # fmt: skip
def test_a_cell_that_holds_what_it_should_is_read(text: str, n_atoms: int) -> None:
    crystal = parse_block(text)
    assert (crystal.reduced_formula, crystal.n_atoms) == ("NaCl", n_atoms)


@pytest.mark.parametrize("symprec", [None, 0.01])
def test_what_pymatgen_says_of_its_cells_is_believed(symprec: float | None) -> None:
    """Its sum formula is that of the whole cell, and its nitrogen comes by twos."""
    halite = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    nitrogen = Structure.from_spacegroup("Pa-3", Lattice.cubic(5.66), ["N"], [[0.054, 0.054, 0.054]])
    for structure in (halite, halite.get_primitive_structure(), nitrogen):
        crystal = parse_block(str(CifWriter(structure, symprec=symprec)))
        assert crystal.volume_per_atom == pytest.approx(structure.volume / len(structure), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("P 4/m m m", (3, 4, 30, 90, 90, 90)),
        ("R -3 m :H", (4.38, 5.5, 30.5, 90, 90, 120)),
        ("R -3 m :H", (4.24, 4.24, 41, 90, 90, 90)),
        ("P 6/m m m", (3, 3, 40, 90, 90, 115)),
        ("P m -3 m", (5, 5, 5.2, 90, 90, 90)),
        ("P 1 2/m 1", (3, 4, 50, 90, 90, 95)),
    ],
)
def test_a_long_axis_excuses_no_wrong_one_beside_it(name: str, cell: tuple[float, ...]) -> None:
    named = cif(f"_symmetry_space_group_name_H-M '{name}'\n", cell=cell)
    with pytest.raises(InvalidCrystal, match="the cell has not the symmetry"):
        parse_block(named)
    operations = gemmi.SpaceGroup(name.replace(" :", ":")).operations()
    listed = "loop_\n_symmetry_equiv_pos_as_xyz\n" + "".join(f"'{operation.triplet()}'\n" for operation in operations)
    with pytest.raises(InvalidCrystal, match="no symmetry operation of the cell"):
        parse_block(cif(listed, cell=cell))


def test_cells_written_with_few_digits_have_their_symmetry() -> None:
    for name, cell in {"P 4/m m m": (3.1, 3.11, 30, 90, 90, 90), "R -3 m :H": (4.24, 4.24, 41, 90, 90, 119.7)}.items():
        assert parse_block(cif(f"_symmetry_space_group_name_H-M '{name}'\n", cell=cell)).n_atoms > 1


def typed(first: str, second: str, said: str = "") -> str:
    return cif(said).replace(" Na 0", f" {first} 0").replace(" Cl 0.5", f" {second} 0.5")


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ("NO", "O", ""),
        ("CO", "O", ""),
        ("co", "O", ""),
        ("CO2+", "O2-", ""),
        ("SI", "C", ""),
        ("CO", "O", "_chemical_formula_sum 'C O2'\n"),
        ("NO", "NA", ""),  # in capitals, and still no nobelium
        ("HO", "CL", "_chemical_formula_sum 'H O Cl'\n"),
    ],
)
def test_two_capitals_that_nothing_makes_one_element_are_refused(first: str, second: str, said: str) -> None:
    with pytest.raises(InvalidCrystal, match=r"may mean \w+ or \w and \w; write"):
        parse_block(typed(first, second, said))


@pytest.mark.parametrize(
    ("first", "second", "said", "symbols"),
    [
        ("CO", "NA", "", ["Co", "Na"]),
        ("CO", "O", "_chemical_formula_sum 'Co O'\n", ["Co", "O"]),
        ("CO", "O", "_chemical_formula_sum 'CO O'\n", ["Co", "O"]),
        ("CS", "CL", "", ["Cs", "Cl"]),
        ("na", "cl", "", ["Na", "Cl"]),
        ("No", "O", "", ["No", "O"]),
    ],
)
def test_capitals_that_the_file_explains_are_read(first: str, second: str, said: str, symbols: list[str]) -> None:
    assert parse_block(typed(first, second, said)).symbols == symbols
