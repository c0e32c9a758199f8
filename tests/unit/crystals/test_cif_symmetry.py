"""Symmetry of a CIF against spglib's tables and pymatgen: settings that a name states, elements of symbols, places with few digits."""

import gemmi
import numpy as np
import pytest
import spglib
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Lattice, Structure
from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

from gnome.crystals.cif import parse_block
from gnome.crystals.cif_group import named_operations
from gnome.crystals.cif_operations import Operations, read_operations, triplets
from gnome.crystals.cif_syntax import CifTable
from gnome.crystals.convert import to_structure
from gnome.crystals.crystal import Crystal
from gnome.errors import InvalidCrystal


def table(**values: str) -> CifTable:
    columns = {f"_space_group_{name}": (value,) for name, value in values.items()}
    return CifTable(columns, dict.fromkeys(columns, 0))


def metric_for(hall: int) -> np.ndarray:
    """A metric that all operations of the setting leave as it is: the mean of a triclinic one over the group."""
    rotations = spglib.get_symmetry_from_database(hall)["rotations"]
    general = np.array([[31.0, 3.1, 2.3], [3.1, 47.0, 4.7], [2.3, 4.7, 61.0]])
    return np.asarray(sum(rotation.T @ general @ rotation for rotation in rotations) / len(rotations))


def key(operations: Operations) -> set[tuple[int, ...]]:
    shifts = np.rint(operations.translations % 1.0 * 24).astype(int) % 24
    return {(*rotation.ravel().tolist(), *shift.tolist()) for rotation, shift in zip(operations.rotations, shifts, strict=True)}


@pytest.mark.parametrize("hall", range(1, 531, 4))
def test_a_setting_is_known_by_its_hall_symbol_and_by_name_and_code(hall: int) -> None:
    kind = spglib.get_spacegroup_type(hall)
    database = spglib.get_symmetry_from_database(hall)
    expected = key(Operations(database["rotations"], database["translations"]))
    metric = metric_for(hall)
    ways = [{"name_hall": kind.hall_symbol}, {"name_hall": kind.hall_symbol.replace(" ", "_"), "it_number": str(kind.number)}]
    ways.append({"name_h-m_full": kind.international_full, "it_coordinate_system_code": kind.choice or "."})
    if kind.choice in {"1", "2", "H", "R"}:
        ways += [
            {"name_h-m_alt": f"{kind.international_short.replace('_', '')}{suffix}"}
            for suffix in (
                f":{kind.choice}",
                f" :{kind.choice.lower()}",
                f" {({'1': 'S', '2': 'Z'}).get(kind.choice, kind.choice)}",
            )
        ]
    for way in ways:
        assert key(named_operations(table(**way), metric)) == expected, way


def test_the_two_tables_of_settings_are_in_one_order() -> None:
    for hall, group in enumerate(gemmi.spacegroup_table_itb(), start=1):
        database = spglib.get_symmetry_from_database(hall)
        ours = read_operations(tuple(operation.triplet() for operation in group.operations()))
        assert key(ours) == key(Operations(database["rotations"], database["translations"]))


@pytest.mark.parametrize("hall", [1, 81, 292, 343, 433, 460, 525, 530])
def test_operations_are_written_as_they_are_read(hall: int) -> None:
    database = spglib.get_symmetry_from_database(hall)
    operations = Operations(database["rotations"], database["translations"])
    assert key(read_operations(tuple(triplets(operations)))) == key(operations)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"name_h-m_alt": "F d -3 m"}, "several settings"),
        ({"name_h-m_alt": "F d -3 m", "it_number": "227"}, "several settings"),
        ({"name_h-m_full": "F 41/d -3 2/m"}, "several settings"),
        ({"name_h-m_alt": "F m -3 m :1"}, "not understood"),
        ({"name_h-m_alt": "F d -3 m :3"}, "not understood"),
        ({"name_h-m_alt": "F m -3 m Z"}, "not understood"),
        ({"name_h-m_alt": "R -3 m HR"}, "not understood"),
        ({"name_hall": "F 4D 2 3 -1D"}, "not understood"),
        ({"name_hall": "Q 9 z"}, "not understood"),
        ({"name_hall": "F 4d 2 3 -1d", "name_h-m_alt": "F d -3 m :2"}, "disagree"),
        ({"name_h-m_alt": "F d -3 m :1", "it_coordinate_system_code": "2"}, "disagree"),
        ({"name_h-m_alt": "F d -3 m :1", "it_number": "225"}, "disagree"),
        ({"name_h-m_alt": "R -3 m :H"}, "the cell has not the symmetry"),
        ({"name_h-m_ref": "F m -3 m"}, "speaks of symmetry"),
        ({"crystal_system": "cubic"}, "speaks of symmetry"),
    ],
)
def test_a_setting_in_doubt_is_refused(said: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidCrystal, match=message):
        named_operations(table(**said), np.eye(3) * 30.0)


def test_two_names_may_settle_what_one_leaves_open() -> None:
    cube = np.eye(3) * 30.0
    expected = key(named_operations(table(**{"name_h-m_alt": "F d -3 m :2"}), cube))
    for said in ({"it_coordinate_system_code": "2"}, {"name_hall": "-F 4vw 2vw 3"}):
        assert key(named_operations(table(**{"name_h-m_alt": "F d -3 m", **said}), cube)) == expected


def test_the_cell_tells_rhombohedral_from_hexagonal_axes() -> None:
    rhombohedral, hexagonal = (
        Lattice(m).metric_tensor for m in (Lattice.rhombohedral(3.8, 57).matrix, Lattice.hexagonal(4, 9).matrix)
    )
    assert len(named_operations(table(**{"name_h-m_alt": "R -3 m"}), rhombohedral)) == 12
    assert len(named_operations(table(**{"name_h-m_alt": "R -3 m"}), hexagonal)) == 36
    with pytest.raises(InvalidCrystal, match="several settings"):
        named_operations(table(**{"name_h-m_alt": "R -3 m"}), np.eye(3) * 14.0)


COLUMNS = "loop_\n_atom_site_label\n_atom_site_type_symbol\n_atom_site_fract_x\n_atom_site_fract_y\n_atom_site_fract_z\n"


def cif(cell: tuple[float, ...], sites: str, *, more: str = "", operations: tuple[str, ...] = ()) -> str:
    names = ("length_a", "length_b", "length_c", "angle_alpha", "angle_beta", "angle_gamma")
    lines = "".join(f"_cell_{name} {value}\n" for name, value in zip(names, cell, strict=True))
    listed = "loop_\n_symmetry_equiv_pos_as_xyz\n" + "".join(f"'{text}'\n" for text in operations) if operations else ""
    return f"data_x\n{more}{lines}{listed}{COLUMNS}{sites}"


def operations_of(name: str) -> tuple[str, ...]:
    return tuple(operation.triplet() for operation in gemmi.find_spacegroup_by_name(name).operations())


HEXAGONAL = (5.2, 5.2, 6.1, 90, 90, 120)
CUBIC = (5.64, 5.64, 5.64, 90, 90, 90)
TRICLINIC = (5.0, 6.0, 7.0, 80, 95, 105)


@pytest.mark.parametrize("digits", [2, 3, 4, 6, 10])
@pytest.mark.parametrize("cut", [False, True])
def test_a_special_position_with_few_digits_is_one_atom(digits: int, cut: bool) -> None:
    third, two_thirds = ((f"{value:.12f}"[: digits + 2] if cut else f"{value:.{digits}f}") for value in (1 / 3, 2 / 3))
    sites = f"Zn1 Zn {third} {two_thirds} 0\nS1 S {third} {two_thirds} 0.375\n"
    crystal = parse_block(cif(HEXAGONAL, sites, operations=operations_of("P 63 m c")))
    exact = Structure.from_spacegroup(
        "P6_3mc", Lattice.hexagonal(5.2, 6.1), ["Zn", "S"], [[1 / 3, 2 / 3, 0], [1 / 3, 2 / 3, 0.375]]
    )
    assert crystal.composition == {30: 2, 16: 2}
    assert StructureMatcher(scale=False, primitive_cell=False, stol=1e-3).fit(to_structure(crystal), exact)


@pytest.mark.parametrize("x", [0.2123, 0.2127, 0.1667, 0.0849])
@pytest.mark.parametrize("digits", [3, 4])
def test_a_place_on_a_line_keeps_its_multiplicity(x: float, digits: int) -> None:
    """(x, 2x, z) and (x, x, x), rounded each for itself."""
    sites = f"Si1 Si {x:.{digits}f} {2 * x:.{digits}f} 0.5\n"
    assert parse_block(cif((9.8, 9.8, 5.2, 90, 90, 120), sites, operations=operations_of("P 6/m m m"))).n_atoms == 6
    sites = f"Si1 Si {x:.{digits}f} {x + 10.0**-digits:.{digits}f} {x:.{digits}f}\n"
    assert parse_block(cif(CUBIC, sites, operations=operations_of("P -4 3 m"))).n_atoms == 4


@pytest.mark.parametrize("x", ["0.0100", "0.02", "0.015", "0.0040"])
def test_two_atoms_that_are_two_stay_two(x: str) -> None:
    """They overlap, and the gate says so; one atom in the middle would be another crystal."""
    crystal = parse_block(cif(TRICLINIC, f"Na1 Na {x} 0 0\nCl1 Cl 0.5 0.5 0.5\n", operations=("x,y,z", "-x,-y,-z")))
    assert crystal.composition == {11: 2, 17: 1}


def test_random_sites_have_the_multiplicities_that_pymatgen_finds() -> None:
    rng = np.random.default_rng(7)
    for name, number in (
        ("P n m a", 62),
        ("I 4/m m m", 139),
        ("P -3 m 1", 164),
        ("P 21/c", 14),
        ("P m -3 m", 221),
    ):
        group = gemmi.find_spacegroup_by_name(name)
        cell = CUBIC if number > 194 else (6, 6, 9, 90, 90, 120) if number > 142 else (6, 6, 9, 90, 90, 90)
        x, y = rng.uniform(0.05, 0.09), rng.uniform(0.2, 0.23)
        for place in ([0, 0, 0], [x, 0.25, y], [x, x, 0.5], [x, 2 * x, y], [0.5, 0, 0.25]):
            ours = parse_block(
                cif(cell, f"Si1 Si {place[0]:.9f} {place[1]:.9f} {place[2]:.9f}\n", operations=operations_of(name))
            )
            theirs = Structure.from_spacegroup(number, Lattice.from_parameters(*cell), ["Si"], [np.round(place, 9)])
            assert ours.n_atoms == len(theirs), (group.hm, place)


def test_atoms_listed_in_full_beside_the_operations_count_once() -> None:
    full = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    sites = "".join(f"{s.specie}{i} {s.specie} {s.a} {s.b} {s.c}\n" for i, s in enumerate(full))
    named = "_symmetry_space_group_name_H-M 'F m -3 m'\n"
    for text in (
        cif(CUBIC, sites, operations=operations_of("F m -3 m")),
        cif(CUBIC, sites, more=named),
        cif(CUBIC, sites, more=named, operations=("x,y,z",)),  # in P1, and the name of what it is
    ):
        assert parse_block(text).composition == {11: 4, 17: 4}


@pytest.mark.parametrize(
    ("sites", "operations", "more", "reason"),
    [
        ("Na1 Na 0 0 0\nCl1 Cl .5 .5 .5\nNa2 Na 0 0 0\n", ("x,y,z",), "", "disordered"),
        ("Na1 Na 0 0 0\nK1 K 0 0 0\n", ("x,y,z",), "", "disordered"),
        ("Na1 Na 0 0 0\nK1 K 0 .5 .5\n", operations_of("F m -3 m"), "", "disordered"),
        ("Na1 Na 0 0 0\nCl1 Cl .5 .5 .5\n", ("x,y,z",), "_symmetry_space_group_name_H-M 'F m -3 m'\n", "malformed"),
        ("Na1 Na 0 0 0\nCl1 Cl .5 .5 .5\n", operations_of("P m -3 m"), "_symmetry_Int_Tables_number 225\n", "malformed"),
        ("Na1 Na 0 0 0\nCl1 Cl .5 .5 .5\n", ("x,y,z",), "_chemical_formula_sum 'Cl Na2'\n", "formula_mismatch"),
        ("Na1 Na 0 0 0\nCl1 Cl .5 .5 .5\n", ("x,y,z",), "_chemical_formula_sum 'Cl H2 Na O'\n", "formula_mismatch"),
        ("Na1 Na 0 0 0\nCl1 Cl .5 .5 .5\n", ("x,y,z",), "_chemical_formula_sum 'Cl X'\n", "formula_mismatch"),
        ("Na1 Na 0 0 0\nCl1 Cl .5 .5 .5\n", ("x,y,z",), "_chemical_formula_structural 'Na2 Cl'\n", "formula_mismatch"),
    ],
)
def test_what_is_another_crystal_than_it_says_is_refused(sites: str, operations: tuple[str, ...], more: str, reason: str) -> None:
    with pytest.raises(InvalidCrystal) as refused:
        parse_block(cif(CUBIC, sites, operations=operations, more=more))
    assert refused.value.reason == reason


@pytest.mark.parametrize("formula", ["Na Cl", "'Cl Na'", "'CL1 NA1'", "'Na1.0 Cl1.000'", "'(Cl4 Na4)'", "?", "'Cl2 Na2 1+'"])
def test_formulas_in_every_spelling(formula: str) -> None:
    more = f"_chemical_formula_sum {formula if formula[0] in chr(39) + '?' else repr(formula)}\n"
    assert parse_block(cif(CUBIC, "Na1 Na 0 0 0\nCl1 Cl .5 .5 .5\n", more=more)).reduced_formula == "NaCl"


def elements(first: str, second: str, *, more: str = "") -> list[str]:
    """What two sites are, each given as label and type symbol, or a label alone."""
    text = cif(CUBIC, f"{first} 0 0 0\n{second} .5 .5 .5\n", more=more)
    return parse_block(text if " " in first else text.replace("_atom_site_type_symbol\n", "")).symbols


def test_symbols_may_be_charged_or_in_capitals() -> None:
    for symbol in ("Na", "Na+", "Na1+", "Na+1", "Na0+", "NA", "NA1+", "na", "Na1", "?", "."):
        assert elements(f"Na1 {symbol}", "Cl1 CL-") == ["Na", "Cl"], symbol
    for symbol, reason in (
        ("X", "unsupported_element"), ("Va", "unsupported_element"), ("Wat", "unsupported_element"), ("OH", "unsupported_element"),
        ("NO3", "unsupported_element"), ("CO", "unsupported_element"),
        ("D", "isotope"), ("D+", "isotope"), ("T", "isotope"), ("2H", "isotope"),
    ):  # fmt: skip
        with pytest.raises(InvalidCrystal) as refused:
            elements(f"A1 {symbol}", "Cl1 Cl")
        assert refused.value.reason == reason, symbol


def test_labels_alone_tell_elements_unless_capitals_leave_a_doubt() -> None:
    for label, symbol in (
        ("Na1", "Na"),
        ("C1", "C"),
        ("C(1)", "C"),
        ("O1'", "O"),
        ("Nb2a", "Nb"),
        ("Ho1", "Ho"),
        ("LI1", "Li"),
        ("Co", "Co"),
    ):
        assert elements(label, "Cl1") == [symbol, "Cl"]
    for label in ("NA1", "CO1", "HO1", "CA1", "Ow1", "Wat1", "Cen1", "M1", "X1", "1Na", "NaA"):
        with pytest.raises(InvalidCrystal, match="add _atom_site_type_symbol"):
            elements(label, "Cl1")
    with pytest.raises(InvalidCrystal, match="isotope"):
        elements("D1", "Cl1")
    assert elements("NA1", "CL1", more="_chemical_formula_sum 'Cl Na'\n") == ["Na", "Cl"]
    assert elements("NA1", "C1", more="_chemical_formula_sum 'C N'\n") == ["N", "C"]
    with pytest.raises(InvalidCrystal, match="add _atom_site_type_symbol"):
        elements("NA1", "N1", more="_chemical_formula_sum 'Na N'\n")


def test_what_is_read_has_the_group_that_was_named() -> None:
    for name, number in (("R -3 m :R", 166), ("I 41/a m d :2", 141), ("P 21/c", 14), ("P b n m", 62), ("H 3", 146)):
        group = gemmi.find_spacegroup_by_name(name)
        cell = {"R": (6, 6, 6, 70, 70, 70), "m": (5, 6, 7, 90, 99, 90), "o": (5, 6, 7, 90, 90, 90), "t": (5, 5, 9, 90, 90, 90)}
        kind = "R" if group.ext == "R" else group.crystal_system_str()[0]
        chosen = (5, 5, 9, 90, 90, 120) if group.ext == "H" else cell[kind]
        crystal: Crystal = parse_block(
            cif(chosen, "Si1 Si 0.1237 0.0731 0.2119\n", more=f"_symmetry_space_group_name_H-M '{name}'\n")
        )
        assert crystal.n_atoms == len(list(group.operations()))
        assert SpacegroupAnalyzer(to_structure(crystal), symprec=1e-3).get_space_group_number() == number
