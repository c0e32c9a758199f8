"""Asking the database for crystals."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Final

from sqlalchemy import ColumnElement, func, select

from gnome.crystals.crystal import Crystal
from gnome.database.connection import Database
from gnome.database.crystal_store import SHOWN_COLUMNS, select_crystals
from gnome.database.filters import FIELDS, PREFIX, to_condition
from gnome.database.schema import candidates, crystals, methods
from gnome.errors import InvalidInput
from gnome.quantities import Quantity

_CANDIDATES: Final = 8
"""Ids that are named where several begin alike."""

_SORTABLE = {
    **{name: column for name, column in SHOWN_COLUMNS.items() if name not in {"decomposes_to", "versions"}},
    **{name: field.column for name, field in FIELDS.items() if field.kind != "elements"},
}


def query(
    store: Database,
    where: str = "",
    *,
    sort: str | Sequence[str] = (),
    limit: int | None = None,
    offset: int = 0,
    with_crystals: bool = False,
) -> list[dict[str, Any]]:
    """Find the crystals that a filter matches, as rows keyed by `Quantity` names.

    `sort` names fields, as a sequence or with commas; a leading `-` sorts downwards; unknown values come last; equal rows are in the
    order of their ids.  `with_crystals` adds the `Crystal` to each row under `crystal`.
    Raises InvalidInput for a filter or a sort that cannot be used, or a negative limit or offset.
    """
    for name, value in (("limit", limit), ("offset", offset)):
        if value is not None and value < 0:
            raise InvalidInput(f"{name} is {value}, expected 0 or more")
    statement = select_crystals().where(to_condition(where)).order_by(*_order(sort)).limit(limit).offset(offset)
    rows = []
    with store.read() as connection:
        for found in connection.execute(statement):
            row = {name: found._mapping[name] for name in SHOWN_COLUMNS}  # noqa: SLF001 - the documented way to a dict
            if with_crystals:
                row["crystal"] = Crystal.from_dict(found.structure)
            rows.append(row)
    return rows


def count(store: Database, where: str = "") -> int:
    """Count the crystals that a filter matches."""
    statement = select(func.count()).select_from(crystals.outerjoin(candidates)).where(to_condition(where))
    with store.read() as connection:
        return connection.scalar(statement) or 0


def find_id(store: Database, beginning: str) -> str:
    """Find the id of a crystal by its first characters, as many as tell it from others.

    Raises InvalidInput where no crystal's id begins so, or several do; these are named.
    """
    wanted = beginning.strip().lower()
    if not re.fullmatch(r"[0-9a-z]+", wanted):
        raise InvalidInput(
            f"no crystal {beginning[:60]!r} in {store.location}; an id has letters and digits alone, as `gnome query` lists it"
        )
    statement = (
        select(crystals.c.id, crystals.c.reduced_formula)
        .where(crystals.c.id.between(wanted, wanted + "~"))  # of the characters of ids, none comes after
        .distinct()
        .order_by(crystals.c.id)
        .limit(_CANDIDATES + 1)
    )
    with store.read() as connection:
        found = [(str(row.id), str(row.reduced_formula)) for row in connection.execute(statement)]
    if wanted in (ids := [identifier for identifier, _ in found]) or len(found) == 1:
        return ids[0]
    if not found:
        raise InvalidInput(f"no crystal {beginning[:60]!r} in {store.location}")
    named = ", ".join(f"{identifier} ({formula})" for identifier, formula in found[:_CANDIDATES])
    more = ", ..." if len(found) > _CANDIDATES else ""
    raise InvalidInput(f"several ids begin with {wanted!r}: {named}{more}; give more of it")


def find_method(store: Database, beginning: str) -> str:
    """Find the label of a method by its beginning, as `gnome query` shows it.

    Raises InvalidInput where none begins so, or several do; these are named.
    """
    with store.read() as connection:
        labels = [str(label) for label in connection.scalars(select(methods.c.label).order_by(methods.c.label))]
    found = [label for label in labels if label.startswith(beginning)]
    if beginning in found or len(found) == 1:
        return beginning if beginning in found else found[0]
    if not found:
        raise InvalidInput(f"no method {beginning[:60]!r} in {store.location}; there are {', '.join(labels) or 'none'}")
    raise InvalidInput(f"several methods begin with {beginning[:60]!r}: {', '.join(found)}; give more of it")


_FEW_VALUES: Final = (Quantity.METHOD, Quantity.GENERATOR)
"""Texts of which a database has few, so that all may be named."""


def values_asked_for(store: Database, where: str) -> dict[str, list[str]]:
    """Find which values there are of fields with few that a filter names, by field; for what is told where nothing matches."""
    asked = [name for name in _FEW_VALUES if re.search(rf"\b{PREFIX}{name}\b", where)]
    with store.read() as connection:
        return {
            str(name): sorted(
                str(value)
                for value in connection.scalars(
                    select(SHOWN_COLUMNS[name]).select_from(crystals.outerjoin(candidates)).distinct()
                )
                if value is not None
            )
            for name in asked
        }


def short_methods(labels: Iterable[str]) -> dict[str, str]:
    """Spell the labels of methods without their digests, where that still tells them apart."""
    short = {label: re.sub(r"-[0-9a-f]{8}$", "", label) for label in labels}
    n_alike = Counter(short.values())
    return {label: name if n_alike[name] == 1 else label for label, name in short.items()}


def _order(sort: str | Sequence[str]) -> list[ColumnElement[Any]]:
    names = [name.strip() for name in (sort.split(",") if isinstance(sort, str) else sort)]
    order = []
    for name in filter(None, names):
        field = name.removeprefix("-").removeprefix("+")
        column = _SORTABLE.get(field)
        if column is None:
            known = ", ".join(name for name in _SORTABLE if not name.startswith(PREFIX))
            raise InvalidInput(f"cannot sort by {field[:60]!r}; known are {known}")
        order.append(column.desc().nulls_last() if name.startswith("-") else column.asc().nulls_last())
    return [*order, crystals.c.id.asc(), crystals.c.method.asc()]
