"""Bringing the tables of a database to the newest form, when it is opened."""

from importlib import import_module
from pathlib import Path

from sqlalchemy import Connection, Engine, inspect, text

from gnome.database.engine import WRITES
from gnome.database.schema import HEAD
from gnome.errors import DatabaseUnavailable

MIGRATIONS = Path(__file__).with_name("migrations")
WRITE_LOCK = 0x474E6F4D
"""Key of the advisory lock that writers of a PostgreSQL database take; any number that all processes agree on."""


def revision(connection: Connection) -> str | None:
    """Tell the revision of the tables; None for an empty database.

    Raises DatabaseUnavailable when the tables are those of another program.
    """
    tables = set(inspect(connection).get_table_names())
    if "alembic_version" in tables and ("crystals" in tables or tables == {"alembic_version"}):
        return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    if tables:
        some = ", ".join(sorted(tables)[:3])
        raise DatabaseUnavailable(
            f"the database holds tables of another program ({some}); name an empty one with GNOME_DATABASE_URL"
        )
    return None


def check_revision(engine: Engine) -> None:
    """Refuse a database that this program can only read after an upgrade, or not at all."""
    with engine.connect() as connection:
        found = revision(connection)
    if found is None:
        raise DatabaseUnavailable("the database is empty; `gnome discover` or `gnome import` fills it")
    if found != HEAD:
        _refuse_newer(found)
        raise DatabaseUnavailable(
            f"the database has the form {found} of an older version; `gnome discover` or `gnome import` brings it to {HEAD}"
        )


def upgrade(engine: Engine, target: str = HEAD) -> None:
    """Bring the tables to the newest form, in one transaction; two processes at once do it once."""
    with engine.connect() as connection:
        found = revision(connection)
    if found == target:
        return
    with engine.connect().execution_options(**{WRITES: True}) as connection, connection.begin():
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": WRITE_LOCK})
        found = revision(connection)  # another process may have been first
        if found == target:
            return
        if found is not None:
            _refuse_newer(found)
        _run_alembic(connection, target)


def _run_alembic(connection: Connection, target: str) -> None:
    # Alembic takes a third of a second to import and is needed once in the life of a database.
    config = import_module("alembic.config").Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    import_module("alembic.command").upgrade(config, target)


def _refuse_newer(found: str) -> None:
    known = {path.name[1:5] for path in (MIGRATIONS / "versions").glob("r[0-9]*.py")}
    if found not in known:
        raise DatabaseUnavailable(
            f"the database has the form {found}, newer than this program knows ({HEAD}); update the program"
        )
