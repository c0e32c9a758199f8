"""Databases to test on: a SQLite file, and a PostgreSQL server that the tests start for themselves."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from gnome.database.store import Store


def _binary(name: str) -> str | None:
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return shutil.which(name, path=os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")]))


@pytest.fixture(scope="session")
def postgresql_socket() -> Iterator[str]:
    """Folder of the socket of a running server, user `gnome`."""
    initdb, postgres = _binary("initdb"), _binary("postgres")
    if initdb is None or postgres is None:
        pytest.skip("no PostgreSQL server here: initdb and postgres are neither in PATH nor in /usr/lib/postgresql/*/bin")
    folder = Path(tempfile.mkdtemp(prefix="gnome-pg-", dir="/tmp"))  # a socket's path may have 107 characters at most
    as_user: dict[str, Any] = {}
    if os.geteuid() == 0:  # the server refuses to run as root
        shutil.chown(folder, "nobody")
        as_user = {"user": "nobody", "extra_groups": []}
    command = [initdb, "-D", str(folder / "data"), "-U", "gnome", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C"]
    subprocess.run(command, check=True, capture_output=True, cwd=folder, **as_user)
    options = [
        "-c",
        "listen_addresses=",
        "-c",
        f"unix_socket_directories={folder}",
        "-c",
        "fsync=off",
        "-c",
        "max_connections=40",
    ]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([postgres, "-D", str(folder / "data"), *options], stdout=log, stderr=log, cwd=folder, **as_user)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                psycopg.connect(host=str(folder), user="gnome", dbname="postgres").close()
                break
            except psycopg.OperationalError:
                if server.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"PostgreSQL did not start: {(folder / 'log').read_text()[-2000:]}")
                time.sleep(0.1)
        yield str(folder)
    finally:
        server.send_signal(signal.SIGQUIT)  # at once, without writing out what is thrown away
        server.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database of each kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'gnome.db'}"
        return
    folder = request.getfixturevalue("postgresql_socket")
    yield f"postgresql://gnome@/postgres?host={folder}"
    with psycopg.connect(host=folder, user="gnome", dbname="postgres", autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'gnome' AND pid <> pg_backend_pid()"
        )
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    with Store.open(url) as opened:
        yield opened
