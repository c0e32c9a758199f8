"""`gnome predict` of crystals: energies, probabilities of stability, and what is refused."""

import csv
import gzip
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from emt_world import l1_2, write_folder
from typed_commands import Gnome, failed

from flows import known_phases
from flows.hull_table import read_hull
from flows.progress import Silent
from gnome.crystals.crystal import Crystal
from gnome.models.ensemble import StructuralEnsemble
from gnome.shipped import shipped_data
from pipelines.screening import EnsembleEnergies

pytestmark = pytest.mark.usefixtures("own_folder")


def test_predict_does_not_take_the_shipped_ensemble_for_that_of_a_damaged_database(gnome: Gnome, database: Path) -> None:
    write_folder(database / "in", {"a": l1_2("Cu", "Au")})
    (database / "gnome.db").write_text("dear diary, " * 1000)
    failed(gnome("predict", database / "in"), 1, "the file is something else")


def test_predict_answers_in_the_order_of_the_input(gnome: Gnome, own_folder: Path) -> None:
    """Without any database, with the ensemble that ships."""
    crystals = {"c": l1_2("Cu", "Au"), "a": l1_2("Au", "Cu"), "b": l1_2("Al", "Ni")}
    folders = [write_folder(own_folder / name, {name: crystal}) for name, crystal in crystals.items()]
    (own_folder / "broken.cif").write_text("data_nothing\n")
    rows = gnome("predict", folders[0], "broken.cif", *folders[1:], "--json").json
    assert [row.get("reduced_formula") for row in rows] == ["CuAu3", None, "Cu3Au", "AlNi3"]
    assert rows[1]["input"] == "broken.cif"
    assert rows[1]["refused"].startswith("malformed: ")
    good = [row for row in rows if row["refused"] is None]
    assert all(-2 < row["e_form_per_atom"] < 1 and row["spread"] >= 0 for row in good)
    (alone,) = gnome("predict", folders[1], "--json").json
    assert alone["e_form_per_atom"] == pytest.approx(rows[2]["e_form_per_atom"], abs=1e-5)
    (mean,) = gnome("predict", folders[1], "--volumes", "9", "--json").json
    assert 0 < abs(mean["e_form_per_atom"] - alone["e_form_per_atom"]) < 0.05
    assert mean["e_form_uncertainty"] is None, "it is not known at several volumes"
    assert alone["e_form_uncertainty"] > 0
    table = gnome("predict", folders[1])
    assert f"{alone['e_form_per_atom']:.4f}" in table.out


def test_predict_refuses_elements_the_ensemble_never_saw(gnome: Gnome, own_folder: Path) -> None:
    radon = Crystal.from_symbols([[4.5, 0, 0], [0, 4.5, 0], [0, 0, 4.5]], ["Rn", "Cu"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    ended = gnome("predict", write_folder(own_folder / "rn", {"rn": radon}), "--json")
    assert ended.code == 1, "nothing was predicted"
    (row,) = json.loads(ended.out)
    assert "Rn" in row["refused"]
    assert row["e_form_per_atom"] is None


@pytest.mark.parametrize(
    ("energy", "spread", "why"),
    [
        (float("nan"), 0.0, "predicted nan eV/atom"),
        (-11402.97, 0.1, "predicted -1.14e+04 eV/atom"),
        (-1.0, float("inf"), "not all members"),
    ],
)
def test_predict_refuses_absurd_energies(
    gnome: Gnome, own_folder: Path, monkeypatch: pytest.MonkeyPatch, energy: float, spread: float, why: str
) -> None:
    monkeypatch.setattr(
        "flows.predicting.predict_energies",
        lambda *_: EnsembleEnergies(
            e_form_per_atom=np.array([energy, -0.1]), spread=np.array([spread, 0.01]), volume_scale=np.ones(2)
        ),
    )
    folder = write_folder(own_folder / "in", {"a": l1_2("Au", "Cu"), "b": l1_2("Cu", "Au")})
    absurd, good = gnome("predict", folder, "--json").json
    assert absurd["refused"].startswith(f"implausible_energy: {why}")
    assert absurd["e_form_per_atom"] is None
    assert absurd["p_stable"] is None
    assert good["refused"] is None
    assert good["e_form_per_atom"] == -0.1


def calibrated(folder: Path) -> Path:
    """The shipped ensemble with a card that says how far it is off."""
    for suffix in ("safetensors", "json"):
        shutil.copy(shipped_data() / "ensembles" / f"structural.{suffix}", folder / f"own.{suffix}")
    card = json.loads((folder / "own.json").read_text())
    card["calibration"] = {"floor": 0.02, "factor": 0.5, "power": 1.0, "degrees": 3.0}
    (folder / "own.json").write_text(json.dumps(card))
    return folder / "own.safetensors"


def test_predict_says_how_probably_a_crystal_is_stable(gnome: Gnome, own_folder: Path) -> None:
    """Against phases of a table: far below them, far above, as near as to be undecided, and with an element they lack."""
    crystals = {"AlNi3": l1_2("Al", "Ni"), "Cu3Au": l1_2("Au", "Cu"), "Ag3Pd": l1_2("Pd", "Ag")}
    folder = write_folder(own_folder / "in", crystals)
    model = calibrated(own_folder)
    plain = {row["reduced_formula"]: row for row in gnome("predict", folder, "--model", model, "--json").json}
    assert {row["p_stable"] for row in plain.values()} == {None}
    assert all(row["e_form_uncertainty"] > 0 for row in plain.values())
    known = plain["AlNi3"]["e_form_per_atom"], plain["Cu3Au"]["e_form_per_atom"]
    assert known[1] < 0, "else the elements are the hull there"
    (own_folder / "phases.csv").write_text(
        f"formula,e_form_per_atom\nAl,0\nNi,0\nCu,0.0\nAu,0\nAlNi3,{known[0] + 0.3}\nCu3Au,{known[1]}\n"
    )
    rows = {
        row["reduced_formula"]: row for row in gnome("predict", folder, "--model", model, "--hull", "phases.csv", "--json").json
    }
    assert rows["AlNi3"]["p_stable"] > 0.95
    assert rows["Cu3Au"]["p_stable"] == pytest.approx(0.5, abs=1e-4)
    assert rows["Ag3Pd"]["p_stable"] is None
    assert rows["AlNi3"]["hull"] == "pbe-mp2020"
    table = gnome("predict", folder, "--model", model, "--hull", "phases.csv", "--csv").out
    read = {row["reduced_formula"]: row for row in csv.DictReader(io.StringIO(table))}
    assert float(read["AlNi3"]["p_stable"]) == pytest.approx(rows["AlNi3"]["p_stable"])
    assert read["Ag3Pd"]["p_stable"] == ""
    assert read["AlNi3"]["hull"] == "pbe-mp2020"
    assert "give --hull" in gnome("predict", folder).out
    assert "give --hull" in plain["AlNi3"]["no_p_stable"]
    assert "lacks Pd, Ag" in rows["Ag3Pd"]["no_p_stable"] == read["Ag3Pd"]["no_p_stable"]
    assert rows["AlNi3"]["no_p_stable"] is None
    assert "known phases under pbe-mp2020" in gnome("predict", folder, "--model", model, "--hull", "phases.csv").out
    several = gnome("predict", folder, "--model", model, "--hull", "phases.csv", "--volumes", "3")
    assert "several volumes" in several.out
    gnome_says = gnome("predict", own_folder / "in" / "AlNi3.cif", "--hull", "typo.csv")
    assert gnome_says.code == 2


def test_predict_judges_by_the_crystals_of_the_database(
    gnome: Gnome, database: Path, own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through an offset between the methods, whose errors say how sure it is; no evaluator is needed for it."""
    assert database
    monkeypatch.setattr("gnome.models.calibration.MIN_EXAMPLES", 5)
    monkeypatch.setenv("GNOME_EVALUATOR", "recorded:/nowhere.jsonl")
    for more in ([], ["--volumes", "3"]):
        rows = gnome("predict", write_folder(own_folder / "in", {"a": l1_2("Au", "Cu")}), "--json", *more).json
        assert rows[0]["hull"].startswith("emt")
        assert 0 < rows[0]["p_stable"] < 1
        assert (rows[0]["e_form_uncertainty"] is None) == bool(more)


def test_predict_says_when_too_few_were_evaluated_to_know_its_errors(gnome: Gnome, database: Path, own_folder: Path) -> None:
    assert database
    folder = write_folder(own_folder / "in", {"a": l1_2("Au", "Cu")})
    for more in ([], ["--volumes", "3"]):
        (row,) = gnome("predict", folder, "--json", *more).json
        assert row["hull"].startswith("emt")
        assert row["p_stable"] is None
        assert "no p_stable where too few evaluations under emt" in gnome("predict", folder, *more).out


def test_predict_fits_an_offset_once_and_anew_where_what_it_left_is_damaged(
    gnome: Gnome, database: Path, own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gnome.models.calibration.MIN_EXAMPLES", 5)
    fitted: list[str] = []
    fit_offset = known_phases.fit_offset
    monkeypatch.setattr(
        "flows.known_phases.fit_offset", lambda *given, **options: fitted.append("one") or fit_offset(*given, **options)
    )
    folder = write_folder(own_folder / "in", {"a": l1_2("Au", "Cu")})
    first, second = (gnome("predict", folder, "--json").json for _ in range(2))
    assert (first, len(fitted)) == (second, 1)
    (kept,) = database.parent.rglob("offsets/*.json")
    kept.write_text("{")
    assert gnome("predict", folder, "--json").json == first
    assert gnome("predict", folder, "--json").json == first
    assert len(fitted) == 2


def test_a_hull_table_is_read_as_text_packed_or_not(own_folder: Path) -> None:
    """Sodium nitride is no missing value, nor is indium fluoride infinite."""
    text = "Formula , e_form_per_atom\nNaN,-0.5\nInF,-1.5\nNa,0\n"
    (own_folder / "a.csv").write_text(text)
    (own_folder / "b.csv.gz").write_bytes(gzip.compress(text.encode()))
    (own_folder / "c.csv").write_text(text.replace("e_form_per_atom", "Formation_Energy_per_Atom"))
    for name in ("a.csv", "b.csv.gz", "c.csv"):
        hull = read_hull(own_folder / name, "pbe")
        assert [dict(entry.composition) for entry in hull.entries] == [{7: 1, 11: 1}, {9: 1, 49: 1}, {11: 1}]


def test_predict_wants_the_cell_as_it_is_among_the_volumes(gnome: Gnome, own_folder: Path) -> None:
    ended = gnome("predict", write_folder(own_folder / "in", {"a": l1_2("Au", "Cu")}), "--volumes", "2")
    assert ended.code == 2
    assert "an odd number" in ended.err


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("formula,e_form_per_atom\nNaCl,x\n", "line 2: e_form_per_atom of NaCl is 'x'"),
        ("formula,e_form_per_atom\nNaCl,nan\n", "line 2: e_form_per_atom of NaCl is 'nan'"),
        ("formula,e_form_per_atom,method\nNaCl,-1,chgnet\n", "is of method chgnet, the ensemble predicts pbe-mp2020"),
        ("formula,e_form_per_atom\nNaCl,-2\nNa,-1.3\n", "line 3: Na has a formation energy of -1.3"),
        ('formula,e_form_per_atom\n"NaCl,-2\n', "cannot be read as a table"),
        ("formula,e_form_per_atom\nQq,-1\n", "line 2: formula 'Qq'"),
        ("formula,e_form_per_atom\nNaCl,-100\n", "line 2: e_form_per_atom of NaCl is '-100'"),
        ("formula,e_form_per_atom\nNaCl,-3.4\nNa,-1.3\nCl,-1.8\nAr,0.0\n", "line 4: Cl has a formation energy of -1.8"),
        ("formula,e_form_per_atom\nNaCl,-3.4\nW,-12.9\n", "are these total energies"),
        ("formula,energy\nNaCl,-1\n", "no column e_form_per_atom"),
        ("name,e_form_per_atom\nNaCl,-1\n", "no column formula or reduced_formula"),
        ("formula,e_form_per_atom\n", "holds no phases"),
        ("", "no column formula"),
    ],
)
def test_tables_that_are_no_hull(gnome: Gnome, own_folder: Path, content: str, complaint: str) -> None:
    (own_folder / "phases.csv").write_text(content)
    folder = write_folder(own_folder / "in", {"a": l1_2("Au", "Cu")})
    ended = gnome("predict", folder, "--hull", "phases.csv")
    assert ended.code == 2
    assert complaint in ended.err


@pytest.mark.parametrize("odd", ["O2,-0.02", "O2,-4.9", "W,-12.9", "O2,", "O2,none", "Na,0\nO2,9"])
def test_one_row_of_an_element_does_not_cost_the_table(own_folder: Path, odd: str) -> None:
    """Elements count as 0 whatever a table says; that it says something else is told."""
    (own_folder / "a.csv").write_text(f"formula,e_form_per_atom\nMg,0.03\nMgO,-3.0\n{odd}\n")
    said: list[str] = []

    class Hears(Silent):
        def say(self, line: str) -> None:
            said.append(line)

    hull = read_hull(own_folder / "a.csv", "pbe", Hears())
    name = odd.splitlines()[-1].split(",")[0]
    assert len(said) == 1
    assert f"{name} " in said[0]
    assert "(line " in said[0]
    assert hull.energy({8: 1}) == 0.0
    assert hull.decomposition_energy({12: 1, 8: 1}, -3.0) == -3.0
    assert (74 if name == "W" else 8) in hull.elements, "the element is known, at 0"
    (own_folder / "b.csv").write_text("formula,e_form_per_atom\nMgO,-3.0\nO2,-0.02\n")
    read_hull(own_folder / "b.csv", "pbe", Hears())
    assert len(said) == 2


def rocksalt(first: str, second: str, a: float) -> Crystal:
    places = [[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]
    coords = [*places, *([x + 0.5, y, z] for x, y, z in places)]
    return Crystal.from_symbols([[a, 0, 0], [0, a, 0], [0, 0, a]], [first] * 4 + [second] * 4, coords)


def test_what_competes_with_elements_alone_is_not_called_stable(gnome: Gnome, own_folder: Path) -> None:
    crystals = {"MgO": rocksalt("Mg", "O", 4.25), "NaCl": rocksalt("Na", "Cl", 5.69), "Mg": rocksalt("Mg", "Mg", 5.3)}
    folder = write_folder(own_folder / "in", crystals)
    (own_folder / "thin.csv").write_text("formula,e_form_per_atom\nMg,0\nO2,0\nNa,0\nCl2,0\nMgO2,-1.6\nMgO,-3.5\n")
    rows = {row["reduced_formula"]: row for row in gnome("predict", folder, "--hull", "thin.csv", "--json").json}
    salt, oxide, metal = rows["NaCl"], rows["MgO"], rows["Mg"]
    assert salt["decomposition_energy"] == pytest.approx(salt["e_form_per_atom"])
    assert (salt["e_above_hull"], salt["n_competing"], salt["supported"]) == (0.0, 0, False)
    assert oxide["e_above_hull"] == pytest.approx(oxide["e_form_per_atom"] + 3.5)
    assert oxide["decomposition_energy"] == pytest.approx(oxide["e_form_per_atom"] + 1.6 * 1.5 / 2, abs=1e-6), "MgO2 and Mg"
    assert (oxide["n_competing"], oxide["supported"]) == (1, True), "MgO2, which MgO itself does not lift"
    assert (metal["supported"], metal["n_competing"]) == (None, None)
    assert "element: its lowest form is the reference" in metal["note"]
    assert metal["e_above_hull"] == pytest.approx(max(0.0, metal["e_form_per_atom"]))
    out = " ".join(gnome("predict", folder, "--hull", "thin.csv").out.split())
    assert "1 of 2 predicted on or below the hull of known phases under pbe-mp2020; of these 1 compete with elements alone" in out
    assert "0 predicted stable" in out
    (own_folder / "more.csv").write_text("formula,e_form_per_atom\nMg,0\nO2,0\nNa,0\nCl2,0\nMgO,-3.5\nNaCl2,-0.2\n")
    out = " ".join(gnome("predict", folder, "--hull", "more.csv").out.split())
    assert "1 of 2 predicted stable against the known phases under pbe-mp2020" in out
    table = gnome("predict", folder, "--hull", "thin.csv", "--csv").out
    read = {row["reduced_formula"]: row for row in csv.DictReader(io.StringIO(table))}
    assert (read["NaCl"]["supported"], read["NaCl"]["n_competing"]) == ("False", "0")


def lowest_mixture(x: float, points: list[tuple[float, float]]) -> float:
    """The lowest energy of two phases, or one, that make up a share x of one of two elements."""
    pairs = [(one, other) for one in points for other in points if one[0] <= x <= other[0]]
    return min(
        one[1] if one[0] == other[0] else one[1] + (other[1] - one[1]) * (x - one[0]) / (other[0] - one[0])
        for one, other in pairs
    )


def test_through_an_offset_the_same_hull_judges(gnome: Gnome, database: Path, own_folder: Path) -> None:
    """Distances are those of the energies that the offset carries over, computed here from the stored offset and the crystals."""
    (row,) = gnome("predict", write_folder(own_folder / "in", {"a": l1_2("Au", "Cu")}), "--json").json
    assert row["reduced_formula"] == "Cu3Au"
    assert row["hull"].startswith("emt")
    (path,) = database.rglob("offsets/*.json")
    offset = json.loads(path.read_text())
    per_element = offset["per_element"]
    carried = row["e_form_per_atom"] + offset["intercept"] + (3 * per_element[29] + per_element[79]) / 4
    known = gnome("query", 'elements HAS ONLY "Cu", "Au"', "--format", "json", "--structures").json
    phases = [
        (each["structure"]["species"].count("Au") / len(each["structure"]["species"]), each["e_form_per_atom"]) for each in known
    ]
    assert any(0 < x < 1 for x, _ in phases)
    phases += [(0.0, 0.0), (1.0, 0.0)]  # the elements' references
    assert row["e_above_hull"] == pytest.approx(max(0.0, carried - lowest_mixture(0.25, phases)), abs=1e-6)
    others = [(x, energy) for x, energy in phases if x != 0.25]
    assert row["decomposition_energy"] == pytest.approx(carried - lowest_mixture(0.25, others), abs=1e-6)
    assert abs(carried - row["e_form_per_atom"]) > 1e-3, "else the offset might be left out"
    assert row["supported"] is True
    assert row["n_competing"] >= 1
    assert "too few evaluations" in row["no_p_stable"]


def test_a_crystal_whose_atoms_see_no_neighbour_is_said_to_be(gnome: Gnome, own_folder: Path) -> None:
    cube = np.eye(3)
    crystals = {
        "CsBr": Crystal.from_symbols(cube * 9.0, ["Cs", "Br"], [[0, 0, 0], [0.5, 0.5, 0.5]]),
        "KBr": Crystal.from_symbols(cube * 9.0, ["K", "Br", "Br"], [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0.75]]),
        "Cs": Crystal.from_symbols(cube * 6.14, ["Cs", "Cs"], [[0, 0, 0], [0.5, 0.5, 0.5]]),
        "NaCl": rocksalt("Na", "Cl", 5.69),
    }
    answer = gnome("predict", write_folder(own_folder / "in", crystals), "--json").json
    rows = {row["reduced_formula"]: row["note"] for row in answer}
    assert rows["CsBr"].startswith("no atom has a neighbour within the network's 3.5 angstrom")
    assert "the composition alone" in rows["CsBr"]
    assert rows["KBr2"].startswith("1 of 3 atoms have no neighbour within the network's 3.5 angstrom")
    assert "no atom has a neighbour" in rows["Cs"]
    assert "element" in rows["Cs"]
    assert rows["NaCl"] is None
    assert "no atom has a" in " ".join(gnome("predict", own_folder / "in").out.split())


def test_neighbours_are_counted_within_the_networks_own_cutoff() -> None:
    ensemble = StructuralEnsemble.load(shipped_data() / "ensembles" / "structural.safetensors")
    assert ensemble.cutoff == ensemble.members[0].settings.cutoff

    def line(distance: float) -> Crystal:
        return Crystal.from_symbols(np.diag([20.0, 20.0, 20.0]), ["Cs", "Br"], [[0, 0, 0], [0, 0, distance / 20]])

    near, far = line(ensemble.cutoff - 0.01), line(ensemble.cutoff + 0.01)
    wire = Crystal.from_symbols(np.diag([20.0, 20.0, 3.0]), ["Cs"], [[0, 0, 0]])
    assert ensemble.lonely_atoms([near, far, wire] * 100).tolist() == [0, 2, 0] * 100
    assert ensemble.lonely_atoms([]).tolist() == []


def test_the_crystals_without_neighbours_that_were_answered_once(gnome: Gnome, own_folder: Path) -> None:
    case = Path(__file__).resolve().parents[3].parent / "shared" / "cases" / "rough-no-neighbours"
    if not case.exists():
        pytest.skip(f"the inputs that failed once are not here: {case}")
    rows = gnome("predict", *sorted(case.glob("*.cif")), "--json").json
    assert len(rows) == 3
    assert all("no atom has a neighbour" in row["note"] for row in rows)
