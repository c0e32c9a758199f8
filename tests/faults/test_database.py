"""What becomes of a database when a process is killed, the disk fills up or a file is not what it should be."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import event

from gnome.crystals.crystal import Crystal
from gnome.database.leases import hold_round
from gnome.database.ledger import Ledger
from gnome.database.records import CrystalRecord
from gnome.database.store import Store
from gnome.errors import DatabaseUnavailable, RoundBusy
from gnome.stability.method import Method

METHOD = Method(code="chgnet", functional="0.3.0")


def seed(edge: float) -> CrystalRecord:
    crystal = Crystal.from_symbols(np.eye(3) * edge, ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    return CrystalRecord(crystal=crystal, method=METHOD, e_form_per_atom=-2.0, fingerprint=f"{edge}", origin="seed")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with Store.open(str(tmp_path / "gnome.db")) as store:
        store.add_crystals([seed(4.0)])
    return tmp_path / "gnome.db"


def start(script: str, *arguments: str) -> subprocess.Popen[str]:
    """Run Python until it has printed a line."""
    process = subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    assert process.stdout is not None
    process.stdout.close()


IN_A_WRITE = """
import sys, time
from sqlalchemy import text
from gnome.database.store import Store
store = Store.open(sys.argv[1])
with store.write() as connection:
    connection.execute(text("PRAGMA cache_size = 5"))  # pages go to the log before the commit
    for i in range(2000):
        connection.execute(text("INSERT INTO methods (label, definition) VALUES (:label, :definition)"),
                           {"label": f"half written {i}", "definition": '"' + "x" * 2000 + '"'})
    print("ready", flush=True)
    time.sleep(600)
"""


def test_kill_inside_a_write_loses_that_write_only_and_stops_nobody(path: Path) -> None:
    writer = start(IN_A_WRITE, str(path))
    with Store.open(str(path), read_only=True) as reader:  # readers do not wait for it
        assert reader.counts()["crystals"] == 1
        assert list(reader.methods()) == [METHOD.label]
    assert path.with_name("gnome.db-wal").stat().st_size > 1_000_000
    kill(writer)
    began = time.monotonic()
    with Store.open(str(path)) as store:
        assert store.add_crystals([seed(4.0), seed(4.1)]) == 1
        assert list(store.methods()) == [METHOD.label]
        assert store.counts()["crystals"] == 2
    assert time.monotonic() - began < 20  # less than any time-out: nothing was waited for
    with sqlite3.connect(path) as raw:
        assert raw.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    raw.close()


IN_A_ROUND = """
import sys, time
from gnome.database.leases import hold_round
from gnome.database.ledger import Ledger
from gnome.database.store import Store
store = Store.open(sys.argv[1])
with hold_round(store, lease_seconds=3600):
    store.start_round({}, 1)
    ledger = Ledger(store)
    ledger.complete(1, "generate", 0, ledger.claim(1, "generate"), {"n": 5})
    ledger.claim(1, "screen", lease_seconds=3600)
    print("ready", flush=True)
    time.sleep(600)
"""


def test_a_second_process_is_refused_while_a_round_runs_and_goes_on_once_it_is_killed(path: Path) -> None:
    first = start(IN_A_ROUND, str(path))
    with Store.open(str(path)) as store:
        with pytest.raises(RoundBusy, match=f"by process {first.pid}@"), hold_round(store):
            pytest.fail("two rounds at once")
        assert Ledger(store).claim(1, "screen") is None
        kill(first)
        with hold_round(store):
            opened = store.open_round()
            assert opened is not None
            assert opened.number == 1
            ledger = Ledger(store)
            assert ledger.result(1, "generate") == {"n": 5}
            assert ledger.claim(1, "generate") is None
            assert ledger.claim(1, "screen") == 2


def test_a_process_that_was_stopped_and_replaced_cannot_write_any_more(path: Path) -> None:
    script = """
import sys
from gnome.database.leases import acquire_round
from gnome.database.store import Store
from gnome.errors import RoundBusy
store = Store.open(sys.argv[1])
acquire_round(store, lease_seconds=0.5)
print("ready", flush=True)
sys.stdin.readline()
try:
    store.start_round({}, 1)
except RoundBusy as error:
    print(error)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(0.8)
    with Store.open(str(path)) as store, hold_round(store):
        os.kill(process.pid, signal.SIGCONT)
        said, _ = process.communicate("go\n", timeout=60)
        assert "has lost the round" in said
        assert store.open_round() is None


def test_a_full_disk_is_one_line_and_loses_nothing(path: Path) -> None:
    with Store.open(str(path)) as store:
        event.listen(store.engine, "connect", lambda connection, _: connection.execute("PRAGMA max_page_count = 70"))
        store.engine.dispose()
        with pytest.raises(DatabaseUnavailable) as caught:
            store.add_crystals([seed(4.0 + i / 1000) for i in range(1, 3000)])
    advice = "free some space and run again, nothing that was stored is lost"
    assert str(caught.value) == f"database {path}: database or disk is full; {advice}"
    with Store.open(str(path)) as store:
        assert store.counts()["crystals"] == 1
        assert store.add_crystals([seed(4.0), seed(4.1)]) == 1


def test_a_path_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for bad in (tmp_path / "file" / "gnome.db", tmp_path, Path("/proc/gnome.db"), Path("/proc/sub/gnome.db")):
        with pytest.raises(DatabaseUnavailable, match=str(bad)) as caught:
            Store.open(str(bad))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"this is a letter, not a database" * 100, b"SQLite format 3\x00" + b"\xff" * 4000])
def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "gnome.db"
    path.write_bytes(content)
    for read_only in (True, False):
        with pytest.raises(DatabaseUnavailable, match=str(path)) as caught:
            Store.open(str(path), read_only=read_only)
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == content


def test_a_truncated_database_is_one_line(path: Path) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size // 2)
    with pytest.raises(DatabaseUnavailable, match=str(path)), Store.open(str(path)) as store:
        store.add_crystals([seed(4.0 + i / 1000) for i in range(1, 50)])
