"""Crystals from the database into files that other programs read."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gnome.crystals.formats import ReadCrystal
from gnome.crystals.writers import check_target, write_crystals
from gnome.database.query import query
from gnome.database.store import Store
from gnome.errors import InvalidInput
from gnome.quantities import Quantity

_COLUMNS = (
    Quantity.ID, Quantity.REDUCED_FORMULA, Quantity.METHOD, Quantity.ENERGY_PER_ATOM, Quantity.CORRECTION_PER_ATOM,
    Quantity.E_FORM_PER_ATOM, Quantity.E_ABOVE_HULL, Quantity.DECOMPOSITION_ENERGY, Quantity.SPACE_GROUP_NUMBER,
    Quantity.PROTOSTRUCTURE, Quantity.ORIGIN, Quantity.ROUND, Quantity.PARENT, Quantity.GENERATOR,
)  # fmt: skip


def export_crystals(store: Store, out: Path, where: str = "") -> tuple[int, list[str]]:
    """Write the crystals that a filter matches; the ending of `out` chooses the format.  Returns how many, and of which methods."""
    check_target(out)
    rows = query(store, where, sort=Quantity.ID, with_crystals=True)
    if not rows:
        raise InvalidInput(f"no crystal matches {where!r}; nothing was written")
    if out.suffix.lower() == ".vasp" and len(rows) > 1:
        raise InvalidInput(
            f"{out}: a POSCAR holds one crystal, and {len(rows)} match; narrow the filter, or name a .cif or .extxyz file"
        )
    n = write_crystals(out, with_fields(rows), kind=None if out.suffix else "cif")
    return n, sorted({str(row[Quantity.METHOD]) for row in rows})


def with_fields(rows: Iterable[Mapping[str, Any]]) -> list[ReadCrystal]:
    """Crystals of a query as writers take them, with what the database says of each."""
    return [
        ReadCrystal(label=row[Quantity.ID], crystal=row["crystal"], fields={str(name): row[name] for name in _COLUMNS})
        for row in rows
    ]
