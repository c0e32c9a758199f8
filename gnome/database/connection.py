"""Transactions on one database; the ground that the parts of `Store` stand on."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

from sqlalchemy import Connection, Engine, Row, Table, text, update
from sqlalchemy.dialects import postgresql, sqlite

from gnome.database.clock import database_time
from gnome.database.engine import WRITES, one_line_errors, open_engine, readable_url
from gnome.database.schema import leases
from gnome.database.upgrade import WRITE_LOCK, check_revision, upgrade
from gnome.errors import DatabaseUnavailable, RoundBusy

CHUNK = 500
"""Values in one IN list, rows in one page."""


@dataclass(frozen=True, kw_only=True)
class Fence:
    """Proof that this process holds the round: its token, and for how long each write prolongs the lease."""

    name: str
    token: int
    lease_seconds: float


class Database:
    """A database at the newest form of its tables.

    Each call of the methods built on it is one transaction.  Errors are those of `gnome.errors`.
    """

    def __init__(self, engine: Engine, *, read_only: bool) -> None:
        """Wrap an engine whose tables are up to date; `open` is the way in."""
        self.engine = engine
        self.read_only = read_only
        self.fence: Fence | None = None

    @classmethod
    def open(cls, url: str, *, read_only: bool = False) -> Self:
        """Open a database by URL or path; unless read-only, make it or bring its tables up to date.

        Raises DatabaseUnavailable when it cannot be used and InvalidInput when the URL is none of ours.
        """
        engine = open_engine(url, read_only=read_only)
        try:
            with one_line_errors(engine.url):
                if read_only:
                    check_revision(engine)
                else:
                    upgrade(engine)
        except BaseException:
            engine.dispose()
            raise
        return cls(engine, read_only=read_only)

    def close(self) -> None:
        """Give the connections back."""
        self.engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def location(self) -> str:
        """File or URL without password, for people."""
        return readable_url(self.engine.url)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Look at one consistent state."""
        with one_line_errors(self.engine.url), self.engine.connect() as connection:
            if connection.dialect.name == "postgresql":  # SQLite's readers see one state anyway
                connection.execution_options(isolation_level="REPEATABLE READ")
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """Change the database, all or nothing.

        A process that holds the round prolongs its lease with every write; one that has lost it is refused with RoundBusy.
        """
        if self.read_only:
            raise DatabaseUnavailable(f"database {self.location}: opened for reading only")
        with (
            one_line_errors(self.engine.url),
            self.engine.connect().execution_options(**{WRITES: True}) as connection,
            connection.begin(),
        ):
            if connection.dialect.name == "postgresql":
                # One writer at a time, as in SQLite: two that insert the same rows in different orders would end in a deadlock.
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": WRITE_LOCK})
            if self.fence is not None:
                keep_lease(connection, self.fence)
            yield connection


def keep_lease(connection: Connection, fence: Fence) -> None:
    """Prolong a lease inside a transaction, which then may only commit while the lease is held; raises RoundBusy when it is lost."""
    prolonged = connection.execute(
        update(leases)
        .where(leases.c.name == fence.name, leases.c.token == fence.token, leases.c.owner.is_not(None))
        .values(lease_until=database_time() + fence.lease_seconds)
    )
    if prolonged.rowcount != 1:
        raise RoundBusy("this process has lost the round: its lease ran out and another took over; nothing more is written by it")


def insert_new(connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]], *returned: str) -> Sequence[Row[Any]]:
    """Insert the rows whose unique keys are not there yet; returns those columns of the rows that were new."""
    if not rows:
        return []
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(table).on_conflict_do_nothing().returning(*(table.c[name] for name in returned))
    return connection.execute(statement, [dict(row) for row in rows]).all()


def in_chunks(values: Iterable[str], size: int = CHUNK) -> Iterator[list[str]]:
    """Cut distinct values into lists that fit one statement."""
    distinct = list(dict.fromkeys(values))
    for start in range(0, len(distinct), size):
        yield distinct[start : start + size]
