import multiprocessing
import os
import sqlite3
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from database_rows import CHGNET, seed
from sqlalchemy import create_engine, inspect, text

from gnome.database.engine import open_engine, to_json
from gnome.database.schema import HEAD, metadata
from gnome.database.store import Store
from gnome.database.upgrade import MIGRATIONS, upgrade
from gnome.errors import DatabaseUnavailable, InvalidInput


def test_tables_and_migrations_agree(store: Store) -> None:
    with store.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), metadata) == []


def test_constraints_of_tables_and_migrations_agree(tmp_path: Path) -> None:
    # Alembic does not compare CHECK constraints and index conditions; SQLite keeps their text.
    with Store.open(str(tmp_path / "migrated.db")) as store, store.read() as connection:
        migrated = _described(connection)
    plain = create_engine(f"sqlite:///{tmp_path / 'created.db'}")
    metadata.create_all(plain)
    with plain.connect() as connection:
        created = _described(connection)
    plain.dispose()
    assert migrated == created
    assert len(migrated["crystals"]["checks"]) == 13
    assert migrated["crystal_elements"]["without_rowid"]


def _described(connection):
    found = inspect(connection)
    described = {}
    for table in metadata.tables:
        sql = connection.execute(text("SELECT sql FROM sqlite_master WHERE name = :name"), {"name": table}).scalar_one()
        described[table] = {
            "checks": {check["name"]: " ".join(check["sqltext"].split()) for check in found.get_check_constraints(table)},
            "foreign": {
                key["name"]: (key["constrained_columns"], key["referred_columns"], key["options"])
                for key in found.get_foreign_keys(table)
            },
            "indexes": {index["name"]: str(index["dialect_options"].get("sqlite_where")) for index in found.get_indexes(table)},
            "without_rowid": "WITHOUT ROWID" in sql,
        }
    return described


def test_an_older_database_is_brought_up_to_date_with_its_rows(url: str) -> None:
    engine = open_engine(url)
    upgrade(engine, "0001")
    with engine.begin() as connection:
        connection.execute(
            text('INSERT INTO methods (label, definition) VALUES (\'chgnet-old\', \'{"code": "chgnet", "functional": "0"}\')')
        )
        connection.execute(
            text(
                "INSERT INTO crystals (id, method, reduced_formula, chemical_formula_reduced, chemical_formula_anonymous, chemical_system, "
                "n_elements, n_atoms, volume_per_atom, fingerprint, structure, correction_per_atom, correction_scheme, correction_version, "
                "e_form_per_atom, origin, source, created_at) VALUES ('old', 'chgnet-old', 'Na', 'Na', 'A', 'Na', 1, 1, 30, 'f', "
                "'{\"lattice\": [[3,0,0],[0,3,0],[0,0,3]], \"atomic_numbers\": [11], \"frac_coords\": [[0,0,0]]}', 0, '', '', "
                "0, 'seed', '', 1)"
            )
        )
    engine.dispose()
    with pytest.raises(DatabaseUnavailable, match="form 0001 of an older version"):
        Store.open(url, read_only=True)
    with Store.open(url) as store:
        assert store.crystal("old").row["versions"] is None
        assert store.crystal("old").crystal.symbols == ["Na"]
        assert store.add_crystals([seed()]) == 1
    with Store.open(url, read_only=True) as store:
        assert store.counts()["crystals"] == 2


def test_models_of_an_older_database_were_in_use_where_something_says_so(url: str) -> None:
    engine = open_engine(url)
    upgrade(engine, "0004")
    rows = (("ship", "NULL", "retired", "shipped:s"), ("old", "'ship'", "retired", "/o"), ("now", "'old'", "promoted", "/n"))
    rows += (("worse", "'now'", "retired", "/w"), ("new", "NULL", "candidate", "shipped:t"))
    with engine.begin() as connection:
        for moment, (name, parent, status, path) in enumerate(rows, start=1):
            connection.execute(
                text(
                    "INSERT INTO models (id, kind, parent_id, status, path, sha256, card, metrics, created_at) "
                    f"VALUES ('{name}', 'structural', {parent}, '{status}', '{path}', '{name}', '{{}}', '{{}}', {moment})"
                )
            )
    engine.dispose()
    with Store.open(url) as store:
        since = {model.id: model.promoted_at for model in store.model_history()}
        assert since == {"ship": 1, "old": 2, "now": 3, "worse": None, "new": None}
        assert store.take_back_model("now", "old").id == "old"


def test_a_newer_database_is_refused(url: str) -> None:
    with Store.open(url) as store, store.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    for read_only in (True, False):
        with pytest.raises(DatabaseUnavailable, match="9999, newer than this program knows"):
            Store.open(url, read_only=read_only)


def test_tables_of_another_program_are_left_alone(url: str) -> None:
    engine = open_engine(url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE systems (id INTEGER)"))
    engine.dispose()
    with pytest.raises(DatabaseUnavailable, match=r"another program \(systems\)"):
        Store.open(url)


def test_every_migration_is_found_from_the_package() -> None:
    names = sorted(path.name for path in (MIGRATIONS / "versions").glob("r*.py"))
    assert names[-1].startswith(f"r{HEAD}_")
    assert (MIGRATIONS / "env.py").is_file()


def test_sqlite_is_set_up_for_many_processes(tmp_path: Path) -> None:
    with Store.open(str(tmp_path / "new" / "folder" / "gnome.db")) as store, store.read() as connection:
        settings = {
            name: connection.execute(text(f"PRAGMA {name}")).scalar() for name in ("journal_mode", "foreign_keys", "synchronous")
        }
    assert settings == {"journal_mode": "wal", "foreign_keys": 1, "synchronous": 1}


def _open_and_close(path: str, barrier) -> None:
    barrier.wait(30)
    Store.open(path).close()


def test_processes_that_open_a_new_database_at_once_make_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    path = str(tmp_path / "gnome.db")
    openers = [context.Process(target=_open_and_close, args=(path, barrier)) for _ in range(3)]
    for opener in openers:
        opener.start()
    for opener in openers:
        opener.join(60)
    assert [opener.exitcode for opener in openers] == [0, 0, 0]
    with Store.open(path, read_only=True) as store:
        assert store.counts()["crystals"] == 0


def test_reading_makes_no_file(tmp_path: Path) -> None:
    with pytest.raises(DatabaseUnavailable, match="there is none; `gnome discover`"):
        Store.open(str(tmp_path / "sub" / "gnome.db"), read_only=True)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty.db").touch()
    with pytest.raises(DatabaseUnavailable, match="the database is empty"):
        Store.open(str(tmp_path / "empty.db"), read_only=True)


def test_a_file_on_a_disk_that_cannot_be_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a b%23?.db"
    with Store.open(str(path)) as store:
        store.add_crystals([seed()])
        assert store.location == str(path)
    assert path.exists()
    monkeypatch.setattr(os, "access", lambda *_: False)
    before = sorted(tmp_path.iterdir())
    with Store.open(str(path), read_only=True) as store:
        assert store.counts()["crystals"] == 1
        assert sorted(tmp_path.iterdir()) == before


def test_network_file_systems_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = [SimpleNamespace(mountpoint="/", fstype="ext4"), SimpleNamespace(mountpoint=str(tmp_path), fstype="nfs4")]
    monkeypatch.setattr(psutil, "disk_partitions", lambda **_: mounts)
    with pytest.raises(DatabaseUnavailable, match=r"network file system \(nfs4\)"):
        Store.open(str(tmp_path / "gnome.db"))
    assert not (tmp_path / "gnome.db").exists()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("mysql://host/db", "'mysql' is not supported"),
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("://", "is no database URL"),
        ("nosuch+thing://x", "is no database URL|is not supported"),
    ],
)
def test_urls_that_name_no_database_of_ours_are_refused(bad: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Store.open(bad)


def test_an_unreachable_server_is_one_line_without_the_password(tmp_path: Path) -> None:
    with pytest.raises(DatabaseUnavailable) as caught:
        Store.open(f"postgresql://someone:secret@/nowhere?host={tmp_path}")
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "connection" in str(caught.value)


def test_json_has_no_word_for_nan() -> None:
    assert to_json({"a": [1.5, float("nan")], "b": (float("inf"), {"c": -1})}) == '{"a": [1.5, null], "b": [null, {"c": -1}]}'


def test_seeds_of_one_method_survive_reopening(tmp_path: Path) -> None:
    path = tmp_path / "gnome.db"
    with Store.open(str(path)) as store:
        store.add_crystals([seed()])
    with sqlite3.connect(path) as raw:
        assert raw.execute("PRAGMA application_id").fetchone() != (0,)
    raw.close()
    with Store.open(f"sqlite:///{path}") as store:
        assert [found.row["method"] for found in store.crystals_of(CHGNET.label)] == [CHGNET.label]
