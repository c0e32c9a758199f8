"""Bad input to `gnome import`: one clear line each, and the rest goes in."""

import csv
import json
import shutil
import sqlite3
from pathlib import Path

import pytest
from cli_runs import ELEMENTS, Here, count, finish, one_line, start, wait_until
from emt_world import known_crystals, l1_2, write_folder

from gnome.crystals.crystal import Crystal
from gnome.crystals.formats import ReadCrystal
from gnome.crystals.writers import to_cif, write_crystals

pytestmark = pytest.mark.usefixtures("own_folder")


def write_labelled(folder: Path, n: int) -> None:
    """Write n crystals with energies, one file each: seven elements at 0 eV/atom, the others compounds below that."""
    folder.mkdir()
    crystals = {symbol: (crystal, 0.0) for symbol, crystal in ELEMENTS.items()}
    symbols = list(ELEMENTS)
    pairs = [(a, b) for a in symbols for b in symbols if a != b]
    for k in range(n - len(crystals)):
        first, second = pairs[k % len(pairs)]
        factor = 0.95 + 0.1 * (k // len(pairs)) / (1 + n // len(pairs))
        crystals[f"{second}3{first}-{k}"] = (l1_2(first, second).scaled(factor), -0.05 - 0.0001 * k)
    for name, (crystal, energy) in crystals.items():
        item = ReadCrystal(label=name, crystal=crystal, fields={"energy_per_atom": energy})
        write_crystals(folder / f"{name}.extxyz", [item])


@pytest.mark.parametrize("n", [150, pytest.param(1000, marks=pytest.mark.slow)])
def test_one_bad_structure_among_many_costs_itself(here: Here, tmp_path: Path, n: int) -> None:
    write_labelled(tmp_path / "many", n - 1)
    (tmp_path / "many" / "bad.cif").write_text("data_bad\n_cell_length_a oops\n")
    report = tmp_path / "report.txt"
    code, out, err = here(tmp_path, "import", tmp_path / "many", "--method", "table", "--report", report, "--json")
    assert code == 0, err
    answer = json.loads(out)
    assert (answer["imported"], answer["known"], len(answer["refused"])) == (n - 1, 0, 1)
    (line,) = report.read_text().splitlines()
    assert line == answer["refused"][0]
    assert "bad.cif" in line
    code, out, _ = here(tmp_path, "query", "--limit", 2000, "--format", "json")
    rows = json.loads(out)
    assert len(rows) == n - 1
    assert all(row["e_above_hull"] is not None for row in rows)


POSCAR = "title\n1.0\n{cell}\nCu\n2\nDirect\n0 0 0\n{second}\n"


CUBE = "4 0 0\n0 4 0\n0 0 4"


def cif_with(site: str) -> str:
    lengths = [f"_cell_length_{axis} 4" for axis in "abc"]
    cell = "\n".join([*lengths, *(f"_cell_angle_{angle} 90" for angle in ("alpha", "beta", "gamma"))])
    names = "\n".join(f"_atom_site_{name}" for name in ("label", "type_symbol", "fract_x", "fract_y", "fract_z", "occupancy"))
    return f"data_x\n{cell}\n_symmetry_space_group_name_H-M 'P 1'\nloop_\n{names}\n{site}\n"


def extxyz(lattice: str, energy: float) -> str:
    return f'1\nLattice="{lattice}" Properties=species:S:1:pos:R:3 energy={energy} pbc="T T T"\nCu 0.0 0.0 0.0\n'


BAD = {
    "malformed": ("bad.cif", "data_x\n_cell_length_a oops\n"),
    "huge": ("bad.cif", cif_with("Cu1 Cu 0 0 0 1") + "# filler\n" * 2_500_000),
    "isotope": ("bad.cif", cif_with("D1 D 0 0 0 1\nCu1 Cu 0.5 0.5 0.5 1")),
    "disordered": ("bad.cif", cif_with("Cu1 Cu 0 0 0 0.5\nAu1 Au 0 0 0 0.5")),
    "unsupported element": ("bad.cif", cif_with("Og1 Og 0 0 0 1")),
    "zero volume": ("POSCAR_bad", POSCAR.format(cell="4 0 0\n0 4 0\n4 4 0", second="0.5 0.5 0.5")),
    "NaN cell": ("bad.extxyz", extxyz("nan 0 0 0 4 0 0 0 4", -0.1)),
    "overlapping atoms": ("POSCAR_bad", POSCAR.format(cell=CUBE, second="0.001 0 0")),
    "energy of 1e6": ("bad.extxyz", extxyz("3 0 0 0 3 0 0 0 3", 1e6)),
    "cut short": ("bad.json", json.dumps({"entry_id": "x", "structure": {"lattice": [[1, 2]]}})[:40]),
    "no crystal at all": ("bad.docx", "dear diary"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_what_cannot_be_used_is_refused_by_name_and_the_rest_goes_in(
    here: Here, case: str, good_element: Path, tmp_path: Path
) -> None:
    name, text = BAD[case]
    shutil.copytree(good_element, tmp_path / "in")
    (tmp_path / "in" / name).write_text(text)
    code, out, err = here(tmp_path, "import", tmp_path / "in", "--method", "table", "--json")
    assert code == 0, err
    answer = json.loads(out)
    assert answer["imported"] == 1
    (line,) = answer["refused"]
    assert name in line
    code, out, err = here(tmp_path, "predict", tmp_path / "in" / name, "--json")
    assert code == 1, err
    (row,) = json.loads(out)
    assert name in row["input"]
    assert row["refused"]
    assert row["e_form_per_atom"] is None


def test_the_same_row_twice_goes_in_once(here: Here, tmp_path: Path) -> None:
    text = to_cif(ReadCrystal(label="Cu", crystal=ELEMENTS["Cu"]))
    with (tmp_path / "twice.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["id", "energy_per_atom", "cif"], ["one", 0.0, text], ["two", 0.0, text]])
    code, out, err = here(tmp_path, "import", tmp_path / "twice.csv", "--method", "table", "--json")
    assert code == 0, err
    answer = json.loads(out)
    assert (answer["imported"], answer["known"], answer["refused"]) == (1, 1, [])


def test_an_implausible_formation_energy_reaches_no_hull(here: Here, good_element: Path, tmp_path: Path) -> None:
    """An energy that a file may state (below the bound on raw energies), but that no compound has."""
    shutil.copytree(good_element, tmp_path / "in")
    for name, energy, crystal in (("Au", 0.0, ELEMENTS["Au"]), ("odd", -900.0, l1_2("Cu", "Au"))):
        item = ReadCrystal(label=name, crystal=crystal, fields={"energy_per_atom": energy})
        write_crystals(tmp_path / "in" / f"{name}.extxyz", [item])
    code, out, err = here(tmp_path, "import", tmp_path / "in", "--method", "table", "--json")
    assert code == 0, err
    answer = json.loads(out)
    assert answer["imported"] == 2
    assert "e_form_per_atom is -900" in answer["refused"][0]


def test_relaxing_imports_that_were_interrupted_are_placed_on_the_hull_later(here: Here, tmp_path: Path) -> None:
    crystals = known_crystals()
    source = write_folder(tmp_path / "in", crystals)
    process = start(tmp_path, "import", source, "--evaluator", "emt")
    wait_until(process, lambda: (tmp_path / "gnome.db").exists() and bool(_stored(tmp_path)))
    process.kill()
    finish(process)
    before = count(tmp_path, "SELECT count(*) FROM crystals")
    assert 0 < before < len(crystals)
    assert count(tmp_path, "SELECT count(*) FROM crystals WHERE e_above_hull IS NULL") == before
    code, out, err = here(tmp_path, "import", source, "--evaluator", "emt", "--json")
    assert code == 0, err
    answer = json.loads(out)
    assert (answer["imported"], answer["known"], answer["refused"]) == (len(crystals) - before, before, [])
    assert count(tmp_path, "SELECT count(*) FROM crystals WHERE e_above_hull IS NULL") == 0


def _stored(folder: Path) -> int:
    try:
        return int(count(folder, "SELECT count(*) FROM crystals"))
    except sqlite3.OperationalError:  # the tables are not made yet
        return 0


def test_the_bad_inputs_differ_from_good_ones_by_what_they_are_named_for(tmp_path: Path) -> None:
    """The same files without the fault are read."""
    from gnome.crystals.formats import read_crystals

    good: dict[str, str] = {
        "a.cif": cif_with("Cu1 Cu 0 0 0 1"),
        "POSCAR_b": POSCAR.format(cell=CUBE, second="0.5 0.5 0.5"),
        "c.extxyz": extxyz("3 0 0 0 3 0 0 0 3", -0.1),
    }
    for name, text in good.items():
        (tmp_path / name).write_text(text)
    items = list(read_crystals(tmp_path))
    assert len(items) == len(good)
    for item in items:
        assert isinstance(item, ReadCrystal), item
        assert isinstance(item.crystal, Crystal)


def write_elements(path: Path, energies: dict[str, float]) -> Path:
    items = [ReadCrystal(label=name, crystal=ELEMENTS[name], fields={"energy_per_atom": e}) for name, e in energies.items()]
    write_crystals(path, items)
    return path


def test_a_lower_form_of_an_element_does_not_change_what_was_imported_before(here: Here, tmp_path: Path) -> None:
    first = write_elements(tmp_path / "first.json", {"Cu": -3.0, "Au": -2.0})
    lower = write_elements(tmp_path / "lower.json", {"Cu": -3.5})
    assert here(tmp_path, "import", first, "--method", "table")[0] == 0
    code, out, err = here(tmp_path, "import", lower, "--method", "table")
    assert (code, out) == (2, "")
    assert "Cu: this import holds a lower form of the element" in one_line(err)
    assert count(tmp_path, "SELECT count(*) FROM crystals") == 2
    code, _, err = here(tmp_path, "import", lower, "--method", "another table")
    assert code == 0, err


def test_an_import_of_which_nothing_is_left_fails(here: Here, tmp_path: Path) -> None:
    (tmp_path / "bad.cif").write_text("data_bad\n_cell_length_a oops\n")
    code, out, err = here(tmp_path, "import", tmp_path / "bad.cif", "--evaluator", "emt")
    assert code == 1, err
    assert "0 crystals imported" in out
    assert "refused" in err
    assert "malformed" in err


def test_a_report_that_cannot_be_written_is_said_before_the_work(here: Here, good_element: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    report = tmp_path / "file" / "report.txt"
    code, out, err = here(tmp_path, "import", good_element, "--method", "table", "--report", report)
    assert (code, out) == (2, "")
    assert str(report) in one_line(err)
    assert not (tmp_path / "gnome.db").exists()


def test_the_lowest_of_one_crystal_counts_and_the_same_file_goes_in_again(here: Here, tmp_path: Path) -> None:
    rows = [ReadCrystal(label=f"Cu{e}", crystal=ELEMENTS["Cu"], fields={"energy_per_atom": e}) for e in (-4.1, -3.7)]
    write_crystals(tmp_path / "twice.json", rows)
    for _ in range(2):
        code, out, err = here(tmp_path, "import", tmp_path / "twice.json", "--method", "table", "--json")
        assert code == 0, err
        assert json.loads(out)["refused"] == []
    assert count(tmp_path, "SELECT group_concat(energy_per_atom) FROM crystals") == "-4.1"
    assert count(tmp_path, "SELECT e_form_per_atom FROM crystals") == 0


def test_a_method_for_crystals_without_energies_is_refused(here: Here, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", {"Cu": ELEMENTS["Cu"]})
    code, out, err = here(tmp_path, "import", source, "--method", "mp-2026")
    assert (code, out) == (2, "")
    assert "of 1 crystal none comes with one" in one_line(err)


def test_a_report_does_not_replace_what_is_imported(here: Here, good_element: Path, tmp_path: Path) -> None:
    shutil.copytree(good_element, tmp_path / "in")
    before = (tmp_path / "in" / "Cu.extxyz").read_text()
    for report in (tmp_path / "in" / "Cu.extxyz", tmp_path / "in" / "report.txt"):
        code, out, err = here(tmp_path, "import", tmp_path / "in", "--method", "table", "--report", report)
        assert (code, out) == (2, "")
        assert "would stand among what is imported" in one_line(err)
    assert (tmp_path / "in" / "Cu.extxyz").read_text() == before


def test_crystals_with_energies_can_be_relaxed(here: Here, tmp_path: Path) -> None:
    """What was exported comes back without a method of its own."""
    write_folder(tmp_path / "first", known_crystals())
    assert here(tmp_path, "import", tmp_path / "first")[0] == 0
    assert here(tmp_path, "export", "all.cif")[0] == 0
    (tmp_path / "gnome.db").rename(tmp_path / "old.db")
    assert "or relax the crystals with --relax" in one_line(here(tmp_path, "import", "all.cif")[2])
    assert "does not go with --method" in one_line(here(tmp_path, "import", "all.cif", "--relax", "--method", "m")[2])
    code, out, err = here(tmp_path, "import", "all.cif", "--relax", "--json")
    assert code == 0, err
    answer = json.loads(out)
    assert (answer["imported"], answer["refused"], answer["notes"]) == (len(known_crystals()), [], [])
    assert answer["method"].startswith("emt-")
