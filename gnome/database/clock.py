"""Time as the database tells it, so that leases of two machines are measured by one clock."""

from typing import Any

from sqlalchemy import Double
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement


class database_time(FunctionElement[float]):  # noqa: N801 - spelled as the SQL function it is
    """Seconds since 1970 (UTC) by the database's own clock, at the moment the statement runs."""

    type = Double()
    inherit_cache = True


@compiles(database_time, "sqlite")
def _sqlite(element: database_time, compiler: Any, **options: Any) -> str:
    del element, compiler, options
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(database_time, "postgresql")
def _postgresql(element: database_time, compiler: Any, **options: Any) -> str:
    del element, compiler, options
    return "extract(epoch from clock_timestamp())::double precision"
