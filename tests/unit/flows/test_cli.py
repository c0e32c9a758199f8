"""The command line as a user types it."""

import csv
import gzip
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from emt_world import copy_world, known_crystals, l1_2, round_settings, write_folder

from flows import known_phases
from flows.cli import app, main
from flows.hull_table import read_hull
from gnome.crystals.crystal import Crystal
from gnome.crystals.formats import ReadCrystal, read_crystals
from gnome.crystals.shards import read_shard
from gnome.shipped import shipped_data
from pipelines.screening import EnsembleEnergies

pytestmark = pytest.mark.usefixtures("own_folder")
SMALL = ["--evaluator", "emt", "--candidates", "60", "--screened", "20", "--budget", "4"]


class Outcome:
    """Exit code, and what was written."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


@pytest.fixture
def gnome(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run the program in this process."""

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        code = ended.value.code
        return Outcome(code if isinstance(code, int) else int(code is not None), captured.out, captured.err)

    return run


Gnome = Callable[..., Outcome]


@pytest.fixture
def database(after_round: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of a database of its own that one round was run on, named by the environment."""
    folder = tmp_path / "database"
    settings = copy_world(after_round, folder)
    monkeypatch.setenv("GNOME_DATABASE_URL", settings.database_url)
    monkeypatch.setenv("GNOME_EVALUATOR", "emt")
    monkeypatch.setenv("GNOME_WORKERS", "1")
    return folder


def failed(outcome: Outcome, code: int, *words: str) -> None:
    """Check that a command failed with one line on stderr, and nothing else."""
    assert outcome.code == code, outcome.err + outcome.out
    assert outcome.out == ""
    assert outcome.err.startswith("gnome: ")
    assert outcome.err.count("\n") == 1, outcome.err
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in outcome.err


def commands() -> list[tuple[str, ...]]:
    import flows.cli_database
    import flows.cli_loop
    import flows.cli_models  # noqa: F401 - registers commands

    top = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
    (campaign,) = app.registered_groups
    assert isinstance(campaign.typer_instance, typer.Typer)
    below = [command.name or "" for command in campaign.typer_instance.registered_commands]
    return [(name,) for name in top] + [("campaign", name) for name in below]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_has_a_help_with_an_example(gnome: Gnome, command: tuple[str, ...]) -> None:
    shown = gnome(*command, "--help")
    assert shown.code == 0
    text = " ".join(shown.out.split())
    assert f"gnome {' '.join(command)}" in text.split("[OPTIONS]", 1)[1]


def test_the_commands_are_those_of_the_design() -> None:
    assert {" ".join(command) for command in commands()} == {
        "discover", "query", "show", "import", "export", "predict", "evaluate", "train", "doctor",
        "campaign run", "campaign schedule", "campaign status", "campaign resume", "campaign abandon",
    }  # fmt: skip


def test_query_answers_in_every_format(gnome: Gnome, database: Path) -> None:
    where = 'elements HAS ALL "Cu","Au" AND nelements=2'
    rows = gnome("query", where, "--format", "json").json
    assert {row["reduced_formula"] for row in rows} >= {"CuAu", "Cu3Au", "CuAu3"}
    assert [row["e_above_hull"] for row in rows] == sorted(row["e_above_hull"] for row in rows)
    table = gnome("query", where)
    assert f"{len(rows)} of {len(rows)} crystals" in table.out
    assert all(row["id"] in table.out for row in rows)
    listed = list(csv.DictReader(io.StringIO(gnome("query", where, "--format", "csv").out)))
    assert [row["id"] for row in listed] == [row["id"] for row in rows]
    assert float(listed[0]["e_form_per_atom"]) == rows[0]["e_form_per_atom"]
    for form in ("cif", "extxyz"):
        path = database / f"found.{form}"
        path.write_text(gnome("query", where, "--format", form).out)
        items = list(read_crystals(path))
        assert all(isinstance(item, ReadCrystal) for item in items)
        assert sorted(item.crystal.reduced_formula for item in items if isinstance(item, ReadCrystal)) == sorted(
            row["reduced_formula"] for row in rows
        )


def test_query_sorts_and_limits(gnome: Gnome, database: Path) -> None:
    shown = gnome("query", "--sort", "-_gnome_e_form_per_atom", "--limit", "3", "--format", "json")
    energies = [row["e_form_per_atom"] for row in shown.json]
    assert len(energies) == 3
    assert energies == sorted(energies, reverse=True)
    assert shown.err == "gnome: 3 of 24 crystals shown; raise --limit for more\n"


def test_query_loads_neither_networks_nor_prefect(database: Path) -> None:
    program = (
        "import sys\nfrom flows.cli import main\n"
        "try: main(['query', 'elements HAS \"Cu\"', '--format', 'json'])\n"
        "except SystemExit as end: assert not end.code\n"
        "sys.stderr.write(' '.join(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stdout)
    loaded = set(done.stderr.split())
    assert "sqlalchemy" in loaded
    assert not loaded & {"torch", "pymatgen", "prefect", "ase", "chgnet", "scipy"}


def test_show_traces_a_crystal_to_what_it_was_made_from(gnome: Gnome, database: Path) -> None:
    (row, *_) = gnome("query", "_gnome_round = 1", "--format", "json").json
    shown = gnome("show", row["id"], "--lineage", "--json").json
    assert shown["id"] == row["id"]
    assert Crystal.from_dict(shown["structure"]).reduced_formula == row["reduced_formula"]
    first, last = shown["lineage"]
    assert first["made_by"]["parent"] == last["id"]
    assert last["origin"] == "imported"
    text = gnome("show", row["id"], "--lineage")
    assert text.code == 0
    assert f"from {last['reduced_formula']} {last['id']} (imported)" in text.out
    assert "lineage" not in gnome("show", row["id"], "--json").json


def test_export_writes_what_import_reads(gnome: Gnome, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crystals = gnome("query", "--format", "json").json
    assert gnome("export", "all.parquet").out == "24 crystals written to all.parquet\n"
    written, columns, _ = read_shard(Path("all.parquet"))
    assert sorted(columns["id"]) == sorted(row["id"] for row in crystals)
    assert len(written) == 24
    gnome("export", "near.json", "--filter", "_gnome_e_above_hull < 0.01")
    near = [row for row in crystals if row["e_above_hull"] < 0.01]
    assert len(json.loads(Path("near.json").read_text())) == len(near)
    assert gnome("export", "cifs", "--filter", "nelements = 1").code == 0
    assert len(list(Path("cifs").glob("*.cif"))) == 7
    for name in ("all.csv", "all.extxyz"):
        assert gnome("export", name).code == 0
        assert len(list(read_crystals(Path(name)))) == 24
    monkeypatch.setenv("GNOME_DATABASE_URL", f"sqlite:///{database}/second.db")
    done = gnome("import", "all.parquet", "--method", "emt-again", "--json").json
    assert (done["imported"], done["refused"], done["method"]) == (24, [], done["method"])
    second = {row["id"]: row for row in gnome("query", "--format", "json").json}
    for row in crystals:
        assert second[row["id"]]["e_above_hull"] == pytest.approx(row["e_above_hull"], abs=2e-3), "same energies, same hull"
    assert gnome("import", "all.parquet", "--method", "emt-again", "--json").json["known"] == 24


def test_discover_ends_with_a_table_and_what_to_try_next(gnome: Gnome, database: Path) -> None:
    done = gnome("discover", *SMALL)
    assert done.code == 0, done.err
    for words in ("New crystals of round 2", "Cost of each stage", "Hit rate", "gnome query", "gnome show ", str(database)):
        assert words in done.out
    assert "proposing" not in done.out, "bars are for terminals"


def test_discover_answers_in_json(gnome: Gnome, database: Path) -> None:
    answer = gnome("discover", *SMALL, "--seed", "3", "--elements", "Cu,Au,Ni", "--json").json
    assert (answer["round"], answer["summary"]["n_evaluated"]) == (2, 4)
    for row in answer["discoveries"]:
        assert row["round"] == 2
        assert row["parent_formula"]
    rows = gnome("campaign", "status", "--json").json
    assert [(row["round"], row["state"]) for row in rows] == [(1, "finished"), (2, "finished")]
    assert rows[1]["hit_rate"] == answer["summary"]["hit_rate"]
    status = gnome("campaign", "status").out
    assert "finished" in status
    assert f"{rows[0]['hit_rate']:.0%}" in status


def test_campaign_runs_without_prefect(gnome: Gnome, database: Path) -> None:
    rows = gnome("campaign", "run", "--plain", "--rounds", "1", *SMALL, "--json").json
    assert [row["state"] for row in rows] == ["finished"] * 2
    assert gnome("campaign", "resume", "--plain", "--json").json == rows


def test_a_round_that_was_given_up_makes_room_for_the_next(gnome: Gnome, database: Path) -> None:
    from flows.settings import Settings
    from flows.stages import begin_round
    from flows.workspace import open_workspace

    failed(gnome("campaign", "abandon"), 2, "has no unfinished round")
    with open_workspace(Settings(), evaluator="emt") as workspace:
        begin_round(workspace, round_settings())
    Path("late.csv").write_text("cif\n")
    failed(gnome("import", "late.csv"), 1, "round 2 is unfinished", "gnome campaign abandon")
    assert gnome("campaign", "abandon").out == "Round 2 is given up; 0 new crystals of it are kept.\n"
    assert [row["state"] for row in gnome("campaign", "status", "--json").json] == ["finished", "failed"]
    assert gnome("campaign", "status").code == 0
    assert gnome("discover", *SMALL, "--json").json["round"] == 3


def test_brackets_in_names_are_shown_as_they_are(gnome: Gnome, own_folder: Path) -> None:
    write_folder(own_folder / "runs[old]", {"x": l1_2("Cu", "Au")})
    (own_folder / "odd.json").write_text('[{"entry_id": "x[/b]"}]')
    shown = gnome("predict", "runs[old]", "odd.json")
    assert shown.code == 0
    assert "runs[old]" in shown.out
    assert "x[/b]" in shown.out


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
    (row,) = gnome("predict", write_folder(own_folder / "rn", {"rn": radon}), "--json").json
    assert "Rn" in row["refused"]
    assert row["e_form_per_atom"] is None


@pytest.mark.parametrize(("energy", "spread"), [(float("nan"), 0.0), (-11402.97, 0.1), (-1.0, float("inf"))])
def test_predict_refuses_absurd_energies(
    gnome: Gnome, own_folder: Path, monkeypatch: pytest.MonkeyPatch, energy: float, spread: float
) -> None:
    monkeypatch.setattr(
        "flows.predicting.predict_energies",
        lambda *_: EnsembleEnergies(
            e_form_per_atom=np.array([energy, -0.1]), spread=np.array([spread, 0.01]), volume_scale=np.ones(2)
        ),
    )
    folder = write_folder(own_folder / "in", {"a": l1_2("Au", "Cu"), "b": l1_2("Cu", "Au")})
    absurd, good = gnome("predict", folder, "--json").json
    assert absurd["refused"].startswith("implausible_energy: predicted")
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
    for name in ("a.csv", "b.csv.gz"):
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


def test_evaluate_relaxes_and_leaves_the_database_alone(gnome: Gnome, database: Path, own_folder: Path) -> None:
    before = (database / "gnome.db").read_bytes()
    folder = write_folder(own_folder / "in", {"b": l1_2("Cu", "Au").scaled(1.06), "a": l1_2("Au", "Cu")})
    rows = gnome("evaluate", folder, "--out", "relaxed.extxyz", "--json").json
    assert [row["reduced_formula"] for row in rows] == ["CuAu3", "Cu3Au"]
    assert all(row["converged"] for row in rows)
    relaxed = [item for item in read_crystals(Path("relaxed.extxyz")) if isinstance(item, ReadCrystal)]
    assert [item.fields["energy_per_atom"] for item in relaxed] == [
        pytest.approx(row["energy_per_atom"], abs=1e-8) for row in rows
    ]
    (again,) = gnome("evaluate", "relaxed.extxyz", "--out", "again", "--json").json[:1]
    assert again["energy_per_atom"] == pytest.approx(rows[0]["energy_per_atom"], abs=1e-3)
    assert len(list(Path("again").glob("*.cif"))) == 2
    assert (database / "gnome.db").read_bytes() == before


def test_doctor_says_ok_or_what_to_do(gnome: Gnome, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    findings = {finding["name"]: finding for finding in gnome("doctor", "--json").json}
    assert {"python", "torch", "device", "database", "structural ensemble", "evaluator chgnet", "evaluator emt"} <= set(findings)
    assert all(finding["ok"] for finding in findings.values())
    assert "24 crystals, 1 rounds" in findings["database"]["found"]
    monkeypatch.setenv("GNOME_EVALUATOR", "vsap")
    broken = gnome("doctor")
    assert broken.code == 1
    assert "vsap" in broken.out
    assert "choose another with GNOME_EVALUATOR" in broken.out


def test_a_toml_file_sets_what_the_environment_does_not(gnome: Gnome, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"sqlite:///{database}/gnome.db"
    monkeypatch.delenv("GNOME_DATABASE_URL")
    failed(gnome("query"), 1, "there is none")
    Path("gnome.toml").write_text(f'database_url = "{url}"\n')
    assert len(gnome("query", "--format", "json").json) == 24
    monkeypatch.setenv("GNOME_DATABASE_URL", f"sqlite:///{database}/absent.db")
    failed(gnome("query"), 1, "absent.db")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["query", 'elements HAS "Cu'], ["filter, position 14"]),
        (["query", "flavour = 3"], ["flavour"]),
        (["query", "--format", "xml"], ["--format 'xml'", "table, json, csv, cif, extxyz"]),
        (["query", "--sort", "flavour"], ["flavour"]),
        (["show", "nosuch"], ["no crystal 'nosuch'"]),
        (["export", "out.json", "--filter", "nelements = 40"], ["no crystal matches", "nothing was written"]),
        (["export", "out.docx"], ["out.docx", ".extxyz"]),
        (["evaluate", "absent.cif", "--out", "out.docx"], ["out.docx", ".extxyz"]),
        (["evaluate", "absent.cif", "--out", "/dev/null"], ["/dev/null"]),
        (["discover", "--generator", "oracle"], ["generator 'oracle'", "structural, compositional, both"]),
        (["discover", "--evaluator", "vsap"], ["no evaluator is called 'vsap'"]),
        (["discover", "--elements", "Cu,Qq"], ["'Qq' is not an element symbol"]),
        (["discover", "--elements", ","], ["--elements ','", "as in Li,O"]),
        (["discover", "--elements", ""], ["--elements ''"]),
        (["discover", "--budget", "0"], ["budget is 0"]),
        (["campaign", "run", "--plain", "--rounds", "0"], ["rounds is 0"]),
        (["campaign", "schedule", "--cron", "whenever"], ["--cron 'whenever'", "five fields"]),
        (["import", "absent"], ["absent: no such file or folder"]),
        (["predict", "absent.cif"], ["absent.cif: no such file or folder"]),
        (["train", "structural", "absent.parquet", "--method", "m"], ["absent.parquet"]),
        (["train", "oracular", "x.parquet", "--method", "m"], ["'oracular'", "structural or compositional"]),
        (["train", "structural", "x.parquet"], ["--method"]),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, list) else "",
)
def test_bad_usage_is_one_line_and_code_2(gnome: Gnome, database: Path, arguments: list[str], words: Sequence[str]) -> None:
    failed(gnome(*arguments), 2, *words)
    assert gnome("campaign", "status", "--json").json[-1]["round"] == 1, "no round was begun"


@pytest.mark.parametrize("arguments", [["nosuch"], ["query", "--nosuch"], ["discover", "--budget", "many"], ["show"], []])
def test_unknown_commands_and_options_are_code_2(gnome: Gnome, arguments: list[str]) -> None:
    done = gnome(*arguments)
    assert done.code == 2
    assert "Usage" in done.err + done.out
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("text", "words"),
    [('workers = "many"\n', ["workers is 'many'"]), ("workers = [\n", ["gnome.toml"]), ("wrokers = 3\n", ["wrokers"])],
)
def test_settings_that_cannot_be_read_are_one_line(gnome: Gnome, text: str, words: list[str]) -> None:
    Path("gnome.toml").write_text(text)
    failed(gnome("query"), 2, *words)
    failed(gnome("doctor"), 2, *words)


@pytest.mark.parametrize("url", ["mysql://x", "sqlite://", "nonsense://", "postgresql://u:secret@host:port/x"])
def test_urls_that_name_no_database_of_ours(gnome: Gnome, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("GNOME_DATABASE_URL", url)
    failed(gnome("query"), 2, "sqlite:///PATH")
    assert "secret" not in gnome("query").err


def test_the_program_itself_ends_with_the_codes_it_promises(database: Path) -> None:
    program = Path(sys.executable).with_name("gnome")
    for arguments, code in ((["query", "nelements = 2", "--limit", "1"], 0), (["query", "nelements ="], 2), (["show", "x"], 2)):
        done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == code
        assert "Traceback" not in done.stderr
        assert done.stderr.count("\n") == (code != 0) or "raise --limit" in done.stderr


def test_known_crystals_are_distinct() -> None:
    """The small world would test little if its crystals were duplicates of each other."""
    known = known_crystals()
    assert len({(crystal.reduced_formula, name.endswith("B2")) for name, crystal in known.items()}) == len(known) == 18
