"""Crystals with energies from whatever file holds them."""

import csv
import json
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator
from pymatgen.core import Lattice, Structure
from pymatgen.entries.computed_entries import ComputedStructureEntry
from typed_commands import Gnome, Run, failed

from flows.training_data import labelled_crystals, labelled_formulas
from gnome.crystals.convert import from_structure, to_atoms
from gnome.crystals.crystal import Crystal
from gnome.crystals.formats import ReadCrystal
from gnome.crystals.shards import read_shard, write_shard
from gnome.crystals.writers import to_cif
from gnome.errors import InvalidInput

pytestmark = pytest.mark.usefixtures("own_folder")

SALTS = {"Na": -1.30, "K": -1.10, "Cl": -1.85, "Br": -1.62, "NaCl": -3.55, "KCl": -3.52, "NaBr": -3.10, "KBr": -3.15}
"""Total energies, eV/atom; the elements' are in the first four."""


def structure(name: str) -> Structure:
    symbols = [symbol for symbol in ("Na", "K", "Cl", "Br") if symbol in name]
    a = 4.0 + 0.1 * len(name)
    if len(symbols) == 1:
        return Structure(Lattice.cubic(a), symbols, [[0, 0, 0]])
    return Structure(Lattice.cubic(a), symbols, [[0, 0, 0], [0.5, 0.5, 0.5]])


def expected() -> dict[str, float]:
    """Formation energies by hand: NaCl -3.55 + (1.30 + 1.85) / 2, and so on."""
    return dict.fromkeys(("Na", "K", "Cl2", "Br"), 0.0) | {"NaCl": -1.975, "KCl": -2.045, "NaBr": -1.64, "KBr": -1.79}


def found(path: Path, **options: Any) -> dict[str, float]:
    crystals, labels = labelled_crystals([path], **options)
    return {crystal.reduced_formula: label for crystal, label in zip(crystals, labels.tolist(), strict=True)}


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def cif(name: str) -> str:
    return to_cif(ReadCrystal(label=name, crystal=from_structure(structure(name))))


def as_csv(path: Path) -> Path:
    return write_csv(path, [{"cif": cif(n), "energy_per_atom": e} for n, e in SALTS.items()])


def as_csv_of_structures(path: Path) -> Path:
    rows = [{"structure": json.dumps(structure(n).as_dict()), "formation_energy_per_atom": e} for n, e in expected().items()]
    return write_csv(path, rows)


def as_csv_of_cells(path: Path) -> Path:
    return write_csv(path, [{"cif": cif(n), "e_dft": e * len(structure(n))} for n, e in SALTS.items()])


def as_entries(path: Path) -> Path:
    """Corrections count: a part of each energy is given as one."""
    entries = []
    for name, energy in SALTS.items():
        own = structure(name)
        correction = -0.1 * len(own) if "Cl" in name else 0.0
        entries.append(ComputedStructureEntry(own, energy * len(own) - correction, correction=correction).as_dict())
    path.write_text(json.dumps(entries))
    return path


def as_extxyz(path: Path) -> Path:
    atoms = []
    for name, energy in SALTS.items():
        one = to_atoms(from_structure(structure(name)))
        one.calc = SinglePointCalculator(one, energy=energy * len(one))
        atoms.append(one)
    ase.io.write(path, atoms)
    return path


@pytest.mark.parametrize(
    ("write", "name", "key"),
    [
        (as_csv, "mine.csv", ""),
        (as_csv_of_structures, "mine.csv", ""),
        (as_csv_of_cells, "mine.csv", "e_dft"),
        (as_entries, "entries.json", ""),
        (as_extxyz, "mine.extxyz", ""),
    ],
)
def test_formation_energies_from_any_file(write: Any, name: str, key: str) -> None:
    assert found(write(Path(name)), energy_key=key) == pytest.approx(expected(), abs=1e-6)


def test_sources_are_joined_and_a_crystal_that_comes_twice_is_learnt_once() -> None:
    crystals = [from_structure(structure(name)) for name in ("NaCl", "KCl")]
    write_shard(Path("shard.parquet"), crystals, {"e_form_per_atom": [expected()["NaCl"], expected()["KCl"]]})
    Path("folder").mkdir()
    as_extxyz(Path("folder/one.extxyz"))
    crystals, labels = labelled_crystals([Path("shard.parquet"), Path("folder")])
    assert len(crystals) == len({crystal.id for crystal in crystals}) == len(SALTS)
    joined = {crystal.reduced_formula: label for crystal, label in zip(crystals, labels.tolist(), strict=True)}
    assert joined == pytest.approx(expected(), abs=1e-6)
    write_shard(Path("shard.parquet"), crystals[:1], {"e_form_per_atom": [-1.0]})
    with pytest.raises(
        InvalidInput, match=r"one.extxyz#5: its formation energy is -1\.\d+ eV/atom, and -1 where the same crystal"
    ):
        labelled_crystals([Path("shard.parquet"), Path("folder")])


def entries_with(**changes: Any) -> list[dict[str, Any]]:
    entries = json.loads(as_entries(Path("entries.json")).read_text())
    entries[5] |= changes
    return entries


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (
            lambda: entries_with()[4:],
            "no entry of Na, Cl, K, Br among the sources, of whose elements formation energies are taken",
        ),
        (
            lambda: [*entries_with(parameters={"run_type": "R2SCAN"})[5:6], *entries_with(parameters={"run_type": "GGA"})],
            "never meet",
        ),
        (lambda: entries_with(energy="low"), "entries.json#6: energy is 'low'"),
        (lambda: entries_with(energy=None), "entries.json#6: no e_form_per_atom or energy_per_atom"),
        (lambda: entries_with(energy=-90.0), "eV/atom, expected -6 to 5; is that energy of another kind?"),
        (lambda: entries_with(structure={}), "entries.json#6: "),
        (lambda: [{**entry, "e_form_per_atom": entry["energy"] / 2} for entry in entries_with()], "has 0 in its lowest form"),
    ],
)
def test_what_an_ensemble_cannot_learn_from_is_named(entries: Any, words: str) -> None:
    Path("entries.json").write_text(json.dumps(entries()))
    with pytest.raises(InvalidInput) as refused:
        labelled_crystals([Path("entries.json")])
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_every_entry_that_cannot_be_used_is_counted() -> None:
    with as_csv(Path("mine.csv")).open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows[1]["cif"] = rows[3]["cif"] = "data_nothing"
    with pytest.raises(InvalidInput, match=r"mine.csv#2: .*; 2 of 8 entries of mine.csv cannot be used; mend or leave out"):
        labelled_crystals([write_csv(Path("mine.csv"), rows)])


def test_formulas_from_tables_and_from_crystals() -> None:
    Path("formulas.csv").write_text(
        "formula,e_form_per_atom,decomposition_energy\nNa2Cl2,-2.0,\nNaCl,-1.9,0.01\nNaN,-0.5,0.2\nFe2O3,,-0.1\n"
    )
    read = labelled_formulas([Path("formulas.csv"), as_extxyz(Path("mine.extxyz"))])
    by_formula = dict(zip(read.formulas, read.targets, strict=True))
    np.testing.assert_allclose(by_formula["NaCl"], [-2.0, 0.01])
    np.testing.assert_allclose(by_formula["NaN"], [-0.5, 0.2])
    np.testing.assert_allclose(by_formula["Fe2O3"], [np.nan, -0.1])
    np.testing.assert_allclose(by_formula["KBr"], [expected()["KBr"], np.nan])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("formula,e_form_per_atom\nNaCl,low\n", "formulas.csv: line 2 has e_form_per_atom = 'low', which is no number"),
        ("formula,e_form_per_atom\nNaCl,\n", "line 2 (NaCl) has no label; leave it out"),
        ("formula,e_form_per_atom\nNaCl,-1\nXx,-1\n", "formulas.csv: line 3: "),
        ("formula,e_form_per_atom\nNaCl,-1,7\n", "line 2 has more cells than the header"),
        ("name,e_form_per_atom\nNaCl,-1\n", "no column `cif`"),
    ],
)
def test_tables_of_formulas_that_cannot_be_read_are_named(text: str, words: str) -> None:
    Path("formulas.csv").write_text(text)
    with pytest.raises(InvalidInput) as refused:
        labelled_formulas([Path("formulas.csv")])
    assert words in str(refused.value)


def test_training_on_other_files_than_shards(run: Run, gnome: Gnome, shard: Path) -> None:
    crystals, columns, _ = read_shard(shard)
    atoms = [to_atoms(crystal) for crystal in crystals]
    for one, energy in zip(atoms, columns["e_form_per_atom"], strict=True):
        one.info["e_form_per_atom"] = energy
    ase.io.write("mine.extxyz", atoms)
    small = ["--method", "m", "--members", 1, "--width", 16, "--epochs", 1, "--json"]
    card = run("train", "structural", "mine.extxyz", *small)
    assert card["trained_on"].endswith(" examples of mine.extxyz")
    assert card["metrics"]["structural ensemble"]["n"] > 20
    rows = [f"{crystal.reduced_formula},{energy}" for crystal, energy in zip(crystals, columns["e_form_per_atom"], strict=True)]
    Path("formulas.csv").write_text("\n".join(["formula,e_form_per_atom", *rows]))
    assert run("train", "compositional", "formulas.csv", *small, "--out", "f.safetensors")["metrics"]
    few = [Crystal(np.eye(3) * 3, np.array([11, 17]), np.array([[0, 0, 0], [0.5, 0.5, 0.5]]))]
    write_shard(Path("few.parquet"), few, {"e_form_per_atom": [-2.0]})
    failed(gnome("train", "structural", "few.parquet", "--method", "m"), 2, "some 400 of them; fewer", "--fine-tune")
