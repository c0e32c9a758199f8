"""Crystals of the shipped seeds through CIF: written by pymatgen, ASE and us, and read by all three as the same crystal."""

import io
from pathlib import Path

import ase.io
import gemmi
import numpy as np
import pytest
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Lattice, Structure
from pymatgen.io.cif import CifParser, CifWriter

from gnome.crystals.cif import CifLimits, read_block, split_blocks
from gnome.crystals.cif_syntax import read_table
from gnome.crystals.cif_text import cif_text
from gnome.crystals.convert import from_atoms, from_structure, to_atoms, to_structure
from gnome.crystals.crystal import Crystal
from gnome.crystals.formats import ReadCrystal, Refusal, read_crystals
from gnome.crystals.shards import read_shard
from gnome.crystals.writers import to_cifs, write_crystals

SEEDS = Path(__file__).resolve().parents[3] / "data" / "seeds.parquet"
SAMPLE = 24


@pytest.fixture(scope="module")
def seeds() -> list[Crystal]:
    crystals = list(read_shard(SEEDS)[0])
    return crystals[7 :: len(crystals) // SAMPLE]


def ours(text: str) -> Crystal:
    (block,) = split_blocks(text)
    return read_block(block, CifLimits())


def of_pymatgen(text: str) -> Crystal:
    return from_structure(CifParser.from_str(text).parse_structures(primitive=False)[0])


def of_ase(text: str) -> Crystal:
    return from_atoms(ase.io.read(io.StringIO(text), format="cif"))


def assert_same(one: Crystal, other: Crystal) -> None:
    assert one.composition == other.composition
    assert one.volume == pytest.approx(other.volume, rel=1e-4)
    matcher = StructureMatcher(ltol=1e-3, stol=5e-3, angle_tol=0.1, scale=False, primitive_cell=False)
    assert matcher.fit(to_structure(one), to_structure(other))


@pytest.mark.filterwarnings("ignore")  # pymatgen's and ASE's remarks on rounding
def test_what_others_write_is_read_as_they_read_it(seeds: list[Crystal]) -> None:
    for crystal in seeds:
        for symprec in (None, 1e-3):
            text = str(CifWriter(to_structure(crystal), symprec=symprec))
            assert_same(ours(text), of_pymatgen(text))
        written = io.BytesIO()
        ase.io.write(written, to_atoms(crystal), format="cif")
        assert_same(ours(written.getvalue().decode()), crystal)


@pytest.mark.filterwarnings("ignore")
def test_what_we_write_all_read_as_the_same_crystal(seeds: list[Crystal]) -> None:
    for crystal in seeds:
        text = cif_text(crystal, "x")
        for read in (ours, of_pymatgen, of_ase):
            assert_same(read(text), crystal)


def test_written_files_say_their_symmetry(seeds: list[Crystal]) -> None:
    numbers = [int(read_table(cif_text(crystal, "x")).one("_space_group_it_number")) for crystal in seeds]
    assert sum(number > 1 for number in numbers) > 0.8 * len(seeds)
    salt = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    table = read_table(cif_text(from_structure(salt), "salt"))
    assert table.one("_space_group_name_h-m_alt") == "F m -3 m"
    assert table.one("_space_group_name_hall") == "-F 4 2 3"
    assert len(table.column("_space_group_symop_operation_xyz")) == 192
    assert table.column("_atom_site_label") == ("Na1", "Cl1")
    assert (table.one("_chemical_formula_sum"), table.one("_cell_formula_units_z")) == ("Cl Na", "4")
    primitive = read_table(cif_text(from_structure(salt.get_primitive_structure()), "salt"))
    assert primitive.one("_space_group_name_h-m_alt") == ""  # the name would mean the cubic cell
    assert primitive.one("_space_group_it_number") == "225"
    assert len(primitive.column("_space_group_symop_operation_xyz")) == 48


@pytest.mark.parametrize("name", ["Fd-3m:1", "Fd-3m:2", "R-3m:H", "P2_1/c", "Pnma", "P4/nmm:2"])
def test_settings_are_named_so_that_the_names_alone_mean_the_same(name: str) -> None:
    cells = {
        "Fd": Lattice.cubic(9),
        "R-": Lattice.hexagonal(7, 11),
        "P4": Lattice.tetragonal(6, 9),
        "Pn": Lattice.orthorhombic(6, 7, 8),
    }
    lattice = cells.get(name[:2], Lattice.monoclinic(6, 7, 8, 100))
    structure = Structure.from_spacegroup(name, lattice, ["Si"], [[0.11, 0.11, 0.11] if name[0] == "F" else [0.11, 0.07, 0.21]])
    text = cif_text(from_structure(structure), "x")
    assert_same(ours(text), from_structure(structure))
    lines = [line for line in text.splitlines() if not line[:1].isdigit() and "_symop_" not in line]
    lines.remove("loop_")
    assert_same(ours("\n".join(lines)), from_structure(structure))
    by_name = "\n".join(line for line in lines if "_Hall" not in line)
    assert_same(ours(by_name), from_structure(structure))


def test_an_origin_anywhere_is_moved_and_a_supercell_is_kept() -> None:
    salt = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    salt.translate_sites(range(8), [0.1234, 0.0567, 0.2891])
    text = cif_text(from_structure(salt), "x")
    assert read_table(text).one("_space_group_name_h-m_alt") == "F m -3 m"
    assert_same(ours(text), from_structure(salt))
    double = from_structure(salt * (1, 1, 2))
    assert_same(ours(cif_text(double, "x")), double)
    rotated = Crystal(
        double.lattice[[2, 0, 1]] @ np.array([[0, 1, 0], [-1, 0, 0], [0, 0, 1]]), double.atomic_numbers, double.frac_coords
    )
    assert_same(ours(cif_text(rotated, "x")), rotated)


@pytest.mark.parametrize(("size", "in_p1"), [(2e-5, False), (1e-3, True)])
def test_what_symmetry_would_move_is_written_in_p1(size: float, in_p1: bool) -> None:
    salt = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    shaken = Structure(
        salt.lattice, salt.species, salt.cart_coords + np.random.default_rng(1).normal(0, size, (8, 3)), coords_are_cartesian=True
    )
    text = cif_text(from_structure(shaken), "x")
    assert (len(read_table(text).column("_space_group_symop_operation_xyz")) == 1) is in_p1
    back = ours(text)
    if in_p1:
        moved = back.frac_coords - from_structure(shaken).frac_coords
        assert np.linalg.norm((moved - np.rint(moved)) @ back.lattice, axis=1).max() < 1e-6
    assert_same(back, from_structure(shaken))


def test_what_is_called_alike_is_numbered() -> None:
    salt = from_structure(Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]))
    labels = ["a", "A", "a_2", "a", "b", "a b", "a-b"]
    text = to_cifs(ReadCrystal(label=label, crystal=salt) for label in labels)
    names = [block.name.lower() for block in gemmi.cif.read_string(text)]
    assert len(set(names)) == len(labels)


def test_energies_are_read_as_they_are_written(tmp_path: Path) -> None:
    salt = from_structure(Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]))
    fields = {
        "method": "imported-it's mine-1",
        "energy_per_atom": -3.25,
        "correction_per_atom": -1e-5,
        "e_form_per_atom": -2,
        "round": 3,
    }
    for name in ("a.cif", "a.csv"):
        write_crystals(tmp_path / name, [ReadCrystal(label="x", crystal=salt, fields=fields)])
        (item,) = read_crystals(tmp_path / name)
        assert isinstance(item, ReadCrystal)
        assert {each: item.fields[each] for each in list(fields)[:4]} == {each: fields[each] for each in list(fields)[:4]}
    wrong = (tmp_path / "a.cif").read_text().replace("-3.25", "low")
    (tmp_path / "a.cif").write_text(wrong)
    (item,) = read_crystals(tmp_path / "a.cif")
    assert isinstance(item, Refusal)
    assert "_gnome_energy_per_atom is 'low'" in item.message
