"""Searching a text for another without patterns, so that no character is special; upper and lower case differ."""

from typing import Any

from sqlalchemy import Boolean, ColumnElement
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement


class contains(FunctionElement[bool]):  # noqa: N801 - spelled as the SQL function it stands for
    """True where the first text contains the second; unknown where a text is."""

    type = Boolean()
    inherit_cache = True

    def __init__(self, text: ColumnElement[Any], part: ColumnElement[Any]) -> None:
        super().__init__(text, part)


@compiles(contains, "sqlite")
def _sqlite(element: contains, compiler: Any, **options: Any) -> str:
    return f"(instr({compiler.process(element.clauses, **options)}) > 0)"


@compiles(contains, "postgresql")
def _postgresql(element: contains, compiler: Any, **options: Any) -> str:
    return f"(strpos({compiler.process(element.clauses, **options)}) > 0)"
