"""CIF as text: what is a value, a name or a block is known before anything is searched."""

import numpy as np
import pytest

from gnome.crystals.cif import CifLimits, read_block, split_blocks
from gnome.crystals.cif_syntax import number, precision, read_table
from gnome.crystals.crystal import Crystal
from gnome.errors import InvalidCrystal

CELL = """data_salt
_cell_length_a 5.64
_cell_length_b 5.64
_cell_length_c 5.64
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
"""
SITES = """loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
Na1 Na 0 0 0
Cl1 Cl 0.5 0.5 0.5
"""
PLAIN = CELL + SITES
CENTRED = PLAIN.replace("loop_", "loop_\n_symmetry_equiv_pos_as_xyz\n{}\n{}\n{}\n{}\nloop_", 1)


def read(text: str) -> Crystal:
    (block,) = split_blocks(text)
    return read_block(block, CifLimits())


@pytest.mark.parametrize(
    "text",
    [
        PLAIN.upper().replace("NA1 NA", "Na1 Na").replace("CL1 CL", "Cl1 Cl"),
        PLAIN.replace("_cell_", "_Cell.").replace("_atom_site_", "_Atom_site."),
        PLAIN.replace("\n", "\r\n"),
        PLAIN.replace("\n", "\r"),
        "\ufeff" + PLAIN,
        "A heading that is no comment\n" + PLAIN,
        PLAIN.replace("_cell_length_b", "#" + "x" * 100_000 + " data_z\n_cell_length_b"),
        PLAIN.replace("Cl1 Cl", "# data_of another kind\n\nCl1\n  Cl"),
        PLAIN.replace("Na1 Na", "'Na1'' \"Na\"").replace("Cl1 Cl", '"Cl\'1" Cl'),
        PLAIN.replace("_cell_length_a 5.64", "_note\n;\ndata_z\nloop_\n_cell_length_a\n'open\n;\n_cell_length_a\n;5.64\n;"),
        PLAIN.replace("_cell_length_a", "_note 'says data_z and _cell_length_b 7' _cell_length_a"),
        PLAIN.replace("_cell_length_b", '_author Müller _place "Åbo" _cell_length_b'),
        PLAIN.replace("5.64", "'5.64(2)'").replace("90", "90.(0)").replace("0.5 0.5 0.5", "+.5 1/2 50.E-2"),
        PLAIN + "loop_\n_atom_site_aniso_label\n_atom_site_aniso_U_11\nNa1 0.1\n",
        PLAIN + "_author ?\n_author .\n",
        PLAIN.replace("fract_", "Cartn_").replace("0.5 0.5 0.5", "2.82 2.82 2.82"),
    ],
)
def test_ways_to_write_one_crystal(text: str) -> None:
    crystal = read(text)
    assert crystal.composition == {11: 1, 17: 1}
    assert crystal.lattice == pytest.approx(np.eye(3) * 5.64, abs=1e-9)
    assert crystal.frac_coords == pytest.approx(np.array([[0, 0, 0], [0.5, 0.5, 0.5]]), abs=1e-9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PLAIN.replace("_cell_length_a 5.64\n", "") + "data_other\n_cell_length_a 5.64\n", "no number for _cell_length_a"),
        (PLAIN.replace("0.5 0.5 0.5", "0.5 ? 0.5"), "no number for _atom_site_fract_y but '?'"),
        (PLAIN.replace("0.5 0.5 0.5", "0.5 \u22120.5 0.5"), "no number for _atom_site_fract_y"),
        (PLAIN.replace("5.64", "5,64"), "no number for _cell_length_a, _cell_length_b, _cell_length_c"),
        (PLAIN + "_note\n;\nnever ends\n", "of the block: unterminated text field"),
        (CELL + CELL.replace("salt", "other"), "2 data blocks, none of which lists atoms"),
        (CELL, "no atoms are listed"),
        (PLAIN + "Na2 Na 0.5\n", "Wrong number of values in loop"),
        (PLAIN.replace("data_salt\n", ""), "begins with a line data_NAME"),
        (PLAIN + "_CELL_length_a 5.7\n", "_CELL_length_a more than once in one block"),
        (PLAIN + SITES.replace("Na", "K"), "more than once in one block"),
        (PLAIN + "loop_\n_atom_site_occupancy\n1\n1\n", "stand in several loops"),
        (PLAIN.replace("fract_", "Cartn_").replace("gamma 90", "gamma 120"), "write fractional ones"),
        (PLAIN.replace("alpha 90", "alpha 179").replace("beta 90", "beta 30"), "no three vectors have such"),
        (PLAIN.replace("loop_", "loop_\n_space_group_symop_magn_operation.xyz\nx,y,z,+1\nloop_", 1), "magnetic group"),
        (PLAIN.replace("loop_", "_cell_modulation_dimension 1\nloop_", 1), "modulated"),
        (
            PLAIN.replace("_z\n", "_z\n_atom_site_disorder_group\n").replace("0 0\n", "0 0 1\n").replace(".5\n", ".5 2\n"),
            "disorder",
        ),
    ],
)
def test_what_is_in_doubt_is_refused_and_said(text: str, message: str) -> None:
    with pytest.raises(InvalidCrystal) as refused:
        read(text)
    assert message in str(refused.value)


def test_blocks_begin_where_no_quote_or_text_field_is_open() -> None:
    other = PLAIN.replace("salt", "other").replace("5.64", "5.7")
    broken = PLAIN.replace("salt", "broken").replace("Cl1 Cl 0.5", "Cl1 Cl")
    hidden = PLAIN.replace("loop_", "_note\n;\ndata_x _atom_site_label\n;\n_more 'data_y' loop_", 1)
    blocks = split_blocks("data_global\n_x 1\n" + hidden + broken.replace("\n", "\r\n") + other + "data_behind\n_y 2\n")
    assert [block.split()[0] for block in blocks] == ["data_salt", "data_broken", "data_other"]
    assert read_block(blocks[0], CifLimits()).n_atoms == 2
    assert read_block(blocks[2], CifLimits()).lattice[0, 0] == pytest.approx(5.7)
    with pytest.raises(InvalidCrystal, match="Wrong number of values"):
        read_block(blocks[1], CifLimits())


@pytest.mark.parametrize(
    "operations",
    [
        ("x,y,z", "x+1/2,y+1/2,z", "x+1/2,y,z+1/2", "x,y+1/2,z+1/2"),
        ("' X,  Y, Z'", "'1/2+X, 1/2+Y, Z'", "'X, 1/2+y, 1/2+z'", "'1/2+x, y, z-1/2'"),
        ("'x,y,z'", "'0.5+x,.5+y,z'", "'+x,0.50+y,0.5+z'", "'x-0.5,y,z+0.5'"),
    ],
)
def test_operations_in_every_spelling(operations: tuple[str, ...]) -> None:
    assert read(CENTRED.format(*operations)).composition == {11: 4, 17: 4}


@pytest.mark.parametrize(
    ("operations", "message"),
    [
        (("x,y,z", "x+1/2,y+1/2,z", "x+1/2,y,z+1/2", "x,y,z"), "are no group"),
        (("x,y,z", "-x,-y,q", "x,y,z", "x,y,z"), "'-x,-y,q' is no symmetry operation"),
        (("x,y,z", "x/2,y,z", "x,y,z", "x,y,z"), "is no symmetry operation"),
        (("x,y,z", "x,y,y", "x,y,z", "x,y,z"), "is no symmetry operation"),
        (("x,y,z", "x,y,z,+1", "x,y,z", "x,y,z"), "is no symmetry operation"),
        (("x,", "y,", "z", "x"), "is no symmetry operation"),
    ],
)
def test_operations_that_are_none_or_too_few_are_refused(operations: tuple[str, ...], message: str) -> None:
    with pytest.raises(InvalidCrystal, match=message):
        read(CENTRED.format(*operations))


def test_thirds_with_few_digits_are_thirds() -> None:
    head = CELL.replace("gamma 90", "gamma 120")
    texts = [
        f"{head}loop_\n_symmetry_equiv_pos_as_xyz\nx,y,z\n{a}+x,{b}+y,{b}+z\n{b}+x,{a}+y,{a}+z\n{SITES}"
        for a, b in (("2/3", "1/3"), ("0.67", "0.33"), ("0.6667", "0.3333"), ("0.66667", "0.33333"))
    ]
    crystals = [read(text) for text in texts]
    assert crystals[0].n_atoms == 6
    for crystal in crystals[1:]:
        assert crystal.frac_coords == pytest.approx(crystals[0].frac_coords, abs=1e-9)


def test_numbers_and_how_well_they_are_known() -> None:
    for text, value, unit in (
        ("5.64(2)", 5.64, 0.02), ("1.", 1.0, 1.0), (".5", 0.5, 0.1), ("-0.2123", -0.2123, 1e-4), ("1/3", 1 / 3, 0.0), ("12E-1", 1.2, 0.1),
    ):  # fmt: skip
        assert number(text) == pytest.approx(value, abs=1e-12)
        assert precision(text) == pytest.approx(unit, abs=1e-12)
    for text in ("?", ".", "", "1/0", "5,6", "nan", "inf", "1.2.3", "0x10", "(5)"):
        assert number(text) is None


def test_names_are_known_in_any_spelling_and_unsaid_values_are_none() -> None:
    table = read_table("DATA_A\n_Cell.Length_A ?\nLOOP_ _Q.r _s\n1 'a b'\n. \"c\"\n")
    assert table.column("_q_r") == ("1", ".")
    assert table.column("_absent", "_s") == ("a b", "c")
    assert table.one("_cell_length_a") == ""
    assert table.loops["_q_r"] == table.loops["_s"]
