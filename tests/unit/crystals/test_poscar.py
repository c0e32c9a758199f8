"""POSCAR by VASP's rules, held against pymatgen and ASE."""

import io
from pathlib import Path

import ase.io
import numpy as np
import pytest
from pymatgen.core import Lattice, Structure
from pymatgen.io.vasp import Poscar

from gnome.crystals.convert import from_atoms, from_structure
from gnome.crystals.crystal import Crystal
from gnome.crystals.formats import ReadCrystal, ReadItem, read_crystals
from gnome.crystals.poscar import read_poscar
from gnome.errors import InvalidCrystal

HEAD = "title\n1.0\n4.0 0.1 0\n0 4.2 0.2\n0.3 0 4.4\nNa Cl\n1 2\n"
COORDS = ("0 0 0", "0.5 0.5 0.25", "0.5 0.1 0.7")


def text(*ends: str, head: str = HEAD, mode: str = "Direct", coords: tuple[str, ...] = COORDS) -> str:
    ends = ends or ("",) * len(coords)
    return head + mode + "\n" + "".join(f"{place} {end}\n" for place, end in zip(coords, ends, strict=True))


def read(poscar: str) -> Crystal:
    return read_poscar(poscar, max_atoms=100)


EXPECTED = Crystal.from_symbols(
    [[4.0, 0.1, 0], [0, 4.2, 0.2], [0.3, 0, 4.4]], ["Na", "Cl", "Cl"], [[float(x) for x in place.split()] for place in COORDS]
)


@pytest.mark.parametrize(
    "poscar",
    [
        text(),
        text(head=HEAD.replace("1.0", "1.0 1.0 1.0")),
        text(head=HEAD.replace("1.0", "1.0D+00 ! scale")),
        text(
            "! Na", "# 0.5", "! K", head=HEAD.replace("Na Cl", "Na Cl ! K").replace("1 2", "1 2 # 5 5"), mode="direct ! Cartesian"
        ),
        text("Na", "Cl", "Cl"),
        text("Na1", "Cl1-", "Cl2"),
        text("Na T T F", "Cl F F F", "Cl .TRUE. .FALSE. T", mode="Selective dynamics\nDirect"),
        text("T T F Na", "F F F Cl", "T T T Cl", mode="  selective ! 3 flags\n  direct"),
        text("T T F", "F F F", "T T T", mode="Selective dynamics\nDirect"),
        text("T T F", "F F F", "T T T"),
        text("Na T T F", "Na F F F", "Na T T T", mode="Selective dynamics\nDirect"),  # a word that tells no atoms apart
        text("1", "2", "site 3"),
        text(head=HEAD.replace("Na Cl", "Na_pv/f474ac0d  Cl/0123abcd")),
        text(head=HEAD.replace("Na Cl", "Na Cl\n  Cl").replace("1 2", "1 1\n 1")),
        text("Na", "Cl", "Cl", head=HEAD.replace("Na Cl\n", "")),
        text(coords=("0 0 0", *(" ".join(map(str, EXPECTED.cart_coords[i])) for i in (1, 2))), mode="Cartesian"),
        text(coords=("0 0 0", *(" ".join(map(str, EXPECTED.cart_coords[i])) for i in (1, 2))), mode="kart"),
        text() + "\n" + "0 0 0\n" * 3,
    ],
)
def test_ways_to_write_one_crystal(poscar: str) -> None:
    crystal = read(poscar)
    assert crystal.symbols == EXPECTED.symbols
    assert crystal.lattice == pytest.approx(EXPECTED.lattice, abs=1e-9)
    assert crystal.frac_coords == pytest.approx(EXPECTED.frac_coords, abs=1e-9)


def test_fluorine_is_no_flag() -> None:
    head = HEAD.replace("Na Cl", "Na F")
    for poscar in (
        text("Na", "F", "F", head=head),
        text("Na T F T", "F T F F", "F F F F", head=head, mode="S\nDirect"),
        text("T F T Na", "T F F F", "F F F F", head=head, mode="S\nDirect"),
    ):
        assert read(poscar).symbols == ["Na", "F", "F"]


def test_flags_behind_an_element_without_a_line_of_symbols() -> None:
    """Of four words the last three are flags, so that an F before them is fluorine."""
    head = HEAD.replace("Na Cl\n", "")
    for ends in (("Na T T T", "F T T T", "F F F T"), ("Na F T F", "F F T F", "F F F F"), ("T T T Na", "T T T F", "F T F F")):
        assert read(text(*ends, head=head, mode="S\nDirect")).symbols == ["Na", "F", "F"], ends
    assert read(text("Na", "F", "F", head=head)).symbols == ["Na", "F", "F"]
    with pytest.raises(InvalidCrystal, match="without element names"):
        read(text("T T T", "F T T", "F T T", head=head, mode="S\nDirect"))
    salt = text("F T T T", "T T F T", "F F T T", mode="S\nDirect")
    assert read(salt).symbols == EXPECTED.symbols, "the line of symbols says what they are"


@pytest.mark.parametrize("mode", ["Direct", "Cartesian"])
@pytest.mark.parametrize("factor", ["2.0", "2.0 0.5 1.5", "-150.0"])
def test_factors_scale_as_ase_does(factor: str, mode: str) -> None:
    """pymatgen reads no three factors, and Cartesian coordinates beside a volume wrongly."""
    poscar = text(head=HEAD.replace("1.0", factor), mode=mode)
    theirs = from_atoms(ase.io.read(io.StringIO(poscar), format="vasp"))
    ours = read(poscar)
    assert ours.lattice == pytest.approx(theirs.lattice, abs=1e-8)
    assert (ours.frac_coords - theirs.frac_coords) == pytest.approx(0, abs=1e-8)
    if factor.startswith("-"):
        assert ours.volume == pytest.approx(150.0)


@pytest.mark.parametrize(
    ("poscar", "message"),
    [
        (text("Cl", "Na", "Cl"), "atom 1 is Na by the line of symbols and Cl by its own line"),
        (text("Na", "Na", "Na"), "atom 2 is Cl by the line of symbols and Na by its own line"),
        (text("K", "Cl", "Cl"), "atom 1 is Na by the line of symbols and K by its own line"),
        (text("Na T T T", "K T T T", "Cl T T T", mode="S\nDirect"), "atom 2 is Cl by the line of symbols and K"),
        (text("T T T Na", "T T T Na", "T T T Na", mode="S\nDirect"), "atom 2 is Cl by the line of symbols and Na"),
        (text("K T T T", "K T T T", "K T T T", mode="S\nDirect"), "atom 1 is Na by the line of symbols and K"),
        (text("Na Cl", "Cl", "Cl"), "an atom is Cl and Na at once"),
        (text("T T", "T T T", "T T T", mode="S\nDirect"), "three flags T or F"),
        (text(head=HEAD.replace("Na Cl\n", "")), "add the line of symbols"),
        (text("Na", "", "Cl", head=HEAD.replace("Na Cl\n", "")), "add the line of symbols"),
        (text(head=HEAD.replace("Na Cl", "NA CL")), "'NA' in the line of symbols is not an element"),
        (text(head=HEAD.replace("Na Cl", "Na D")), "isotope"),
        (text(head=HEAD.replace("Na Cl", "Na Cl Br")), "3 symbols and 2 numbers"),
        (text(head=HEAD.replace("1 2", "0 0"), coords=()), "no atoms are announced"),
        (text(head=HEAD.replace("1 2", "1 2.5")), "numbers of atoms are expected"),
        (text(head=HEAD.replace("1.0", "0")), "one scaling factor or three"),
        (text(head=HEAD.replace("1.0", "1 1 -1")), "one scaling factor or three"),
        (text(head=HEAD.replace("1.0", "1 1")), "one scaling factor or three"),
        (text(head=HEAD.replace("0 4.2 0.2", "0 4.2")), "three numbers are expected, not '0 4.2'"),
        (text(head=HEAD.replace("0 4.2 0.2", "0 4.2 0.2 1")), "three numbers are expected"),
        (text(coords=("0 0 0", "0.5 0.5", "0.1 0.1 0.1")), "three numbers are expected, not '0.5 0.5'"),
        (text(mode="0 0 0"), "a line Direct or Cartesian is expected"),
        (text(mode="Angstrom"), "a line Direct or Cartesian is expected"),
        (text(coords=COORDS[:2]), "3 atoms are announced, fewer are there"),
        (text(coords=(*COORDS, "0.9 0.9 0.9")), "something stands after the last of 3 atoms"),
    ],
)
def test_what_is_in_doubt_is_refused_and_said(poscar: str, message: str) -> None:
    with pytest.raises(InvalidCrystal) as refused:
        read(poscar)
    assert message in str(refused.value)


@pytest.mark.filterwarnings("ignore")  # its remark on fluorine and flags
def test_what_pymatgen_writes_is_read_as_it_reads_it() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        lattice = Lattice(np.eye(3) * 6 + rng.uniform(-1, 1, (3, 3)))
        structure = Structure(lattice, ["Na", "F", "Na", "C", "O"], rng.random((5, 3)))
        flags = rng.random((5, 3)) > 0.5
        for poscar in (Poscar(structure), Poscar(structure, selective_dynamics=flags)):
            for direct in (True, False):
                written = poscar.get_str(direct=direct, significant_figures=12)
                ours, theirs = read(written), from_structure(Poscar.from_str(written).structure)
                assert ours.symbols == theirs.symbols
                assert ours.lattice == pytest.approx(theirs.lattice, abs=1e-9)
                assert ours.frac_coords == pytest.approx(theirs.frac_coords, abs=1e-9)


def read_named(folder: Path, name: str, content: str) -> ReadItem:
    (folder / name).write_text(content)
    (item,) = read_crystals(folder / name)
    return item


def test_the_ending_of_a_name_says_more_than_its_beginning(tmp_path: Path) -> None:
    poscar = text()
    for name in (
        "POSCAR", "CONTCAR", "poscar", "NaCl_POSCAR", "NaCl-CONTCAR", "SPOSCAR", "MPOSCAR-001", "POSCAR_relaxed", "CONTCAR_2",
        "POSCAR.orig", "run3-POSCAR.bak", "a.vasp", "a.VASP", "NaCl.poscar", "NaCl.POSCAR", "a.contcar", "xPOSCAR", "run_CONTCAR_2.txt",
    ):  # fmt: skip
        item = read_named(tmp_path, name, poscar)
        assert isinstance(item, ReadCrystal), (name, item)
        assert item.crystal == EXPECTED
    cif = "data_x\n" + "".join(f"_cell_length_{axis} 4\n" for axis in "abc")
    cif += "".join(f"_cell_angle_{angle} 90\n" for angle in ("alpha", "beta", "gamma"))
    cif += "loop_\n_atom_site_label\n_atom_site_fract_x\n_atom_site_fract_y\n_atom_site_fract_z\nCs1 0 0 0\nCl1 .5 .5 .5\n"
    for name in ("POSCAR.cif", "CONTCAR_relaxed.cif", "NaCl_POSCAR.CIF"):
        item = read_named(tmp_path, name, cif)
        assert isinstance(item, ReadCrystal), (name, item)
        assert item.crystal.reduced_formula == "CsCl"
    for name in ("notes.docx", "OUTCAR", "disposcarded.txt"):
        assert getattr(read_named(tmp_path, name, poscar), "reason", "") == "unknown_format", name
