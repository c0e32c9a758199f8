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
from gnome.crystals.writers import to_cif, write_crystals
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


def as_extxyz_of_formation_energies(path: Path) -> Path:
    items = [
        ReadCrystal(label=name, crystal=from_structure(structure(name)), fields={"e_form_per_atom": energy})
        for name, energy in zip(SALTS, expected().values(), strict=True)
    ]
    write_crystals(path, items)
    return path


def test_sources_are_joined_and_a_crystal_that_comes_twice_is_learnt_once() -> None:
    crystals = [from_structure(structure(name)) for name in ("NaCl", "KCl")]
    write_shard(Path("shard.parquet"), crystals, {"e_form_per_atom": [expected()["NaCl"], expected()["KCl"]]})
    Path("folder").mkdir()
    as_extxyz_of_formation_energies(Path("folder/one.extxyz"))
    crystals, labels = labelled_crystals([Path("shard.parquet"), Path("folder")])
    assert len(crystals) == len({crystal.id for crystal in crystals}) == len(SALTS)
    joined = {crystal.reduced_formula: label for crystal, label in zip(crystals, labels.tolist(), strict=True)}
    assert joined == pytest.approx(expected(), abs=1e-6)
    write_shard(Path("shard.parquet"), crystals[:1], {"e_form_per_atom": [-1.0]})
    with pytest.raises(
        InvalidInput, match=r"one.extxyz#5: its formation energy is -1\.\d+ eV/atom, and -1 where the same crystal"
    ):
        labelled_crystals([Path("shard.parquet"), Path("folder")])


def rows_with(**said: str) -> list[dict[str, Any]]:
    """A table of crystals with formation energies, the first of which says something of its own."""
    rows = [{"cif": cif(name), "e_form_per_atom": energy} for name, energy in zip(SALTS, expected().values(), strict=True)]
    return [{**row, **{name: value if i == 4 else "" for name, value in said.items()}} for i, row in enumerate(rows)]


def shard_with(**said: str) -> Path:
    write_shard(
        Path("said.parquet"),
        [from_structure(structure("KBr"))],
        {"e_form_per_atom": [-1.79], **{name: [value] for name, value in said.items()}},
    )
    return Path("said.parquet")


def test_energies_of_two_methods_are_never_learnt_together() -> None:
    """As in what is exported of a database: a table, a shard, entries or a table of formulas."""
    own = [{**row, "method": ("chgnet-1", "r2scan-x", "pbe")[i % 3]} for i, row in enumerate(rows_with())]
    write_csv(Path("all.csv"), own)
    items = [
        ReadCrystal(label=n, crystal=from_structure(structure(n)), fields={"e_form_per_atom": -1.5, "method": n}) for n in SALTS
    ]
    write_crystals(Path("all.parquet"), items[4:])
    write_crystals(Path("all.json"), items[4:])
    write_csv(Path("one.csv"), rows_with(method="chgnet-1"))
    shard_with(method="pbe")
    write_csv(Path("formulas.csv"), [{"formula": "KBr", "e_form_per_atom": -1.5, "method": "pbe"}])
    for sources in ("all.csv",), ("all.parquet",), ("all.json",), ("one.csv", "said.parquet"):
        with pytest.raises(InvalidInput, match=r"names [234] methods, .*; their energies never meet"):
            labelled_crystals([Path(name) for name in sources])
    for sources in ("all.csv",), ("all.parquet",), ("one.csv", "formulas.csv"), ("one.csv", "said.parquet"):
        with pytest.raises(InvalidInput, match=r"names [234] methods, .*; their energies never meet"):
            labelled_formulas([Path(name) for name in sources])
    assert len(labelled_crystals([Path("one.csv")])[0]) == len(SALTS)


def test_what_says_no_run_type_is_gga_and_meets_no_other() -> None:
    write_csv(Path("r2scan.csv"), rows_with(run_type="R2SCAN"))
    write_csv(Path("gga.csv"), rows_with(run_type="GGA+U"))
    with pytest.raises(InvalidInput, match=r"never meet, GGA/GGA.U and R2SCAN .rows that do not say theirs count as GGA/GGA.U"):
        labelled_crystals([Path("r2scan.csv")])
    assert len(labelled_crystals([Path("gga.csv")])[0]) == len(SALTS)
    with pytest.raises(InvalidInput, match=r"never meet, GGA/GGA.U and R2SCAN"):
        labelled_crystals([Path("gga.csv"), shard_with(run_type="R2SCAN")])


def test_given_formation_energies_are_not_learnt_with_those_taken_from_elements() -> None:
    entries = json.loads(as_entries(Path("entries.json")).read_text())
    without = {key: value for key, value in entries[5].items() if key not in {"energy", "correction"}}
    Path("both.json").write_text(json.dumps([*entries[:5], {**without, "e_form_per_atom": -2.0}]))
    with pytest.raises(InvalidInput, match=r"both.json#1: it has a total energy alone, and both.json#6 a formation energy alone"):
        labelled_crystals([Path("both.json")])
    with pytest.raises(InvalidInput, match="and 1 row of tables a formation energy alone"):
        labelled_crystals([Path("entries.json"), shard_with()])
    write_csv(Path("formulas.csv"), [{"formula": "KBr", "e_form_per_atom": -1.5}])
    with pytest.raises(InvalidInput, match="and 1 row of tables a formation energy alone"):
        labelled_formulas([Path("entries.json"), Path("formulas.csv")])
    Path("beside.json").write_text(json.dumps([*entries[:7], {**entries[7], "e_form_per_atom": -0.5}]))
    assert found(Path("beside.json")) == pytest.approx(expected(), abs=1e-6), "all from the elements, as in an import"


def test_an_energy_under_another_name_beside_a_correction_is_refused_as_in_an_import() -> None:
    rows = [{"cif": cif(n), "e_dft": e * len(structure(n)), "correction_per_atom": -0.1} for n, e in SALTS.items()]
    with pytest.raises(InvalidInput, match=r"mine.csv#1: e_dft: a correction of -0.1 eV/atom stands beside it"):
        found(write_csv(Path("mine.csv"), rows), energy_key="e_dft")
    raw = [
        {**row, "energy": row["e_dft"], "correction_per_atom": -0.1 if "Cl" in cif_name else 0.0}
        for row, cif_name in zip(rows, SALTS, strict=True)
    ]
    write_csv(Path("mine.csv"), raw)
    assert found(Path("mine.csv"), energy_key="energy")["NaCl"] == pytest.approx(-1.975 - 0.1 + 0.05), "Cl is corrected, too"


def test_gga_with_u_meets_gga_with_its_correction_alone() -> None:
    entries = json.loads(as_entries(Path("entries.json")).read_text())
    for entry in entries:
        entry["parameters"] = {"run_type": "GGA+U" if entry["composition"].keys() == {"Na", "Br"} else "GGA"}
    Path("entries.json").write_text(json.dumps(entries))
    with pytest.raises(InvalidInput, match=r"GGA.U energies without corrections stand beside those of GGA"):
        found(Path("entries.json"))
    for entry in entries:
        entry["correction"] -= 0.2 if entry["parameters"]["run_type"] == "GGA+U" else 0.0
    Path("entries.json").write_text(json.dumps(entries))
    assert found(Path("entries.json"))["NaBr"] == pytest.approx(expected()["NaBr"] - 0.1)


def test_tables_of_formulas_are_read_under_the_names_that_others_use() -> None:
    for header in (
        "Formula,formation_energy_per_atom",
        "composition,E_form_per_atom",
        " reduced_formula ,Formation_Energy_Per_Atom",
    ):
        Path("f.csv").write_text(f"{header}\nClNa,-2.1\nKBr,-1.8\n")
        read = labelled_formulas([Path("f.csv")])
        assert dict(zip(read.formulas, read.targets[:, 0].tolist(), strict=True)) == {"NaCl": -2.1, "KBr": -1.8}
    Path("f.csv").write_text("formula,Formula,e_form_per_atom\nNaCl,NaCl,-2.1\n")
    with pytest.raises(InvalidInput, match="2 columns named formula"):
        labelled_formulas([Path("f.csv")])


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
    read = labelled_formulas([Path("formulas.csv"), as_extxyz_of_formation_energies(Path("mine.extxyz"))])
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
