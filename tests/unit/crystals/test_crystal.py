"""Crystals as arrays, their conversions, formulas and shards."""

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from pymatgen.core import Composition, Lattice, Structure

from gnome.crystals.convert import from_atoms, from_structure, to_atoms, to_structure
from gnome.crystals.crystal import Crystal
from gnome.crystals.formula import parse_amounts, parse_formula, reduced_formula, split_bucket
from gnome.crystals.shards import read_shard, write_shard
from gnome.errors import InvalidCrystal, InvalidInput

SALT = Crystal.from_symbols([[0, 2.82, 2.82], [2.82, 0, 2.82], [2.82, 2.82, 0]], ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])


def test_arrays_are_frozen_and_copied() -> None:
    lattice = np.eye(3) * 4
    crystal = Crystal(lattice, np.array([11]), np.zeros((1, 3)))
    lattice[0, 0] = 9
    assert crystal.lattice[0, 0] == 4
    with pytest.raises(ValueError, match="read-only"):
        crystal.frac_coords[0, 0] = 1


@pytest.mark.parametrize(
    ("lattice", "numbers", "coords", "reason"),
    [
        (np.eye(2), [1], [[0, 0, 0]], "malformed"),
        (np.eye(3), [], np.zeros((0, 3)), "malformed"),
        (np.eye(3), [1, 1], [[0, 0, 0]], "malformed"),
        (np.eye(3), [0], [[0, 0, 0]], "unsupported_element"),
        (np.eye(3), [118], [[0, 0, 0]], "unsupported_element"),
    ],
)
def test_what_is_no_crystal_is_refused(lattice: object, numbers: object, coords: object, reason: str) -> None:
    with pytest.raises(InvalidCrystal) as caught:
        Crystal(lattice, numbers, coords)  # type: ignore[arg-type]
    assert caught.value.reason == reason


def test_ids_name_the_numbers() -> None:
    shifted = Crystal(SALT.lattice, SALT.atomic_numbers, SALT.frac_coords + 1.0)
    assert shifted.id == SALT.id, "coordinates wrap"
    assert Crystal.from_dict(SALT.to_dict()) == SALT
    assert SALT.scaled(1.01).id != SALT.id
    assert SALT.with_atomic_numbers([19, 17]).id != SALT.id


def test_pymatgen_and_ase_agree_on_the_crystal() -> None:
    structure, atoms = to_structure(SALT), to_atoms(SALT)
    assert structure.composition.reduced_formula == SALT.reduced_formula == "NaCl"
    assert structure.volume == pytest.approx(SALT.volume)
    assert atoms.get_volume() == pytest.approx(SALT.volume)
    assert np.allclose(structure.cart_coords, SALT.cart_coords)
    assert np.allclose(atoms.positions, SALT.cart_coords)
    assert from_structure(structure) == SALT
    assert from_atoms(atoms) == SALT


def test_oxidation_states_are_dropped_and_isotopes_refused() -> None:
    structure = to_structure(SALT)
    structure.add_oxidation_state_by_element({"Na": 1, "Cl": -1})
    assert from_structure(structure) == SALT
    for deuteride in (["Li", "D"], ["Li+", "D-"]):
        with pytest.raises(InvalidCrystal, match="D is an isotope") as caught:
            from_structure(Structure(Lattice.cubic(4), deuteride, [[0, 0, 0], [0.5, 0.5, 0.5]]))
        assert caught.value.reason == "isotope"


def test_dummies_disorder_and_molecules_are_refused() -> None:
    for species, reason in (["X0+", "unsupported_element"], [{"Na": 0.5}, "disordered"]):
        with pytest.raises(InvalidCrystal) as caught:
            from_structure(Structure(Lattice.cubic(4), [species], [[0, 0, 0]]))
        assert caught.value.reason == reason
    with pytest.raises(InvalidCrystal, match="all three directions"):
        from_atoms(Atoms("Na", cell=[4, 4, 4], pbc=[True, True, False]))


@pytest.mark.parametrize("text", ["NaN", "LiFePO4", "Ba(NO3)2", "H2O2", "Al2(SO4)3", "O2", "CsAu", "K2PtCl6", "LiO", "NaO2"])
def test_formulas_are_spelled_as_pymatgen_spells_them(text: str) -> None:
    amounts = parse_formula(text)
    assert {z: float(amount) for z, amount in amounts.items()} == {element.Z: n for element, n in Composition(text).items()}
    assert reduced_formula(amounts) == Composition(text).reduced_formula


@pytest.mark.parametrize("text", ["CuSO4·5H2O", "CuSO₄•5H₂O", "H2O · CuSO4 · 4 H2O", "CuSO4(H2O)5"])
def test_hydrates_and_subscripts(text: str) -> None:
    assert parse_formula(text) == {1: 10, 8: 9, 16: 1, 29: 1}


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("Ba1 (N1 O3)2", "Ba(NO3)2"),
        ("[Co (N H3)6] Cl3", "Co(NH3)6Cl3"),
        ("Li1.5CoO2", "Li1.5Co1O2"),
        ("Li1.2(Li0.1Mn0.7)O2", "Li1.3Mn0.7O2"),
        ("CuSO4 (H2O)5", "CuSO4·5H2O"),
        ("Na2 SO4", "Na2SO4"),
        ("K Al(SO4)2", "KAl(SO4)2"),
        ("Li Fe PO4", "LiFePO4"),
        ("La1.85Sr0.15CuO4", "Sr0.15La1.85CuO4"),
        ("(La0.5Sr0.5)(MnO3)0.5(TiO3)0.5", "La0.5Sr0.5Mn0.5Ti0.5O3"),
    ],
)
def test_spaces_and_points_that_read_one_way_are_read(text: str, plain: str) -> None:
    assert parse_amounts(text) == pytest.approx(parse_amounts(plain))


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("CuSO4·", "one is missing"),
        ("CuSO4·5", "one is missing"),
        ("·5H2O", "one is missing"),
        ("Fe²⁺", "charges"),
        ("CuSO4.5H2O", "hydrate"),
        ("CuSO₄.5H₂O", "hydrate"),
        ("CuSO4.5 H2O", "hydrate"),
        ("CaSO4.2(H2O)", "hydrate"),
        ("NaBr.2H2O", "hydrate"),
        ("MgCl2.6NH3", "hydrate"),
        ("CaO.2Al2O3", "side by side"),
        ("Li.5CoO2", "write a fraction as 0.5"),
        ("Fe(III)2O3", "oxidation states"),
        ("Fe(OH]2", "never opened"),
        ("NaCl 2", "several"),
        ("K Cl 2", "cannot be read"),
        ("Fe2O3 NaCl", "several"),
        ("Mg3(PO4)2 NaCl", "several"),
        ("(NaCl KCl)2", "several"),
        ("Fe2O3\u2028NaCl", "several"),
        ("Fe\x0cO", "cannot be read"),
        ("Al2O3.2SiO2", "side by side"),
        ("Fe()O", "holds nothing"),
        ("Na0Cl", "amount of 0"),
        ("CaO·0Al2O3", "one is missing"),
        ("Fe٣O", "cannot be read"),
    ],
)
def test_what_is_almost_a_formula_gets_a_hint(text: str, hint: str) -> None:
    with pytest.raises(InvalidInput, match=hint):
        parse_formula(text)


@pytest.mark.parametrize("text", ["", "Xx2", "Na(Cl", "Na)", "2Na", "Na1.5Cl", "D2O", "Na0", "N" * 500, "Na99999999"])
def test_what_is_no_formula_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        parse_formula(text)


def test_the_split_follows_the_rule() -> None:
    assert split_bucket("NaCl") == 73  # printf NaCl | md5sum, modulo 100 with bc


def test_shards_round_trip(tmp_path: Path) -> None:
    crystals = [SALT, SALT.scaled(1.2)]
    write_shard(tmp_path / "a.parquet", crystals, {"e_form_per_atom": [-2.0, None]}, {"method": {"code": "x"}})
    back, columns, metadata = read_shard(tmp_path / "a.parquet")
    assert back == crystals
    assert columns == {"e_form_per_atom": [-2.0, None]}
    assert metadata == {"method": {"code": "x"}}
    with pytest.raises(InvalidInput, match="1 rows for 2 crystals"):
        write_shard(tmp_path / "a.parquet", crystals, {"e_form_per_atom": [-2.0]})
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"], "no temporary file is left"
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-40])
    with pytest.raises(InvalidInput, match="cannot be read as Parquet"):
        read_shard(tmp_path / "b.parquet")
