"""Opening a database: a SQLite file (in WAL mode, on a local disk) or a PostgreSQL server, named by a URL.

Writers of SQLite begin with BEGIN IMMEDIATE, so that two of them queue up instead of failing half way; readers never wait.  A process
that is killed inside a write leaves a journal that the next one rolls back by itself.
"""

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import psutil  # type: ignore[import-untyped]
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DatabaseError,
    DataError,
    IntegrityError,
    InterfaceError,
    NoSuchModuleError,
    OperationalError,
)

from gnome.errors import DatabaseUnavailable, InvalidInput

BUSY_TIMEOUT_SECONDS = 60
WRITES = "gnome_writes"  # execution option that marks a connection about to write

_NETWORK_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs3", "nfs4", "cifs", "smbfs", "smb3", "afs", "ceph", "fuse.ceph", "lustre", "gpfs", "beegfs", "pvfs2", "glusterfs",
     "fuse.glusterfs", "fuse.sshfs", "ncpfs", "davfs", "fuse.s3fs", "fuse.rclone"}
)  # fmt: skip
_APPLICATION_ID = 0x474E6F4D  # "GNoM", in the header of our SQLite files


def open_engine(url: str | URL, *, read_only: bool = False) -> Engine:
    """Make an engine for a database URL; a plain path stands for a SQLite file.

    Raises DatabaseUnavailable when it cannot be reached or must not be used, InvalidInput when the URL is none of ours.
    """
    parsed = _parse(url)
    with one_line_errors(parsed):
        path = sqlite_path(parsed)
        engine = _postgresql_engine(parsed, read_only) if path is None else _sqlite_engine(path, read_only)
        with engine.connect() as connection:
            connection.exec_driver_sql("SELECT 1")
    return engine


@contextmanager
def one_line_errors(url: URL) -> Iterator[None]:
    """Turn what the database driver raises into this project's errors, one line each."""
    name = readable_url(url)
    try:
        yield
    except IntegrityError as error:
        raise InvalidInput(f"the database refuses the row: {_first_line(error)}") from error
    except DataError as error:
        raise InvalidInput(f"the database cannot hold the value: {_first_line(error)}") from error
    except json.JSONDecodeError as error:  # somebody else has written into a column of ours
        raise DatabaseUnavailable(f"database {name}: holds a row that cannot be read ({error}); restore a copy") from error
    except (OperationalError, InterfaceError, DatabaseError) as error:
        raise DatabaseUnavailable(f"database {name}: {_first_line(error)}{_advice(_first_line(error))}") from error


def readable_url(url: URL) -> str:
    """Name a database for people: its file, or its URL without password."""
    if url.get_backend_name() == "sqlite":
        database = str(url.database)
        return unquote(database.removeprefix("file://").split("?")[0]) if database.startswith("file:") else database
    return url.difference_update_query(["password"]).render_as_string(hide_password=True)


def database_exists(url: str) -> bool:
    """Say whether there is a database; False for a SQLite file that was not made yet, True for a server, whatever it holds."""
    path = sqlite_path(url)
    return path is None or path.exists()


def sqlite_path(url: str | URL) -> Path | None:
    """Find the file of a SQLite database; None for a server.  Raises InvalidInput when the URL is none of ours."""
    parsed = _parse(url)
    if parsed.get_backend_name() != "sqlite":
        return None
    try:
        path = Path(str(parsed.database)).expanduser().absolute()
    except RuntimeError:
        raise InvalidInput(f"database {parsed.database}: there is no such user") from None
    if "\0" in str(path) or not path.name:
        raise InvalidInput(f"{str(path)!r} is no name for a database file")
    return path


def has_password(url: str) -> bool:
    """Say whether a database URL holds a password, before the host or among its options."""
    if "://" not in url:
        return False
    parsed = _parse(url)
    return parsed.password is not None or "password" in parsed.query


def _first_line(error: DatabaseError | InterfaceError) -> str:
    lines = str(error.orig).strip().splitlines()
    return lines[0] if lines else type(error.orig).__name__


def _advice(message: str) -> str:
    advice = {
        "disk is full": "; free some space and run again, nothing that was stored is lost",
        "disk I/O error": "; the disk may be full or failing",
        "readonly database": "; make the file and its folder writable",
        "unable to open": "; check that the folder exists and is writable",
        "not a database": "; the file is something else, name another with GNOME_DATABASE_URL",
        "malformed": "; the file is damaged, restore a copy",
        "lock timeout": f"; another process has been writing for {BUSY_TIMEOUT_SECONDS} s",
        "locked": f"; another process has been writing for {BUSY_TIMEOUT_SECONDS} s",
    }
    return next((text for symptom, text in advice.items() if symptom in message), "")


def _parse(url: str | URL) -> URL:
    if isinstance(url, str) and "://" not in url:
        url = URL.create("sqlite", database=url)
    try:
        parsed = make_url(url)
        backend = parsed.get_backend_name()
    except (ArgumentError, NoSuchModuleError, ValueError):
        shown = re.sub(r"//.*@|password=[^&]*", "...", str(url))  # there may be a password in it
        raise InvalidInput(f"{shown!r} is no database URL; expected sqlite:///PATH or postgresql://USER@HOST/NAME") from None
    if backend == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise InvalidInput(f"database {backend!r} is not supported; expected sqlite:///PATH or postgresql://USER@HOST/NAME")
    if parsed.database in {None, "", ":memory:"}:
        raise InvalidInput("a database in memory is lost with the process; expected sqlite:///PATH")
    return parsed


def _sqlite_engine(path: Path, read_only: bool) -> Engine:
    _refuse_network_file_system(path)
    if path.is_dir():
        raise DatabaseUnavailable(f"database {path}: is a folder, expected a file")
    options = ""
    if read_only:
        if not path.exists():
            raise DatabaseUnavailable(f"database {path}: there is none; `gnome discover` or `gnome import` makes it")
        # Reading a WAL file needs a shared-memory file beside it, unless nobody can be writing.
        frozen = not os.access(path.parent, os.W_OK) and not path.with_name(path.name + "-wal").exists()
        options = "?mode=ro" + ("&immutable=1" if frozen else "")
    else:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DatabaseUnavailable(f"database {path}: the folder cannot be made ({error.strerror})") from None
    engine = create_engine(
        URL.create("sqlite", database=path.as_uri() + options, query={"uri": "true"}),
        connect_args={"timeout": BUSY_TIMEOUT_SECONDS, "check_same_thread": False},
        json_serializer=to_json,
    )

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # transactions begin where we say so, see `begin`
        cursor = connection.cursor()
        cursor.execute("PRAGMA foreign_keys=ON")
        if read_only:
            cursor.execute("PRAGMA query_only=ON")
        else:
            if cursor.execute("PRAGMA journal_mode").fetchone() != ("wal",):
                cursor.execute("PRAGMA journal_mode=WAL")
            cursor.execute("PRAGMA synchronous=NORMAL")
            if cursor.execute("PRAGMA application_id").fetchone() == (0,):
                cursor.execute(f"PRAGMA application_id={_APPLICATION_ID}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get(WRITES) else "BEGIN")

    return engine


def _postgresql_engine(url: URL, read_only: bool) -> Engine:
    options = f"-c lock_timeout={BUSY_TIMEOUT_SECONDS}s"
    if read_only:
        options += " -c default_transaction_read_only=on"
    arguments = {"connect_timeout": 10, "application_name": "gnome", "options": options}
    try:
        return create_engine(url, connect_args=arguments, pool_pre_ping=True, json_serializer=to_json)
    except ModuleNotFoundError:
        raise DatabaseUnavailable("PostgreSQL needs the psycopg driver; install gnome-discovery[postgres]") from None


def _refuse_network_file_system(path: Path) -> None:
    mounts = [(Path(part.mountpoint), part.fstype) for part in psutil.disk_partitions(all=True)]
    above = [(len(mount.parts), fstype) for mount, fstype in mounts if path.resolve().is_relative_to(mount)]
    fstype = max(above)[1] if above else ""
    if fstype.lower() in _NETWORK_FILE_SYSTEMS:
        raise DatabaseUnavailable(
            f"database {path}: lies on a network file system ({fstype}), where SQLite loses data; put it on a local disk or use PostgreSQL "
            "(GNOME_DATABASE_URL)"
        )


def to_json(value: Any) -> str:
    """Write JSON; numbers that are not finite become null, since JSON has no word for them."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(_finite_only(value), allow_nan=False)


def _finite_only(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite_only(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_only(item) for item in value]
    return value
