"""What all tests share: nothing of the user's own is read or written, and a small world for rounds is built once."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for every process that tests start
if not Path("/dev/nvidia0").exists() or "+cpu" in version("torch"):
    os.environ["TRITON_INTERPRET"] = (
        "1"  # before Triton is imported, by what conftests further down import: its functions read it then
    )


@pytest.fixture(scope="session", autouse=True)
def own_places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Point data folders into a temporary one, and forget the settings of whoever runs the tests."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("GNOME_", "PREFECT_"))]:
            patch.delenv(name)
        patch.setenv("XDG_DATA_HOME", str(home / "share"))
        patch.setenv("PREFECT_HOME", str(home / "prefect"))
        patch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
        patch.setenv("DO_NOT_TRACK", "1")
        yield home


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, where no gnome.toml is."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def emt_world(own_places: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a database with known crystals under EMT and no round; to be copied, not written."""
    from emt_world import build_world

    folder = tmp_path_factory.mktemp("world") / "emt"
    build_world(folder)
    return folder


@pytest.fixture(scope="session")
def after_round(emt_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same world after one round; to be copied, not written."""
    from emt_world import copy_world, round_settings

    from flows.stages import run_round
    from flows.workspace import open_workspace

    folder = tmp_path_factory.mktemp("world") / "after_round"
    with open_workspace(copy_world(emt_world, folder)) as workspace:
        run_round(workspace, round_settings())
    return folder


@pytest.fixture(scope="session")
def emt_data(emt_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a validation set labelled by EMT, in place of the shipped one."""
    from emt_world import copy_world, write_validation

    folder = tmp_path_factory.mktemp("data")
    copy_world(emt_world, folder)
    return write_validation(folder, folder)


def _binary(name: str) -> str | None:
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return shutil.which(name, path=os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")]))


@pytest.fixture(scope="session")
def postgresql_socket() -> Iterator[str]:
    """Folder of the socket of a running server, user `gnome`."""
    import psycopg

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


@pytest.fixture
def postgresql_url(postgresql_socket: str) -> Iterator[str]:
    """An empty database on the PostgreSQL server."""
    import psycopg

    yield f"postgresql://gnome@/postgres?host={postgresql_socket}"
    with psycopg.connect(host=postgresql_socket, user="gnome", dbname="postgres", autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'gnome' AND pid <> pg_backend_pid()"
        )
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
