"""The command line as a user types it."""

import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import typer
from emt_world import known_crystals, l1_2, round_settings, write_folder
from typed_commands import Gnome, failed

from flows.__main__ import main as start
from flows.cli import INTERRUPTED, app
from gnome.crystals.crystal import Crystal
from gnome.crystals.formats import ReadCrystal, read_crystals
from gnome.crystals.shards import read_shard
from gnome.crystals.writers import write_crystals

pytestmark = pytest.mark.usefixtures("own_folder")
SMALL = ["--evaluator", "emt", "--candidates", "60", "--screened", "20", "--budget", "4"]


def commands() -> list[tuple[str, ...]]:
    import flows.cli_database
    import flows.cli_ensembles
    import flows.cli_loop
    import flows.cli_models  # noqa: F401 - registers commands

    top = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
    below = []
    for group in app.registered_groups:
        assert isinstance(group.typer_instance, typer.Typer)
        below += [(str(group.name), command.name or "") for command in group.typer_instance.registered_commands]
    return [(name,) for name in top] + below


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
        "models list", "models use", "models promote", "models rollback",
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
    for words in (
        "Round 2: ",
        "Stable means: against the crystals of this method in this database.",
        "formula p",
        "Cost of each stage",
        "Hit rate",
        "gnome query",
        "gnome show ",
        str(database),
    ):
        assert words in done.out
    assert "proposing" not in done.out, "bars are for terminals"
    lines = done.out.splitlines()
    assert re.search(r"\d hits? in 4 evaluations", lines[0]), "what it is worth stands first"
    assert lines[1].startswith("Stable means: ")


def test_discover_answers_in_json(gnome: Gnome, database: Path) -> None:
    answer = gnome("discover", *SMALL, "--seed", "3", "--elements", "Cu,Au,Ni", "--json").json
    assert (answer["round"], answer["summary"]["n_evaluated"]) == (2, 4)
    for row in answer["discoveries"]:
        assert row["round"] == 2
        assert row["parent_formula"]
        assert row["group"] in {"hit", "near the hull", "doubtful", "other"}
        assert row["is_hit"] == (row["id"] in answer["summary"]["hits"])
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


def test_an_evaluation_that_answers_nothing_fails(gnome: Gnome, database: Path, own_folder: Path) -> None:
    uranium = Crystal.from_symbols(4.0 * np.eye(3), ["U"], [[0, 0, 0]])
    write_crystals(Path("alien.cif"), [ReadCrystal(label="alien", crystal=uranium, fields={})])
    done = gnome("evaluate", "alien.cif", "--json")
    assert done.code == 1
    assert json.loads(done.out)[0]["refused"].startswith("unsupported_element")


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
    assert "24 crystals, 1 round" in findings["database"]["found"]
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
        (["discover", "--elements", ","], ["--elements ','", "as in Li-Fe-O"]),
        (["discover", "--elements", "Li-Li"], ["--elements 'Li-Li'", "comes twice"]),
        (["discover", "--elements", "Li--O"], ["--elements 'Li--O'", "as in Li-Fe-O"]),
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


@pytest.mark.parametrize("loaded", [False, True])
def test_an_interrupted_start_is_one_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *, loaded: bool
) -> None:
    class Interrupted(ModuleType):
        def __getattr__(self, name: str) -> object:
            raise KeyboardInterrupt

    def interrupted() -> None:
        raise KeyboardInterrupt

    if loaded:
        monkeypatch.setattr("flows.cli.main", interrupted)
    else:
        monkeypatch.setitem(sys.modules, "flows.cli", Interrupted("flows.cli"))
    with pytest.raises(SystemExit) as ended:
        start()
    assert ended.value.code == INTERRUPTED
    assert capfd.readouterr().err.strip() == "gnome: interrupted before it began"


def test_known_crystals_are_distinct() -> None:
    """The small world would test little if its crystals were duplicates of each other."""
    known = known_crystals()
    assert len({(crystal.reduced_formula, name.endswith("B2")) for name, crystal in known.items()}) == len(known) == 18
