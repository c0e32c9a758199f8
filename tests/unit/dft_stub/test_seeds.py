"""What ships: seeds, references and validation set hang together."""

import csv
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from dft_stub.references import shipped_references
from gnome.crystals.convert import from_structure
from gnome.crystals.crystal import Crystal
from gnome.crystals.identity import fingerprint, keys_to_search, same_crystal, space_group_number
from gnome.crystals.shards import read_shard
from gnome.crystals.validity import is_valid
from gnome.quantities import PLAUSIBLE_E_FORM
from gnome.shipped import shipped_data

DATA = Path(__file__).parents[3] / "data"


@pytest.fixture(scope="module")
def seeds() -> tuple[list[Crystal], dict[str, list[Any]], dict[str, Any]]:
    return read_shard(shipped_data() / "seeds.parquet")


def test_there_are_enough_of_enough_elements(seeds: Any) -> None:
    crystals, columns, metadata = seeds
    assert len(crystals) >= 400
    assert len({z for crystal in crystals for z in crystal.composition}) >= 60
    assert columns["id"] == [crystal.id for crystal in crystals]
    assert columns["reduced_formula"] == [crystal.reduced_formula for crystal in crystals]
    assert len(set(columns["id"])) == len(crystals)
    assert all(is_valid(crystal) for crystal in crystals)
    assert all(columns["source"])
    assert metadata["references"]["method"] == shipped_references().method


def test_formation_energies_follow_from_the_references(seeds: Any) -> None:
    crystals, columns, _ = seeds
    references = shipped_references()
    lowest: dict[int, float] = {}
    for crystal, energy, e_form in zip(crystals, columns["energy_per_atom"], columns["e_form_per_atom"], strict=True):
        assert e_form == pytest.approx(references.formation_energy_per_atom(crystal.composition, energy), abs=1e-9)
        assert PLAUSIBLE_E_FORM[0] <= e_form <= 1.0
        if len(crystal.composition) == 1:
            z = int(crystal.atomic_numbers[0])
            lowest[z] = min(lowest.get(z, 99.0), energy)
    assert lowest == pytest.approx(dict(references.energies)), "the reference of an element is its lowest seed"


def test_no_seed_is_there_twice(seeds: Any) -> None:
    by_formula = defaultdict(list)
    for crystal in seeds[0]:
        by_formula[crystal.reduced_formula].append(crystal)
    pairs = [(a, b) for group in by_formula.values() for k, a in enumerate(group) for b in group[:k]]
    assert len(pairs) > 50
    near = [(a, b) for a, b in pairs if fingerprint(a) in keys_to_search(b)]
    assert not [(a.reduced_formula, a.id, b.id) for a, b in near[:40] if same_crystal(a, b)]


def test_known_facts_come_out(seeds: Any) -> None:
    e_form = dict(zip(seeds[1]["source"], seeds[1]["e_form_per_atom"], strict=True))
    # Measured enthalpies of formation (CRC Handbook), eV/atom; MP-like energies agree to about 0.15
    for source, measured in (("NaCl rocksalt", -2.13), ("MgO rocksalt", -3.12), ("LiF rocksalt", -3.19), ("AlN wurtzite", -1.65)):
        assert e_form[f"textbook: {source}"] == pytest.approx(measured, abs=0.2)


def test_the_validation_set_is_unrelaxed_and_has_known_parents(seeds: Any) -> None:
    crystals, columns, metadata = read_shard(shipped_data() / "validation.parquet")
    assert len(crystals) >= 300
    assert columns["id"] == [crystal.id for crystal in crystals]
    assert metadata["references"]["method"] == shipped_references().method
    lineages = [json.loads(lineage) for lineage in columns["lineage"]]
    assert {lineage["generator"] for lineage in lineages} == {"substitution", "double substitution", "exchange", "rattle"}
    assert {lineage["parent"] for lineage in lineages} <= set(seeds[1]["id"])
    assert not {crystal.id for crystal in crystals} & set(seeds[1]["id"])
    assert all(is_valid(crystal) for crystal in crystals)


@pytest.mark.skipif(not (DATA / "structure_types.py").exists(), reason="only a checkout has the tables")
def test_rows_of_the_table_build_what_they_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DATA))
    from structure_types import STRUCTURE_TYPES, build

    with (DATA / "textbook_compounds.csv").open(newline="") as file:
        rows = {row["structure_type"]: row for row in csv.DictReader(file)}
    assert rows.keys() <= STRUCTURE_TYPES.keys()
    expected = {"rutile": 136, "CdI2": 164, "chalcopyrite": 122, "L1_0": 123, "wurtzite": 186, "ThCr2Si2": 139, "NaFeO2": 166}
    for name, number in expected.items():
        crystal = from_structure(build(rows[name]["formula"], name, *(float(rows[name][axis] or 0) for axis in "abc")))
        assert space_group_number(crystal) == number
    with pytest.raises(ValueError, match="gives"):
        build("CaF3", "fluorite", 5.4)
