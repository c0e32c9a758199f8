"""Bad input, busy and full databases, and Ctrl-C, met on the command line: one clear line each, and nothing is lost."""

import csv
import json
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
from emt_world import copy_world, known_crystals, l1_2, tables, write_folder

from flows.cli import main
from flows.prefect_round import settings_parameters
from flows.settings import Settings
from gnome.crystals.crystal import Crystal
from gnome.crystals.formats import ReadCrystal
from gnome.crystals.writers import to_cif, write_crystals
from gnome.shipped import shipped_data

pytestmark = pytest.mark.usefixtures("own_folder")
PROGRAM = [sys.executable, "-m", "flows.cli"]
ROOT = Path(__file__).resolve().parent.parent.parent
DISCOVER = ["discover", "--evaluator", "emt", "--candidates", "60", "--screened", "20"]


def start(folder: Path, *arguments: object, before: Callable[[], object] | None = None) -> "subprocess.Popen[str]":
    """Start the program on a folder's database; Ctrl-C reaches it even where the tests themselves ignore it."""

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if before is not None:
            before()

    environment = os.environ | {
        "GNOME_DATABASE_URL": f"sqlite:///{folder / 'gnome.db'}", "GNOME_EVALUATOR": "emt", "GNOME_WORKERS": "1",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    return subprocess.Popen(
        [*PROGRAM, *map(str, arguments)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=prepare,  # noqa: PLW1509 - these tests start no threads
    )  # fmt: skip


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=150)
    finally:
        process.kill()
    return process.returncode, out, err


def gnome(folder: Path, *arguments: object, before: Callable[[], object] | None = None) -> tuple[int, str, str]:
    return finish(start(folder, *arguments, before=before))


Here = Callable[..., tuple[int, str, str]]


@pytest.fixture
def here(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Here:
    """Run the program in this process, on a folder's database."""

    def run(folder: Path, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setenv("GNOME_DATABASE_URL", f"sqlite:///{folder / 'gnome.db'}")
        monkeypatch.setenv("GNOME_EVALUATOR", "emt")
        monkeypatch.setenv("GNOME_WORKERS", "1")
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def one_line(err: str) -> str:
    assert err.strip().startswith("gnome: "), err
    assert "\n" not in err.strip(), err
    return err


def count(folder: Path, sql: str) -> Any:
    with closing(sqlite3.connect(folder / "gnome.db", timeout=30)) as connection:
        return connection.execute(sql).fetchone()[0]


def wait_until(process: "subprocess.Popen[str]", true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_ctrl_c_keeps_what_was_answered_and_the_same_command_goes_on(here: Here, emt_world: Path, tmp_path: Path) -> None:
    copy_world(emt_world, tmp_path)
    command = [*DISCOVER, "--budget", "20"]
    process = start(tmp_path, *command)
    wait_until(process, lambda: count(tmp_path, "SELECT count(*) FROM evaluations") >= 2)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert workers
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert (code, out) == (130, "")
    *stages, last = err.strip().splitlines()
    assert all(line.endswith(" ...") for line in stages if line), err
    assert last == "gnome: interrupted; what was answered is kept, run the same command again to go on"
    assert not [worker for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE]
    with closing(sqlite3.connect(tmp_path / "gnome.db")) as connection:
        kept = dict(connection.execute("SELECT candidate_id, created_at FROM evaluations"))
    assert 2 <= len(kept) < 20
    code, out, err = here(tmp_path, *command, "--json")
    assert code == 0, err
    assert "Going on with round 1, which was interrupted" in err
    assert json.loads(out)["summary"]["n_evaluated"] == 20
    with closing(sqlite3.connect(tmp_path / "gnome.db")) as connection:
        finished = dict(connection.execute("SELECT candidate_id, created_at FROM evaluations"))
    assert {identifier: finished[identifier] for identifier in kept} == kept


def test_a_second_round_at_the_same_time_is_told_who_is_at_it(emt_world: Path, tmp_path: Path) -> None:
    copy_world(emt_world, tmp_path)
    first = start(tmp_path, *DISCOVER, "--budget", "6")
    wait_until(first, lambda: bool(count(tmp_path, "SELECT count(*) FROM leases WHERE owner IS NOT NULL")))
    first.send_signal(signal.SIGSTOP)  # so that it is there until the second has given up
    try:
        code, out, err = gnome(tmp_path, *DISCOVER)
    finally:
        first.send_signal(signal.SIGCONT)
    assert code == 1, out
    assert f"by process {first.pid}@" in one_line(err)
    code, _, err = finish(first)
    assert code == 0, err
    assert count(tmp_path, "SELECT group_concat(number || state) FROM rounds") == "1finished"


def test_a_full_disk_costs_one_line_and_no_table(here: Here, emt_world: Path, tmp_path: Path) -> None:
    """Files of this process may not grow beyond the size of the database: its journal hits that while candidates are stored."""
    full, free = tmp_path / "full", tmp_path / "free"
    copy_world(emt_world, full)
    copy_world(emt_world, free)
    limit = 60_000

    command = [*DISCOVER, "--budget", "3", "--json"]
    code, out, err = gnome(full, *command, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert (code, out) == (1, "")
    assert str(full / "gnome.db") in one_line(err)
    assert count(full, "PRAGMA integrity_check") == "ok"
    assert count(full, "SELECT count(*) FROM crystals") == len(known_crystals())
    for folder in (full, free):
        code, _, err = here(folder, *command)
        assert code == 0, err
    assert tables(full) == tables(free)


@pytest.mark.parametrize("command", [["discover"], ["import", "somewhere"], ["query"]], ids=" ".join)
@pytest.mark.parametrize("place", ["a folder", "not a database", "below a file", "where nothing can be made"])
def test_a_database_that_cannot_be_used_is_named(here: Here, tmp_path: Path, command: list[str], place: str) -> None:
    if place == "a folder":
        folder = tmp_path
        (folder / "gnome.db").mkdir()
    elif place == "not a database":
        folder = tmp_path
        (folder / "gnome.db").write_text("dear diary, " * 1000)
    elif place == "below a file":
        folder = tmp_path / "file"
        folder.write_text("")
    else:
        folder = Path("/proc/self")
    code, out, err = here(folder, *command)
    assert (code, out) == (1, "")
    assert str(folder / "gnome.db") in one_line(err)
    if place == "not a database":
        assert (folder / "gnome.db").read_text() == "dear diary, " * 1000


def ensemble(folder: Path) -> Path:
    for suffix in (".safetensors", ".json"):
        shutil.copy(shipped_data() / "ensembles" / f"structural{suffix}", folder / f"mine{suffix}")
    return folder / "mine.safetensors"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100_000])


def alter(path: Path) -> None:
    blob = bytearray(path.read_bytes())
    blob[-1000] ^= 1
    path.write_bytes(bytes(blob))


def lose_card(path: Path) -> None:
    path.with_suffix(".json").unlink()


def pickle_instead(path: Path) -> None:
    import hashlib
    import pickle

    path.write_bytes(pickle.dumps({"0.weight": [1.0]}))
    card = json.loads(path.with_suffix(".json").read_text())
    card["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".json").write_text(json.dumps(card))


@pytest.mark.parametrize("harm", [cut, alter, lose_card, pickle_instead], ids=lambda harm: harm.__name__)
def test_weights_that_are_not_what_their_card_says_are_never_used(
    here: Here, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    weights = ensemble(tmp_path)
    known = write_folder(tmp_path / "in", {"Cu3Au": l1_2("Au", "Cu")})
    harm(weights)
    code, out, err = here(tmp_path, "predict", known, "--model", weights, "--json")
    assert (code, out) == (1, "")
    assert "mine." in one_line(err)


ELEMENTS = {symbol: crystal for symbol, crystal in known_crystals().items() if crystal.n_atoms == 1}


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


@pytest.fixture(scope="module")
def good_element(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    item = ReadCrystal(label="Cu", crystal=ELEMENTS["Cu"], fields={"energy_per_atom": 0.0})
    write_crystals(folder / "Cu.extxyz", [item])
    return folder


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
    assert code == 0, err
    (row,) = json.loads(out)
    assert name in row["input"]
    assert row["refused"]
    assert "e_form_per_atom" not in row


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
    report = tmp_path / "no" / "such" / "folder.txt"
    code, out, err = here(tmp_path, "import", good_element, "--method", "table", "--report", report)
    assert (code, out) == (2, "")
    assert str(report) in one_line(err)
    assert not (tmp_path / "gnome.db").exists()


def test_a_file_that_cannot_be_written_is_named_as_it_was_asked_for(here: Here, emt_world: Path, tmp_path: Path) -> None:
    copy_world(emt_world, tmp_path)
    (tmp_path / "file").write_text("")
    code, out, err = here(tmp_path, "export", tmp_path / "file" / "out.csv")
    assert (code, out) == (2, "")
    assert str(tmp_path / "file") in one_line(err)
    for name in ("", "."):
        code, out, err = here(tmp_path, "export", name)
        assert (code, out) == (2, "")
        assert "no format is called 'nothing'" in one_line(err)


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
    assert "none of 1 crystals comes with one" in one_line(err)


def test_a_report_does_not_replace_what_is_imported(here: Here, good_element: Path, tmp_path: Path) -> None:
    shutil.copytree(good_element, tmp_path / "in")
    before = (tmp_path / "in" / "Cu.extxyz").read_text()
    for report in (tmp_path / "in" / "Cu.extxyz", tmp_path / "in" / "report.txt"):
        code, out, err = here(tmp_path, "import", tmp_path / "in", "--method", "table", "--report", report)
        assert (code, out) == (2, "")
        assert "would stand among what is imported" in one_line(err)
    assert (tmp_path / "in" / "Cu.extxyz").read_text() == before


def test_sigterm_ends_like_ctrl_c(emt_world: Path, tmp_path: Path) -> None:
    copy_world(emt_world, tmp_path)
    process = start(tmp_path, *DISCOVER, "--budget", "20")
    wait_until(process, lambda: count(tmp_path, "SELECT count(*) FROM evaluations") >= 1)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 130
    assert "interrupted; what was answered is kept" in err


def test_secrets_are_not_shown(
    here: Here, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("gnome.toml").write_text('database_uri = "postgresql://u:SECRET@h/db"\n')
    _, _, err = here(tmp_path, "query")
    assert "database_uri" in one_line(err)
    assert "SECRET" not in err
    Path("gnome.toml").unlink()
    for url in ("postgresql://u:SEC/RET@h:port/db", "postgresql://u@127.0.0.1:1/db?password=SECRET"):
        monkeypatch.setenv("GNOME_DATABASE_URL", url)
        with pytest.raises(SystemExit):
            main(["query"])
        err = capfd.readouterr().err
        assert "SECRET" not in err
        assert "RET" not in err
        plain = settings_parameters(Settings(database_url="postgresql://u@127.0.0.1:1/db?password=SECRET"))
        assert "database_url" not in plain


def test_bytes_that_are_no_text_cost_one_line(here: Here, emt_world: Path, tmp_path: Path) -> None:
    copy_world(emt_world, tmp_path)
    for command in (["show", "\udcff"], ["query", 'reduced_formula = "\udcff"']):
        code, out, err = here(tmp_path, *command)
        assert (code, out) == (2, "")
        one_line(err)
    Path("gnome.toml").write_bytes(b'evaluator = "\xff"\n')
    code, out, err = here(tmp_path, "query")
    assert (code, out) == (2, "")
    assert "not UTF-8" in one_line(err)


def test_a_variable_that_is_nearly_a_setting_is_refused_and_a_foreign_one_is_not(
    here: Here, emt_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_world(emt_world, tmp_path)
    monkeypatch.setenv("GNOME_TERMINAL_SCREEN", "/org/gnome/Terminal")
    assert here(tmp_path, "query")[0] == 0
    monkeypatch.setenv("GNOME_DATABSE_URL", "sqlite:///other.db")
    code, out, err = here(tmp_path, "query")
    assert (code, out) == (2, "")
    assert "GNOME_DATABSE_URL is no setting; did you mean GNOME_DATABASE_URL?" in one_line(err)


def test_a_closed_output_is_one_line_and_leaves_the_database_alone(emt_world: Path, tmp_path: Path) -> None:
    copy_world(emt_world, tmp_path)
    environment = os.environ | {"GNOME_DATABASE_URL": f"sqlite:///{tmp_path / 'gnome.db'}", "PYTHONPATH": str(ROOT)}
    command = f"{sys.executable} -m flows.cli query >&-"
    done = subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "standard output is closed" in one_line(done.stderr)


@pytest.mark.parametrize("command", ["run", "resume"])
def test_a_campaign_says_what_is_wrong_before_prefect_starts(here: Here, tmp_path: Path, command: str) -> None:
    (tmp_path / "gnome.db").write_text("dear diary, " * 1000)
    code, out, err = here(tmp_path, "campaign", command)
    assert (code, out) == (1, "")
    assert "the file is something else" in one_line(err)
    (tmp_path / "gnome.db").unlink()
    if command == "resume":
        code, out, err = here(tmp_path, "campaign", command)
        assert (code, out) == (2, "")
        assert "has no round; start with `gnome campaign run`" in one_line(err)
