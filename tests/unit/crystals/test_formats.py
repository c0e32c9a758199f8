"""Reading and writing: what is written is read back, a folder of mixed files is read whole."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure
from pymatgen.entries.computed_entries import ComputedStructureEntry
from pymatgen.io.cif import CifWriter

from gnome.crystals.convert import from_structure
from gnome.crystals.crystal import Crystal
from gnome.crystals.formats import ReadCrystal, Refusal, read_crystals
from gnome.crystals.identity import same_crystal
from gnome.crystals.shards import read_shard, write_shard
from gnome.crystals.writers import write_crystals
from gnome.errors import InvalidInput


def rocksalt(first: str = "Na", second: str = "Cl", a: float = 5.64) -> Structure:
    return Structure.from_spacegroup("Fm-3m", Lattice.cubic(a), [first, second], [[0, 0, 0], [0.5, 0.5, 0.5]])


@pytest.fixture
def items() -> list[ReadCrystal]:
    skewed = rocksalt("Mg", "O", 4.21).get_primitive_structure()
    fields = {"energy_per_atom": -3.25, "note": 'a, "quoted" remark'}
    return [
        ReadCrystal(label="salt", crystal=from_structure(rocksalt()), fields=fields),
        ReadCrystal(label="magnesia", crystal=from_structure(skewed), fields={"energy_per_atom": -6.0, "note": "plain"}),
    ]


@pytest.mark.parametrize("kind", ["cif", "vasp", "extxyz", "json", "csv"])
def test_what_is_written_is_read_back(tmp_path: Path, items: list[ReadCrystal], kind: str) -> None:
    path = tmp_path / ("out" if kind in {"cif", "vasp"} else f"out.{kind}")
    assert write_crystals(path, items, kind=kind) == 2
    back = list(read_crystals(path))
    assert not [item for item in back if isinstance(item, Refusal)]
    for item, original in zip(back, items, strict=True):
        assert np.allclose(np.linalg.det(item.crystal.lattice), np.linalg.det(original.crystal.lattice), rtol=1e-5)
        assert item.crystal.composition == original.crystal.composition
        assert same_crystal(item.crystal, original.crystal)
    if kind in {"extxyz", "json", "csv"}:
        assert [item.fields["energy_per_atom"] for item in back] == pytest.approx([-3.25, -6.0])
        assert [item.fields["note"] for item in back] == [item.fields["note"] for item in items]
        assert [item.label for item in back][: 2 if kind != "extxyz" else 0] == (["salt", "magnesia"] if kind != "extxyz" else [])


def test_one_crystal_goes_into_one_file(tmp_path: Path, items: list[ReadCrystal]) -> None:
    write_crystals(tmp_path / "salt.cif", items[:1])
    assert (tmp_path / "salt.cif").is_file()
    with pytest.raises(InvalidInput, match=r"no format is called '\.doc'"):
        write_crystals(tmp_path / "salt.doc", items)


def test_pymatgen_entries_keep_energy_and_correction_apart(tmp_path: Path) -> None:
    entry = ComputedStructureEntry(rocksalt(), energy=-27.0, correction=-1.6, entry_id="mp-1", parameters={"run_type": "GGA"})
    (tmp_path / "entries.json").write_text(json.dumps([entry.as_dict()], default=str))
    (tmp_path / "lines.jsonl").write_text(json.dumps(entry.as_dict(), default=str) + "\n\n")
    for name in ("entries.json", "lines.jsonl"):
        (item,) = read_crystals(tmp_path / name)
        assert isinstance(item, ReadCrystal)
        assert item.label == "mp-1"
        assert item.fields["energy_per_atom"] == pytest.approx(-27.0 / 8)
        assert item.fields["correction_per_atom"] == pytest.approx(-0.2)
        assert item.fields["run_type"] == "GGA"


def test_what_we_write_as_json_pymatgen_reads(tmp_path: Path, items: list[ReadCrystal]) -> None:
    write_crystals(tmp_path / "out.json", items)
    entry = ComputedStructureEntry.from_dict(json.loads((tmp_path / "out.json").read_text())[0])
    assert entry.uncorrected_energy_per_atom == pytest.approx(-3.25)
    assert entry.structure.composition.reduced_formula == "NaCl"


def test_sodium_nitride_stays_text_in_a_table(tmp_path: Path) -> None:
    cif = str(CifWriter(rocksalt("Na", "N", 5.0)))
    with (tmp_path / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["material_id", "reduced_formula", "e_form_per_atom", "cif"])
        writer.writerow(["x-1", "NaN", "0.75", cif])
        writer.writerow(["x-2", "NaN", "nan", cif])
    first, second = read_crystals(tmp_path / "table.csv")
    assert isinstance(first, ReadCrystal)
    assert first.fields["reduced_formula"] == "NaN"
    assert first.fields["e_form_per_atom"] == 0.75
    assert isinstance(second, Refusal)
    assert second.reason == "energy"


def test_a_shard_is_read_row_by_row(tmp_path: Path, items: list[ReadCrystal]) -> None:
    broken = Crystal(np.eye(3) * np.nan, items[0].crystal.atomic_numbers, items[0].crystal.frac_coords)
    crystals = [items[0].crystal, broken, items[1].crystal]
    write_shard(tmp_path / "shard.parquet", crystals, {"id": ["a", "b", "c"], "e_form_per_atom": [-2.0, -1.0, -3.0]})
    first, second, third = read_crystals(tmp_path / "shard.parquet")
    assert isinstance(first, ReadCrystal)
    assert isinstance(third, ReadCrystal)
    assert (first.label, first.fields["e_form_per_atom"], third.crystal) == ("a", -2.0, items[1].crystal)
    assert isinstance(second, Refusal)
    assert (second.label, second.reason) == ("b", "not_finite")


def test_a_flipped_bit_in_a_shard_is_noticed(tmp_path: Path, items: list[ReadCrystal]) -> None:
    path = tmp_path / "s.parquet"
    write_shard(path, [item.crystal for item in items] * 50)
    whole, crystals = path.read_bytes(), read_shard(path)[0]
    noticed = 0
    for place in range(4, len(whole), len(whole) // 100):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        try:
            found = read_shard(path)[0]
        except InvalidInput:
            noticed += 1
        else:
            assert found == crystals, "what is not noticed has changed nothing"
    assert noticed > 20


def test_symmetry_in_a_cif_is_expanded(tmp_path: Path) -> None:
    CifWriter(rocksalt(), symprec=0.01).write_file(tmp_path / "salt.cif")
    (item,) = read_crystals(tmp_path / "salt.cif")
    assert isinstance(item, ReadCrystal)
    assert item.crystal.composition == {11: 4, 17: 4}


def test_a_cif_of_several_blocks_is_several_crystals(tmp_path: Path) -> None:
    text = str(CifWriter(rocksalt())) + "\n" + str(CifWriter(rocksalt("Mg", "O", 4.2)))
    (tmp_path / "two.cif").write_text(text)
    assert [item.crystal.reduced_formula for item in read_crystals(tmp_path / "two.cif")] == ["NaCl", "MgO"]


def test_elements_a_caller_does_not_want_are_refused(tmp_path: Path, items: list[ReadCrystal]) -> None:
    write_crystals(tmp_path / "out.json", items)
    first, second = read_crystals(tmp_path / "out.json", elements=frozenset({8, 12}))
    assert isinstance(first, Refusal)
    assert first.reason == "unsupported_element"
    assert isinstance(second, ReadCrystal)


def test_a_path_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no such file"):
        list(read_crystals(tmp_path / "absent"))
    with pytest.raises(InvalidInput, match="holds no file"):
        list(read_crystals(tmp_path))
