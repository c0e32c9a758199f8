"""Busy and full databases, damaged files, interruptions and odd surroundings: one clear line each, and nothing is lost."""

import json
import os
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
from cli_runs import DISCOVER, ROOT, Here, count, finish, gnome, one_line, start, wait_until
from emt_world import copy_world, known_crystals, l1_2, tables, write_folder

from flows.cli import main
from flows.prefect_round import settings_parameters
from flows.settings import Settings
from gnome.shipped import shipped_data

pytestmark = pytest.mark.usefixtures("own_folder")


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
    told = re.compile(r"[a-z ]+( \.\.\.|: (stopped at )?\d+ (of \d+ )?[a-z]+( in \d+ s)?)")
    unsure = "The errors of the ensemble's predictions are not known: those deepest below the hull are evaluated."
    assert all(told.fullmatch(line) for line in stages if line not in {"", unsure}), err
    assert [line for line in stages if "stopped" in line] == [stages[-2]], "the stage that was interrupted, and no other"
    assert last == "gnome: interrupted; what was kept is taken up when the same command is run again"
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


def test_sigterm_ends_like_ctrl_c(emt_world: Path, tmp_path: Path) -> None:
    copy_world(emt_world, tmp_path)
    process = start(tmp_path, *DISCOVER, "--budget", "20")
    wait_until(process, lambda: count(tmp_path, "SELECT count(*) FROM evaluations") >= 1)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 130
    assert "interrupted; what was kept" in err


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
