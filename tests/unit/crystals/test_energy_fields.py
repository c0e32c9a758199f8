"""Energies beside crystals: which are read, which are named as not read, and what they were computed with."""

import json
from pathlib import Path
from typing import Any

import pytest
from pymatgen.core import Lattice, Structure

from gnome.crystals.energy_fields import GGA, energy_per_atom_under, family_of, run_family, unread_energies, with_own_names
from gnome.crystals.formats import ReadCrystal, ReadItem, Refusal, read_crystals
from gnome.errors import InvalidCrystal

HALITE = Structure(Lattice.cubic(4.1), ["Cs", "Br"], [[0, 0, 0], [0.5, 0.5, 0.5]])


def frame(keys: str = "", properties: str = "species:S:1:pos:R:3", extra: str = "") -> str:
    lines = [f"Cs 0 0 0{extra}", f"Br 2.05 2.05 2.05{extra}"]
    return "\n".join(["2", f'Lattice="4.1 0 0 0 4.1 0 0 0 4.1" Properties={properties} {keys} pbc="T T T"', *lines, ""])


def one(path: Path, text: str) -> ReadItem:
    path.write_text(text)
    (item,) = read_crystals(path)
    return item


@pytest.mark.parametrize(
    "name",
    [
        "REF_energy", "free_energy", "dft_energy", "mace_energy", "E0", "Energy", "TOTEN", "e_total", "final_energy",
        "uncorrected_energy_per_atom", "corrected_total_energy", "formation_energy_peratom",
    ],
)  # fmt: skip
def test_what_looks_like_an_energy_is_named(tmp_path: Path, name: str) -> None:
    item = one(tmp_path / "a.extxyz", frame(f"{name}=-6.5"))
    assert isinstance(item, ReadCrystal)
    assert "energy_per_atom" not in item.fields
    assert unread_energies(item.fields) == (name,)


@pytest.mark.parametrize(
    "name",
    [
        "energy_above_hull",
        "efermi",
        "fermi_energy",
        "config_energy_weight",
        "energy_cutoff",
        "band_gap",
        "e_above_hull",
        "entry_id",
    ],
)
def test_what_is_no_energy_of_the_crystal_is_not(name: str) -> None:
    assert unread_energies({name: -1.0}) == ()


def test_whole_numbers_are_energies_too(tmp_path: Path) -> None:
    """ASE reads -3 as an integer of NumPy."""
    for keys in ("energy_per_atom=-3", "energy=-6", "energy=-6 energy_per_atom=-3 free_energy=-7"):
        item = one(tmp_path / "a.extxyz", frame(keys))
        assert isinstance(item, ReadCrystal)
        assert item.fields["energy_per_atom"] == -3.0
    assert energy_per_atom_under(item.fields, "free_energy", 2) == -3.5
    assert energy_per_atom_under({"uncorrected_energy_per_atom": "-3.5"}, "uncorrected_energy_per_atom", 2) == -3.5
    assert energy_per_atom_under({}, "free_energy", 2) is None
    with pytest.raises(InvalidCrystal, match="expected a number"):
        energy_per_atom_under({"E0": "-6.5 eV"}, "E0", 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (frame("energy=-6 energy_per_atom=-4"), "energy is -3 eV/atom, energy_per_atom -4"),
        (frame("energy=low"), "energy is 'low', expected a number"),
        (frame("", "species:S:1:pos:R:3:mtt::charge:R:1", " 0.5"), "'mtt::charge' in Properties"),
        (frame("", "species:S:1:pos:R:3:"), "no name may hold ':'"),
        (frame("", "species:S:1"), "no column pos"),
        (frame("", "species:S:1:pos:R"), "ends in 'pos:R'"),
        (frame("", "species:S:1:pos:R:three"), "pos:R:three is no name:kind:width"),
        (frame("", "species:S:1:pos:R:3:q:R:1:q:R:1", " 1 1"), "column q stands there twice"),
        (frame("energy_per_atom=T"), "energy_per_atom is True"),
        (frame("formation_energy_per_atom=low"), "formation_energy_per_atom is 'low'"),
        (frame("formation_energy_per_atom=-1 e_form_per_atom=-2"), "keep one"),
    ],
)
def test_what_cannot_be_meant_is_one_clear_line(tmp_path: Path, text: str, words: str) -> None:
    item = one(tmp_path / "a.extxyz", text)
    assert isinstance(item, Refusal)
    assert words in item.message
    assert "cannot be read" not in item.message


def test_formation_energies_of_the_materials_project_are_read(tmp_path: Path) -> None:
    document = {"material_id": "mp-1", "formation_energy_per_atom": -1.9, "energy_above_hull": 0.0, "structure": HALITE.as_dict()}
    item = one(tmp_path / "a.json", json.dumps([document], default=str))
    assert isinstance(item, ReadCrystal)
    assert (item.label, item.fields["e_form_per_atom"]) == ("mp-1", -1.9)
    assert unread_energies(item.fields) == ()
    assert with_own_names({"formation_energy_per_atom": "-1.9"}, 2)["e_form_per_atom"] == -1.9
    assert "e_form_per_atom" not in with_own_names({"formation_energy_per_atom": "nan"}, 2)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (
            {"parameters": {"run_type": "GGA"}, "data": {"run_type": "R2SCAN"}},
            "data.run_type is R2SCAN and parameters.run_type is GGA",
        ),
        ({"energy": -6.0, "energy_per_atom": -4.0}, "energy is -3 eV/atom, energy_per_atom -4"),
        ({"energy": -1.0, "data": {"energy_per_atom": -5.0}}, "energy is -0.5 eV/atom, energy_per_atom -5"),
        ({"energy": -1.0, "data": {"energy": -5.0}}, "energy is -1 and, in data, -5 eV"),
        ({"energy_per_atom": -1.0, "data": {"energy_per_atom": -5.0}}, "energy_per_atom is -1 and, in data, -5 eV/atom"),
        ({"e_form_per_atom": -1.0, "data": {"e_form_per_atom": -1.1}}, "e_form_per_atom is -1 and, in data, -1.1 eV/atom"),
        ({"formation_energy_per_atom": -1, "data": {"formation_energy_per_atom": -2}}, "is -1 and, in data, -2 eV/atom"),
        ({"energy": -6.0, "correction": -1.0, "data": {"correction_per_atom": -0.1}}, "correction is -0.5 eV/atom"),
        (
            {"energy_per_atom": -3.5, "correction_per_atom": -0.1, "data": {"uncorrected_energy_per_atom": -3.0}},
            "uncorrected_energy_per_atom is -3 eV/atom, the energy -3.5, the correction -0.1, which do not add up",
        ),
    ],
)
def test_records_that_say_two_things_are_refused(tmp_path: Path, record: dict[str, Any], words: str) -> None:
    item = one(tmp_path / "a.json", json.dumps({"structure": HALITE.as_dict(), **record}, default=str))
    assert isinstance(item, Refusal)
    assert words in item.message


@pytest.mark.parametrize(
    ("record", "energy", "correction"),
    [
        ({"energy_per_atom": -3.55, "uncorrected_energy_per_atom": -3.25}, -3.25, -0.3),
        ({"energy_per_atom": -3.55, "uncorrected_energy": -6.5}, -3.25, -0.3),
        ({"energy": -6.5, "correction": -0.6, "data": {"uncorrected_energy_per_atom": -3.25}}, -3.25, -0.3),
        ({"energy": -6.5, "correction": -0.6, "energy_per_atom": -3.55}, -3.25, -0.3),
        ({"energy": -6.5, "data": {"energy_per_atom": -3.2501}}, -3.25, None),
        ({"energy_per_atom": -3.25, "uncorrected_energy_per_atom": None}, -3.25, None),
    ],
)
def test_an_energy_is_the_raw_one_and_the_correction_beside_it(
    tmp_path: Path, record: dict[str, Any], energy: float, correction: float | None
) -> None:
    item = one(tmp_path / "a.json", json.dumps({"structure": HALITE.as_dict(), **record}, default=str))
    assert isinstance(item, ReadCrystal), item
    assert item.fields["energy_per_atom"] == pytest.approx(energy)
    found = item.fields.get("correction_per_atom")
    assert found == (None if correction is None else pytest.approx(correction))
    assert unread_energies(item.fields) == ()


def test_run_types_have_families() -> None:
    assert {family_of(name) for name in ("GGA", "GGA+U", "gga_u", "PBE", "PBE+U", "GGA_GGA+U", " gga+u ")} == {GGA}
    others = ["R2SCAN", "SCAN", "PBEsol", "HSE06", "LDA", "GGA_GGA+U_R2SCAN"]
    assert len({family_of(name) for name in [*others, "GGA"]}) == len(others) + 1
    assert family_of("r2SCAN") == family_of("R2SCAN")
    assert run_family({}) == run_family({"run_type": None}) == run_family({"run_type": " "}) == ""
    assert run_family({"thermo_type": "GGA_GGA+U", "run_type": "GGA+U"}) == GGA
    with pytest.raises(InvalidCrystal, match="never meet"):
        run_family({"thermo_type": "R2SCAN", "run_type": "GGA"})


def changed(**lattice: Any) -> dict[str, Any]:
    record = json.loads(json.dumps(HALITE.as_dict(), default=str))
    record["lattice"] |= lattice
    return record


def moved(xyz: list[float]) -> dict[str, Any]:
    record = changed()
    record["sites"][1]["xyz"] = xyz
    return record


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (changed(a=5.0), "the lattice says a is 5, its matrix 4.1"),
        (changed(gamma=120.0), "gamma is 120, its matrix 90"),
        (changed(volume=200.0), "volume is 200"),
        (changed(matrix=[[8.2, 0, 0], [0, 4.1, 0], [0, 0, 4.1]]), "a is 4.1, its matrix 8.2"),
        (moved([2.05, 2.05, 1.05]), "which are not one place"),
    ],
)
def test_cells_and_sites_that_are_described_twice_must_agree(tmp_path: Path, record: dict[str, Any], words: str) -> None:
    item = one(tmp_path / "a.json", json.dumps(record))
    assert isinstance(item, Refusal), item
    assert words in item.message


def test_rounded_descriptions_and_other_cells_agree(tmp_path: Path) -> None:
    for record in (changed(a=4.11, alpha=90.3, volume=69.0), moved([2.05, 2.05, 2.05 - 4.1]), moved([2.06, 2.05, 2.05])):
        assert isinstance(one(tmp_path / "a.json", json.dumps(record)), ReadCrystal)
