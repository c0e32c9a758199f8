"""Energies at the door: nothing meets that must not, nothing is dropped without a word."""

import contextlib
import gzip
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from emt_world import settings_in
from typed_commands import Gnome, failed

from gnome.crystals.crystal import Crystal
from gnome.crystals.formats import ReadCrystal
from gnome.crystals.writers import write_crystals

CASES = Path(__file__).resolve().parents[3].parent / "shared" / "cases"


@pytest.fixture(autouse=True)
def here(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty database of its own."""
    settings = settings_in(own_folder)
    monkeypatch.setenv("GNOME_DATABASE_URL", settings.database_url)
    monkeypatch.setenv("GNOME_EVALUATOR", "emt")
    monkeypatch.setenv("GNOME_WORKERS", "1")
    return own_folder


def cell(symbols: list[str], a: float) -> dict[str, Any]:
    places = [[0, 0, 0], [0.5, 0.5, 0.5]]
    return Crystal.from_symbols([[a, 0, 0], [0, a, 0], [0, 0, a]], symbols, places[: len(symbols)]).to_dict()


def entry(
    label: str, symbols: list[str], a: float, energy: float | None = None, run_type: str = "", **more: Any
) -> dict[str, Any]:
    made = {"entry_id": label, "structure": cell(symbols, a), **more}
    made |= {"parameters": {"run_type": run_type}} if run_type else {}
    return made if energy is None else made | {"energy": energy}


def write(path: str, *entries: dict[str, Any]) -> str:
    Path(path).write_text(json.dumps(entries))
    return path


def stored(columns: str = "source, e_form_per_atom", method: str = "") -> list[tuple[Any, ...]]:
    with contextlib.closing(sqlite3.connect("gnome.db")) as connection:
        return connection.execute(f"SELECT {columns} FROM crystals WHERE method LIKE '%{method}%' ORDER BY key").fetchall()


def mixed(*kinds: str) -> list[dict[str, Any]]:
    """Mn, O and a compound for each run type, which lies lower the later it comes."""
    first = kinds[0]
    elements = [entry("Mn", ["Mn"], 2.6, -9.0, first), entry("O", ["O"], 2.9, -5.0, first)]
    oxides = (
        entry(f"MnO {kind}", ["Mn", "O"], 2.7 + 0.05 * i, -17.0 - i, kind, correction=-0.6 if "U" in kind else 0.0)
        for i, kind in enumerate(kinds)
    )
    return [*elements, *oxides]


def test_run_types_of_two_families_never_meet(gnome: Gnome) -> None:
    write("a.json", *mixed("GGA", "GGA+U", "R2SCAN", "r2scan", "PBEsol"))
    answer = gnome("import", "a.json", "--method", "mp", "--json").json
    assert answer["imported"] == 4
    assert [line.split(":")[0] for line in answer["refused"]] == ["MnO R2SCAN", "MnO r2scan", "MnO PBEsol"]
    assert "its run type is R2SCAN, where 4 of this import are GGA/GGA+U" in answer["refused"][0]
    write("scan.json", entry("later", ["Mn", "O"], 3.0, -25.0, "SCAN"))
    again = gnome("import", "scan.json", "--method", "mp", "--json")
    assert again.code == 1
    assert "its run type is SCAN, and 'mp' holds GGA/GGA+U" in json.loads(again.out)["refused"][0]
    assert len(stored()) == 4
    failed(gnome("import", "scan.json", "--method", "mp", "--run-type", "SCAN"), 2, "the method 'mp' holds GGA/GGA+U")


def test_one_run_type_of_several_may_be_taken(gnome: Gnome) -> None:
    own = [entry("Mn r", ["Mn"], 2.65, -19.0, "R2SCAN"), entry("O r", ["O"], 2.95, -9.0, "R2SCAN")]
    write("a.json", *mixed("GGA", "GGA+U", "R2SCAN"), *own)
    answer = gnome("import", "a.json", "--method", "r2scan", "--run-type", "r2SCAN", "--json").json
    assert (answer["imported"], len(answer["refused"])) == (3, 4)
    assert "--run-type takes R2SCAN" in answer["refused"][0]
    failed(gnome("import", "a.json", "--method", "x", "--run-type", "HSE06"), 2, "there are GGA/GGA+U, R2SCAN")
    failed(gnome("import", "a.json", "--run-type", "R2SCAN"), 2, "name their method with --method")


def test_where_no_run_type_is_said_nothing_changes_and_a_method_from_before_takes_no_other(gnome: Gnome) -> None:
    """As in databases whose crystals remember none."""
    write("a.json", *mixed(""))
    assert gnome("import", "a.json", "--method", "mine", "--json").json["imported"] == 3
    write("gga.json", entry("gga", ["Mn", "O"], 2.9, -17.5, "GGA+U", correction=-0.6))
    assert gnome("import", "gga.json", "--method", "mine", "--json").json["imported"] == 1
    assert len({row[0] for row in stored("method")}) == 1
    write("b.json", *mixed(""))
    assert gnome("import", "b.json", "--method", "other", "--json").json["imported"] == 3
    write("r2scan.json", entry("r", ["Mn", "O"], 3.0, -25.0, "R2SCAN"))
    refused = json.loads(gnome("import", "r2scan.json", "--method", "other", "--json").out)["refused"]
    assert "'other' holds energies that do not say theirs" in refused[0]


def test_formation_energies_are_taken_as_they_are_given(gnome: Gnome) -> None:
    documents = [
        {"material_id": f"mp-{i}", "formation_energy_per_atom": e_form, "energy_above_hull": 0.0, "structure": cell(symbols, a)}
        for i, (symbols, a, e_form) in enumerate(
            [(["Cs", "Br"], 4.1, -1.9), (["Cs", "I"], 4.4, -1.7), (["O"], 2.9, 0.01), (["Mn"], 2.6, -9.0)]
        )
    ]
    write("mp.json", *documents)
    answer = gnome("import", "mp.json", "--method", "mp", "--json").json
    assert stored() == [("mp-0", -1.9), ("mp-1", -1.7), ("mp-2", 0.01)]
    assert "an element's formation energy is 0" in answer["refused"][0]
    write("total.json", *mixed("GGA"))
    later = gnome("import", "total.json", "--method", "mp", "--json")
    assert later.code == 1
    assert "'mp' holds formation energies as given" in json.loads(later.out)["refused"][0]
    assert gnome("import", "total.json", "--method", "totals", "--json").json["imported"] == 3
    one = gnome("import", "mp.json", "--method", "totals", "--json")
    assert one.code == 1
    assert "'totals' holds total energies" in json.loads(one.out)["refused"][0]
    failed(gnome("import", "mp.json", "total.json", "--method", "both"), 2, "never meet on one hull")
    assert {row[0].split("-")[1] for row in stored("method")} == {"mp", "totals"}


def test_total_energies_with_some_formation_energies_come_from_the_elements(gnome: Gnome) -> None:
    first, *others = mixed("GGA")
    write("a.json", first, *others[:-1], {**others[-1], "data": {"formation_energy_per_atom": -5.0}})
    answer = gnome("import", "a.json", "--method", "m", "--json").json
    assert stored()[-1] == ("MnO GGA", -1.5)
    assert "all are taken from the elements" in answer["notes"][0]


def test_missing_elements_are_named_once(gnome: Gnome) -> None:
    write("a.json", *(entry(f"x{i}", ["Cs", "Br"], 4.1 + 0.01 * i, -7.0) for i in range(30)), entry("o", ["Mn", "O"], 2.7, -17.0))
    ended = gnome("import", "a.json", "--method", "m")
    assert ended.code == 1
    (line,) = [line for line in ended.err.splitlines() if line.startswith("31 crystals")]
    assert "import the entries of O, Mn, Br, Cs of the same method too" in line
    assert "no entry of Br, Cs under 'm'" in ended.err


def frame(keys: str) -> str:
    return (
        f'2\nLattice="4.1 0 0 0 4.1 0 0 0 4.1" Properties=species:S:1:pos:R:3 {keys} pbc="T T T"\nCu 0 0 0\nAu 2.05 2.05 2.05\n'
    )


def element_frame(symbol: str, keys: str) -> str:
    return f'1\nLattice="2.9 0 0 0 2.9 0 0 0 2.9" Properties=species:S:1:pos:R:3 {keys} pbc="T T T"\n{symbol} 0 0 0\n'


def test_energies_under_other_names_are_named_and_taken_when_asked(gnome: Gnome) -> None:
    text = frame("REF_energy=-7.0") + element_frame("Cu", "REF_energy=-3") + element_frame("Au", "REF_energy=-3.5")
    Path("a.extxyz").write_text(text)
    failed(gnome("import", "a.extxyz", "--method", "m"), 2, "There is REF_energy (3 crystals): --energy-key REF_energy")
    assert gnome("import", "a.extxyz", "--method", "m", "--energy-key", "REF_energy", "--json").json["imported"] == 3
    assert [row[0] for row in stored("e_form_per_atom")] == [pytest.approx(-0.25), 0.0, 0.0]
    failed(gnome("import", "a.extxyz", "--energy-key", "REF_energy"), 2, "name their method with --method")
    failed(gnome("import", "a.extxyz", "--method", "m", "--energy-key", "E0"), 2, "comes with one under 'E0'", "REF_energy")
    Path("b.extxyz").write_text(frame("energy=-7.0") + frame("dft_energy=-7.0"))
    (refused,) = [line for line in gnome("import", "b.extxyz", "--method", "n").err.splitlines() if "b.extxyz#2" in line]
    assert "it has dft_energy, which is not read unless --energy-key names it" in refused
    Path("c.extxyz").write_text(frame("REF_energy=-7.0 correction_per_atom=-0.5"))
    ended = gnome("import", "c.extxyz", "--method", "n", "--energy-key", "REF_energy")
    assert "a correction of -0.5 eV/atom stands beside it" in ended.err
    Path("d.json").write_text(json.dumps([entry("d", ["Cs", "Br"], 4.1, formation_energy_peratom=-1.9)]))
    failed(gnome("import", "d.json", "--method", "n"), 2, "formation_energy_peratom (1 crystal)", "rename the field")


def test_energies_that_relaxing_drops_are_said_to_be(gnome: Gnome) -> None:
    Path("a.extxyz").write_text(element_frame("Cu", "free_energy=-7.0"))
    done = gnome("import", "a.extxyz", "--json")
    assert done.json["imported"] == 1
    assert "free_energy (1 crystal): not read as energies" in done.json["notes"][0]
    assert done.err.index("free_energy (1 crystal)") < done.err.index("relaxing")
    Path("b.extxyz").write_text(element_frame("Au", ""))
    assert gnome("import", "b.extxyz", "--json").json["notes"] == []


def test_several_sources_go_in_at_once_and_a_missing_one_is_said_before(gnome: Gnome) -> None:
    Path("in").mkdir()
    Path("none").mkdir()
    mn, oxygen, oxide = mixed("GGA")
    write("in/a.json", mn)
    write("b.json", oxygen)
    Path("c.json.gz").write_bytes(gzip.compress(json.dumps([oxide]).encode()))
    failed(
        gnome("import", "in", "b.json", "nowhere", "--method", "m"), 2, "nowhere: no such file or folder; nothing was imported"
    )
    answer = gnome("import", "in", "b.json", "none", "c.json.gz", "--method", "m", "--json").json
    assert answer["imported"] == 3
    assert answer["refused"] == ["none: empty: none: the folder holds no file"]
    failed(gnome("import", "b.json", "in", "--method", "m", "--report", "in/r.txt"), 2, "would stand among what is imported")


def test_rows_of_several_methods_are_refused(gnome: Gnome) -> None:
    write("a.json", *(entry(str(i), ["Mn"], 2.6 + 0.1 * i, -9.0, data={"method": f"m-{i}"}) for i in range(2)))
    failed(gnome("import", "a.json", "--method", "m"), 2, "names 2 methods, m-0, m-1")


def test_a_lower_form_of_an_element_is_said_and_moves_no_reference(gnome: Gnome, emt_world: Path, here: Path) -> None:
    """References that lie 0.02 eV/atom too high, as those of an oxygen in another form."""
    known = next(settings_in(emt_world).data_folder.rglob("emt.json"))
    kept = settings_in(here).data_folder / "references" / "emt.json"
    kept.parent.mkdir(parents=True)
    references = json.loads(known.read_text())
    references["energies"]["Cu"] += 0.02
    kept.write_text(json.dumps(references))
    before = kept.read_text()
    copper = Crystal.from_symbols([[0, 1.8, 1.8], [1.8, 0, 1.8], [1.8, 1.8, 0]], ["Cu"], [[0, 0, 0]])
    write_crystals(Path("cu.cif"), [ReadCrystal(label="Cu", crystal=copper)])
    done = gnome("import", "cu.cif", "--json")
    (note,) = done.json["notes"]
    assert note.startswith(("Cu: 0.019", "Cu: 0.020"))
    assert "eV/atom below the reference of the element under emt" in note
    assert note.endswith("references stay as they are")
    assert note[:40] in done.err.replace("\n", " ")
    assert kept.read_text() == before
    assert stored("e_form_per_atom")[0][0] == pytest.approx(-0.02, abs=1e-3)


def salts(run_type: str = "", element_type: str = "") -> list[dict[str, Any]]:
    """Na, Cl and NaCl, which lies 2.5 eV/atom lower where it says R2SCAN."""
    own = entry("NaCl", ["Na", "Cl"], 4.1, -7.0 - (5.0 if run_type == "R2SCAN" else 0.0), run_type)
    return [entry("Na", ["Na"], 3.6, -1.3, element_type), entry("Cl", ["Cl"], 3.9, -1.8, element_type), own]


def test_rows_without_a_run_type_are_gga_and_meet_no_other(gnome: Gnome) -> None:
    """In a new method as in one that holds some; where most say another, those that say none are refused."""
    silent = entry("silent", ["Na", "Cl"], 4.2, -7.0)
    write("few.json", *salts("R2SCAN"), silent)
    answer = gnome("import", "few.json", "--method", "few", "--json").json
    assert answer["imported"] == 3
    assert answer["refused"][0].startswith("NaCl: run_type: its run type is R2SCAN, where 3 of this import are GGA/GGA+U")
    write("many.json", *salts("R2SCAN", "R2SCAN"), silent)
    answer = gnome("import", "many.json", "--method", "many", "--json").json
    assert answer["imported"] == 3
    assert "it does not say its run type, which counts as GGA/GGA+U, where 3 of this import are R2SCAN" in answer["refused"][0]
    assert "by itself with --run-type R2SCAN" in answer["refused"][0]
    write("later.json", silent)
    refused = json.loads(gnome("import", "later.json", "--method", "many", "--json").out)["refused"]
    assert "and 'many' holds R2SCAN" in refused[0]
    assert [row[0] for row in stored("e_form_per_atom", "-many")] == [0.0, 0.0, pytest.approx(-6.0 + 1.55)]


def test_a_run_type_that_is_named_counts_for_rows_that_say_none(gnome: Gnome) -> None:
    write("a.json", *salts())
    answer = gnome("import", "a.json", "--method", "scan", "--run-type", "r2SCAN", "--json").json
    assert answer["imported"] == 3
    assert answer["notes"] == ["3 crystals without a run type: taken as R2SCAN, as --run-type says"]
    write("gga.json", entry("gga", ["Na", "Cl"], 4.3, -7.0, "GGA"))
    refused = json.loads(gnome("import", "gga.json", "--method", "scan", "--json").out)["refused"]
    assert "its run type is GGA/GGA+U, and 'scan' holds R2SCAN" in refused[0]
    write("mixed.json", *salts("R2SCAN"))
    assert gnome("import", "mixed.json", "--method", "told", "--run-type", "R2SCAN", "--json").json["imported"] == 3


def test_gga_with_u_meets_gga_with_corrections_or_when_told(gnome: Gnome) -> None:
    iron = [entry("Fe", ["Fe"], 2.5, -8.2, "GGA"), entry("O", ["O"], 2.9, -4.9, "GGA")]
    bare, right = (entry("FeO", ["Fe", "O"], 3.0, -14.6, "GGA+U", correction=n) for n in (0.0, -2.0))
    write("a.json", *iron, bare)
    answer = gnome("import", "a.json", "--method", "a", "--json").json
    assert answer["imported"] == 2
    assert "FeO: run_type: its run type is GGA+U and it has no correction, beside energies of GGA" in answer["refused"][0]
    write("b.json", bare)
    assert "no correction" in gnome("import", "b.json", "--method", "a").err, "also where GGA came before"
    write("c.json", *iron, right)
    assert gnome("import", "c.json", "--method", "c", "--json").json["imported"] == 3
    assert gnome("import", "a.json", "--method", "told", "--run-type", "GGA+U", "--json").json["imported"] == 3
    write("u.json", *({**one, "parameters": {"run_type": "GGA+U"}} for one in (*iron, bare)))
    assert gnome("import", "u.json", "--method", "u", "--json").json["imported"] == 3
    write("d.json", entry("plain", ["Fe", "O"], 3.1, -14.0))
    assert "the method holds energies of GGA+U without corrections" in gnome("import", "d.json", "--method", "u").err


def test_corrected_energies_are_stored_as_the_raw_ones_and_their_corrections(gnome: Gnome) -> None:
    document = {"material_id": "mp-1", "structure": cell(["Na", "Cl"], 4.1), "energy_per_atom": -3.55}
    beside = {"uncorrected_energy_per_atom": -3.25, "formation_energy_per_atom": -2.0, "energy_above_hull": 0.0}
    write("mp.json", document | beside)
    assert gnome("import", "mp.json", "--method", "mp", "--json").json["imported"] == 1
    assert stored("energy_per_atom, correction_per_atom, e_form_per_atom") == [(-3.25, pytest.approx(-0.3), -2.0)]
    elements = [{**one, "energy": one["energy"] * 1.0} for one in salts()[:2]]
    write("total.json", *elements, {key: value for key, value in (document | beside).items() if not key.startswith("form")})
    assert gnome("import", "total.json", "--method", "total", "--json").json["imported"] == 3
    last = stored("energy_per_atom, correction_per_atom, e_form_per_atom", "-total")[-1]
    assert last == (-3.25, pytest.approx(-0.3), pytest.approx(-3.55 + 1.55))


def test_the_usual_energy_may_be_named_and_another_beside_it_is_said(gnome: Gnome) -> None:
    text = frame("energy=-6.8 REF_energy=-7.0") + element_frame("Cu", "energy=-3") + element_frame("Au", "energy=-3.5")
    Path("a.extxyz").write_text(text)
    named = gnome("import", "a.extxyz", "--method", "a", "--energy-key", "energy", "--json").json
    usual = gnome("import", "a.extxyz", "--method", "b", "--json").json
    said = ["REF_energy (1 crystal) is another energy than the one taken, and is not read; --energy-key REF_energy takes it"]
    assert named["imported"] == usual["imported"] == 3
    assert named["notes"] == usual["notes"] == said
    assert stored("energy_per_atom", "-a-")[0] == stored("energy_per_atom", "-b-")[0] == (-3.4,)
    write("entries.json", *salts())
    assert gnome("import", "entries.json", "--method", "c", "--energy-key", "energy", "--json").json["imported"] == 3
    Path("same.extxyz").write_text(
        frame("energy=-6.8 free_energy=-6.8 e_per_atom=-3.4") + text[len(frame("energy=-6.8 REF_energy=-7.0")) :]
    )
    assert gnome("import", "same.extxyz", "--method", "d", "--json").json["notes"] == []


def test_the_cases_that_failed_once(gnome: Gnome) -> None:
    if not CASES.exists():
        pytest.skip(f"the inputs that failed once are not here: {CASES}")
    answer = gnome("import", CASES / "import-mixed-run-types" / "entries.json", "--method", "mp", "--json").json
    assert answer["imported"] == 9
    (line,) = answer["refused"]
    assert "run type is R2SCAN" in line
    keys = CASES / "rough-extxyz-keys"
    failed(gnome("import", keys / "e02_ref_energy.extxyz", "--method", "pbe"), 2, "REF_energy")
    failed(gnome("import", keys / "e03_free_energy.extxyz", "--method", "pbe"), 2, "free_energy")
    assert "mtt::charge" in gnome("import", keys / "e04_colons.extxyz", "--method", "pbe").err


def test_another_energy_of_a_known_crystal_is_said_and_changes_nothing(gnome: Gnome) -> None:
    write("a.json", *salts())
    assert gnome("import", "a.json", "--method", "m", "--json").json["notes"] == []
    before = stored()
    assert gnome("import", "a.json", "--method", "m", "--json").json["notes"] == []
    lower = entry("again", ["Na", "Cl"], 4.1, -9.0)
    write("b.json", *salts()[:2], lower)
    done = gnome("import", "b.json", "--method", "m", "--json").json
    (note,) = done["notes"]
    assert "known already with another formation energy" in note
    assert "NaCl " in note
    assert "(-2.950, known with -1.950)" in note
    assert stored() == before
    write("c.json", *salts(), lower)
    (note,) = gnome("import", "c.json", "--method", "other", "--json").json["notes"]
    assert note.startswith("of a crystal that comes with several energies the lowest counts")
    assert "(-3.500, not -4.500)" in note


@pytest.mark.parametrize(
    ("adjustments", "correction", "expected"),
    [
        ([{"@class": "ConstantEnergyAdjustment", "value": -0.2}], None, -0.1),
        ([{"adj_per_atom": -0.3, "n_atoms": 1}, {"value": 0.1}], 0.0, -0.1),
        ([{"adj_per_deg": 0.001, "n_atoms": 2, "temp": 100}], 0.2, 0.1),
        ([{"value": -3.0}], -1.0, "correction is -1 eV, energy_adjustments sum to -3"),
        ([{"@class": "Unheard"}], None, "whose energy is not understood"),
    ],
)
def test_energy_adjustments_of_pymatgen_are_the_correction(
    gnome: Gnome, adjustments: list[dict[str, Any]], correction: float | None, expected: float | str
) -> None:
    sodium, chlorine, salt = salts()
    more = {} if correction is None else {"correction": correction}
    write("a.json", sodium, chlorine, {**salt, **more, "energy_adjustments": adjustments})
    done = gnome("import", "a.json", "--method", "m", "--json").json
    if isinstance(expected, str):
        assert expected in done["refused"][0]
    else:
        found = dict(stored("reduced_formula, correction_per_atom"))
        assert found["NaCl"] == pytest.approx(expected)


def test_an_import_of_which_nothing_can_be_read_names_no_evaluator(gnome: Gnome) -> None:
    Path("response.json").write_text(json.dumps({"data": salts()}))
    done = gnome("import", "response.json", "--method", "m", "--json")
    assert done.code == 1
    answer = json.loads(done.out)
    assert (answer["method"], answer["imported"]) == ("m", 0)
    assert "relaxing" not in done.err
