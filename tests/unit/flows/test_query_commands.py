"""Answers of queries as a user copies and reads them."""

import csv
import io
import json
from pathlib import Path

import ase.io
import pytest
from emt_world import l1_2
from gemmi import cif
from pymatgen.core import Structure
from typed_commands import Gnome, failed

from gnome.crystals.crystal import Crystal
from gnome.crystals.formats import ReadCrystal, read_crystals
from gnome.crystals.writers import to_extxyz
from gnome.database.query import short_methods
from gnome.database.records import CrystalRecord
from gnome.database.store import Store
from gnome.stability.method import Method

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.fixture
def two_methods(database: Path) -> Path:
    """The same crystals under a second method, and one whose formula reads as no number."""
    url = f"sqlite:///{database / 'gnome.db'}"
    with Store.open(url) as store:
        copies = [
            CrystalRecord(crystal=stored.crystal, method=Method(code="imported", functional="mp 2026"), origin="imported",
                          fingerprint="x", e_form_per_atom=0.0, e_above_hull=0.0)
            for stored in store.crystals_of(next(iter(store.methods())))
        ]  # fmt: skip
        store.add_crystals(copies[:4])
    return database


@pytest.mark.parametrize("width", [40, 60, 80, 100, 160])
def test_a_table_names_the_method_and_never_cuts_an_id(
    gnome: Gnome, two_methods: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    from rich.console import Console

    monkeypatch.setattr("flows.cli_database.make_console", lambda: Console(width=width, markup=False, highlight=False))
    rows = gnome("query", "--format", "json").json
    lines = gnome("query").out.splitlines()
    for row in rows:
        own = [line for line in lines if row["id"] in line]
        assert own
        if width >= 80:
            short = row["method"][: row["method"].rindex("-")]
            assert [line for line in own if row["reduced_formula"] in line and short in line]
    assert max(map(len, lines[:-1])) <= width
    assert "-0.0000" not in "".join(lines)
    assert ("protostructure" in lines[0]) == (width == 160)
    assert (f"{len(rows)} of {len(rows)} crystals; a wider terminal shows" in lines[-1]) == (width < 160)


def test_methods_that_differ_in_their_digest_alone_are_told_apart() -> None:
    assert short_methods(["emt-default-4f6b4055", "chgnet-0.3.0-0123abcd", "chgnet-0.3.0-4567abcd"]) == {
        "emt-default-4f6b4055": "emt-default",
        "chgnet-0.3.0-0123abcd": "chgnet-0.3.0-0123abcd",
        "chgnet-0.3.0-4567abcd": "chgnet-0.3.0-4567abcd",
    }


def test_an_id_may_be_abbreviated(gnome: Gnome, database: Path) -> None:
    ids = sorted(row["id"] for row in gnome("query", "--format", "json").json)
    first = ids[0]
    short = next(first[:n] for n in range(1, 17) if sum(each.startswith(first[:n]) for each in ids) == 1)
    for spelled in (first, short, short.upper(), f" {short} "):
        assert gnome("show", spelled, "--lineage", "--json").json["id"] == first
    digits = [each[0] for each in ids]
    shared = next(digit for digit in digits if digits.count(digit) > 1)
    failed(
        gnome("show", shared), 2, f"several ids begin with '{shared}'", *(each for each in ids if each[0] == shared), "give more"
    )
    for wrong in ("zz", "", "%", "_", "2*", "' OR 1=1"):
        failed(gnome("show", wrong), 2, "no crystal")
    assert gnome("export", "one.json", short, ids[-1]).out == "2 crystals written to one.json\n"
    assert {entry["entry_id"] for entry in json.loads(Path("one.json").read_text())} == {first, ids[-1]}
    failed(gnome("export", "other.json", shared), 2, "several ids begin with")
    failed(gnome("export", "other.json", short, "--filter", "nelements = 40"), 2, "no crystal matches")


def test_a_crystal_of_two_methods_is_shown_under_either(gnome: Gnome, two_methods: Path) -> None:
    rows = gnome("query", '_gnome_method STARTS WITH "imported"', "--format", "json").json
    label = rows[0]["method"]
    shown = gnome("show", rows[0]["id"])
    assert f"known under {label} too; --method" in shown.err
    assert gnome("show", rows[0]["id"], "--method", label, "--json").json["e_form_per_atom"] == 0.0
    assert gnome("show", rows[0]["id"], "--method", "imported-", "--json").json["method"] == label
    failed(gnome("show", rows[0]["id"], "--method", "none"), 2, "no method 'none' in", label)


def test_the_name_of_a_method_that_a_table_shows_may_be_asked_for(gnome: Gnome, two_methods: Path) -> None:
    """Its label without the digest, or any beginning that no other label has."""
    rows = gnome("query", '_gnome_method STARTS WITH "imported"', "--format", "json").json
    label = rows[0]["method"]
    shown = next(iter(short_methods([label]).values()))
    assert shown in gnome("query", f'_gnome_method = "{label}"').out
    for spelled in (label, shown, "i", "imported"):
        assert gnome("query", f'_gnome_method = "{spelled}"', "--format", "json").json == rows
        assert gnome("query", f'"{spelled}" = _gnome_method', "--format", "json").json == rows
        others = gnome("query", f'_gnome_method != "{spelled}"', "--format", "json").json
        assert {row["method"] for row in others}.isdisjoint({label})
        assert others
    with Store.open(f"sqlite:///{two_methods / 'gnome.db'}") as store:
        (stored, *_) = store.crystals_of(label)
        other = Method(code="imported", functional="mp 2027")
        store.add_crystals(
            [CrystalRecord(crystal=stored.crystal, method=other, origin="imported", fingerprint="x", e_form_per_atom=0.0)]
        )
    assert label in gnome("query", '_gnome_method = "imported"').err, "two begin so"
    failed(gnome("show", rows[0]["id"], "--method", "imported"), 2, "several methods begin with 'imported'", label, other.label)
    assert gnome("query", f'_gnome_method = "{shown}"', "--format", "json").json == rows


def test_a_crystal_of_two_methods_has_two_names_in_a_cif_and_its_energies(gnome: Gnome, two_methods: Path) -> None:
    rows = gnome("query", "--format", "json").json
    written = gnome("export", "all.cif")
    assert "of 2 methods, whose energies never meet" in written.err
    for text in (Path("all.cif").read_text(), gnome("query", "--format", "cif").out):
        names = [block.name.lower() for block in cif.read_string(text)]
        assert len(names) == len(set(names)) == len(rows)
    items = [item for item in read_crystals(Path("all.cif")) if isinstance(item, ReadCrystal)]
    found = [(item.crystal.reduced_formula, item.fields["method"], item.fields["e_form_per_atom"]) for item in items]
    assert sorted(found) == sorted((row["reduced_formula"], row["method"], row["e_form_per_atom"]) for row in rows)
    label = next(row["method"] for row in rows if row["energy_per_atom"] is not None)
    assert gnome("export", "one.cif", "--filter", f'_gnome_method = "{label}"').err == ""
    failed(gnome("import", "one.cif"), 2, "with energies; name their method with --method")
    assert gnome("import", "one.cif", "--method", "again", "--json").json["imported"] == len(
        [r for r in rows if r["method"] == label]
    )


def test_json_holds_structures_by_choice_that_pymatgen_reads(gnome: Gnome, database: Path) -> None:
    rows = gnome("query", "nelements = 2", "--format", "json", "--structures").json
    plain = gnome("query", "nelements = 2", "--format", "json").json
    assert [{name: value for name, value in row.items() if name != "structure"} for row in rows] == plain
    for row in rows:
        s = row["structure"]
        structure = Structure(s["lattice"], s["species"], s["frac_coords"])
        assert structure.composition.reduced_formula == row["reduced_formula"]
        assert structure.volume / len(structure) == pytest.approx(row["volume_per_atom"])
    failed(gnome("query", "--structures"), 2, "--structures goes with --format json")
    failed(gnome("query", "--structures", "--format", "cif"), 2, "--format cif holds them")


def test_extxyz_carries_energies_and_ids(gnome: Gnome, database: Path) -> None:
    rows = gnome("query", "--format", "json").json
    Path("all.extxyz").write_text(gnome("query", "--format", "extxyz").out)
    frames = ase.io.read("all.extxyz", ":")
    assert len(frames) == len(rows)
    for atoms, row in zip(frames, rows, strict=True):
        assert atoms.get_potential_energy() == pytest.approx(row["energy_per_atom"] * row["n_atoms"], abs=1e-8)
        for name in ("id", "method", "reduced_formula", "e_form_per_atom", "e_above_hull"):
            assert atoms.info[name] == (pytest.approx(row[name]) if isinstance(row[name], float) else row[name])


@pytest.mark.parametrize(
    "text", ["NaN", "InF", "1234567890123456", "0123456789012345", "12e4567890123456", "T", "1_000", 'a"b', "1 2"]
)
def test_extxyz_keeps_texts_that_look_like_numbers(tmp_path: Path, text: str) -> None:
    """Sodium nitride, indium fluoride, and ids of digits."""
    crystal = Crystal.from_symbols([[4, 0, 0], [0, 4, 0], [0, 0, 4]], ["Na", "N"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    path = tmp_path / "x.extxyz"
    path.write_text(
        to_extxyz([ReadCrystal(label=text, crystal=crystal, fields={"reduced_formula": text, "energy_per_atom": -1.0})])
    )
    atoms = ase.io.read(path)
    assert atoms.info["reduced_formula"] == text
    assert atoms.info["label"] == text
    (item,) = read_crystals(path)
    assert isinstance(item, ReadCrystal)
    assert item.fields["reduced_formula"] == text


def test_export_to_a_cif_is_always_a_file(gnome: Gnome, database: Path) -> None:
    assert gnome("export", "all.cif", "--filter", "nelements = 1").out == "7 crystals written to all.cif\n"
    assert Path("all.cif").is_file()
    assert sorted(item.crystal.reduced_formula for item in read_crystals(Path("all.cif")) if isinstance(item, ReadCrystal)) == [
        "Ag", "Al", "Au", "Cu", "Ni", "Pd", "Pt"
    ]  # fmt: skip
    failed(gnome("export", "all.vasp", "--filter", "nelements = 1"), 2, "a POSCAR holds one crystal, and 7 match")
    assert not Path("all.vasp").exists()
    gnome("export", "folder", "--filter", "nelements = 1")
    assert len(list(Path("folder").glob("*.cif"))) == 7


def test_a_method_that_is_not_there_names_those_that_are(gnome: Gnome, database: Path) -> None:
    label = gnome("query", "--limit", 1, "--format", "json").json[0]["method"]
    assert gnome("query", '_gnome_method = "chgnet"').err == f"gnome: no crystal matches; the methods here are {label}\n"
    assert gnome("query", '_gnome_generator = "structral"').err.startswith("gnome: no crystal matches; the generators here are ")
    assert gnome("query", "nelements = 40").err == ""


def test_csv_has_the_method(gnome: Gnome, database: Path) -> None:
    (row, *_) = csv.DictReader(io.StringIO(gnome("query", "--format", "csv").out))
    assert row["method"].startswith("emt-default-")
    (header,) = csv.reader(io.StringIO(gnome("query", "nelements = 40", "--format", "csv").out))
    assert header == list(row), "the columns do not depend on what was found"


def test_evaluate_writes_several_crystals_to_one_cif(gnome: Gnome, database: Path) -> None:
    from emt_world import write_folder

    write_folder(Path("in"), {"b": l1_2("Cu", "Au"), "a": l1_2("Au", "Cu")})
    assert gnome("evaluate", "in", "--out", "out.cif").code == 0
    assert len(list(read_crystals(Path("out.cif")))) == 2
